"""Round to nearest: the baseline every other method is measured against. Needs no calibration.

Each weight takes the nearest level of its group's grid. The plain scale is absmax / (2**bits - 1) * 2 (symmetric) or
spans min..max (asymmetric), the conventions of GPTQ's and compressed-tensors' own round-to-nearest.

A scale for the whole tensor (group size 0) is stored as a grid of one scale a row, all of them equal, so that every
format can hold it; the few bytes that costs are not what a scale a tensor is compared for.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.grid import Grid
from compress.packed.uniform import UniformGrid
from compress.passes.gptq import GPTQ
from compress.passes.quality import Quality, settle_quality
from compress.types import LayerStats, Needs, Solved, Storage


@dataclass(frozen=True)
class RTN:
    """RTN: round every weight to the nearest level of its group's grid; needs no calibration."""

    name: ClassVar[str] = "rtn"
    paper: ClassVar[str] = ""

    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8"})
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "columns that share a scale; -1: whole row; 0: whole tensor (stored as equal scales, one a row); "
            "default: largest of 128, 64, 32 that divides"
        },
    )
    symmetric: bool = field(default=True, metadata={"help": "symmetric grid (no zero points)", "off": "asymmetric"})
    scale_search: bool = field(
        default=False, metadata={"help": "search each group's scale for the least squared error"}
    )
    quality: Quality = field(
        default="fast",
        metadata={
            "help": "fast: round to nearest, without data; balanced: scales searched under the Hessian's diagonal, "
            "refitted, codes descended; best: and whole blocks refined to the original's output"
        },
    )

    def __post_init__(self) -> None:
        settle_quality(self)
        if self.quality != "fast" and self.group_size == 0:
            what = "a scale a tensor is not fitted to calibration data"
            raise CompressError(what, f"--group-size 0 --quality {self.quality}", "use --group-size -1, or fast")
        if not 2 <= self.bits <= 8:
            raise CompressError(f"bits {self.bits} is out of range", "--bits", "use 2 to 8")

    @property
    def needs(self) -> Needs:
        return Needs(hessian=self.quality != "fast", outputs=self.quality == "best", weighted=self.quality != "fast")

    @property
    def row_unit(self) -> int:
        return 0 if self.group_size == 0 else 1

    def settle(self, in_features: Collection[int]) -> Self:
        if self.group_size == 0:
            return self
        return replace(self, group_size=grid.settle_group_size(self.group_size, in_features))

    @property
    def _stored_size(self) -> int:
        return self.group_size or -1

    @property
    def storage(self) -> Storage:
        return Storage(UniformGrid.kind, self.bits, self._stored_size, self.symmetric)

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """One line: the grid, and the mean relative error of the weights."""
        error = sum(r["relative_error"] for r in layers) / len(layers)
        size = {0: "a scale a tensor", -1: "a scale a row", None: "a scale a row"}.get(
            self.group_size, f"groups of {self.group_size}"
        )
        kind = "symmetric" if self.symmetric else "asymmetric"
        if self.quality != "fast":
            what = f"round to nearest, refitted and descended, {self.bits} bits, {size}, {kind}: the layers' outputs"
            return [f"{what} on the calibration data are off by {100 * error:.3g}% of their energy on average"]
        return [
            f"round to nearest, {self.bits} bits, {size}, {kind}: the weights are off by {100 * error:.3g}% of their "
            "energy on average"
        ]

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Round one matrix [out, in]; `stats` is used by quality balanced and best alone."""
        if self.quality != "fast":
            return GPTQ(self.bits, self.group_size, self.symmetric).polished(weight, stats, scale_dtype)
        target = weight.float()
        size = self._stored_size
        if self.group_size == 0:
            grids = fit_tensor(target, self.bits, self.symmetric, scale_dtype, self.scale_search)
        else:
            grids = grid.fit(target, self.bits, size, self.symmetric, scale_dtype, self.scale_search)
        rows, columns = target.shape
        codes = torch.empty(target.shape, dtype=torch.uint8, device=target.device)
        errors = torch.empty(rows, device=target.device)
        energies = torch.empty_like(errors)
        for band in grid.bands(rows, columns, target.device):
            part = grid.grouped(target[band], columns if size == -1 else size)
            scale, zero, low, high = (x[band][..., None] for x in (grids.scale, grids.zero, grids.low, grids.high))
            k = grid.nearest(part, scale, low, high)
            errors[band] = (part - grid.value(k, scale, grids.dtype)).square_().sum((1, 2))
            energies[band] = part.square().sum((1, 2))
            codes[band] = k.add_(zero).flatten(1)[:, :columns].to(torch.uint8)
        zeros = None if self.symmetric else grids.zero.to(torch.uint8)
        packed = UniformGrid(codes, grids.scale.to(scale_dtype), zeros, self.bits, size)
        return Solved(packed, errors, energies)


def fit_tensor(weight: Tensor, bits: int, symmetric: bool, dtype: torch.dtype, search: bool = False) -> Grid:
    """`grid.fit` with one scale and zero point for the whole of `weight` [out, in], repeated for every row."""
    one = grid.fit(weight.reshape(1, -1), bits, -1, symmetric, dtype, search)
    return replace(one, scale=one.scale.repeat(len(weight), 1), zero=one.zero.repeat(len(weight), 1))
