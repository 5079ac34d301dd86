"""The search of a grid's scales by kernels/search.cu: what `compress.grid.fit` finds, in the time of some reads of the
weights."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from compress import grid
from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.cuda.support import probe, why_not_once

#: columns of a group that one warp goes through in less time than torch needs to share them out
MOST = 1 << 16
_HELD = 16  # weights that a lane keeps in registers
_TEAMS = (4, 8, 16, 32)  # lanes of a group
_THREADS = 128
_TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "Single"}


def takes(weight: Tensor, size: int, dtype: torch.dtype, importance: Tensor | None) -> bool:
    """Whether the kernel can do this search on weight's device; what the device lacks is said once in the log."""
    if weight.device.type != "cuda" or not weight.numel() or min(size, weight.shape[1]) > MOST:
        return False
    if dtype not in _TYPES or weight.dtype != torch.float32:
        return False
    if importance is not None and (importance.dtype, importance.device) != (weight.dtype, weight.device):
        return False
    found = probe(weight.device.index)
    why_not_once(found)
    return found.usable


def fit(
    weight: Tensor, bits: int, size: int, symmetric: bool, dtype: torch.dtype, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scales and zero points, each float32 [out, groups], as `grid.fit` has them; another of its candidates where the
    two have the same error but for rounding.

    Args:
        weight: float32 [out, in]. Less than 1e-38 counts as 0.
        size: columns of a group; the last may have less.
        dtype: in which scales are stored.
        importance: float32 [in], 0 or more.
    """
    weight = weight.contiguous()
    rows, columns = weight.shape
    size = min(size, columns)
    groups = -(-columns // size)
    assert importance is None or importance.shape == (columns,)
    scale, zero = (torch.empty(rows, groups, dtype=torch.float32, device=weight.device) for _ in range(2))
    kernel, team = _kernel(bits, size, symmetric, dtype, importance is not None)
    candidates, coarse, fine = _candidates(bits, symmetric, weight.device)
    launch(
        function(kernel, weight.device.index),
        (-(-rows * groups * team // _THREADS),),
        (_THREADS,),
        (
            weight, None if importance is None else importance.contiguous(), candidates, scale, zero,
            rows, columns, size, coarse, fine, grid.least_scale(dtype), torch.finfo(dtype).max,
        ),
        0,
        weight,
    )  # fmt: skip
    return scale, zero


def _kernel(bits: int, size: int, symmetric: bool, dtype: torch.dtype, weighted: bool) -> tuple[Kernel, int]:
    """The variant for groups of a size, and how many lanes share one."""
    team = next((t for t in _TEAMS if size <= t * _HELD), _TEAMS[-1])
    each = -(-size // team)
    macros = (
        ("T", _TYPES[dtype]), ("BITS", bits), ("SYMMETRIC", int(symmetric)), ("WEIGHTED", int(weighted)),
        ("TEAM", team), ("HELD", min(each, _HELD)), ("LONG", int(each > _HELD)), ("LOWEST_ZERO", grid.LOWEST_ZERO),
    )  # fmt: skip
    return Kernel("search", "search.cu", macros), team


@functools.cache
def _candidates(bits: int, symmetric: bool, device: torch.device) -> tuple[Tensor, int, int]:
    """In the order in which `grid.fit` tries them, float32 [n, 2]: factors (steps, of the fine ones) and what is added
    to the zero point, after the plain grid. And how many are coarse and fine."""
    if symmetric:
        coarse, fine = [(sign * f, 0.0) for f in grid.COARSE for sign in (1, -1)], [(f, 0.0) for f in grid.FINE]
    else:
        coarse, fine = ([(f, s) for f in ladder for s in grid.shifts(bits)] for ladder in (grid.COARSE, grid.FINE))
    table = torch.tensor([(1.0, 0.0), *coarse, *fine], dtype=torch.float32, device=device)
    return table, len(coarse), len(fine)
