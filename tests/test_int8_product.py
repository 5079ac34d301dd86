"""The 8-bit product: exact integers, scales of one token or one sequence, nothing that depends on the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import int8

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def integers(seed: int, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def inputs(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a few large features and a shift."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g) * torch.exp(torch.randn(shape[-1], generator=g))
    return (x + 0.3).to(dtype)


def weights(seed: int, out: int, columns: int, affine: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (out, columns), generator=g, dtype=torch.uint8)
    zeros = torch.randint(0, 256, (out,), generator=g, dtype=torch.uint8) if affine else None
    return codes, torch.randn(out, generator=g) * 0.01, zeros


def reference(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, mode: str) -> Tensor:
    """float64, token by token: quantise as the text says, then multiply what the codes stand for."""
    x = x.double()
    w = (codes.double() - (128 if zeros is None else zeros.double()[:, None])) * scales.double()[:, None]
    sequences = x.reshape(-1, *x.shape[-2:]) if x.dim() > 2 else x.reshape(1, -1, x.shape[-1])
    out = []
    for sequence in sequences:
        for group in sequence[None] if mode.startswith("tensor") else sequence[:, None]:
            if mode.endswith("zeropoint"):
                low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
                scale = (high - low) / 255 or 1.0
                zero = round(-low / scale)
                q = (torch.round(group / scale) + zero).clamp(0, 255) - zero
            else:
                scale = float(group.abs().max()) / 127 or 1.0
                q = torch.round(group / scale)
            out.append(q * scale @ w.t())
    return torch.cat(out).reshape(*x.shape[:-1], len(codes))


@given(
    seed=st.integers(0, 10**6),
    m=st.integers(0, 20),
    k=st.integers(1, 70),
    n=st.integers(1, 20),
    affine_x=st.booleans(),
    affine_w=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_product_is_exact(seed: int, m: int, k: int, n: int, affine_x: bool, affine_w: bool) -> None:
    x, w = integers(seed, m, k), integers(seed + 1, n, k)
    x_zero = integers(seed + 2, m, 1).to(torch.int32) if affine_x else None
    w_zero = integers(seed + 3, n).to(torch.int32) if affine_w else None
    left = x.long() - (0 if x_zero is None else x_zero.long())
    right = w.long() - (0 if w_zero is None else w_zero.long()[:, None])
    total = int8.product(x, x_zero, w, w_zero)
    assert total.dtype == torch.int32
    assert torch.equal(total.long(), (left[:, None] * right[None]).sum(-1))


@pytest.mark.parametrize("columns", [5, 1024, 1025, 2100])
@pytest.mark.parametrize("extreme", [True, False])
def test_the_two_ways_to_multiply_agree(columns: int, extreme: bool) -> None:
    x, w = integers(0, 17, columns), integers(1, 9, columns)
    if extreme:  # the largest sums, all of one sign and then alternating
        x.fill_(-128)
        w.fill_(-128)
        w[::2] = 127
    expected = (x.double() @ w.double().t()).to(torch.int32)
    assert torch.equal(int8.float_mm(x, w), expected)
    assert torch.equal(int8.int_mm(x, w), expected)


def test_a_cpu_without_avx512_multiplies_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(torch, "_int_mm", None)
    x, w = integers(2, 3, 1500), integers(3, 4, 1500)
    assert torch.equal(int8.int_mm(x, w).long(), (x.double() @ w.double().t()).long())


@pytest.mark.parametrize("columns", [32768, 32769, 65536, 70000])
def test_no_overflow_in_long_rows(columns: int) -> None:
    """Every product at its largest: 255 * 255 a column needs more than 31 bits from 33026 columns on."""
    x, w = torch.full((2, columns), 127, dtype=torch.int8), torch.full((3, columns), 127, dtype=torch.int8)
    x[1] = -128
    x_zero, w_zero = torch.tensor([[-128], [127]], dtype=torch.int32), torch.full((3,), -128, dtype=torch.int32)
    total = int8.product(x, x_zero, w, w_zero)
    assert total.tolist() == [[255 * 255 * columns] * 3, [-255 * 255 * columns] * 3]


@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(40,), (1, 40), (6, 40), (2, 5, 40), (2, 2, 3, 40)]),
    mode=st.sampled_from(int8.MODES),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_linear_against_float64(seed: int, shape: tuple[int, ...], mode: str, affine: bool, dtype: torch.dtype) -> None:
    x = inputs(seed, *shape, dtype=dtype)
    codes, scales, zeros = weights(seed, 7, 40, affine)
    y = int8.linear(x, codes, scales, zeros, mode)
    expected = reference(x, codes, scales, zeros, mode)
    assert y.dtype == dtype
    assert y.shape == expected.shape
    # a tie may fall the other way in float32: one code of one feature, which is one scale times the largest weight
    step = float(x.float().abs().max()) / 127 * 255 * 0.05
    eps = torch.finfo(dtype).eps
    error = (y.double() - expected).abs()
    assert bool((error <= step + 2 * eps * expected.abs().max() + 1e-5).all())
    assert float((error <= 2 * eps * expected.abs().max() + 1e-5).double().mean()) > 0.8


@pytest.mark.parametrize("mode", int8.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_change_nothing(mode: str, dtype: torch.dtype) -> None:
    """Rows of a batch, and for "token" each token, are computed as if they were alone, to the bit."""
    x = inputs(5, 3, 6, 48, dtype=dtype)
    x[1] *= 50
    codes, scales, zeros = weights(6, 10, 48, affine=True)
    together = int8.linear(x, codes, scales, zeros, mode)
    for i in range(3):
        assert torch.equal(int8.linear(x[i : i + 1], codes, scales, zeros, mode), together[i : i + 1])
        assert torch.equal(int8.linear(x[i], codes, scales, zeros, mode), together[i])
        if mode.startswith("token"):
            assert torch.equal(int8.linear(x[i, 2], codes, scales, zeros, mode), together[i, 2])
    if mode.startswith("tensor"):
        scale = int8.quantise(x, mode)[1]
        assert scale.shape == (3, 1, 1)
        assert float(scale[1] / scale[0]) > 10


@pytest.mark.parametrize("mode", int8.MODES)
@pytest.mark.parametrize("affine", [True, False])
def test_zeros_give_zeros(mode: str, affine: bool) -> None:
    x = inputs(7, 2, 4, 40)
    x[0, 1] = 0
    x[1] = 0
    codes, scales, zeros = weights(8, 6, 40, affine)
    y = int8.linear(x, codes, scales, zeros, mode)
    assert bool(torch.isfinite(y).all())
    assert bool((y[0, 1] == 0).all())
    assert bool((y[1] == 0).all())
    for empty in (torch.zeros(0, 40), torch.zeros(2, 0, 40)):
        if mode.startswith("token"):
            assert int8.linear(empty, codes, scales, zeros, mode).shape == (*empty.shape[:-1], 6)


@pytest.mark.parametrize("mode", int8.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_magnitudes(mode: str, dtype: torch.dtype) -> None:
    codes, _, zeros = weights(9, 6, 40, affine=True)
    for size in (torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal * 1e-3, 6e4):
        x = (inputs(10, 4, 40).clamp(-1, 1) * size).to(dtype)
        y = int8.linear(x, codes, torch.full((6,), 1e-6), zeros, mode)
        assert bool(torch.isfinite(y).all())
    lost = inputs(10, 4, 40, dtype=dtype)
    lost[1, 3] = float("nan")
    y = int8.linear(lost, codes, torch.ones(6), zeros, mode)
    assert bool(torch.isnan(y[1]).all())  # a NaN is not hidden


@given(seed=st.integers(0, 10**6), mode=st.sampled_from(int8.MODES), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=40)
def test_quantised_within_half_a_step(seed: int, mode: str, dtype: torch.dtype) -> None:
    x = inputs(seed, 2, 3, 30, dtype=dtype)
    before = x.clone()
    codes, scale, zero = int8.quantise(x, mode)
    assert torch.equal(x, before)
    assert codes.dtype == torch.int8
    assert (zero is not None) == mode.endswith("zeropoint")
    back = (codes.double() - (0 if zero is None else zero.double())) * scale.double()
    # the affine grid's ends move by up to half a step, since its zero is a whole number
    allowed = (1.0 if zero is not None else 0.5) + 1e-4
    assert bool(((back - x.double()).abs() <= allowed * scale.double()).all())
    if zero is None:
        assert int(codes.min()) >= -127
        over = (-2, -1) if mode == "tensor" else (-1,)
        assert bool((codes.int().abs().amax(over) == 127).all())
