"""What only a CUDA device can show: captured loops against their plain twins, 16-bit Hessians, a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.solvers import columns
from compress.solvers.hessian import row_losses
from compress.stats import accumulate
from compress.types import LayerStats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

METHODS = [
    "rtn bits=3 group_size=32 symmetric=false scale_search=true", "rtn bits=8 group_size=0", "absmax activations=token",
    "absmax weights=tensor activations=tensor zeropoint=true", "int8 threshold=5", "int8 threshold=5 zeropoint=true",
    "gptq bits=3 group_size=32", "gptq bits=4 group_size=32 reference=obq", "gptq bits=8 activations=token",
    "sparsegpt sparsity=0.5", "sparsegpt pattern=2:4", "sparsegpt pattern=4:8 bits=4 group_size=32",
    "sparsegpt pattern=2:4 method=wanda", "spqr group_size=16", "spqr bits=3 group_size=32 average_bits=4.2", "nf4",
    "nf4 double_quant=true", "fp4 variant=e3m0", "kmeans bits=3", "kmeans bits=4 group_size=32 weighted=false",
]  # fmt: skip


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


@pytest.mark.parametrize("line", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_method_on_the_gpu(line: str, dtype: torch.dtype) -> None:
    """On the GPU as on the CPU: the same loss, tensors that stay there, and the same product."""
    from compress.formats import FORMATS
    from compress.formats.base import Held, LayerShape
    from compress.recipe import Recipe, parse
    from compress.types import LayerStats, moved

    g = torch.Generator().manual_seed(4)
    x = torch.randn(400, 128, generator=g) @ (torch.randn(128, 128, generator=g) * 0.1 + torch.eye(128))
    weight = torch.randn(96, 128, generator=g).to(dtype)
    given = [x.T @ x / 400, x.abs().amax(0), x.abs().mean(0), x.mean(0), (x.abs() >= 2).float().mean(0)]
    (method,) = (p.settle([128]) for p in Recipe.of(parse(line)).passes)
    here = method(weight, LayerStats(400, *given), dtype)
    there = method(weight.cuda(), LayerStats(400, *(t.cuda() for t in given)), dtype)
    assert all(t.is_cuda for t in there.packed.tensors().values())
    assert float(there.row_loss.sum()) == pytest.approx(float(here.row_loss.sum()), rel=0.02)
    back = moved(there.packed, torch.device("cpu"))
    assert torch.equal(back.dequantize(), there.packed.dequantize().cpu())
    if method.row_unit and 48 % method.row_unit == 0:
        halves = [back.rows(0, 48).dequantize(), back.rows(48, 96).dequantize()]
        assert torch.equal(torch.cat(halves), back.dequantize())
    inputs = torch.randn(40, 128, generator=g)
    assert torch.allclose(there.packed.linear(inputs.cuda()).cpu(), back.linear(inputs), rtol=1e-3, atol=1e-2)
    for form in FORMATS.values():
        shape = LayerShape("blocks.0.layer", 96, 128)
        if form.quantised and form.why_not(back.storage, shape) is None:
            config = form.config([Held("blocks.0.layer", "blocks.0.layer", (96, 128), back.storage, dtype)], [])
            parts = {s: t.cuda() for s, t in form.pack(back).items()}
            read = form.unpack("blocks.0.layer", parts, config)
            assert torch.equal(read.dequantize().cpu(), form.unpack("blocks.0.layer", form.pack(back), config).dequantize())
