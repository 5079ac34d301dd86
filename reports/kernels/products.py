"""A plugin of pytest for sanitize.py: on a GPU matrices are multiplied without cuBLAS and cuSPARSELt.

Under racecheck some of their kernels end in an illegal access and take the process with them, whether a kernel of ours
ran before or not; products are what tests compare with, and what our own operators end in for many tokens. These are
sums of torch's own in the place of aten's kernels: also inside operators, and in a graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

#: numbers that a step holds at most
_AT_ONCE = 1 << 26


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


def vector(a: Tensor, x: Tensor) -> Tensor:
    """a [m, k] times x [k]."""
    return product(a, x[:, None])[:, 0]


def inner(x: Tensor, y: Tensor) -> Tensor:
    """x [k] times y [k]."""
    return product(x[None], y[:, None])[0, 0]


def added(multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """beta c + alpha times the product."""

    def sum_of(c: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
        made = alpha * multiply(a, b)
        return made + beta * c if beta else made

    return sum_of


#: for aten's names
OURS: dict[str, Callable[..., Tensor]] = {
    "mm": product, "bmm": batched, "dot": inner, "_int_mm": product,
    "addmm": added(product), "baddbmm": added(batched), "addmv": added(vector),
}  # fmt: skip


def install(key: str = "CUDA") -> torch.library.Library:
    """Put them in the place of aten's kernels for a dispatch key, as long as what is returned lives."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[\\s\\S]*verriding a previously registered kernel")
        for name, made in OURS.items():
            overloads = [f"{name}.{o}".removesuffix(".default") for o in getattr(torch.ops.aten, name).overloads()]
            for each in [*overloads, *([f"{name}_"] if hasattr(torch.ops.aten, f"{name}_") else [])]:
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{each}", key):
                    _put(library, each, made, key)
    return library


def _put(library: torch.library.Library, name: str, made: Callable[..., Tensor], key: str) -> None:
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        out = args[0] if name.endswith("_") else kwargs.pop("out", None)
        dtype = torch.int32 if name.startswith("_int_mm") else args[0].dtype
        dtype = kwargs.pop("out_dtype", next((x for x in args if isinstance(x, torch.dtype)), dtype))
        found = made(*(x for x in args if not isinstance(x, torch.dtype)), **kwargs)
        if out is None:
            return found.to(dtype)
        return out.resize_(found.shape).copy_(found)

    library.impl(name, kernel, key)


def pytest_configure(config: pytest.Config) -> None:
    torch.backends.cusparselt.is_available = lambda: False
    config.stash[pytest.StashKey[torch.library.Library]()] = install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Any:
    """Attention by its definition: that of the libraries multiplies matrices."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return (yield)
