"""The two loops that go column by column: GPTQ's sweep and coordinate descent. Everything is [in, out], so that a
column of the weight matrix is contiguous, and already in the order of the visit.

Each column is a dozen tiny operations, so on a GPU most of the time would be launches: there the loop is captured once
a shape in a CUDA graph and replayed. On a CPU, and as the definition, it is the same Python.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

#: levels of the symmetric grid need no zero tensor; the asymmetric one passes zero [in, out]
Bounds = tuple[Tensor | float, Tensor | float]


def bounds(zero: Tensor | None, bits: int) -> Bounds:
    """(low, high) of the levels: -zero and 2**bits - 1 - zero."""
    if zero is None:
        return -float(2 ** (bits - 1)), float(2 ** (bits - 1) - 1)
    return zero.neg(), (2**bits - 1) - zero


def sweep(
    w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None, bits: int, dtype: torch.dtype, block: int
) -> Tensor:
    """GPTQ's loop with fixed grids (Frantar et al. 2023, Algorithm 1).

    Args:
        w: float32 [in, out]; not modified.
        factor: float32 [in, in], U with H^-1 = U^T U.
        scale: float32 [in, out], the scale of each weight's group.
        zero: float32 [in, out], or None for the symmetric grid.
        dtype: dequantised weights are rounded to it.
        block: columns updated lazily together.

    Returns:
        float32 [in, out], the levels.
    """
    run = _captured(_sweep, tuple(w.shape), zero is not None, bits, dtype, block, str(w.device))
    return run(w, factor, scale, *([] if zero is None else [zero]))


def descend(
    k: Tensor,
    target: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    block: int,
) -> Tensor:
    """One sweep of coordinate descent over the levels: each in turn takes its best value, all others fixed.

    Args:
        k: float32 [in, out], the levels to start from; not modified.
        target: float32 [in, out], the weights.
        hessian: float32 [in, in].
        scale, zero, dtype, block: as for `sweep`.

    Returns:
        float32 [in, out], the levels; no row's loss under `hessian` is higher than before.
    """
    run = _captured(_descend, tuple(k.shape), zero is not None, bits, dtype, block, str(k.device))
    return run(k, target, hessian, scale, *([] if zero is None else [zero]))


def _quantise(x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float, level: Tensor) -> None:
    """level <- clamp(round(x / scale), low, high), without a new tensor."""
    torch.div(x, scale, out=level)
    level.round_().clamp_(low, high)  # type: ignore[arg-type]


def _value(level: Tensor, scale: Tensor, out: Tensor, rounded: Tensor | None) -> None:
    """out <- level * scale, rounded to the dtype of `rounded`."""
    torch.mul(level, scale, out=out)
    if rounded is not None:
        rounded.copy_(out)
        out.copy_(rounded)


def _row(x: Tensor | float, i: int) -> Tensor | float:
    return x[i] if isinstance(x, Tensor) else x


def _sweep(
    bits: int, dtype: torch.dtype, block: int, w: Tensor, factor: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    low, high = bounds(zero, bits)
    w = w.clone()
    k = torch.empty_like(w)
    now = torch.empty_like(w[0])
    rounded = None if dtype == torch.float32 else torch.empty_like(now, dtype=dtype)
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        inner, u = w[start:stop], factor[start:stop, start:stop]
        error = torch.empty_like(inner)
        for i in range(stop - start):
            j = start + i
            _quantise(inner[i], scale[j], _row(low, j), _row(high, j), k[j])
            _value(k[j], scale[j], now, rounded)
            torch.sub(inner[i], now, out=error[i])
            error[i].div_(u[i, i])
            if i + 1 < stop - start:
                inner[i + 1 :].addr_(u[i, i + 1 :], error[i], alpha=-1)
        if stop < len(w):
            w[stop:].addmm_(factor[start:stop, stop:].t(), error, alpha=-1)
    return k


def _descend(
    bits: int, dtype: torch.dtype, block: int,
    k: Tensor, target: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor | None = None,
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
            _value(k[j], scale[j], fresh, rounded)
            torch.sub(fresh, now[j], out=moved[i])
            now[j].copy_(fresh)
            if i + 1 < stop - start:
                local[i + 1 :].addr_(h[i, i + 1 :], moved[i], alpha=-1)
        gradient.addmm_(hessian[start:stop].t(), moved, alpha=-1)
    return k


@lru_cache(maxsize=16)
def _captured(
    loop: Callable[..., Tensor],
    shape: tuple[int, ...],
    asymmetric: bool,
    bits: int,
    dtype: torch.dtype,
    block: int,
    device: str,
) -> Callable[..., Tensor]:
    """The loop for one shape: itself on a CPU, a captured CUDA graph on a GPU."""

    def plain(*tensors: Tensor) -> Tensor:
        return loop(bits, dtype, block, *tensors)

    return _Graph(plain) if device.startswith("cuda") else plain


class _Graph:
    """A function of tensors of fixed shapes, captured at its first call and replayed from then on."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self._graph is None:
            self._inputs = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
            torch.eye(8, device=tensors[0].device) @ torch.eye(8, device=tensors[0].device)  # sets cuBLAS up
            torch.cuda.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._output = self._function(*self._inputs)
        for mine, given in zip(self._inputs, tensors, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._output.clone()
