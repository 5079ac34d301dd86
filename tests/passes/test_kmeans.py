"""k-means against the exact optimum, slow twins of its steps, and round-to-nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.packed.codebook import Codebook
from compress.passes import kmeans
from compress.passes.kmeans import KMeans, Sorted
from compress.passes.rtn import RTN
from compress.types import LayerStats, Needs, Solved, Storage, tensor_bytes_of

NOTHING = LayerStats(0)
BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]
PLAIN = KMeans(weighted=False)


def random_weight(seed: int, rows: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def stats_of(seed: int, columns: int) -> LayerStats:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(100, columns, generator=g) * torch.exp(torch.randn(columns, generator=g))
    return LayerStats(100, x.T @ x / 100)


def packed_of(solved: Solved) -> Codebook:
    assert isinstance(solved.packed, Codebook)
    return solved.packed


def cost_of(stats: LayerStats) -> Tensor:
    assert stats.hessian is not None
    return stats.hessian.diagonal().double()


def weighted_error(weight: Tensor, dense: Tensor, cost: Tensor) -> Tensor:
    """float64 [out]"""
    return ((weight.double() - dense.double()).square() * cost).sum(1)


def optimum(values: list[float], cost: list[float], entries: int) -> float:
    """The least weighted squared error of any `entries` values, by dynamic programming over the sorted values."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    x, c = [values[i] for i in order], [cost[i] for i in order]
    n = len(x)

    def interval(i: int, j: int) -> float:
        mass = sum(c[i:j])
        mean = sum(a * b for a, b in zip(c[i:j], x[i:j], strict=True)) / mass
        return sum(a * (b - mean) ** 2 for a, b in zip(c[i:j], x[i:j], strict=True))

    alone = {(i, j): interval(i, j) for i in range(n) for j in range(i + 1, n + 1)}
    best = [0.0] + [float("inf")] * n
    for _ in range(entries):
        best = [0.0] + [min(best[i] + alone[i, j] for i in range(j)) for j in range(1, n + 1)]
    return best[n]


def test_near_the_exact_optimum() -> None:
    ratios = []
    for seed in range(8):
        weight, stats = random_weight(seed, 1, 40), stats_of(seed, 40)
        cost = cost_of(stats)
        for bits in (2, 3, 4):
            dense = KMeans(bits)(weight, stats, torch.float32).packed.dequantize()
            least = optimum(weight[0].double().tolist(), cost.tolist(), 2**bits)
            ratios.append(float(weighted_error(weight, dense, cost)) / least)
    assert min(ratios) > 1 - 1e-4  # the books are rounded to float32
    assert sum(ratios) / len(ratios) < 1.1


@given(seed=st.integers(0, 10**6), entries=st.sampled_from([4, 8, 16]), columns=st.integers(1, 50))
@settings(deadline=None, max_examples=25)
def test_means_against_their_slow_twin(seed: int, entries: int, columns: int) -> None:
    """An iteration of Lloyd's algorithm: every value against every entry, in plain Python."""
    values, cost = random_weight(seed, 2, columns).double(), cost_of(stats_of(seed, columns))
    data = Sorted.of(values, cost.expand_as(values))
    start = random_weight(seed + 1, 2, entries).double().sort(1).values
    edges = data.edges(start)
    found = kmeans.means(data, start, edges, data.moments(edges))
    for r in range(2):
        book = start[r].tolist()
        owner = [min(range(entries), key=lambda j: (abs(float(v) - book[j]), j)) for v in values[r]]
        for j in range(entries):
            mine = [i for i in range(columns) if owner[i] == j]
            if mine:
                book[j] = float((cost[mine] * values[r, mine]).sum() / cost[mine].sum())
        torch.testing.assert_close(found[r], torch.tensor(book, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        exact = sum(float(cost[i]) * (float(values[r, i]) - float(start[r, owner[i]])) ** 2 for i in range(columns))
        assert float(data.error(start)[r]) == pytest.approx(exact, rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 10**6), entries=st.sampled_from([4, 8]), columns=st.integers(4, 40), pin=st.booleans())
@settings(deadline=None, max_examples=25)
def test_exchange_against_its_slow_twin(seed: int, entries: int, columns: int, pin: bool) -> None:
    """The cheapest merge of two neighbours and the best split of a third cluster at its mean, by trying all."""
    values, cost = random_weight(seed, 1, columns).double(), cost_of(stats_of(seed, columns))
    data = Sorted.of(values, cost[None])
    start = random_weight(seed + 1, 1, entries).double().sort(1).values
    edges = data.edges(start)
    moments = data.moments(edges)
    kept = torch.zeros(1, entries, dtype=torch.bool)
    kept[0, 1] = pin
    book = kmeans.means(data, start, edges, moments)
    found = kmeans.exchange(data, book, edges, moments, kept)[0]

    def spread(i: int, j: int) -> float:
        if i == j:
            return 0.0
        x, c = data.values[0, i:j], data.cost[0, i:j]
        return float((c * (x - (c * x).sum() / c.sum()).square()).sum())

    e = edges[0].tolist()
    loss = {
        j: spread(e[j], e[j + 2]) - spread(e[j], e[j + 1]) - spread(e[j + 1], e[j + 2])
        for j in range(entries - 1)
        if not (pin and j in (0, 1))
    }
    pair = min(loss, key=lambda j: loss[j])
    gain = {}
    for j in set(range(entries)) - {pair, pair + 1} - ({1} if pin else set()):
        cut = e[j] + int((data.values[0, e[j] : e[j + 1]] <= book[0, j]).sum())
        gain[j] = spread(e[j], e[j + 1]) - spread(e[j], cut) - spread(cut, e[j + 1])
    best = max(gain.values())
    if best > 1.001 * loss[pair] + 1e-9:
        before = sum(spread(i, j) for i, j in itertools.pairwise(e))
        assert float(data.error(found[None])[0]) <= before - best + loss[pair] + 1e-12
        assert not torch.equal(found, book[0])
        assert not pin or bool((found == book[0, 1]).any())
    elif best < loss[pair]:
        assert torch.equal(found, book[0])


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 6), size=st.sampled_from([-1, 16, 24]), zeros=st.booleans())
@settings(deadline=None, max_examples=30)
def test_no_iteration_raises_the_error(seed: int, bits: int, size: int, zeros: bool) -> None:
    values = random_weight(seed, 4, 64).double()
    if zeros:
        values[:, ::2] = 0
    data = Sorted.of(values, cost_of(stats_of(seed, 64)).expand_as(values))
    for start in (data.quantiles(2**bits, False), data.values[:, :1].repeat(1, 2**bits)):  # the second: all on one
        book, before = start, data.error(start)
        for _ in range(12):
            book = kmeans.step(data, book, False)
            assert bool((book.diff(dim=1) >= 0).all())
            after = data.error(book)
            assert bool((after <= before + 1e-12 * data.sums.second[:, -1]).all())
            before = after


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    size=st.sampled_from([-1, 16, 24, 100]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    iterations=st.sampled_from([0, 1, 100]),
)
@settings(deadline=None, max_examples=60)
def test_never_above_round_to_nearest(
    seed: int, bits: int, size: int, dtype: torch.dtype, weighted: bool, iterations: int
) -> None:
    weight, stats = random_weight(seed), stats_of(seed, 64)
    cost = cost_of(stats) if weighted else torch.ones(64).double()
    method = KMeans(bits, size, weighted, iterations)
    packed = packed_of(method(weight, stats, dtype))
    assert packed.storage == method.storage
    plain = RTN(bits, size, symmetric=False)(weight, NOTHING, dtype).packed.dequantize()
    ours, theirs = (weighted_error(weight, dense, cost) for dense in (packed.dequantize(), plain))
    assert bool((ours <= theirs * (1 + 1e-9) + 1e-12 * (weight.double().square() * cost).sum(1)).all())


@given(
    seed=st.integers(0, 10**6), bits=st.integers(2, 5), dtype=st.sampled_from(DTYPES), size=st.sampled_from([-1, 24])
)
@settings(deadline=None, max_examples=40)
def test_every_weight_takes_the_nearest_stored_entry(seed: int, bits: int, dtype: torch.dtype, size: int) -> None:
    weight, stats = random_weight(seed), stats_of(seed, 64)
    packed = packed_of(KMeans(bits, size)(weight, stats, dtype))
    assert packed.book.dtype == dtype
    assert bool((packed.book.diff(dim=2) >= 0).all())
    group = torch.arange(64) // (64 if size == -1 else size)
    distance = (weight.double()[:, :, None] - packed.book.double()[:, group]).abs()
    chosen = distance.gather(2, packed.codes.long()[..., None])[..., 0]
    assert torch.equal(chosen, distance.amin(2))


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 5), count=st.integers(1, 32), size=st.sampled_from([-1, 24]))
@settings(deadline=None, max_examples=40)
def test_few_different_values_are_exact(seed: int, bits: int, count: int, size: int) -> None:
    count = min(count, 2**bits)
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(5, count, generator=g).to(BF16)
    weight = values.gather(1, torch.randint(count, (5, 64), generator=g))
    stats = stats_of(seed, 64)
    assert stats.hessian is not None
    stats.hessian[:10] = stats.hessian[:, :10] = 0  # columns that cost nothing are exact too
    for method in (KMeans(bits, size), KMeans(bits, size, weighted=False)):
        solved = method(weight, stats, BF16)
        assert torch.equal(solved.packed.dequantize(), weight)
        assert bool((solved.row_loss == 0).all())


@pytest.mark.parametrize("size", [-1, 16, 24])
def test_rows_and_groups_are_independent(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, stats = random_weight(5), stats_of(5, 64)
    whole = packed_of(KMeans(3, size)(weight, stats, BF16))
    for r in range(len(weight)):
        alone = packed_of(KMeans(3, size)(weight[r : r + 1], stats, BF16))
        assert torch.equal(alone.codes, whole.codes[r : r + 1])
        assert torch.equal(alone.book, whole.book[r : r + 1])
    monkeypatch.setitem(kmeans._CHUNK_ELEMENTS, "cpu", 128)
    parts = packed_of(KMeans(3, size)(weight, stats, BF16))
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.book, whole.book)
    if size == -1:
        return
    for g, first in enumerate(range(0, 64, size)):
        part = weight[:, first : first + size]
        assert stats.hessian is not None
        inner = LayerStats(100, stats.hessian[first : first + size, first : first + size])
        assert torch.equal(packed_of(KMeans(3)(part, inner, BF16)).book[:, 0], whole.book[:, g])


def test_columns_that_were_never_active() -> None:
    weight, stats = random_weight(1), stats_of(1, 64)
    assert stats.hessian is not None
    stats.hessian[::3] = stats.hessian[:, ::3] = 0
    dense = KMeans(4)(weight, stats, BF16).packed.dequantize().float()
    assert bool(torch.isfinite(dense).all())
    active = torch.arange(64) % 3 != 0
    part = KMeans(4)(weight[:, active], LayerStats(100, stats.hessian[active][:, active]), BF16)
    assert float((weight - dense)[:, ::3].abs().max()) < 0.08  # dear columns decide, but these take their nearest entry
    cost = cost_of(stats)
    ours, theirs = weighted_error(weight, dense, cost), part.row_loss.double()
    assert float(ours.sum()) < 1.2 * float(
        weighted_error(weight[:, active], part.packed.dequantize(), cost[active]).sum()
    )
    assert theirs.shape == ours.shape
    none = LayerStats(0, torch.zeros(64, 64))
    assert torch.equal(KMeans(4)(weight, none, BF16).packed.dequantize(), PLAIN(weight, none, BF16).packed.dequantize())


@pytest.mark.parametrize("size", [-1, 24])
@pytest.mark.parametrize("bits", [2, 4])
def test_pruned_weights_stay_zero(bits: int, size: int) -> None:
    weight = random_weight(2) + 0.03  # zero would be no one's mean
    mask = weight.abs() > weight.abs().median()
    weight = weight * mask
    stats = stats_of(2, 64)
    packed = packed_of(KMeans(bits, size)(weight, LayerStats(100, stats.hessian, mask=mask), BF16))
    assert bool((packed.dequantize()[~mask] == 0).all())
    assert bool((packed.book == 0).any(2).all())
    plain = RTN(bits, size, symmetric=False)(weight, NOTHING, BF16).packed.dequantize()
    cost = cost_of(stats)
    assert float(weighted_error(weight, packed.dequantize(), cost).sum()) < float(
        weighted_error(weight, plain, cost).sum()
    )


def test_weighting_more_entries_and_smaller_groups_help() -> None:
    weight, stats = random_weight(3, 64, 128), stats_of(3, 128)
    cost = cost_of(stats)

    def total(method: KMeans) -> float:
        return float(weighted_error(weight, method(weight, stats, BF16).packed.dequantize(), cost).sum())

    totals = [total(KMeans(bits)) for bits in (2, 3, 4, 5)]
    assert all(totals[i + 1] < 0.5 * totals[i] for i in range(3))
    assert totals[2] < 0.8 * total(PLAIN)
    assert total(KMeans(2, 32)) < totals[0]
    plain = RTN(4, -1, symmetric=False)(weight, NOTHING, BF16).packed.dequantize()
    assert totals[2] < 0.5 * float(weighted_error(weight, plain, cost).sum())
    assert total(KMeans(4, iterations=0)) > totals[2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hessian", [True, False])
def test_losses_are_those_of_the_stored_layer(dtype: torch.dtype, hessian: bool) -> None:
    weight = random_weight(4).to(dtype)
    copy = weight.clone()
    stats = stats_of(4, 64) if hessian else NOTHING
    h = torch.eye(64).double() if stats.hessian is None else stats.hessian.double()
    method = KMeans(3, weighted=hessian)
    one, two = method(weight, stats, dtype), method(weight, stats, dtype)
    error = weight.double() - one.packed.dequantize().double()
    torch.testing.assert_close(one.row_loss.double(), ((error @ h) * error).sum(1), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(one.row_norm.double(), ((weight.double() @ h) * weight).sum(1), rtol=1e-4, atol=1e-9)
    assert torch.equal(weight, copy)
    for name, tensor in one.packed.tensors().items():
        assert torch.equal(tensor, two.packed.tensors()[name])


def test_extreme_values() -> None:
    for columns in (1, 2, 3):
        assert packed_of(PLAIN(random_weight(0, 2, columns), NOTHING, torch.float32)).codes.shape == (2, columns)
    assert torch.equal(PLAIN(torch.zeros(2, 64), NOTHING, BF16).packed.dequantize(), torch.zeros(2, 64, dtype=BF16))
    huge = random_weight(0) * 1e7  # beyond float16
    assert bool(torch.isfinite(PLAIN(huge, NOTHING, torch.float16).packed.dequantize()).all())


def test_settings() -> None:
    assert KMeans().needs == Needs(hessian=True)
    assert PLAIN.needs == Needs()
    assert KMeans(3, 64).settle([64, 256]).storage == Storage("codebook", 3, 64)
    assert KMeans().settle([64]) == KMeans()
    for bits in (1, 9):
        with pytest.raises(CompressError, match=f"bits {bits} is out of range"):
            KMeans(bits)
    with pytest.raises(CompressError, match="-1 iterations is out of range"):
        KMeans(iterations=-1)
    for size in (0, -2, 257):
        with pytest.raises(CompressError, match=f"group size {size}"):
            KMeans(group_size=size).settle([256, 64])
    broken = torch.eye(64)
    broken[3, 3] = float("nan")
    with pytest.raises(CompressError, match="NaN or infinity"):
        KMeans()(random_weight(0), LayerStats(1, broken), BF16)


def test_words() -> None:
    assert PLAIN.words([]) == ["k-means, not weighted, 16 values a row"]
    method = KMeans(3, 32)
    solved = method(random_weight(0), stats_of(0, 64), BF16)
    assert solved.figures["iterations"] > 0
    layer = {"name": "a", "shape": [6, 64], "bytes": tensor_bytes_of(solved.packed), "figures": {"iterations": 12.5}}
    assert method.words([layer, layer]) == [
        "k-means, weighted by H's diagonal, 8 values a group of 32: 7 bits a weight",
        "Lloyd's algorithm: 12.5 iterations on average, at most 100",
    ]
