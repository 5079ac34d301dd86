"""Packed kinds as the GPU kernels take them: to fragment order, and back without loss.

| kernel     | takes                                                                                        |
|------------|----------------------------------------------------------------------------------------------|
| `Grid`     | uniform and affine grids of 2, 3, 4, 8 bits; groups of 16, 32, 64, 128 columns, 128 times a  |
|            | power of two, or the whole row; symmetric or not; in an activation order; pruned             |
| `Table`    | NF4 and FP4, where blocks do not cross rows; double quantisation is undone                    |
| `Book`     | k-means of 2, 3, 4 bits with a book a row                                                    |
| `TwoLevel` | SpQR: groups of 16 columns, statistics of up to 4 bits shared by 16 rows; with outliers       |
| `EightBit`                   | LLM.int8() and W8A8 with a scale a token, see eight.py                     |
| `PrunedGrid`, `PrunedValues` | 2:4, see pruned.py and cusparselt.py                                       |

Inputs are float16 or bfloat16. Their twin is `Packed.linear`, from which they differ by rounding: it rounds each weight
to the scales' dtype; for up to 8 tokens they round none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import fast
from compress.cuda import layout, ops, support
from compress.cuda.cusparselt import PrunedValues
from compress.cuda.eight import EightBit
from compress.cuda.pruned import PrunedGrid
from compress.packed.affine import Affine
from compress.packed.bilevel import BiLevel, Statistic
from compress.packed.blockwise import Blockwise
from compress.packed.codebook import Codebook
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse, pack_mask, unpack_mask
from compress.packed.uniform import UniformGrid
from compress.solvers.masks import Pattern
from compress.types import Packed, Storage

HALVES = (torch.float16, torch.bfloat16)
_WIDTHS = (2, 3, 4, 8)
_MOST_COLUMNS = 1 << 16  # that outliers can name in 16 bits


def find(storage: Storage, shape: tuple[int, int], device: torch.device) -> type[fast.Kernel] | None:
    """The kernel for a layer on a CUDA device; None, with a line in the log, where none can run."""
    kind = next((k for k in KERNELS if k.why_not(storage, shape) is None), None)
    if kind is None:
        return None
    found = support.probe(device.index)
    if not found.usable:
        support.why_not_once(found)
    return kind if found.usable else None


@dataclass(frozen=True)
class _Laid:
    """What all kernels have.

    Attributes:
        layer: what the operators take.
        columns: in_features.
        stored: how the layer is stored.
        dtype: of the dequantised weight.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = HALVES

    layer: ops.Layer
    columns: int
    stored: Storage
    dtype: torch.dtype

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.compress.linear(x, *self.layer.arguments)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Everything that takes memory."""
        found: dict[str, Tensor] = {}
        for part in (self, self.layer):
            found |= {f.name: v for f in fields(part) if isinstance(v := getattr(part, f.name), Tensor)}
        return found

    def _codes(self) -> Tensor:
        """uint8 [rows, columns]"""
        layer = self.layer
        return layout.unpack(layer.codes, layer.bits, layer.rows, self.columns, layer.kind == ops.TABLE)

    def _statistics(self, packed: Tensor) -> Tensor:
        """[rows, groups]"""
        size = self.stored.group_size
        return layout.unpack_statistics(packed, self.layer.rows, 1 if size == -1 else -(-self.columns // size))


@dataclass(frozen=True)
class Grid(_Laid):
    """See the module's text.

    Attributes:
        g_idx: as stored, or None.
        order: int64 [in], the columns in the order of their groups, or None.
        mask: as stored, of a pruned layer, or None.
    """

    g_idx: Tensor | None = None
    order: Tensor | None = None
    mask: Tensor | None = None

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        inner = storage.inner if storage.kind == Sparse.kind and storage.inner is not None else storage
        if inner.kind not in (UniformGrid.kind, Affine.kind) or inner.activations:
            return "not a grid of weights alone"
        if inner.bits not in _WIDTHS:
            return f"{inner.bits} bits"
        try:
            layout.group_layout(inner.group_size)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def of(cls, packed: Packed) -> Self | None:
        mask, inner = None, packed
        if isinstance(packed, Sparse):
            assert isinstance(packed.inner, UniformGrid)
            mask, inner = pack_mask(packed.mask, packed.pattern), packed.inner
        assert isinstance(inner, UniformGrid | Affine)
        codes, size, columns = inner.codes, inner.group_size, inner.shape[1]
        offsets = inner.minima if isinstance(inner, Affine) else inner.zeros
        g_idx = inner.g_idx if isinstance(inner, UniformGrid) else None
        order = None
        if g_idx is not None:
            order = torch.argsort(g_idx.long(), stable=True)
            if not torch.equal(g_idx.long()[order], torch.arange(columns, device=order.device) // size):
                return None  # groups of other sizes than the one that is named
            codes = codes[:, order]
        layer = ops.Layer.of(
            ops.GRID, inner.bits, size, inner.shape,
            codes=layout.pack(codes, inner.bits),
            scales=layout.pack_statistics(inner.scales, columns, size),
            offsets=None if offsets is None else layout.pack_statistics(offsets, columns, size),
        )  # fmt: skip
        return cls(layer, columns, packed.storage, inner.scales.dtype, g_idx, order, mask)

    def linear(self, x: Tensor) -> Tensor:
        return super().linear(x if self.order is None else x.index_select(-1, self.order))

    def restore(self) -> Packed:
        layer, stored = self.layer, self.stored
        codes = self._codes()
        if self.order is not None:
            codes = torch.empty_like(codes).index_copy_(1, self.order, codes)
        assert layer.scales is not None
        scales = self._statistics(layer.scales)
        offsets = None if layer.offsets is None else self._statistics(layer.offsets)
        if stored.kind == Affine.kind:
            assert offsets is not None
            return Affine(codes, scales, offsets, layer.bits, stored.group_size)
        grid = UniformGrid(codes, scales, offsets, layer.bits, stored.group_size, self.g_idx)
        if self.mask is None:
            return grid
        pattern = Pattern.from_details(stored.details)
        return Sparse(unpack_mask(self.mask, pattern, self.columns), grid, pattern)


@dataclass(frozen=True)
class Table(_Laid):
    """See the module's text.

    Attributes:
        absmax, nested_absmax, nested_offset: as stored, with double quantisation; else None.
    """

    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    nested_offset: Tensor | None = None

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        if storage.kind != Blockwise.kind:
            return "not in blocks of a fixed table"
        if shape[1] % storage.group_size:
            return f"blocks of {storage.group_size} cross rows of {shape[1]}"
        try:
            layout.group_layout(storage.group_size)
        except ValueError as error:
            return str(error)
        return None

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, Blockwise)
        rows, columns = packed.shape
        layer = ops.Layer.of(
            ops.TABLE, 4, packed.block_size, packed.shape,
            codes=layout.pack(packed.codes, 4, bytewise=True),
            scales=layout.pack_statistics(packed.block_scales().reshape(rows, -1), columns, packed.block_size),
            numbers=packed.table,
        )  # fmt: skip
        nested = (packed.absmax, packed.nested_absmax, packed.nested_offset)
        return cls(layer, columns, packed.storage, packed.dtype, *(nested if nested[1] is not None else ()))

    def restore(self) -> Packed:
        assert self.layer.scales is not None
        absmax = self._statistics(self.layer.scales).flatten() if self.absmax is None else self.absmax
        nested = (self.nested_absmax, self.nested_offset)
        table = self.stored.detail("table")
        return Blockwise(self._codes(), absmax, table, self.stored.group_size, self.dtype, *nested)


@dataclass(frozen=True)
class Book(_Laid):
    """See the module's text."""

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        if storage.kind != Codebook.kind or storage.group_size != -1:
            return "not one book a row"
        return None if storage.bits in (2, 3, 4) else f"{storage.bits} bits"

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, Codebook)
        rows, columns = packed.shape
        book = F.pad(packed.book[:, 0], (0, 0, 0, -rows % layout.TILE)).contiguous()
        codes = layout.pack(packed.codes, packed.bits)
        layer = ops.Layer.of(ops.BOOK, packed.bits, -1, packed.shape, codes=codes, table=book)
        return cls(layer, columns, packed.storage, packed.book.dtype)

    def restore(self) -> Packed:
        assert self.layer.table is not None
        book = self.layer.table[: self.layer.rows, None].contiguous()
        return Codebook(self._codes(), book, self.layer.bits, -1)


@dataclass(frozen=True)
class TwoLevel(_Laid):
    """See the module's text."""

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        inner = storage.inner if storage.kind == Outliers.kind and storage.inner is not None else storage
        if inner.kind != BiLevel.kind or inner.group_size != 16 or inner.bits not in _WIDTHS:
            return "not a two-level grid in groups of 16"
        if max(inner.detail("qq_scale_bits"), inner.detail("qq_zero_bits")) > 4:
            return "statistics of more than 4 bits"
        if inner.detail("qq_groupsize") != layout.TILE:
            return f"statistics shared by {inner.detail('qq_groupsize')} rows"
        return None if shape[1] <= _MOST_COLUMNS else f"{shape[1]} columns"

    @classmethod
    def of(cls, packed: Packed) -> Self | None:
        inner = packed.inner if isinstance(packed, Outliers) else packed
        assert isinstance(inner, BiLevel)
        scale, zero = inner.scale, inner.zero
        if scale.scales.dtype not in HALVES:
            return None
        codes, second = layout.pack_second_level(*_parts(scale), *_parts(zero))
        outliers: dict[str, Any] = {}
        if isinstance(packed, Outliers):
            base = replace(inner, dtype=torch.float32).dequantize()[packed.positions()]
            steps = (packed.values.float() - base).to(packed.values.dtype)
            outliers = {
                "outlier_rows": packed.row_pointers, "outlier_columns": packed.columns,
                "outlier_values": packed.values, "outlier_steps": steps,
            }  # fmt: skip
        layer = ops.Layer.of(
            ops.BILEVEL, inner.bits, 16, inner.shape,
            codes=layout.pack(inner.codes, inner.bits), scales=codes, offsets=second, **outliers,
        )  # fmt: skip
        return cls(layer, inner.shape[1], packed.storage, inner.dtype)

    def restore(self) -> Packed:
        layer, inner = self.layer, self.stored.inner or self.stored
        assert layer.scales is not None
        assert layer.offsets is not None
        codes = self._codes()
        groups, runs = -(-self.columns // 16), layout.tiles(layer.rows)
        both = layout.unpack_statistics(layer.scales, layer.rows, groups)
        grids = [g.contiguous() for g in layer.offsets.flatten(1, 2)[:runs, :groups].unbind(-1)]
        bits = inner.detail("qq_scale_bits"), inner.detail("qq_zero_bits")
        scale, zero = (
            Statistic(scales, layout.TILE, bits[i], both >> 4 * i & 15, zeros)
            for i, (scales, zeros) in enumerate(zip(grids[0::2], grids[1::2], strict=True))
        )
        base = BiLevel.of(codes, scale, zero, layer.bits, 16, self.dtype)
        if layer.outlier_rows is None or layer.outlier_columns is None or layer.outlier_values is None:
            return base
        return Outliers(base, layer.outlier_rows, layer.outlier_columns, layer.outlier_values)


def _parts(statistic: Statistic) -> tuple[Tensor, Tensor]:
    """Codes [rows, groups] and grids [runs, groups, 2] of quantised statistics."""
    assert statistic.codes is not None
    assert statistic.zeros is not None
    return statistic.codes, torch.stack([statistic.scales, statistic.zeros], -1)


#: in the order in which they are asked
KERNELS: tuple[type[fast.Kernel], ...] = (EightBit, PrunedGrid, PrunedValues, Grid, Table, Book, TwoLevel)
