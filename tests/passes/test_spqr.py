"""SpQR against slow twins written from the paper, and the properties that it must have."""

from __future__ import annotations

import itertools
from dataclasses import replace
from math import inf

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.packed.bilevel import BiLevel
from compress.packed.outliers import Outliers
from compress.packed.uniform import group_index
from compress.passes.gptq import GPTQ
from compress.passes.spqr import SpQR
from compress.solvers import spqr as spqr_sweep
from compress.types import LayerStats, Solved, bits_per_weight, tensor_bytes_of

BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]


def problem(seed: int, rows: int = 24, columns: int = 64, outliers: int = 0) -> tuple[Tensor, Tensor]:
    """Weights, some of them far out, and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(200, columns, generator=g) @ mix * torch.exp(0.7 * torch.randn(columns, generator=g))
    w = torch.randn(rows, columns, generator=g) * 0.05
    far = torch.randperm(rows * columns, generator=g)[:outliers]
    w.view(-1)[far] *= 12
    return w, x.T @ x / 200


def solve(method: SpQR | GPTQ, weight: Tensor, hessian: Tensor, dtype: torch.dtype = BF16) -> Solved:
    return method(weight, LayerStats(1000, hessian), dtype)


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """float64 [rows]: e H e^T."""
    e = error.double()
    return ((e @ hessian.double()) * e).sum(1)


def parts(solved: Solved) -> tuple[BiLevel, Tensor]:
    """The base, and where the outliers are."""
    packed = solved.packed
    if isinstance(packed, BiLevel):
        return packed, torch.zeros(packed.shape, dtype=torch.bool)
    assert isinstance(packed, Outliers)
    assert isinstance(packed.inner, BiLevel)
    mask = torch.zeros(packed.shape, dtype=torch.bool)
    mask[packed.positions()] = True
    return packed.inner, mask


def grids(base: BiLevel) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each weight, float32 [out, in]."""
    groups = group_index(base.shape[1], base.group_size)
    return base.scale.values()[:, groups], base.zero.values()[:, groups]


def rounded(wish: Tensor, base: BiLevel, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """float64: round-to-nearest on a base's grid, as stored; outliers as they are, in their stored dtype."""
    scale, zero = grids(base)
    code = (wish / scale + zero).round().clamp(0, 2**base.bits - 1)
    return torch.where(mask, wish.float(), ((code - zero) * scale).float()).to(dtype).double()


def importance_of(hessian: Tensor, percent: float) -> Tensor:
    """float64 [in]: 1 / U_jj^2 for the visit by falling diagonal. U_jj^2 is the first entry of the inverse of what is
    left of H when the columns before j are gone."""
    h = hessian.double() + percent * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    out = torch.empty(len(h), dtype=torch.float64)
    for n, j in enumerate(order):
        left = order[n:]
        out[j] = 1 / torch.linalg.inv(h[left][:, left])[0, 0]
    return out


def by_elimination(weight: Tensor, hessian: Tensor, percent: float, base: BiLevel, mask: Tensor) -> Tensor:
    """Algorithm 1 with the grids and outliers given: the explicit inverse, one row and column eliminated a step."""
    h = hessian.double() + percent * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    w, inverse = weight.double().clone(), torch.linalg.inv(h)
    for i in torch.argsort(hessian.diagonal(), descending=True, stable=True):
        q = rounded(w, base, mask, torch.float32)[:, i]
        w -= ((w[:, i] - q) / inverse[i, i])[:, None] * inverse[i]
        w[:, i] = q
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
    return w


@pytest.mark.parametrize("seed", range(6))
def test_sweep_is_gptq_with_outliers_left_alone(seed: int) -> None:
    weight, hessian = problem(seed, outliers=20)
    method = SpQR(descent=0, outlier_threshold=[inf, 0.1, 0.5][seed % 3])
    solved = solve(method, weight, hessian, torch.float32)
    base, mask = parts(solved)
    expected = by_elimination(weight, hessian, method.damp_percent, base, mask)
    got = solved.packed.dequantize().double()
    fell_back = (got - rounded(weight, base, mask, torch.float32)).abs().amax(1) == 0
    assert int(fell_back.sum()) <= 2
    torch.testing.assert_close(got[~fell_back], expected[~fell_back], rtol=1e-4, atol=1e-6)


def brute_scores(weight: Tensor, importance: Tensor, bits: int, size: int) -> Tensor:
    """Leave-one-out in float64, one weight at a time."""

    def errors(of: list[int], row: Tensor) -> float:
        w = row[of].double()
        low, high = min(0.0, *w.tolist()), max(0.0, *w.tolist())
        scale = (high - low) / (2**bits - 1) or 1.0
        q = ((w - low) / scale).round() * scale + low
        return float(((w - q).square() * importance[of].double()).sum())

    out = torch.empty(weight.shape, dtype=torch.float64)
    for r, row in enumerate(weight):
        for start in range(0, weight.shape[1], size):
            group = list(range(start, min(start + size, weight.shape[1])))
            for c in group:
                out[r, c] = errors(group, row) - errors([x for x in group if x != c], row)
    return out


@pytest.mark.parametrize(("columns", "size", "bits"), [(32, 16, 3), (20, 8, 2), (27, 8, 4)])
def test_leave_one_out_is_the_brute_force(columns: int, size: int, bits: int) -> None:
    weight, hessian = problem(columns, 12, columns, outliers=12)
    weight[0, :size] = weight[0, :size].abs()  # 0 ends the span
    weight[1, :size] = 0.3  # nothing but the largest
    weight[2, :size] = 0.0
    weight[3, 0], weight[3, 1] = weight[3, :size].amax(), weight[3, :size].amin()  # both ends twice
    importance = importance_of(hessian, 0.01).float()
    got = spqr_sweep.leave_one_out(weight, importance, bits, size)
    expected = brute_scores(weight, importance, bits, size)
    torch.testing.assert_close(got.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("seed", range(3))
def test_outliers_are_those_above_the_relative_threshold(seed: int) -> None:
    weight, hessian = problem(seed, outliers=15)
    method = SpQR(outlier_threshold=0.2)
    importance = importance_of(hessian, method.damp_percent)
    limit = method.outlier_threshold * float((weight.double().square() * importance).mean())
    likely = brute_scores(weight, importance, 3, 16) > limit
    scale, zero = spqr_sweep.fit(weight, likely, importance.float(), 3, 16, 3, 3, 16, torch.float32, True)
    base = BiLevel.of(torch.zeros(weight.shape, dtype=torch.uint8), scale, zero, 3, 16, torch.float32)
    error = weight.double() - rounded(weight, base, torch.zeros_like(likely), torch.float32)
    expected = error.square() * importance > limit
    mask = parts(solve(method, weight, hessian, torch.float32))[1]
    assert 10 < int(mask.sum()) < 200
    assert int((mask != expected).sum()) <= 1  # a search between equals may differ in the last bit


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_zero_keeps_every_weight(dtype: torch.dtype) -> None:
    weight, hessian = problem(3, 20, 40)
    weight = weight.to(dtype)
    solved = solve(SpQR(outlier_threshold=0, descent=2), weight, hessian, dtype)
    assert torch.equal(solved.packed.dequantize(), weight)
    assert solved.figures["outliers"] == 1
    assert bool((solved.row_loss == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_threshold_inf_has_no_outliers(dtype: torch.dtype) -> None:
    weight, hessian = problem(4, outliers=10)
    method = SpQR(outlier_threshold=inf)
    solved = solve(method, weight, hessian, dtype)
    assert isinstance(solved.packed, BiLevel)
    assert solved.packed.storage == method.storage
    assert solved.figures["outliers"] == solved.figures["outlier_bits"] == 0
    # so high that none is above: the same codes inside `Outliers`
    high = solve(replace(method, outlier_threshold=1e30), weight, hessian, dtype)
    assert isinstance(high.packed, Outliers)
    assert torch.equal(high.packed.dequantize(), solved.packed.dequantize())


cases = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4]),
        "group_size": st.sampled_from([8, 16, 24]),
        "qq_scale_bits": st.sampled_from([2, 3, 16]),
        "qq_zero_bits": st.sampled_from([3, 5, 16]),
        "qq_groupsize": st.sampled_from([4, 16]),
        "outlier_threshold": st.sampled_from([0.0, 0.05, 0.3, inf]),
        "act_order": st.booleans(),
        "scale_search": st.booleans(),
        "descent": st.integers(0, 2),
    }
)


@given(cases, st.integers(0, 10**6), st.sampled_from(DTYPES), st.integers(1, 20), st.integers(25, 40))
@settings(deadline=None, max_examples=40)
def test_losses_are_true_and_never_above_round_to_nearest(
    case: dict[str, int], seed: int, dtype: torch.dtype, rows: int, columns: int
) -> None:
    weight, hessian = problem(seed, rows, columns, outliers=5)
    method = SpQR(**case).settle([columns])  # type: ignore[arg-type]
    before = weight.clone()
    solved = solve(method, weight, hessian, dtype)
    assert torch.equal(weight, before)
    assert solved.packed.storage == method.storage
    base, mask = parts(solved)
    assert bool((base.scale.values() > 0).all())
    dense = solved.packed.dequantize()
    assert dense.dtype == dtype
    loss = quadratic(weight - dense.float(), hessian)
    norm = quadratic(weight, hessian)
    torch.testing.assert_close(solved.row_loss.double(), loss, rtol=1e-3, atol=1e-6 * float(norm.max()))
    torch.testing.assert_close(solved.row_norm.double(), norm, rtol=1e-4, atol=0)
    plain = quadratic(weight - rounded(weight, base, mask, dtype), hessian)
    assert bool((loss <= plain * 1.0001 + 1e-6 * norm).all())


@given(
    seed=st.integers(0, 10**6),
    bits=st.sampled_from([2, 3, 8]),
    spread=st.sampled_from([0.0, 1e-4, 1.0, 1e4]),
    size=st.sampled_from([1e-30, 1e-7, 1e-3, 1.0, 1e3]),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 20),
)
@settings(deadline=None, max_examples=60)
def test_second_level_scales_are_positive_and_near(
    seed: int, bits: int, spread: float, size: float, dtype: torch.dtype, rows: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    raw = (1 + spread * torch.rand(rows, 3, generator=g)) * size
    ignore = torch.rand(rows, 3, generator=g) < 0.2
    raw[ignore] = 0.0
    found = spqr_sweep.second_level(raw, ignore, bits, 8, dtype)
    values = found.values()
    assert bool((values > 0).all())
    assert bool(values.isfinite().all())
    for first in range(0, rows, 8):
        for c in range(3):
            mine = raw[first : first + 8, c][~ignore[first : first + 8, c]]
            if len(mine) and (dtype != torch.float16 or (size >= 1e-3 and float(mine.max()) < 6e4)):
                step = (mine.max() - mine.min()) / (2**bits - 1)
                got = values[first : first + 8, c][~ignore[first : first + 8, c]]
                # half a step, and what 16 bits lose of the step and of the offset
                allowed = step / 2 + 0.012 * mine.max() + 1e-20
                assert bool(((got - mine).abs() <= allowed).all())


def test_odd_weights_and_dead_columns() -> None:
    weight, hessian = problem(5, 20, 48)
    weight[3] = 0.0
    weight[4] = 0.25
    weight[:, 20:36] = 0.0
    for dead in ([], [0, 7], list(range(48))):
        h = hessian.clone()
        h[dead], h[:, dead] = 0.0, 0.0
        for method in (SpQR(), SpQR(average_bits=6.0), SpQR(outlier_threshold=inf)):
            solved = solve(method, weight, h)
            dense = solved.packed.dequantize().float()
            assert bool(dense.isfinite().all())
            assert bool(solved.row_loss.isfinite().all())
            assert any(f"{len(dead)} of 48 input columns" in note for note in solved.notes) == bool(dead)
            base, mask = parts(solved)
            nearest = rounded(weight, base, mask, BF16)
            assert torch.equal(dense[:, dead].double(), nearest[:, dead])  # no update reaches them, none leaves them


def test_zeros_and_one_row() -> None:
    hessian = problem(6)[1]
    for weight in (torch.zeros(5, 64), torch.full((1, 64), 0.1), problem(6, 1)[0]):
        for method in (SpQR(), SpQR(average_bits=12.0), SpQR(outlier_threshold=inf)):
            solved = solve(method, weight, hessian)
            error = (solved.packed.dequantize().float() - weight).abs().max()
            assert float(error) <= max(0.5 * float(weight.abs().max()), 1e-9)


@pytest.mark.parametrize(("target", "rows", "bits"), [(5.5, 48, 3), (4.6, 64, 3), (4.4, 64, 2), (9.0, 32, 4)])
def test_average_bits_are_met_from_below(target: float, rows: int, bits: int) -> None:
    weight, hessian = problem(rows, rows, 128, outliers=60)
    method = SpQR(bits=bits, average_bits=target).settle([128])
    for dtype in (BF16, torch.float16):
        solved = solve(method, weight, hessian, dtype)
        assert not solved.notes or all("bits" not in note for note in solved.notes)
        assert target - 0.02 < bits_per_weight(solved.packed) <= target
        assert solved.figures["average_bits"] == bits_per_weight(solved.packed)


def test_average_bits_out_of_reach() -> None:
    with pytest.raises(
        CompressError, match=r"average bits 3.5 is less than the 3.75\d that a layer with in_features 256"
    ):
        SpQR(average_bits=3.5).settle([256, 512])
    weight, hessian = problem(1, 3, 64)  # few rows share little
    solved = solve(SpQR(average_bits=4.2), weight, hessian)
    assert solved.figures["outliers"] == 0
    assert any("without any outlier, above the 4.2 asked for" in note for note in solved.notes)


def test_figures_and_words() -> None:
    method = SpQR()
    layers = []
    for seed, rows in ((1, 32), (2, 64)):
        solved = solve(method, *problem(seed, rows, 128, outliers=40))
        mask = parts(solved)[1]
        assert solved.figures["outliers"] == int(mask.sum()) / mask.numel()
        assert solved.figures["outlier_bits"] == 8 * (4 * int(mask.sum()) + 4 * (rows + 1)) / mask.numel()
        size = tensor_bytes_of(solved.packed)
        layers.append({"name": f"l{seed}", "shape": [rows, 128], "bytes": size, "figures": solved.figures})
    share = sum(x["figures"]["outliers"] * x["shape"][0] for x in layers) / 96
    total = 8 * sum(x["bytes"] for x in layers) / (96 * 128)
    line, most = method.words(layers)
    assert line.startswith(f"{share:.2%} of the weights are outliers, {total:.2f} bits a weight on average: 3 code + ")
    assert line.endswith("outliers (counted from stored bytes)")
    assert most.startswith("most outliers: ")
    assert method.words([]) == []
    assert len(SpQR(outlier_threshold=inf).words(layers)) == 1


def test_better_than_gptq_at_equal_bits_on_planted_outliers() -> None:
    for seed in range(4):
        weight, hessian = problem(seed, 64, 256, outliers=160)  # one weight in a hundred
        ours = solve(SpQR(average_bits=4.25), weight, hessian)
        theirs = solve(GPTQ(4, 64, symmetric=True, scale_search=False, refit=False, descent=0), weight, hessian)
        assert bits_per_weight(ours.packed) <= bits_per_weight(theirs.packed)
        assert float(ours.row_loss.sum()) < 0.5 * float(theirs.row_loss.sum())


def test_outliers_act_order_search_and_descent_help() -> None:
    def total(method: SpQR) -> float:
        return sum(float(solve(method, *problem(s, 32, 96, outliers=30)).row_loss.sum()) for s in range(4))

    usual = total(SpQR())
    assert usual < 0.7 * total(SpQR(outlier_threshold=inf))
    assert usual < 0.99 * total(SpQR(act_order=False))
    assert usual < 0.98 * total(SpQR(scale_search=False))
    assert usual < 0.99 * total(SpQR(descent=0))
    by_budget = [total(SpQR(average_bits=b)) for b in (4.5, 5.0, 6.0, 8.0)]
    assert by_budget == sorted(by_budget, reverse=True)
    shares = [solve(SpQR(outlier_threshold=t), *problem(9)).figures["outliers"] for t in (0.0, 0.05, 0.2, 1.0)]
    assert shares == sorted(shares, reverse=True)


@pytest.mark.parametrize("threshold", [inf, 0.2])
def test_descent_never_raises_the_loss_that_it_sees(threshold: float) -> None:
    weight, hessian = problem(7, 32, 64, outliers=20)
    percent = 0.03
    damped = hessian + percent * hessian.diagonal().mean() * torch.eye(64)
    losses = [
        quadratic(
            weight - solve(SpQR(outlier_threshold=threshold, descent=n), weight, hessian).packed.dequantize(), damped
        )
        for n in range(3)
    ]
    for before, after in itertools.pairwise(losses):
        assert bool((after <= before * 1.0001).all())


@pytest.mark.parametrize("threshold", [inf, 0.2])
def test_block_size_changes_nothing(threshold: float) -> None:
    weight, hessian = problem(8, 24, 72, outliers=15)
    usual = solve(SpQR(outlier_threshold=threshold), weight, hessian).packed
    for size in (1, 16, 50, 1000):
        other = solve(SpQR(outlier_threshold=threshold, block_size=size), weight, hessian).packed
        for name, tensor in usual.tensors().items():
            if name == "outlier_values":  # sums in another order
                torch.testing.assert_close(other.tensors()[name], tensor, rtol=1e-2, atol=0)
            else:
                assert torch.equal(other.tensors()[name], tensor)


def test_runs_of_rows_are_independent_without_outliers() -> None:
    weight, hessian = problem(9, 40, 48)
    for method in (SpQR(outlier_threshold=inf), SpQR(outlier_threshold=inf, qq_scale_bits=16, qq_zero_bits=16)):
        unit = method.row_unit
        assert unit in (1, 16)
        together = solve(method, weight, hessian).packed
        for start in range(0, 40, 16):
            stop = min(start + 16, 40)
            alone = solve(method, weight[start:stop], hessian).packed
            assert torch.equal(alone.dequantize(), together.rows(start, stop).dequantize())


def test_same_input_same_bytes() -> None:
    weight, hessian = problem(10, outliers=10)
    for method in (SpQR(), SpQR(average_bits=5.0)):
        one, two = (solve(method, weight, hessian).packed.tensors() for _ in range(2))
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_settings() -> None:
    assert SpQR().needs.hessian
    assert SpQR().row_unit == SpQR(outlier_threshold=inf, average_bits=4.0).row_unit == 0
    assert SpQR(outlier_threshold=inf).row_unit == 16
    assert SpQR().storage.kind == "outliers"
    assert SpQR().storage.inner == SpQR(outlier_threshold=inf).storage
    assert SpQR().settle([256, 100]) == SpQR()
    bad = [
        (SpQR, {"bits": 1}, "--bits: bits 1 is out of range"),
        (SpQR, {"bits": 9}, "--bits: bits 9"),
        (SpQR, {"group_size": 4}, "--group-size: group size 4 is out of range; use 8 to 128"),
        (SpQR, {"qq_scale_bits": 9}, "--qq-scale-bits: bits 9 is out of range; use 2 to 8, or 16"),
        (SpQR, {"qq_zero_bits": 1}, "--qq-zero-bits: bits 1"),
        (SpQR, {"qq_groupsize": 1}, "--qq-groupsize: second-level group size 1"),
        (SpQR, {"outlier_threshold": -0.1}, "--outlier-threshold: outlier threshold -0.1"),
        (SpQR, {"outlier_threshold": float("nan")}, "--outlier-threshold"),
        (SpQR, {"average_bits": 3.0}, "--average-bits: average bits 3 is out of range at 3 bits a code"),
        (SpQR, {"average_bits": 17.0}, "--average-bits"),
        (SpQR, {"damp_percent": 0.0}, "--damp-percent"),
        (SpQR, {"block_size": 0}, "--block-size"),
        (SpQR, {"descent": -1}, "--descent"),
    ]
    for make, fields, message in bad:
        with pytest.raises(CompressError) as caught:
            make(**fields)  # type: ignore[arg-type]
        assert message in str(caught.value)
    with pytest.raises(
        CompressError, match="group size 128 is larger than the widest layer's in_features 64; use 64 or less"
    ):
        SpQR(group_size=128).settle([64])


def test_pruned_weights_are_refused() -> None:
    weight, hessian = problem(11)
    with pytest.raises(CompressError, match="the weights were pruned"):
        SpQR()(weight, LayerStats(10, hessian, mask=weight > 0), BF16)
    hessian[0, 0] = float("nan")
    with pytest.raises(CompressError, match="NaN or infinity"):
        SpQR()(weight, LayerStats(10, hessian), BF16)
