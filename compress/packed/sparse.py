"""Pruned weights: a mask, and of another kind's layer only the values that were kept.

"mask", int32 words a row, least significant bit first:
- 2:4: of every four weights the positions of the two kept ones, two bits each, the lower position first. These are the
  indices that sparse tensor cores take, in logical order.
- other N:M with M up to 16: the rank of the set of kept positions p_1 < ... < p_n in the combinatorial number system,
  C(p_1, 1) + ... + C(p_n, n), in ceil(log2 C(M, n)) bits, where that is less than M bits;
- otherwise one bit a weight, 1 where it is kept.

"kept", row by row: values as they are, or codes packed densely (`compress.bits`). N:M keeps as many in every row, so
each row is [in * n / M] values, or the words of as many codes; else it is one run over the whole matrix. Scales, zeros
and g_idx are stored as the inner kind stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import comb
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress.packed.dense import Dense
from compress.packed.uniform import UniformGrid
from compress.solvers.masks import Pattern
from compress.types import Storage

_LARGEST_RANKED = 16


@dataclass(frozen=True)
class Sparse:
    """A pruned linear layer.

    Attributes:
        mask: bool [out, in], True where the weight is kept (and may still be 0).
        inner: the layer with its pruned weights in place: 0, or the code of level 0.
        pattern: how many are kept; `mask` follows it exactly.
    """

    kind: ClassVar[str] = "sparse"
    parts: ClassVar[tuple[str, ...]] = ("mask", "kept")  # besides those of the inner kind

    mask: Tensor
    inner: Dense | UniformGrid
    pattern: Pattern

    @classmethod
    def wrap(cls, mask: Tensor, inner: Dense | UniformGrid, like: Sparse) -> Self:
        """The layer of a later pass that kept the zeros of `like`: its values, this mask."""
        return cls(mask, inner, like.pattern)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def storage(self) -> Storage:
        return storage_around(self.inner.storage, self.pattern)

    def dequantize(self) -> Tensor:
        dense = self.inner.dequantize()
        assert not bool(dense.masked_fill(self.mask, 0).any()), "a pruned weight is not zero"
        return dense

    def linear(self, x: Tensor) -> Tensor:
        return self.inner.linear(x)

    def rows(self, start: int, stop: int) -> Self:
        return replace(self, mask=self.mask[start:stop], inner=self.inner.rows(start, stop))

    def tensors(self) -> dict[str, Tensor]:
        self.dequantize()  # what is not stored must be zero
        out = {"mask": pack_mask(self.mask, self.pattern)}
        rows = self.shape[0]
        if isinstance(self.inner, Dense):
            values = self.inner.values[self.mask]
            out["kept"] = values.reshape(rows, -1) if self.pattern.m else values
            return out
        codes = self.inner.codes[self.mask]
        codes = codes.reshape(rows, -1) if self.pattern.m else codes
        out["kept"] = bitpack.pack(codes, self.inner.bits) if codes.numel() else codes.to(torch.int32)
        return out | {name: t for name, t in self.inner.tensors().items() if name != "codes"}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        assert storage.inner is not None
        pattern = Pattern.from_details(storage.details)
        mask = unpack_mask(tensors["mask"], pattern, shape[1])
        kept = tensors["kept"]
        if storage.inner.kind == Dense.kind:
            values = torch.zeros(shape, dtype=kept.dtype, device=kept.device)
            values[mask] = kept.flatten()
            return cls(mask, Dense(values), pattern)
        bits = storage.inner.bits
        empty = {"codes": torch.zeros(shape[0], bitpack.words(shape[1], bits), dtype=torch.int32, device=kept.device)}
        inner = UniformGrid.from_tensors({**tensors, **empty}, storage.inner, shape, dtype)
        if inner.zeros is None:
            codes = torch.full_like(inner.codes, 2 ** (bits - 1))
        else:
            codes = inner.zeros[:, inner.column_groups()]
        each = shape[1] // pattern.m * pattern.n if pattern.m else shape[0] * shape[1] - pattern.zeros(*shape)
        if each:
            codes[mask] = bitpack.unpack(kept, bits, each).flatten()
        return cls(mask, replace(inner, codes=codes), pattern)

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        assert storage.inner is not None
        pattern, (rows, columns) = Pattern.from_details(storage.details), shape
        total = rows * columns - pattern.zeros(rows, columns)
        if storage.inner.kind == Dense.kind:
            rest, kept = 0, total * dtype.itemsize
        else:
            bits = storage.inner.bits
            rest = UniformGrid.stored_bytes(storage.inner, shape, dtype) - rows * 4 * bitpack.words(columns, bits)
            runs = rows if pattern.m else 1
            kept = runs * 4 * bitpack.words(total // runs, bits)
        return rows * 4 * mask_words(pattern, columns) + kept + rest


def storage_around(inner: Storage, pattern: Pattern) -> Storage:
    """The storage of a pruned layer whose values are stored as `inner`."""
    return replace(inner, kind=Sparse.kind, details=pattern.details, inner=inner)


def _rank_bits(pattern: Pattern) -> int:
    """Bits of a rank in ranks of n-sets of m positions; 0 where a bitmap is as short."""
    if not 0 < pattern.m <= _LARGEST_RANKED:
        return 0
    width = (comb(pattern.m, pattern.n) - 1).bit_length()
    return width if width < pattern.m else 0


def _is_two_of_four(pattern: Pattern) -> bool:
    return (pattern.n, pattern.m) == (2, 4)


def mask_words(pattern: Pattern, columns: int) -> int:
    """32-bit words of a row of the mask."""
    if _is_two_of_four(pattern):
        return bitpack.words(columns, 1)
    width = _rank_bits(pattern)
    return bitpack.words(columns // pattern.m * width if width else columns, 1)


def pack_mask(mask: Tensor, pattern: Pattern) -> Tensor:
    """bool [out, in] -> int32 [out, words]; see the module's text. The mask must follow the pattern."""
    rows, kept = len(mask), mask.to(torch.uint8)
    if pattern.m:
        kept = kept.reshape(rows, -1, pattern.m)
        assert bool((kept.sum(-1) == pattern.n).all()), "a group keeps more or fewer weights than its pattern"
    if _is_two_of_four(pattern):
        ends = torch.stack([kept.argmax(-1), 3 - kept.flip(-1).argmax(-1)], -1)
        return bitpack.pack(ends.to(torch.uint8).reshape(rows, -1), 2)
    width = _rank_bits(pattern)
    if not width:
        return bitpack.pack(kept.reshape(rows, -1), 1)
    rank = torch.zeros(kept.shape[:-1], dtype=torch.int32, device=mask.device)
    seen = torch.zeros_like(rank)
    table = _binomials(pattern, mask.device)
    for position in range(pattern.m):
        here = kept[..., position].to(torch.int32)
        seen += here
        rank += table[position][seen] * here
    spread = torch.stack([(rank >> bit) & 1 for bit in range(width)], -1)
    return bitpack.pack(spread.to(torch.uint8).reshape(rows, -1), 1)


def unpack_mask(packed: Tensor, pattern: Pattern, columns: int) -> Tensor:
    """Exact inverse of `pack_mask`."""
    rows = len(packed)
    if _is_two_of_four(pattern):
        ends = bitpack.unpack(packed, 2, columns // 2).reshape(rows, -1, 2, 1)
        return (ends == torch.arange(4, device=packed.device)).any(2).reshape(rows, columns)
    width = _rank_bits(pattern)
    if not width:
        return bitpack.unpack(packed, 1, columns).bool()
    spread = bitpack.unpack(packed, 1, columns // pattern.m * width).reshape(rows, -1, width)
    rank = torch.zeros(spread.shape[:-1], dtype=torch.int32, device=packed.device)
    for bit in range(width):
        rank |= spread[..., bit].to(torch.int32) << bit
    left = torch.full_like(rank, pattern.n)
    table = _binomials(pattern, packed.device)
    kept = torch.empty(*rank.shape, pattern.m, dtype=torch.bool, device=packed.device)
    for position in reversed(range(pattern.m)):  # greedy: the largest position whose binomial still fits
        size = table[position][left]
        here = (left > 0) & (rank >= size)
        kept[..., position] = here
        rank -= torch.where(here, size, 0)
        left -= here.to(torch.int32)
    return kept.reshape(rows, columns)


def _binomials(pattern: Pattern, device: torch.device) -> Tensor:
    """int32 [m, n + 1]: C(position, count)."""
    table = [[comb(position, count) for count in range(pattern.n + 1)] for position in range(pattern.m)]
    return torch.tensor(table, dtype=torch.int32, device=device)
