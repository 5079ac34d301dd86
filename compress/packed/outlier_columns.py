"""Whole outlier columns in 16 bit beside an 8-bit grid: the mixed-precision decomposition of LLM.int8().

Dettmers et al. 2022, eq. 8: with O the outlier features, X W = sum over O of X W in 16 bit + the 8-bit product of the
rest. The columns of O are kept as they were in the model; on the grid they hold zeros, and no scale sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.packed.uniform import UniformGrid
from compress.types import Storage

#: the paper finds at most 7 outlier features in models up to 13B parameters (section 3.2); for estimates alone
_USUAL_OUTLIERS = 7


@dataclass(frozen=True)
class OutlierColumns:
    """A linear layer of which some input columns are stored in full.

    Attributes:
        inner: the grid, as wide as the layer, with zeros in those columns.
        columns: int32 [n], ascending; n may be 0 or in_features.
        weight: [out, n], their original values in the dtype of the scales.
    """

    kind: ClassVar[str] = "outlier_columns"
    parts: ClassVar[tuple[str, ...]] = (*UniformGrid.parts, "outlier_columns", "outlier_weight")

    inner: UniformGrid
    columns: Tensor
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner.shape

    @property
    def storage(self) -> Storage:
        inner = self.inner.storage
        return Storage(
            self.kind, inner.bits, inner.group_size, inner.symmetric, inner.ordered_groups, inner.activations,
            inner=inner,
        )  # fmt: skip

    def tensors(self) -> dict[str, Tensor]:
        return self.inner.tensors() | {"outlier_columns": self.columns, "outlier_weight": self.weight}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        assert storage.inner is not None
        inner = UniformGrid.from_tensors(tensors, storage.inner, shape, dtype)
        return cls(inner, tensors["outlier_columns"], tensors["outlier_weight"])

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """The grid exactly, and 7 outlier columns: how many there are is known after calibration."""
        assert storage.inner is not None
        n = min(_USUAL_OUTLIERS, shape[1])
        return UniformGrid.stored_bytes(storage.inner, shape, dtype) + n * (4 + shape[0] * dtype.itemsize)

    def dequantize(self) -> Tensor:
        """The grid's weight with the stored columns in their places: [out, in]."""
        return self.inner.dequantize().index_copy(1, self.columns.long(), self.weight)

    def linear(self, x: Tensor) -> Tensor:
        """Outlier features in x's own dtype, the others as the grid computes; their scales never see an outlier."""
        if not len(self.columns):
            return self.inner.linear(x)
        columns = self.columns.long()
        outliers = F.linear(x.index_select(-1, columns), self.weight.to(x.dtype))
        return outliers + self.inner.linear(x.index_fill(-1, columns, 0))

    def rows(self, start: int, stop: int) -> Self:
        return replace(self, inner=self.inner.rows(start, stop), weight=self.weight[start:stop])
