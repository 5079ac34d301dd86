"""Affine grid: code, scale and minimum a group. weight = scale * code + minimum.

What GGUF's Q4_1 holds (llama.cpp, ggml-quants.c, dequantize_row_q4_1): unlike a zero point, the minimum need not be a
multiple of the scale, so no level need be zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress.packed.uniform import group_index
from compress.types import Storage, dense_linear


@dataclass(frozen=True)
class Affine:
    """A linear layer on an affine grid.

    Attributes:
        codes: uint8 [out, in], in 0 .. 2**bits - 1.
        scales: [out, groups] in the dtype that is stored.
        minima: [out, groups] in the same dtype: what code 0 stands for.
        bits: 2 to 8.
        group_size: columns a group, -1 for the whole row; the last group may be shorter.
    """

    kind: ClassVar[str] = "affine"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "minima")

    codes: Tensor
    scales: Tensor
    minima: Tensor
    bits: int
    group_size: int

    def __post_init__(self) -> None:
        """Raises ValueError for scales or minima that do not belong to the codes."""
        rows, columns = self.codes.shape
        grid = (rows, _groups(columns, self.group_size))
        for what, tensor in (("scales", self.scales), ("minima", self.minima)):
            if tuple(tensor.shape) != grid:
                raise ValueError(f"{what} are {list(tensor.shape)}, not {list(grid)}")
        if self.minima.dtype != self.scales.dtype:
            raise ValueError(f"minima are {self.minima.dtype}, scales {self.scales.dtype}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return Storage(self.kind, self.bits, self.group_size, symmetric=False)

    def dequantize(self) -> Tensor:
        """scale * code + minimum in float32, rounded once to the dtype of the scales: [out, in].

        With scales in 16 bits the product is exact in float32, so a fused multiply-add gives the same.
        """
        groups = group_index(self.shape[1], self.group_size, self.codes.device)
        scales, minima = self.scales.float()[:, groups], self.minima.float()[:, groups]
        return (self.codes.float() * scales + minima).to(self.scales.dtype)

    def rows(self, start: int, stop: int) -> Self:
        part = slice(start, stop)
        return replace(self, codes=self.codes[part], scales=self.scales[part], minima=self.minima[part])

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": bitpack.pack(self.codes, self.bits), "scales": self.scales, "minima": self.minima}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        codes = bitpack.unpack(tensors["codes"], storage.bits, shape[1])
        return cls(codes, tensors["scales"], tensors["minima"], storage.bits, storage.group_size)

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = _groups(columns, storage.group_size)
        return rows * (4 * bitpack.words(columns, storage.bits) + 2 * groups * dtype.itemsize)

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)


def _groups(columns: int, group_size: int) -> int:
    return 1 if group_size == -1 else -(-columns // group_size)
