"""Cross-layer equalisation and bias correction (Nagel, van Baalen, Blankevoort, Welling 2019), without data.

A scale for the whole tensor wastes its levels on channels whose weights are small. Where one linear layer feeds another
through something positively homogeneous (nothing, ReLU, the product with a gate, an attention's weighted sum), row i of
the first may be divided by s_i and column i of the second multiplied by it (section 4.1). With r1_i and r2_i the ranges
of the row and of the column, the product of both layers' precisions is largest for (equation 11)

    s_i = (1 / r2_i) sqrt(r1_i r2_i)

which makes the two ranges equal. Pairs that share a tensor are visited in turn until nothing moves.

Ranges are twice the largest magnitude, the paper's for a symmetric grid; the factor cancels. Norms are not pairs of
linear layers: the paper folds batch norms away, and a norm's gain here stays as it is. A channel with an empty row or
column is left alone.

Bias correction (section 4.2): rounding shifts a layer's mean output by E[y~] - E[y] = eps E[x], with eps = W~ - W. It
is subtracted from the layer's bias, if it has one. `analytic` takes E[x] from the bias of the LayerNorm before the
layer, as the paper takes it from the batch norm's. It assumes that a normalised channel has mean 0 over the tokens; a
LayerNorm only makes that so over the channels of each token. `measured` takes E[x] from calibration (appendix D).
The paper's clipped normal distribution behind ReLU and its absorption of high biases (4.1.3) rest on batch norm
statistics, which these models have not: both are left out.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.types import Edge, LayerStats, Needs


@dataclass(frozen=True)
class Equalize:
    """Cross-layer equalisation and bias correction, then round to nearest, without data (Nagel et al. 2019)."""

    name: ClassVar[str] = "equalize"
    paper: ClassVar[str] = (
        "Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias "
        "Correction, ICCV 2019"
    )
    makers: ClassVar[tuple[str, ...]] = ("linear",)

    sweeps: int = field(default=10, metadata={"help": "most visits to every pair; ends early once nothing moves"})
    bias_correction: Literal["analytic", "measured", "none"] = field(
        default="analytic",
        metadata={
            "help": "where the mean of a layer's input comes from: analytic: the bias of the LayerNorm before it (no "
            "data); measured: calibration; none: no correction"
        },
    )
    then: str = field(
        default="rtn bits=8 group_size=0", metadata={"help": "the pass that follows: its name and settings"}
    )

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise CompressError(f"{self.sweeps} sweeps is out of range", "--sweeps", "use 1 or more")
        if self.bias_correction not in ("analytic", "measured", "none"):
            what = f"no bias correction {self.bias_correction!r}"
            raise CompressError(what, "--bias-correction", "use analytic, measured or none")

    @property
    def shifts(self) -> bool:
        """Whether it corrects biases."""
        return self.bias_correction != "none"

    @property
    def needs(self) -> Needs:
        return Needs(ranges=self.bias_correction == "measured")

    def settle(self, in_features: Collection[int]) -> Self:
        return self

    def scale(self, edge: Edge) -> Tensor | None:
        """float32 [in], equation 11; None for what a norm makes."""
        if edge.maker not in self.makers:
            return None
        assert edge.rows is not None
        first = edge.rows[:, :-1].abs().amax(1).float()
        second = torch.stack([w.abs().amax(0).float() for w in edge.readers]).amax(0)
        return equalising(first, second)

    def shift(self, weight: Tensor, dequantised: Tensor, analytic: Tensor | None, stats: LayerStats) -> Tensor | None:
        """float32 [out], the bias correction; None where nothing says what the mean of the layer's input is."""
        mean = {"analytic": analytic, "measured": stats.mean, "none": None}[self.bias_correction]
        return None if mean is None else bias_shift(weight, dequantised, mean)


def equalising(first: Tensor, second: Tensor) -> Tensor:
    """Equation 11 for each channel, 1 where a range is 0: first / s == second * s.

    Args:
        first, second: float32 [in], the ranges of the maker's rows and of the readers' columns.
    """
    live = (first > 0) & (second > 0)
    return torch.where(live, first.sqrt() / torch.where(live, second, 1.0).sqrt(), 1.0)


def bias_shift(weight: Tensor, dequantised: Tensor, mean: Tensor) -> Tensor:
    """What to add to a layer's bias so that its mean output is the original's: -eps E[x] (section 4.2).

    Args:
        weight: [out, in], before rounding.
        dequantised: [out, in], after.
        mean: [in], the mean of the layer's input.

    Returns:
        float32 [out].
    """
    return (weight.float() - dequantised.float()) @ mean.float()
