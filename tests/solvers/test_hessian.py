"""Factors of Hessians: inverses of triangular matrices, and what layers with one input share."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor

from compress.solvers import hessian as second_order
from compress.solvers.masks import Choice, Pattern


def problem(columns: int) -> Tensor:
    torch.manual_seed(columns)
    x = torch.randn(2 * columns, columns)
    return x.t() @ x / len(x)


@pytest.mark.parametrize("columns", [1, 3, 257, 700])
def test_inverse_of_a_triangular_matrix(columns: int) -> None:
    lower = torch.linalg.cholesky(problem(columns) + 0.1 * torch.eye(columns))
    inverse = second_order.invert_lower(lower)
    exact = torch.linalg.inv(lower.double())
    assert float((inverse - exact).norm() / exact.norm()) < 1e-5
    assert not bool(inverse.triu(1).any())


def test_the_factor_is_that_of_the_inverse() -> None:
    h = problem(600)
    damped, factor, _ = second_order.factorise(h, torch.zeros(600, dtype=torch.bool), 0.01)
    exact = torch.linalg.inv(damped.double())
    assert float((factor.double().t() @ factor.double() - exact).norm() / exact.norm()) < 1e-4
    assert not bool(factor.tril(-1).any())


def test_layers_with_one_input_share_what_is_made_of_it() -> None:
    h = problem(24)
    first = second_order.prepare(h, 0.01, True)
    assert second_order.prepare(h, 0.01, True) is first
    pruned = second_order.prepare(h, 0.01, True, Choice(Pattern(2, 4), 4))
    assert pruned is not first
    assert second_order.prepare(h, 0.01, True, Choice(Pattern(2, 4), 4)) is pruned
    assert second_order.prepare(h.clone(), 0.01, True, Choice(Pattern(2, 4), 4)) is not pruned


def test_what_changed_or_is_gone_is_not_kept() -> None:
    h = problem(16)
    first = second_order.prepare(h, 0.01, False)
    h.diagonal().mul_(2)
    second = second_order.prepare(h, 0.01, False)
    assert second is not first
    assert not torch.equal(second.factor, first.factor)
    del h
    gc.collect()
    assert not second_order._last


@pytest.mark.parametrize("whole", [False, True])
def test_halves_make_a_product_of_nearly_float32(whole: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 200, generator=generator)
    x = (40 * x).round() if whole else x * torch.logspace(-6, 6, 200)
    matrix = torch.randn(200, 90, generator=generator) * torch.logspace(3, -3, 90)
    left, right = second_order.halves(x, matrix, whole)
    assert left.dtype == right.dtype == torch.bfloat16
    assert len(right) == (400 if whole else 600)
    exact, most = x.double() @ matrix.double(), x.double().abs() @ matrix.double().abs()
    assert float(((left.double() @ right.double() - exact).abs() / most).max()) < 2.0**-16
    assert torch.equal(second_order.product(x, matrix, whole), x @ matrix)
