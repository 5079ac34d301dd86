"""The correction is least squares where data abound, nothing where it is noise, and never worse on held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import flows, stats
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.hidden import Activations
from compress.passes.awq import AWQ
from compress.passes.gptq import GPTQ
from compress.recipe import make_recipe
from compress.solvers.past import aimed
from compress.types import Needs, Past
from compress.weights import Weights

ROWS, COLUMNS = 24, 16


def drawn(count: int, moved: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The original's inputs and ours, [count, COLUMNS] in float64: off by a fixed linear map, and by noise."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(COLUMNS, dtype=torch.float64) + 0.4 * torch.randn(
        COLUMNS, COLUMNS, generator=g, dtype=torch.float64
    )
    off = torch.randn(COLUMNS, COLUMNS, generator=g, dtype=torch.float64)
    theirs = torch.randn(count, COLUMNS, generator=g, dtype=torch.float64) @ mix
    noise = torch.randn(count, COLUMNS, generator=g, dtype=torch.float64)
    return theirs, theirs @ (torch.eye(COLUMNS, dtype=torch.float64) - moved * off) + 0.1 * noise


def past_of(theirs: Tensor, ours: Tensor, held: float = 0.25) -> tuple[Tensor, Past]:
    cut = int(len(ours) * (1 - held))
    parts = [(theirs, ours), (theirs[cut:], ours[cut:])]
    cross = [((a - x).T @ x / len(x)).float() for a, x in parts]
    own = parts[1][1]
    past = Past(cross[0], cross[1], (own.T @ own / len(own)).float(), 1 - cut / len(ours))
    return (ours.T @ ours / len(ours)).float(), past


def loss(weight: Tensor, mine: Tensor, theirs: Tensor, ours: Tensor) -> float:
    return float((theirs @ weight.double().T - ours @ mine.double().T).square().mean())


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(9))


def test_with_much_data_it_is_least_squares(weight: Tensor) -> None:
    theirs, ours = drawn(40_000, 0.05)
    hessian, past = past_of(theirs, ours)
    found, share = aimed(weight, hessian, past, 1e-6)
    exact = torch.linalg.lstsq(ours, theirs @ weight.double().T).solution.T
    assert share > 0.99
    assert torch.allclose(found.double(), exact, atol=2e-3)
    fresh = drawn(40_000, 0.05)
    assert loss(weight, found, *fresh) < 0.5 * loss(weight, weight, *fresh)


@pytest.mark.parametrize("seed", range(8))
def test_it_does_not_learn_noise(weight: Tensor, seed: int) -> None:
    """Few rows, inputs that differ by noise alone: the whole correction ruins the layer, this does not."""
    g = torch.Generator().manual_seed(seed)
    theirs = torch.randn(20, COLUMNS, generator=g, dtype=torch.float64)
    ours = theirs + torch.randn(20, COLUMNS, generator=g, dtype=torch.float64)
    hessian, past = past_of(theirs, ours)
    found, share = aimed(weight, hessian, past, 0.01)
    whole = weight + weight @ past.cross @ torch.linalg.inv(
        hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    )
    assert share < 1
    fresh = torch.randn(4000, COLUMNS, generator=g, dtype=torch.float64)
    other = fresh + torch.randn(4000, COLUMNS, generator=g, dtype=torch.float64)
    assert loss(weight, found, fresh, other) < 1.05 * max(
        loss(weight, weight, fresh, other), loss(weight, whole, fresh, other)
    )


def test_the_share_is_the_best_on_held_out_rows(weight: Tensor) -> None:
    theirs, ours = drawn(64, 0.1, seed=3)
    hessian, past = past_of(theirs, ours)
    _, share = aimed(weight, hessian, past, 0.01)
    seen = (hessian - 0.25 * past.held_hessian) / 0.75
    seen.diagonal().add_(0.01 * seen.diagonal().mean())
    move = weight @ ((past.cross - 0.25 * past.held_cross) / 0.75) @ torch.linalg.inv(seen)
    tried = torch.linspace(0, 1, 201)
    errors = [loss(weight, weight + t * move, theirs[48:], ours[48:]) for t in tried]
    assert float(tried[errors.index(min(errors))]) == pytest.approx(share, abs=0.01)


def test_nothing_to_correct(weight: Tensor) -> None:
    theirs, _ = drawn(200, 0.0)
    hessian, past = past_of(theirs, theirs)
    found, share = aimed(weight, hessian, past, 0.01)
    assert share == 0
    assert found is weight
    dead = Past(*(torch.zeros(COLUMNS, COLUMNS) for _ in range(3)), 0.25)
    assert aimed(weight, torch.zeros(COLUMNS, COLUMNS), dead, 0.01)[1] == 0


# --- in a run


def entered(folder: Path, tmp_path: Path, size: int, rows: int = 8) -> tuple[BlockModel, Activations, Activations]:
    """A model, and hidden states of a compressed model beside the original's, two blocks' worth of noise off."""
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 200, (rows, 24), generator=torch.Generator().manual_seed(0))
    ours, theirs = (Activations(model, tokens, size, tmp_path / name) for name in "ab")
    ours.enter()
    theirs.enter()
    for i in range(len(ours)):
        first = ours.states(i)
        noise = [
            torch.randn(24, model.hidden_size, generator=torch.Generator().manual_seed(size * i + j))
            for j in range(len(first))
        ]
        ours._states.put(i, first + 0.1 * torch.stack(noise))
    model.load(0)
    return model, ours, theirs


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_what_is_compared(toy: Path, tmp_path: Path, size: int) -> None:
    """The inputs in both models, of every fourth row and of all, however many go together; the Hessian is as ever."""
    model, ours, theirs = entered(toy, tmp_path, size)
    plain = stats.collect(model, 0, model.linears(0), ours, Needs(hessian=True))
    found = stats.collect(model, 0, model.linears(0), ours, Needs(hessian=True), originals=theirs)
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.stats.hessian, b.stats.hessian)
    assert [group.stats.past is None for group in found] == [False, True, True, True], "q, k, v feed the others"
    seen: list[Tensor] = []
    module = model.module(found[0].linears[0])
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    for flow in (theirs, ours):
        for piece in flow.pieces():
            flow.run(0, piece)
    original, mine = torch.cat(seen).chunk(2)
    past = found[0].stats.past
    assert past is not None
    assert past.share == 0.25
    for cross, rows in ((past.cross, slice(None)), (past.held_cross, slice(3, None, 4))):
        a, b = (x[rows].flatten(0, 1) for x in (original, mine))
        assert torch.allclose(cross.double(), (a - b).T @ b / len(b), atol=1e-5)
    held = mine[3::4].flatten(0, 1)
    assert torch.allclose(past.held_hessian.double(), held.T @ held / len(held), atol=1e-5)


def test_too_few_rows_to_hold_one_out(toy: Path, tmp_path: Path) -> None:
    model, ours, theirs = entered(toy, tmp_path, 2, rows=3)
    found = stats.collect(model, 0, model.linears(0), ours, Needs(hessian=True), originals=theirs)
    assert all(group.stats.past is None for group in found)


def test_experts_have_no_past(four_experts: Path, tmp_path: Path) -> None:
    """Other tokens reach them in the original model; it is run beside them, and is in none of their sums."""
    model, ours, theirs = entered(four_experts, tmp_path, 4)
    for weighted in (False, True):
        needs = Needs(hessian=True, weighted=weighted)
        plain = stats.collect(model, 0, model.linears(0), ours, needs)
        found = stats.collect(model, 0, model.linears(0), ours, needs, originals=theirs)
        for a, b in zip(plain, found, strict=True):
            assert a.stats.tokens == b.stats.tokens
            assert torch.equal(a.stats.hessian, b.stats.hessian)
            assert (b.stats.past is None) == (b.linears[0].param != found[0].linears[0].param)


RUN: dict[str, Any] = {"samples": 16, "seq_len": 48, "device": "cpu", "no_eval": True, "no_client": True}


@pytest.fixture
def run(toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 4)
    return lambda method, name, **more: compress.run(toy, method, tmp_path / name, calib=str(text_file), **RUN | more)


def test_a_run_that_corrects_the_past(run: Callable[..., Any]) -> None:
    plain, found, again = (run(GPTQ(2, 32, correct_past=p), n) for p, n in ((False, "a"), (True, "b"), (True, "c")))
    digests = [[r["sha256_dense"] for r in x.records] for x in (plain, found, again)]
    first = sum(r["name"].startswith("model.layers.0.") for r in found.records)
    assert digests[0][:first] == digests[1][:first], "the first block's inputs are the original's"
    assert digests[0][first:] != digests[1][first:]
    assert digests[1] == digests[2]
    shares = [r["figures"]["past"] for r in found.records[first:] if "past" in r["figures"]]
    assert len(shares) == 3 * 3  # q, k, v of the other blocks
    assert all(0 <= s <= 1 for s in shares)
    assert max(shares) > 0


def test_what_it_does_not_go_with(run: Callable[..., Any]) -> None:
    with pytest.raises(CompressError, match="leave one of them out"):
        run(GPTQ(4, 32, correct_past=True), "a", true_sequential=True)
    steps = [{"awq": {}}, {"gptq": {"bits": 4, "group_size": 32, "correct_past": True}}]
    assert AWQ.name == "awq"
    with pytest.raises(CompressError, match="other units"):
        run(make_recipe({"steps": steps}, "r", "r"), "b")
