"""GPTQ (Frantar, Ashkboos, Hoefler, Alistarh: "GPTQ", ICLR 2023), with what was learned since.

The idea: quantise a row's weights one column at a time; after each, move the not yet quantised weights of the row so
that the layer's output on the calibration inputs changes least. With H the mean of x x^T, U the upper Cholesky factor
of H^-1 and e = (w_i - q_i) / U_ii, the move is w_j -= e * U_ij for j > i (Algorithm 1). Columns go in blocks: moves
inside a block are made at once, the rest of the matrix is updated once a block by one matrix product.

Beyond the paper, each with its own switch:
- H is a mean in which tokens count by what an error there does to the block's output (compress/sensitivity.py);
- scale search weighted by H's diagonal, over scales of both signs;
- act order with static groups: columns are visited in order of falling H_ii, groups stay in natural column order;
- refit: for fixed codes the loss is quadratic in the group scales, so their optimum is a linear solve a row;
- descent: sweeps of coordinate descent over the codes under the full Hessian.
A row whose loss would be above round-to-nearest's on the same grid takes the round-to-nearest codes. A column that
calibration never saw (H_ii = 0) is rounded to nearest; the reference code sets it to zero.

`--reference obq` visits each row's weights in OBQ's greedy order instead (solvers/obq.py), on the same static grids.

Weights that an earlier step pruned (`LayerStats.mask`) stay exactly 0: their level is 0 throughout, and what that costs
is compensated like any other error. SparseGPT's joint sweep is this one with the mask chosen on the way (`solve`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.grid import Grid
from compress.packed.uniform import UniformGrid, group_index
from compress.passes import quality
from compress.passes.quality import Quality, past_field, quality_field, settle_quality, weights_field
from compress.solvers import columns, kernel, obq
from compress.solvers.columns import blocks
from compress.solvers.hessian import prepare, refit_kept, refit_scales, row_losses, runs, unvisit
from compress.solvers.masks import Choice, Growing, expected
from compress.types import LayerStats, Needs, Solved, Storage

#: in_features up to which the reference order is offered
_WIDEST_OBQ = 1024


@dataclass(frozen=True)
class GPTQ:
    """GPTQ: second-order rounding that minimises each layer's output error (Frantar et al. 2023)."""

    name: ClassVar[str] = "gptq"
    paper: ClassVar[str] = "Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023"
    row_unit: ClassVar[int] = 1

    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8"})
    group_size: int | None = field(
        default=None,
        metadata={"help": "columns that share a scale; -1: whole row; default: largest of 128, 64, 32 that divides"},
    )
    symmetric: bool = field(default=True, metadata={"help": "symmetric grid (no zero points)", "off": "asymmetric"})
    act_order: Literal["static", "groups", "none"] = field(
        default="static",
        metadata={
            "help": "static: visit columns by falling H diagonal, groups in natural order; groups: groups follow that "
            "order too (g_idx, gptq format only); none: natural order, scales from the updated weights"
        },
    )
    damp_percent: float = field(default=0.01, metadata={"help": "share of H's mean diagonal added to its diagonal"})
    block_size: int = field(default=128, metadata={"help": "columns updated lazily together; changes speed only"})
    scale_search: bool = field(
        default=True, metadata={"help": "search each group's scale under the error weighted by H's diagonal"}
    )
    quality: Quality = quality_field()
    refit: bool | None = field(
        default=None,
        metadata={
            "help": "least-squares refit of the group scales to the codes; default: by --quality",
            "off": "no-refit",
        },
    )
    descent: int | None = field(
        default=None, metadata={"help": "sweeps of coordinate descent over the codes; default: by --quality, 0 or 1"}
    )
    token_weights: bool | None = weights_field()
    correct_past: bool = past_field()
    tf32: bool = field(
        default=False, metadata={"help": "on a GPU, TF32 products in the loops: faster; codes move, the loss does not"}
    )
    activations: Literal["none", "token"] = field(
        default="none",
        metadata={"help": "token: 8-bit activations, a scale a token (W8A8); needs --bits 8, symmetric, a scale a row"},
    )
    reference: Literal["none", "obq"] = field(
        default="none",
        metadata={
            "help": "obq: the greedy order of OBQ in place of GPTQ's fixed one, for layers of at most 1024 inputs"
        },
    )

    def __post_init__(self) -> None:
        settle_quality(self)
        if not 2 <= self.bits <= 8:
            raise CompressError(f"bits {self.bits} is out of range", "--bits", "use 2 to 8")
        if self.damp_percent <= 0 or not self.damp_percent < float("inf"):
            raise CompressError(f"damp percent {self.damp_percent} is out of range", "--damp-percent", "try 0.01")
        if self.block_size < 1:
            raise CompressError(f"block size {self.block_size} is out of range", "--block-size", "try 128")
        if quality.sweeps(self) < 0:
            raise CompressError(f"{self.descent} sweeps is out of range", "--descent", "use 0 or more")
        if self.act_order not in ("static", "groups", "none"):
            raise CompressError(f"no act order {self.act_order!r}", "--act-order", "use static, groups or none")
        if self.activations not in ("none", "token"):
            raise CompressError(f"no activations {self.activations!r}", "--activations", "use none or token")
        if self.activations != "none" and (self.bits != 8 or not self.symmetric or self.group_size not in (None, -1)):
            what = f"8-bit products take 8-bit symmetric weights with a scale a row, not {self.bits} bits"
            what += f" in groups of {self.group_size}" if self.group_size not in (None, -1) else ""
            raise CompressError(what, "--activations token", "use --bits 8 --group-size -1 --symmetric")
        if self.reference not in ("none", "obq"):
            raise CompressError(f"no reference {self.reference!r}", "--reference", "use none or obq")
        if self.reference == "obq" and self.act_order == "groups":
            raise CompressError("OBQ has an order of its own", "--act-order groups", "leave --act-order out")

    def settle(self, in_features: Collection[int]) -> Self:
        if self.reference == "obq" and max(in_features, default=0) > _WIDEST_OBQ:
            what = f"OBQ takes in_features^3 for every row, and a layer has {max(in_features)} of them"
            remedy = f"choose layers of {_WIDEST_OBQ} or fewer with --include, or leave --reference out"
            raise CompressError(what, "--reference obq", remedy)
        if self.activations != "none":
            return replace(self, group_size=-1)
        return replace(self, group_size=grid.settle_group_size(self.group_size, in_features))

    @property
    def refinable(self) -> bool:
        added = self.scale_search, self.refit, self.descent, self.token_weights
        return quality.few(self.bits) and self.reference == "none" and all(added)

    @property
    def needs(self) -> Needs:
        return quality.needs(self)

    @property
    def storage(self) -> Storage:
        size = -1 if self.group_size is None else self.group_size
        ordered = self.act_order == "groups" and size != -1
        return Storage(UniformGrid.kind, self.bits, size, self.symmetric, ordered, self._activations)

    @property
    def _activations(self) -> str:
        return "" if self.activations == "none" else self.activations

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """One line: the setting, and the mean relative error of the layers' outputs."""
        error = sum(r["relative_error"] for r in layers) / len(layers)
        size = "a scale a row" if self.group_size == -1 else f"groups of {self.group_size}"
        order = {"static": "static act order", "groups": "act order", "none": "natural order"}[self.act_order]
        order = "OBQ's greedy order" if self.reference == "obq" else order
        counted = ", tokens counted by what an error there does to the block" if self.token_weights else ""
        return [
            f"GPTQ, {self.bits} bits, {size}, {order}, damp {100 * self.damp_percent:g}%: the layers' outputs on the "
            f"calibration data are off by {100 * error:.3g}% of their energy on average{counted}"
        ]

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Quantise one matrix.

        Args:
            weight: [out, in].
            stats: with `hessian` [in, in]; where it has a mask, what that prunes is exactly 0 in the result.
            scale_dtype: dtype of the stored scales.

        Raises:
            CompressError: the Hessian holds NaN or infinity.
        """
        return self.solve(weight, stats, scale_dtype)[0]

    def solve(
        self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype, choice: Choice | None = None
    ) -> tuple[Solved, Tensor | None]:
        """`__call__`, pruning on the way: with a choice (not for act order "groups") also its mask, bool [out, in]."""
        assert stats.hessian is not None
        target = weight.float()
        hessian = stats.hessian.float()
        size = -1 if self.group_size is None else self.group_size
        ready = prepare(hessian, self.damp_percent, self.act_order != "none", choice)
        order, damped, factor, notes = ready.visit, ready.damped, ready.factor, list(ready.notes)
        back = torch.argsort(order)
        if ready.dead:
            notes.append(f"{ready.dead} of {len(order)} input columns were never active: rounded to nearest")

        given = stats.mask
        if self.act_order == "groups":  # the whole problem is permuted, so that groups are contiguous again
            target, hessian, visit = target[:, order], hessian[order][:, order], torch.arange(len(order)).to(order)
            given = None if given is None else given[:, order]
        else:
            damped, visit = damped[back][:, back], order

        importance = hessian.diagonal().clamp(min=1e-6 * float(damped.diagonal().mean()))
        fitted = given if choice is None else expected(target, factor.diagonal()[back], choice.pattern, given)
        groups = group_index(target.shape[1], size, target.device)
        problem = (factor, damped, importance, groups, visit)
        k, kept, grids = self._swept(target, *problem, fitted, given, choice, scale_dtype)
        if kept is not None and self.refit:  # what the mask leaves has an optimum of its own, which is easier to round
            left = kept if given is None else given & kept
            best = refit_kept(target * left, left, target, damped)
            k, _, grids = self._swept(best, *problem, left, left, None, scale_dtype)
        alive = kept if given is None else given if kept is None else given & kept
        k, grids = self._polish(k, target, damped, grids, size, groups, visit, alive)
        k, loss, worse = keep_better_rows(k, target, hessian, grids, groups, alive)
        if worse:
            notes.append(f"{worse} of {len(target)} rows kept their round-to-nearest codes: their loss was lower")
        last = back if self.act_order == "groups" else None
        return self._solved(k, grids, groups, loss, row_losses(target, hessian), last, tuple(notes)), kept

    def polished(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Round to nearest, then only what follows GPTQ's loop: refit and descent.

        Args:
            weight, stats, scale_dtype: as for the whole method.
        """
        assert stats.hessian is not None
        target, hessian = weight.float(), stats.hessian.float()
        size = -1 if self.group_size is None else self.group_size
        ready = prepare(hessian, self.damp_percent, True)
        back = torch.argsort(ready.visit)
        damped = ready.damped[back][:, back]
        groups = group_index(target.shape[1], size, target.device)
        importance = hessian.diagonal().clamp(min=1e-6 * float(damped.diagonal().mean()))
        grids = grid.fit(target, self.bits, size, self.symmetric, scale_dtype, self.scale_search, importance)
        scale, low, high = (x[:, groups] for x in (grids.scale, grids.low, grids.high))
        k = grid.nearest(target, scale, low, high)
        k = k if stats.mask is None else k * stats.mask
        k, grids = self._polish(k, target, damped, grids, size, groups, ready.visit, stats.mask)
        k, loss, _ = keep_better_rows(k, target, hessian, grids, groups, stats.mask)
        return self._solved(k, grids, groups, loss, row_losses(target, hessian), None, ready.notes)

    def _swept(
        self, target: Tensor, factor: Tensor, damped: Tensor, importance: Tensor, groups: Tensor, visit: Tensor,
        fitted: Tensor | None, given: Tensor | None, choice: Choice | None, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Grid]:  # fmt: skip
        """Grids fitted to the weights of `fitted`, then the loop that the settings name: levels, chosen mask, grids."""
        size = -1 if self.group_size is None else self.group_size
        seen = target if fitted is None else target * fitted  # a weight of 0 costs the fit of its group nothing
        grids = grid.fit(seen, self.bits, size, self.symmetric, dtype, self.scale_search, importance)
        if self.reference == "obq":
            scale, low, high = (x[:, groups] for x in (grids.scale, grids.low, grids.high))
            if given is not None:
                low, high = low * given, high * given
            return obq.sweep(target, damped, scale, low, high, grids.dtype), None, grids
        if size != -1 and self.act_order != "static":
            return self._sweep_fresh(target, factor, grids, groups.tolist(), importance, fitted, given, choice)
        return *self._sweep(target, factor, grids, groups, visit, given, choice), grids

    def _sweep(
        self, target: Tensor, factor: Tensor, grids: Grid, groups: Tensor, visit: Tensor,
        given: Tensor | None, choice: Choice | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """GPTQ's loop with grids that were fitted before it: levels and the chosen mask, [out, in]."""
        scale, zero = self._by_column(grids, groups[visit])
        w = target[:, visit].t().contiguous()
        fixed = None if given is None else given[:, visit].t().contiguous()
        run = (w, factor, scale, zero, self.bits, grids.dtype, self.block_size)
        with columns.products(self.tf32):
            if choice is None:
                return unvisit(columns.sweep(*run, fixed), visit), None
            k, kept = columns.prune(*run, choice, fixed)
        return unvisit(k, visit), unvisit(kept, visit)

    def _by_column(self, grids: Grid, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero of each weight as [in, out], columns in the order of `groups`."""
        zero = None if self.symmetric else grids.zero[:, groups].t().contiguous()
        return grids.scale[:, groups].t().contiguous(), zero

    def _sweep_fresh(
        self, target: Tensor, factor: Tensor, grids: Grid, groups: list[int], importance: Tensor,
        fitted: Tensor | None, given: Tensor | None, choice: Choice | None,
    ) -> tuple[Tensor, Tensor | None, Grid]:  # fmt: skip
        """GPTQ's loop where each group's grid is fitted, at its first column, to weights that carry every update."""
        w = target.t().clone(memory_format=torch.contiguous_format)  # [in, out]; never the caller's own memory
        mask = Growing(w, factor, choice, None if given is None else given.t().contiguous())
        k = torch.empty_like(w)
        scale, zero = grids.scale.clone(), grids.zero.clone()
        inverse = factor.diagonal().reciprocal()
        size, run = groups.count(groups[0]), choice.pattern.m if choice is not None else 0
        fast = None if run and size % run else kernel.find(w, grids.dtype, self.bits, pruned=mask.runs)

        def fit(first: int) -> None:
            """The grid of the group that begins at column `first`."""
            g = groups[first]
            end = first + groups[first:].count(g)
            seen = w[first:end].t() if fitted is None else w[first:end].t() * fitted[:, first:end]
            now = grid.fit(
                seen.contiguous(), self.bits, -1, self.symmetric, grids.dtype, self.scale_search, importance[first:end]
            )
            scale[:, g], zero[:, g] = now.scale[:, 0], now.zero[:, 0]

        def decide(start: int, stop: int, error: Tensor) -> None:
            for first, last in runs(groups, start, stop):
                g, mine = groups[first], slice(first, last)
                if first == 0 or groups[first - 1] != g:
                    fit(first)
                s, z = scale[:, g], zero[:, g]
                if fast is not None:
                    alive = mask.begin(start, stop, fast.chooses)
                    fast(w[mine], factor[mine, mine], inverse[mine], s.repeat(last - first, 1),
                         None if self.symmetric else z.repeat(last - first, 1), alive, None, k[mine], error,
                         kept=columns.part(mask.kept, mine))  # fmt: skip
                    return
                low, high = -z, 2**self.bits - 1 - z
                for i in range(first, last):
                    mask.reach(i)
                    k[i] = grid.nearest(w[i], s, low, high)
                    mask.clear(k[i], i)
                    error[i - start] = (w[i] - grid.value(k[i], s, grids.dtype)) * inverse[i]
                    if i + 1 < stop:
                        w[i + 1 : stop].addr_(factor[i, i + 1 : stop], error[i - start], alpha=-1)

        edges = list(
            blocks(len(w), self.block_size if fast is None else fast.block(self.block_size), groups, *mask.labels)
        )
        if fast is not None:  # whose blocks lie in one group each
            edges = [part for start, stop in edges for part in runs(groups, start, stop)]
        with columns.products(self.tf32):
            columns.lazily(edges, w, factor, decide, (groups, *mask.labels))
        kept = None if mask.kept is None else mask.kept.t().contiguous()
        return k.t().contiguous(), kept, Grid(scale, zero, self.bits, grids.dtype)

    def _polish(
        self, k: Tensor, target: Tensor, damped: Tensor, grids: Grid, size: int, groups: Tensor, visit: Tensor,
        alive: Tensor | None,
    ) -> tuple[Tensor, Grid]:  # fmt: skip
        """Alternate the refit of the scales and sweeps over the codes."""
        ordered = damped[visit][:, visit]
        wanted = target[:, visit].t().contiguous()
        fixed = None if alive is None else alive[:, visit].t().contiguous()
        for done in range(max(quality.sweeps(self), 1)):
            if self.refit:
                grids = refit_scales(k, target, damped, grids, size)
            if done < quality.sweeps(self):
                scale, zero = self._by_column(grids, groups[visit])
                levels = k[:, visit].t().contiguous()
                with columns.products(self.tf32):
                    levels = columns.descend(
                        levels, wanted, ordered, scale, zero, self.bits, grids.dtype, self.block_size, fixed
                    )
                k = unvisit(levels, visit)
        return k, grids

    def _solved(
        self,
        k: Tensor,
        grids: Grid,
        groups: Tensor,
        loss: Tensor,
        norm: Tensor,
        back: Tensor | None,
        notes: tuple[str, ...],
    ) -> Solved:
        codes = (k + grids.zero[:, groups]).to(torch.uint8)
        g_idx = None
        if back is not None:
            codes = codes[:, back].contiguous()
            g_idx = groups[back].to(torch.int32) if self.storage.ordered_groups else None
        zeros = None if self.symmetric else grids.zero.to(torch.uint8)
        size = -1 if self.group_size is None else self.group_size
        packed = UniformGrid(codes, grids.scale.to(grids.dtype), zeros, self.bits, size, g_idx, self._activations)
        return Solved(packed, loss, norm, notes)


def keep_better_rows(
    k: Tensor, target: Tensor, hessian: Tensor, grids: Grid, groups: Tensor, alive: Tensor | None = None
) -> tuple[Tensor, Tensor, int]:
    """Replace rows that lose to round-to-nearest on the same grid and mask. Returns the levels, what each row then
    loses (float32 [out]), and how many were replaced."""
    scale = grids.scale[:, groups]
    plain = grid.nearest(target, scale, grids.low[:, groups], grids.high[:, groups])
    plain = plain if alive is None else plain * alive
    ours = row_losses(target - grid.value(k, scale, grids.dtype), hessian)
    theirs = row_losses(target - grid.value(plain, scale, grids.dtype), hessian)
    worse = theirs < ours
    return torch.where(worse[:, None], plain, k), torch.where(worse, theirs, ours), int(worse.sum())
