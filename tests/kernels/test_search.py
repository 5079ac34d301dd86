"""search.cu, run as C++ on this CPU by its own launch, against the search of `grid.fit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import grid
from compress.cuda import search
from compress.grid import Grid

pytestmark = pytest.mark.xdist_group("shim")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any]) -> None:
    """Launches go to the emulation."""

    def launch(kernel: Any, grid: Any, block: Any, args: Any, shared: int, x: Tensor) -> None:
        build(kernel.file, dict(kernel.defines)).launch(kernel.name, grid, block, list(args), shared)

    monkeypatch.setattr(search, "function", lambda kernel, device: kernel)
    monkeypatch.setattr(search, "launch", launch)


def weights(rows: int, columns: int, spread: float = 0.05) -> Tensor:
    """Heavy-tailed, with a shift of its own in each row."""
    g = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(rows, columns, generator=g) * torch.exp(torch.randn(rows, columns, generator=g) * 0.5)
    return (w + torch.randn(rows, 1, generator=g)) * spread


def importance(columns: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(columns)).square() + 1e-4


def errors(weight: Tensor, found: Grid, size: int, cost: Tensor | None) -> Tensor:
    """float64 [out, groups]."""
    columns = weight.shape[1]
    group = torch.arange(columns) // (columns if size == -1 else size)
    scale = found.scale[:, group]
    k = grid.nearest(weight, scale, found.low[:, group], found.high[:, group])
    squared = (k.double() * scale.double() - weight.double()).square() * (1 if cost is None else cost.double())
    return torch.zeros(found.scale.shape, dtype=torch.float64).index_add_(1, group, squared)


def both(
    weight: Tensor, bits: int, size: int, symmetric: bool, dtype: torch.dtype, cost: Tensor | None = None
) -> tuple[Grid, Grid]:
    """The kernel's grids and those of `grid.fit`."""
    given = weight.clone(), None if cost is None else cost.clone()
    columns = weight.shape[1]
    found = search.fit(weight, bits, columns if size == -1 else size, symmetric, dtype, cost)
    assert torch.equal(weight.nan_to_num(), given[0].nan_to_num())
    assert cost is None or torch.equal(cost, given[1])
    return Grid(*found, bits, dtype), grid.fit(weight, bits, size, symmetric, dtype, True, cost)


def as_good(
    weight: Tensor, bits: int, size: int, symmetric: bool, dtype: torch.dtype, cost: Tensor | None = None
) -> float:
    """Compares; returns the share of grids that are the same."""
    found, expected = both(weight, bits, size, symmetric, dtype, cost)
    assert found.scale.shape == found.zero.shape == expected.scale.shape
    assert torch.equal(found.scale.to(dtype).float(), found.scale)
    assert torch.equal(found.zero, found.zero.round())
    assert bool((found.zero >= 1).all() and (found.zero < 2**bits).all())
    # the plain scale puts the largest weight halfway between two levels, and so does its negative: float32 decides
    rtol = 3e-5 if symmetric and dtype == torch.float32 and bits == 8 else 1e-5
    torch.testing.assert_close(
        errors(weight, found, size, cost), errors(weight, expected, size, cost), rtol=rtol, atol=0
    )
    return float(((found.scale == expected.scale) & (found.zero == expected.zero)).double().mean())


KINDS = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@KINDS
@pytest.mark.parametrize(
    ("size", "bits", "dtype", "weighted"),
    [
        (16, 2, torch.float16, True), (32, 4, torch.bfloat16, False), (128, 8, torch.float32, True),
        (-1, 3, torch.float16, False), (40, 4, torch.bfloat16, True), (7, 8, torch.float32, False),
        (1, 4, torch.float16, True),
    ],
)  # fmt: skip
def test_it_finds_what_grid_finds(size: int, bits: int, dtype: torch.dtype, weighted: bool, symmetric: bool) -> None:
    weight = weights(5, 96)
    assert as_good(weight, bits, size, symmetric, dtype, importance(96) if weighted else None) > 0.95


@KINDS
@pytest.mark.parametrize(("columns", "size"), [(290, 128), (300, 256), (700, 512), (1100, 1000), (1500, -1)])
def test_larger_groups(columns: int, size: int, symmetric: bool) -> None:
    """Of 8, 16 and 32 lanes, read in one piece and in several."""
    assert as_good(weights(3, columns), 4, size, symmetric, torch.bfloat16, importance(columns)) == 1


@KINDS
def test_nearly_all_of_many_are_the_same(symmetric: bool) -> None:
    assert as_good(weights(60, 960), 3, 32, symmetric, torch.float16, importance(960)) > 0.99


@KINDS
@pytest.mark.parametrize(("dtype", "bits"), [(torch.float16, 4), (torch.bfloat16, 2), (torch.float32, 8)], ids=str)
def test_groups_that_are_special(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    """Zeros, constants, both signs of them, one weight that is not zero, weights near zero, huge ones."""
    weight = weights(9, 64)
    weight[0] = 0
    weight[1], weight[2] = 0.3, -0.3
    weight[3, ::2] = 0
    weight[4], weight[4, 5] = 0, -1
    weight[5] *= 1e-6
    weight[6] *= 1e7
    weight[7] = weight[7].abs()
    weight[8] = 1e-12
    as_good(weight, bits, 32, symmetric, dtype)


@KINDS
@pytest.mark.parametrize("magnitude", [1e30, 1e37, float("inf"), float("nan")])
def test_errors_that_are_no_numbers(magnitude: float, symmetric: bool) -> None:
    """No candidate is better than the plain grid."""
    weight = weights(2, 32).clamp(-1, 1)
    weight[0, 3] = magnitude
    found, expected = both(weight, 4, 32, symmetric, torch.bfloat16)
    torch.testing.assert_close(found.scale, expected.scale, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found.zero, expected.zero, rtol=0, atol=0, equal_nan=True)


def test_strided_weights() -> None:
    weight = weights(4, 200)
    assert as_good(weight[:, 8:136], 4, 32, True, torch.float16, importance(200)[8:136]) == 1
    assert as_good(weight.t(), 4, -1, True, torch.float16) == 1


@KINDS
@pytest.mark.parametrize("size", [32, -1])
def test_grid_asks_the_kernel(symmetric: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a CUDA tensor, in a search, if the kernel takes it."""

    class Cuda(Tensor):
        is_cuda = True

    weight, cost = weights(4, 96), importance(96)
    expected = grid.fit(weight, 4, size, symmetric, torch.float16, True, cost)
    plain = grid.fit(weight, 4, size, symmetric, torch.float16)
    asked: list[int] = []

    def takes(weight: Tensor, size: int, dtype: torch.dtype, importance: Tensor | None) -> bool:
        asked.append(size)
        return True

    monkeypatch.setattr(search, "takes", takes)
    there = weight.as_subclass(Cuda)
    found = grid.fit(there, 4, size, symmetric, torch.float16, True, cost)
    assert asked == [96 if size == -1 else size]
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.zero, expected.zero)
    assert torch.equal(grid.fit(there, 4, size, symmetric, torch.float16).scale, plain.scale)
    assert len(asked) == 1


@pytest.mark.parametrize("size", [1, 16, 64, 65, 128, 256, 257, 512, 513, 28672])
def test_a_group_fits_its_lanes(size: int) -> None:
    kernel, team = search._kernel(4, size, True, torch.float16, True)
    macros = dict(kernel.defines)
    assert macros["TEAM"] == team
    assert macros["LONG"] == int(size > 512)
    assert size <= team * macros["HELD"] or macros["LONG"]
    assert macros["HELD"] <= 16


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only float32 on a CUDA device that can run kernels."""

    class Cuda:
        device, dtype, shape = torch.device("cuda", 0), torch.float32, (4, 96)

        def numel(self) -> int:
            return 4 * 96

    class Found:
        usable, reason = True, ""

    monkeypatch.setattr(search, "probe", lambda index: Found)

    class Cost:
        device, dtype = Cuda.device, torch.float32

    assert search.takes(Cuda(), 32, torch.float16, Cost())
    assert search.takes(Cuda(), 10**6, torch.float32, None)
    assert not search.takes(Cuda(), 32, torch.float64, None)
    assert not search.takes(Cuda(), 32, torch.float16, torch.ones(96))
    assert not search.takes(torch.ones(4, 96), 32, torch.float16, None)
    Cuda.shape = (1, 10**6)  # one scale for a whole matrix
    assert not search.takes(Cuda(), 10**6, torch.float16, None)
    assert search.takes(Cuda(), 128, torch.float16, None)
    Found.usable = False
    assert not search.takes(Cuda(), 128, torch.float16, None)
