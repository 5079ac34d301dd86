"""Cross-layer equalisation: equal ranges, the same function, the optimum; bias correction against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.passes.equalize import Equalize, bias_shift, equalising
from compress.passes.rtn import RTN
from compress.recipe import parse
from compress.types import Edge, LayerStats, Needs, Transform


def pair(seed: int, inside: int = 12) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First weight and bias, second weight, inputs; channels of very different ranges."""
    g = torch.Generator().manual_seed(seed)
    first = torch.randn(inside, 9, generator=g) * torch.exp(torch.randn(inside, 1, generator=g) * 1.5)
    second = torch.randn(7, inside, generator=g) * torch.exp(torch.randn(1, inside, generator=g) * 1.5)
    return first, torch.randn(inside, generator=g), second, torch.randn(50, 9, generator=g)


def edge_of(first: Tensor, bias: Tensor, *readers: Tensor) -> Edge:
    return Edge("linear", readers, LayerStats(0), torch.cat([first, bias[:, None]], 1))


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=40)
def test_ranges_meet_and_the_function_stays(seed: int) -> None:
    first, bias, second, x = pair(seed)
    s = Equalize().scale(edge_of(first, bias, second))
    assert s is not None
    r1, r2 = first.abs().amax(1), second.abs().amax(0)
    torch.testing.assert_close(s, (1 / r2) * (r1 * r2).sqrt(), rtol=1e-5, atol=0)  # equation 11
    torch.testing.assert_close((first / s[:, None]).abs().amax(1), (second * s).abs().amax(0), rtol=1e-5, atol=0)
    before = torch.relu(x @ first.T + bias) @ second.T
    after = torch.relu(x @ (first / s[:, None]).T + bias / s) @ (second * s).T
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))


def precision(first: Tensor, second: Tensor) -> float:
    """Equation 9: the sum of the products of the channels' precisions under one scale a tensor."""
    one = first.abs().amax(1) / first.abs().max()
    two = second.abs().amax(0) / second.abs().max()
    return float((one.double() * two.double()).sum())


@given(seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=30)
def test_no_other_scale_has_more_precision(seed: int) -> None:
    first, bias, second, _ = pair(seed)
    s = Equalize().scale(edge_of(first, bias, second))
    assert s is not None
    best = precision(first / s[:, None], second * s)
    g = torch.Generator().manual_seed(seed)
    for spread in (0.01, 0.1, 1.0):
        other = s * torch.exp(torch.randn(len(s), generator=g) * spread)
        assert precision(first / other[:, None], second * other) <= best * (1 + 1e-6)
    assert precision(first, second) <= best * (1 + 1e-6)


def test_one_visit_is_the_optimum_and_two_readers_count_as_one() -> None:
    first, bias, second, _ = pair(3)
    third = torch.randn(5, 12, generator=torch.Generator().manual_seed(4)) * 3
    s = Equalize().scale(edge_of(first, bias, second, third))
    stacked = Equalize().scale(edge_of(first, bias, torch.cat([second, third])))
    assert s is not None
    assert stacked is not None
    assert torch.equal(s, stacked)
    again = Equalize().scale(edge_of(first / s[:, None], bias / s, second * s, third * s))
    assert again is not None
    torch.testing.assert_close(again, torch.ones(12))


def test_it_helps_one_scale_a_tensor() -> None:
    for seed in range(5):
        first, bias, second, x = pair(seed)
        s = Equalize().scale(edge_of(first, bias, second))
        assert s is not None
        rounding = parse(Equalize().then)
        assert isinstance(rounding, RTN)
        assert (rounding.bits, rounding.group_size) == (8, 0)

        def tensor_wise(w: Tensor, rounding: RTN = rounding) -> Tensor:
            return rounding(w, LayerStats(0), torch.float32).packed.dequantize()

        exact = torch.relu(x @ first.T + bias) @ second.T
        plain = torch.relu(x @ tensor_wise(first).T + bias) @ tensor_wise(second).T
        equal = torch.relu(x @ tensor_wise(first / s[:, None]).T + bias / s) @ tensor_wise(second * s).T
        assert float((equal - exact).square().sum()) < 0.5 * float((plain - exact).square().sum())


def test_empty_channels_and_norms_are_left_alone() -> None:
    assert equalising(torch.tensor([0.0, 4.0, 0.0, 8.0]), torch.tensor([3.0, 0.0, 0.0, 2.0])).tolist() == [1, 1, 1, 2]
    assert Equalize().scale(Edge("norm", (torch.ones(3, 4),), LayerStats(0))) is None
    tiny = equalising(torch.tensor([1e-30]), torch.tensor([1e-30]))
    assert float(tiny) == pytest.approx(1.0)


def test_bias_correction_restores_the_mean() -> None:
    g = torch.Generator().manual_seed(6)
    weight = torch.randn(6, 16, generator=g)
    x = torch.randn(400, 16, generator=g) + torch.randn(16, generator=g) * 2
    rounded = RTN(bits=3, group_size=-1)(weight, LayerStats(0), torch.bfloat16).packed.dequantize()
    shift = bias_shift(weight, rounded, x.mean(0))
    assert shift.dtype == torch.float32
    exact, ours = x @ weight.T, x @ rounded.float().T
    assert float((ours.mean(0) - exact.mean(0)).abs().max()) > 0.05
    torch.testing.assert_close((ours + shift).mean(0), exact.mean(0), rtol=1e-4, atol=1e-4)
    assert float((ours + shift - exact).square().mean()) < float((ours - exact).square().mean())
    assert not bias_shift(weight, weight, x.mean(0)).any()


def test_where_the_mean_comes_from() -> None:
    weight, rounded = torch.ones(2, 3), torch.full((2, 3), 0.5)
    analytic, stats = torch.tensor([1.0, 2.0, 3.0]), LayerStats(5, mean=torch.tensor([2.0, 0.0, 0.0]))
    one = Equalize().shift(weight, rounded, analytic, stats)
    two = Equalize(bias_correction="measured").shift(weight, rounded, analytic, stats)
    assert one is not None
    assert two is not None
    assert (one.tolist(), two.tolist()) == ([3.0, 3.0], [1.0, 1.0])
    assert Equalize().shift(weight, rounded, None, stats) is None
    assert Equalize(bias_correction="none").shift(weight, rounded, analytic, stats) is None


def test_settings() -> None:
    plain = Equalize()
    assert isinstance(plain, Transform)
    assert not plain.needs
    assert Equalize(bias_correction="none").needs == Needs()
    assert Equalize(bias_correction="measured").needs == Needs(ranges=True)
    assert plain.makers == ("linear",)
    with pytest.raises(CompressError, match="0 sweeps"):
        Equalize(sweeps=0)
    with pytest.raises(CompressError, match="bias correction"):
        Equalize(bias_correction="guess")  # type: ignore[arg-type]
