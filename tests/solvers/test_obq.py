"""OBQ against its definition: the inverse of the free weights' Hessian computed anew at every step, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.solvers import obq


def problem(seed: int, rows: int = 4, columns: int = 9) -> tuple[Tensor, Tensor]:
    """Weights [rows, columns], a correlated damped Hessian."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(64, columns, generator=g) @ torch.randn(columns, columns, generator=g)
    return torch.randn(rows, columns, generator=g), x.T @ x / 64 + 0.05 * torch.eye(columns)


def slow(w: Tensor, hessian: Tensor, scale: float, half: int) -> Tensor:
    """One row, by equations 2 and 7 of the paper, nothing shared between steps."""
    w, hessian = w.double().clone(), hessian.double()
    free = list(range(len(w)))
    levels = torch.zeros(len(w))
    while free:
        inverse = torch.linalg.inv(hessian[free][:, free])
        k = torch.round(w[free].float() / scale).clamp(-half, half - 1)
        error = (k * scale).double() - w[free]
        pick = int((error.square() / inverse.diagonal()).argmin())
        levels[free[pick]] = k[pick]
        w[free] += inverse[:, pick] * error[pick] / inverse[pick, pick]
        del free[pick]
    return levels


@given(seed=st.integers(0, 10**6), half=st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=40)
def test_equals_its_definition(seed: int, half: int) -> None:
    w, hessian = problem(seed)
    scale = torch.full_like(w, 3.0 / half)
    found = obq.sweep(w, hessian, scale, torch.full_like(w, -half), torch.full_like(w, half - 1), torch.float32)
    want = torch.stack([slow(row, hessian, 3.0 / half, half) for row in w])
    assert torch.equal(found, want)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(3, rows=7)
    args = (hessian, torch.full_like(w, 0.5), torch.full_like(w, -4), torch.full_like(w, 3), torch.float32)
    whole = obq.sweep(w, *args)
    monkeypatch.setattr(obq, "_CHUNK", 2 * 81)
    assert torch.equal(obq.sweep(w, *args), whole)


def test_beats_rounding_on_average() -> None:
    ours = plain = 0.0
    for seed in range(20):
        w, hessian = problem(seed)
        low, high = torch.full_like(w, -4), torch.full_like(w, 3)
        scale = torch.full_like(w, 0.7)
        nearest = (w / scale).round().clamp(-4, 3)
        for k, sign in ((obq.sweep(w, hessian, scale, low, high, torch.float32), 1), (nearest, 0)):
            e = w - k * scale
            loss = float(((e @ hessian) * e).sum())
            ours, plain = (ours + loss, plain) if sign else (ours, plain + loss)
    assert ours < 0.75 * plain
