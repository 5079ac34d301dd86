"""A packed layer with single weights kept in 16 bits, in compressed sparse rows (SpQR's outliers).

An outlier's value takes the place of the base at its position. SpQR's published exporter stores the value whole while
its kernel adds it to a base that is not zero there, so that the exported layer is not the evaluated one; here they are
the same by definition, and a kernel that adds can subtract the base when it loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress.types import Packed, Storage, dense_linear

#: `stored_bytes` cannot know how many outliers there will be: this share of the weights, as in SpQR's paper
ASSUMED_SHARE = 0.01


@dataclass(frozen=True)
class Outliers:
    """A layer of another kind, and weights that replace some of its own.

    Attributes:
        inner: the base.
        row_pointers: int32 [out + 1]; the outliers of row r are numbers row_pointers[r] .. row_pointers[r + 1] - 1.
        columns: [outliers], the column of each, ascending within a row: int16 that holds the bits of the unsigned
            number for up to 65536 columns, int32 beyond.
        values: [outliers] in the dtype of the dequantised weight.
    """

    kind: ClassVar[str] = "outliers"
    parts: ClassVar[tuple[str, ...]] = ("outlier_rows", "outlier_cols", "outlier_values")

    inner: Packed
    row_pointers: Tensor
    columns: Tensor
    values: Tensor

    @classmethod
    def of(cls, inner: Packed, mask: Tensor, values: Tensor) -> Self:
        """The outliers where mask (bool [out, in]) is set, their values out of `values` [out, in]."""
        counts = mask.sum(1)
        pointers = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
        pointers[1:] = counts.cumsum(0)
        columns = mask.nonzero()[:, 1].to(_column_dtype(mask.shape[1]))  # wraps: the bits of the unsigned number
        return cls(inner, pointers, columns, values[mask])

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def storage(self) -> Storage:
        return storage_of(self.inner.storage)

    def positions(self) -> tuple[Tensor, Tensor]:
        """int64 [outliers], twice: the row and the column of each."""
        return positions(self.row_pointers, self.columns)

    def dequantize(self) -> Tensor:
        """The base with the outliers in their places: [out, in]."""
        dense = self.inner.dequantize()
        dense[self.positions()] = self.values
        return dense

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)

    def rows(self, start: int, stop: int) -> Self:
        first, last = int(self.row_pointers[start]), int(self.row_pointers[stop])
        pointers = self.row_pointers[start : stop + 1] - first
        return type(self)(self.inner.rows(start, stop), pointers, self.columns[first:last], self.values[first:last])

    def tensors(self) -> dict[str, Tensor]:
        own = {"outlier_rows": self.row_pointers, "outlier_cols": self.columns, "outlier_values": self.values}
        return self.inner.tensors() | own

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        from compress.packed import KINDS  # that table holds this class

        assert storage.inner is not None
        base = {name: tensor for name, tensor in tensors.items() if name not in cls.parts}
        inner = KINDS[storage.inner.kind].from_tensors(base, storage.inner, shape, dtype)
        return cls(inner, *(tensors[name] for name in cls.parts))

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """An estimate: how many outliers there are depends on the weights; one in a hundred is assumed."""
        from compress.packed import KINDS

        assert storage.inner is not None
        base = KINDS[storage.inner.kind].stored_bytes(storage.inner, shape, dtype)
        return base + outlier_bytes(shape, round(ASSUMED_SHARE * shape[0] * shape[1]), dtype)


def positions(row_pointers: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """int64 [outliers], twice: the row and the column of each, from the tensors as stored. Waits for no device."""
    rows = torch.arange(len(row_pointers) - 1, device=row_pointers.device)
    rows = rows.repeat_interleave(row_pointers.diff().long(), output_size=len(columns))
    return rows, columns.long() if columns.dtype == torch.int32 else columns.long() & 0xFFFF


def storage_of(inner: Storage) -> Storage:
    """The storage of outliers over a base."""
    return Storage(Outliers.kind, inner.bits, inner.group_size, inner.symmetric, inner=inner)


def bytes_each(columns: int, dtype: torch.dtype) -> int:
    """What one outlier costs in a layer of that many columns: its value and its column."""
    return dtype.itemsize + _column_dtype(columns).itemsize


def outlier_bytes(shape: tuple[int, int], count: int, dtype: torch.dtype) -> int:
    """What `count` outliers cost in all, row pointers included."""
    return 4 * (shape[0] + 1) + count * bytes_each(shape[1], dtype)


def _column_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 16 else torch.int32
