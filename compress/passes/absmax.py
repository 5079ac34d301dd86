"""8-bit integers by absmax or zeropoint: the plain schemes that LLM.int8() is measured against.

Weights: absmax is eq. 1 of Dettmers et al. 2022, scale = max|w| / 127 with codes -127 .. 127, so no weight is clipped
but by the rounding of its scale; `rtn` at 8 bits divides by 127.5 instead. Zeropoint is the affine grid of Jacob et al.
2018 (section 2.3): min .. max, widened to hold 0, which lies exactly on the grid. LLM.int8() uses 255 of an affine
grid's codes, Jacob et al. 256; here 256, of which the code 0 cannot be a zero point, since GPTQ files cannot store it.

Activations stay in 16 bits (W8A16) or are quantised when the layer runs (W8A8), on the same kind of grid as the
weights; no calibration. The schemes by their names in the papers:

    weights  activations  name
    tensor   none         W8A16 per tensor
    channel  none         W8A16 per output channel
    tensor   tensor       "Int8 absmax", "Int8 zeropoint" (LLM.int8(), table 1)
    tensor   token        "row-wise": a scale a row of X, one for W (table 1)
    channel  token        "vector-wise": a scale a row of X and a column of W (table 1, section 3.1)
    channel  tensor       per-channel weights, per-layer activations (Jacob et al.'s successors)

A scale of the activation "tensor" is that of one sequence, so that batching changes no result. A scale for the weight
tensor is stored as equal scales, one a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.packed.uniform import UniformGrid
from compress.passes.rtn import fit_tensor
from compress.types import LayerStats, Needs, Solved, Storage

_SCHEMES = {
    ("tensor", "none"): "per-tensor {} weights, 16-bit activations",
    ("channel", "none"): "per-channel {} weights, 16-bit activations",
    ("tensor", "tensor"): "per-tensor {}: one scale for the weights, one for each sequence of activations",
    ("tensor", "token"): "row-wise {}: one scale for the weights, one for each token",
    ("channel", "token"): "vector-wise {}: a scale for each output channel and each token",
    ("channel", "tensor"): "per-channel {}: a scale for each output channel and each sequence of activations",
}


@dataclass(frozen=True)
class Absmax:
    """Int8 by absmax or zeropoint: per tensor, row-wise or vector-wise (Jacob et al. 2018, Dettmers et al. 2022)."""

    name: ClassVar[str] = "absmax"
    paper: ClassVar[str] = (
        "Jacob et al.: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, "
        "CVPR 2018; Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(), NeurIPS 2022"
    )
    needs: ClassVar[Needs] = Needs()

    weights: Literal["channel", "tensor"] = field(
        default="channel",
        metadata={"help": "what shares a scale of the weights: an output channel or the whole tensor"},
    )
    activations: Literal["none", "token", "tensor"] = field(
        default="none",
        metadata={
            "help": "none: 16 bits (W8A16); token: 8 bits, a scale a token (vector-wise with --weights channel, "
            "row-wise with --weights tensor); tensor: 8 bits, a scale a sequence"
        },
    )
    zeropoint: bool = field(default=False, metadata={"help": "affine grids (zero points) instead of absmax"})

    def __post_init__(self) -> None:
        if self.weights not in ("channel", "tensor"):
            raise CompressError(f"no scales of weights {self.weights!r}", "--weights", "use channel or tensor")
        if self.activations not in ("none", "token", "tensor"):
            what = f"no scales of activations {self.activations!r}"
            raise CompressError(what, "--activations", "use none, token or tensor")

    @property
    def row_unit(self) -> int:
        return 0 if self.weights == "tensor" else 1

    def settle(self, in_features: Collection[int]) -> Self:
        return self

    @property
    def storage(self) -> Storage:
        return Storage(UniformGrid.kind, 8, -1, not self.zeropoint, activations=self._stored_activations)

    @property
    def _stored_activations(self) -> str:
        return "" if self.activations == "none" else self.activations + "_zeropoint" * self.zeropoint

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        kind = "zeropoint" if self.zeropoint else "absmax"
        return ["int8, " + _SCHEMES[self.weights, self.activations].format(kind)]

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Quantise one matrix [out, in]; `stats` is not used."""
        target = weight.float()
        packed = fit_int8(target, self.weights == "tensor", self.zeropoint, scale_dtype, self._stored_activations)
        error = target - packed.dequantize().float()
        return Solved(packed, error.square().sum(1), target.square().sum(1))


def fit_int8(
    weight: Tensor, per_tensor: bool, zeropoint: bool, dtype: torch.dtype, activations: str = ""
) -> UniformGrid:
    """A matrix in 8 bits, one scale a row (equal ones for per_tensor).

    Args:
        weight: float32 [out, in]; zeros come back as zeros.
        per_tensor: fit one scale to all rows.
        zeropoint: the affine grid over min .. max; else absmax / 127 with codes -127 .. 127.
        dtype: of the stored scales.
        activations: handed on to the result.
    """
    if zeropoint:
        fitted = fit_tensor(weight, 8, False, dtype) if per_tensor else grid.fit(weight, 8, -1, False, dtype)
        k = grid.nearest(weight, fitted.scale, fitted.low, fitted.high)
        zeros = fitted.zero.to(torch.uint8)
        return UniformGrid((k + fitted.zero).to(torch.uint8), fitted.scale.to(dtype), zeros, 8, -1, None, activations)
    largest = weight.abs().amax(1, keepdim=True)
    if per_tensor:
        largest = largest.amax().expand_as(largest)
    scale = grid.round_scale(largest / 127, dtype)
    k = grid.nearest(weight, scale, -127, 127)
    return UniformGrid((k + 128).to(torch.uint8), scale.to(dtype).contiguous(), None, 8, -1, None, activations)
