"""Sums in the same order each time: torch's wish for deterministic algorithms, and attention that heeds it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def ordered(device: torch.device) -> AbstractContextManager[None]:
    """For a way through a block and back. A CPU has one order."""
    return repeatable() if device.type == "cuda" else nullcontext()


@contextmanager
def repeatable(warn_only: bool = True, fill: bool = False) -> Iterator[None]:
    """Within, sums are made in the same order each time where torch has a choice; as it was, afterwards.

    Args:
        warn_only: operations that have no other way take the one they have, silently; they would raise RuntimeError.
        fill: new memory is filled: with NaN, integers with their largest number.
    """
    choices: Any = torch.utils.deterministic
    filled = choices.fill_uninitialized_memory
    asked, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            choices.fill_uninitialized_memory = fill
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            yield
        finally:
            torch.use_deterministic_algorithms(asked, warn_only=warned)
            choices.fill_uninitialized_memory = filled


class OwnAttention(TorchFunctionMode):
    """Attention whose backward pass is the same each time."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and len(args) >= 3:
            names = ("attn_mask", "dropout_p", "is_causal")  # that may be given by their places
            given = {**dict(zip(names, args[3:], strict=False)), **(kwargs or {})}
            return Attention.apply(*args[:3], given)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class Attention(torch.autograd.Function):
    """`scaled_dot_product_attention`. Its fast kernels sum up slopes in the order in which blocks happen to end, unless
    torch is asked for deterministic algorithms and nothing less (`warn_only` leaves them as they are), which matrix
    products around it would refuse. So the backward pass computes it anew, alone, under that wish."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.given = given
        return F.scaled_dot_product_attention(query, key, value, **given)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        def slopes(warn_only: bool) -> tuple[Tensor, ...]:
            inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            with torch.enable_grad(), repeatable(warn_only):
                return torch.autograd.grad(F.scaled_dot_product_attention(*inputs, **ctx.given), inputs, slope)

        try:
            return *slopes(False), None
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            return *slopes(True), None  # made of matrix products, which are the same each time as they are
