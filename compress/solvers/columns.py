"""The two loops that go column by column: GPTQ's sweep, which may prune as it goes (SparseGPT), and coordinate descent.
Everything is [in, out], so that a column of the weight matrix is contiguous, and already in the order of the visit.

Columns go in blocks, blocks in super-blocks: what a block changes of later columns is one matrix product for those of
its super-block, and another for the rest when the super-block is over.

A column is a dozen tiny operations. On a GPU a block's are one kernel (kernels/columns.cu). On a CPU, and as the
definition, it is the same in Python; a GPU without that kernel captures the loop once a shape in a CUDA graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from compress.solvers import kernel
from compress.solvers.masks import Choice, Growing

#: columns of a super-block, about
SUPER = 512

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


@contextlib.contextmanager
def products(tf32: bool) -> Iterator[None]:
    """Inside, float32 matrix products on a GPU are made in TF32, or in full whatever was set."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    settings.allow_tf32 = tf32
    try:
        yield
    finally:
        settings.allow_tf32 = before


def lazily(
    edges: Sequence[tuple[int, int]],
    state: Tensor,
    moves: Tensor,
    decide: Callable[[int, int, Tensor], None],
    labels: Sequence[list[int]] = (),
) -> None:
    """Decide block after block and let later columns move.

    Args:
        edges: of the blocks, see `blocks`.
        state: float32 [in, out], what the columns are decided from; it is moved.
        moves: float32 [in, in]: column j moves by -moves[i, j] times what column i is off.
        decide: given a block's first and last column and a tensor [columns, out], decides the block and writes what its
            columns are off there.
        labels: as for `blocks`; no super-block ends within a group either.
    """
    last = len(state)
    ends = [stop for _, stop in edges]
    first = 0
    while first < len(edges):
        begin = edges[first][0]
        past = first
        while past < len(edges) - 1 and (
            ends[past] - begin < SUPER or any(x[ends[past] - 1] == x[ends[past]] for x in labels)
        ):
            past += 1
        end = ends[past]
        off = torch.empty_like(state[begin:end])
        for start, stop in edges[first : past + 1]:
            mine = off[start - begin : stop - begin]
            decide(start, stop, mine)
            if stop < end:
                state[stop:end].addmm_(moves[start:stop, stop:end].t(), mine, alpha=-1)
        if end < last:
            state[end:].addmm_(moves[begin:end, end:].t(), off, alpha=-1)
        first = past + 1


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
    inverse = factor.diagonal().reciprocal()
    mask = Growing(w, factor, choice, given)
    k = torch.empty_like(w)
    now = torch.empty_like(w[0])
    rounded = None if dtype == torch.float32 else torch.empty_like(now, dtype=dtype)
    fast = kernel.find(w, dtype, 0 if scale is None else bits, pruned=mask.runs)

    def decide(start: int, stop: int, error: Tensor) -> None:
        nonlocal now
        inner, u, mine = w[start:stop], factor[start:stop, start:stop], slice(start, stop)
        if fast is not None:
            alive = mask.begin(start, stop, fast.chooses)
            fast(inner, u, inverse[mine], part(scale, mine), part(zero, mine), alive, None, k[mine], error,
                 kept=part(mask.kept, mine))  # fmt: skip
            return
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
            error[i].mul_(inverse[j])
            if i + 1 < stop - start:
                inner[i + 1 :].addr_(u[i, i + 1 :], error[i], alpha=-1)

    size = block if fast is None else fast.block(block)
    lazily(list(blocks(len(w), size, *mask.labels)), w, factor, decide, mask.labels)
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
    inverse = hessian.diagonal().reciprocal()
    gradient = hessian @ (target - now)
    fresh, level = torch.empty_like(now[0]), torch.empty_like(now[0])
    rounded = None if dtype == torch.float32 else torch.empty_like(fresh, dtype=dtype)
    fast = kernel.find(k, dtype, bits, descend=True)

    def decide(start: int, stop: int, moved: Tensor) -> None:
        local, h, mine = gradient[start:stop], hessian[start:stop, start:stop], slice(start, stop)
        if fast is not None:
            fast(local, h, inverse[mine], scale[mine], part(zero, mine), part(given, mine), now[mine], k[mine], moved)
            return
        for i in range(stop - start):
            j = start + i
            torch.mul(local[i], inverse[j], out=level)
            level.add_(now[j])
            _quantise(level, scale[j], _row(low, j), _row(high, j), k[j])
            if given is not None:
                k[j].mul_(given[j])
            _value(k[j], scale[j], fresh, rounded)
            torch.sub(fresh, now[j], out=moved[i])
            if i + 1 < stop - start:
                local[i + 1 :].addr_(h[i, i + 1 :], moved[i], alpha=-1)

    size = block if fast is None else fast.block(block)
    lazily(list(blocks(len(k), size)), gradient, hessian, decide)
    return k


def part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


_Run = Callable[..., tuple[Tensor, ...]]


def _run(loop: Callable[..., Any], settings: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Call `loop(*settings, *tensors)`; captured on a GPU for which there is no kernel."""
    first = tensors[0]
    assert first is not None
    if first.device.type != "cuda" or kernel.usable(first):
        found = loop(*settings, *tensors)
        return found if isinstance(found, tuple) else (found,)
    present = tuple(t is not None for t in tensors)
    tf32 = torch.backends.cuda.matmul.allow_tf32  # a graph keeps the products that it was captured with
    run = _captured(loop, tuple(first.shape), present, settings, str(first.device), tf32)
    return run(*[t for t in tensors if t is not None])


@lru_cache(maxsize=16)
def _captured(
    loop: Callable[..., Any], shape: tuple[int, ...], present: tuple[bool, ...], settings: tuple[Any, ...], device: str,
    tf32: bool,
) -> _Run:  # fmt: skip
    """The loop for one shape as a CUDA graph."""

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        found = loop(*settings, *[next(rest) if there else None for there in present])
        return found if isinstance(found, tuple) else (found,)

    return _Graph(plain)


class _Graph:
    """A function of tensors of fixed shapes, captured at its first call and replayed from then on."""

    def __init__(self, function: _Run) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._graph is None:
            self._inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
            self._function(*self._inputs)  # kernels are compiled and cuBLAS is set up, which no graph can hold
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            # threads that read and write other blocks may call CUDA meanwhile
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._outputs = self._function(*self._inputs)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)
