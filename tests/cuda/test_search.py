"""On a GPU the search of a grid's scales is a kernel; with COMPRESS_KERNELS=0 it is torch, and finds the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress import grid
from compress.cuda import search
from compress.grid import Grid

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def error(weight: Tensor, found: Grid, cost: Tensor | None) -> Tensor:
    """float64 [out, groups]."""
    rows, groups = found.scale.shape
    parts = weight.reshape(rows, groups, -1)
    scale, low, high = (x[..., None] for x in (found.scale, found.low, found.high))
    off = grid.nearest(parts, scale, low, high).double() * scale - parts.double()
    return (off.square() * (1 if cost is None else cost.double().reshape(groups, -1))).sum(-1)


def same(found: Grid, expected: Grid) -> float:
    """The share of grids that are the same but for a float32's last place."""
    equal = torch.isclose(found.scale, expected.scale, rtol=1e-6, atol=0) & (found.zero == expected.zero)
    return float(equal.double().mean())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "size", "dtype"),
    [
        (4, 128, torch.float16), (4, 128, torch.float32), (3, 32, torch.bfloat16), (2, 16, torch.float16),
        (8, 256, torch.bfloat16), (4, 512, torch.float16), (4, -1, torch.bfloat16),
    ],
)  # fmt: skip
def test_kernel_and_torch_agree(
    bits: int, size: int, dtype: torch.dtype, symmetric: bool, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4096, 4096, device="cuda") * 0.02
    cost = torch.randn(4096, device="cuda").square() + 1e-4 if weighted else None
    assert search.takes(weight, 4096 if size == -1 else size, dtype, cost)
    found = grid.fit(weight, bits, size, symmetric, dtype, True, cost)
    monkeypatch.setenv("COMPRESS_KERNELS", "0")
    assert not search.takes(weight, 4096 if size == -1 else size, dtype, cost)
    expected = grid.fit(weight, bits, size, symmetric, dtype, True, cost)
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    # On a GPU torch multiplies by the inverse of a number that it is to divide by: scales differ in a float32's last
    # place, and where that decides how they are stored, errors differ too. On a CPU it divides, as the kernel does.
    torch.testing.assert_close(error(weight, found, cost).sum(), error(weight, expected, cost).sum(), rtol=1e-5, atol=0)
    assert same(found, expected) > 0.99
    rows = weight[1000:1032].cpu()
    cost = None if cost is None else cost.cpu()
    ours = Grid(found.scale[1000:1032].cpu(), found.zero[1000:1032].cpu(), bits, dtype)
    defined = grid.fit(rows, bits, size, symmetric, dtype, True, cost)
    # Two coarse scales may be equally good but for a sum's rounding, and the fine search goes on around another then.
    equal = torch.isclose(error(rows, ours, cost), error(rows, defined, cost), rtol=1e-5, atol=0)
    assert float(equal.double().mean()) > 0.99
    torch.testing.assert_close(error(rows, ours, cost).sum(), error(rows, defined, cost).sum(), rtol=1e-4, atol=0)
    assert same(ours, defined) > 0.99


def test_it_runs_on_the_streams_of_torch() -> None:
    weight = torch.randn(1000, 1111, device="cuda")
    expected = grid.fit(weight, 4, 100, False, torch.float16, True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = grid.fit(weight * 1, 4, 100, False, torch.float16, True)
    stream.synchronize()
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
