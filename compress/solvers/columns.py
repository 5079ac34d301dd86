"""The two loops that go column by column: GPTQ's sweep, which may prune as it goes (SparseGPT), and coordinate descent.
Everything is [in, out], so that a column of the weight matrix is contiguous, and already in the order of the visit.

Each column is a dozen tiny operations, so on a GPU most of the time would be launches: there the loop is captured once
a shape in a CUDA graph and replayed. On a CPU, and as the definition, it is the same Python.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.solvers.masks import Choice, Growing

#: levels of the symmetric grid need no zero tensor; the asymmetric one passes zero [in, out]
Bounds = tuple[Tensor | float, Tensor | float]


def bounds(zero: Tensor | None, bits: int) -> Bounds:
    """(low, high) of the levels: -zero and 2**bits - 1 - zero."""
    if zero is None:
        return -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
    return zero.neg(), (2**bits - 1) - zero


def blocks(count: int, block_size: int, *labels: list[int]) -> Iterator[tuple[int, int]]:
    """Column blocks of about `block_size` that never begin a group in their middle unless they hold it whole.

    What is decided at a group's first column (its scales, its mask) is decided from weights that must carry every
    update by then; with blocks cut like this they do, so the block size changes no result.

    Args:
        labels: one or more ways to group the columns: the group of each column, groups being contiguous.
    """
    start = 0
    while start < count:
        stop = min(start + block_size, count)
        moved = True
        while moved and stop < count:
            moved = False
            for group_of in labels:
                first = group_of.index(group_of[stop - 1]) if group_of[stop - 1] == group_of[stop] else 0
                if first > start:
                    stop, moved = first, True
        yield start, stop
        start = stop


def sweep(
    w: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    block: int,
    given: Tensor | None = None,
) -> Tensor:
    """GPTQ's loop with fixed grids (Frantar et al. 2023, Algorithm 1).

    Args:
        w: float32 [in, out]; not modified.
        factor: float32 [in, in], U with H^-1 = U^T U.
        scale: float32 [in, out], the scale of each weight's group.
        zero: float32 [in, out], or None for the symmetric grid.
        dtype: dequantised weights are rounded to it.
        block: columns updated lazily together.
        given: bool [in, out], False where the level must be 0; the error of that is compensated like any other.

    Returns:
        float32 [in, out], the levels.
    """
    return _run(_sweep, (bits, dtype, block), w, factor, scale, zero, given)[0]


def prune(
    w: Tensor,
    factor: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    block: int,
    choice: Choice,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SparseGPT's loop (Frantar & Alistarh 2023, Algorithm 1): `sweep`, with the mask chosen on the way.

    Args:
        scale: None leaves kept weights as they are (rounded to `dtype`).
        choice: which columns are chosen together, and how many weights go.
        others: as for `sweep`.

    Returns:
        float32 [in, out], the levels, or without scales the weights, 0 where pruned; bool [in, out], what is kept.
    """
    k, kept = _run(_prune, (bits, dtype, block, choice), w, factor, scale, zero, given)
    return k, kept


def descend(
    k: Tensor,
    target: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    block: int,
    given: Tensor | None = None,
) -> Tensor:
    """One sweep of coordinate descent over the levels: each in turn takes its best value, all others fixed.

    Args:
        k: float32 [in, out], the levels to start from; not modified.
        target: float32 [in, out], the weights.
        hessian: float32 [in, in].
        scale, zero, dtype, block: as for `sweep`.
        given: bool [in, out], False where the level is 0 and stays so.

    Returns:
        float32 [in, out], the levels; no row's loss under `hessian` is higher than before.
    """
    return _run(_descend, (bits, dtype, block), k, target, hessian, scale, zero, given)[0]


def _quantise(x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, level: Tensor) -> None:
    """level <- clamp(round(x / scale), low, high), without a new tensor."""
    torch.div(x, scale, out=level)
    level.round_().clamp_(low, high)  # type: ignore[arg-type]


def _value(level: Tensor, scale: Tensor, out: Tensor, rounded: Tensor | None) -> None:
    """out <- level * scale, rounded to the dtype of `rounded`."""
    torch.mul(level, scale, out=out)
    _round(out, out, rounded)


def _round(x: Tensor, out: Tensor, rounded: Tensor | None) -> None:
    """out <- x, rounded to the dtype of `rounded`."""
    if rounded is not None:
        rounded.copy_(x)
        x = rounded
    if x is not out:
        out.copy_(x)


def _row(x: Tensor | float, i: int) -> Tensor | float:
    return x[i] if isinstance(x, Tensor) else x


def _sweep(
    bits: int, dtype: torch.dtype, block: int,
    w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None = None, given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _prune(bits, dtype, block, None, w, factor, scale, zero, given)[0]


def _prune(
    bits: int, dtype: torch.dtype, block: int, choice: Choice | None,
    w: Tensor, factor: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, given: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    low, high = bounds(zero, bits)
    w = w.clone()
    mask = Growing(w, factor, choice, given)
    k = torch.empty_like(w)
    now = torch.empty_like(w[0])
    rounded = None if dtype == torch.float32 else torch.empty_like(now, dtype=dtype)
    for start, stop in blocks(len(w), block, *mask.labels):
        inner, u = w[start:stop], factor[start:stop, start:stop]
        error = torch.empty_like(inner)
        for i in range(stop - start):
            j = start + i
            mask.reach(j)
            if scale is not None:
                _quantise(inner[i], scale[j], _row(low, j), _row(high, j), k[j])
                mask.clear(k[j], j)
                _value(k[j], scale[j], now, rounded)
            else:
                _round(inner[i], k[j], rounded)
                mask.clear(k[j], j)
                now = k[j]
            torch.sub(inner[i], now, out=error[i])
            error[i].div_(u[i, i])
            if i + 1 < stop - start:
                inner[i + 1 :].addr_(u[i, i + 1 :], error[i], alpha=-1)
        if stop < len(w):
            w[stop:].addmm_(factor[start:stop, stop:].t(), error, alpha=-1)
    return (k,) if mask.kept is None else (k, mask.kept)


def _descend(
    bits: int, dtype: torch.dtype, block: int,
    k: Tensor, target: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor | None = None, given: Tensor | None = None,
) -> Tensor:  # fmt: skip
    low, high = bounds(zero, bits)
    k = k.clone()
    now = k * scale
    if dtype != torch.float32:
        now = now.to(dtype).float()
    gradient = hessian @ (target - now)
    fresh, level = torch.empty_like(now[0]), torch.empty_like(now[0])
    rounded = None if dtype == torch.float32 else torch.empty_like(fresh, dtype=dtype)
    for start in range(0, len(k), block):
        stop = min(start + block, len(k))
        local, h = gradient[start:stop].clone(), hessian[start:stop, start:stop]
        moved = torch.empty_like(local)
        for i in range(stop - start):
            j = start + i
            torch.div(local[i], h[i, i], out=level)
            level.add_(now[j])
            _quantise(level, scale[j], _row(low, j), _row(high, j), k[j])
            if given is not None:
                k[j].mul_(given[j])
            _value(k[j], scale[j], fresh, rounded)
            torch.sub(fresh, now[j], out=moved[i])
            now[j].copy_(fresh)
            if i + 1 < stop - start:
                local[i + 1 :].addr_(h[i, i + 1 :], moved[i], alpha=-1)
        gradient.addmm_(hessian[start:stop].t(), moved, alpha=-1)
    return k


_Run = Callable[..., tuple[Tensor, ...]]


def _run(loop: Callable[..., Any], settings: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Call `loop(*settings, *tensors)`, captured on a GPU."""
    first = tensors[0]
    assert first is not None
    present = tuple(t is not None for t in tensors)
    run = _captured(loop, tuple(first.shape), present, settings, str(first.device))
    return run(*[t for t in tensors if t is not None])


@lru_cache(maxsize=16)
def _captured(
    loop: Callable[..., Any], shape: tuple[int, ...], present: tuple[bool, ...], settings: tuple[Any, ...], device: str
) -> _Run:
    """The loop for one shape: itself on a CPU, a captured CUDA graph on a GPU."""

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        found = loop(*settings, *[next(rest) if there else None for there in present])
        return found if isinstance(found, tuple) else (found,)

    return _Graph(plain) if device.startswith("cuda") else plain


class _Graph:
    """A function of tensors of fixed shapes, captured at its first call and replayed from then on."""

    def __init__(self, function: _Run) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._graph is None:
            self._inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
            torch.eye(8, device=tensors[0].device) @ torch.eye(8, device=tensors[0].device)  # sets cuBLAS up
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._outputs = self._function(*self._inputs)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
