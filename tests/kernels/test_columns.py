"""columns.cu, run as C++ on this CPU by the solvers' own loops, against the same loops in Python."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from compress.cuda import columns as launches
from compress.passes.gptq import GPTQ
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.solvers import columns, kernel, spqr
from compress.solvers.hessian import row_losses
from compress.solvers.masks import Choice, Pattern
from compress.types import LayerStats

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture
def emulated(monkeypatch, build):
    """The loops take the kernel, and its launches go to the emulation. Says how many there were."""
    launched = []

    def launch(kernel, grid, block, args, shared, x):
        launched.append(kernel.macros)
        given = [flat(a) if isinstance(a, Tensor) else a for a in args]
        build(kernel.file, dict(kernel.defines)).launch(kernel.name, grid, block, given, shared)

    def find(x, dtype, bits, codes=False, descend=False, pruned=None):
        run, drop, length = (0, 0, 128) if pruned is None else pruned
        rule = launches.Rule(dtype, bits, codes, descend, run if drop else 0, drop)
        return kernel.Fast(partial(launches.block, rule), min(128, length), bool(drop))

    monkeypatch.setattr(launches, "function", lambda kernel, device: kernel)
    monkeypatch.setattr(launches, "launch", launch)
    with monkeypatch.context() as patched:
        yield launched, lambda: patched.setattr(kernel, "find", find)


def flat(x: Tensor) -> Tensor:
    """The memory that rows of a matrix lie in; bool as bytes."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    if x.dim() < 2 or x.is_contiguous():
        return x
    return x.as_strided(((len(x) - 1) * x.stride(0) + x.shape[1],), (1,))


def problem(columns_: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """w [in, out], H and U of correlated inputs."""
    torch.manual_seed(columns_ + rows)
    x = torch.randn(4 * columns_, columns_) @ (torch.eye(columns_) + 0.2 * torch.randn(columns_, columns_))
    h = (x.t() @ x / len(x)).double()
    h += 0.01 * h.diagonal().mean() * torch.eye(columns_)
    return torch.randn(columns_, rows) * 0.02, h.float(), torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float()


def grids(w: Tensor, bits: int, asymmetric: bool) -> tuple[Tensor, Tensor | None]:
    """A scale, and a zero point, for each group of 16 columns and row."""
    parts = w.unflatten(0, (-1, 16))
    scale = parts.abs().amax(1, keepdim=True).expand_as(parts).flatten(0, 1) / (2 ** (bits - 1) - 0.5)
    zero = torch.randint(1, 2**bits - 1, (len(parts), 1, w.shape[1])).float().expand_as(parts).flatten(0, 1)
    return scale.contiguous(), zero.contiguous() if asymmetric else None


def alike(ours: Tensor, theirs: Tensor, share: float = 0.01) -> None:
    """Sums in another order may turn a level here and there, and what follows in its row."""
    assert float((ours != theirs).float().mean()) <= share


CASES = [
    (144, 37, 4, False, HALF), (80, 20, 3, True, BF16), (320, 33, 8, True, FULL), (640, 5, 2, False, BF16),
]  # fmt: skip


@pytest.mark.parametrize(("width", "rows", "bits", "asymmetric", "dtype"), CASES)
def test_sweep_and_descent(emulated, width, rows, bits, asymmetric, dtype):
    launched, use = emulated
    w, h, u = problem(width, rows)
    scale, zero = grids(w, bits, asymmetric)
    given = torch.rand(w.shape) < 0.8 if bits == 3 else None
    plain = columns.sweep(w, u, scale, zero, bits, dtype, 128, given)
    better = columns.descend(plain, w, h, scale, zero, bits, dtype, 128, given)
    use()
    ours = columns.sweep(w, u, scale, zero, bits, dtype, 128, given)
    descended = columns.descend(plain, w, h, scale, zero, bits, dtype, 128, given)
    assert len(launched) == 2 * -(-width // 128)
    alike(ours, plain)
    alike(descended, better)
    losses = [row_losses((w - k * scale).t(), h).sum() for k in (plain, ours, better, descended)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-3)
    assert float(losses[3]) == pytest.approx(float(losses[2]), rel=1e-3)
    assert losses[3] < losses[1]
    if given is not None:
        assert not bool(ours[~given].any())


@pytest.mark.parametrize(
    ("pattern", "bits", "masked"), [((2, 4), 4, False), ((1, 3), 0, True), ((3, 8), 4, True), ((5, 16), 0, False)]
)
def test_runs_are_pruned(emulated, pattern, bits, masked):
    launched, use = emulated
    w, h, u = problem(240, 21)
    scale = grids(w, 4, False)[0] if bits else None
    given = torch.rand(w.shape) < 0.9 if masked else None
    choice = Choice(Pattern(*pattern), pattern[1])
    run = (w, u, scale, None, bits, BF16, 128, choice, given)
    plain, kept = columns.prune(*run)
    use()
    ours, mine = columns.prune(*run)
    assert len(launched) == 2
    counts = mine.unflatten(0, (-1, pattern[1])).sum(1)
    assert bool((counts == pattern[0]).all())
    alike(mine, kept, 0.02)
    if bits:
        alike(ours, plain, 0.03)
    assert not bool(ours[~mine].any())
    if given is not None:
        assert not bool(ours[~given].any())
    losses = [row_losses((w - k * (1 if scale is None else scale)).t(), h).sum() for k in (plain, ours)]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=5e-3)


def test_shares_of_a_run_are_pruned(emulated):
    launched, use = emulated
    w, _, u = problem(200, 40)
    run = (w, u, None, None, 0, HALF, 128, Choice(Pattern(sparsity=0.5), 64), None)
    _, kept = columns.prune(*run)
    use()
    ours, mine = columns.prune(*run)
    assert len(launched) == 4
    assert int(mine.sum()) == int(kept.sum()) == w.numel() // 2
    alike(mine, kept, 0.02)
    assert not bool(ours[~mine].any())


@pytest.mark.parametrize("dtype", [HALF, FULL])
def test_spqr(emulated, dtype):
    launched, use = emulated
    w, h, u = problem(208, 35)
    scale, _ = grids(w, 3, False)
    zero = torch.rand(w.shape) * 6 + 0.5
    outlier = torch.rand(w.shape) < 0.03
    k, value = spqr.sweep(w, u, (scale, zero, outlier), 3, dtype, 128)
    better = spqr.descend((k, value), w, h, (scale, zero, outlier), 3, dtype, 128)
    use()
    ours = spqr.sweep(w, u, (scale, zero, outlier), 3, dtype, 128)
    descended = spqr.descend((k, value), w, h, (scale, zero, outlier), 3, dtype, 128)
    assert len(launched) == 4
    for mine, theirs in ((ours, (k, value)), (descended, better)):
        alike(mine[0][~outlier], theirs[0][~outlier])
        torch.testing.assert_close(mine[1], theirs[1], atol=1e-2 * float(w.abs().max()), rtol=0.5)
        losses = [float(row_losses((w - x[1]).t(), h).sum()) for x in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize(
    "method",
    [
        GPTQ(bits=4, group_size=48, act_order="none", symmetric=False),
        GPTQ(bits=3, group_size=160, act_order="groups"),
        GPTQ(bits=4, group_size=32),
        SparseGPT(pattern="2:4", bits=4, group_size=32),
        SparseGPT(pattern="1:3", bits=4, group_size=32, act_order="none"),
        SparseGPT(sparsity=0.5, bits=4, group_size=-1),
        SpQR(bits=3, group_size=16),
    ],
    ids=["fresh", "ordered", "static", "2:4", "1:3", "half", "spqr"],
)
def test_methods(emulated, method):
    launched, use = emulated
    w, h, _ = problem(240, 40)
    stats = LayerStats(1000, h)
    plain = method(w.t(), stats, BF16)
    use()
    ours = method(w.t(), stats, BF16)
    assert launched
    assert float(ours.row_loss.sum()) == pytest.approx(float(plain.row_loss.sum()), rel=0.02)
    assert ours.packed.storage == plain.packed.storage
