"""AWQ, activation-aware weight quantisation (Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han 2023).

Weights that meet large activations matter more. Multiplying such a column by s > 1 before rounding, and dividing the
channel by s where it is made, shrinks the column's rounding error by nearly s as long as its group's scale does not
grow (section 3.2). The scales have one free number (equations 4 and 5):

    s = s_X^alpha,   alpha = argmin || Q(W diag(s)) diag(s)^-1 X - W X ||

with s_X the mean |x| of each channel and alpha from a grid over 0 .. 1. The objective is exact without stored inputs:
with D the difference of the two weights and H the mean of x x^T it is trace(D H D^T), summed over the layers that read
the channels.

Where paper and authors' code differ:
- the objective is equation 4's, the output of the layers themselves. The code measures the output of the module around
  them for q, k, v (the whole attention) and for gate and up (the whole MLP);
- as in the code s is divided by sqrt(max s * min s), which the paper does not mention; a channel without activations is
  left out of it, where the code raises it to 1e-4;
- the code tries alpha = 0, 0.05, .. 0.95; here 1 is tried, too;
- the code's search for a clipping range after scaling is the `scale_search` of the pass that follows.
Q is this package's grid (compress.grid), so symmetric grids and odd widths work as everywhere else.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.packed.uniform import group_index
from compress.types import Edge, LayerStats, Needs


@dataclass(frozen=True)
class AWQ:
    """AWQ: scale the weights that meet large activations, then round to nearest (Lin et al. 2023)."""

    name: ClassVar[str] = "awq"
    paper: ClassVar[str] = (
        "Lin, Tang, Tang, Yang, Chen, Wang, Xiao, Dang, Gan, Han: AWQ: Activation-aware Weight Quantization for LLM "
        "Compression and Acceleration, MLSys 2024"
    )
    needs: ClassVar[Needs] = Needs(hessian=True, ranges=True)
    makers: ClassVar[tuple[str, ...]] = ("norm", "linear")
    sweeps: ClassVar[int] = 1
    shifts: ClassVar[bool] = False

    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8"})
    group_size: int | None = field(
        default=None,
        metadata={"help": "columns that share a scale; -1: whole row; default: largest of 128, 64, 32 that divides"},
    )
    symmetric: bool = field(default=False, metadata={"help": "symmetric grid (no zero points)", "off": "asymmetric"})
    grid_steps: int = field(default=20, metadata={"help": "steps of alpha from 0 to 1"})
    then: str = field(
        default="",
        metadata={"help": "the pass that follows: its name and settings; default: rtn on the same grid, clip searched"},
    )

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CompressError(f"bits {self.bits} is out of range", "--bits", "use 2 to 8")
        if self.grid_steps < 1:
            raise CompressError(f"{self.grid_steps} steps is out of range", "--grid-steps", "use 1 or more, say 20")
        if self.group_size is not None:  # what depends on widths is refused by settle
            grid.settle_group_size(self.group_size, [])
        if not self.then:
            object.__setattr__(self, "then", self._rounding)

    @property
    def _rounding(self) -> str:
        """Round to nearest on the grid that the search measures, with its clipping range searched."""
        size = "" if self.group_size is None else f" group_size={self.group_size}"
        return f"rtn bits={self.bits}{size} symmetric={str(self.symmetric).lower()} scale_search=true"

    def settle(self, in_features: Collection[int]) -> Self:
        """The same with a group size that suits all layers. Raises CompressError when none does."""
        size = grid.settle_group_size(self.group_size, in_features)
        return replace(self, group_size=size, then="" if self.then == self._rounding else self.then)

    def scale(self, edge: Edge) -> Tensor | None:
        """float32 [in], the best scale on the grid of alpha; None where no alpha beats unscaled rounding."""
        stats = edge.stats
        assert stats.mean_abs is not None
        assert stats.hessian is not None
        size = self.group_size or grid.settle_group_size(None, [len(stats.mean_abs)])
        tried = [scales(stats.mean_abs, step / self.grid_steps) for step in range(self.grid_steps + 1)]
        losses = torch.stack([self.loss(edge.readers, stats.hessian, s, size) for s in tried])
        best = int(losses.argmin())
        return tried[best] if best else None

    def shift(self, weight: Tensor, dequantised: Tensor, analytic: Tensor | None, stats: LayerStats) -> None:
        """Biases stay as they are."""

    def loss(self, readers: tuple[Tensor, ...], hessian: Tensor, s: Tensor, group_size: int) -> Tensor:
        """Equation 4's objective, a float32 number: sum of trace(D H D^T) over the readers.

        Args:
            readers: [out_i, in] each.
            hessian: float32 [in, in].
            s: float32 [in].
            group_size: columns that share a scale; -1 for the whole row.
        """
        total = torch.zeros((), device=hessian.device)
        groups = group_index(len(s), group_size, hessian.device)
        for weight in readers:
            scaled = weight.float() * s
            grids = grid.fit(scaled, self.bits, group_size, self.symmetric, torch.float32)
            step = grids.scale[:, groups]
            k = grid.nearest(scaled, step, grids.low[:, groups], grids.high[:, groups])
            error = k.mul_(step).sub_(scaled).div_(s)
            total += ((error @ hessian) * error).sum()
        return total


def scales(mean_abs: Tensor, alpha: float) -> Tensor:
    """s_X^alpha over its geometric middle, 1 for channels without activations. All 1 for alpha = 0."""
    live = mean_abs > 0
    s = torch.where(live, mean_abs.float(), 1.0).pow(alpha)
    low = torch.where(live, s, float("inf")).amin()
    high = torch.where(live, s, 0.0).amax()
    return torch.where(live, s / (low.sqrt() * high.sqrt()), 1.0)
