"""On a GPU a step of refining is a kernel, and many steps are a CUDA graph; both do what torch does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from compress.cuda import refine
from compress.cuda.replay import Replays
from compress.passes.rtn import RTN
from compress.refiners.tuned import paces, tuned
from compress.types import LayerStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CUDA = torch.device("cuda")


def grid_of(bits: int, size: int, symmetric: bool, shape: tuple[int, int] = (512, 1024)) -> Any:
    torch.manual_seed(0)
    weight = torch.randn(shape, device=CUDA)
    return tuned(RTN(bits, size, symmetric=symmetric)(weight, LayerStats(0), torch.bfloat16).packed, weight)


@pytest.mark.parametrize(("bits", "size", "symmetric"), [(4, 64, True), (3, 128, False), (2, 16, True), (4, -1, False)])
def test_kernel_and_torch_agree(bits: int, size: int, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, plain = (grid_of(bits, size, symmetric) for _ in range(2))
    pace = paces(5, 0.2, 0.01, CUDA)
    for i in range(5):
        slope = torch.randn(512, 1024, device=CUDA).bfloat16()
        found, expected = (torch.full_like(slope, float("nan")) for _ in range(2))
        assert refine.takes(slope, found, 1024 if size == -1 else size, torch.bfloat16)
        ours.step(slope.clone(), pace[i], found)
        with monkeypatch.context() as patch:
            patch.setenv("COMPRESS_KERNELS", "0")
            plain.step(slope.clone(), pace[i], expected)
        torch.testing.assert_close(ours._place, plain._place, rtol=0, atol=1e-4)
        assert float((ours._factor == plain._factor).float().mean()) > 0.999
        assert float((found == expected).float().mean()) > 0.99


def test_many_steps_are_a_graph() -> None:
    """Ten steps with two shapes of inputs: the same bits as without a graph."""
    torch.manual_seed(0)
    weight = torch.randn(512, 512, device=CUDA)
    inputs = [torch.randn(64 if i % 5 else 32, 512, device=CUDA) for i in range(12)]
    results = []
    for captured in (False, True):
        leaf = weight.clone().requires_grad_()
        replays = Replays(CUDA)

        def work(x: Tensor, rate: Tensor, leaf: Tensor = leaf) -> None:
            (slope,) = torch.autograd.grad((x @ leaf.t()).relu().square().sum(), [leaf])
            with torch.no_grad():
                leaf.sub_(rate * torch.sign(slope))

        step = replays.of(work) if captured else work
        for i, x in enumerate(inputs):
            step(x, torch.full((), 0.01 / (i + 1), device=CUDA))
        assert replays.rest() == []
        replays.close()
        results.append(leaf.detach())
    assert torch.equal(*results)


def test_what_cannot_be_captured_runs_as_it_is() -> None:
    torch.manual_seed(3)
    expected = [torch.rand(7, device=CUDA) for _ in range(2)]
    torch.manual_seed(3)
    assert torch.equal(torch.rand(7, device=CUDA), expected[0])
    replays = Replays(CUDA)
    total = torch.zeros((), device=CUDA)

    def work(x: Tensor) -> None:
        if float(x.sum()) > 0:  # waits for the device
            total.add_(1)

    step = replays.of(work)
    for _ in range(5):
        step(torch.ones(3, device=CUDA))
    assert float(total) == 5
    (note,) = replays.rest()
    assert "cannot be captured as a CUDA graph" in note
    assert replays.of(work) is work  # it is not tried again
    replays.close()
    assert torch.equal(torch.rand(7, device=CUDA), expected[1])  # random numbers go on where they were
