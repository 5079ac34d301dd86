"""A block of columns of the solvers' loops, by kernels/columns.cu: what their Python loops do, at once on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.cuda.support import probe, why_not_once

#: columns that a launch takes
COLUMNS = 128
#: columns of a run that it prunes, at most
RUN = 32
_ROWS, _THREADS, _PITCH = 32, 256, 33
_TYPES = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "Single"}


@dataclass(frozen=True)
class Rule:
    """How a column is decided.

    Attributes:
        dtype: weights are rounded to it.
        bits: of a level; 0: weights stay what they are.
        codes: levels are codes of grids with any zero point, and there may be outliers (SpQR).
        descend: coordinate descent; else a sweep.
        run, drop: of every `run` columns `drop` are pruned on the way; 0: none are.
    """

    dtype: torch.dtype
    bits: int
    codes: bool = False
    descend: bool = False
    run: int = 0
    drop: int = 0

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return 4 * COLUMNS * (COLUMNS + (3 if self.codes else 2) * _PITCH)

    def kernel(self, zero: bool, alive: bool) -> Kernel:
        """The variant, for grids with zero points and weights with a mask."""
        return Kernel(
            "columns",
            "columns.cu",
            (
                ("T", _TYPES[self.dtype]), ("LEVELS", 2 if self.codes else int(self.bits > 0)), ("ZERO", int(zero)),
                ("ALIVE", int(alive)), ("DESCEND", int(self.descend)), ("CHOOSE", int(self.run > 0)),
            ),
        )  # fmt: skip


def takes(x: Tensor, rule: Rule) -> bool:
    """Whether the kernel can be used on x's device; why not is said once in the log."""
    if x.device.type != "cuda" or rule.dtype not in _TYPES or x.dtype != torch.float32:
        return False
    found = probe(x.device.index)
    why_not_once(found)
    return found.usable and rule.shared <= found.shared


def block(
    rule: Rule,
    w: Tensor,
    factor: Tensor,
    inverse: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    alive: Tensor | None,
    now: Tensor | None,
    k: Tensor,
    error: Tensor,
    value: Tensor | None = None,
    kept: Tensor | None = None,
) -> None:
    """Decide the n columns of a block, n <= COLUMNS. Nothing of another block is read or written.

    Args:
        rule: what is done.
        w: float32 [n, out], contiguous rows as all matrices here: weights, or the gradient of a descent.
        factor: float32 [n, n] of any strides, what is above its diagonal is used: U, or H of a descent.
        inverse: float32 [n], one over its diagonal.
        scale, zero: float32 [n, out] each, the grids.
        alive: bool [n, out], weights that may differ from 0; with `rule.codes` those that are outliers.
        now: float32 [n, out], the weights that a descent starts from.
        k, error: float32 [n, out], written: levels, and what each is off, for the columns of later blocks.
        value: float32 [n, out], written with `rule.codes`: what codes and outliers stand for.
        kept: bool [n, out], written where the rule prunes.
    """
    count, rows = w.shape
    assert count <= COLUMNS
    if factor.stride(1) != 1:
        factor = factor.contiguous()
    given = [t for t in (w, inverse, scale, zero, alive, now, k, error, value, kept) if t is not None]
    assert all(t.is_contiguous() for t in given)
    top = 2**rule.bits - 1
    low, high = (0.0, float(top)) if zero is not None else (-float(top // 2 + 1), float(top // 2))
    launch(
        function(rule.kernel(zero is not None, alive is not None), w.device.index),
        (-(-rows // _ROWS),),
        (_THREADS,),
        (
            w, factor, inverse, scale, zero, alive, now, k, error, value, kept,
            rows, count, factor.stride(0), low, high, rule.run, rule.drop,
        ),
        rule.shared,
        w,
    )  # fmt: skip
