"""Uniform integer grid: code, scale and optional zero point a group. weight = scale * (code - zero)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress.types import Storage


@dataclass(frozen=True)
class UniformGrid:
    """A linear layer on a uniform grid.

    Attributes:
        codes: uint8 [out, in], in 0 .. 2**bits - 1.
        scales: [out, groups] in the dtype that is stored; may be negative.
        zeros: uint8 [out, groups], or None for the symmetric grid, whose zero is 2**(bits - 1).
        bits: 2 to 8.
        group_size: columns a group, -1 for the whole row; the last group may be shorter.
        g_idx: int32 [in], the group of each column where groups follow an activation order, else None.
    """

    kind: ClassVar[str] = "uniform"

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    g_idx: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return Storage(self.kind, self.bits, self.group_size, self.zeros is None, self.g_idx is not None)

    def column_groups(self) -> Tensor:
        """int64 [in]: the group of each input column."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return group_index(self.shape[1], self.group_size, self.codes.device)

    def dequantize(self) -> Tensor:
        """scale * (code - zero), rounded once, in the dtype of the scales: [out, in]."""
        groups = self.column_groups()
        dtype = self.scales.dtype
        if self.zeros is None:
            offset = self.codes.to(torch.int16) - 2 ** (self.bits - 1)
        else:
            offset = self.codes.to(torch.int16) - self.zeros.to(torch.int16)[:, groups]
        dense: Tensor = offset.to(dtype) * self.scales[:, groups]
        return dense

    def rows(self, start: int, stop: int) -> Self:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        scales = self.scales[start:stop]
        return type(self)(self.codes[start:stop], scales, zeros, self.bits, self.group_size, self.g_idx)

    def to(self, device: torch.device | str) -> Self:
        """The same layer with its tensors on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        g_idx = None if self.g_idx is None else self.g_idx.to(device)
        return type(self)(self.codes.to(device), self.scales.to(device), zeros, self.bits, self.group_size, g_idx)

    def tensors(self) -> dict[str, Tensor]:
        out = {"codes": bitpack.pack(self.codes, self.bits), "scales": self.scales}
        if self.zeros is not None:
            out["zeros"] = bitpack.pack(self.zeros, self.bits)
        if self.g_idx is not None:
            out["g_idx"] = self.g_idx
        return out

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int]) -> Self:
        scales = tensors["scales"]
        zeros = tensors.get("zeros")
        return cls(
            bitpack.unpack(tensors["codes"], storage.bits, shape[1]),
            scales,
            None if zeros is None else bitpack.unpack(zeros, storage.bits, scales.shape[1]),
            storage.bits,
            storage.group_size,
            tensors.get("g_idx"),
        )


def group_index(columns: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [columns]: column // group_size (all zero for group_size -1)."""
    index = torch.arange(columns, device=device)
    return torch.zeros_like(index) if group_size == -1 else index // group_size
