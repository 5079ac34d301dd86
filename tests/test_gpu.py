"""What only a CUDA device can show: captured loops against their plain twins, 16-bit Hessians, a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress import columns
from compress.hessian import row_losses
from compress.stats import accumulate
from compress.types import LayerStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def problem(columns_: int, rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns_, columns_, generator=generator)
    x = torch.randn(4 * columns_, columns_, generator=generator) @ mix
    return torch.randn(rows, columns_, generator=generator) * 0.02, x.t() @ x / len(x)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (576, 200), (320, 1024)])
def test_captured_loops_equal_their_twins(shape: tuple[int, int], asymmetric: bool) -> None:
    """The same arithmetic on the same device: replaying the graph gives what the plain loop gives."""
    weight, hessian = problem(*shape)
    w, h = weight.t().contiguous().cuda(), hessian.cuda()
    factor = torch.linalg.cholesky(
        torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)).cuda()), upper=True
    )
    scale = torch.full_like(w, 0.005)
    zero = torch.full_like(w, 7.0) if asymmetric else None
    extra = [] if zero is None else [zero]
    plain = columns._sweep(4, torch.bfloat16, 128, w, factor, scale, *extra)
    for _ in range(2):
        assert torch.equal(columns.sweep(w, factor, scale, zero, 4, torch.bfloat16, 128), plain)
    better = columns._descend(4, torch.bfloat16, 128, plain, w, h, scale, *extra)
    for _ in range(2):
        assert torch.equal(columns.descend(plain, w, h, scale, zero, 4, torch.bfloat16, 128), better)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_device_and_host_agree(bits: int) -> None:
    """Sums run in another order on a GPU, so codes may differ; the loss they reach does not."""
    weight, hessian = problem(256, 128)
    method = compress.GPTQ(bits=bits, group_size=64)
    here = method(weight, LayerStats(1024, hessian), torch.bfloat16)
    there = method(weight.cuda(), LayerStats(1024, hessian.cuda()), torch.bfloat16)
    loss = float(row_losses((weight - there.packed.dequantize().cpu().float()), hessian).sum())
    assert loss == pytest.approx(float(here.row_loss.sum()), rel=0.02)


def test_hessian_from_16_bit_activations() -> None:
    """Products of bf16 are exact in float32; only the order of the sum is free."""
    x = torch.randn(5000, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    total = torch.zeros(96, 96, device="cuda")
    accumulate(total, x.cuda())
    exact = x.double().t() @ x.double()
    assert float((total.cpu().double() - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("method", [compress.GPTQ(bits=4), compress.GPTQ(bits=3, group_size=64, symmetric=False)])
def test_bundled_run_is_repeatable(method: compress.GPTQ, tmp_path: Path) -> None:
    """Same seed, same device: the same bytes; and the result is close to the original."""
    files: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        folder = tmp_path / name / "same-name"  # the model card carries the folder's name
        result = compress.run("bundled", method, folder, calib="bundled", eval="bundled", seq_len=256)
        assert result.score is not None
        assert result.original is not None
        assert result.score.perplexity < 1.12 * result.original.perplexity
        files.append({p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"})
    assert files[0] == files[1]
