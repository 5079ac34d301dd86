"""k-means: every row (or group) of the weights gets the 2**bits values that fit it best; weights are replaced by these.

After SqueezeLLM (Kim et al., ICML 2024, section 4.1): the values minimise sum_i s_i (w_i - Q(w_i))^2 over a row. The
paper's sensitivity s_i is the Fisher diagonal, a number for each weight that needs gradients. Here s is the diagonal of
H, the mean of x x^T over the layer's inputs, the same for all rows: the second derivative of the layer's own output
error, which calibration has anyway. `--no-weighted` is plain k-means. The paper's dense-and-sparse split is not part
of this method.

In one dimension a cluster is an interval of the sorted values, so an iteration of Lloyd's algorithm is a binary search
for 2**bits - 1 edges and differences of prefix sums (in float64, which differences need). The published code runs
scikit-learn with random starts; here the start is fixed: quantiles of the density to the power 1/3, the best one for
many levels (Panter and Dite 1951). Plain quantiles end far above it, at 6 bits even above round-to-nearest. Since
Lloyd's algorithm stops at the next local optimum, each iteration also makes an exchange where one pays: the two
neighbours that lose least by it share one entry, and the cluster that gains most by it gets the other. Where
round-to-nearest's asymmetric grid has the lower weighted error (many bits, rounded to the stored dtype) it is taken.
Rows with no more different values than entries come back as exactly as the stored dtype holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import grid
from compress.errors import CompressError
from compress.packed.codebook import Codebook
from compress.passes.nf4 import bits_in_words, losses
from compress.types import LayerStats, Needs, Solved, Storage

_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 23}  # weights sorted at a time; a few dozen bytes are needed for each
_NOISE = 1e-12  # share of a problem's sum of squares below which a difference of its float64 prefix sums means nothing
_TRIFLE = 1e-6  # share of the error that an exchange must at least remove


@dataclass(frozen=True)
class KMeans:
    """k-means: learned values for each row, weighted by the inputs' second moments (after Kim et al. 2024)."""

    name: ClassVar[str] = "kmeans"
    paper: ClassVar[str] = "Kim et al.: SqueezeLLM: Dense-and-Sparse Quantization, ICML 2024"
    row_unit: ClassVar[int] = 1

    bits: int = field(default=4, metadata={"help": "bits a weight, 2 to 8"})
    group_size: int = field(default=-1, metadata={"help": "columns that share a code book; -1: whole row"})
    weighted: bool = field(default=True, metadata={"help": "weight each column's squared error by H's diagonal"})
    iterations: int = field(default=100, metadata={"help": "most iterations of Lloyd's algorithm; stops when settled"})

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise CompressError(f"bits {self.bits} is out of range", "--bits", "use 2 to 8")
        if self.iterations < 0:
            raise CompressError(f"{self.iterations} iterations is out of range", "--iterations", "use 0 or more")

    @property
    def needs(self) -> Needs:
        return Needs(hessian=self.weighted)

    def settle(self, in_features: Collection[int]) -> Self:
        return replace(self, group_size=grid.settle_group_size(self.group_size, in_features))

    @property
    def storage(self) -> Storage:
        return Storage(Codebook.kind, self.bits, self.group_size)

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        each = "row" if self.group_size == -1 else f"group of {self.group_size}"
        how = "weighted by H's diagonal" if self.weighted else "not weighted"
        line = f"k-means, {how}, {2**self.bits} values a {each}"
        lines = [line + bits_in_words(layers)]
        if layers:
            mean = sum(float(layer["figures"]["iterations"]) for layer in layers) / len(layers)
            lines.append(f"Lloyd's algorithm: {mean:.3g} iterations on average, at most {self.iterations}")
        return lines

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Cluster one matrix.

        Args:
            weight: [out, in].
            stats: with `hessian` when weighted. Where `mask` is given zeros stay zeros.
            scale_dtype: dtype of the stored books.

        Raises:
            CompressError: H's diagonal holds NaN or infinity.
        """
        target = weight.float()
        cost = torch.ones(target.shape[1], dtype=torch.float64, device=target.device)
        if self.weighted:
            assert stats.hessian is not None
            cost = stats.hessian.diagonal().double().clamp(min=0)
            if not bool(torch.isfinite(cost).all()):
                remedy = "the activations overflowed: use --dtype float32"
                raise CompressError("the Hessian holds NaN or infinity", remedy=remedy)
        chunk = max(1, _CHUNK_ELEMENTS.get(target.device.type, 1 << 19) // target.shape[1])
        parts = []
        for start in range(0, len(target), chunk):
            rows = slice(start, start + chunk)
            parts.append(self._rows(target[rows], cost, None if stats.mask is None else stats.mask[rows], scale_dtype))
        codes, book, steps = (torch.cat(found) for found in zip(*parts, strict=True))
        packed = Codebook(codes, book, self.bits, self.group_size)
        error = target - packed.dequantize().float()
        figures = {"iterations": float(steps.mean())}
        return Solved(packed, losses(error, stats.hessian), losses(target, stats.hessian), figures=figures)

    def _rows(
        self, target: Tensor, cost: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """codes [r, in], book [r, groups, entries], mean iterations [r] of some rows; a ragged last group by itself."""
        count, columns = target.shape
        size = columns if self.group_size == -1 else min(self.group_size, columns)
        grids = grid.fit(target, self.bits, size, False, dtype)
        k = grids.low[..., None] + torch.arange(2**self.bits, device=target.device)
        plain = grid.value(k, grids.scale[..., None], dtype)  # [r, groups, entries]
        costs = cost.expand_as(target) if mask is None else cost * mask
        whole = columns - columns % size
        codes, books, steps = [], [], []
        for first, last, width in ((0, whole, size), (whole, columns, columns - whole)):
            if first == last:
                continue
            groups = (last - first) // width
            starts = plain[:, first // size : first // size + groups].reshape(count * groups, -1)
            values, weights = (x[:, first:last].reshape(-1, width) for x in (target, costs))
            c, b, s = cluster(values, weights, starts, dtype, self.iterations, mask is not None)
            codes.append(c.reshape(count, -1))
            books.append(b.reshape(count, groups, -1))
            steps.append(s.reshape(count, groups))
        return torch.cat(codes, 1), torch.cat(books, 1), torch.cat(steps, 1).double().mean(1)


def cluster(
    values: Tensor, cost: Tensor, plain: Tensor, dtype: torch.dtype, iterations: int, keep_zero: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted k-means of many small sets of numbers.

    Args:
        values: float32 [p, n], a problem a row.
        cost: float64 [p, n], what a squared error counts.
        plain: float32 [p, entries], rising, representable in `dtype`: a book that the answer is never worse than. It
            holds 0 where keep_zero.
        dtype: of the books.
        iterations: the most of Lloyd's algorithm.
        keep_zero: one entry of each book is 0 and stays 0.

    Returns:
        codes uint8 [p, n], books [p, entries] in `dtype`, iterations int64 [p] until the kept answer settled.
    """
    exact = values.double()
    data = Sorted.of(exact, cost)
    largest = torch.finfo(dtype).max
    best, steps = lloyd(data, data.quantiles(plain.shape[1], keep_zero), iterations, keep_zero)
    best = best.clamp(-largest, largest).to(dtype).double()
    worse = data.error(best) > data.error(plain.double())
    best = torch.where(worse[:, None], plain.double(), best)
    few, different = data.different(best.shape[1])
    different = different.clamp(-largest, largest).to(dtype).double()
    best, steps = torch.where(few[:, None], different, best), torch.where(few, 0, steps)
    codes = torch.searchsorted(midpoints(best), exact)
    return codes.to(torch.uint8), best.to(dtype), steps


def lloyd(data: Sorted, book: Tensor, iterations: int, keep_zero: bool) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm with exchanges from `book` [p, entries], rising: no iteration raises the error.

    Returns:
        books [p, entries], and how many iterations changed each, int64 [p].
    """
    steps = torch.zeros(len(book), dtype=torch.int64, device=book.device)
    for _ in range(iterations):
        moved = step(data, book, keep_zero)
        changed = (moved != book).any(1)
        if not bool(changed.any()):
            break
        steps += changed
        book = moved
    return book, steps


def step(data: Sorted, book: Tensor, keep_zero: bool) -> Tensor:
    """Every entry to the mean of the values that it serves, then one exchange."""
    edges = data.edges(book)
    moments = data.moments(edges)
    moved = means(data, book, edges, moments)
    kept = _nearest_to_zero(book) if keep_zero else torch.zeros_like(book, dtype=torch.bool)
    return exchange(data, moved.masked_fill(kept, 0.0), edges, moments, kept)


def means(data: Sorted, book: Tensor, edges: Tensor, moments: Moments) -> Tensor:
    """[p, entries]: the mean of each cluster; the middle of one that costs nothing; the old entry without values."""
    low = data.values.gather(1, edges[:, :-1].clamp(max=data.values.shape[1] - 1))
    high = data.values.gather(1, (edges[:, 1:] - 1).clamp(min=0))
    mean = torch.minimum(torch.maximum(moments.mean((low + high) / 2), low), high)
    return torch.where(edges[:, 1:] > edges[:, :-1], mean, book)


def exchange(data: Sorted, book: Tensor, edges: Tensor, moments: Moments, kept: Tensor) -> Tensor:
    """Merge the neighbours that lose least by it and split the cluster that gains most by it, where that pays.

    A cluster is split at its mean. An entry that serves no value merges for nothing.

    Args:
        book: [p, entries], rising, the means of the clusters.
        edges, moments: of these clusters.
        kept: bool [p, entries], entries that must stay.
    """
    error = moments.error()
    both = moments.of(lambda x: x[:, 1:] + x[:, :-1])
    loss = both.error() - error[:, 1:] - error[:, :-1]
    loss, pair = loss.masked_fill(kept[:, 1:] | kept[:, :-1], torch.inf).min(1, keepdim=True)
    cut = torch.searchsorted(data.values, book, right=True).clamp(edges[:, :-1], edges[:, 1:])
    left = data.between(edges[:, :-1], cut)
    right = data.between(cut, edges[:, 1:])
    gain = (error - left.error() - right.error()).masked_fill(kept, -torch.inf)
    gain, source = gain.scatter(1, pair, -torch.inf).scatter(1, pair + 1, -torch.inf).max(1, keepdim=True)
    pays = gain > loss + _TRIFLE * error.sum(1, keepdim=True) + _NOISE * data.sums.second[:, -1:]
    merged = both.mean((book[:, 1:] + book[:, :-1]) / 2).gather(1, pair)
    parts = [part.mean(book).gather(1, source) for part in (left, right)]
    changed = book.scatter(1, pair, merged).scatter(1, pair + 1, parts[0]).scatter(1, source, parts[1])
    return torch.where(pays, changed.sort(1).values, book)


def midpoints(book: Tensor) -> Tensor:
    """[p, entries - 1]: between neighbours. A value on one goes to the lower entry."""
    return ((book[:, 1:] + book[:, :-1]) / 2).contiguous()


def _nearest_to_zero(book: Tensor) -> Tensor:
    """bool [p, entries]: one entry of each book."""
    return torch.zeros_like(book, dtype=torch.bool).scatter_(1, book.abs().argmin(1, keepdim=True), True)


@dataclass(frozen=True)
class Moments:
    """Sums over sets of values, all of one shape: of cost, cost * value, cost * value^2. float64."""

    mass: Tensor
    first: Tensor
    second: Tensor

    def of(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """`change` of each."""
        return Moments(change(self.mass), change(self.first), change(self.second))

    def mean(self, otherwise: Tensor) -> Tensor:
        """The weighted means; `otherwise` where nothing costs anything."""
        return torch.where(self.mass > 0, self.first / self.mass, otherwise)

    def error(self, book: Tensor | None = None) -> Tensor:
        """The weighted squared errors around `book`, without it around the means."""
        book = self.mean(torch.zeros_like(self.mass)) if book is None else book
        return (self.second - 2 * book * self.first + book * book * self.mass).clamp(min=0)


@dataclass(frozen=True)
class Sorted:
    """Problems with their values in rising order.

    Attributes:
        values: float64 [p, n].
        cost: float64 [p, n], in the same order; a problem whose costs are all 0 has ones.
        sums: [p, n + 1], prefix sums.
    """

    values: Tensor
    cost: Tensor
    sums: Moments

    @classmethod
    def of(cls, values: Tensor, cost: Tensor) -> Sorted:
        values, order = torch.sort(values, dim=1, stable=True)
        cost = cost.gather(1, order)
        cost = torch.where(cost.sum(1, keepdim=True) > 0, cost, 1.0)
        terms = Moments(cost, cost * values, cost * values * values)
        return cls(values, cost, terms.of(lambda x: F.pad(x.cumsum(1), (1, 0))))

    def edges(self, book: Tensor) -> Tensor:
        """int64 [p, entries + 1]: entry j serves the values edges[j] .. edges[j + 1] - 1."""
        inner = torch.searchsorted(self.values, midpoints(book), right=True)
        ends = torch.zeros_like(inner[:, :1])
        return torch.cat([ends, inner, ends + self.values.shape[1]], 1)

    def between(self, start: Tensor, stop: Tensor) -> Moments:
        """Of the values start .. stop - 1; int64 [p, k] both."""
        return self.sums.of(lambda x: x.gather(1, stop) - x.gather(1, start))

    def moments(self, edges: Tensor) -> Moments:
        """[p, entries]: of each cluster."""
        return self.between(edges[:, :-1], edges[:, 1:])

    def error(self, book: Tensor) -> Tensor:
        """float64 [p]: the weighted squared error."""
        return self.moments(self.edges(book)).error(book).sum(1)

    def quantiles(self, entries: int, keep_zero: bool) -> Tensor:
        """A book to start from, [p, entries]: quantiles of the density to the power 1/3.

        A value stands for the gap to its neighbours, so its density is cost / gap, and its share of the integral of
        density^(1/3) is cost^(1/3) gap^(2/3).
        """
        around = torch.cat([self.values[:, :1], self.values, self.values[:, -1:]], 1)
        gap = around[:, 2:] - around[:, :-2]
        total = (self.cost.pow(1 / 3) * gap.pow(2 / 3)).cumsum(1)
        middle = (torch.arange(entries, dtype=torch.float64, device=gap.device) + 0.5) / entries
        index = torch.searchsorted(total, total[:, -1:] * middle).clamp_(max=gap.shape[1] - 1)
        book = self.values.gather(1, index)
        return book.masked_fill(_nearest_to_zero(book), 0.0) if keep_zero else book

    def different(self, entries: int) -> tuple[Tensor, Tensor]:
        """Which problems have at most `entries` different values, bool [p], and these values, [p, entries].

        The largest fills the rest of a book; rows of other problems mean nothing.
        """
        rank = (self.values.diff(dim=1, prepend=self.values[:, :1]) > 0).cumsum(1)
        book = self.values[:, -1:].repeat(1, entries)
        return rank[:, -1] < entries, book.scatter_(1, rank.clamp(max=entries - 1), self.values).sort(1).values
