"""What a solver does to a layer, stage by stage: the functions that its pass calls, each on what it would be given.

A stage is a name and a function without arguments that can be called again and again. What no stage has (orders,
copies) is what the whole call takes beyond their sum.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress import grid
from compress.packed.bilevel import BiLevel
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid, group_index
from compress.passes.gptq import GPTQ, keep_better_rows
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.solvers import columns, kernel
from compress.solvers import spqr as spqr_solver
from compress.solvers.hessian import prepare, refit_kept, refit_scales, row_losses, unvisit
from compress.solvers.kernel import Fast
from compress.solvers.masks import Choice
from compress.sums import accumulate
from compress.types import LayerStats, Packed, Pass, Solved

Shape = tuple[int, int]
Stage = tuple[str, Callable[[], object]]

#: in the order in which they run; "block" is 128 columns of the loop, by the kernel alone
STAGES = ("factor", "grid", "loop", "block", "refit", "descent", "losses")
_BLOCK = slice(0, 128)
_STD = 0.02
_SWITCH = "COMPRESS_KERNELS"


@dataclass(frozen=True)
class Setting:
    """What methods are told.

    Attributes:
        bits, group, asymmetric: of integer grids (SpQR has its own).
        dtype: of weights and inputs, and of stored scales.
        tf32: products of the loops in TF32.
    """

    bits: int = 4
    group: int = 128
    asymmetric: bool = False
    dtype: torch.dtype = torch.float16
    tf32: bool = False


@dataclass(frozen=True)
class Layer:
    """A layer to solve.

    Attributes:
        weight: [out, in].
        x: [tokens, in], some of its inputs.
        hessian: float32 [in, in], the mean of x x^T over them.
    """

    weight: Tensor
    x: Tensor
    hessian: Tensor

    @property
    def stats(self) -> LayerStats:
        return LayerStats(len(self.x), self.hessian)

    def hessians(self) -> Iterator[Tensor]:
        """The Hessian in another memory than the last: what is kept for the layers of one input is made again."""
        return itertools.cycle((self.hessian, self.hessian.clone()))


def drawn(shape: Shape, tokens: int, device: torch.device, dtype: torch.dtype) -> Layer:
    """A random layer, the same for the same arguments. Its inputs are of unlike size, and correlated."""
    generator = torch.Generator(device).manual_seed(shape[0] + shape[1])
    normal = partial(torch.randn, generator=generator, device=device)
    rows, width = shape
    rank = max(1, width // 8)
    x = normal(tokens, rank) @ normal(rank, width)
    x.div_(rank**0.5).add_(normal(tokens, width)).mul_(normal(width).mul_(0.5).exp_())
    half = x.to(dtype)
    hessian = torch.zeros(width, width, device=device)
    accumulate(hessian, half)
    return Layer(normal(rows, width).mul_(_STD).to(dtype), half, hessian.div_(tokens))


@dataclass(frozen=True)
class Method:
    """A pass that is taken apart.

    Attributes:
        what: for a reader.
        make: the pass.
        stages: of it on a layer.
    """

    what: str
    make: Callable[[Setting], Pass]
    stages: Callable[[Any, Layer, torch.dtype], Iterator[Stage]]


def fast_gptq(setting: Setting) -> GPTQ:
    """GPTQ without what was added to it."""
    s = setting
    return GPTQ(
        s.bits, s.group, not s.asymmetric, scale_search=False, refit=False, descent=0, token_weights=False, tf32=s.tf32
    )


def default_gptq(setting: Setting) -> GPTQ:
    """GPTQ with search, refit and descent."""
    return GPTQ(setting.bits, setting.group, not setting.asymmetric, tf32=setting.tf32, quality="balanced")


def best_gptq(setting: Setting) -> GPTQ:
    """GPTQ, and blocks refined."""
    return GPTQ(setting.bits, setting.group, not setting.asymmetric, tf32=setting.tf32, quality="best")


def gptq_stages(method: GPTQ, layer: Layer, dtype: torch.dtype) -> Iterator[Stage]:
    """Of act order "static"."""
    target, size = layer.weight.float(), -1 if method.group_size is None else method.group_size
    yield "factor", _factor(method.damp_percent, layer)
    ready = prepare(layer.hessian, method.damp_percent, True)
    visit, back = ready.visit, torch.argsort(ready.visit)
    damped, importance = ready.damped[back][:, back], layer.hessian.diagonal().contiguous()
    fit = partial(grid.fit, target, method.bits, size, method.symmetric, dtype, method.scale_search, importance)
    yield "grid", fit
    grids = fit()
    groups = group_index(target.shape[1], size, target.device)

    def by_column() -> tuple[Tensor, Tensor | None]:
        zero = None if method.symmetric else grids.zero[:, groups[visit]].t().contiguous()
        return grids.scale[:, groups[visit]].t().contiguous(), zero

    scale, zero = by_column()
    wanted, last = target[:, visit].t().contiguous(), (method.bits, dtype, method.block_size)
    loop = _loop(method.tf32, columns.sweep, wanted, ready.factor, scale, zero, *last)
    yield "loop", loop
    yield from _block(kernel.find(wanted, dtype, method.bits), wanted, ready.factor, scale, zero)
    k = unvisit(loop(), visit)
    if method.refit:
        refit = partial(refit_scales, k, target, damped, grids, size)
        yield "refit", refit
        grids = refit()
    if method.descent:
        scale, zero = by_column()
        levels = k[:, visit].t().contiguous()
        descent = _loop(method.tf32, columns.descend, levels, wanted, ready.damped, scale, zero, *last)
        yield "descent", descent
        k = unvisit(descent(), visit)

    def losses() -> None:
        keep_better_rows(k, target, layer.hessian, grids, groups)
        row_losses(target, layer.hessian)

    yield "losses", losses


def pruning(setting: Setting) -> SparseGPT:
    """2:4, kept weights in 16 bits."""
    return SparseGPT(pattern="2:4", tf32=setting.tf32)


def sparsegpt_stages(method: SparseGPT, layer: Layer, dtype: torch.dtype) -> Iterator[Stage]:
    """Of N:M without quantisation."""
    pattern = method.kept_pattern
    choice = Choice(pattern, pattern.m, method.even_blocks)
    target = layer.weight.float()
    yield "factor", _factor(method.damp_percent, layer, choice)
    ready = prepare(layer.hessian, method.damp_percent, True, choice)
    w = target[:, ready.visit].t().contiguous()
    loop = _loop(method.tf32, columns.prune, w, ready.factor, None, None, 0, dtype, method.block_size, choice)
    yield "loop", loop
    fast = kernel.find(w, dtype, 0, pruned=(pattern.m, pattern.m - pattern.n, len(w)))
    kept = torch.ones_like(w[_BLOCK], dtype=torch.bool)
    yield from _block(fast, w, ready.factor, None, None, kept=kept)
    moved, mask = (unvisit(x, ready.visit) for x in loop())
    back = torch.argsort(ready.visit)
    damped = ready.damped[back][:, back]
    yield "refit", partial(refit_kept, moved, mask, target, damped)


def spqr(setting: Setting) -> SpQR:
    """As it is by default: 3 bits, groups of 16."""
    return SpQR(tf32=setting.tf32)


def spqr_stages(method: SpQR, layer: Layer, dtype: torch.dtype) -> Iterator[Stage]:
    """With a threshold; the fit of the grids is that for the choice of outliers and that without them."""
    target = layer.weight.float()
    yield "factor", _factor(method.damp_percent, layer)
    ready = prepare(layer.hessian, method.damp_percent, True)
    importance = torch.empty_like(ready.factor[0])
    importance[ready.visit] = ready.factor.diagonal().square().reciprocal()

    def outliers(scores: Tensor) -> Tensor:
        return scores > method.outlier_threshold * (target.square() * importance).mean()

    def fit() -> Any:
        mask = outliers(spqr_solver.leave_one_out(target, importance, method.bits, method.group_size))
        for _ in range(2):
            found = spqr_solver.fit(
                target, mask, importance, method.bits, method.group_size, method.qq_scale_bits, method.qq_zero_bits,
                method.qq_groupsize, dtype, method.scale_search,
            )  # fmt: skip
        return *found, mask

    yield "grid", fit
    *statistics, mask = fit()
    groups = group_index(target.shape[1], method.group_size, target.device)[ready.visit]
    scale, zero = (x.values()[:, groups].t().contiguous() for x in statistics)
    mask, wanted = (x[:, ready.visit].t().contiguous() for x in (mask, target))
    last = (method.bits, dtype, method.block_size)
    loop = _loop(method.tf32, spqr_solver.sweep, wanted, ready.factor, (scale, zero, mask), *last)
    yield "loop", loop
    fast = kernel.find(wanted, dtype, method.bits, codes=True)
    value = torch.empty_like(wanted[_BLOCK])
    yield from _block(fast, wanted, ready.factor, scale, zero, mask[_BLOCK], value)
    if method.descent:
        solved = loop()
        grids = (scale, zero, mask)
        yield "descent", _loop(method.tf32, spqr_solver.descend, solved, wanted, ready.damped, grids, *last)


def _loop(tf32: bool, run: Callable[..., Any], *given: Any) -> Callable[[], Any]:
    """A loop with the products that its pass makes there."""

    def call() -> Any:
        with columns.products(tf32):
            return run(*given)

    return call


def _factor(damp_percent: float, layer: Layer, choice: Choice | None = None) -> Callable[[], object]:
    hessians = layer.hessians()
    return lambda: prepare(next(hessians), damp_percent, True, choice)


def _block(
    fast: Fast | None, w: Tensor, factor: Tensor, scale: Tensor | None, zero: Tensor | None,
    alive: Tensor | None = None, value: Tensor | None = None, kept: Tensor | None = None,
) -> Iterator[Stage]:  # fmt: skip
    """The loop's first columns by its kernel, where it has one."""
    if fast is None:
        return
    some, u = w[_BLOCK].clone(), factor[_BLOCK, _BLOCK]
    first = (None if x is None else x[_BLOCK] for x in (scale, zero))
    out = (torch.empty_like(some), torch.empty_like(some))
    yield "block", partial(fast, some, u, u.diagonal().reciprocal(), *first, alive, None, *out, value, kept=kept)


METHODS: dict[str, Method] = {
    "gptq": Method("GPTQ with plain scales, static act order", fast_gptq, gptq_stages),
    "gptq-search": Method(
        "GPTQ as it is by default: scale search, refit of the scales, one sweep of coordinate descent",
        default_gptq, gptq_stages,
    ),
    "sparsegpt": Method("SparseGPT 2:4 with refit of the kept weights", pruning, sparsegpt_stages),
    "spqr": Method("SpQR as it is by default: 3 bits, groups of 16, one sweep of descent", spqr, spqr_stages),
}  # fmt: skip


def whole(method: Pass, layer: Layer, dtype: torch.dtype) -> Callable[[], Solved]:
    """The pass's call, the factor made each time."""
    hessians = layer.hessians()
    return lambda: method(layer.weight, LayerStats(len(layer.x), next(hessians)), dtype)


@contextmanager
def in_python() -> Iterator[None]:
    """Within, solvers run as Python defines them: no kernels of ours on a GPU."""
    before = os.environ.get(_SWITCH)
    os.environ[_SWITCH] = "0"
    try:
        yield
    finally:
        os.environ.pop(_SWITCH)
        if before is not None:
            os.environ[_SWITCH] = before


def codes(packed: Packed) -> Tensor:
    """What a solver decided of each weight: its code, or whether it is kept."""
    if isinstance(packed, Outliers):
        return codes(packed.inner)
    if isinstance(packed, Sparse):
        return packed.mask
    assert isinstance(packed, (UniformGrid, BiLevel))
    return packed.codes
