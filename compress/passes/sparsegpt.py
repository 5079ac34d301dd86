"""SparseGPT (Frantar & Alistarh: "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023).

GPTQ's sweep over the columns with a pruned weight instead of a rounded one: with U the upper factor of H^-1, H^-1 =
U^T U, the error e = w_i / U_ii of a pruned weight moves the columns not yet visited, w_j -= e * U_ij (Algorithm 1).
The mask is chosen on the way, from weights that carry every update so far, where w^2 / U_ii^2 is lowest: N of every M
weights of a row when the sweep reaches them, or a share of a block of `mask_block_size` columns over all rows. With
bits the kept weights are quantised in the same sweep, and both errors are compensated.

Two baselines with the same patterns: magnitude, |w|; and Wanda (Sun, Liu, Bair, Kolter: "A Simple and Effective Pruning
Approach for Large Language Models", ICLR 2024), |w| sqrt(H_ii) compared within a row. Neither moves the weights it
keeps; with bits these are rounded to nearest, on grids fitted to them.

Where this differs from the published code:
- counts are exact, ties go to the lower index; the code prunes whatever is at or below a threshold;
- a block of columns bears the share of the pruned weights that its scores before the sweep give it, unless
  `even_blocks`: the code prunes the same share of every block;
- N:M runs are visited by their falling sum of H_ii, unless act_order is none: the code knows natural order alone;
- what kept weights lose when they are rounded to the stored dtype is compensated too;
- the kept values are refitted by least squares on their mask, unless --no-refit (Meng et al.: "ALPS", NeurIPS 2024);
- N:M: a row that loses to magnitude pruning at the same pattern takes that;
- a column that calibration never saw is scored by the damp alone; the code sets its weights to zero;
- with bits, everything that GPTQ here does beyond its paper.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.packed.dense import Dense
from compress.packed.sparse import Sparse, storage_around
from compress.packed.uniform import UniformGrid, group_index
from compress.passes.gptq import GPTQ
from compress.passes.quality import Quality, few, past_field, quality_field, settle_quality, weights_field
from compress.solvers import columns, masks
from compress.solvers.hessian import prepare, refit_kept, row_losses, unvisit
from compress.solvers.masks import Choice, Pattern
from compress.types import LayerStats, Needs, Solved, Storage

_LARGEST_SPARSITY = 0.95
_METHODS = {"sparsegpt": "SparseGPT", "wanda": "Wanda", "magnitude": "magnitude pruning"}


@dataclass(frozen=True)
class SparseGPT:
    """SparseGPT: one-shot pruning that moves the kept weights, alone or while quantising (Frantar & Alistarh 2023)."""

    name: ClassVar[str] = "sparsegpt"
    paper: ClassVar[str] = "Frantar, Alistarh: SparseGPT, ICML 2023"

    sparsity: float | None = field(
        default=None, metadata={"help": "share of weights to prune, 0 to 0.95; default 0.5, or what the pattern says"}
    )
    pattern: str | None = field(
        default=None,
        metadata={"help": "N:M, N zeros among every M consecutive weights of a row (2:4, 4:8); default: unstructured"},
    )
    method: Literal["sparsegpt", "magnitude", "wanda"] = field(
        default="sparsegpt",
        metadata={
            "help": "sparsegpt; baselines, which move no weight: magnitude |w|, wanda |w| sqrt(H_ii) within a row"
        },
    )
    bits: int | None = field(
        default=None,
        metadata={"help": "quantise the kept weights in the same sweep, 2 to 8 bits; default: 16-bit values"},
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "with --bits: columns that share a scale; -1: whole row; default: 128, 64 or 32 if it divides"
        },
    )
    symmetric: bool = field(
        default=True, metadata={"help": "with --bits: symmetric grid (no zero points)", "off": "asymmetric"}
    )
    act_order: Literal["static", "none"] | None = field(
        default=None,
        metadata={
            "help": "static: visit columns (runs of M for N:M) by falling H diagonal; none: natural order; default: "
            "static for N:M, none for unstructured"
        },
    )
    damp_percent: float = field(default=0.01, metadata={"help": "share of H's mean diagonal added to its diagonal"})
    block_size: int = field(default=128, metadata={"help": "columns updated lazily together; changes speed only"})
    mask_block_size: int = field(
        default=128, metadata={"help": "unstructured: columns whose mask is chosen together (the paper's Bs)"}
    )
    even_blocks: bool = field(
        default=False,
        metadata={"help": "unstructured: every mask block loses the same share (the paper), not what its scores say"},
    )
    scale_search: bool = field(
        default=True,
        metadata={"help": "with --bits: search each group's scale under the error weighted by H's diagonal"},
    )
    quality: Quality = quality_field()
    refit: bool | None = field(
        default=None,
        metadata={
            "help": "sparsegpt: least-squares refit of the kept values, with --bits of the group scales; default: by "
            "--quality",
            "off": "no-refit",
        },
    )
    descent: int | None = field(
        default=None,
        metadata={"help": "with --bits, sparsegpt: sweeps of coordinate descent over the codes; default: by --quality"},
    )
    token_weights: bool | None = weights_field()
    correct_past: bool = past_field()
    tf32: bool = field(
        default=False, metadata={"help": "on a GPU, TF32 products in the loops: faster; codes move, the loss does not"}
    )

    def __post_init__(self) -> None:
        if self.method != "sparsegpt" and self.token_weights is None:  # the baselines are their papers'
            object.__setattr__(self, "token_weights", False)
        settle_quality(self)
        found = self.kept_pattern
        if self.sparsity is not None and not 0 <= self.sparsity <= _LARGEST_SPARSITY:
            raise CompressError(f"sparsity {self.sparsity} is out of range", "--sparsity", "use 0 to 0.95")
        if found.m and self.sparsity is not None and abs(self.sparsity - found.share) > 1e-6:
            what = f"pattern {self.pattern} prunes {found.share:.4g} of the weights, not {self.sparsity:g}"
            raise CompressError(what, "--sparsity", "give one of the two")
        if self.method not in _METHODS:
            raise CompressError(f"no method {self.method!r}", "--method", "use sparsegpt, magnitude or wanda")
        if self.mask_block_size < 1:
            raise CompressError(
                f"mask block size {self.mask_block_size} is out of range", "--mask-block-size", "try 128"
            )
        if self.act_order not in ("static", "none", None):
            raise CompressError(f"no act order {self.act_order!r}", "--act-order", "use static or none")
        if self.bits is None and self.group_size is not None:
            raise CompressError("a group size without bits", "--group-size", "add --bits 4, or leave it out")
        self._gptq()  # which checks the settings that the two share

    @property
    def kept_pattern(self) -> Pattern:
        """What `sparsity` and `pattern` mean."""
        if self.pattern is not None:
            return masks.parse(self.pattern)
        return Pattern(sparsity=0.5 if self.sparsity is None else self.sparsity, by_row=self.method == "wanda")

    @property
    def refinable(self) -> bool:
        return few(self.bits) and self.method == "sparsegpt" and bool(self.refit) and bool(self.token_weights)

    @property
    def needs(self) -> Needs:
        hessian = self.method != "magnitude"
        past, weighted = self.correct_past and hessian, bool(self.token_weights) and hessian
        return Needs(hessian, outputs=self.quality == "best", past=past, weighted=weighted)

    @property
    def row_unit(self) -> int:
        pattern = self.kept_pattern
        return 1 if pattern.m or pattern.by_row else 0

    def settle(self, in_features: Collection[int]) -> Self:
        masks.check_divides(self.kept_pattern, in_features)
        if self.bits is None:
            return self
        return replace(self, group_size=grid.settle_group_size(self.group_size, in_features))

    @property
    def storage(self) -> Storage:
        inner = Storage(Dense.kind, 16) if self.bits is None else self._gptq().storage
        return storage_around(inner, self.kept_pattern)

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Prune one matrix.

        Args:
            weight: [out, in].
            stats: with `hessian` [in, in] (magnitude works without); what its mask prunes is exactly 0 in the result,
                and counts among the pruned.
            scale_dtype: dtype of the stored values or scales.

        Raises:
            CompressError: the Hessian holds NaN or infinity.
        """
        target = weight.float()
        if self.method != "sparsegpt":
            packed, notes = self._by_score(target, stats, scale_dtype)
        elif self.bits is None:
            packed, notes = self._swept(target, stats, scale_dtype)
        else:
            solved, kept = self._gptq().solve(target, stats, scale_dtype, self._choice())
            assert kept is not None
            assert isinstance(solved.packed, UniformGrid)
            packed, notes = Sparse(kept, solved.packed, self.kept_pattern), list(solved.notes)
        if self.method == "sparsegpt" and self.kept_pattern.m:
            packed, worse = _or_magnitude(packed, target, stats)
            if worse:
                notes.append(f"{worse} of {len(target)} rows kept magnitude pruning's mask: their loss was lower")
        return self._solved(packed, target, stats, notes)

    def _gptq(self) -> GPTQ:
        """GPTQ with the settings that the two share."""
        return GPTQ(
            4 if self.bits is None else self.bits,
            self.group_size,
            self.symmetric,
            self._order(),
            self.damp_percent,
            self.block_size,
            self.scale_search,
            self.quality,
            self.refit,
            self.descent,
            self.token_weights,
            self.correct_past,
            self.tf32,
        )

    def _order(self) -> Literal["static", "none"]:
        return self.act_order or ("static" if self.kept_pattern.m else "none")

    def _choice(self) -> Choice:
        pattern = self.kept_pattern
        return Choice(pattern, pattern.m or self.mask_block_size, self.even_blocks)

    def _swept(self, target: Tensor, stats: LayerStats, dtype: torch.dtype) -> tuple[Sparse, list[str]]:
        """Algorithm 1 without quantisation."""
        assert stats.hessian is not None
        hessian, choice = stats.hessian.float(), self._choice()
        ready = prepare(hessian, self.damp_percent, self._order() == "static", choice)
        visit, damped, factor, notes = ready.visit, ready.damped, ready.factor, list(ready.notes)
        if ready.dead:
            notes.append(f"{ready.dead} of {len(visit)} input columns were never active: scored by the damp alone")
        given = None if stats.mask is None else stats.mask[:, visit].t().contiguous()
        w = target[:, visit].t().contiguous()
        with columns.products(self.tf32):
            moved, kept = columns.prune(w, factor, None, None, 0, dtype, self.block_size, choice, given)
        mask, values = unvisit(kept, visit), unvisit(moved, visit)
        if self.refit:
            back = torch.argsort(visit)
            alive = mask if stats.mask is None else mask & stats.mask
            values = refit_kept(values, alive, target, damped[back][:, back])
        return Sparse(mask, Dense(values.to(dtype) + 0), self.kept_pattern), notes  # + 0: a pruned -w left -0

    def _by_score(self, target: Tensor, stats: LayerStats, dtype: torch.dtype) -> tuple[Sparse, list[str]]:
        """The mask by a score, and the kept weights as they are or rounded to nearest."""
        score = target.abs()
        importance = None
        if stats.hessian is not None:
            diagonal = stats.hessian.float().diagonal()
            importance = diagonal.clamp(min=1e-6 * float(diagonal.mean()))
            if self.method == "wanda":
                score = score * diagonal.sqrt()
        kept, alive = _masks(score, self.kept_pattern, stats.mask)
        if self.bits is None:
            return Sparse(kept, Dense(torch.where(alive, target, 0.0).to(dtype)), self.kept_pattern), []
        size = -1 if self.group_size is None else self.group_size
        fitted = grid.fit(target * alive, self.bits, size, self.symmetric, dtype, self.scale_search, importance)
        zero = fitted.zero[:, group_index(target.shape[1], size, target.device)]
        zeros = None if self.symmetric else fitted.zero.to(torch.uint8)
        blank = UniformGrid(zero.to(torch.uint8), fitted.scale.to(dtype), zeros, self.bits, size)
        return Sparse(kept, _nearest(blank, target, alive), self.kept_pattern), []

    def _solved(self, packed: Sparse, target: Tensor, stats: LayerStats, notes: list[str]) -> Solved:
        dense = packed.dequantize().float()
        figures = {"sparsity": float((dense == 0).float().mean()), "pruned": 1 - float(packed.mask.float().mean())}
        if stats.hessian is None:
            return Solved(packed, (target - dense).square().sum(1), target.square().sum(1), tuple(notes), figures)
        hessian = stats.hessian.float()
        loss, norm = row_losses(target - dense, hessian), row_losses(target, hessian)
        _, alive = _masks(target.abs(), self.kept_pattern, stats.mask)
        plain = float(row_losses(torch.where(alive, 0.0, target), hessian).sum())
        whole = float(norm.sum())
        if whole > 0:
            figures |= {"error": float(loss.sum()) / whole, "magnitude_error": plain / whole}
        return Solved(packed, loss, norm, tuple(notes), figures)

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """Pattern, count, how the mask was chosen; the layers' mean error beside magnitude pruning's."""
        if not layers:
            return []
        sizes = [layer["shape"][0] * layer["shape"][1] for layer in layers]
        pruned, zero = (
            sum(n * layer["figures"][name] for n, layer in zip(sizes, layers, strict=True)) / sum(sizes)
            for name in ("pruned", "sparsity")
        )
        pattern = self.kept_pattern
        how = {
            "magnitude": f"lowest |w| {f'of every {pattern.m} columns' if pattern.m else 'of each layer'}",
            "wanda": f"lowest |w| sqrt(H_ii) of {f'every {pattern.m} columns' if pattern.m else 'each row'}",
            "sparsegpt": f"mask chosen every {self._choice().length} columns from the updated weights",
        }[self.method]
        rounded = f" ({100 * zero:.2f}% are zero once rounded)" if zero - pruned > 5e-5 else ""
        name = str(pattern) if pattern.m else "unstructured"
        lines = [f"{name}: {100 * pruned:.2f}% of {_amount(sum(sizes))} weights pruned{rounded}, {how} "
                 f"({_METHODS[self.method]})"]  # fmt: skip
        known = [layer["figures"] for layer in layers if "magnitude_error" in layer["figures"]]
        if known and self.method != "magnitude":
            ours, plain = (sum(f[key] for f in known) / len(known) for key in ("error", "magnitude_error"))
            bits = "" if self.bits is None else f" with {self.bits}-bit weights"
            lines.append(
                f"layer error {ours:.4f}{bits}, magnitude pruning's at the same pattern {plain:.4f} (unquantised)"
            )
        return lines


def _amount(count: int) -> str:
    return f"{count / 1e6:.1f} million" if count >= 1e6 else str(count)


def _masks(score: Tensor, pattern: Pattern, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """bool [out, in] twice: the mask by score, and what of it an earlier step kept as well (it goes first)."""
    kept = masks.by_score(score if given is None else torch.where(given, score, -1.0), pattern)
    return kept, kept if given is None else kept & given


def _nearest(packed: UniformGrid, target: Tensor, alive: Tensor) -> UniformGrid:
    """The weights rounded to nearest on the grids of `packed`, level 0 where not alive."""
    groups = packed.column_groups()
    middle = 2 ** (packed.bits - 1)
    zero = torch.full_like(target, middle) if packed.zeros is None else packed.zeros.float()[:, groups]
    k = grid.nearest(target, packed.scales.float()[:, groups], -zero, 2**packed.bits - 1 - zero)
    return replace(packed, codes=(k * alive + zero).to(torch.uint8))


def _or_magnitude(packed: Sparse, target: Tensor, stats: LayerStats) -> tuple[Sparse, int]:
    """Rows that lose to magnitude pruning (rounded to nearest on the same grid) take that; and how many do."""
    assert stats.hessian is not None
    hessian = stats.hessian.float()
    kept, alive = _masks(target.abs(), packed.pattern, stats.mask)
    inner = packed.inner
    plain: Dense | UniformGrid
    if isinstance(inner, Dense):
        plain = Dense(torch.where(alive, target, 0.0).to(inner.values.dtype))
    else:
        plain = _nearest(inner, target, alive)
    ours, theirs = (row_losses(target - p.dequantize().float(), hessian) for p in (inner, plain))
    worse = (theirs < ours)[:, None]
    best: Dense | UniformGrid
    if isinstance(inner, Dense):
        best = replace(inner, values=torch.where(worse, plain.dequantize(), inner.values))
    else:
        assert isinstance(plain, UniformGrid)
        best = replace(inner, codes=torch.where(worse, plain.codes, inner.codes))
    return Sparse(torch.where(worse, kept, packed.mask), best, packed.pattern), int(worse.sum())
