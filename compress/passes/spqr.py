"""SpQR (Dettmers, Svirschevski, Egiazarian, Kuznedelev, Frantar, Ashkboos, Borzunov, Hoefler, Alistarh, 2023).

The idea: very small groups, whose scales and zero points are quantised in turn, and the few weights that rounding would
hurt most kept in 16 bits. A weight's worth as an outlier is what the error of its group, each weight's error over U_jj
squared, falls by when the weight is left out and the grid is fitted to the others (leave-one-out, section 4.2). With
the outliers out of the way the grids are fitted again, and GPTQ's loop (Algorithm 1) rounds the rest; an outlier has
no error of its own, only that of its rounding to 16 bits.

Followed from the reference code: the threshold is relative, in units of the mean over all weights of w^2 / U_jj^2 (it
takes the variance of each column for w^2); leave-one-out scores are taken on one-level grids and choose the weights
that the grids are fitted without; the outliers themselves are those whose error on these grids is above the threshold.
Second-level grids are shared by runs of output rows, so rows depend on each other.

Different, each measured on 8 layers of SmolLM2-135M (loss under calibration's and under held-out text's Hessian):
- Groups lie in natural order and are fitted before the loop; only the visit follows the act order. The reference
  permutes the columns, so that a layer needs an index to run. Losses were the same (within 4% either way). Outliers are
  therefore chosen before the loop, at their weights' own values: the same loss at the same number of outliers (within
  1%), and a budget of bits is met by counting.
- Damp 0.03, not 1.0: 25% less loss, 9% less on held-out text (0.01 and 0.1: within 3% of that).
- Codes of scales and zero points are searched around the nearest ones: 8% less loss, 12% on held-out text.
- A sweep of coordinate descent over codes and outliers after GPTQ's: 5% less loss, 2.5% on held-out text.
- Spans hold 0, so zero points lie within the codes: one far-off zero would coarsen those of its run. A scale is never 0
  or negative; the reference gives a run of equal scales a grid from -1 to 1.
- An outlier takes the place of the grid's value; what is evaluated is what is stored (`compress.packed.outliers`).
- A column that calibration never saw is rounded to nearest, not set to zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isinf, prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.packed import bilevel, outliers
from compress.packed.bilevel import PLAIN, BiLevel, Statistic
from compress.packed.outliers import Outliers
from compress.packed.uniform import group_index
from compress.passes import quality
from compress.passes.quality import Quality, past_field, quality_field, settle_quality, weights_field
from compress.solvers import columns
from compress.solvers import spqr as spqr_sweep
from compress.solvers.hessian import prepare, row_losses, unvisit
from compress.solvers.spqr import Grids, Solution
from compress.types import LayerStats, Needs, Packed, Solved, Storage, bits_per_weight


@dataclass(frozen=True)
class SpQR:
    """SpQR: small groups with quantised statistics, the most sensitive weights in 16 bits (Dettmers et al. 2023)."""

    name: ClassVar[str] = "spqr"
    paper: ClassVar[str] = "Dettmers et al.: SpQR, 2023"

    bits: int = field(default=3, metadata={"help": "bits a weight that is no outlier, 2 to 8"})
    group_size: int = field(default=16, metadata={"help": "columns that share a scale and a zero point, 8 to 128"})
    qq_scale_bits: int = field(default=3, metadata={"help": "bits a scale, 2 to 8; 16: scales are not quantised"})
    qq_zero_bits: int = field(default=3, metadata={"help": "bits a zero point, 2 to 8; 16: not quantised"})
    qq_groupsize: int = field(
        default=16, metadata={"help": "output rows whose scales, and zero points, share a second-level grid"}
    )
    outlier_threshold: float = field(
        default=0.2,
        metadata={
            "help": "error, relative to the layer's mean sensitivity, above which a weight is an outlier; inf: none"
        },
    )
    average_bits: float | None = field(
        default=None,
        metadata={"help": "stored bits a weight, all counted: as many outliers as fit, in place of the threshold"},
    )
    act_order: bool = field(
        default=True, metadata={"help": "visit columns by falling H diagonal", "off": "natural_order"}
    )
    damp_percent: float = field(default=0.03, metadata={"help": "share of H's mean diagonal added to its diagonal"})
    block_size: int = field(default=128, metadata={"help": "columns updated lazily together; changes speed only"})
    scale_search: bool = field(
        default=True,
        metadata={"help": "search the codes of each group's scale and zero point for the least weighted error"},
    )
    quality: Quality = quality_field()
    descent: int | None = field(
        default=None,
        metadata={"help": "sweeps of coordinate descent over codes and outliers after GPTQ; default: by --quality"},
    )
    token_weights: bool | None = weights_field()
    correct_past: bool = past_field()
    tf32: bool = field(
        default=False, metadata={"help": "on a GPU, TF32 products in the loops: faster; codes move, the loss does not"}
    )

    def __post_init__(self) -> None:
        settle_quality(self)
        for flag, bits in (("--qq-scale-bits", self.qq_scale_bits), ("--qq-zero-bits", self.qq_zero_bits)):
            if not 2 <= bits <= 8 and bits != PLAIN:
                raise CompressError(f"bits {bits} is out of range", flag, f"use 2 to 8, or {PLAIN} for no quantisation")
        sizes = (
            ("--bits", "bits", self.bits, 2, 8, "use 2 to 8"),
            ("--group-size", "group size", self.group_size, 8, 128, "use 8 to 128"),
            ("--qq-groupsize", "second-level group size", self.qq_groupsize, 2, 1024, "try 16"),
            ("--block-size", "block size", self.block_size, 1, inf, "try 128"),
            ("--descent", "number of sweeps", quality.sweeps(self), 0, inf, "use 0 or more"),
        )
        for flag, what, value, low, high, remedy in sizes:
            if not low <= value <= high:
                raise CompressError(f"{what} {value} is out of range", flag, remedy)
        if not 0 < self.damp_percent < inf:
            raise CompressError(f"damp percent {self.damp_percent} is out of range", "--damp-percent", "try 0.03")
        if not self.outlier_threshold >= 0:
            what = f"outlier threshold {self.outlier_threshold} is out of range"
            raise CompressError(what, "--outlier-threshold", "try 0.2")
        if self.average_bits is not None and not self.bits < self.average_bits <= 16:
            what = f"average bits {self.average_bits:g} is out of range at {self.bits} bits a code"
            raise CompressError(what, "--average-bits", f"use more than {self.bits}, up to 16")

    @property
    def refinable(self) -> bool:
        return quality.few(self.bits) and self.scale_search and bool(self.descent) and bool(self.token_weights)

    @property
    def needs(self) -> Needs:
        return quality.needs(self)

    @property
    def row_unit(self) -> int:
        """The threshold is relative to the whole matrix, and the budget is the whole matrix's."""
        if self._may_have_outliers:
            return 0
        return 1 if self.qq_scale_bits == self.qq_zero_bits == PLAIN else self.qq_groupsize

    @property
    def _may_have_outliers(self) -> bool:
        return self.average_bits is not None or not isinf(self.outlier_threshold)

    def settle(self, in_features: Collection[int]) -> Self:
        if in_features and self.group_size > max(in_features):
            what = f"group size {self.group_size} is larger than the widest layer's in_features {max(in_features)}"
            raise CompressError(what, "--group-size", f"use {max(in_features)} or less")
        for width in sorted(in_features) if self.average_bits is not None else ():
            shape = (1 << 14, width)  # many rows: what a row costs
            least = 8 * self._bytes(shape, 0, torch.float16) / prod(shape)
            if least > self.average_bits:  # type: ignore[operator]
                raise CompressError(
                    f"average bits {self.average_bits:g} is less than the {least:.3f} that a layer with in_features "
                    f"{width} takes without outliers", "--average-bits",
                    f"use {least + 0.01:.2f} or more, or fewer --bits or a larger --group-size",
                )  # fmt: skip
        return self

    @property
    def _base(self) -> Storage:
        return bilevel.storage_of(self.bits, self.group_size, self.qq_scale_bits, self.qq_zero_bits, self.qq_groupsize)

    @property
    def storage(self) -> Storage:
        return outliers.storage_of(self._base) if self._may_have_outliers else self._base

    def _bytes(self, shape: tuple[int, int], count: int, dtype: torch.dtype) -> int:
        """Bytes of a layer with `count` outliers."""
        return BiLevel.stored_bytes(self._base, shape, dtype) + outliers.outlier_bytes(shape, count, dtype)

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        weights = sum(prod(x["shape"]) for x in layers)
        if not weights:
            return []

        def mean(figure: str) -> float:
            return float(sum(prod(x["shape"]) * x["figures"][figure] for x in layers)) / float(weights)

        total, extra = 8 * sum(x["bytes"] for x in layers) / weights, mean("outlier_bits")
        statistics = total - self.bits - extra
        lines = [
            f"{mean('outliers'):.2%} of the weights are outliers, {total:.2f} bits a weight on average: {self.bits} "
            f"code + {statistics:.2f} statistics + {extra:.2f} outliers (counted from stored bytes)"
        ]
        if self._may_have_outliers:
            most = max(layers, key=lambda x: x["figures"]["outliers"])
            lines.append(f"most outliers: {most['figures']['outliers']:.2%} in {most['name']}")
        return lines

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Quantise one matrix.

        Args:
            weight: [out, in].
            stats: with `hessian` [in, in].
            scale_dtype: dtype of the second-level scales and zero points, and of the outliers.

        Raises:
            CompressError: the Hessian holds NaN or infinity; the weights were pruned.
        """
        assert stats.hessian is not None
        if stats.mask is not None:
            what = "the weights were pruned, and a two-level grid need not hold 0"
            raise CompressError(what, remedy="quantise pruned weights with gptq or rtn")
        target, hessian = weight.float(), stats.hessian.float()
        ready = prepare(hessian, self.damp_percent, self.act_order)
        visit, damped, factor, notes = ready.visit, ready.damped, ready.factor, list(ready.notes)
        if ready.dead:
            notes.append(f"{ready.dead} of {len(visit)} input columns were never active: rounded to nearest")
        importance = torch.empty_like(factor[0])
        importance[visit] = factor.diagonal().square().reciprocal()

        mask = self._outliers(target, importance, scale_dtype, notes)
        scale, zero = self._fit(target, mask, importance, scale_dtype)
        groups = group_index(target.shape[1], self.group_size, target.device)[visit]
        scale_of, zero_of = (x.values()[:, groups].t().contiguous() for x in (scale, zero))
        grids = scale_of, zero_of, mask[:, visit].t().contiguous()
        wanted = target[:, visit].t().contiguous()
        last = (self.bits, scale_dtype, self.block_size)
        with columns.products(self.tf32):
            solved = spqr_sweep.sweep(wanted, factor, grids, *last)
        for _ in range(quality.sweeps(self)):
            with columns.products(self.tf32):
                solved = spqr_sweep.descend(solved, wanted, damped, grids, *last)
        solved = self._keep_better_rows(solved, wanted, hessian[visit][:, visit], grids, scale_dtype, notes)
        codes, values = (unvisit(x, visit) for x in solved)
        packed = self._packed(codes, values, scale, zero, mask, scale_dtype)
        error = target - packed.dequantize().float()
        figures = self._figures(packed)
        return Solved(packed, row_losses(error, hessian), row_losses(target, hessian), tuple(notes), figures)

    def _fit(self, target: Tensor, mask: Tensor, importance: Tensor, dtype: torch.dtype) -> tuple[Statistic, Statistic]:
        return spqr_sweep.fit(
            target, mask, importance, self.bits, self.group_size, self.qq_scale_bits, self.qq_zero_bits,
            self.qq_groupsize, dtype, self.scale_search,
        )  # fmt: skip

    def _outliers(self, target: Tensor, importance: Tensor, dtype: torch.dtype, notes: list[str]) -> Tensor:
        """bool [out, in]: those with the largest errors on grids fitted without the likely ones."""
        if self.average_bits is None and self.outlier_threshold in (0.0, inf):
            return torch.full(target.shape, self.outlier_threshold == 0.0, device=target.device)
        count = None if self.average_bits is None else self._count(target, dtype, notes)
        scores = spqr_sweep.leave_one_out(target, importance, self.bits, self.group_size)
        likely = self._above(scores, target, importance, count)
        scale, zero = self._fit(target, likely, importance, dtype)
        groups = group_index(target.shape[1], self.group_size, target.device)
        grids = scale.values()[:, groups], zero.values()[:, groups], torch.zeros_like(likely)
        error = target - spqr_sweep.nearest(target, grids, self.bits, dtype)[1]
        return self._above(error.square() * importance, target, importance, count)

    def _above(self, scores: Tensor, target: Tensor, importance: Tensor, count: int | None) -> Tensor:
        """The weights with a score above the threshold, or the `count` highest, fewer where scores are equal."""
        if count is None:
            return scores > self.outlier_threshold * (target.square() * importance).mean()
        if count >= scores.numel():
            return torch.ones_like(scores, dtype=torch.bool)
        return scores > scores.flatten().topk(count + 1).values[-1]

    def _count(self, target: Tensor, dtype: torch.dtype, notes: list[str]) -> int:
        """How many outliers `average_bits` pays for."""
        assert self.average_bits is not None
        shape = (target.shape[0], target.shape[1])
        without = self._bytes(shape, 0, dtype)
        left = self.average_bits * target.numel() / 8 - without
        if left < 0:
            bits = 8 * without / target.numel()
            notes.append(f"{bits:.3f} bits a weight without any outlier, above the {self.average_bits:g} asked for")
        return max(0, int(left / outliers.bytes_each(shape[1], dtype)))

    def _keep_better_rows(
        self, solved: Solution, wanted: Tensor, hessian: Tensor, grids: Grids, dtype: torch.dtype, notes: list[str]
    ) -> Solution:
        """Replace rows whose loss is above round-to-nearest's with the same grids and outliers."""
        plain = spqr_sweep.nearest(wanted, grids, self.bits, dtype)
        ours, theirs = (row_losses((wanted - x[1]).t(), hessian) for x in (solved, plain))
        worse = theirs < ours
        if worse.any():
            notes.append(f"{int(worse.sum())} of {len(worse)} rows were rounded to nearest: their loss was lower")
        k, value = (torch.where(worse, a, b) for a, b in zip(plain, solved, strict=True))
        return k, value

    def _packed(
        self, codes: Tensor, values: Tensor, scale: Statistic, zero: Statistic, mask: Tensor, dtype: torch.dtype
    ) -> Packed:
        base = BiLevel.of(codes.to(torch.uint8), scale, zero, self.bits, self.group_size, dtype)
        return Outliers.of(base, mask, values.to(dtype)) if self._may_have_outliers else base

    def _figures(self, packed: Packed) -> dict[str, float]:
        """Outliers as a share of the weights, what they cost in bits a weight, and what all does."""
        numel, count, extra = prod(packed.shape), 0, 0
        if isinstance(packed, Outliers):
            count = len(packed.values)
            extra = 8 * outliers.outlier_bytes(packed.shape, count, packed.values.dtype)
        return {"outliers": count / numel, "outlier_bits": extra / numel, "average_bits": bits_per_weight(packed)}
