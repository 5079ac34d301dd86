"""Layers with a factor on each scale: what they compute is what would be stored, and so is its gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress.passes.gptq import GPTQ
from compress.passes.kmeans import KMeans
from compress.passes.nf4 import NF4
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.tuning.scaled import Scaled, scalable, with_factor
from compress.types import LayerStats, Packed, Pass

ROWS, COLUMNS = 16, 72
PASSES: dict[str, Callable[[], Pass]] = {
    "groups": lambda: GPTQ(4, 24),
    "asymmetric": lambda: RTN(2, 24, symmetric=False),
    "ragged": lambda: RTN(3, 32),
    "a scale a row": lambda: RTN(8, -1),
    "in activation order": lambda: GPTQ(3, 24, act_order="groups"),
    "2:4": lambda: SparseGPT(pattern="2:4", bits=4, group_size=24),
    "nf4": NF4,
}


def solved(name: str, dtype: torch.dtype) -> Packed:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=g)
    x = torch.randn(300, COLUMNS, generator=g)
    return PASSES[name]()(weight, LayerStats(300, x.T @ x / 300), dtype).packed


def factors(like: Tensor) -> Tensor:
    return 1 + 0.1 * torch.randn(like.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", PASSES)
def test_it_computes_what_will_be_stored(name: str, dtype: torch.dtype) -> None:
    packed = solved(name, dtype)
    assert scalable(packed)
    layer = Scaled(packed, packed.dequantize().float())
    assert torch.equal(layer.weight(), packed.dequantize().float())
    with torch.no_grad():
        layer.factor.copy_(factors(layer.factor))
    stored = with_factor(packed, layer.factor.detach())
    assert stored.storage == packed.storage
    old, new = packed.tensors(), stored.tensors()
    different = {n for n in old if not torch.equal(old[n], new[n])}
    assert different
    assert all("scales" in n or n == "absmax" for n in different), different
    # a product of a code and a scale is rounded to the scales' dtype once here, and not there
    torch.testing.assert_close(layer.weight(), stored.dequantize().float(), rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", PASSES)
def test_its_gradient_is_that_of_the_factors(name: str) -> None:
    """Against differences of a sum, in float64: each factor's own."""
    packed = solved(name, torch.float32)
    layer = Scaled(packed, packed.dequantize().float())
    direction = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2))
    (slope,) = torch.autograd.grad((layer.weight() * direction).sum(), [layer.factor])
    places = torch.arange(layer.factor.numel())[:: max(1, layer.factor.numel() // 7)]
    for i in places.tolist():
        moved = torch.ones_like(layer.factor).flatten()
        moved[i] += 0.01
        change = with_factor(packed, moved.view_as(layer.factor)).dequantize().double() - packed.dequantize().double()
        assert float(slope.flatten()[i]) == pytest.approx(float((change * direction).sum()) / 0.01, rel=1e-3, abs=1e-4)


def test_outliers_stay() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS, generator=g)
    x = torch.randn(300, COLUMNS, generator=g)
    stats = LayerStats(300, x.T @ x / 300)
    for method in (SpQR(), KMeans(bits=3), NF4(double_quant=True)):
        assert not scalable(method(weight, stats, torch.bfloat16).packed)  # two levels; a codebook; nested scales
