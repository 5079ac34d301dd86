"""Two-level grid: small groups whose scales and zero points are themselves quantised.

weight = s * (code - z), with real s and z for each output row and group of columns. As in SpQR (Dettmers et al. 2023,
section 4.1) s and z are small integers on grids of their own, which each run of output rows shares within one group of
columns: s = scale_scale * (scale_code - scale_zero), z = zero_scale * (zero_code - zero_zero), in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress.packed.uniform import group_index
from compress.types import Storage, dense_linear

#: bits of a statistic that is not quantised
PLAIN = 16


@dataclass(frozen=True)
class Statistic:
    """One number for each output row and group: all scales, or all zero points, of a matrix.

    Attributes:
        scales: of the second-level grid, [runs, groups] in the dtype that is stored; the numbers themselves,
            [out, groups], where they are not quantised.
        run: output rows that share a second-level grid; the last run may be shorter.
        bits: of a code, or 16 where the numbers are stored as they are.
        codes: uint8 [out, groups], or None.
        zeros: of the second-level grid, real numbers [runs, groups] in the dtype of `scales`, or None.
    """

    scales: Tensor
    run: int
    bits: int = PLAIN
    codes: Tensor | None = None
    zeros: Tensor | None = None

    def values(self, codes: Tensor | None = None) -> Tensor:
        """float32 [out, groups]: scale * (code - zero), also for other codes [out, groups] on the same grid."""
        codes = self.codes if codes is None else codes
        if codes is None or self.zeros is None:
            return self.scales.float()
        scales, zeros = (x.float().repeat_interleave(self.run, 0)[: len(codes)] for x in (self.scales, self.zeros))
        return scales * (codes.float() - zeros)

    def rows(self, start: int, stop: int) -> Statistic:
        """Of output rows start..stop-1; start is a multiple of `run`."""
        if self.codes is None or self.zeros is None:
            return Statistic(self.scales[start:stop], self.run)
        assert start % self.run == 0
        assert stop % self.run == 0 or stop == len(self.codes)
        runs = slice(start // self.run, -(-stop // self.run))
        return Statistic(self.scales[runs], self.run, self.bits, self.codes[start:stop], self.zeros[runs])

    def tensors(self, name: str) -> dict[str, Tensor]:
        """As stored: codes int32 [groups, words], packed along the output rows, which mostly fill whole words."""
        if self.codes is None or self.zeros is None:
            return {f"{name}_scales": self.scales}
        codes = bitpack.pack(self.codes.t(), self.bits)
        return {f"{name}_codes": codes, f"{name}_scales": self.scales, f"{name}_zeros": self.zeros}

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor], rows: int, bits: int, run: int) -> Statistic:
        """Exact inverse of `tensors`."""
        scales = tensors[f"{name}_scales"]
        if bits == PLAIN:
            return cls(scales, run)
        codes = bitpack.unpack(tensors[f"{name}_codes"], bits, rows).t().contiguous()
        return cls(scales, run, bits, codes, tensors[f"{name}_zeros"])

    @staticmethod
    def stored_bytes(rows: int, groups: int, bits: int, run: int, itemsize: int) -> int:
        """Bytes of `tensors`."""
        if bits == PLAIN:
            return rows * groups * itemsize
        return groups * (4 * bitpack.words(rows, bits) + 2 * -(-rows // run) * itemsize)


@dataclass(frozen=True)
class BiLevel:
    """A linear layer on a two-level grid.

    Attributes:
        codes: uint8 [out, in], in 0 .. 2**bits - 1.
        scale_scales, scale_codes, scale_zeros: the parts of `scale`; its values are positive.
        zero_scales, zero_codes, zero_zeros: the parts of `zero`.
        bits: 2 to 8.
        group_size: columns a group; the last group may be shorter.
        qq_scale_bits, qq_zero_bits: of the statistics' codes, 16 where they are not quantised.
        qq_groupsize: output rows that share a second-level grid.
        dtype: of the dequantised weight.
    """

    kind: ClassVar[str] = "bilevel"
    parts: ClassVar[tuple[str, ...]] = (
        "codes", "scale_codes", "scale_scales", "scale_zeros", "zero_codes", "zero_scales", "zero_zeros",
    )  # fmt: skip

    codes: Tensor
    scale_scales: Tensor
    scale_codes: Tensor | None
    scale_zeros: Tensor | None
    zero_scales: Tensor
    zero_codes: Tensor | None
    zero_zeros: Tensor | None
    bits: int
    group_size: int
    qq_scale_bits: int
    qq_zero_bits: int
    qq_groupsize: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, codes: Tensor, scale: Statistic, zero: Statistic, bits: int, group_size: int, dtype: torch.dtype
    ) -> Self:
        """From codes and statistics, which share their runs."""
        first = (scale.scales, scale.codes, scale.zeros)
        last = (zero.scales, zero.codes, zero.zeros)
        return cls(codes, *first, *last, bits, group_size, scale.bits, zero.bits, scale.run, dtype)

    @property
    def scale(self) -> Statistic:
        """Of each row and group."""
        return Statistic(self.scale_scales, self.qq_groupsize, self.qq_scale_bits, self.scale_codes, self.scale_zeros)

    @property
    def zero(self) -> Statistic:
        """Of each row and group: real numbers."""
        return Statistic(self.zero_scales, self.qq_groupsize, self.qq_zero_bits, self.zero_codes, self.zero_zeros)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return storage_of(self.bits, self.group_size, self.qq_scale_bits, self.qq_zero_bits, self.qq_groupsize)

    def dequantize(self) -> Tensor:
        """scale * (code - zero) in float32, rounded once to `dtype`: [out, in]."""
        groups = group_index(self.shape[1], self.group_size, self.codes.device)
        offset = self.codes.float() - self.zero.values()[:, groups]
        dense: Tensor = offset.mul_(self.scale.values()[:, groups]).to(self.dtype)
        return dense

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)

    def rows(self, start: int, stop: int) -> Self:
        """start, and stop unless it is the end, are multiples of `qq_groupsize` where anything is quantised by it."""
        scale, zero = self.scale.rows(start, stop), self.zero.rows(start, stop)
        return self.of(self.codes[start:stop], scale, zero, self.bits, self.group_size, self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        codes = bitpack.pack(self.codes, self.bits)
        return {"codes": codes, **self.scale.tensors("scale"), **self.zero.tensors("zero")}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        run = storage.detail("qq_groupsize")
        scale = Statistic.from_tensors("scale", tensors, shape[0], storage.detail("qq_scale_bits"), run)
        zero = Statistic.from_tensors("zero", tensors, shape[0], storage.detail("qq_zero_bits"), run)
        codes = bitpack.unpack(tensors["codes"], storage.bits, shape[1])
        return cls.of(codes, scale, zero, storage.bits, storage.group_size, dtype)

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = shape
        groups, run = -(-columns // storage.group_size), storage.detail("qq_groupsize")
        each = (storage.detail("qq_scale_bits"), storage.detail("qq_zero_bits"))
        statistics = sum(Statistic.stored_bytes(rows, groups, bits, run, dtype.itemsize) for bits in each)
        return rows * 4 * bitpack.words(columns, storage.bits) + statistics


def storage_of(bits: int, group_size: int, scale_bits: int, zero_bits: int, run: int) -> Storage:
    """The storage of a two-level grid."""
    details = (("qq_groupsize", run), ("qq_scale_bits", scale_bits), ("qq_zero_bits", zero_bits))
    return Storage(BiLevel.kind, bits, group_size, symmetric=False, details=details)
