"""The allocator: what brute force finds, within every budget, and no more cost for more room."""

from __future__ import annotations

import itertools
import math
import random
import sys

import pytest

from compress.auto.allocate import allocate, interpolated, join
from compress.errors import CompressError


def case(seed: int) -> tuple[list[list[float]], list[list[int]]]:
    """Costs and sizes of a few layers, some candidates refused, sizes as uneven as headers make them."""
    draw = random.Random(seed)
    layers, candidates = draw.randint(1, 6), draw.randint(1, 4)
    costs = [[draw.random() * 10 ** draw.uniform(-6, 0) for _ in range(candidates)] for _ in range(layers)]
    sizes = [[draw.randint(1, 400) * draw.choice([1, 8, 64]) for _ in range(candidates)] for _ in range(layers)]
    for row in costs:
        for c in range(1, candidates):
            if draw.random() < 0.15:
                row[c] = math.inf
    return costs, sizes


def best(costs: list[list[float]], sizes: list[list[int]], ties: list[list[int]], budget: int) -> float:
    """The least cost over all choices of layers, those of a tie alike."""
    found = math.inf
    for picks in itertools.product(range(len(costs[0])), repeat=len(ties)):
        layers = [(row, c) for rows, c in zip(ties, picks, strict=True) for row in rows]
        if sum(sizes[row][c] for row, c in layers) <= budget:
            found = min(found, sum(costs[row][c] for row, c in layers))
    return found


@pytest.mark.parametrize("seed", range(40))
def test_equals_brute_force(seed: int) -> None:
    costs, sizes = case(seed)
    draw = random.Random(seed + 1000)
    ties: list[list[int]] = []
    for row in range(len(costs)):
        if ties and draw.random() < 0.3:
            ties[-1].append(row)
        else:
            ties.append([row])
    joined, room = join(costs, ties), join(sizes, ties)
    every = [min(s for s, c in zip(a, b, strict=True) if math.isfinite(c)) for a, b in zip(room, joined, strict=True)]
    budget = draw.randint(sum(every), sum(map(max, room)))
    found = allocate(joined, room, budget)
    assert found.size <= budget
    assert found.gap == 0
    assert found.size == sum(row[c] for row, c in zip(room, found.choice, strict=True))
    assert found.cost == pytest.approx(best(costs, sizes, ties, budget), rel=1e-9, abs=1e-15)


def test_budget_is_kept_and_more_of_it_never_costs_more() -> None:
    draw = random.Random(7)
    sizes = [[draw.randint(10, 10**9) * b for b in (2, 3, 4, 8)] for _ in range(40)]
    costs = [[draw.random() * 4.0**-b for b in (2, 3, 4, 8)] for _ in range(40)]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    before = math.inf
    for i in range(12):
        budget = low + (high - low) * i // 11
        found = allocate(costs, sizes, budget)
        assert found.size <= budget
        assert found.cost <= before * (1 + 1e-9)
        before = found.cost
    assert found.choice == (3,) * 40


def test_budget_of_the_smallest_choice_is_met_to_the_byte() -> None:
    sizes = [[1_000_003, 2_000_001], [999_999, 3_000_000]]
    assert allocate([[1.0, 0.5], [1.0, 0.1]], sizes, 2_000_002).choice == (0, 0)
    assert allocate([[1.0, 0.5], [1.0, 0.1]], sizes, 3_000_000).choice == (1, 0)
    with pytest.raises(CompressError, match="the smallest choice takes 2000002"):
        allocate([[1.0, 0.5], [1.0, 0.1]], sizes, 2_000_001)


def test_without_the_solver_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(CompressError, match=r"compress-llm\[auto\]"):
        allocate([[1.0]], [[1]], 1)


def test_interpolation() -> None:
    points = [(0.4, 1.0), (0.1, 0.2)]
    assert interpolated(points, 0.05) == pytest.approx(0.1)
    assert interpolated(points, 0.1) == pytest.approx(0.2)
    assert interpolated(points, 0.25) == pytest.approx(0.6)
    assert interpolated(points, 0.7) == pytest.approx(1.8)
    assert interpolated([(0.1, -1e-9)], 0.2) == 0, "noise below 0 counts as nothing"
    assert interpolated([(0.1, 0.5), (0.2, 0.4)], 0.2) == 0.5, "more error never costs less"
    assert interpolated([(0.0, 0.0)], 0.3) == 0


def test_equals_dynamic_programming_on_a_model_of_28_groups() -> None:
    """Too many choices for brute force: exact over every number of bytes."""
    import numpy as np

    draw = random.Random(3)
    weights = [draw.choice([64, 192, 256]) for _ in range(28)]
    sizes = [[n * (b * 8 + 128 // g) // 8 for b in (2, 3, 4, 8) for g in (128, 64, 32)] for n in weights]
    costs = [[draw.random() * 4.0**-b * (1 + g / 500) for b in (2, 3, 4, 8) for g in (128, 64, 32)] for _ in weights]
    for share in (0.1, 0.3, 0.7):
        budget = int((1 - share) * sum(map(min, sizes)) + share * sum(map(max, sizes)))
        least = np.full(budget + 1, np.inf)
        least[0] = 0
        for row, room in zip(costs, sizes, strict=True):
            after = np.full(budget + 1, np.inf)
            for cost, size in zip(row, room, strict=True):
                after[size:] = np.minimum(after[size:], least[: budget + 1 - size] + cost)
            least = after
        assert allocate(costs, sizes, budget).cost == pytest.approx(float(least.min()), rel=1e-9)
