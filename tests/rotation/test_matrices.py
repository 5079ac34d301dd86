"""Orthogonal matrices: orthogonal, the same for a seed, flat, and the fast product is the dense one."""

from __future__ import annotations

import math

import pytest
import torch

from compress.errors import CompressError
from compress.rotation.asked import KINDS, Kind
from compress.rotation.matrices import core_order, heads_in, heads_out, paley, rotation, sylvester

SIZES = (1, 2, 3, 4, 8, 12, 20, 28, 36, 52, 60, 64, 76, 96, 104, 127, 144, 576, 768, 896, 960, 1000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_orthogonal_and_equal_to_its_twin(size: int, kind: Kind) -> None:
    made = rotation(size, kind, seed=3)
    dense = made.dense()
    assert dense.dtype == torch.float64
    assert dense.shape == (size, size)
    assert float((dense @ dense.t() - torch.eye(size)).abs().max()) < 1e-12
    x = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(made.times(x), x.double() @ dense, atol=1e-12)
    w = torch.randn(size, 5, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(made.before(w), dense.t() @ w.double(), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_seeds(kind: Kind) -> None:
    one, again, other = (rotation(52, kind, seed).dense() for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("order", [4, 12, 20, 24, 28, 36, 44, 60, 68, 76, 84, 124, 148, 180, 500])
def test_paley(order: int) -> None:
    """Both types: entries 1 and -1, rows orthogonal, exactly."""
    matrix = paley(order)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


def test_sylvester_is_scipys() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    for order in (1, 2, 16, 64):
        assert torch.equal(sylvester(order), torch.from_numpy(linalg.hadamard(order)).double())


@pytest.mark.parametrize(
    ("size", "order"),
    [(4096, 1), (576, 36), (768, 12), (896, 28), (1000, 500), (3584, 28), (5120, 20), (2880, 180), (5376, 84),
     (52, None), (3, None), (6, None), (1600, 200), (1, 1), (2, 1)],
)  # fmt: skip
def test_cores(size: int, order: int | None) -> None:
    assert core_order(size) == order


@pytest.mark.parametrize("size", [64, 576, 768, 1000])
def test_flat(size: int) -> None:
    """A single large coordinate is spread over all of them, evenly."""
    spike = torch.zeros(size)
    spike[7] = 100.0
    assert torch.allclose(rotation(size).times(spike).abs(), torch.full((size,), 100 / math.sqrt(size)).double())


def test_where_no_hadamard_is_known_it_says_so() -> None:
    assert "random orthogonal of order 13 x Hadamard of order 4" in rotation(52).words
    assert rotation(576).words == "randomised Hadamard of order 576"


def test_uniform() -> None:
    """The mean over many seeds of a random orthogonal matrix is 0, of its squares 1 / n."""
    stack = torch.stack([rotation(4, "orthogonal", seed).dense() for seed in range(800)])
    assert float(stack.mean(0).abs().max()) < 0.09
    assert float((stack.square().mean(0) - 0.25).abs().max()) < 0.05


def test_heads() -> None:
    """Rows of shared heads and columns of the heads that read them: the product is what it was."""
    generator = torch.Generator().manual_seed(0)
    made = rotation(6, seed=1)
    value, out = torch.randn(20, 9, generator=generator), torch.randn(5, 24, generator=generator)
    bias = torch.randn(20, generator=generator)
    rows = torch.tensor([[2, 3, 4, 5, 6, 7], [14, 15, 16, 17, 18, 19]])
    repeated = rows[[0, 0, 1, 1]].flatten()
    x = torch.randn(9, 3, generator=generator).double()
    plain = out.double() @ (value.double() @ x + bias.double()[:, None])[repeated]
    kept = value.clone()
    turned = heads_out(value, rows, made) @ x + heads_out(bias, rows, made)[:, None]
    assert torch.allclose(heads_in(out, made) @ turned[repeated], plain, atol=1e-12)
    assert torch.equal(value, kept)
    others = [r for r in range(20) if r not in rows.flatten().tolist()]
    assert torch.equal(heads_out(value, rows, made)[others], value.double()[others])


def test_bad_settings() -> None:
    with pytest.raises(CompressError, match=r"no kind 'givens'.*use hadamard or orthogonal"):
        rotation(4, "givens")  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="0 coordinates"):
        rotation(0)
