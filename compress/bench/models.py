"""Checkpoints of random weights in the shapes of published models: what is compressed where only time counts.

Files are as published ones: bfloat16 safetensors in shards with an index, config.json, a tokenizer (the bundled
model's). A tensor is drawn at a time, on the GPU if there is one, so memory stays small.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from compress.assets import folder as asset
from compress.checkpoint import tensor_bytes
from compress.writer import write_json

#: bytes of a shard at most, a larger tensor aside
SHARD = 5 * 10**9
_STD = 0.02
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_BYTES = 2  # of a weight


@dataclass(frozen=True)
class Sizes:
    """Of a Llama.

    Attributes:
        blocks: decoder blocks.
        heads, pairs: of attention: queries; keys and values.
        theta: of rotary embeddings.
        context: tokens.
        tied: the output head is the embeddings.
    """

    blocks: int
    hidden: int
    intermediate: int
    heads: int
    pairs: int
    vocabulary: int
    theta: float = 10000.0
    context: int = 4096
    tied: bool = False

    def cut(self, blocks: int) -> Sizes:
        """With fewer blocks."""
        return replace(self, blocks=min(blocks, self.blocks))

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes in the order of the files."""
        hidden, narrow = self.hidden, self.hidden // self.heads * self.pairs
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for i in range(self.blocks):
            block = f"model.layers.{i}"
            yield f"{block}.input_layernorm.weight", (hidden,)
            for name, rows in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden)):
                yield f"{block}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{block}.post_attention_layernorm.weight", (hidden,)
            for name in ("gate", "up"):
                yield f"{block}.mlp.{name}_proj.weight", (self.intermediate, hidden)
            yield f"{block}.mlp.down_proj.weight", (hidden, self.intermediate)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for _, shape in self.tensors())

    @property
    def nbytes(self) -> int:
        return _BYTES * self.parameters

    def config(self) -> dict[str, Any]:
        """config.json"""
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 0,
            "dtype": "bfloat16",
            "eos_token_id": 0,
            "head_dim": self.hidden // self.heads,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": self.context,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.blocks,
            "num_key_value_heads": self.pairs,
            "rms_norm_eps": 1e-05,
            "rope_parameters": {"rope_theta": self.theta, "rope_type": "default"},
            "tie_word_embeddings": self.tied,
            "vocab_size": self.vocabulary,
        }


MODELS: dict[str, Sizes] = {
    "llama-2-7b": Sizes(32, 4096, 11008, 32, 32, 32000),
    "llama-3-8b": Sizes(32, 4096, 14336, 32, 8, 128256, 500000.0, 8192),
    "llama-3-70b": Sizes(80, 8192, 28672, 64, 8, 128256, 500000.0, 8192),
    "smollm2-135m": Sizes(30, 576, 1536, 9, 3, 49152, 100000.0, 8192, tied=True),
    "tiny": Sizes(2, 64, 128, 4, 2, 4096, context=512),
}


def write(folder: Path, sizes: Sizes, device: torch.device) -> int:
    """A checkpoint in a new folder, on the disk when this returns. Weights are drawn on `device`.

    Returns:
        bytes of its weight files.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        """Norms are ones, matrices random."""
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        made = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return made.normal_(0, _STD, generator=generator).cpu()

    shards = list(_shards(sizes))
    names: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(shards):
        file = folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        names.update(dict.fromkeys(shard, file.name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name, shape in shard.items():
            size = _BYTES * prod(shape)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        with file.open("wb") as out:
            out.write(len(raw).to_bytes(8, "little") + raw)
            for shape in shard.values():
                out.write(tensor_bytes(draw(shape)))
            out.flush()
            os.fsync(out.fileno())
        total += file.stat().st_size
    index = {"metadata": {"total_size": sizes.nbytes}, "weight_map": names}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", sizes.config())
    for name in _TOKENIZER:
        shutil.copy(asset("calib") / "tiny" / name, folder / name)
    return total


def _shards(sizes: Sizes) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    room = SHARD
    for name, shape in sizes.tensors():
        size = _BYTES * prod(shape)
        if shard and size > room:
            yield shard
            shard, room = {}, SHARD
        shard[name] = shape
        room -= size
    yield shard
