"""refine.cu, run as C++ on this CPU by its own launch, against a step of `compress.refiners.tuned`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.cuda import refine
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.refiners.tuned import _Grid, paces, tuned
from compress.types import LayerStats

pytestmark = pytest.mark.xdist_group("shim")

STEPS = 3


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any]) -> None:
    """Launches go to the emulation."""

    def launch(kernel: Any, grid: Any, block: Any, args: Any, shared: int, x: Tensor) -> None:
        build(kernel.file, dict(kernel.defines)).launch(kernel.name, grid, block, list(args), shared)

    monkeypatch.setattr(refine, "function", lambda kernel, device: kernel)
    monkeypatch.setattr(refine, "launch", launch)


def grid_of(rows: int, columns: int, bits: int, size: int, symmetric: bool, sparse: bool, scales: torch.dtype) -> _Grid:
    g = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=g)
    weight[0, :size] = 0  # a group whose scale says nothing
    x = torch.randn(2 * columns, columns, generator=g)
    method = (
        SparseGPT(pattern="2:4", bits=bits, group_size=size, symmetric=symmetric)
        if sparse
        else RTN(bits, size, symmetric=symmetric)
    )
    made: Any = tuned(method(weight, LayerStats(len(x), x.T @ x / len(x)), scales).packed, weight)
    found: _Grid = made._inner if sparse else made
    return found


@pytest.mark.parametrize(
    ("rows", "columns", "size", "bits", "symmetric", "sparse", "dtype", "scales"),
    [
        (5, 128, 64, 4, True, False, torch.bfloat16, torch.bfloat16),
        (3, 96, 32, 3, False, False, torch.bfloat16, torch.float16),
        (9, 48, 16, 2, False, False, torch.float16, torch.float16),
        (4, 256, 128, 4, True, True, torch.bfloat16, torch.bfloat16),
        (3, 64, 32, 3, False, True, torch.float32, torch.float32),
        (2, 24, 24, 8, True, False, torch.bfloat16, torch.bfloat16),  # a team with lanes to spare
        (2, 520, -1, 4, False, False, torch.bfloat16, torch.bfloat16),  # read twice
    ],
)
def test_it_does_what_torch_does(
    rows: int, columns: int, size: int, bits: int, symmetric: bool, sparse: bool, dtype: torch.dtype,
    scales: torch.dtype,
) -> None:  # fmt: skip
    ours, plain = (grid_of(rows, columns, bits, size, symmetric, sparse, scales) for _ in range(2))
    g = torch.Generator().manual_seed(1)
    pace = paces(STEPS, 0.4, 0.02, torch.device("cpu"))
    for i in range(STEPS):
        slope = torch.randn(rows, columns, generator=g).to(dtype)
        found, expected = (torch.full((rows, columns), float("nan"), dtype=dtype) for _ in range(2))
        ours._step_by_kernel(slope.clone(), pace[i].clone(), found)
        plain.step(slope.clone(), pace[i], expected)
        assert torch.equal(ours._factor, plain._factor)
        assert torch.equal(ours._zero, plain._zero)
        torch.testing.assert_close(ours._usual.squares, plain._usual.squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours._place, plain._place, rtol=0, atol=1e-5)
        same = (found == expected).float().mean()  # a place in the middle between two levels may go either way
        assert float(same) > 0.99
    if sparse:
        assert plain._alive is not None
        assert not found[~plain._alive].any()
    assert symmetric or not torch.equal(ours._zero, ours._zero.round())


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Found:
        usable = True

    class Cuda:
        dtype, device = torch.bfloat16, torch.device("cuda:0")

        def numel(self) -> int:
            return 8

    monkeypatch.setattr(refine, "probe", lambda index: Found)
    monkeypatch.setattr(refine, "why_not_once", lambda found: None)
    one: Any = Cuda()
    assert refine.takes(one, one, 64, torch.float16)
    assert not refine.takes(one, one, 36, torch.float16)
    assert not refine.takes(one, one, 64, torch.float64)
    assert not refine.takes(torch.ones(8), torch.ones(8), 64, torch.float16)
    Found.usable = False
    assert not refine.takes(one, one, 64, torch.float16)
