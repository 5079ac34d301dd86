"""Checkpoints as gptqmodel writes them, and the weights as its own torch kernel dequantises them.

    PYTHON make_gptqmodel.py [OUT]

PYTHON has gptqmodel (tests/clients/make.sh makes such an environment). Writes OUT/gptqmodel-*/ with expected.json:
{"versions", "weights": {layer: [dtype, sha256 of the bytes as [out, in]]}}; OUT defaults to this folder. Made with
gptqmodel 7.7.0, torch 2.13.0 (CPU), transformers 5.23.0.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it asks for two on any machine, and refuses fewer

import torch
import transformers
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig, __version__
from gptqmodel.quantization.config import FORMAT
from toy import keep, rows, save_toy, sha

#: name -> settings; "act-order" has a g_idx out of order
CHECKPOINTS = {
    "4bit-g32": {"bits": 4, "group_size": 32, "desc_act": False, "act_group_aware": False},
    "4bit-g32-act-order": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "4bit-g32-asymmetric": {"bits": 4, "group_size": 32, "sym": False, "desc_act": False},
    "3bit-g32": {"bits": 3, "group_size": 32, "desc_act": False},
    "2bit-g32-v2": {"bits": 2, "group_size": 32, "sym": False, "desc_act": False, "format": FORMAT.GPTQ_V2},
    "8bit-row": {"bits": 8, "group_size": -1, "desc_act": False, "act_group_aware": False},
    "mixed": {
        "bits": 4,
        "group_size": 32,
        "desc_act": False,
        "dynamic": {
            r"+:.*\.down_proj$": {"bits": 8, "group_size": 64},
            r"-:.*\.0\.self_attn\.k_proj$": {},
        },
    },
}


def main(out: Path) -> None:
    versions = {"gptqmodel": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows()]
    only = sys.argv[2:]
    for name, settings in CHECKPOINTS.items():
        if only and name not in only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = save_toy(Path(scratch) / "toy")
            model = GPTQModel.load(str(source), QuantizeConfig(**settings), device="cpu")
            model.quantize(data, batch_size=8, backend=BACKEND.TORCH)
            made = Path(scratch) / "made"
            model.save(str(made))
            loaded = GPTQModel.load(str(made), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
            weights = {}
            for layer, module in loaded.named_modules():
                if hasattr(module, "qweight"):
                    dense = module.dequantize_weight().t()
                    weights[layer] = [str(dense.dtype).removeprefix("torch."), sha(dense)]
            keep(made, out / f"gptqmodel-{name}", {"versions": versions, "weights": weights})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
