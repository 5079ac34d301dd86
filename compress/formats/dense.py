"""Ordinary weights: what every client loads, at the size of the original.

A pruned model is stored with its zeros in place, which is all that vLLM, SGLang and transformers take of one; any other
result can be written so that its quality can be seen where its own format does not load. config.json says nothing of
it: there is no quantization_config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.formats.base import Held, LayerShape
from compress.packed.dense import Dense
from compress.types import Packed, Storage


class DenseFormat:
    """The format as a value; see the module's text."""

    name = "dense"
    suffixes = ("weight",)
    container = "safetensors"
    quantised = False

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        if storage.activations:
            return "ordinary weights quantise no activations: use --format compressed-tensors, or native"
        return None

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        return shape[0] * shape[1] * scale_dtype.itemsize

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        return {"weight": packed.dequantize().contiguous()}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Packed:
        """The values: of the kind that made them nothing is left."""
        return Dense(tensors["weight"])

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        return set()

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        return shapes["weight"][0], shapes["weight"][1]

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return dtypes["weight"]

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        return Storage(Dense.kind, 16)

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        return ""

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        return {}

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}
