"""A plugin of pytest for sanitize.py: on a GPU matrices are multiplied without cuBLAS and cuSPARSELt.

Under racecheck some of their kernels end in an illegal access and take the process with them, whether a kernel of ours
ran before or not; products are what tests compare with. These are sums of torch's own, and can be captured like others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: numbers that a step holds at most
_AT_ONCE = 1 << 27
A = torch.ops.aten


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [m, k] times b [k, n]: float32, of integers and float64 float64."""
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) or not a.is_floating_point() else torch.float32
    a, b = a.to(wide), b.to(wide)
    step = max(1, _AT_ONCE // max(1, b.numel()))
    parts = [(x[:, :, None] * b).sum(1) for x in a.split(step)]
    return torch.cat(parts) if parts else a.new_empty(0, b.shape[1])


def batched(a: Tensor, b: Tensor) -> Tensor:
    """a [batch, m, k] times b [batch, k, n]."""
    return torch.stack([product(x, y) for x, y in zip(a, b, strict=True)])


def added(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a b."""
    return (alpha * product(a, b) + beta * c) if beta else alpha * product(a, b)


def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k] times weight [n, k], turned."""
    out = product(x.flatten(0, -2), weight.t()).unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


OURS: dict[Any, Callable[..., Tensor]] = {
    A.mm: product, A._int_mm: product, A.bmm: batched, A.addmm: added, A.linear: dense,
    A.mv: lambda a, x: product(a, x[:, None])[:, 0], A.dot: lambda x, y: product(x[None], y[:, None])[0, 0],
    A.baddbmm: lambda c, a, b, beta=1, alpha=1: alpha * batched(a, b) + (beta * c if beta else 0),
}  # fmt: skip


class WithoutLibraries(TorchDispatchMode):
    """Products of tensors on a device as `OURS` makes them, in the dtype that was asked for."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        made = OURS.get(func.overloadpacket)
        given = [x for x in args if isinstance(x, Tensor)]
        if made is None or given[0].device.type != self._device:
            return func(*args, **kwargs)
        out = kwargs.pop("out", None)
        dtype = torch.int32 if func.overloadpacket is A._int_mm else given[0].dtype
        rest = []
        for x in args:
            if isinstance(x, torch.dtype):
                dtype = x
            else:
                rest.append(x)
        dtype = kwargs.pop("out_dtype", dtype)
        found = made(*rest, **kwargs)
        return found.to(dtype) if out is None else out.copy_(found)


def pytest_configure() -> None:
    torch.backends.cusparselt.is_available = lambda: False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Attention, too, by its definition: that of the libraries multiplies matrices."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), WithoutLibraries():
        return (yield)
