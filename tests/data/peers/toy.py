"""The model that the peers' checkpoints here were made of; shared by the make_*.py scripts, which know no compress."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def save_toy(folder: Path, dtype: torch.dtype = torch.bfloat16, tied: bool = True) -> Path:
    """A random Llama, the same on every machine with the same torch, and a tokenizer of 320 words."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=tied), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.to(dtype).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(320)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w0", eos_token="w0", pad_token="w0").save_pretrained(
        folder
    )
    return folder


def rows(count: int = 32, length: int = 64) -> Tensor:
    """int64 [count, length]: calibration tokens with some structure."""
    g = torch.Generator().manual_seed(1)
    return torch.randint(320, (count, length), generator=g).cumsum(1).remainder(320)


def sha(weight: Tensor) -> str:
    """sha256 of a weight's bytes as [out, in]."""
    return hashlib.sha256(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def keep(made: Path, out: Path, expected: dict[str, Any]) -> None:
    """Copy what a test needs of a checkpoint, with what the peer's own runtime says of it."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("config.json", "quantize_config.json"):
        if (made / name).exists():
            config = json.loads((made / name).read_text())
            for part in (config, config.get("quantization_config", {})):
                part.get("meta", {}).pop("offload_to_disk_path", None)  # a folder of the machine; the rest is as it was
            (out / name).write_text(json.dumps(config, indent=1) + "\n")
    shutil.copyfile(made / "model.safetensors", out / "model.safetensors")
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(out.name, sum(f.stat().st_size for f in out.iterdir()) // 1000, "kB")
