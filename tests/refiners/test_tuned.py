"""Tuned layers start as what was solved, write what they will store, and move against the gradient, masks fixed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.packed.sparse import Sparse
from compress.passes.fp4 import FP4
from compress.passes.gptq import GPTQ
from compress.passes.nf4 import NF4
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.refiners.tuned import Tuned, paces, tunable, tuned, tuned_vector
from compress.types import LayerStats, Packed, Pass

ROWS, COLUMNS = 16, 72  # groups of 32 have a ragged end
PASSES: dict[str, Callable[[], Pass]] = {
    "4 bits": lambda: GPTQ(4, 24),
    "2 bits, asymmetric": lambda: GPTQ(2, 24, symmetric=False),
    "ragged groups": lambda: RTN(3, 32),
    "ragged groups, asymmetric": lambda: RTN(3, 32, symmetric=False),
    "a scale a row": lambda: RTN(8, -1),
    "groups in activation order": lambda: GPTQ(3, 24, act_order="groups"),
    "2:4, 16 bits": lambda: SparseGPT(pattern="2:4"),
    "2:4, 4 bits": lambda: SparseGPT(pattern="2:4", bits=4, group_size=24),
    "half, 3 bits, asymmetric": lambda: SparseGPT(sparsity=0.5, bits=3, group_size=24, symmetric=False),
    "two levels": lambda: SpQR(outlier_threshold=float("inf")),
    "outliers": SpQR,
    "nf4": NF4,
    "nf4, double": lambda: NF4(double_quant=True),
    "fp4": FP4,
}


def problem(seed: int = 0) -> tuple[Tensor, LayerStats]:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=g)
    x = torch.randn(300, COLUMNS, generator=g) @ (torch.eye(COLUMNS) + 0.2 * torch.randn(COLUMNS, COLUMNS, generator=g))
    return weight, LayerStats(300, x.T @ x / 300)


def solved(name: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Packed, Tensor]:
    weight, stats = problem()
    method = PASSES[name]()
    return method(weight, stats, dtype).packed, weight


def parts(packed: Packed) -> dict[str, Tensor]:
    return packed.tensors()


def equal(a: Packed, b: Packed) -> bool:
    one, two = parts(a), parts(b)
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def step(layer: Tuned, gradient: Tensor, rate: float, scale_rate: float) -> Tensor:
    """The weights after the first step at these rates."""
    into = torch.full_like(gradient, float("nan"))
    layer.step(gradient.clone(), paces(1, rate, scale_rate, gradient.device)[0], into)
    again = torch.full_like(gradient, float("nan"))
    layer.write(again)
    assert torch.equal(into, again)
    return into


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PASSES)
def test_it_starts_as_what_was_solved(name: str, dtype: torch.dtype) -> None:
    packed, weight = solved(name, dtype)
    assert tunable(packed)
    layer = tuned(packed, weight)
    assert equal(layer.packed(), packed)
    into = torch.full(packed.shape, float("nan"), dtype=dtype)
    layer.write(into)
    assert torch.equal(into, packed.dequantize())


@pytest.mark.parametrize("name", PASSES)
def test_what_is_written_is_what_is_stored(name: str) -> None:
    """Also after many moves, large ones among them; nothing leaves its grid, its mask or its kind."""
    packed, weight = solved(name)
    before = parts(packed)
    layer = tuned(packed, weight)
    g = torch.Generator().manual_seed(1)
    into = torch.empty(packed.shape, dtype=torch.bfloat16)
    for i in range(30):
        step(layer, torch.randn(packed.shape, generator=g), 0.5 if i % 3 else 0.05, 0.02)
    layer.keep()
    for _ in range(3):
        step(layer, torch.randn(packed.shape, generator=g), 0.4, 0.02)  # after what is kept
    made = layer.packed()
    assert made.storage == packed.storage
    assert not equal(made, packed)
    again = type(made).from_tensors(made.tensors(), made.storage, made.shape, torch.bfloat16)
    assert torch.equal(again.dequantize(), made.dequantize())
    assert all(torch.equal(before[n], t) for n, t in parts(packed).items()), "the caller's layer was changed"
    if isinstance(packed, Sparse):
        assert isinstance(made, Sparse)
        assert torch.equal(made.mask, packed.mask)
        assert not made.dequantize()[~packed.mask].any()
    if name == "outliers":
        assert torch.equal(made.tensors()["outlier_values"], before["outlier_values"])
    twin = tuned(made, weight)
    twin.write(into)
    assert torch.equal(into, made.dequantize())


@pytest.mark.parametrize("name", [n for n in PASSES if n != "2:4, 16 bits"])
def test_weights_move_against_the_gradient(name: str) -> None:
    """Scales held: where the gradient is positive no weight grows, and in the end every one that can has fallen."""
    packed, weight = solved(name, torch.float32)
    layer = tuned(packed, weight)
    last = packed.dequantize().float()
    for _ in range(6):
        now = step(layer, torch.ones(packed.shape), 0.3, 0.0)
        assert bool((now <= last + 1e-6).all())
        last = now.clone()
    fallen = now < packed.dequantize()
    free = packed.mask if isinstance(packed, Sparse) else torch.ones_like(fallen)
    assert float(fallen[free].float().mean()) > 0.6  # the others were at an end of their grid, or are outliers


def test_a_scale_follows_its_group() -> None:
    """With the places held, a gradient along the levels shrinks the scales, one against them stretches them."""
    packed, weight = solved("4 bits", torch.float32)
    dense = packed.dequantize()
    for sign, larger in ((1.0, False), (-1.0, True)):
        layer = tuned(packed, weight)
        step(layer, sign * dense, 0.0, 0.05)
        layer.keep()
        scales = layer.packed().tensors()["scales"].abs()
        before = packed.tensors()["scales"].abs()
        assert torch.allclose(scales, before * (1.05 if larger else 0.95))


def test_kept_values_follow_their_gradient() -> None:
    """16-bit values, pruned: to the target of a quadratic, the pruned ones staying 0."""
    packed, weight = solved("2:4, 16 bits", torch.float32)
    assert isinstance(packed, Sparse)
    layer = tuned(packed, weight)
    target = packed.dequantize() + 0.1
    now = packed.dequantize()
    first = float((packed.dequantize() - target)[packed.mask].square().mean())
    for _ in range(60):
        now = step(layer, now - target, 0.0, 0.01)
    assert float((now - target)[packed.mask].square().mean()) < 0.1 * first
    assert not now[~packed.mask].any()


def test_what_cannot_be_tuned() -> None:
    from compress.passes.absmax import Absmax
    from compress.passes.kmeans import KMeans

    weight, stats = problem()
    for method in (KMeans(bits=3), GPTQ(8, -1, activations="token"), Absmax()):
        packed = method.settle([COLUMNS])(weight, stats, torch.bfloat16).packed
        assert tunable(packed) == (method == Absmax() and not packed.storage.activations)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PASSES)
def test_what_is_kept_stays_while_the_layer_moves_on(name: str, dtype: torch.dtype) -> None:
    packed, weight = solved(name, dtype)
    layer = tuned(packed, weight)
    step(layer, torch.randn(packed.shape, generator=torch.Generator().manual_seed(1)), 0.4, 0.02)
    layer.keep()
    kept = {n: t.clone() for n, t in parts(layer.packed()).items()}
    step(layer, torch.randn(packed.shape, generator=torch.Generator().manual_seed(2)), 0.4, 0.02)
    assert all(torch.equal(t, kept[n]) for n, t in parts(layer.packed()).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gains_that_are_kept_stay(dtype: torch.dtype) -> None:
    gain = torch.linspace(0.5, 1.5, 16).to(dtype)
    before = gain.clone()
    layer = tuned_vector(gain)
    step(layer, torch.ones(16), 0.0, 0.1)
    assert torch.equal(layer.packed().dequantize(), before)
