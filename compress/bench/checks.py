"""Is a product right? Fresh inputs, outputs that hold NaN until they are written, a distance from float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.bench.cases import Setting


@dataclass(frozen=True)
class Input:
    """Makes normally distributed inputs [tokens, columns]."""

    columns: int
    setting: Setting

    def __call__(self, tokens: int) -> Tensor:
        empty = torch.empty(tokens, self.columns, dtype=self.setting.dtype, device=self.setting.device)
        return empty.normal_(generator=self.setting.generator())


@contextmanager
def poisoned() -> Iterator[None]:
    """Within, torch.empty gives NaN (integers: their largest number): what a kernel does not write, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is not deterministic
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            torch.utils.deterministic.fill_uninitialized_memory = fill


def difference(out: Tensor, reference: Tensor) -> float:
    """Relative error, Frobenius; NaN where either has one."""
    return float((out.float() - reference).norm() / reference.norm())
