"""Uniform grids: what is stored is what is used, nearest is nearest, search never loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.grid import Grid

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = [True, False]
BITS = range(2, 9)


def random_weight(seed: int, rows: int = 6, columns: int = 40, spread: float = 0.05) -> Tensor:
    """Heavy-tailed weights with a shift of their own in each row."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.exp(torch.randn(rows, columns, generator=g) * 0.5)
    return (weight + torch.randn(rows, 1, generator=g)) * spread


def column_groups(columns: int, size: int) -> Tensor:
    return torch.arange(columns) // (columns if size == -1 else size)


def errors(weight: Tensor, grids: Grid, size: int, importance: Tensor | None = None) -> Tensor:
    """float64 [out, groups]: the error of the nearest levels, found by trying them all."""
    groups = column_groups(weight.shape[1], size)
    squared = nearest_by_trying(weight, grids, groups)[1].square()
    if importance is not None:
        squared = squared * importance.double()
    out = torch.zeros(grids.scale.shape, dtype=torch.float64)
    return out.index_add_(1, groups, squared)


def nearest_by_trying(weight: Tensor, grids: Grid, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Level and distance of the nearest level, float64, by brute force over all 2**bits levels."""
    levels = torch.arange(2**grids.bits, dtype=torch.float64) - grids.zero[:, groups, None].double()
    distance = (weight[..., None].double() - levels * grids.scale[:, groups, None].double()).abs()
    best = distance.argmin(-1, keepdim=True)
    return levels.gather(-1, best)[..., 0], distance.gather(-1, best)[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", KINDS)
def test_scales_are_representable(symmetric: bool, search: bool, dtype: torch.dtype) -> None:
    for bits in BITS:
        fitted = grid.fit(random_weight(bits), bits, 16, symmetric, dtype, search)
        assert fitted.scale.dtype == torch.float32
        assert fitted.scale.shape == (6, 3)
        assert torch.equal(fitted.scale.to(dtype).float(), fitted.scale)
        assert bool(torch.isfinite(fitted.scale).all())
        assert bool((fitted.scale != 0).all())
        assert torch.equal(fitted.high - fitted.low, torch.full_like(fitted.low, 2**bits - 1))


@given(
    seed=st.integers(0, 10**6), bits=st.integers(2, 8), symmetric=st.booleans(), size=st.sampled_from([-1, 1, 8, 12])
)
@settings(deadline=None, max_examples=60)
def test_nearest_is_the_nearest_level(seed: int, bits: int, symmetric: bool, size: int) -> None:
    weight = random_weight(seed)
    shrunk = grid.fit(weight * 0.6, bits, size, symmetric, torch.float32)  # so that some weights lie outside
    flip = torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0)[:, None]
    fitted = Grid(shrunk.scale * (flip if symmetric else 1.0), shrunk.zero, bits, torch.float32)
    groups = column_groups(40, size)
    scale = fitted.scale[:, groups]
    k = grid.nearest(weight, scale, fitted.low[:, groups], fitted.high[:, groups])
    assert torch.equal(k, k.round())
    assert bool((k >= fitted.low[:, groups]).all())
    assert bool((k <= fitted.high[:, groups]).all())
    distance = (weight.double() - k.double() * scale.double()).abs()
    best = nearest_by_trying(weight, fitted, groups)[1]
    # the division is rounded in float32: at a tie either neighbour may win, by a few units in the last place
    assert bool((distance <= best + 1e-6 * (weight.abs() + scale.abs())).all())


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    size=st.sampled_from([-1, 1, 7, 16]),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
)
@settings(deadline=None, max_examples=80)
def test_search_never_loses(
    seed: int, bits: int, symmetric: bool, size: int, dtype: torch.dtype, weighted: bool
) -> None:
    weight = random_weight(seed)
    importance = random_weight(seed + 1)[0].square() + 1e-4 if weighted else None
    plain = grid.fit(weight, bits, size, symmetric, dtype, False, importance)
    found = grid.fit(weight, bits, size, symmetric, dtype, True, importance)
    before, after = errors(weight, plain, size, importance), errors(weight, found, size, importance)
    # the search compares float32 sums; a group it calls equal may differ in the last places
    floor = 1e-12 * weight.square().sum() * (1.0 if importance is None else importance.max())
    assert bool((after <= before * (1 + 1e-5) + floor).all())


def test_search_gains() -> None:
    weight = random_weight(3, rows=64, columns=64)
    for bits in (2, 3, 4):
        for symmetric in KINDS:
            plain = grid.fit(weight, bits, 32, symmetric, torch.float32)
            found = grid.fit(weight, bits, 32, symmetric, torch.float32, True)
            assert errors(weight, found, 32).sum() < 0.97 * errors(weight, plain, 32).sum()


def test_importance_moves_the_search() -> None:
    weight = random_weight(5, rows=64)
    importance = torch.where(torch.arange(40) < 4, 1000.0, 1.0)
    blind = grid.fit(weight, 3, -1, True, torch.float32, True)
    seeing = grid.fit(weight, 3, -1, True, torch.float32, True, importance)
    assert errors(weight, seeing, -1, importance).sum() < 0.8 * errors(weight, blind, -1, importance).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_largest_weight_positive_gains_from_a_negative_scale(bits: int) -> None:
    half = 2 ** (bits - 1)
    steps = torch.arange(1 - half, half + 1).float()  # exact levels of the mirrored grid: one more on the positive side
    weight = 0.25 * steps.repeat(3, 4)
    found = grid.fit(weight, bits, -1, True, torch.float32, True)
    assert bool((found.scale < 0).all())
    positive = min(
        float(errors(weight, Grid(torch.full((3, 1), 0.25 * f / 50), found.zero, bits, torch.float32), -1).sum())
        for f in range(25, 80)
    )
    assert float(errors(weight, found, -1).sum()) < 0.5 * positive
    mirrored = grid.fit(-weight, bits, -1, True, torch.float32, True)
    assert torch.equal(mirrored.scale, -found.scale)


@pytest.mark.parametrize("bits", BITS)
def test_symmetric_search_has_no_preferred_side(bits: int) -> None:
    """Over many groups. In one group the sides may differ: the fine steps go on from one sign only."""
    weight = random_weight(7, rows=256)
    one = errors(weight, grid.fit(weight, bits, 20, True, torch.float32, True), 20).sum()
    other = errors(-weight, grid.fit(-weight, bits, 20, True, torch.float32, True), 20).sum()
    assert float(one / other) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("search", [False, True])
def test_zero_points_stay_inside(bits: int, search: bool) -> None:
    base = random_weight(bits)
    for weight in (base, base.abs(), -base.abs(), base.abs() + 1, -base.abs() - 1, torch.zeros_like(base)):
        zero = grid.fit(weight, bits, 8, False, torch.bfloat16, search).zero
        assert torch.equal(zero, zero.round())
        assert int(zero.min()) >= 1
        assert int(zero.max()) <= 2**bits - 1
    half = grid.fit(base, bits, 8, True, torch.bfloat16, search).zero
    assert bool((half == 2 ** (bits - 1)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("sign", ["both", "positive", "negative", "barely negative"])
def test_plain_grid_reaches_every_weight(bits: int, symmetric: bool, sign: str) -> None:
    """Without search no weight is further than half a step from its level, whatever the signs in its group."""
    base = random_weight(bits, rows=20)
    weight = {"both": base, "positive": base.abs(), "negative": -base.abs(), "barely negative": base.abs()}[sign]
    if sign == "barely negative":
        weight[:, ::8] *= -0.01
    for size in (-1, 1, 8):
        groups = column_groups(40, size)
        fitted = grid.fit(weight, bits, size, symmetric, torch.float32)
        _, distance = nearest_by_trying(weight, fitted, groups)
        assert bool((distance <= 0.5001 * fitted.scale[:, groups].abs()).all())


def test_settled_group_size() -> None:
    assert grid.settle_group_size(None, [256, 512]) == 128
    assert grid.settle_group_size(None, [256, 576]) == 64
    assert grid.settle_group_size(None, [256, 96]) == 32
    assert grid.settle_group_size(None, [256, 100]) == -1
    assert grid.settle_group_size(-1, [100]) == -1
    assert grid.settle_group_size(1, [100]) == 1
    assert grid.settle_group_size(48, [100, 40]) == 48  # ragged, and whole for the narrower: formats decide
    assert grid.settle_group_size(100, [100, 40]) == 100
    for bad in (0, -2, -128):
        with pytest.raises(CompressError, match=f"group size {bad} is out of range"):
            grid.settle_group_size(bad, [100])
    with pytest.raises(CompressError, match=r"group size 128 is larger than .* 100"):
        grid.settle_group_size(128, [100, 64])


def test_group_count() -> None:
    assert grid.group_count(100, -1) == 1
    assert grid.group_count(100, 100) == 1
    assert grid.group_count(100, 33) == 4
    assert grid.group_count(100, 1) == 100


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", KINDS)
def test_each_group_is_fitted_alone(symmetric: bool, search: bool) -> None:
    """Also the ragged last one, and a group of one column."""
    weight = random_weight(11, columns=41)
    importance = random_weight(12, columns=41)[0].square()
    for size in (8, 20, 40):
        whole = grid.fit(weight, 4, size, symmetric, torch.float32, search, importance)
        for g in range(-(-41 // size)):
            mine = slice(g * size, min(g * size + size, 41))
            alone = grid.fit(weight[:, mine], 4, -1, symmetric, torch.float32, search, importance[mine])
            torch.testing.assert_close(whole.scale[:, g : g + 1], alone.scale)
            assert torch.equal(whole.zero[:, g : g + 1], alone.zero)


@pytest.mark.parametrize("symmetric", KINDS)
def test_rows_are_fitted_alone(symmetric: bool) -> None:
    weight = random_weight(13, rows=300, columns=1024)  # more rows than one chunk of the search
    whole = grid.fit(weight, 4, 128, symmetric, torch.bfloat16, True)
    for rows in (slice(0, 3), slice(254, 258), slice(299, 300)):
        alone = grid.fit(weight[rows], 4, 128, symmetric, torch.bfloat16, True)
        assert torch.equal(whole.scale[rows], alone.scale)
        assert torch.equal(whole.zero[rows], alone.zero)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", KINDS)
def test_groups_of_zeros_stay_zero(symmetric: bool, search: bool, dtype: torch.dtype) -> None:
    weight = random_weight(17, columns=32)
    weight[:, 8:16] = 0
    weight[2] = 0
    for bits in BITS:
        fitted = grid.fit(weight, bits, 8, symmetric, dtype, search)
        scale = fitted.scale.repeat_interleave(8, 1)
        low, high = fitted.low.repeat_interleave(8, 1), fitted.high.repeat_interleave(8, 1)
        dense = grid.value(grid.nearest(weight, scale, low, high), scale, dtype)
        assert bool((fitted.scale != 0).all())
        assert bool(torch.isfinite(fitted.scale).all())
        assert bool((dense[:, 8:16] == 0).all())
        assert bool((dense[2] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("symmetric", KINDS)
@pytest.mark.parametrize("magnitude", [1e-42, 1e-30, 1e-9, 1e4, 1e30, 1e37])
def test_extreme_magnitudes(magnitude: float, symmetric: bool, search: bool, dtype: torch.dtype) -> None:
    weight = random_weight(19, spread=1.0).clamp(-4, 4) * magnitude
    for bits in (2, 4, 8):
        fitted = grid.fit(weight, bits, 8, symmetric, dtype, search)
        assert bool(torch.isfinite(fitted.scale).all())
        assert bool((fitted.scale != 0).all())
        assert torch.equal(fitted.scale.to(dtype).float(), fitted.scale)
        scale = fitted.scale.repeat_interleave(8, 1)
        zero = fitted.zero.repeat_interleave(8, 1)
        k = grid.nearest(weight, scale, -zero, 2**bits - 1 - zero)
        assert bool(torch.isfinite(k).all())
        assert bool(torch.isfinite(zero).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_scale(dtype: torch.dtype) -> None:
    tiny, top = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    rounded = grid.round_scale(torch.tensor([1.0, -0.5, tiny, -tiny, 0.0, 1e-44, -1e-44, 3e38, -3e38]), dtype)
    assert rounded[:4].tolist() == [1.0, -0.5, tiny, -tiny]
    smallest = tiny * torch.finfo(dtype).eps if dtype == torch.float16 else tiny  # float16 scales may be subnormal
    assert bool((rounded[4:7].abs() == smallest).all())
    assert bool((rounded[7:].abs() > 6e4).all())
    assert bool((rounded.abs() <= top).all())
    assert torch.equal(rounded.to(dtype).float(), rounded)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_is_rounded_once(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    scale = torch.randn(1000, generator=g).to(dtype)
    k = torch.randint(-255, 256, (1000,), generator=g)
    exact = k.double() * scale.double()
    assert torch.equal(grid.value(k.float(), scale.float(), dtype), exact.float().to(dtype).float())
    assert torch.equal(grid.value(k.float(), scale.float(), dtype), (k.to(dtype) * scale).float())


@pytest.mark.parametrize("symmetric", KINDS)
def test_inputs_stay_as_they_are(symmetric: bool) -> None:
    weight, importance = random_weight(23), torch.rand(40)
    copies = weight.clone(), importance.clone()
    for size in (-1, 8, 40):
        grid.fit(weight, 3, size, symmetric, torch.bfloat16, True, importance)
    assert torch.equal(weight, copies[0])
    assert torch.equal(importance, copies[1])
