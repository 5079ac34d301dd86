"""SparseGPT against a slow twin written from the paper, brute force, GPTQ, and the counts that it promises."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.packed.dense import Dense
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.solvers import columns, masks
from compress.solvers.hessian import factorise, refit_kept
from compress.solvers.masks import Choice, Pattern
from compress.types import LayerStats, Needs, Solved, Storage, tensor_bytes_of

BF16, FP32 = torch.bfloat16, torch.float32
#: the published algorithm and nothing more
PLAIN = SparseGPT(act_order="none", even_blocks=True, refit=False)


def problem(seed: int, rows: int = 12, columns: int = 48, samples: int = 300) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(samples, columns, generator=g) @ mix * torch.exp(0.7 * torch.randn(columns, generator=g))
    return torch.randn(rows, columns, generator=g) * 0.05, x.T @ x / samples


def solve(method: SparseGPT, weight: Tensor, hessian: Tensor | None, dtype: torch.dtype = FP32, **stats: Any) -> Solved:
    return method(weight, LayerStats(1000, hessian, **stats), dtype)


def sparse_of(solved: Solved) -> Sparse:
    assert isinstance(solved.packed, Sparse)
    return solved.packed


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """float64 [rows]: e H e^T."""
    e = error.double()
    return ((e @ hessian.double()) * e).sum(1)


def loss(solved: Solved, weight: Tensor, hessian: Tensor) -> float:
    return float(quadratic(weight.double() - solved.packed.dequantize().double(), hessian).sum())


def as_published(
    weight: Tensor, hessian: Tensor, block: int, count_of: Any, nm: tuple[int, int] | None = None, damp: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 in float64: H^-1 inverted, its upper Cholesky factor, one column at a time, no lazy update.

    count_of(start, stop): how many weights of the columns start..stop-1 go; nm: zeros, of. Returns weights and mask.
    """
    w = weight.double().clone()
    h = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    mask = torch.ones_like(w, dtype=torch.bool)
    length = nm[1] if nm else block
    for i in range(w.shape[1]):
        if i % length == 0:
            stop = min(i + length, w.shape[1])
            score = w[:, i:stop] ** 2 / u.diagonal()[i:stop] ** 2
            if nm:
                lowest = torch.topk(score, nm[0], dim=1, largest=False).indices
                mask[:, i:stop] = torch.ones_like(score, dtype=torch.bool).scatter(1, lowest, False)
            else:
                count = count_of(i, stop)
                limit = score.flatten().sort().values[count - 1] if count else -1.0
                mask[:, i:stop] = score > limit
        error = torch.where(mask[:, i], 0.0, w[:, i]) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
        w[~mask[:, i], i] = 0.0
    return w, mask


@pytest.mark.parametrize("block", [16, 48])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_equals_the_published_algorithm(sparsity: float, block: int) -> None:
    total = round(sparsity * 12 * 48)

    def evenly(start: int, stop: int) -> int:
        return round(total * stop / 48) - round(total * start / 48)

    for seed in range(4):
        weight, hessian = problem(seed)
        packed = sparse_of(solve(replace(PLAIN, sparsity=sparsity, mask_block_size=block), weight, hessian))
        wanted, mask = as_published(weight, hessian, block, evenly)
        assert torch.equal(packed.mask, mask)
        torch.testing.assert_close(packed.dequantize().double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize("ordered", [True, False])
def test_equals_the_published_algorithm_with_a_pattern(pattern: str, ordered: bool) -> None:
    """In natural order; and by falling sums of H's diagonal, which is natural order on columns moved beforehand."""
    zeros, of = (int(x) for x in pattern.split(":"))
    other = 0
    for seed in range(4):
        weight, hessian = problem(seed)
        method = SparseGPT(pattern=pattern, act_order="static" if ordered else "none", refit=False)
        solved = solve(method, weight, hessian)
        order = torch.arange(48)
        if ordered:
            heads = hessian.diagonal().reshape(-1, of).sum(1).argsort(descending=True)
            order = (heads[:, None] * of + torch.arange(of)).flatten()
        moved, chosen = as_published(weight[:, order], hessian[order][:, order], 0, None, (zeros, of))
        wanted, mask = torch.empty_like(moved), torch.empty_like(chosen)
        wanted[:, order], mask[:, order] = moved, chosen
        close = ((sparse_of(solved).dequantize().double() - wanted).abs() < 1e-4).all(1)
        other += int((~close).sum())  # rows that took magnitude pruning's
        plain = quadratic(weight * ~masks.by_score(weight.abs(), Pattern(of - zeros, of)), hessian)
        ours = quadratic(weight.double() - wanted, hessian)
        assert torch.equal(close, ours <= plain)
        assert torch.equal(sparse_of(solved).mask[close], mask[close])
    assert other < 8


def test_masks_share_by_score() -> None:
    """What each block bears comes from the scores before the sweep; the rest is the published algorithm."""
    weight, hessian = problem(1)
    h = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(48, dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    score = weight.double().abs() / u.diagonal()
    drop = score <= score.flatten().sort().values[round(0.6 * 12 * 48) - 1]
    method = replace(PLAIN, sparsity=0.6, mask_block_size=16, even_blocks=False)
    packed = sparse_of(solve(method, weight, hessian))
    wanted, mask = as_published(weight, hessian, 16, lambda a, b: int(drop[:, a:b].sum()))
    assert torch.equal(packed.mask, mask)
    torch.testing.assert_close(packed.dequantize().double(), wanted, rtol=1e-3, atol=1e-5)
    even = sparse_of(solve(replace(method, even_blocks=True), weight, hessian))
    assert not torch.equal(even.mask, mask)


METHODS = ["sparsegpt", "wanda", "magnitude"]
PATTERNS = ["2:4", "4:8", "1:4", "3:4", "1:2", "5:6", "7:12"]


@given(
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 9),
    groups=st.integers(1, 3),
    what=st.one_of(st.sampled_from(PATTERNS), st.floats(0, 0.95)),
    method=st.sampled_from(METHODS),
    bits=st.sampled_from([None, 2, 4]),
    order=st.sampled_from(["static", "none"]),
    ties=st.booleans(),
    block=st.sampled_from([1, 5, 128]),
    even=st.booleans(),
)
@settings(deadline=None, max_examples=100)
def test_exact_counts(
    seed: int, rows: int, groups: int, what: str | float, method: str, bits: int | None, order: str, ties: bool,
    block: int, even: bool,
) -> None:  # fmt: skip
    """Whatever the weights: as many zeros as promised, where promised, in as many bytes as promised."""
    weight, hessian = problem(seed, rows, 24 * groups)
    if ties:
        weight = weight.sign() * 0.5
        weight[:, ::3] = 0
    chosen: dict[str, Any] = {"pattern": what} if isinstance(what, str) else {"sparsity": what}
    setting = SparseGPT(
        **chosen, method=method, bits=bits, act_order=order, mask_block_size=block, even_blocks=even  # type: ignore[arg-type]
    ).settle([24 * groups])  # fmt: skip
    given_ = hessian if setting.needs.hessian else None
    solved = solve(setting, weight, given_, BF16)
    packed = sparse_of(solved)
    columns_ = 24 * groups
    if isinstance(what, str):
        zeros, of = (int(x) for x in what.split(":"))
        assert bool(((~packed.mask).reshape(rows, -1, of).sum(-1) == zeros).all())
    elif method == "wanda":
        assert bool(((~packed.mask).sum(1) == round(what * columns_)).all())
    else:
        assert int((~packed.mask).sum()) == round(what * rows * columns_)
    dense = packed.dequantize()
    assert dense.dtype == BF16
    assert bool((dense[~packed.mask] == 0).all())
    assert bool(torch.isfinite(dense).all())
    assert packed.storage == setting.storage
    assert Sparse.stored_bytes(setting.storage, packed.shape, BF16) == tensor_bytes_of(packed)
    back = Sparse.from_tensors(packed.tensors(), packed.storage, packed.shape, BF16)
    assert torch.equal(back.dequantize(), dense)
    assert solved.figures["sparsity"] == pytest.approx(float((dense == 0).double().mean()))
    assert solved.figures["pruned"] == pytest.approx(float((~packed.mask).double().mean()), abs=1e-6)
    error = weight.double() - dense.double()
    wanted = error.square().sum(1) if given_ is None else quadratic(error, hessian)
    torch.testing.assert_close(solved.row_loss.double(), wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_between_the_optimum_and_magnitude(kept: int) -> None:
    """One row, every mask of so many weights with its exact least squares, in float64."""
    ours, plain, best = [], [], []
    for seed in range(30):
        n = 4 + seed % 3
        weight, hessian = problem(seed, 1, n)
        method = SparseGPT(sparsity=1 - kept / n, damp_percent=1e-6)
        solved = solve(method, weight, hessian)
        assert int(sparse_of(solved).mask.sum()) == kept
        losses = []
        for free in itertools.combinations(range(n), kept):
            at, h = list(free), hessian.double()
            w = torch.zeros(1, n, dtype=torch.float64)
            w[0, at] = torch.linalg.solve(h[at][:, at], h[at] @ weight[0].double())
            losses.append(float(quadratic(weight - w, hessian)))
        best.append(min(losses))
        ours.append(loss(solved, weight, hessian))
        plain.append(loss(solve(replace(method, method="magnitude"), weight, hessian), weight, hessian))
        assert ours[-1] >= best[-1] * (1 - 1e-4)
    assert sum(best) < sum(ours) < 0.6 * sum(plain)


def test_pruned_error_is_compensated_in_full() -> None:
    """With the mask at hand, what is kept after the last pruned column is the least-squares optimum."""
    weight, hessian = problem(2, 4, 16)
    mask = torch.ones(4, 16, dtype=torch.bool)
    mask[:, [0, 2, 3]] = False
    damped, factor, _ = factorise(hessian, torch.zeros(16, dtype=torch.bool), 0.01)
    none = Choice(Pattern(), 16)
    moved, kept = columns.prune(weight.t().contiguous(), factor, None, None, 0, FP32, 8, none, mask.t().contiguous())
    assert bool(kept.all())
    free = [i for i in range(16) if i > 3]
    h, w = damped.double(), weight.double()
    fixed = w - moved.t().double()
    wanted = w[:, free] + torch.linalg.solve(h[free][:, free], h[free][:, :4] @ fixed[:, :4].T).T
    torch.testing.assert_close(moved.t()[:, free].double(), wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("pattern", [None, "2:4", "4:8"])
@pytest.mark.parametrize("bits", [None, 3])
def test_methods_in_the_order_of_the_papers(pattern: str | None, bits: int | None) -> None:
    totals = []
    for method in METHODS:
        setting = SparseGPT(pattern=pattern, method=method, bits=bits, group_size=16 if bits else None)  # type: ignore[arg-type]
        problems = [problem(seed, 24, 64) for seed in range(8)]
        totals.append(sum(loss(solve(setting, w, h, BF16), w, h) for w, h in problems))
    assert totals[0] < 0.8 * totals[1]
    assert totals[1] < 0.8 * totals[2]


@pytest.mark.parametrize("change", [{"pattern": "2:4", "act_order": "static"}, {"even_blocks": False}])
def test_what_goes_beyond_the_paper_helps_on_average(change: dict[str, Any]) -> None:
    base = replace(PLAIN, pattern=change.get("pattern"), mask_block_size=16)
    problems = [problem(seed, 24, 64) for seed in range(8)]
    totals = [
        sum(loss(solve(m, w, h), w, h) for w, h in problems) for m in (base, replace(base, **change))
    ]  # fmt: skip
    assert totals[1] < totals[0]


@pytest.mark.parametrize("pattern", [None, "2:4", "3:6"])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("order", ["static", "none"])
def test_lazy_blocks_change_nothing(pattern: str | None, bits: int | None, order: str) -> None:
    weight, hessian = problem(3, 10, 120)
    size = 24 if bits else None
    method = SparseGPT(pattern=pattern, bits=bits, group_size=size, act_order=order, mask_block_size=32)  # type: ignore[arg-type]
    one = sparse_of(solve(method, weight, hessian, BF16))
    for block in (1, 7, 50, 1000):
        other = sparse_of(solve(replace(method, block_size=block), weight, hessian, BF16))
        assert torch.equal(one.mask, other.mask)
        if bits:
            assert torch.equal(one.dequantize(), other.dequantize())
        else:  # a sum in another order may round to the neighbour
            torch.testing.assert_close(one.dequantize(), other.dequantize(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("order", ["static", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 16])
@pytest.mark.parametrize("extras", [True, False])
def test_joint_without_sparsity_is_gptq(order: str, symmetric: bool, size: int, extras: bool) -> None:
    """Bit for bit."""
    weight, hessian = problem(4, 16, 80)
    shared: dict[str, Any] = {
        "bits": 3, "group_size": size, "symmetric": symmetric, "act_order": order, "scale_search": extras,
        "refit": extras, "descent": int(extras), "block_size": 32,
    }  # fmt: skip
    ours = solve(SparseGPT(sparsity=0.0, **shared), weight, hessian, BF16)
    theirs = GPTQ(**shared)(weight, LayerStats(1000, hessian), BF16)
    assert bool(sparse_of(ours).mask.all())
    inner = sparse_of(ours).inner
    for (name, a), (other, b) in zip(inner.tensors().items(), theirs.packed.tensors().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert torch.equal(ours.row_loss, theirs.row_loss)
    assert ours.notes == theirs.notes


@pytest.mark.parametrize("refit", [False, True])
def test_joint_and_one_after_the_other(refit: bool) -> None:
    """Pruning and rounding in one sweep, against rounding what pruning left (the zeros kept).

    As published the one sweep wins; the refit of what the mask leaves brings both to the same place.
    """
    together = apart = nearest = 0.0
    for seed in range(8):
        weight, hessian = problem(seed, 16, 64)
        together += loss(
            solve(SparseGPT(pattern="2:4", bits=3, group_size=16, refit=refit), weight, hessian, BF16), weight, hessian
        )
        first = sparse_of(solve(SparseGPT(pattern="2:4", refit=refit), weight, hessian, BF16))
        pruned = first.dequantize().float()
        stats = LayerStats(1000, hessian, mask=first.mask)
        second = GPTQ(3, 16, refit=refit)(pruned, stats, BF16)
        assert isinstance(second.packed, UniformGrid)
        chain = Sparse.wrap(first.mask, second.packed, like=first)
        assert bool((chain.dequantize()[~first.mask] == 0).all())
        apart += float(quadratic(weight - chain.dequantize().float(), hessian).sum())
        rounded = RTN(3, 16)(pruned, stats, BF16)
        assert isinstance(rounded.packed, UniformGrid)
        Sparse.wrap(first.mask, rounded.packed, like=first).tensors()  # asserts that zeros rounded to zeros
        nearest += float(quadratic(weight - rounded.packed.dequantize().float(), hessian).sum())
    assert together < (1.05 if refit else 1.0) * apart
    assert apart < nearest


@pytest.mark.parametrize("bits", [None, 3])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_no_row_is_worse_than_magnitude(pattern: str, bits: int | None) -> None:
    """Few samples and much damp: where moving weights does not pay, rows keep magnitude pruning's mask."""
    fell = 0
    for seed in range(6):
        weight, hessian = problem(seed, 32, 24, samples=6)
        setting = SparseGPT(pattern=pattern, bits=bits, damp_percent=3.0, group_size=8 if bits else None, refit=False)
        solved = solve(setting, weight, hessian)
        mask = masks.by_score(weight.abs(), setting.kept_pattern)
        plain = weight * mask
        packed = sparse_of(solved)
        if isinstance(packed.inner, UniformGrid):
            scale = packed.inner.scales[:, packed.inner.column_groups()]
            plain = (plain / scale).round().clamp(-4, 3) * scale
        assert bool((solved.row_loss <= quadratic(weight - plain, hessian) * (1 + 1e-5) + 1e-9).all())
        notes = [re.match(r"(\d+) of 32 rows kept magnitude", note) for note in solved.notes]
        fell += sum(int(found[1]) for found in notes if found)
    assert fell > 0


@pytest.mark.parametrize("setting", [
    SparseGPT(pattern="2:4"), SparseGPT(pattern="4:8", bits=3, group_size=16), SparseGPT(method="wanda"),
    SparseGPT(pattern="2:4", method="magnitude"), SparseGPT(method="wanda", bits=4, group_size=-1),
])  # fmt: skip
def test_rows_are_independent(setting: SparseGPT) -> None:
    assert setting.row_unit == 1
    weight, hessian = problem(5, 12, 32)
    whole = sparse_of(solve(setting, weight, hessian, BF16))
    for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
        part = sparse_of(solve(setting, weight[rows], hessian, BF16))
        assert torch.equal(part.mask, whole.mask[rows])
        torch.testing.assert_close(part.dequantize(), whole.dequantize()[rows], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("setting", [
    SparseGPT(), SparseGPT(pattern="2:4"), SparseGPT(bits=3, group_size=16), SparseGPT(method="wanda"),
    SparseGPT(pattern="2:4", bits=4, group_size=-1), SparseGPT(method="magnitude", bits=4, group_size=16),
])  # fmt: skip
@pytest.mark.parametrize("rows", [1, 12])
def test_inputs_stay_as_they_are_and_answers_repeat(setting: SparseGPT, rows: int) -> None:
    weight, hessian = problem(6, 12, 32)
    weight = weight[:rows]
    hessian[4], hessian[:, 4] = 0, 0
    earlier = torch.rand(rows, 32) > 0.2
    copies = weight.clone(), hessian.clone(), earlier.clone()
    one, two = (solve(setting, weight, hessian, mask=earlier) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip((weight, hessian, earlier), copies, strict=True))
    for a, b in zip(one.packed.tensors().values(), two.packed.tensors().values(), strict=True):
        assert torch.equal(a, b)
    assert one.notes == two.notes
    assert bool((one.packed.dequantize()[~earlier] == 0).all())  # what was pruned before stays so
    assert int((~sparse_of(one).mask).sum()) == setting.kept_pattern.zeros(rows, 32)


@pytest.mark.parametrize("setting", [
    SparseGPT(), SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", bits=4, group_size=8),
    SparseGPT(bits=3, group_size=-1, symmetric=False), SparseGPT(method="wanda"),
])  # fmt: skip
@pytest.mark.parametrize("magnitude", [0.0, 1e-38, 1e-12, 1e25])
def test_dead_columns_and_extreme_hessians(setting: SparseGPT, magnitude: float) -> None:
    weight, hessian = problem(7, 8, 24)
    hessian[:, [0, 9]], hessian[[0, 9]] = 0, 0
    hessian = hessian / hessian.diagonal().mean() * magnitude
    solved = solve(setting, weight, hessian)
    dense = solved.packed.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert bool(torch.isfinite(solved.row_loss).all())
    assert int((~sparse_of(solved).mask).sum()) == setting.kept_pattern.zeros(8, 24)
    if setting.method == "sparsegpt":
        assert any("input columns were never active" in note for note in solved.notes)


def test_without_inputs_it_is_magnitude_pruning() -> None:
    weight, _ = problem(8, 8, 24)
    for setting in (SparseGPT(), SparseGPT(pattern="2:4")):
        ours = solve(setting, weight, torch.zeros(24, 24))
        theirs = solve(replace(setting, method="magnitude"), weight, None)
        assert torch.equal(ours.packed.dequantize(), theirs.packed.dequantize())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": -0.1}, "sparsity -0.1 is out of range"),
        ({"sparsity": 0.96}, "sparsity 0.96"),
        ({"sparsity": float("nan")}, "sparsity nan"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "pattern 2:4 prunes 0.5 of the weights, not 0.6"),
        ({"pattern": "4"}, "no pattern '4'"),
        ({"pattern": "4:4"}, "no pattern '4:4'"),
        ({"pattern": "0:4"}, "no pattern '0:4'"),
        ({"pattern": "a:4"}, "no pattern 'a:4'"),
        ({"method": "random"}, "no method 'random'"),
        ({"bits": 1}, "bits 1 is out of range"),
        ({"bits": 9}, "bits 9"),
        ({"group_size": 128}, "a group size without bits"),
        ({"damp_percent": 0.0}, "damp percent 0.0"),
        ({"block_size": 0}, "block size 0"),
        ({"mask_block_size": 0}, "mask block size 0"),
        ({"descent": -1}, "-1 sweeps"),
        ({"act_order": "groups"}, "no act order 'groups'"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CompressError, match=re.escape(message)):
        SparseGPT(**change)


def test_patterns_that_do_not_divide() -> None:
    with pytest.raises(CompressError, match=r"pattern 4:8 does not divide in_features 500") as found:
        SparseGPT(pattern="4:8").settle([512, 500])
    assert found.value.remedy == "use 2:4 or 1:2"
    with pytest.raises(CompressError, match="does not divide in_features 7") as found:
        SparseGPT(pattern="2:4").settle([7, 8])
    assert "--sparsity 0.5" in found.value.remedy
    assert SparseGPT(pattern="2:4").settle([12, 500]) == SparseGPT(pattern="2:4")


def test_settings() -> None:
    assert SparseGPT.name == "sparsegpt"
    assert SparseGPT().needs == Needs(hessian=True, weighted=True)
    assert SparseGPT(method="wanda").needs == Needs(hessian=True)  # as its paper has it
    assert SparseGPT(method="magnitude").needs == Needs()
    assert [SparseGPT().row_unit, SparseGPT(method="magnitude").row_unit] == [0, 0]
    assert SparseGPT(bits=4).settle([256, 96]).group_size == 32
    assert SparseGPT(sparsity=0.5, pattern="2:4").kept_pattern == Pattern(2, 4)
    assert SparseGPT(pattern="1:4").kept_pattern == Pattern(3, 4)
    assert SparseGPT().storage == Storage("sparse", 16, details=(("sparsity", 0.5),), inner=Storage("dense", 16))
    with pytest.raises(CompressError, match="group size 300"):
        SparseGPT(bits=4, group_size=300).settle([256])


def test_a_broken_hessian() -> None:
    weight, hessian = problem(9, 4, 8)
    hessian[3, 5] = float("nan")
    for setting in (SparseGPT(), SparseGPT(bits=4, group_size=-1)):
        with pytest.raises(CompressError, match="NaN or infinity"):
            solve(setting, weight, hessian)


def test_words() -> None:
    weight, hessian = problem(10, 16, 32)

    def lines(setting: SparseGPT, h: Tensor | None = hessian) -> list[str]:
        solved = solve(setting, weight, h, BF16)
        return setting.words([{"name": "a", "shape": [16, 32], "bytes": 1, "figures": dict(solved.figures)}] * 2)

    two = lines(SparseGPT(pattern="2:4"))
    assert two[0] == (
        "2:4: 50.00% of 1024 weights pruned, mask chosen every 4 columns from the updated weights (SparseGPT)"
    )
    assert re.fullmatch(
        r"layer error 0\.\d{4}, magnitude pruning's at the same pattern 0\.\d{4} \(unquantised\)", two[1]
    )
    joint = lines(SparseGPT(sparsity=0.7, bits=2, group_size=-1))
    assert re.match(r"unstructured: 69\.92% of 1024 weights pruned \(\d\d\.\d\d% are zero once rounded\)", joint[0])
    assert "with 2-bit weights" in joint[1]
    assert lines(SparseGPT(method="magnitude"), None) == [
        "unstructured: 50.00% of 1024 weights pruned, lowest |w| of each layer (magnitude pruning)"
    ]
    assert "of each row (Wanda)" in lines(SparseGPT(method="wanda"))[0]
    assert SparseGPT().words([]) == []


def test_unquantised_values_are_stored_without_a_minus_zero() -> None:
    weight, hessian = problem(11, 8, 32)
    inner = sparse_of(solve(SparseGPT(), weight, hessian, BF16)).inner
    assert isinstance(inner, Dense)
    assert not bool(torch.signbit(inner.values[inner.values == 0]).any())


@pytest.mark.parametrize("seed", range(4))
def test_refit_is_the_optimum_of_its_mask(seed: int) -> None:
    """Against each row's normal equations, solved exactly in float64."""
    weight, hessian = problem(seed, 6, 24)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)
    mask = torch.rand(6, 24, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[0] = False
    found = refit_kept(weight * mask, mask, weight, damped, steps=60)
    assert bool((found[~mask] == 0).all())
    h = damped.double()
    for row, free in zip(range(6), mask, strict=True):
        at = free.nonzero().flatten().tolist()
        wanted = torch.zeros(24, dtype=torch.float64)
        if at:
            wanted[at] = torch.linalg.solve(h[at][:, at], (h[at] @ weight[row].double()))
        torch.testing.assert_close(found[row].double(), wanted, rtol=1e-3, atol=1e-4)


def test_refit_never_makes_a_row_worse_and_is_fixed_without_a_mask() -> None:
    for scale in (1e-30, 1.0, 1e30):
        weight, hessian = problem(1, 8, 48)
        damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)) * scale
        mask = masks.by_score(weight.abs(), Pattern(2, 4))
        start = weight * mask
        last = quadratic(weight - start, damped / scale)
        for steps in (1, 2, 4, 8, 24):
            now = quadratic(weight - refit_kept(start, mask, weight, damped, steps), damped / scale)
            assert bool((now <= last * (1 + 1e-5)).all())
            last = now
        everything = torch.ones_like(mask)
        assert torch.equal(refit_kept(weight, everything, weight, damped), weight)
