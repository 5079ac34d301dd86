"""Is a product right? Outputs that hold NaN until they are written, and a distance from float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from compress.repeatable import repeatable


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty gives NaN (integers: their largest number), so that what a kernel does not write shows.

    torch does that where it is asked for deterministic algorithms.
    """
    with repeatable(fill=True):
        yield


def difference(out: Tensor, reference: Tensor) -> float:
    """Relative error, Frobenius; NaN where either has one."""
    return float((out.float() - reference).norm() / reference.norm())


def coarseness(dtype: torch.dtype) -> float:
    """How many times as large as with float16 errors of rounding are."""
    return torch.finfo(dtype).eps / torch.finfo(torch.float16).eps
