"""Which weights to prune: sparsity patterns and the choice of masks by a score. Pure functions.

A mask is bool, True where a weight is kept. Counts are exact: ties go to the lower index.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

from compress.errors import CompressError

_Details = tuple[tuple[str, int | float | str | bool], ...]
_LARGEST_SUGGESTION = 32


@dataclass(frozen=True)
class Pattern:
    """How many weights are pruned, and among which.

    Attributes:
        n: of every m consecutive weights of a row n are kept (N:M sparsity).
        m: 0 where there is no such structure.
        sparsity: without structure, the share of pruned weights of the matrix.
        by_row: that share holds in every row.
    """

    n: int = 0
    m: int = 0
    sparsity: float = 0.0
    by_row: bool = False

    def __str__(self) -> str:
        """As the literature writes it, zeros first: 2:4, 4:8; or a percentage."""
        return f"{self.m - self.n}:{self.m}" if self.m else f"{self.sparsity:.4g}"

    @property
    def share(self) -> float:
        """The share of pruned weights."""
        return 1 - self.n / self.m if self.m else self.sparsity

    @property
    def details(self) -> _Details:
        """For `Storage.details`."""
        if self.m:
            return (("m", self.m), ("n", self.n))
        return (("by_row", True), ("sparsity", self.sparsity)) if self.by_row else (("sparsity", self.sparsity),)

    @classmethod
    def from_details(cls, details: _Details) -> Self:
        return cls(**dict(details))  # type: ignore[arg-type]

    def zeros(self, rows: int, columns: int) -> int:
        """How many weights of a matrix are pruned, exactly."""
        if self.m:
            return rows * columns // self.m * (self.m - self.n)
        return rows * round(self.sparsity * columns) if self.by_row else round(self.sparsity * rows * columns)


def parse(text: str) -> Pattern:
    """The pattern "N:M", N zeros among M consecutive weights, as papers and published code write it.

    Raises:
        CompressError: it is none.
    """
    zeros, colon, of = text.partition(":")
    if not colon or not (zeros.isdecimal() and of.isdecimal()) or not 1 <= int(zeros) < int(of):
        what = f"no pattern {text!r}"
        raise CompressError(what, "--pattern", "write N:M, N zeros among M consecutive weights: 2:4 or 4:8")
    return Pattern(int(of) - int(zeros), int(of))


def check_divides(pattern: Pattern, in_features: Collection[int]) -> None:
    """Raises CompressError when groups of M do not fill every row; names the nearest patterns that do."""
    odd = sorted(n for n in in_features if pattern.m and n % pattern.m)
    if not odd:
        return
    fitting = [
        (abs(zeros / m - pattern.share), abs(m - pattern.m), f"{zeros}:{m}")
        for m in range(2, _LARGEST_SUGGESTION + 1)
        if all(n % m == 0 for n in in_features)
        for zeros in range(1, m)
    ]
    names = " or ".join(name for *_, name in sorted(fitting)[:2])
    remedy = f"use {names}" if names else f"use --sparsity {pattern.share:g} without a pattern"
    raise CompressError(f"pattern {pattern} does not divide in_features {odd[0]}", "--pattern", remedy)


def drop_lowest(score: Tensor, zeros: int | Tensor) -> Tensor:
    """bool, shaped as `score` [..., n]: False at the `zeros` lowest of the last dimension, ties to the lower index.

    The count may be a tensor without dimensions: nothing waits for its value.
    """
    rank = torch.arange(score.shape[-1], device=score.device)
    kept = torch.empty_like(score, dtype=torch.bool)
    return kept.scatter_(-1, score.argsort(dim=-1, stable=True), (rank >= zeros).expand(score.shape))


def by_score(score: Tensor, pattern: Pattern) -> Tensor:
    """bool [out, in]: the mask that drops the lowest scores [out, in] which the pattern allows."""
    rows, columns = score.shape
    if pattern.m:
        return drop_lowest(score.reshape(rows, -1, pattern.m), pattern.m - pattern.n).reshape(rows, columns)
    if pattern.by_row:
        return drop_lowest(score, pattern.zeros(1, columns))
    return drop_lowest(score.flatten(), pattern.zeros(rows, columns)).reshape(rows, columns)


def score_of(w: Tensor, diagonal: Tensor, given: Tensor | None) -> Tensor:
    """|w| / U_ii, the root of SparseGPT's w^2 / U_ii^2, which neither overflows nor vanishes; -1 where not given."""
    score = w.abs() / diagonal
    return score if given is None else torch.where(given, score, -1.0)


def expected(weight: Tensor, diagonal: Tensor, pattern: Pattern, given: Tensor | None) -> Tensor:
    """bool [out, in]: what a sweep will keep, as far as can be said before it: grids are fitted to that.

    diagonal: float32 [in], of U, columns in natural order.
    """
    kept = by_score(score_of(weight, diagonal, given), pattern)
    return kept if given is None else kept & given


@dataclass(frozen=True)
class Choice:
    """How a sweep over columns chooses what to prune: a run of columns at a time, when it reaches the run.

    Attributes:
        pattern: N:M, or a share of the whole matrix.
        length: columns of a run; M for N:M.
        even: every run bears that share alike (the paper); else as much as the scores before the sweep give it.
    """

    pattern: Pattern
    length: int
    even: bool = True

    def counts(self, score: Tensor) -> Sequence[int | Tensor]:
        """Pruned weights of each run (of each of its rows, for N:M); their total is exact.

        Args:
            score: [in, out], before the sweep.
        """
        columns, rows = score.shape
        ends = [min(end, columns) for end in range(0, columns + self.length, self.length)]
        if self.pattern.m:
            return [self.pattern.m - self.pattern.n] * (len(ends) - 1)
        if not self.even:
            dropped = columns_dropped(score, self.pattern.zeros(rows, columns))
            return [dropped[first:last].sum() for first, last in pairwise(ends)]
        total = self.pattern.zeros(rows, columns)
        upto = [(2 * total * end + columns) // (2 * columns) for end in ends]
        return [b - a for a, b in pairwise(upto)]

    def keep(self, score: Tensor, count: int | Tensor) -> Tensor:
        """bool [length, out] from scores [length, out]."""
        if self.pattern.m:
            return drop_lowest(score.t(), count).t()
        return drop_lowest(score.flatten(), count).reshape(score.shape)


def columns_dropped(score: Tensor, zeros: int) -> Tensor:
    """int64 [in]: how many of the `zeros` lowest scores [in, out] lie in each column."""
    return drop_lowest(score.flatten(), zeros).reshape(score.shape).logical_not_().sum(1)


class Growing:
    """The mask of a sweep over the columns of w [in, out], as it grows.

    Attributes:
        kept: bool [in, out], what the choice keeps; None without a choice.
        labels: for `columns.blocks`, so that runs are chosen from weights that carry every update.
        runs: for `kernel.find`; None where nothing is chosen.
    """

    def __init__(self, w: Tensor, factor: Tensor, choice: Choice | None, given: Tensor | None) -> None:
        """w: the weights that the sweep moves, looked at when a run is reached.

        factor: float32 [in, in], the upper factor U of H^-1, whose diagonal weighs the score |w| / U_ii.
        given: bool [in, out], False where weights must be zero whatever is chosen: they are chosen first.
        """
        self._choice, self._w, self._given = choice, w, given
        self.runs: tuple[int, int, int] | None = None
        self._diagonal = factor.diagonal()[:, None]
        self._alive = given
        self._counts: Sequence[int | Tensor] = ()
        self.labels: list[list[int]] = []
        self.kept = None if choice is None else torch.ones_like(w, dtype=torch.bool)
        if choice is not None and choice.pattern.zeros(w.shape[1], len(w)):
            self._counts = choice.counts(self._score(slice(0, len(w))))
            self._alive = torch.ones_like(w, dtype=torch.bool) if given is None else given.clone()
            self.labels = [[i // choice.length for i in range(len(w))]]
            drop = choice.pattern.m - choice.pattern.n if choice.pattern.m else 0
            self.runs = (choice.length, drop, len(w) if drop else choice.length)

    def _score(self, run: slice) -> Tensor:
        return score_of(self._w[run], self._diagonal[run], None if self._given is None else self._given[run])

    def reach(self, column: int) -> None:
        """Choose the run that begins at `column`, if one does."""
        if not self._counts or self._choice is None or column % self._choice.length:
            return
        assert self.kept is not None
        assert self._alive is not None
        run = slice(column, min(column + self._choice.length, len(self._w)))
        kept = self._choice.keep(self._score(run), self._counts[column // self._choice.length])
        self.kept[run] = kept
        self._alive[run] &= kept

    def begin(self, start: int, stop: int, chosen_there: bool) -> Tensor | None:
        """bool [columns, out] of a block, or None: what may differ from 0, before a kernel decides the block's columns;
        what that chooses itself is not in it."""
        if chosen_there:
            return None if self._given is None else self._given[start:stop]
        self.reach(start)
        return None if self._alive is None else self._alive[start:stop]

    def clear(self, level: Tensor, column: int) -> None:
        """Zero the pruned weights among the levels [out] of a column."""
        if self._alive is not None:
            level.mul_(self._alive[column])
