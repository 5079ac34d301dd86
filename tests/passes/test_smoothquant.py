"""SmoothQuant: equation 4, and that the product stays while the outliers move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.passes.absmax import Absmax
from compress.passes.smoothquant import SmoothQuant, largest, smoothing
from compress.types import Edge, LayerStats, Needs, Transform


def problem(seed: int, tokens: int = 64, width: int = 24) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Activations with two outlier channels, and two readers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g)
    x[:, 3] *= 40
    x[:, 11] *= 15
    return x, (torch.randn(10, width, generator=g), torch.randn(6, width, generator=g) * 0.3)


def edge_of(x: Tensor, readers: tuple[Tensor, ...], maker: str = "norm") -> Edge:
    return Edge(maker, readers, LayerStats(len(x), absmax=x.abs().amax(0)))


@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_equation_4(seed: int, alpha: float) -> None:
    x, readers = problem(seed)
    s = SmoothQuant(alpha=alpha).scale(edge_of(x, readers))
    assert s is not None
    for j in range(x.shape[1]):
        top = max(float(w[i, j].abs()) for w in readers for i in range(len(w)))
        wanted = float(x[:, j].abs().max()) ** alpha / top ** (1 - alpha)
        assert float(s[j]) == pytest.approx(wanted, rel=1e-5)
    for w in readers:
        torch.testing.assert_close((x / s) @ (w * s).T, x @ w.T, rtol=1e-4, atol=1e-3)


def test_one_half_makes_both_sides_equally_hard() -> None:
    x, readers = problem(1)
    s = SmoothQuant().scale(edge_of(x, readers))
    assert s is not None
    torch.testing.assert_close((x / s).abs().amax(0), largest(tuple(w * s for w in readers)))


def test_ends_of_alpha() -> None:
    x, readers = problem(2)
    all_on_weights = SmoothQuant(alpha=1.0).scale(edge_of(x, readers))
    all_on_inputs = SmoothQuant(alpha=0.0).scale(edge_of(x, readers))
    assert all_on_weights is not None
    assert all_on_inputs is not None
    torch.testing.assert_close((x / all_on_weights).abs().amax(0), torch.ones(24))
    torch.testing.assert_close(largest(tuple(w * all_on_inputs for w in readers)), torch.ones(24))


def test_it_helps_int8_products() -> None:
    """Activations with a scale a token, weights with a scale a channel: the W8A8 that the paper smooths for."""

    def int8(t: Tensor) -> Tensor:
        scale = t.abs().amax(1, keepdim=True) / 127
        return torch.round(t / scale) * scale

    x, readers = problem(3, tokens=256)
    s = SmoothQuant().scale(edge_of(x, readers))
    assert s is not None
    for w in readers:
        exact = x.double() @ w.double().T
        plain = (int8(x) @ int8(w).T - exact).square().sum()
        smooth = (int8(x / s) @ int8(w * s).T - exact).square().sum()
        assert float(smooth) < 0.5 * float(plain)


def test_unused_channels_are_left_alone() -> None:
    s = smoothing(torch.tensor([0.0, 2.0, 0.0, 8.0]), torch.tensor([3.0, 0.0, 0.0, 2.0]), 0.5)
    assert s.tolist() == [1.0, 1.0, 1.0, 2.0]


def test_edges_of_the_paper() -> None:
    x, readers = problem(4)
    assert SmoothQuant().scale(edge_of(x, readers, "linear")) is None
    assert SmoothQuant().makers == ("norm",)
    every = SmoothQuant(edges="all")
    assert every.makers == ("norm", "linear")
    norm, linear = every.scale(edge_of(x, readers)), every.scale(edge_of(x, readers, "linear"))
    assert norm is not None
    assert linear is not None
    assert torch.equal(norm, linear)


def test_nothing_given_is_changed() -> None:
    x, readers = problem(5)
    edge = edge_of(x, readers)
    kept = [t.clone() for t in (*readers, edge.stats.absmax) if t is not None]
    one, two = SmoothQuant().scale(edge), SmoothQuant().scale(edge)
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(kept, (*readers, edge.stats.absmax), strict=True) if b is not None)


def test_settings() -> None:
    plain = SmoothQuant()
    assert isinstance(plain, Transform)
    assert plain.needs == Needs(ranges=True)
    name, *given_settings = plain.then.split()
    assert name == Absmax.name
    follows = Absmax(**dict(item.split("=") for item in given_settings))  # type: ignore[arg-type]
    assert (follows.weights, follows.activations) == ("channel", "token"), "vector-wise W8A8"
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(CompressError, match="alpha"):
            SmoothQuant(alpha=alpha)
    with pytest.raises(CompressError, match="edges"):
        SmoothQuant(edges="some")  # type: ignore[arg-type]
