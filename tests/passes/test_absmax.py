"""Int8 by absmax and zeropoint: the papers' equations in float64, their schemes, bitsandbytes' own quantiser."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.packed.uniform import UniformGrid
from compress.passes.absmax import Absmax
from compress.types import LayerStats, Needs, Solved, Storage

NOTHING = LayerStats(0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = ["channel", "tensor"]
ACTIVATIONS = ["none", "token", "tensor"]


def random_weight(seed: int, rows: int = 6, columns: int = 40) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=g) * 0.05 * torch.exp(torch.randn(rows, 1, generator=g))


def packed_of(solved: Solved) -> UniformGrid:
    assert isinstance(solved.packed, UniformGrid)
    return solved.packed


@given(
    seed=st.integers(0, 10**6),
    weights=st.sampled_from(WEIGHTS),
    zeropoint=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=60)
def test_codes_are_the_papers(seed: int, weights: str, zeropoint: bool, dtype: torch.dtype) -> None:
    """The code of each weight is its nearest on a grid whose scale is the equation's, up to its rounding."""
    weight = random_weight(seed)
    packed = packed_of(Absmax(weights, "none", zeropoint)(weight, NOTHING, dtype))  # type: ignore[arg-type]
    w = weight.double()
    part = w if weights == "channel" else w.reshape(1, -1)
    low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
    wanted = (high - low) / 255 if zeropoint else part.abs().amax(1) / 127
    scale = packed.scales.double()
    assert packed.scales.dtype == dtype
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # float16 scales may be subnormal
    assert bool(((scale[:, 0] - wanted).abs() <= torch.finfo(dtype).eps * wanted + tiny).all())
    k = packed.codes.double() - (128 if packed.zeros is None else packed.zeros.double())
    zero = 128 if packed.zeros is None else packed.zeros.double()
    ends = (-127, 127) if not zeropoint else (-zero, 255 - zero)
    inside = torch.minimum(torch.maximum(w / scale, torch.as_tensor(ends[0])), torch.as_tensor(ends[1]))
    assert bool(((inside - k).abs() <= 0.5 + 1e-3).all())
    if not zeropoint:
        assert int(packed.codes.min()) >= 1  # -128 is never used
        assert packed.zeros is None
    else:
        assert packed.zeros is not None
        assert bool((packed.zeros >= 1).all())


@given(
    seed=st.integers(0, 10**6),
    weights=st.sampled_from(WEIGHTS),
    activations=st.sampled_from(ACTIVATIONS),
    zeropoint=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=40)
def test_storage_losses_and_shapes(
    seed: int, weights: str, activations: str, zeropoint: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(seed)
    weight[2] = 0
    weight[:, 3] = 0
    copy = weight.clone()
    method = Absmax(weights, activations, zeropoint)  # type: ignore[arg-type]
    solved = method(weight, NOTHING, dtype)
    packed = packed_of(solved)
    assert torch.equal(weight, copy)
    mode = "" if activations == "none" else activations + ("_zeropoint" if zeropoint else "")
    assert packed.storage == method.storage == Storage("uniform", 8, -1, not zeropoint, activations=mode)
    dense = packed.dequantize().double()
    assert bool((dense[2] == 0).all())  # zeros stay zeros, so a mask survives
    assert bool((dense[:, 3] == 0).all())
    torch.testing.assert_close(solved.row_loss.double(), (weight.double() - dense).square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(solved.row_norm.double(), weight.double().square().sum(1), rtol=1e-5, atol=0)
    again = packed_of(method(weight, NOTHING, dtype))
    assert all(torch.equal(t, again.tensors()[n]) for n, t in packed.tensors().items())
    if weights == "tensor":
        assert bool((packed.scales == packed.scales[0]).all())
        assert method.row_unit == 0
    else:
        assert method.row_unit == 1
        alone = packed_of(method(weight[1:2], NOTHING, dtype))
        assert torch.equal(alone.codes, packed.codes[1:2])
        assert torch.equal(alone.scales, packed.scales[1:2])


def output_error(method: Absmax, weight: Tensor, x: Tensor) -> float:
    exact = x.double() @ weight.double().t()
    y = method(weight, NOTHING, torch.float32).packed.linear(x).double()
    return float((y - exact).norm() / exact.norm())


def test_finer_scales_are_better() -> None:
    """The order of the paper's table 1 on inputs with tokens, rows and ranges unlike each other."""
    g = torch.Generator().manual_seed(0)
    weight = random_weight(1, 32, 128)
    x = torch.randn(1, 24, 128, generator=g) * torch.exp(torch.randn(1, 24, 1, generator=g))
    errors = {pair: output_error(Absmax(*pair), weight, x) for pair in itertools.product(WEIGHTS, ACTIVATIONS)}
    per_tensor, row_wise, vector_wise = (
        errors["tensor", "tensor"],
        errors["tensor", "token"],
        errors["channel", "token"],
    )
    assert vector_wise < row_wise < per_tensor < 0.1
    assert errors["channel", "none"] < errors["tensor", "none"]
    assert all(errors[w, "none"] < errors[w, a] for w in WEIGHTS for a in ("token", "tensor"))
    # one-sided weights and inputs use half of an absmax grid and all of an affine one
    weight = torch.randn(256, 128, generator=g).abs()
    absmax, zeropoint = (output_error(Absmax("channel", "token", z), weight, x.abs()) for z in (False, True))
    assert zeropoint < 0.7 * absmax


def test_bitsandbytes_row_quantiser_agrees() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(3, 64, 96).to(torch.float16)
    theirs, absmax, _ = functional.int8_vectorwise_quant(weight)
    packed = packed_of(Absmax()(weight, NOTHING, torch.float32))
    differ = packed.codes.to(torch.int16) - 128 != theirs.to(torch.int16)
    exact = weight.double() * 127 / weight.double().abs().amax(1, keepdim=True)
    tie = ((exact.abs() % 1) - 0.5).abs() < 1e-5  # they multiply by 127 / absmax, we divide by absmax / 127
    assert bool((differ <= tie).all())
    assert int(differ.sum()) < 5
    torch.testing.assert_close(packed.scales[:, 0], absmax / 127)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_float_dtype(dtype: torch.dtype) -> None:
    weight = random_weight(13).to(dtype)
    packed = Absmax()(weight, NOTHING, torch.bfloat16).packed
    assert torch.equal(packed.dequantize(), Absmax()(weight.float(), NOTHING, torch.bfloat16).packed.dequantize())


def test_settings() -> None:
    assert Absmax.needs == Needs()
    assert Absmax().settle([64, 48]) == Absmax()
    with pytest.raises(CompressError, match="--weights: no scales of weights 'row'"):
        Absmax(weights="row")  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="--activations: no scales of activations 'dynamic'"):
        Absmax(activations="dynamic")  # type: ignore[arg-type]


def test_words() -> None:
    assert "vector-wise absmax" in Absmax("channel", "token").words([])[0]
    assert "row-wise zeropoint" in Absmax("tensor", "token", True).words([])[0]
    every = {Absmax(w, a, z).words([])[0] for w in WEIGHTS for a in ACTIVATIONS for z in (False, True)}  # type: ignore[arg-type]
    assert len(every) == 12
