"""Run by gptqmodel's own Python: logits of checkpoints as its users load them.

ask_gptqmodel.py OUT: OUT/job.json lists {"folder", "loader", "backend"} and perhaps "generate", how many tokens to go
on; OUT/tokens.safetensors holds the tokens. Writes OUT/<n>.safetensors, or OUT/<n>.error, for the n-th folder. Loaders:
"transformers" is plain from_pretrained in float32 (through optimum and gptqmodel), "gptqmodel" its own in float16.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig


def load(folder: str, loader: str, backend: str | None) -> Any:
    """The model, every key of its files used."""
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        return GPTQModel.load(folder, device="cpu", backend=BACKEND(backend or "auto"), dtype=torch.float16).model
    bits = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["bits"]
    choice = {} if backend is None else {"quantization_config": GPTQConfig(bits=bits, backend=backend)}
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **choice)
    if any(info.values()):
        raise ValueError(f"keys that do not fit: {info}")
    return model


def main(out: Path) -> None:
    torch.set_num_threads(1)
    tokens = load_file(out / "tokens.safetensors")["tokens"]
    for n, ask in enumerate(json.loads((out / "job.json").read_text())):
        try:
            new = ask.pop("generate", 0)
            model = load(**ask).eval()
            with torch.no_grad():
                found = {"logits": model(tokens).logits.contiguous()}
                if new:
                    found["made"] = model.generate(tokens, max_new_tokens=new, do_sample=False)[:, tokens.shape[1] :]
            kernels = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight")})
            save_file(
                {k: v.contiguous() for k, v in found.items()}, out / f"{n}.safetensors", {"kernels": ", ".join(kernels)}
            )
        except Exception as error:
            last = "".join(traceback.format_tb(error.__traceback__, limit=-2))
            (out / f"{n}.error").write_text(f"{type(error).__name__}: {error}\n{last}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
