"""Round to nearest: each weight on its nearest level, and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.packed.uniform import UniformGrid
from compress.passes.rtn import RTN
from compress.types import LayerStats, Needs, Solved, Storage

NOTHING = LayerStats(0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(seed: int, rows: int = 6, columns: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) + torch.randn(rows, 1, generator=g) * 0.5) * 0.05


def packed_of(solved: Solved) -> UniformGrid:
    assert isinstance(solved.packed, UniformGrid)
    return solved.packed


def levels(packed: UniformGrid) -> tuple[Tensor, Tensor, Tensor]:
    """scale, lowest and highest weight of the grid of each weight, float64 [out, in]."""
    groups = packed.column_groups()
    scale = packed.scales.double()[:, groups]
    zero = packed.zeros.double()[:, groups] if packed.zeros is not None else torch.tensor(2.0 ** (packed.bits - 1))
    ends = torch.stack([-zero * scale, (2**packed.bits - 1 - zero) * scale])
    return scale, ends.amin(0), ends.amax(0)


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    size=st.sampled_from([-1, 1, 8, 12, 16]),
    symmetric=st.booleans(),
    search=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=150)
def test_error_is_at_most_half_a_step(
    seed: int, bits: int, size: int, symmetric: bool, search: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(seed)
    packed = packed_of(RTN(bits, size, symmetric, search)(weight, NOTHING, dtype))
    assert packed.scales.dtype == dtype
    assert packed.storage == Storage("uniform", bits, size, symmetric)
    scale, lowest, highest = levels(packed)
    inside = weight.double().clamp(lowest, highest)
    error = (packed.dequantize().double() - weight.double()).abs()
    # to the end of the grid, half a step, the rounding of scale * k to the stored dtype, and a tie in float32
    rounding = torch.finfo(dtype).eps / 2 * inside.abs() + torch.finfo(dtype).smallest_normal
    allowed = (weight.double() - inside).abs() + scale.abs() / 2 + rounding + 1e-6 * (scale.abs() + weight.abs())
    # a weight rounded up by half a step may round from twice its own magnitude
    assert bool((error <= allowed + torch.finfo(dtype).eps * scale.abs()).all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 8])
def test_plain_grid_reaches_every_weight(bits: int, symmetric: bool, size: int) -> None:
    for weight in (random_weight(bits), random_weight(bits).abs(), -random_weight(bits).abs()):
        packed = packed_of(RTN(bits, size, symmetric)(weight, NOTHING, torch.float32))
        error = (packed.dequantize() - weight).abs()
        assert bool((error <= 0.5001 * packed.scales[:, packed.column_groups()].abs()).all())


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_on_the_grid_are_kept(symmetric: bool) -> None:
    g = torch.Generator().manual_seed(1)
    for bits in range(2, 9):
        zero = 2 ** (bits - 1) if symmetric else 1 + bits % 3
        k = torch.randint(-zero, 2**bits - zero, (5, 24), generator=g)
        k[:, 0], k[:, 1] = -zero, 2**bits - 1 - zero  # both ends are used, so the plain asymmetric scale is the step
        weight = k * 0.125
        solved = RTN(bits, -1, symmetric, scale_search=symmetric)(weight, NOTHING, torch.float32)
        if not symmetric:
            assert torch.equal(solved.packed.dequantize(), weight)
            assert bool((solved.row_loss == 0).all())
        else:  # the search has no exact factor for this step, yet comes near it
            assert float(solved.row_loss.sum()) < 5e-3 * float(solved.row_norm.sum())


@given(seed=st.integers(0, 10**6), bits=st.integers(2, 8), size=st.sampled_from([-1, 16]), symmetric=st.booleans())
@settings(deadline=None, max_examples=40)
def test_rows_are_independent(seed: int, bits: int, size: int, symmetric: bool) -> None:
    weight = random_weight(seed)
    for search in (False, True):
        method = RTN(bits, size, symmetric, search)
        together = packed_of(method(weight, NOTHING, torch.bfloat16))
        for r in range(len(weight)):
            alone = packed_of(method(weight[r : r + 1], NOTHING, torch.bfloat16))
            assert torch.equal(alone.codes, together.codes[r : r + 1])
            assert torch.equal(alone.scales, together.scales[r : r + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_losses_are_those_of_the_stored_layer(symmetric: bool, dtype: torch.dtype) -> None:
    weight = random_weight(7, 8, 64)
    solved = RTN(4, 16, symmetric)(weight, NOTHING, dtype)
    error = weight.double() - solved.packed.dequantize().double()
    torch.testing.assert_close(solved.row_loss.double(), error.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(solved.row_norm.double(), weight.double().square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_more_bits_smaller_groups_and_search_help(symmetric: bool) -> None:
    weight = random_weight(9, 64, 128)

    def total(bits: int, size: int, search: bool = False) -> float:
        return float(RTN(bits, size, symmetric, search)(weight, NOTHING, torch.bfloat16).row_loss.sum())

    by_bits = [total(bits, 32) for bits in range(2, 9)]
    assert all(fine < 0.5 * coarse for coarse, fine in itertools.pairwise(by_bits))
    assert total(4, 16) < total(4, 64) < total(4, -1)
    assert total(3, 32, search=True) < 0.95 * total(3, 32)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [True, False])
def test_weight_is_unchanged_and_answer_repeats(symmetric: bool, search: bool) -> None:
    weight = random_weight(11)
    copy = weight.clone()
    method = RTN(3, 16, symmetric, search)
    one, two = method(weight, NOTHING, torch.bfloat16), method(weight, NOTHING, torch.bfloat16)
    assert torch.equal(weight, copy)
    for name, tensor in one.packed.tensors().items():
        assert torch.equal(tensor, two.packed.tensors()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    weight = random_weight(13).to(dtype)
    packed = RTN(4, 8)(weight, NOTHING, torch.bfloat16).packed
    assert torch.equal(packed.dequantize(), RTN(4, 8)(weight.float(), NOTHING, torch.bfloat16).packed.dequantize())


def test_settings() -> None:
    assert RTN().needs == Needs()
    assert RTN().settle([256, 64]).group_size == 64
    assert RTN(group_size=48).settle([256, 64]).group_size == 48
    assert RTN(group_size=0).settle([256, 64]).group_size == 0
    assert RTN().row_unit == RTN(group_size=-1).row_unit == RTN(group_size=32).row_unit == 1
    assert RTN(group_size=0).row_unit == 0
    for bits in (1, 9, 0, -4):
        with pytest.raises(CompressError, match=f"bits {bits} is out of range"):
            RTN(bits=bits)
    for size in (-2, 257):
        with pytest.raises(CompressError, match=f"group size {size}"):
            RTN(group_size=size).settle([256, 64])


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    search=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=40)
def test_one_scale_a_tensor(seed: int, bits: int, symmetric: bool, search: bool, dtype: torch.dtype) -> None:
    """The tensor as one long row gives the same weights; stored as equal scales a row, what every format can hold."""
    weight = random_weight(seed)
    method = RTN(bits, 0, symmetric, search)
    solved = method(weight, NOTHING, dtype)
    packed = packed_of(solved)
    flat = packed_of(RTN(bits, -1, symmetric, search)(weight.reshape(1, -1), NOTHING, dtype))
    assert torch.equal(packed.dequantize(), flat.dequantize().reshape(weight.shape))
    assert bool((packed.scales == flat.scales).all())
    assert packed.scales.shape == (len(weight), 1)
    assert packed.scales.is_contiguous()
    assert packed.storage == method.storage == Storage("uniform", bits, -1, symmetric)
    error = weight.double() - packed.dequantize().double()
    torch.testing.assert_close(solved.row_loss.double(), error.square().sum(1), rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_a_row_beats_one_a_tensor(symmetric: bool) -> None:
    weight = random_weight(3, 32, 64) * torch.logspace(-1, 1, 32)[:, None]
    for search in (False, True):
        tensor = RTN(4, 0, symmetric, search)(weight, NOTHING, torch.float32)
        row = RTN(4, -1, symmetric, search)(weight, NOTHING, torch.float32)
        assert float(row.row_loss.sum()) < 0.5 * float(tensor.row_loss.sum())
    plain = RTN(4, 0, symmetric)(weight, NOTHING, torch.float32).row_loss.sum()
    assert float(RTN(4, 0, symmetric, True)(weight, NOTHING, torch.float32).row_loss.sum()) < float(plain)
