"""The GPU kernel of the solvers' column loops, where there is one; nothing of it is imported on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fast:
    """`compress.cuda.columns.block` with its rule.

    Attributes:
        run: the function.
        most: columns that a call may have.
        chooses: it prunes on the way; else masks are chosen before it is called.
    """

    run: Callable[..., None]
    most: int
    chooses: bool

    def __call__(self, *tensors: Tensor | None, **more: Tensor | None) -> None:
        self.run(*tensors, **more)

    def block(self, size: int) -> int:
        """Columns of a block, where `size` are asked for."""
        return min(size, self.most)


def usable(x: Tensor) -> bool:
    """Whether x's device has the kernel."""
    if x.device.type != "cuda":
        return False
    from compress.cuda import columns

    return columns.takes(x, columns.Rule(torch.float32, 4))


def find(
    x: Tensor,
    dtype: torch.dtype,
    bits: int,
    codes: bool = False,
    descend: bool = False,
    pruned: tuple[int, int, int] | None = None,
) -> Fast | None:
    """The kernel for a loop over columns of x's device and dtype; None where the loop is Python's.

    Args:
        x: float32 [in, out].
        dtype, bits, codes, descend: see `compress.cuda.columns.Rule`.
        pruned: columns of a run that is pruned together, how many of them each row loses (0: what the whole run does
            is decided from all rows), and columns that a block should have then.
    """
    if x.device.type != "cuda":
        return None
    from compress.cuda import columns

    run, drop, length = (0, 0, columns.COLUMNS) if pruned is None else pruned
    rule = columns.Rule(dtype, bits, codes, descend, run if drop else 0, drop)
    if not columns.takes(x, rule) or (drop and run > columns.RUN):
        return None
    found: Any = partial(columns.block, rule)
    return Fast(found, min(columns.COLUMNS, length), bool(drop))
