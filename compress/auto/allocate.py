"""One setting for each group of layers: the least cost in all within a budget of bytes. Tables in, a choice out.

A multiple-choice knapsack: of each row exactly one column, the sum of sizes at most the budget, the sum of costs least.
HiGHS (scipy.optimize.milp) solves it to a gap of 0 by branch and cut, in a second for the 224 layers of a 7B model.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from compress.errors import CompressError

#: numbers by rows (groups of layers) and columns (candidates); math.inf where a group may not take a candidate
Costs = Sequence[Sequence[float]]
Sizes = Sequence[Sequence[int]]

_SECONDS = 120.0
#: HiGHS stops at an absolute gap of 1e-6, whatever the relative one: costs are scaled to be far larger
_LARGEST = 1e4


@dataclass(frozen=True)
class Allocation:
    """What each group gets.

    Attributes:
        choice: for each row, the column.
        cost, size: in all.
        gap: how much less another choice could cost, as a share; 0 where this one is proved to be the best.
    """

    choice: tuple[int, ...]
    cost: float
    size: int
    gap: float = 0.0


def join(table: Sequence[Sequence[Any]], ties: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Sum the rows that must take the same column. ties: for each row of the result, those of `table` in it."""
    return [[sum(values) for values in zip(*(table[row] for row in rows), strict=True)] for rows in ties]


def allocate(costs: Costs, sizes: Sizes, budget: int) -> Allocation:
    """The cheapest choice whose sizes add up to `budget` at most.

    Args:
        costs: not negative; math.inf for what may not be chosen.
        sizes: bytes.

    Raises:
        CompressError: scipy is missing; no choice is small enough.
    """
    open_to = [[c for c, cost in enumerate(row) if math.isfinite(cost)] for row in costs]
    assert all(open_to), "a group without a candidate"
    least = sum(min(sizes[r][c] for c in row) for r, row in enumerate(open_to))
    if least > budget:
        raise CompressError(f"{budget} bytes, the smallest choice takes {least}", "the budget", f"allow {least}")
    unit = math.gcd(*(sizes[r][c] for r, row in enumerate(open_to) for c in row)) or 1
    units = [[sizes[r][c] // unit for c in row] for r, row in enumerate(open_to)]
    allowed = budget // unit
    while True:
        picks, gap = _solve([[costs[r][c] for c in row] for r, row in enumerate(open_to)], units, allowed)
        choice = tuple(row[pick] for row, pick in zip(open_to, picks, strict=True))
        size = sum(sizes[r][c] for r, c in enumerate(choice))
        if size <= budget:
            return Allocation(choice, math.fsum(costs[r][c] for r, c in enumerate(choice)), size, gap)
        allowed -= 1  # within the solver's tolerance (1e-6 of a row) it was not too large


def _solve(costs: list[list[float]], units: list[list[int]], allowed: int) -> tuple[list[int], float]:
    """The position of the pick in each row, and the relative gap that was left."""
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_matrix
    except ImportError:
        raise CompressError("needs scipy", "compress auto", "pip install 'compress-llm[auto]'") from None

    flat = np.array([cost for row in costs for cost in row])
    scale = _LARGEST / max(float(flat.max()), 1e-300)
    owner = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    places = np.arange(len(flat))
    one_each = csr_matrix((np.ones(len(flat)), (owner, places)), shape=(len(costs), len(flat)))
    weight = csr_matrix(np.array([[size for row in units for size in row]], dtype=float))
    with _silent():
        found = milp(
            flat * scale,
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weight, -np.inf, float(allowed))],
            options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
        )
    if found.x is None:
        raise CompressError(f"the solver found no choice ({found.message})", "compress auto", "allow a larger budget")
    picks, at = [], 0
    for row in costs:
        picks.append(int(np.argmax(found.x[at : at + len(row)])))
        at += len(row)
    return picks, 0.0 if found.status == 0 else float(found.mip_gap)


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on the process' standard output: HiGHS prints a line there now and then, whatever it is told."""
    sys.stdout.flush()
    library = ctypes.CDLL(None)  # of C, whose buffer is not Python's
    library.fflush(None)
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        library.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def interpolated(points: Sequence[tuple[float, float]], error: float) -> float:
    """The cost at a relative error, on straight lines through (0, 0) and the measured points (error, cost).

    Beyond the largest measured error the last line goes on. Costs below 0, which only noise makes, count as 0.
    """
    known = [(0.0, 0.0)]
    for x, y in sorted(points):
        if x > known[-1][0]:
            known.append((x, max(y, known[-1][1])))  # more error never costs less
    if len(known) == 1:
        return 0.0
    after = next((i for i in range(1, len(known)) if error <= known[i][0]), len(known) - 1)
    (x0, y0), (x1, y1) = known[after - 1], known[after]
    return max(0.0, y0 + (y1 - y0) * (error - x0) / (x1 - x0))
