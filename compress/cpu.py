"""Fast layouts of packed layers for CPUs: torch's own kernels on 4- and 8-bit weights.

Which layer gets which (`find`); measured with torch 2.13, AVX-512 and AVX2 (reports/cpu-inference):

- `Int4`: uniform 4-bit grid, symmetric or not, in natural column order, groups of 32, 64, 128 or 256 columns that
  divide in_features (or a multiple of one of these, whose scales are repeated), out_features a multiple of 16.
  `_weight_int4pack_mm_for_cpu` computes with w = (code - 8) * s + z, s and z in bfloat16, summing in float32.
- `Int8`: uniform symmetric 8-bit grid with one scale a row, in_features a multiple of 16: with others
  `_weight_int8pack_mm` reads past the end of its input (it has no tail loop).
- `Product8`: the same grid with inputs quantised as they come: the exact product of `compress.int8`, whose codes are
  kept as the signed bytes that it multiplies.

The first two take bfloat16 inputs alone: in float16 and float32 torch runs a plain loop, slower than a dense product.
On a CPU without AVX2 nothing is taken, for the same reason.

Their twin is `Packed.linear`. `Product8` gives the same bits. `Int4` and `Int8` round less than it: it rounds each
weight to the scales' dtype, they only the scale (where it is not bfloat16 already) and the zero point's offset z.

COMPRESS_KERNELS=0 in the environment switches all of them off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress import fast, int8
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

#: columns that may share a scale in the int4 kernel, the longest first
GROUPS = (256, 128, 64, 32)
_INT4_ROWS = 16  # out_features is a multiple of it
_INT4_BLOCK = 64  # rows that are laid out together; each such block is independent of the others
_INT8_COLUMNS = 16  # in_features is a multiple of it


def enabled() -> bool:
    """Whether this machine has these kernels and they are not switched off."""
    return not fast.switched_off() and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def find(storage: Storage, shape: tuple[int, int]) -> type[fast.Kernel] | None:
    """The kernel for a layer on this machine, if there is one."""
    if not enabled():
        return None
    return next((k for k in (Int4, Int8, Product8) if k.why_not(storage, shape) is None), None)


@dataclass(frozen=True)
class Int4:
    """See the module's text.

    Attributes:
        codes: uint8 [out, in / 2] in the kernel's order, which depends on the CPU.
        scale_and_zero: bfloat16 [in / group, out, 2].
        scales: as stored, [out, groups], where they are not bfloat16 (else they stand in `scale_and_zero`).
        zeros: as stored, int32 [out, words], or None.
        group_size: as stored.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    codes: Tensor
    scale_and_zero: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    group_size: int

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        rows, columns = shape
        if (storage.kind, storage.bits, storage.activations) != (UniformGrid.kind, 4, ""):
            return "not a weight-only uniform grid of 4 bits"
        if storage.ordered_groups:
            return "its groups follow an activation order"
        size = columns if storage.group_size == -1 else storage.group_size
        if columns % size or all(size % g for g in GROUPS):
            return f"groups of {size} columns are no multiple of {GROUPS[-1]} that divides {columns}"
        return f"{rows} rows are no multiple of {_INT4_ROWS}" if rows % _INT4_ROWS else None

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, UniformGrid)
        rows, columns = packed.shape
        order = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        starts = range(0, rows, _INT4_BLOCK * 16)  # in parts: it wants 32 bits a weight
        codes = [order(packed.codes[i : i + _INT4_BLOCK * 16].to(torch.int32), 1) for i in starts]
        size = columns if packed.group_size == -1 else packed.group_size
        scale = packed.scales.to(torch.bfloat16)
        offset = torch.zeros_like(scale)
        if packed.zeros is not None:
            offset = (scale.float() * (8 - packed.zeros.float())).to(torch.bfloat16)
        both = torch.stack([scale, offset], -1).transpose(0, 1)  # [groups, out, 2]
        both = both.repeat_interleave(size // _group(size), 0).contiguous()
        return cls(
            torch.cat(codes),
            both,
            None if packed.scales.dtype == torch.bfloat16 else packed.scales,
            None if packed.zeros is None else bitpack.pack(packed.zeros, 4),
            packed.group_size,
        )

    def linear(self, x: Tensor) -> Tensor:
        rows, columns = self.codes.shape[0], 2 * self.codes.shape[1]
        flat = x.reshape(-1, columns).contiguous()
        group = columns // len(self.scale_and_zero)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, group, self.scale_and_zero)
        out: Tensor = product.reshape(*x.shape[:-1], rows)
        return out

    def restore(self) -> UniformGrid:
        rows, columns = self.codes.shape[0], 2 * self.codes.shape[1]
        parts = [_plain_order(block) for block in torch.split(self.codes, _INT4_BLOCK)]
        size = columns if self.group_size == -1 else self.group_size
        scales = self.scales
        if scales is None:
            scales = self.scale_and_zero[:: size // _group(size), :, 0].t().contiguous()
        zeros = None if self.zeros is None else bitpack.unpack(self.zeros, 4, scales.shape[1])
        return UniformGrid(torch.cat(parts).reshape(rows, columns), scales, zeros, 4, self.group_size)

    def tensors(self) -> dict[str, Tensor]:
        return _present(codes=self.codes, scale_and_zero=self.scale_and_zero, scales=self.scales, zeros=self.zeros)


@dataclass(frozen=True)
class Int8:
    """See the module's text.

    Attributes:
        codes: int8 [out, in], the stored codes less 128.
        rounded: bfloat16 [out], the scales that the kernel takes.
        scales: as stored, [out, 1], where they are not bfloat16.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    codes: Tensor
    rounded: Tensor
    scales: Tensor | None

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        if (storage.kind, storage.bits, storage.activations) != (UniformGrid.kind, 8, ""):
            return "not a weight-only uniform grid of 8 bits"
        if storage.ordered_groups or not storage.symmetric or storage.group_size != -1:
            return "not symmetric with one scale a row"
        return f"{shape[1]} columns are no multiple of {_INT8_COLUMNS}" if shape[1] % _INT8_COLUMNS else None

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, UniformGrid)
        rounded = packed.scales[:, 0].to(torch.bfloat16)
        return cls(_signed(packed.codes), rounded, None if packed.scales.dtype == torch.bfloat16 else packed.scales)

    def linear(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.codes.shape[1]).contiguous()
        product = torch.ops.aten._weight_int8pack_mm(flat, self.codes, self.rounded)
        out: Tensor = product.reshape(*x.shape[:-1], len(self.codes))
        return out

    def restore(self) -> UniformGrid:
        scales = self.rounded[:, None].clone() if self.scales is None else self.scales
        return UniformGrid(_unsigned(self.codes), scales, None, 8, -1)

    def tensors(self) -> dict[str, Tensor]:
        return _present(codes=self.codes, rounded=self.rounded, scales=self.scales)


@dataclass(frozen=True)
class Product8:
    """See the module's text.

    Attributes:
        codes: int8 [out, in], the stored codes less 128.
        scales: as stored, [out, 1].
        zeros: int32 [out], the stored zero points less 128, or None.
        activations: see `Storage.activations`.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    activations: str

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        plain = storage.kind == UniformGrid.kind and not storage.ordered_groups and storage.group_size == -1
        return None if plain and storage.activations else "not a uniform grid with quantised inputs"

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, UniformGrid)
        zeros = None if packed.zeros is None else packed.zeros[:, 0].to(torch.int32) - 128
        return cls(_signed(packed.codes), packed.scales, zeros, packed.activations)

    def linear(self, x: Tensor) -> Tensor:
        """`int8.linear`, whose codes come unsigned, without the copy that makes them signed."""
        codes, scale, zero = int8.quantise(x, self.activations)
        per_row = (*x.shape[:-1], 1)
        scale = scale.expand(per_row).reshape(-1, 1)
        zero = None if zero is None else zero.expand(per_row).reshape(-1, 1)
        total = int8.product(codes.reshape(-1, x.shape[-1]), zero, self.codes, self.zeros)
        out = (total.float() * scale).mul_(self.scales[:, 0].float())
        return out.to(x.dtype).reshape(*x.shape[:-1], len(self.codes))

    def restore(self) -> UniformGrid:
        zeros = None if self.zeros is None else (self.zeros + 128).to(torch.uint8)[:, None]
        return UniformGrid(_unsigned(self.codes), self.scales, zeros, 8, -1, None, self.activations)

    def tensors(self) -> dict[str, Tensor]:
        return _present(codes=self.codes, scales=self.scales, zeros=self.zeros)


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _group(size: int) -> int:
    """The longest group of the int4 kernel that groups of `size` columns are made of."""
    return next(g for g in GROUPS if size % g == 0)


def _signed(codes: Tensor) -> Tensor:
    """uint8 -> int8: code - 128."""
    return (codes ^ 128).view(torch.int8)


def _unsigned(codes: Tensor) -> Tensor:
    """int8 -> uint8: code + 128."""
    return codes.view(torch.uint8) ^ 128


def _plain_order(block: Tensor) -> Tensor:
    """uint8 [rows * columns]: the codes of up to 64 rows, row after row, out of the int4 kernel's order.

    The order is torch's own business and differs between CPUs, so it is asked for: the place of every weight, in
    digits of 4 bits, goes through the same function.
    """
    rows, columns = block.shape[0], 2 * block.shape[1]
    places = torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)
    found = torch.zeros(rows * columns, dtype=torch.int64)
    for shift in range(0, (rows * columns).bit_length(), 4):
        digit = torch.ops.aten._convert_weight_to_int4pack_for_cpu((places >> shift) & 15, 1)
        found |= _nibbles(digit).long() << shift
    plain = torch.empty(rows * columns, dtype=torch.uint8)
    plain[found] = _nibbles(block)
    return plain


def _nibbles(packed: Any) -> Tensor:
    """uint8 [..., n] -> [all * 2], the low half of each byte first."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten()
