"""AWQ: its objective against stored inputs, the search against brute force, the pass that follows on the same grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.passes.awq import AWQ, scales
from compress.passes.rtn import RTN
from compress.recipe import parse
from compress.types import Edge, LayerStats, Needs, Transform


def problem(seed: int, tokens: int = 96, width: int = 32) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Activations of which a few channels are large, and two readers."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g) * torch.exp(torch.randn(width, generator=g))
    return x, (torch.randn(12, width, generator=g), torch.randn(8, width, generator=g) * 0.5)


def edge_of(x: Tensor, readers: tuple[Tensor, ...], maker: str = "norm") -> Edge:
    return Edge(maker, readers, LayerStats(len(x), x.T @ x / len(x), mean_abs=x.abs().mean(0)))


def brute(method: AWQ, x: Tensor, readers: tuple[Tensor, ...], s: Tensor) -> float:
    """Equation 4 as it is written, float64, Q by the round-to-nearest pass."""
    size = method.group_size
    rounding = RTN(method.bits, size, method.symmetric)
    total = 0.0
    for w in readers:
        q = rounding(w * s, LayerStats(0), torch.float32).packed.dequantize().double()
        total += float((q @ (x.double() / s.double()).T - w.double() @ x.double().T).square().sum()) / len(x)
    return total


@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 6),
    size=st.sampled_from([-1, 8, 12]),
    symmetric=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_objective_and_search(seed: int, bits: int, size: int, symmetric: bool) -> None:
    x, readers = problem(seed)
    method = AWQ(bits=bits, group_size=size, symmetric=symmetric, grid_steps=8)
    edge = edge_of(x, readers)
    assert edge.stats.mean_abs is not None
    assert edge.stats.hessian is not None
    tried = [scales(edge.stats.mean_abs, i / 8) for i in range(9)]
    wanted = [brute(method, x, readers, s) for s in tried]
    ours = [float(method.loss(readers, edge.stats.hessian, s, size)) for s in tried]
    assert ours == pytest.approx(wanted, rel=2e-3)
    s = method.scale(edge)
    chosen = wanted[0] if s is None else brute(method, x, readers, s)
    assert chosen <= min(wanted) * (1 + 2e-3)


def test_it_beats_plain_rounding() -> None:
    better = []
    for seed in range(6):
        x, readers = problem(seed)
        method = AWQ(bits=3, group_size=16)
        s = method.scale(edge_of(x, readers))
        assert s is not None
        better.append(brute(method, x, readers, s) / brute(method, x, readers, torch.ones(32)))
    assert max(better) < 1
    assert sum(better) / len(better) < 0.8


@given(seed=st.integers(0, 10**6), alpha=st.floats(0, 1))
@settings(deadline=None, max_examples=40)
def test_scales_grow_with_activations_around_one(seed: int, alpha: float) -> None:
    g = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(20, generator=g) * 3)
    s = scales(size, alpha)
    assert float((s.max() * s.min()).log()) == pytest.approx(0, abs=1e-4)  # the authors' normalisation
    ratio = (s[0] / s).double().log()
    torch.testing.assert_close(ratio, alpha * (size[0] / size).double().log(), rtol=1e-3, atol=1e-4)


def test_silent_channels_are_left_alone() -> None:
    x, readers = problem(7)
    x[:, [2, 9]] = 0
    s = AWQ(bits=3, group_size=16).scale(edge_of(x, readers))
    assert s is not None
    assert s[[2, 9]].tolist() == [1.0, 1.0]
    live = torch.ones(32, dtype=torch.bool)
    live[[2, 9]] = False
    torch.testing.assert_close(s[live].max() * s[live].min(), torch.tensor(1.0), rtol=1e-4, atol=0)
    assert AWQ(group_size=16).scale(edge_of(torch.zeros(4, 32), readers)) is None, "an expert that saw no token"
    assert torch.equal(scales(torch.zeros(4), 0.5), torch.ones(4))
    assert bool(scales(torch.tensor([1e-30, 1e30]), 1.0).isfinite().all())


def test_equal_activations_need_no_scale() -> None:
    _, readers = problem(8)
    edge = Edge("linear", readers, LayerStats(10, torch.eye(32), mean_abs=torch.full((32,), 2.5)))
    s = AWQ(group_size=16).scale(edge)
    assert s is None or float((s - 1).abs().max()) < 1e-6


def test_nothing_given_is_changed_and_answer_repeats() -> None:
    x, readers = problem(9)
    edge = edge_of(x, readers)
    kept = [w.clone() for w in readers]
    one, two = AWQ(group_size=8).scale(edge), AWQ(group_size=8).scale(edge)
    assert one is not None
    assert two is not None
    assert torch.equal(one, two)
    assert all(torch.equal(a, b) for a, b in zip(kept, readers, strict=True))


def test_the_pass_that_follows_has_the_same_grid() -> None:
    assert AWQ().then == "rtn bits=4 symmetric=false scale_search=true"
    for method in (AWQ(), AWQ(bits=3, group_size=64), AWQ(symmetric=True, group_size=-1)):
        follows = parse(method.then)
        assert isinstance(follows, RTN)
        same = (follows.bits, follows.group_size, follows.symmetric)
        assert same == (method.bits, method.group_size, method.symmetric)
        assert follows.scale_search, "stands for the authors' clip search"
    assert AWQ().settle([256, 64]).then == "rtn bits=4 group_size=64 symmetric=false scale_search=true"
    assert AWQ(then="gptq bits=4").settle([256]).then == "gptq bits=4"
    assert replace(AWQ(), then="rtn bits=3").then == "rtn bits=3"


def test_settings() -> None:
    assert isinstance(AWQ(), Transform)
    assert AWQ().needs == Needs(hessian=True, ranges=True)
    assert AWQ().settle([256]).group_size == 128
    for bits in (1, 9):
        with pytest.raises(CompressError, match=f"bits {bits}"):
            AWQ(bits=bits)
    for size in (0, -2):
        with pytest.raises(CompressError, match=f"group size {size}"):
            AWQ(group_size=size)
    with pytest.raises(CompressError, match="0 steps"):
        AWQ(grid_steps=0)
    with pytest.raises(CompressError, match="group size 512"):
        AWQ(group_size=512).settle([256])
