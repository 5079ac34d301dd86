"""torch's wish for deterministic algorithms, for a while."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
