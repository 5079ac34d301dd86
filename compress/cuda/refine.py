"""A step of refining a uniform grid by kernels/refine.cu: what `compress.refiners.tuned` does, in the time of reading
and writing each number once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.cuda.support import probe, why_not_once
from compress.grid import LOWEST_ZERO

_RUN = 8  # neighbouring weights of a lane
_TEAMS = (2, 4, 8, 16, 32)  # lanes of a group
_THREADS = 128
_TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "Single"}


@dataclass(frozen=True)
class State:
    """What a step changes, float32, on one device, but for `first`.

    Attributes:
        place, squares: [out, groups, size], where weights stand and the sums of their squared gradients.
        first: [out, groups], the scales that were solved for.
        factor: [out, groups], what has become of them.
        zero: [out, groups], unrounded.
    """

    place: Tensor
    squares: Tensor
    first: Tensor
    factor: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Rules:
    """The numbers of `compress.refiners.tuned` that the kernel is compiled with.

    Attributes:
        bits: of a code.
        zeros: zero points move, too.
        cell, least, most, far: constants there.
    """

    bits: int
    zeros: bool
    cell: float
    least: float
    most: float
    far: float


def takes(gradient: Tensor, into: Tensor, size: int, scales: torch.dtype) -> bool:
    """Whether the kernel can do steps for groups of a size; what the device lacks is said once in the log."""
    if gradient.device.type != "cuda" or not gradient.numel() or size % _RUN:
        return False
    if gradient.dtype != into.dtype or gradient.dtype not in _TYPES or scales not in _TYPES:
        return False
    found = probe(gradient.device.index)
    why_not_once(found)
    return found.usable


def step(
    gradient: Tensor, pace: Tensor, into: Tensor, state: State, alive: Tensor | None, rules: Rules, scales: torch.dtype
) -> None:
    """Change the state, and fill `into` with the weights as they then are.

    Args:
        gradient: [out, in].
        pace: float32 [3], a row of `tuned.paces`.
        into: [out, in], contiguous, of the gradient's dtype.
        alive: bool [out, in], weights that are not pruned; None: all.
        scales: dtype in which they are stored.
    """
    size = state.place.shape[-1]
    groups = state.first.numel()
    assert into.is_contiguous()
    assert state.place.is_contiguous()
    kernel, team = _kernel(gradient.dtype, scales, size, alive is not None, rules)
    launch(
        function(kernel, gradient.device.index),
        (-(-groups * team // _THREADS),),
        (_THREADS,),
        (
            gradient.contiguous(), state.place, state.squares, state.first, state.factor, state.zero,
            None if alive is None else alive.contiguous(), into, pace, groups, size,
        ),
        0,
        gradient,
    )  # fmt: skip


def _kernel(dtype: torch.dtype, scales: torch.dtype, size: int, alive: bool, rules: Rules) -> tuple[Kernel, int]:
    """The variant, and how many lanes share a group."""
    team = next((t for t in _TEAMS if size <= t * _RUN), _TEAMS[-1])
    numbers = {"CELL": rules.cell, "LEAST": rules.least, "MOST": rules.most, "FAR": rules.far}
    macros: tuple[tuple[str, int | str], ...] = (
        ("T", _TYPES[dtype]), ("S", _TYPES[scales]), ("BITS", rules.bits), ("ZERO", int(rules.zeros)),
        ("ALIVE", int(alive)), ("TEAM", team), ("LONG", int(size > team * _RUN)), ("LOWEST_ZERO", LOWEST_ZERO),
        *((name, f"{value}f") for name, value in numbers.items()),
    )  # fmt: skip
    return Kernel("refine", "refine.cu", macros), team
