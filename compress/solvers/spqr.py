"""The parts of SpQR that are pure functions: leave-one-out scores, the fit of two-level grids, the column loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import grid
from compress.packed.bilevel import PLAIN, Statistic
from compress.solvers import columns, kernel

#: second-level steps are no finer than this share of the largest value, so that 16 bits can hold the offset of the
#: smallest; and no scale is below this share of a second-level step, so that none is 0
_FINEST = 2.0**-10
#: second-level steps of runs without a number of their own (all zeros): far from where float32 ends
_SMALLEST = 1e-20
#: for every weight, [in, out]: float32 scale and zero point of its group, and (bool) whether it is an outlier
Grids = tuple[Tensor, Tensor, Tensor]
#: float32 [in, out], twice: codes and weights
Solution = tuple[Tensor, Tensor]
#: codes tried on either side of the nearest one
_SCALE_STEPS, _ZERO_STEPS = 2, 1
#: a search step works on about a megabyte, which stays in a CPU's cache
_CHUNK_ELEMENTS = 1 << 18


def grouped(x: Tensor, size: int) -> Tensor:
    """[rows, columns] -> [rows, groups, size], a ragged end padded with zeros."""
    padded = F.pad(x, (0, -x.shape[1] % size))
    return padded.reshape(len(x), -1, size)


def leave_one_out(weight: Tensor, importance: Tensor, bits: int, size: int) -> Tensor:
    """How much the error of a weight's group falls when the weight is left out of it (paper, section 4.2).

    The error of a group is the sum of importance * (w - q)^2, with a grid over the span of its weights. Without one
    weight the grid spans the others, and the weight's own error is gone. Only the smallest and the largest change the
    span: two refits a group give the scores of all.

    Args:
        weight: float32 [out, in].
        importance: float32 [in], one over the square of U's diagonal.

    Returns:
        float32 [out, in]; can be negative.
    """
    w, cost = grouped(weight, size), grouped(importance[None], size)
    own = _span_error(w, cost, w, bits)
    scores, total = own.clone(), own.sum(-1, keepdim=True)
    for at in (w.argmin(-1, keepdim=True), w.argmax(-1, keepdim=True)):
        rest = w.scatter(-1, at, 0.0)  # every span holds 0
        error = _span_error(w, cost, rest, bits).scatter_(-1, at, 0.0)
        scores.scatter_(-1, at, total - error.sum(-1, keepdim=True))
    natural: Tensor = scores.flatten(1)[:, : weight.shape[1]]
    return natural


def _span_error(w: Tensor, cost: Tensor, of: Tensor, bits: int) -> Tensor:
    """cost * (w - q)^2 on the grid of 2**bits levels over the span of `of`, 0 within it: all [..., size]."""
    low, high = span(of)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp_(min=1e-30)[..., None]
    level = ((w - low[..., None]) / scale).round_().clamp_(0, top)
    error: Tensor = level.mul_(scale).add_(low[..., None]).sub_(w).square_().mul_(cost)
    return error


def span(w: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest weight of each group, 0 among them: [..., size] -> [...], twice."""
    return w.amin(-1).clamp_(max=0.0), w.amax(-1).clamp_(min=0.0)


def second_level(
    raw: Tensor, ignore: Tensor, bits: int, run: int, dtype: torch.dtype, positive: bool = True
) -> Statistic:
    """Quantise one number a row and group over runs of rows.

    Args:
        raw: float32 [out, groups], none negative.
        ignore: bool [out, groups], numbers that need not be met and shall not widen their run's grid.
        positive: no value of the result is 0 or less.
    """
    if bits == PLAIN:
        return Statistic(grid.round_scale(raw, dtype).to(dtype) if positive else raw.to(dtype), run)
    out, top = len(raw), 2**bits - 1
    runs = -(-out // run)
    pad = (0, 0, 0, runs * run - out)
    values = F.pad(raw, pad).reshape(runs, run, -1)
    unused = F.pad(ignore, pad, value=True).reshape(runs, run, -1)
    high = values.masked_fill(unused, 0.0).amax(1)
    low = torch.minimum(values.masked_fill(unused, float("inf")).amin(1), high)
    step = torch.maximum((high - low) / top, high * _FINEST).clamp_(min=_SMALLEST)
    step = grid.round_scale(step, dtype)
    offset = (-low / step).clamp_(max=-_FINEST if positive else 0.0).to(dtype)
    codes = (values / step[:, None] + offset.float()[:, None]).round_().clamp_(0, top)
    return Statistic(step.to(dtype), run, bits, codes.flatten(0, 1)[:out].to(torch.uint8), offset)


def fit(
    weight: Tensor, outlier: Tensor, importance: Tensor, bits: int, size: int,
    scale_bits: int, zero_bits: int, run: int, dtype: torch.dtype, search: bool,
) -> tuple[Statistic, Statistic]:  # fmt: skip
    """Scales and zero points of every group, fitted to the weights that are not outliers.

    First the span of each group, rounded to the second-level grids; then, with `search`, of the pairs of codes around
    those the one with the least error, importance * (w - q)^2.

    Args:
        weight: float32 [out, in].
        outlier: bool [out, in].
        importance: float32 [in].

    Returns:
        The scales, all positive, and the zero points, none below 0.
    """
    top = 2**bits - 1
    part = grouped(weight.masked_fill(outlier, 0.0), size)
    low, high = span(part)
    flat = high == low  # nothing but zeros and outliers
    scale = second_level((high - low) / top, flat, scale_bits, run, dtype)
    middle = ((top - (low + high) / scale.values()) / 2).clamp_(0, top)  # of the grid onto that of the span
    zero = second_level(middle.masked_fill_(flat, 0.0), flat, zero_bits, run, dtype, positive=False)
    if search:
        cost = importance.expand_as(weight).masked_fill(outlier, 0.0)
        chunk = len(weight)
        if weight.device.type == "cpu":
            chunk = max(1, _CHUNK_ELEMENTS // weight.shape[1] // run) * run
        for start in range(0, len(weight), chunk):
            rows = slice(start, start + chunk)
            stop = min(start + chunk, len(weight))
            found = _search(part[rows], grouped(cost[rows], size), scale.rows(start, stop), zero.rows(start, stop), top)
            for statistic, codes in zip((scale, zero), found, strict=True):
                if statistic.codes is not None and codes is not None:
                    statistic.codes[rows] = codes
    return scale, zero


def _search(
    w: Tensor, cost: Tensor, scale: Statistic, zero: Statistic, top: int
) -> tuple[Tensor | None, Tensor | None]:
    """The codes of scale and zero point with the least error around the present ones: uint8 [rows, groups] each."""
    scales, zeros = _neighbours(scale, _SCALE_STEPS), _neighbours(zero, _ZERO_STEPS)
    best = torch.full_like(w[..., 0], float("inf"))
    codes = (scale.codes, zero.codes)
    for scale_codes in scales:
        s = scale.values(scale_codes)[..., None]
        ratio = w / s
        for zero_codes in zeros:
            z = zero.values(zero_codes)[..., None]
            level = (ratio + z).round_().clamp_(0, top)
            error = level.sub_(z).mul_(s).sub_(w).square_().mul_(cost).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            codes = tuple(
                None if old is None or new is None else torch.where(better, new, old)
                for old, new in zip(codes, (scale_codes, zero_codes), strict=True)
            )  # type: ignore[assignment]
    return codes


def _neighbours(statistic: Statistic, steps: int) -> list[Tensor | None]:
    """The present codes, then those around them."""
    if statistic.codes is None:
        return [None]
    top = 2**statistic.bits - 1
    moves = sorted(range(-steps, steps + 1), key=abs)
    return [(statistic.codes.to(torch.int16) + move).clamp_(0, top).to(torch.uint8) for move in moves]


def sweep(w: Tensor, factor: Tensor, grids: Grids, bits: int, dtype: torch.dtype, block: int) -> Solution:
    """GPTQ's loop over fixed two-level grids. An outlier keeps what it is by its turn, but for rounding to `dtype`.

    Args:
        w: float32 [in, out] in the order of the visit, as is everything else; not modified.
        factor: float32 [in, in], U with H^-1 = U^T U.
        block: columns updated lazily together.

    Returns:
        float32 [in, out], twice: the codes, and the weights that they and the outliers stand for.
    """
    k, value = columns._run(_sweep, (bits, dtype, block), w, factor, *grids)
    return k, value


def descend(
    solved: Solution, target: Tensor, hessian: Tensor, grids: Grids, bits: int, dtype: torch.dtype, block: int
) -> Solution:
    """One sweep of coordinate descent: each weight takes its best value, all others fixed; an outlier any number.

    Args:
        solved: as `sweep` returns it; not modified.
        target: float32 [in, out], the weights.
        hessian: float32 [in, in].

    Returns:
        As `sweep`; no row's loss under `hessian` is higher than before.
    """
    k, value = columns._run(_descend, (bits, dtype, block), *solved, target, hessian, *grids)
    return k, value


def nearest(target: Tensor, grids: Grids, bits: int, dtype: torch.dtype) -> Solution:
    """Round to nearest, as `sweep` returns it; outliers keep their weights."""
    k, value, scratch = torch.empty(3, *target.shape, device=target.device)
    _round(target, *grids, 2**bits - 1, k, scratch, value, dtype)
    return k, value


def _round(
    wish: Tensor, scale: Tensor, zero: Tensor, outlier: Tensor, top: int,
    code: Tensor, scratch: Tensor, value: Tensor, dtype: torch.dtype,
) -> None:  # fmt: skip
    """code, value <- the nearest to what is wished for, without a new float32 tensor."""
    torch.div(wish, scale, out=code)
    code.add_(zero).round_().clamp_(0, top)
    torch.sub(code, zero, out=scratch)
    scratch.mul_(scale)
    torch.where(outlier, wish, scratch, out=value)
    if dtype != torch.float32:
        value.copy_(value.to(dtype))


def _sweep(
    bits: int, dtype: torch.dtype, block: int,
    w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, outlier: Tensor,
) -> Solution:  # fmt: skip
    w = w.clone()
    inverse = factor.diagonal().reciprocal()
    k, value = torch.empty(2, *w.shape, device=w.device)
    scratch = torch.empty_like(w[0])
    fast = kernel.find(w, dtype, bits, codes=True)

    def decide(start: int, stop: int, error: Tensor) -> None:
        inner, u, mine = w[start:stop], factor[start:stop, start:stop], slice(start, stop)
        if fast is not None:
            fast(inner, u, inverse[mine], scale[mine], zero[mine], outlier[mine], None, k[mine], error, value[mine])
            return
        for i in range(stop - start):
            j = start + i
            _round(inner[i], scale[j], zero[j], outlier[j], 2**bits - 1, k[j], scratch, value[j], dtype)
            torch.sub(inner[i], value[j], out=error[i])
            error[i].mul_(inverse[j])
            if i + 1 < stop - start:
                inner[i + 1 :].addr_(u[i, i + 1 :], error[i], alpha=-1)

    size = block if fast is None else fast.block(block)
    columns.lazily(list(columns.blocks(len(w), size)), w, factor, decide)
    return k, value


def _descend(
    bits: int, dtype: torch.dtype, block: int,
    k: Tensor, value: Tensor, target: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor, outlier: Tensor,
) -> Solution:  # fmt: skip
    k, value = k.clone(), value.clone()
    inverse = hessian.diagonal().reciprocal()
    gradient = hessian @ (target - value)
    wish, scratch, fresh = torch.empty(3, target.shape[1], device=target.device)
    fast = kernel.find(k, dtype, bits, codes=True, descend=True)

    def decide(start: int, stop: int, moved: Tensor) -> None:
        local, h, mine = gradient[start:stop], hessian[start:stop, start:stop], slice(start, stop)
        if fast is not None:
            fast(local, h, inverse[mine], scale[mine], zero[mine], outlier[mine], value[mine], k[mine], moved,
                 value[mine])  # fmt: skip
            return
        for i in range(stop - start):
            j = start + i
            torch.mul(local[i], inverse[j], out=wish)
            wish.add_(value[j])
            _round(wish, scale[j], zero[j], outlier[j], 2**bits - 1, k[j], scratch, fresh, dtype)
            torch.sub(fresh, value[j], out=moved[i])
            value[j].copy_(fresh)
            if i + 1 < stop - start:
                local[i + 1 :].addr_(h[i, i + 1 :], moved[i], alpha=-1)

    size = block if fast is None else fast.block(block)
    columns.lazily(list(columns.blocks(len(k), size)), gradient, hessian, decide)
    return k, value
