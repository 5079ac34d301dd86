"""Blocks of a fixed 16-entry table: weight = table[code] * absmax of the block (NF4, FP4).

Blocks run along the matrix as it lies in memory, row after row, so they cross rows where in_features is no multiple of
the block size, and the last may be shorter. Codes, block maxima and dequantised weights are those of bitsandbytes 0.50
on a CPU, to the last bit, but for two things. It gives very small positive weights FP4's second zero (code 8); here
every zero has code 0. And where blocks cross rows, its AVX-512 kernel looks for the first block of row r at
r * (in_features // block_size), which is another one, and returns wrong weights (rows of a multiple of 16 columns); its
plain torch code and its GPU kernels give those that are defined here. Ties between two levels go to the lower one; its
GPU kernel for FP4 takes the one nearer to zero.

With double quantisation (QLoRA, section 3) the block maxima less their mean are stored in 8 bits, by the nearest entry
of the dynamic map times the largest magnitude among 256 of them. bitsandbytes' CPU kernel finds that entry by a lookup
of 65536 cells and so takes a neighbour for one number in a thousand; its GPU kernel and its plain torch code take the
nearest, as is done here. The codes of the weights are chosen before that, with the exact maxima, as bitsandbytes does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import bits as bitpack
from compress import tables
from compress.types import Storage, dense_linear

#: block maxima that share a second-level scale
NESTED_BLOCK = 256

_SMALLEST = 1e-38  # stands in for the maximum of a block of zeros


@dataclass(frozen=True)
class Blockwise:
    """A linear layer in blocks of a fixed table.

    Attributes:
        codes: uint8 [out, in], 0 .. 15.
        absmax: float32 [blocks], the largest magnitude of each block; with double quantisation uint8 [blocks], indices
            into the dynamic map.
        table: a name in `tables.NAMES`.
        block_size: weights a block.
        dtype: of the dequantised weight.
        nested_absmax: float32 [ceil(blocks / 256)], or None without double quantisation.
        nested_offset: float32 [1], the mean of the block maxima, or None.
    """

    kind: ClassVar[str] = "blockwise"
    parts: ClassVar[tuple[str, ...]] = ("codes", "absmax", "nested_absmax", "nested_offset")

    codes: Tensor
    absmax: Tensor
    table: str
    block_size: int
    dtype: torch.dtype
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return describe(self.table, self.block_size, self.nested_absmax is not None)

    def block_scales(self) -> Tensor:
        """float32 [blocks]: the maxima as they come out of storage."""
        if self.nested_absmax is None or self.nested_offset is None:
            return self.absmax
        values = tables.dynamic_map(self.absmax.device).index_select(0, self.absmax.int())
        return _times_block(values, self.nested_absmax, NESTED_BLOCK) + self.nested_offset

    def dequantize(self) -> Tensor:
        """table[code] * absmax in float32, rounded once to `dtype`: [out, in]."""
        values = tables.table(self.table, self.codes.device).index_select(0, self.codes.flatten().int())
        return _times_block(values, self.block_scales(), self.block_size).to(self.dtype).reshape(self.codes.shape)

    def rows(self, start: int, stop: int) -> Self:
        """Rows that begin and end between blocks; not with double quantisation, whose blocks belong to the matrix."""
        if (start, stop) == (0, self.shape[0]):
            return self
        first, last = start * self.shape[1], stop * self.shape[1]
        assert self.nested_absmax is None
        assert first % self.block_size == 0
        assert last % self.block_size == 0 or stop == self.shape[0]
        blocks = slice(first // self.block_size, -(-last // self.block_size))
        return replace(self, codes=self.codes[start:stop], absmax=self.absmax[blocks])

    def tensors(self) -> dict[str, Tensor]:
        out = {"codes": bitpack.pack(self.codes.flatten(), 4), "absmax": self.absmax}
        if self.nested_absmax is not None and self.nested_offset is not None:
            out |= {"nested_absmax": self.nested_absmax, "nested_offset": self.nested_offset}
        return out

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        return cls(
            bitpack.unpack(tensors["codes"], 4, shape[0] * shape[1]).reshape(shape),
            tensors["absmax"],
            storage.detail("table"),
            storage.group_size,
            dtype,
            tensors.get("nested_absmax"),
            tensors.get("nested_offset"),
        )

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        count = shape[0] * shape[1]
        blocks = -(-count // storage.group_size)
        codes = 4 * bitpack.words(count, 4)
        if storage.detail("double_quant"):
            return codes + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
        return codes + 4 * blocks

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)


def describe(table: str, block_size: int, double_quant: bool) -> Storage:
    """The storage of such a layer."""
    return Storage(Blockwise.kind, 4, block_size, details=(("double_quant", double_quant), ("table", table)))


def fit(weight: Tensor, table: str, block_size: int, double_quant: bool, dtype: torch.dtype) -> Blockwise:
    """Every weight on the nearest level of its block.

    Args:
        weight: float32 [out, in].
        table: a name in `tables.NAMES`.
        dtype: of the dequantised weight.
    """
    values, code = tables.levels(table, weight.device)
    absmax, scaled = _normalise(weight.flatten(), block_size)
    codes = code[_nearest(scaled, values)].reshape(weight.shape)
    if not double_quant:
        return Blockwise(codes, absmax, table, block_size, dtype)
    offset = absmax.mean()
    nested, scaled = _normalise(absmax - offset, NESTED_BLOCK)
    indices = _nearest(scaled, tables.dynamic_map(weight.device)).to(torch.uint8)
    return Blockwise(codes, indices, table, block_size, dtype, nested, offset[None])


def _normalise(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block [blocks], and the numbers divided by it [n]."""
    blocks = F.pad(flat, (0, -len(flat) % size)).reshape(-1, size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]
    if len(flat) % size:  # bitsandbytes divides in a short last block; elsewhere it multiplies by the inverse
        scaled[-1] = blocks[-1] / absmax[-1].clamp(min=_SMALLEST)
    return absmax, scaled.clamp_(-1, 1).flatten()[: len(flat)]


def _nearest(x: Tensor, values: Tensor) -> Tensor:
    """int32: the index of the nearest of rising values, the lower one of two as near."""
    return torch.bucketize(x, (values[:-1] + values[1:]) / 2, out_int32=True)


def _times_block(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each of `values` [n] times its block's scale."""
    padded = F.pad(values, (0, -len(values) % size)).reshape(-1, size)
    return (padded * scales[:, None]).flatten()[: len(values)]
