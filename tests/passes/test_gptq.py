"""GPTQ against slow twins written from the papers, brute force, and the properties that any solver must have."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.grid import Grid
from compress.packed.uniform import UniformGrid, group_index
from compress.passes import load
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.solvers import columns as loops
from compress.solvers import hessian as second_order
from compress.types import LayerStats, Needs, Solved, Storage

#: the arithmetic in which tests compare codes where weights come out of differently ordered sums: with float32 scales
#: the largest weight of a symmetric group lies exactly between two levels, so that the last bit of a sum decides
BF16 = torch.bfloat16
DTYPES = [torch.float32, BF16, torch.float16]
ORDERS = ["static", "groups", "none"]
#: the published algorithm and nothing more
PLAIN = GPTQ(3, -1, act_order="none", scale_search=False, refit=False, descent=0)
SEEDS = range(12)


def problem(seed: int, rows: int = 12, columns: int = 24, samples: int = 200) -> tuple[Tensor, Tensor]:
    """Weights, and the Hessian of correlated inputs of unequal size."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(samples, columns, generator=g) @ mix * torch.exp(0.7 * torch.randn(columns, generator=g))
    return torch.randn(rows, columns, generator=g) * 0.05, x.T @ x / samples


def solve(method: GPTQ, weight: Tensor, hessian: Tensor, dtype: torch.dtype = torch.float32) -> Solved:
    return method(weight, LayerStats(1000, hessian), dtype)


def packed_of(solved: Solved) -> UniformGrid:
    assert isinstance(solved.packed, UniformGrid)
    return solved.packed


def quadratic(error: Tensor, hessian: Tensor) -> Tensor:
    """float64 [rows]: e H e^T."""
    e = error.double()
    return ((e @ hessian.double()) * e).sum(1)


def noise(error: Tensor, hessian: Tensor) -> Tensor:
    """float64 [rows]: the most that float32 may get wrong in e H e^T: 2^-24 an operation, two sums of n terms."""
    e = error.double().abs()
    return 2 * len(hessian) * 2.0**-24 * ((e @ hessian.double().abs()) * e).sum(1)


def loss(packed: UniformGrid, weight: Tensor, hessian: Tensor) -> Tensor:
    return quadratic(weight.double() - packed.dequantize().double(), hessian)


def grids_of(packed: UniformGrid) -> tuple[Tensor, Tensor, Tensor]:
    """scale, lowest and highest level of each weight, float64 [out, in]."""
    groups = packed.column_groups()
    scale = packed.scales.double()[:, groups]
    middle = torch.full_like(scale, 2.0 ** (packed.bits - 1))
    zero = middle if packed.zeros is None else packed.zeros.double()[:, groups]
    return scale, -zero, 2**packed.bits - 1 - zero


def levels_of(packed: UniformGrid) -> Tensor:
    """float64 [out, in]: code less zero point."""
    return packed.codes.double() + grids_of(packed)[1]


def divided(weight: Tensor, scale: Tensor) -> Tensor:
    """round(weight / scale), divided in float32: the largest weight of a symmetric group lies on a tie."""
    return (weight.float() / scale.float()).round().double()


def to_nearest(weight: Tensor, packed: UniformGrid) -> Tensor:
    """float64 [out, in]: round-to-nearest on the grid of `packed`, as it would be stored."""
    scale, low, high = grids_of(packed)
    k = divided(weight, scale).clamp(low, high)
    return (k * scale).to(packed.scales.dtype).double()


def damped(hessian: Tensor, percent: float) -> Tensor:
    """float64 H + percent * mean(diag H) * I."""
    h = hessian.double()
    return h + percent * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


Rounder = Callable[[int, Tensor], Tensor]


def by_elimination(weight: Tensor, hessian: Tensor, order: list[int], rounder: Rounder) -> Tensor:
    """OBQ's update with a fixed order: explicit inverse Hessian, one row and column of it eliminated a step."""
    w, inverse = weight.double().clone(), torch.linalg.inv(hessian)
    for i in order:
        q = rounder(i, w)
        w -= ((w[:, i] - q) / inverse[i, i])[:, None] * inverse[i]
        w[:, i] = q
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0  # gone, and not 1e-20
    return w


def by_solving(weight: Tensor, hessian: Tensor, order: list[int], rounder: Rounder) -> Tensor:
    """What OBQ means: after each rounding the free weights take their least-squares optimum, solved from the start."""
    start = weight.double()
    w = start.clone()
    for n, i in enumerate(order):
        w[:, i] = rounder(i, w)
        done, free = order[: n + 1], order[n + 1 :]
        if free:
            pull = hessian[free][:, done] @ (start[:, done] - w[:, done]).T
            w[:, free] = start[:, free] + torch.linalg.solve(hessian[free][:, free], pull).T
    return w


def or_nearest(q: Tensor, weight: Tensor, hessian: Tensor, packed: UniformGrid) -> Tensor:
    """q, where round-to-nearest on the grid of `packed` does no better on a row."""
    nearest = to_nearest(weight, packed)
    worse = quadratic(weight - nearest, hessian) < quadratic(weight - q, hessian)
    return torch.where(worse[:, None], nearest, q)


def expected_weights(method: GPTQ, weight: Tensor, hessian: Tensor, packed: UniformGrid, reference) -> Tensor:  # type: ignore[no-untyped-def]
    """float64 [out, in]: the reference's weights on the grid of `packed`, or round-to-nearest's."""
    scale, low, high = grids_of(packed)

    def rounder(i: int, w: Tensor) -> Tensor:
        k = divided(w[:, i], scale[:, i]).clamp(low[:, i], high[:, i])
        return (k * scale[:, i]).to(packed.scales.dtype).double()

    order = list(range(len(hessian)))
    if method.act_order != "none":
        order.sort(key=lambda i: -float(hessian[i, i]))
    q = reference(weight, damped(hessian, method.damp_percent), order, rounder)
    return or_nearest(q, weight, hessian, packed)


@pytest.mark.parametrize("reference", [by_elimination, by_solving])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_equals_the_published_algorithm(
    bits: int, symmetric: bool, reference: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    """Weight for weight; the error of a column is that of the weight as it will be read, so bf16 shows at 8 bits."""
    for seed in range(4):
        weight, hessian = problem(seed, columns=20)
        for size, order in ((-1, "none"), (-1, "static"), (8, "static")):
            method = replace(PLAIN, bits=bits, symmetric=symmetric, group_size=size, act_order=order)
            packed = packed_of(solve(method, weight, hessian, dtype))
            wanted = expected_weights(method, weight, hessian, packed, reference)
            assert torch.equal(packed.dequantize().double(), wanted)


def fresh_rounder(method: GPTQ, hessian: Tensor, scales: list[Tensor], zeros: list[Tensor]) -> Rounder:
    """Fits a grid at each group's first column, from the weights as they are then, and keeps it in the lists."""
    size, top = method.group_size, 2**method.bits - 1
    assert size is not None

    def rounder(i: int, w: Tensor) -> Tensor:
        if i % size == 0:
            now, cost = w[:, i : i + size].float(), hessian.diagonal()[i : i + size]
            fitted = grid.fit(now, method.bits, -1, method.symmetric, BF16, method.scale_search, cost)
            scales.append(fitted.scale[:, 0])
            zeros.append(fitted.zero[:, 0])
        s, z = scales[-1], zeros[-1].double()
        return grid.value(divided(w[:, i], s).clamp(-z, top - z).float(), s, BF16).double()

    return rounder


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
@pytest.mark.parametrize("size", [5, 8])
def test_scales_come_from_the_updated_weights(size: int, search: bool, symmetric: bool) -> None:
    """Natural order: a group's scales are fitted when its first column is reached, from weights moved by then."""
    other = 0
    for seed in range(4):
        weight, hessian = problem(seed, columns=24)
        method = replace(PLAIN, group_size=size, symmetric=symmetric, scale_search=search)
        scales: list[Tensor] = []
        zeros: list[Tensor] = []
        rounder = fresh_rounder(method, hessian, scales, zeros)
        q = by_elimination(weight, damped(hessian, method.damp_percent), list(range(24)), rounder)
        packed = packed_of(solve(method, weight, hessian, BF16))
        same = (packed.scales.float() == torch.stack(scales, 1)).all(1)
        if packed.zeros is not None:
            same &= (packed.zeros.float() == torch.stack(zeros, 1)).all(1)
        same &= (packed.dequantize().double() == or_nearest(q, weight, hessian, packed)).all(1)
        other += int((~same).sum())
    # float32 against float64: about one scale in 2000 lies so near the middle of two bf16 numbers that it rounds apart
    assert other <= 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 8])
def test_static_scales_come_from_the_original_weights(size: int, symmetric: bool) -> None:
    """Searched under the error weighted by H's diagonal."""
    weight, hessian = problem(2)
    packed = packed_of(
        solve(
            replace(PLAIN, group_size=size, symmetric=symmetric, act_order="static", scale_search=True), weight, hessian
        )
    )
    fitted = grid.fit(weight, 3, size, symmetric, torch.float32, True, hessian.diagonal())
    assert torch.equal(packed.scales, fitted.scale)
    blind = grid.fit(weight, 3, size, symmetric, torch.float32, True)
    assert not torch.equal(packed.scales, blind.scale)


@pytest.mark.parametrize("block", [1, 7, 128])
def test_sweep_leaves_its_inputs(block: int) -> None:
    weight, hessian = problem(2)
    _, factor, _ = second_order.factorise(hessian, torch.zeros(24, dtype=torch.bool), 0.01)
    inverse = torch.linalg.inv(damped(hessian, 0.01))
    torch.testing.assert_close(
        factor.double().T @ factor.double(), inverse, rtol=1e-3, atol=1e-3 * float(inverse.max())
    )
    w, scale, zero = weight.t().contiguous(), torch.full((24, 12), 0.02), torch.full((24, 12), 3.0)
    copies = [t.clone() for t in (w, factor, scale, zero)]
    loops.sweep(w, factor, scale, zero, 3, BF16, block)
    loops.sweep(w, factor, scale, None, 3, BF16, block)
    assert all(torch.equal(now, before) for now, before in zip((w, factor, scale, zero), copies, strict=True))


def test_never_below_the_optimum_and_near_it() -> None:
    """All codes of a row tried in float64. Of 1000 rows like these GPTQ alone finds the best codes for 74 % (its loss
    1.15 times the optimum, geometric mean), with descent 83 % (1.08): the bounds leave room for 144 rows.
    """
    plain = GPTQ(2, -1, refit=False, descent=0, damp_percent=1e-3)
    ratios: dict[int, list[Tensor]] = {0: [], 8: []}
    for seed in range(24):
        columns = 4 + seed % 3
        weight, hessian = problem(seed, rows=6, columns=columns)
        for sweeps, found in ratios.items():
            packed = packed_of(solve(replace(plain, descent=sweeps), weight, hessian))
            codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=columns)), dtype=torch.float64)
            every = codes[None] * packed.scales.double()[:, :, None]  # [rows, 4^columns, columns]
            error = weight.double()[:, None] - every
            best = ((error @ hessian.double()) * error).sum(-1).amin(1)
            ours = loss(packed, weight, hessian)
            assert bool((ours >= best * (1 - 1e-9)).all())
            found.append(ours / best)
    for sweeps, factor, share in ((0, 1.35, 0.6), (8, 1.2, 0.7)):
        ratio = torch.cat(ratios[sweeps])
        assert float(ratio.log().mean().exp()) < factor
        assert float((ratio < 1 + 1e-9).double().mean()) > share


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("size", [16, 24, -1])
@pytest.mark.parametrize("extras", [True, False])
def test_block_size_changes_nothing(act_order: str, size: int, extras: bool) -> None:
    weight, hessian = problem(3, rows=10, columns=100)
    method = GPTQ(3, size, act_order=act_order, scale_search=extras, refit=extras, descent=int(extras))  # type: ignore[arg-type]
    one = packed_of(solve(replace(method, block_size=128), weight, hessian, BF16))
    for block_size in (1, 7, 32, 1000):
        other = packed_of(solve(replace(method, block_size=block_size), weight, hessian, BF16))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)


@given(columns=st.integers(1, 80), block_size=st.integers(1, 90), size=st.one_of(st.just(-1), st.integers(1, 90)))
@settings(deadline=None, max_examples=200)
def test_blocks_cover_the_columns_and_hold_fresh_groups(columns: int, block_size: int, size: int) -> None:
    group_of = group_index(columns, size).tolist()
    cut = list(loops.blocks(columns, block_size, group_of))
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == columns
    assert all(0 < stop - start <= block_size for start, stop in cut)
    for start, stop in cut:
        for i in range(start, stop):
            first = i == 0 or group_of[i - 1] != group_of[i]
            if first and i > start:  # fitted inside a block: the whole group must have had every update
                assert i + group_of.count(group_of[i]) <= stop


@pytest.mark.parametrize("size", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_infinite_damp_is_round_to_nearest(bits: int, symmetric: bool, size: int) -> None:
    for seed in SEEDS:
        weight, hessian = problem(seed)
        method = replace(PLAIN, bits=bits, symmetric=symmetric, group_size=size, act_order="static", damp_percent=1e8)
        ours = packed_of(solve(method, weight, hessian))
        theirs = packed_of(RTN(bits, size, symmetric)(weight, LayerStats(0), torch.float32))
        assert torch.equal(ours.scales, theirs.scales)
        assert torch.equal(ours.codes, theirs.codes)


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([-1, 4, 16, 24]),
    act_order=st.sampled_from(ORDERS),
    extras=st.tuples(st.booleans(), st.booleans(), st.integers(0, 2)),
    samples=st.sampled_from([5, 20, 200]),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=100)
def test_never_above_round_to_nearest(
    seed: int,
    bits: int,
    symmetric: bool,
    size: int,
    act_order: str,
    extras: tuple[bool, bool, int],
    samples: int,
    dtype: torch.dtype,
) -> None:
    """Row by row on the stored grid; and the reported losses are those of the stored layer."""
    weight, hessian = problem(seed, rows=8, columns=32, samples=samples)
    search, refit, descent = extras
    method = GPTQ(bits, size, symmetric, act_order, scale_search=search, refit=refit, descent=descent)  # type: ignore[arg-type]
    solved = solve(method, weight, hessian, dtype)
    packed = packed_of(solved)
    assert packed.storage == method.storage
    assert packed.scales.dtype == dtype
    error, nearest = weight - packed.dequantize().float(), weight - to_nearest(weight, packed)
    allowed = noise(error, hessian) + noise(nearest, hessian)
    ours, theirs = loss(packed, weight, hessian), quadratic(nearest, hessian)
    assert bool((ours <= theirs + allowed).all())
    assert bool(((solved.row_loss.double() - ours).abs() <= noise(error, hessian) + 1e-9 * ours).all())
    assert bool(((solved.row_norm.double() - quadratic(weight, hessian)).abs() <= noise(weight, hessian)).all())


EXTRAS = {
    "search": (replace(PLAIN, group_size=16, act_order="static"), {"scale_search": True}),
    "search from a full row": (PLAIN, {"scale_search": True}),
    "refit": (replace(PLAIN, group_size=16, act_order="static"), {"refit": True}),
    "refit after search": (replace(PLAIN, group_size=16, act_order="static", scale_search=True), {"refit": True}),
    "descent": (replace(PLAIN, group_size=16, act_order="static"), {"descent": 1}),
    "descent after refit": (GPTQ(3, 16, descent=0), {"descent": 1}),
    "more descent": (GPTQ(3, 16), {"descent": 4}),
    "act order": (PLAIN, {"act_order": "static"}),
    "act order in groups": (replace(PLAIN, group_size=16), {"act_order": "static"}),
    "act order that groups follow": (replace(PLAIN, group_size=16), {"act_order": "groups"}),
}


def total_loss(method: GPTQ) -> float:
    problems = [problem(seed, rows=16, columns=48) for seed in SEEDS]
    return sum(float(loss(packed_of(solve(method, w, h)), w, h).sum()) for w, h in problems)


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_extra_helps_on_average(name: str, bits: int) -> None:
    before, change = EXTRAS[name]
    plain = replace(before, bits=bits)
    assert total_loss(replace(plain, **change)) < total_loss(plain)


@pytest.mark.parametrize("bits", [3, 4])
def test_zero_points_help_on_average(bits: int) -> None:
    """Not at 2 bits: there the two signs of a symmetric scale are the two zero points that matter."""
    assert total_loss(GPTQ(bits, 16, symmetric=False)) < total_loss(GPTQ(bits, 16))


def scaled(k: Tensor, grids: Grid, size: int) -> Tensor:
    """float64: level times scale, not rounded to storage."""
    return k.double() * grids.scale.double()[:, group_index(k.shape[1], size)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 1, 8, 20])
def test_refit_never_raises_a_row(size: int, symmetric: bool, dtype: torch.dtype) -> None:
    """On its own objective. The tolerance is float32's in the gain that decides: 1e-5 of the row's loss."""
    for seed in SEEDS:
        weight, hessian = problem(seed, columns=48)
        for bits in (2, 4, 8):
            fitted = grid.fit(weight, bits, size, symmetric, dtype)
            groups = group_index(48, size)
            k = grid.nearest(weight, fitted.scale[:, groups], fitted.low[:, groups], fitted.high[:, groups])
            k[0, :24] = 0  # groups that are unused, nearly unused, and a row that is
            k[1, 1:24] = 0
            k[2] = 0
            refitted = second_order.refit_scales(k, weight, hessian, fitted, size)
            assert torch.equal(refitted.scale.to(dtype).float(), refitted.scale)
            before = quadratic(weight - scaled(k, fitted, size), hessian)
            after = quadratic(weight - scaled(k, refitted, size), hessian)
            assert bool((after <= before * (1 + 1e-5)).all())
            ratio = refitted.scale / fitted.scale
            assert bool(((ratio > 0.39) & (ratio < 2.6)).all())  # 0.4 to 2.5, then rounded to storage


def test_refit_finds_the_least_squares_scales() -> None:
    """Well-posed rows, against float64 least squares in the geometry of H."""
    for seed in SEEDS:
        weight, hessian = problem(seed, columns=48)
        fitted = grid.fit(weight, 4, 12, True, torch.float32)
        groups = group_index(48, 12)
        k = grid.nearest(weight, fitted.scale[:, groups], fitted.low[:, groups], fitted.high[:, groups])
        refitted = second_order.refit_scales(k, weight, hessian, fitted, 12)
        root = torch.linalg.cholesky(hessian.double())
        for r in range(len(weight)):
            basis = torch.zeros(48, 4, dtype=torch.float64)
            basis[torch.arange(48), groups] = k[r].double()
            best = torch.linalg.lstsq(root.T @ basis, (root.T @ weight[r].double())[:, None]).solution[:, 0]
            torch.testing.assert_close(refitted.scale[r].double(), best, rtol=2e-4, atol=0)


def descended(
    k: Tensor, weight: Tensor, hessian: Tensor, grids: Grid, size: int, symmetric: bool, block: int
) -> Tensor:
    """One sweep of descent, columns in natural order."""
    groups = group_index(k.shape[1], size)
    zero = None if symmetric else grids.zero[:, groups].t()
    scale = grids.scale[:, groups].t()
    return loops.descend(k.t(), weight.t(), hessian, scale, zero, grids.bits, grids.dtype, block).t()


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 8])
def test_descent_never_raises_a_row(size: int, symmetric: bool, block: int) -> None:
    """On its own objective, float32 scales: a level only moves to a lower loss. 1e-5 is for ties."""
    for seed in SEEDS:
        weight, hessian = problem(seed)
        fitted = grid.fit(weight, 3, size, symmetric, torch.float32)
        groups = group_index(24, size)
        k = grid.nearest(weight, fitted.scale[:, groups], fitted.low[:, groups], fitted.high[:, groups])
        before = quadratic(weight - scaled(k, fitted, size), hessian)
        for _ in range(6):
            copy = k.clone()
            moved = descended(k, weight, hessian, fitted, size, symmetric, block)
            assert torch.equal(k, copy)
            assert bool((moved >= fitted.low[:, groups]).all())
            assert bool((moved <= fitted.high[:, groups]).all())
            after = quadratic(weight - scaled(moved, fitted, size), hessian)
            assert bool((after <= before * (1 + 1e-5)).all())
            k, before = moved, after
        again = descended(k, weight, hessian, fitted, size, symmetric, block)
        assert (again != k).float().mean() < 0.02  # it settles


@pytest.mark.parametrize("symmetric", [True, False])
def test_descent_takes_the_best_level_of_each_column(symmetric: bool) -> None:
    """Column by column against trying every level of every row in float64."""
    for seed in range(4):
        weight, hessian = problem(seed, rows=6, columns=12)
        fitted = grid.fit(weight, 3, -1, symmetric, torch.float32)
        scale, low = fitted.scale.double(), fitted.low.double()
        k = torch.zeros(6, 12)
        ours = descended(k, weight, hessian, fitted, -1, symmetric, block=5)
        twin = k.double()
        for j in range(12):
            tries = []
            for level in range(8):
                trial = twin.clone()
                trial[:, j] = low[:, 0] + level
                tries.append(quadratic(weight - trial * scale, hessian))
            twin[:, j] = low[:, 0] + torch.stack(tries).argmin(0)
        assert torch.equal(ours.double(), twin)


@pytest.mark.parametrize("bits", [3, 8])
def test_descent_moves_with_the_weights_as_they_are_read(bits: int) -> None:
    """With bf16 scales the loop works on rounded products: a float64 twin, level for level."""
    for seed in range(4):
        weight, hessian = problem(seed)
        fitted = grid.fit(weight, bits, 8, True, BF16)
        groups = group_index(24, 8)
        scale = fitted.scale[:, groups]
        k = grid.nearest(weight, scale, fitted.low[:, groups], fitted.high[:, groups])
        now, h = grid.value(k, scale, BF16).double(), hessian.double()
        wanted = k.clone()
        for j in range(24):
            best = now[:, j] + ((weight.double() - now) @ h[:, j]) / h[j, j]
            wanted[:, j] = divided(best, scale[:, j]).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).float()
            now[:, j] = grid.value(wanted[:, j], scale[:, j], BF16).double()
        assert torch.equal(descended(k, weight, hessian, fitted, 8, True, block=7), wanted)


@pytest.mark.parametrize("act_order", ORDERS)
def test_dead_columns(act_order: str) -> None:
    weight, hessian = problem(5, columns=32)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[0, 9, 31]] = True
    hessian[dead] = 0
    hessian[:, dead] = 0
    method = GPTQ(3, 8, act_order=act_order)  # type: ignore[arg-type]
    solved = solve(method, weight, hessian)
    packed = packed_of(solved)
    assert any(note.startswith("3 of 32 input columns were never active") for note in solved.notes)
    error = weight - packed.dequantize()
    assert bool(torch.isfinite(solved.row_loss).all())
    allowed = 1e-6 + 0.5 * packed.scales[:, packed.column_groups()].abs()
    _, low, high = grids_of(packed)
    at_end = (levels_of(packed) == low) | (levels_of(packed) == high)
    assert bool(((error.abs() <= allowed) | at_end)[:, dead].all())
    nearest = to_nearest(weight, packed)
    assert torch.equal(packed.dequantize()[:, dead], nearest[:, dead].float())


@pytest.mark.parametrize("act_order", ORDERS)
def test_dead_columns_do_not_disturb_the_others(act_order: str) -> None:
    """Columns that never matter may cost nothing: one more group of them leaves the other groups as they were."""
    weight, hessian = problem(6, columns=32)
    wide = torch.zeros(40, 40)
    wide[:32, :32] = hessian * 0.01  # small activations: a fixed number on the diagonal of dead columns would dominate
    method = GPTQ(3, 8, act_order=act_order, refit=False, damp_percent=0.01)  # type: ignore[arg-type]
    more = torch.cat([weight, weight[:, :8]], 1)
    with_dead = packed_of(solve(replace(method, damp_percent=0.01 * 40 / 32), more, wide))
    without = packed_of(solve(method, weight, hessian * 0.01))
    assert torch.equal(with_dead.codes[:, :32], without.codes)
    torch.testing.assert_close(with_dead.scales[:, :4], without.scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("dead", [0, 8])
def test_units_of_the_inputs_do_not_matter(act_order: str, dead: int) -> None:
    """H times a power of two gives the same bytes, dead columns or not: nothing is compared with a fixed number."""
    for seed in range(4):
        weight, hessian = problem(seed, columns=32)
        hessian[:dead] = 0
        hessian[:, :dead] = 0
        method = GPTQ(3, 8, act_order=act_order)  # type: ignore[arg-type]
        one = packed_of(solve(method, weight, hessian))
        for exponent in (-60, -20, 6, 40):  # even: the Cholesky factor of H scales by a power of two as well
            other = packed_of(solve(method, weight, hessian * 2.0**exponent))
            assert torch.equal(one.codes, other.codes)
            assert torch.equal(one.scales, other.scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_units_of_the_weights_do_not_matter(symmetric: bool) -> None:
    weight, hessian = problem(8, columns=32)
    method = GPTQ(3, 8, symmetric)
    one = packed_of(solve(method, weight, hessian, BF16))
    for exponent in (-9, 6):
        other = packed_of(solve(method, weight * 2.0**exponent, hessian, BF16))
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales * 2.0**exponent, other.scales)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("samples", [1, 3, 12])
def test_fewer_samples_than_columns(act_order: str, samples: int) -> None:
    weight, hessian = problem(7, columns=48, samples=samples)
    solved = solve(GPTQ(4, 16, act_order=act_order), weight, hessian)  # type: ignore[arg-type]
    assert bool(torch.isfinite(solved.row_loss).all())
    assert bool(torch.isfinite(solved.packed.dequantize()).all())
    assert float(solved.row_loss.sum()) < 0.05 * float(solved.row_norm.sum())


@pytest.mark.parametrize("act_order", ORDERS)
def test_zero_hessian_rounds_to_nearest(act_order: str) -> None:
    weight, _ = problem(7)
    solved = solve(replace(PLAIN, act_order=act_order), weight, torch.zeros(24, 24))  # type: ignore[arg-type]
    nearest = RTN(3, -1)(weight, LayerStats(0), torch.float32)
    assert torch.equal(solved.packed.dequantize(), nearest.packed.dequantize())
    assert bool((solved.row_loss == 0).all())
    assert any("24 of 24 input columns were never active" in note for note in solved.notes)
    full = solve(GPTQ(3, 8, act_order=act_order), weight, torch.zeros(24, 24))  # type: ignore[arg-type]
    assert bool(torch.isfinite(full.packed.dequantize()).all())


@pytest.mark.parametrize("magnitude", [1e-38, 1e-30, 1e-12, 1e12, 1e25])
def test_extreme_hessians(magnitude: float) -> None:
    weight, hessian = problem(9)
    hessian = hessian / hessian.diagonal().mean() * magnitude
    packed = packed_of(solve(GPTQ(3, 8), weight, hessian))
    dense = packed.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert bool(((weight - dense).abs() <= 4 * packed.scales.abs().amax()).all())


def indefinite(shift: float) -> tuple[Tensor, Tensor]:
    """Ten samples for 24 columns, less `shift` times the mean diagonal: smallest eigenvalues below zero."""
    weight, hessian = problem(4, samples=10)
    return weight, hessian - shift * hessian.diagonal().mean() * torch.eye(24)


def test_damp_ladder_is_logged() -> None:
    for shift, steps in ((0.05, 1), (0.5, 2)):
        weight, hessian = indefinite(shift)
        hessian = hessian + torch.diag((0.01 * hessian.diagonal().abs().max() - hessian.diagonal()).clamp(min=0))
        least = float(torch.linalg.eigvalsh(hessian.double())[0] / hessian.double().diagonal().mean())
        assert (
            -(10.0 ** (steps - 2)) < least < -(10.0 ** (steps - 3))
        )  # the damps that must fail, and the one that must do
        solved = solve(GPTQ(4, 8), weight, hessian)
        ladder = ["Cholesky failed at damp 0.01: raised to 0.1", "Cholesky failed at damp 0.1: raised to 1"]
        assert [note for note in solved.notes if "Cholesky" in note] == ladder[:steps]
        assert bool(torch.isfinite(solved.row_loss).all())
        assert bool(torch.isfinite(solved.packed.dequantize()).all())


def test_no_ladder_without_need() -> None:
    weight, hessian = problem(4)
    assert solve(GPTQ(4, 8), weight, hessian).notes == ()


def test_hopeless_hessians() -> None:
    weight, hessian = problem(4)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = hessian.clone()
        broken[3, 5] = bad
        with pytest.raises(CompressError, match="NaN or infinity"):
            solve(GPTQ(4, 8), weight, broken)
    with pytest.raises(CompressError, match="no damp up to"):
        solve(GPTQ(4, -1), torch.ones(2, 2), torch.tensor([[1e-6, 1e6], [1e6, 1e-6]]))


def test_rows_that_fall_back_are_counted() -> None:
    """Two bits and inputs that almost coincide: pushing errors on into clamped levels can lose to plain rounding."""
    fell = 0
    for seed in range(40):
        weight, hessian = problem(seed, rows=32, columns=12, samples=4)
        solved = solve(replace(PLAIN, bits=2, damp_percent=0.3), weight, hessian)
        notes = [note for note in solved.notes if "kept their round-to-nearest codes" in note]
        nearest = to_nearest(weight, packed_of(solved))
        equal = (solved.packed.dequantize() == nearest).all(1)
        assert len(notes) <= 1
        for note in notes:
            count = re.match(r"(\d+) of 32 rows", note)
            assert count is not None
            assert 1 <= int(count[1]) <= int(equal.sum())
            fell += int(count[1])
    assert fell > 0


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_are_independent(act_order: str, symmetric: bool) -> None:
    for seed in range(3):
        weight, hessian = problem(seed, columns=40)
        method = GPTQ(3, 16, symmetric, act_order, descent=2)  # type: ignore[arg-type]
        together = packed_of(solve(method, weight, hessian, BF16))
        for rows in (slice(0, 1), slice(1, 5), slice(5, 12)):
            alone = packed_of(solve(method, weight[rows], hessian, BF16))
            assert torch.equal(alone.codes, together.codes[rows])
            assert torch.equal(alone.scales, together.scales[rows])


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("size", [-1, 8])
@pytest.mark.parametrize("rows", [1, 12])
def test_inputs_stay_as_they_are_and_answers_repeat(act_order: str, size: int, rows: int) -> None:
    weight, hessian = problem(10)
    hessian[4] = 0
    hessian[:, 4] = 0
    weight = weight[:rows]  # one row: its transpose is contiguous already, so no copy comes of making it so
    copies = weight.clone(), hessian.clone()
    method = GPTQ(3, size, act_order=act_order, descent=2)  # type: ignore[arg-type]
    one, two = solve(method, weight, hessian), solve(method, weight, hessian)
    assert torch.equal(weight, copies[0])
    assert torch.equal(hessian, copies[1])
    first, second = one.packed.tensors(), two.packed.tensors()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.contiguous().numpy().tobytes() == second[name].contiguous().numpy().tobytes()
    assert torch.equal(one.row_loss, two.row_loss)
    assert one.notes == two.notes


@pytest.mark.parametrize("size", [8, 10, 24])
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_that_follow_the_order(size: int, symmetric: bool) -> None:
    weight, hessian = problem(11)
    method = GPTQ(3, size, symmetric, "groups")
    solved = solve(method, weight, hessian)
    packed = packed_of(solved)
    assert packed.g_idx is not None
    assert packed.g_idx.dtype == torch.int32
    assert packed.storage == method.storage == Storage("uniform", 3, size, symmetric, True)
    counts = [min(size, 24 - start) for start in range(0, 24, size)]
    assert torch.bincount(packed.g_idx.long()).tolist() == counts
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    assert torch.equal(packed.g_idx[order].long(), group_index(24, size))
    error = weight - packed.dequantize()
    assert bool(((solved.row_loss.double() - quadratic(error, hessian)).abs() <= noise(error, hessian)).all())
    # the same as natural order on columns sorted beforehand
    twin = packed_of(solve(replace(method, act_order="none"), weight[:, order], hessian[order][:, order]))
    assert torch.equal(packed.codes[:, order], twin.codes)
    assert torch.equal(packed.scales, twin.scales)


@pytest.mark.parametrize("symmetric", [True, False])
def test_act_order_of_whole_rows(symmetric: bool) -> None:
    """One group a row: all three orders store the same kind, and both act orders agree."""
    weight, hessian = problem(12)
    solved = {order: packed_of(solve(GPTQ(3, -1, symmetric, order), weight, hessian)) for order in ORDERS}  # type: ignore[arg-type]
    for packed in solved.values():
        assert packed.g_idx is None
        assert packed.storage == Storage("uniform", 3, -1, symmetric)
    assert torch.equal(solved["static"].codes, solved["groups"].codes)
    torch.testing.assert_close(solved["static"].scales, solved["groups"].scales, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float64])
def test_weights_and_hessians_of_any_float_dtype(dtype: torch.dtype) -> None:
    weight, hessian = problem(13)
    low = weight.to(dtype)
    wide = solve(GPTQ(4, 8), low.float(), hessian, BF16)
    given_ = solve(GPTQ(4, 8), low, hessian.double(), BF16)
    assert torch.equal(wide.packed.dequantize(), given_.packed.dequantize())


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("act_order", ORDERS)
def test_the_smallest_layers(columns: int, act_order: str) -> None:
    weight, hessian = problem(14, rows=1, columns=columns)
    for size in (-1, 1, 2):
        solved = solve(GPTQ(4, size, act_order=act_order), weight, hessian)  # type: ignore[arg-type]
        assert solved.packed.shape == (1, columns)
        assert float(solved.row_loss.sum()) < 0.1 * float(solved.row_norm.sum())


def test_zero_weights_stay_zero() -> None:
    weight, hessian = problem(15)
    weight[3], weight[:, 8:16] = 0, 0
    for symmetric in (True, False):
        for dtype in DTYPES:
            solved = solve(GPTQ(3, 8, symmetric), weight, hessian, dtype)
            dense = solved.packed.dequantize()
            assert bool(torch.isfinite(dense).all())
            assert bool((dense[3] == 0).all())
            assert float(solved.row_loss[3]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "bits 1 is out of range"),
        ({"bits": 9}, "bits 9 is out of range"),
        ({"damp_percent": 0.0}, "damp percent 0.0 is out of range"),
        ({"damp_percent": -0.1}, "damp percent -0.1"),
        ({"damp_percent": float("inf")}, "damp percent inf"),
        ({"damp_percent": float("nan")}, "damp percent nan"),
        ({"block_size": 0}, "block size 0"),
        ({"descent": -1}, "-1 sweeps"),
        ({"act_order": "sideways"}, "no act order 'sideways'"),
    ],
)
def test_bad_settings(change: dict[str, object], message: str) -> None:
    with pytest.raises(CompressError, match=re.escape(message)):
        GPTQ(**change)  # type: ignore[arg-type]


def test_settings() -> None:
    assert GPTQ().needs == Needs(hessian=True, weighted=True)
    assert GPTQ(quality="fast").needs == GPTQ(token_weights=False).needs == Needs(hessian=True)
    assert GPTQ(quality="fast", token_weights=True).needs.weighted
    assert load("gptq") is GPTQ
    assert GPTQ().settle([256, 96]).group_size == 32
    assert GPTQ(group_size=-1).settle([256, 96]).group_size == -1
    for size in (0, -2, 300):
        with pytest.raises(CompressError, match=f"group size {size}"):
            GPTQ(group_size=size).settle([256, 96])


def masked(seed: int, rows: int, columns: int, share: float = 0.5) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= share


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("size", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("extras", [True, False])
def test_pruned_weights_stay_zero(act_order: str, size: int, symmetric: bool, extras: bool) -> None:
    """Whatever they were; losses stay those of the stored layer, and no row loses to rounding under the mask."""
    for seed in range(3):
        weight, hessian = problem(seed)
        mask = masked(seed, 12, 24)
        mask[2] = False
        given_weight = weight if seed else weight * mask
        copies = given_weight.clone(), mask.clone()
        method = GPTQ(3, size, symmetric, act_order, scale_search=extras, refit=extras, descent=2 * int(extras))  # type: ignore[arg-type]
        solved = method(given_weight, LayerStats(1000, hessian, mask=mask), BF16)
        assert torch.equal(given_weight, copies[0])
        assert torch.equal(mask, copies[1])
        packed = packed_of(solved)
        dense = packed.dequantize()
        assert bool((dense[~mask] == 0).all())
        assert bool((levels_of(packed)[~mask] == 0).all())
        assert bool((dense[mask] != 0).any())
        error = given_weight - dense.float()
        assert bool(((solved.row_loss.double() - quadratic(error, hessian)).abs() <= noise(error, hessian)).all())
        nearest = to_nearest(given_weight, packed) * mask
        allowed = noise(error, hessian) + noise(given_weight - nearest, hessian)
        worst = quadratic(given_weight - nearest, hessian) + allowed
        assert bool((quadratic(error, hessian) <= worst).all())


@pytest.mark.parametrize("reference", [by_elimination, by_solving])
@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_are_compensated(symmetric: bool, reference: Callable[..., Tensor]) -> None:
    """Like any other error: the published algorithm with a rounder that knows 0 alone for them."""
    for seed in range(4):
        weight, hessian = problem(seed, columns=20)
        mask = masked(seed, 12, 20)
        for size, act_order in ((-1, "none"), (8, "static")):
            method = replace(PLAIN, symmetric=symmetric, group_size=size, act_order=act_order)
            packed = packed_of(method(weight, LayerStats(1000, hessian, mask=mask), torch.float32))
            scale, low, high = grids_of(packed)

            def rounder(
                i: int, w: Tensor, scale: Tensor = scale, low: Tensor = low, high: Tensor = high, mask: Tensor = mask
            ) -> Tensor:
                return divided(w[:, i], scale[:, i]).clamp(low[:, i], high[:, i]) * scale[:, i] * mask[:, i]

            order = list(range(20))
            if act_order != "none":
                order.sort(key=lambda i: -float(hessian[i, i]))
            q = reference(weight, damped(hessian, method.damp_percent), order, rounder)
            nearest = to_nearest(weight, packed) * mask
            worse = quadratic(weight - nearest, hessian) < quadratic(weight - q, hessian)
            wanted = torch.where(worse[:, None], nearest, q)
            torch.testing.assert_close(packed.dequantize().double(), wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("act_order", ORDERS)
def test_scales_ignore_pruned_weights(act_order: str) -> None:
    weight, hessian = problem(3)
    mask = masked(3, 12, 24)
    method = replace(PLAIN, act_order=act_order, group_size=24)
    huge = torch.where(mask, weight, 50.0)
    scales = [
        packed_of(method(w, LayerStats(1, hessian, mask=mask), torch.float32)).scales
        for w in (huge, torch.where(mask, weight, 0))
    ]
    assert torch.equal(*scales)


@pytest.mark.parametrize("act_order", ORDERS)
def test_a_mask_that_keeps_everything(act_order: str) -> None:
    weight, hessian = problem(4)
    method = GPTQ(3, 8, act_order=act_order)  # type: ignore[arg-type]
    mask = torch.ones(12, 24, dtype=torch.bool)
    one = packed_of(method(weight, LayerStats(1, hessian, mask=mask), BF16))
    two = packed_of(method(weight, LayerStats(1, hessian), BF16))
    assert torch.equal(one.codes, two.codes)
    assert torch.equal(one.scales, two.scales)


@given(count=st.integers(1, 60), block_size=st.integers(1, 70), size=st.integers(1, 70), other=st.integers(1, 70))
@settings(deadline=None, max_examples=100)
def test_blocks_hold_groups_of_two_kinds(count: int, block_size: int, size: int, other: int) -> None:
    """Scale groups and mask blocks: whichever begins inside a block ends inside it."""
    labels = [group_index(count, size).tolist(), group_index(count, other).tolist()]
    cut = list(loops.blocks(count, block_size, *labels))
    assert [start for start, _ in cut] == [0, *(stop for _, stop in cut[:-1])]
    assert cut[-1][1] == count
    for start, stop in cut:
        assert 0 < stop - start <= block_size
        for group_of in labels:
            for i in range(start + 1, stop):
                if group_of[i - 1] != group_of[i]:
                    assert i + group_of.count(group_of[i]) <= stop
