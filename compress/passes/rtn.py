"""Round to nearest: the baseline every other method is measured against. Needs no calibration.

Each weight takes the nearest level of its group's grid. The plain scale is absmax / (2**bits - 1) * 2 (symmetric) or
spans min..max (asymmetric), the conventions of GPTQ's and compressed-tensors' own round-to-nearest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.packed.uniform import UniformGrid, group_index
from compress.types import LayerStats, Needs, Solved, Storage


@dataclass(frozen=True)
class RTN:
    """RTN: round every weight to the nearest level of its group's grid; needs no calibration."""

    name: ClassVar[str] = "rtn"
    needs: ClassVar[Needs] = Needs.NOTHING

    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8"})
    group_size: int | None = field(
        default=None,
        metadata={"help": "columns that share a scale; -1: whole row; default: largest of 128, 64, 32 that divides"},
    )
    symmetric: bool = field(default=True, metadata={"help": "symmetric grid (no zero points)", "off": "asymmetric"})
    scale_search: bool = field(
        default=False, metadata={"help": "search each group's scale for the least squared error"}
    )

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CompressError(f"bits {self.bits} is out of range", "--bits", "use 2 to 8")

    def settle(self, in_features: Collection[int]) -> Self:
        return replace(self, group_size=grid.settle_group_size(self.group_size, in_features))

    @property
    def storage(self) -> Storage:
        size = -1 if self.group_size is None else self.group_size
        return Storage(UniformGrid.kind, self.bits, size, self.symmetric)

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Round one matrix [out, in]; `stats` is not used."""
        target = weight.float()
        size = -1 if self.group_size is None else self.group_size
        grids = grid.fit(target, self.bits, size, self.symmetric, scale_dtype, self.scale_search)
        groups = group_index(target.shape[1], size, target.device)
        scale = grids.scale[:, groups]
        k = grid.nearest(target, scale, grids.low[:, groups], grids.high[:, groups])
        error = target - grid.value(k, scale, grids.dtype)
        zeros = None if self.symmetric else grids.zero.to(torch.uint8)
        codes = (k + grids.zero[:, groups]).to(torch.uint8)
        packed = UniformGrid(codes, grids.scale.to(scale_dtype), zeros, self.bits, size)
        return Solved(packed, error.square().sum(1), target.square().sum(1))
