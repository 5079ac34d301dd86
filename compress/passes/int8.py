"""LLM.int8(): 8-bit matrix multiplication with outlier features in 16 bit (Dettmers et al., NeurIPS 2022, section 3).

A few input features of a transformer carry magnitudes so large that one scale a row cannot hold them beside the rest.
Those columns of the weight stay as they are and multiply in 16 bit; everything else is the vector-wise (or row-wise)
8-bit product (eq. 8). Where this differs from the paper and from bitsandbytes, its published code:

- Both look for outliers in every batch: whichever feature reaches the threshold there. Here they are found once, on
  calibration data, so that what is stored and what is measured is one function, which no batch changes.
- bitsandbytes keeps all weights in int8 and multiplies outlier features by the dequantised codes. Here, as in eq. 8, it
  is the original weight, and no scale of the 8-bit part sees those columns: not a weight's, not a token's (there,
  bitsandbytes leaves out of the token's scale only the values that reach the threshold).
- rule "any" is eq. 8 on all calibration tokens. Rule "paper" is how section 4.1 defines the features it studies: at
  least 6.0 in at least 6% of the tokens in at least 25% of the layers, that is of the blocks for one role in them.
- bitsandbytes has no zeropoint variant; table 1 of the paper has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.uniform import UniformGrid
from compress.passes.absmax import fit_int8
from compress.types import LayerStats, Needs, Solved, Storage

LAYER_SHARE, TOKEN_SHARE = 0.25, 0.06


@dataclass(frozen=True)
class Int8:
    """LLM.int8(): 8-bit products, outlier features kept in 16 bit (Dettmers et al. 2022)."""

    name: ClassVar[str] = "int8"
    paper: ClassVar[str] = "Dettmers, Lewis, Belkada, Zettlemoyer: LLM.int8(), NeurIPS 2022"

    threshold: float = field(
        default=6.0, metadata={"help": "magnitude that makes a feature an outlier; 0: all features, inf: none"}
    )
    rule: Literal["any", "paper"] = field(
        default="any",
        metadata={
            "help": "any: features that reach the threshold in any calibration token of the layer; paper: in a share "
            "of the tokens in a share of the blocks (section 4.1)"
        },
    )
    layer_share: float | None = field(
        default=None, metadata={"help": "with --rule paper: share of the blocks where a feature must stand out (0.25)"}
    )
    token_share: float | None = field(
        default=None, metadata={"help": "with --rule paper: share of a block's tokens in which it must (0.06)"}
    )
    weights: Literal["channel", "tensor"] = field(
        default="channel",
        metadata={"help": "scales of the 8-bit weights: channel (vector-wise) or one for the tensor (row-wise)"},
    )
    zeropoint: bool = field(default=False, metadata={"help": "affine grids (zero points) instead of absmax"})

    def __post_init__(self) -> None:
        if not self.threshold >= 0:  # NaN is refused too
            raise CompressError(f"threshold {self.threshold} is out of range", "--threshold", "use 0 or more, try 6")
        if self.rule not in ("any", "paper"):
            raise CompressError(f"no rule {self.rule!r}", "--rule", "use any or paper")
        if self.weights not in ("channel", "tensor"):
            raise CompressError(f"no scales of weights {self.weights!r}", "--weights", "use channel or tensor")
        for flag, share, usual in (
            ("--layer-share", self.layer_share, LAYER_SHARE),
            ("--token-share", self.token_share, TOKEN_SHARE),
        ):
            if share is not None and self.rule == "any":
                raise CompressError("this share is used by the rule of section 4.1 alone", flag, "add --rule paper")
            if share is not None and not 0 < share <= 1:
                raise CompressError(f"share {share} is out of range", flag, f"use above 0 and up to 1, try {usual}")

    @property
    def needs(self) -> Needs:
        if self.rule == "paper":
            return Needs(ranges=True, above=self.threshold, survey=True)
        return Needs(ranges=True)

    @property
    def row_unit(self) -> int:
        return 0 if self.weights == "tensor" else 1

    def settle(self, in_features: Collection[int]) -> Self:
        if self.rule == "any":
            return self
        layers, tokens = self._shares
        return replace(self, layer_share=layers, token_share=tokens)

    @property
    def _shares(self) -> tuple[float, float]:
        layers = LAYER_SHARE if self.layer_share is None else self.layer_share
        return layers, TOKEN_SHARE if self.token_share is None else self.token_share

    @property
    def _activations(self) -> str:
        return "token_zeropoint" if self.zeropoint else "token"

    @property
    def storage(self) -> Storage:
        inner = Storage(UniformGrid.kind, 8, -1, not self.zeropoint, activations=self._activations)
        return replace(inner, kind=OutlierColumns.kind, inner=inner)

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Split one matrix.

        Args:
            weight: [out, in].
            stats: with `absmax`; for rule "paper" also `spread`.
            scale_dtype: dtype of the scales and of the columns that are kept.
        """
        assert stats.absmax is not None
        target = weight.float()
        chosen = self.outliers(stats).to(weight.device)
        columns = chosen.nonzero()[:, 0]
        rest = target.masked_fill(chosen, 0.0)
        inner = fit_int8(rest, self.weights == "tensor", self.zeropoint, scale_dtype, self._activations)
        kept = weight.index_select(1, columns).to(scale_dtype)
        packed = OutlierColumns(inner, columns.to(torch.int32), kept)
        error = target - packed.dequantize().float()
        notes = ("no calibration token reached this layer: no outlier feature was looked for",) * (stats.tokens == 0)
        figures = {
            "outlier_features": float(len(columns)),
            "outlier_share": len(columns) / weight.shape[1],
            "largest_outlier": float(stats.absmax[chosen].max()) if len(columns) else 0.0,
        }
        return Solved(packed, error.square().sum(1), target.square().sum(1), notes, figures)

    def outliers(self, stats: LayerStats) -> Tensor:
        """bool [in]: the outlier features."""
        if self.rule == "any":
            assert stats.absmax is not None
            return stats.absmax >= self.threshold
        assert stats.spread is not None
        layers, tokens = self._shares
        blocks = (stats.spread >= tokens).sum(0).double()
        return blocks / len(stats.spread) >= layers

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        if not layers:
            return []
        kind = "zeropoint" if self.zeropoint else "absmax"
        way = "vector-wise" if self.weights == "channel" else "row-wise"
        found = sum(layer["figures"]["outlier_features"] for layer in layers)
        widths = sum(layer["shape"][1] for layer in layers)
        line = f"outlier features: {found / len(layers):.3g} a layer on average ({found / widths:.2%} of the columns)"
        if found:
            top = max(layers, key=lambda layer: float(layer["figures"]["largest_outlier"]))
            line += f", largest magnitude {top['figures']['largest_outlier']:.3g} in {top['name']}"
        return [f"int8, {way} {kind} with mixed-precision decomposition: {self._rule_in_words()}", line]

    def _rule_in_words(self) -> str:
        if self.threshold == 0 or math.isinf(self.threshold):
            return "every feature in 16 bit" if self.threshold == 0 else "no feature in 16 bit"
        if self.rule == "any":
            return f"features that reach {self.threshold:g} in 16 bit"
        layers, tokens = self._shares
        reach = f"features that reach {self.threshold:g} in {tokens:.3g} of the tokens"
        return f"{reach} of {layers:.3g} of the blocks in 16 bit"
