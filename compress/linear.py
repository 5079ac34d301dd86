"""The forward of layers whose input is quantised as it comes: what packed weights compute, not dense ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.types import Packed


def install(module: nn.Module, packed: Packed) -> None:
    """Let a linear module (nn.Linear, Conv1D) compute with its packed weight. Undone by `remove`."""

    def forward(x: Tensor) -> Tensor:
        out = packed.linear(x)
        bias = module.bias
        return out if bias is None else out + bias.to(out.dtype)  # type: ignore[operator]

    module.forward = forward


def remove(module: nn.Module) -> None:
    """Give a module its own forward back."""
    module.__dict__.pop("forward", None)


class Experts(TorchFunctionMode):
    """While it is active, F.linear on a slice of a fused experts tensor computes with the packed weights of that slice.

    Args:
        packed: for each fused parameter [experts, out, in] its packed slices, by expert, each with its first row.
    """

    def __init__(self, packed: Sequence[tuple[Tensor, Mapping[int, list[tuple[int, Packed]]]]]) -> None:
        super().__init__()
        self._ranges = [
            (data.data_ptr(), data[0].numel() * data.element_size(), len(data), slices) for data, slices in packed
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            for start, step, count, slices in self._ranges:
                index, inside = divmod(weight.data_ptr() - start, step)
                if inside == 0 and 0 <= index < count and index in slices:
                    return self._compute(args, kwargs or {}, slices[index])
        return func(*args, **(kwargs or {}))

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], slices: list[tuple[int, Packed]]) -> Tensor:
        """Rows of a slice that no packed weight covers (a projection left dense) come from the dense weight."""
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        out = F.linear(x, weight)
        for first, packed in slices:
            out[..., first : first + packed.shape[0]] = packed.linear(x)
        return out if bias is None else out + bias
