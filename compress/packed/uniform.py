"""Uniform integer grid: code, scale and optional zero point a group. weight = scale * (code - zero)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress import int8
from compress.types import Storage, dense_linear


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
        activations: how `linear` quantises its input, see `Storage.activations`; takes 8 bits and one group a row.
    """

    kind: ClassVar[str] = "uniform"
    parts: ClassVar[tuple[str, ...]] = ("codes", "scales", "zeros", "g_idx")

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    g_idx: Tensor | None = None
    activations: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError for scales or zeros that do not belong to the codes."""
        rows, columns = self.codes.shape
        grid = (rows, 1 if self.group_size == -1 else -(-columns // self.group_size))
        for what, tensor in (("scales", self.scales), ("zeros", self.zeros)):
            if tensor is not None and tuple(tensor.shape) != grid:
                raise ValueError(f"{what} are {list(tensor.shape)}, not {list(grid)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return Storage(
            self.kind, self.bits, self.group_size, self.zeros is None, self.g_idx is not None, self.activations
        )

    def column_groups(self) -> Tensor:
        """int64 [in]: the group of each input column."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return group_index(self.shape[1], self.group_size, self.codes.device)

    def dequantize(self) -> Tensor:
        """scale * (code - zero), rounded once, in the dtype of the scales: [out, in]."""
        dtype, middle = self.scales.dtype, 2 ** (self.bits - 1)
        rows, count = self.scales.shape
        size = self.shape[1] if self.group_size == -1 else self.group_size
        codes, scales, zeros = self.codes.to(torch.int16), self.scales, self.zeros
        if self.g_idx is None and count * size == self.shape[1]:
            # whole groups side by side: gathering a scale for every column would take longer than all the rest
            codes, scales = codes.reshape(rows, count, size), scales[..., None]
            zeros = None if zeros is None else zeros[..., None]
        else:
            groups = self.column_groups()
            scales = scales[:, groups]
            zeros = None if zeros is None else zeros[:, groups]
        offset = codes.sub_(middle if zeros is None else zeros.to(torch.int16))
        return offset.to(dtype).mul_(scales).reshape(self.shape)

    def rows(self, start: int, stop: int) -> Self:
        zeros = None if self.zeros is None else self.zeros[start:stop]
        scales = self.scales[start:stop]
        return replace(self, codes=self.codes[start:stop], scales=scales, zeros=zeros)

    def tensors(self) -> dict[str, Tensor]:
        out = {"codes": bitpack.pack(self.codes, self.bits), "scales": self.scales}
        if self.zeros is not None:
            out["zeros"] = bitpack.pack(self.zeros, self.bits)
        if self.g_idx is not None:
            out["g_idx"] = self.g_idx
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        scales = tensors["scales"]
        zeros = tensors.get("zeros")
        return cls(
            bitpack.unpack(tensors["codes"], storage.bits, shape[1]),
            scales,
            None if zeros is None else bitpack.unpack(zeros, storage.bits, scales.shape[1]),
            storage.bits,
            storage.group_size,
            tensors.get("g_idx"),
            storage.activations,
        )

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = 1 if storage.group_size == -1 else -(-columns // storage.group_size)
        zeros = 0 if storage.symmetric else 4 * bitpack.words(groups, storage.bits)
        indices = 4 * columns if storage.ordered_groups else 0
        return rows * (4 * bitpack.words(columns, storage.bits) + groups * dtype.itemsize + zeros) + indices

    def linear(self, x: Tensor) -> Tensor:
        """x W^T: with the dequantised weight, or as an 8-bit product where `activations` says so (see int8.py)."""
        if not self.activations:
            return dense_linear(self, x)
        assert (self.bits, self.scales.shape[1]) == (8, 1), "the 8-bit product takes 8-bit codes, one scale a row"
        zeros = None if self.zeros is None else self.zeros[:, 0]
        return int8.linear(x, self.codes, self.scales[:, 0], zeros, self.activations)


def group_index(columns: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [columns]: column // group_size (all zero for group_size -1)."""
    index = torch.arange(columns, device=device)
    return torch.zeros_like(index) if group_size == -1 else index // group_size
