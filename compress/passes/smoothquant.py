"""SmoothQuant (Xiao, Lin, Seznec, Wu, Demouth, Han 2022): move the outliers of the activations into the weights.

Activations are hard to quantise where a few channels are far larger than the others; weights are easy. A channel of the
input is divided by s_j in the norm before the layer, the layer's column j is multiplied by s_j, and nothing changes in
what the block computes. Equation 4 splits the difficulty between the two:

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

with the maximum of |W_j| over all layers that read the channel. alpha = 0.5 suits most models; those with larger
outliers want more (the paper: 0.75 for GLM-130B, the authors' code 0.85 for Llama 2 70B).

The paper smooths the inputs of the projections that a norm feeds (section 4.2); `edges="all"` does the same where the
channels are made by a linear layer: value -> output projection, up -> down. The authors' code raises max|W_j| and s_j
to 1e-5 at least; here a channel that calibration or the readers never use is left alone (s_j = 1).
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
class SmoothQuant:
    """SmoothQuant: move activation outliers into the weights, then round both to 8 bits (Xiao et al. 2022)."""

    name: ClassVar[str] = "smoothquant"
    paper: ClassVar[str] = (
        "Xiao, Lin, Seznec, Wu, Demouth, Han: SmoothQuant: Accurate and Efficient Post-Training Quantization for Large "
        "Language Models, ICML 2023"
    )
    needs: ClassVar[Needs] = Needs(ranges=True)
    sweeps: ClassVar[int] = 1
    shifts: ClassVar[bool] = False

    alpha: float = field(
        default=0.5, metadata={"help": "migration strength, 0 to 1: how much of the difficulty the weights take"}
    )
    edges: Literal["norm", "all"] = field(
        default="norm",
        metadata={"help": "norm: smooth what norms feed, as in the paper; all: what linear layers feed, too"},
    )
    then: str = field(
        default="absmax weights=channel activations=token",
        metadata={"help": "the pass that follows: its name and settings"},
    )

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise CompressError(f"alpha {self.alpha} is out of range", "--alpha", "use 0 to 1; the paper has 0.5")
        if self.edges not in ("norm", "all"):
            raise CompressError(f"no edges {self.edges!r}", "--edges", "use norm or all")

    @property
    def makers(self) -> tuple[str, ...]:
        """The kinds of edges that it rescales."""
        return ("norm",) if self.edges == "norm" else ("norm", "linear")

    def settle(self, in_features: Collection[int]) -> Self:
        return self

    def scale(self, edge: Edge) -> Tensor | None:
        """float32 [in], equation 4; None for an edge that `edges` leaves out."""
        if edge.maker not in self.makers:
            return None
        assert edge.stats.absmax is not None
        return smoothing(edge.stats.absmax, largest(edge.readers), self.alpha)

    def shift(self, weight: Tensor, dequantised: Tensor, analytic: Tensor | None, stats: LayerStats) -> None:
        """Biases stay as they are."""


def largest(readers: tuple[Tensor, ...]) -> Tensor:
    """float32 [in]: the largest |weight| of each column over all matrices [out_i, in]."""
    return torch.stack([w.abs().amax(0).float() for w in readers]).amax(0)


def smoothing(absmax: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Equation 4 for each channel, 1 where either side is 0.

    Args:
        absmax: float32 [in], the largest |x| of each channel.
        weight: float32 [in], the largest |w| that reads it.
    """
    s = absmax.float().pow(alpha) / weight.float().pow(1 - alpha)
    return torch.where((absmax > 0) & (weight > 0), s, 1.0)
