"""Checkpoints as llm-compressor writes them, and the weights as compressed-tensors decompresses them.

    PYTHON make_llmcompressor.py [OUT]

PYTHON has llmcompressor. Writes OUT/llmcompressor-*/ with expected.json: {"versions", "weights": {layer: [dtype, sha256
of the bytes as [out, in]]}}; OUT defaults to this folder. Made with llmcompressor 0.14.0.1, compressed-tensors 0.19.0,
torch 2.13.0 (CPU), transformers 5.17.0.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import compressed_tensors
import llmcompressor
import torch
import transformers
from compressed_tensors.compressors import decompress_module
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from toy import keep, rows, save_toy, sha
from transformers import AutoModelForCausalLM

GROUP = {"num_bits": 4, "strategy": "group", "group_size": 32}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None, target: str = "Linear") -> Any:
    """One group of layers."""
    inputs_args = None if inputs is None else QuantizationArgs(**inputs)
    return QuantizationScheme(targets=[target], weights=QuantizationArgs(**weights), input_activations=inputs_args)


def recipes() -> dict[str, Any]:
    """name -> modifier."""
    ignore = ["lm_head"]
    narrow = scheme(GROUP, target=r"re:.*self_attn\..*_proj$")
    wide = scheme({"num_bits": 8, "strategy": "channel"}, target=r"re:.*mlp\.(gate|up)_proj$")
    product = scheme({"num_bits": 8, "strategy": "channel"}, TOKEN, target=r"re:.*down_proj$")
    eight = {"num_bits": 8, "strategy": "channel"}
    return {
        "w4a16": GPTQModifier(ignore=ignore, config_groups={"group_0": scheme(GROUP)}),  # actorder "static" by default
        "w4a16-asymmetric": GPTQModifier(
            ignore=ignore, config_groups={"group_0": scheme({**GROUP, "symmetric": False})}
        ),
        "w3a16-float32": QuantizationModifier(  # scales rounded to bfloat16, stored in the dtype of the model
            ignore=ignore, config_groups={"group_0": scheme({**GROUP, "num_bits": 3, "scale_dtype": torch.bfloat16})}
        ),
        "w8a8": GPTQModifier(ignore=ignore, config_groups={"group_0": scheme(eight, TOKEN)}),
        "w8a8-asymmetric-inputs": QuantizationModifier(
            ignore=ignore, config_groups={"group_0": scheme(eight, {**TOKEN, "symmetric": False})}
        ),
        "w8a8-tensor": QuantizationModifier(
            ignore=ignore, config_groups={"group_0": scheme({"num_bits": 8, "strategy": "tensor"}, TOKEN)}
        ),
        "w8a16-tensor": QuantizationModifier(
            ignore=ignore, config_groups={"group_0": scheme({"num_bits": 8, "strategy": "tensor"})}
        ),
        "mixed": QuantizationModifier(
            ignore=[*ignore, "model.layers.0.self_attn.k_proj"],
            config_groups={"group_0": narrow, "group_1": wide, "group_2": product},
        ),
        "head": QuantizationModifier(config_groups={"group_0": scheme({**GROUP, "symmetric": False})}),
    }


def main(out: Path) -> None:
    torch.set_num_threads(1)
    packages = (llmcompressor, compressed_tensors, torch, transformers)
    versions = {p.__name__: p.__version__ for p in packages}
    ids = rows().tolist()
    data = Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]})
    for name, modifier in recipes().items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            dtype = torch.float32 if "float32" in name else torch.bfloat16
            source = save_toy(Path(scratch) / "toy", dtype, tied=name != "head")
            made = Path(scratch) / "made"
            oneshot(
                model=str(source),
                dataset=data,
                recipe=modifier,
                output_dir=str(made),
                num_calibration_samples=len(ids),
                max_seq_length=64,
                shuffle_calibration_samples=False,
            )
            model = AutoModelForCausalLM.from_pretrained(made)
            weights = {}
            for layer, module in model.named_modules():
                if hasattr(module, "quantization_scheme"):
                    decompress_module(module)
                    dense = module.weight
                    weights[layer] = [str(dense.dtype).removeprefix("torch."), sha(dense)]
            keep(made, out / f"llmcompressor-{name}", {"versions": versions, "weights": weights})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
