"""95% intervals hold the truth in about 95 of 100 simulated texts, with few windows too."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compress.evaluate.intervals import LEAST, Estimate, Units, ratio
from compress.evaluate.windows import make_windows

TEXTS = 400


def whole(windows: int) -> Units:
    """The units of so many windows side by side."""
    return Units.of(torch.ones(windows, 64, dtype=torch.bool))


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(3, 0.2, n)


def skewed(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mean 1, skewness 1.75: a few hard windows among many easy ones."""
    return rng.lognormal(-0.125, 0.5, n)


def tokens(rng: np.random.Generator, n: int) -> np.ndarray:
    """Mean 1: exponential tokens, windows that differ in how hard they are."""
    return rng.exponential(1.0, (n, 128)).mean(1) * rng.lognormal(-0.045, 0.3, n)


@pytest.mark.parametrize("units", [5, 8, 20, 60])
@pytest.mark.parametrize(("draw", "truth"), [(normal, 3.0), (skewed, 1.0), (tokens, 1.0)])
def test_coverage(draw, truth: float, units: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(units)
    made = whole(units)
    ones = np.ones(units)
    held = 0
    for _ in range(TEXTS):
        found = ratio(draw(rng, units), ones, made)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= truth <= found.high
    # 0.95 +- three standard errors of the simulation, and a bit for few and skewed windows
    assert (0.915 if units >= LEAST else 0.895) <= held / TEXTS <= 0.983


def test_unequal_counts() -> None:
    """Windows that count differently: the ratio's interval covers the ratio's truth, not the mean of means."""
    rng = np.random.default_rng(0)
    made, held = whole(16), 0
    for _ in range(TEXTS):
        counts = rng.integers(16, 64, 16).astype(float)
        found = ratio(counts * rng.normal(2, 0.3, 16), counts, made)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 2 <= found.high
    assert 0.915 <= held / TEXTS <= 0.983


def test_units() -> None:
    """Windows side by side are units; of strided ones so many that they are as long; a short text goes in parts."""
    values = torch.rand(20, 64)
    made = whole(20)
    assert made.note == ""
    assert made.folded(values) == pytest.approx(values.double().sum(1).numpy())
    strided = make_windows(torch.arange(2000), 64, 16)
    made = Units.of(strided.positions)
    values = torch.rand(strided.rows.shape)
    found = made.folded(values)
    assert len(found) == len(made.weights[0]) == -(-1999 // 64)
    assert found.sum() == pytest.approx(float(values[strided.predictions].double().sum()))
    made = Units.of(make_windows(torch.arange(300), 100).positions)
    assert made.weights.shape[1] == len(made.folded(torch.rand(3, 100))) >= LEAST
    assert "too narrow" in made.note
    made = Units.of(make_windows(torch.arange(500), 100).positions)
    assert made.weights.shape[1] == 5
    assert "Student" in made.note


def test_edges() -> None:
    """One unit has no interval; units that agree have one without width; the same figures give the same interval."""
    assert ratio(np.array([3.0]), np.array([2.0]), Units.of(torch.ones(1, 8, dtype=torch.bool))) == Estimate(1.5)
    made = whole(10)
    assert ratio(np.full(10, 3.0), np.full(10, 2.0), made) == Estimate(1.5, 1.5, 1.5)
    assert ratio(np.zeros(10), np.ones(10), made) == Estimate(0.0, 0.0, 0.0)
    values = np.random.default_rng(1).normal(size=10)
    assert ratio(values, np.ones(10), made) == ratio(values, np.ones(10), whole(10))
    assert ratio(np.array([np.inf, *values[1:]]), np.ones(10), made).low is None
