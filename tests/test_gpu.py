"""What only a CUDA device can show: captured loops against their plain twins, 16-bit Hessians, a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import compress
from compress.checkpoint import Checkpoint
from compress.solvers import columns, kernel
from compress.solvers import hessian as second_order
from compress.solvers.hessian import row_losses
from compress.sums import accumulate
from compress.types import LayerStats
from compress.verify import layers
from compress.weights import Weights

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
def test_loops_equal_their_twins(shape: tuple[int, int], asymmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured in a graph, Python's loop gives what it gives; the kernel the same but for sums in another order."""
    weight, hessian = problem(*shape)
    w, h = weight.t().contiguous().cuda(), hessian.cuda()
    factor = torch.linalg.cholesky(
        torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(len(h)).cuda()), upper=True
    )
    scale = torch.full_like(w, 0.005)
    zero = torch.full_like(w, 7.0) if asymmetric else None
    last = (4, torch.bfloat16, 128)
    with monkeypatch.context() as off:
        off.setenv("COMPRESS_KERNELS", "0")
        plain = columns._sweep(*last, w, factor, scale, zero)
        better = columns._descend(*last, plain, w, h, scale, zero)
        for _ in range(2):
            assert torch.equal(columns.sweep(w, factor, scale, zero, *last), plain)
            assert torch.equal(columns.descend(plain, w, h, scale, zero, *last), better)
    if not kernel.usable(w):
        return
    ours = columns.sweep(w, factor, scale, zero, *last)
    descended = columns.descend(plain, w, h, scale, zero, *last)
    for _ in range(20):
        assert torch.equal(columns.sweep(w, factor, scale, zero, *last), ours)
        assert torch.equal(columns.descend(plain, w, h, scale, zero, *last), descended)
    for mine, theirs in ((ours, plain), (descended, better)):
        assert float((mine != theirs).float().mean()) < 0.01
        losses = [float(row_losses((w - k * scale).t(), h).sum()) for k in (mine, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=5e-4)


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


@pytest.mark.parametrize(
    "method",
    [
        compress.GPTQ(bits=4, quality="balanced"),
        compress.GPTQ(bits=3, group_size=64, symmetric=False),
        compress.GPTQ(bits=4, quality="best", correct_past=True),
    ],
)
def test_bundled_run_is_repeatable(method: compress.GPTQ, tmp_path: Path) -> None:
    """Same seed, same device: the same bytes; and the result is close to the original.

    Rows of 512 tokens: attention's slopes are summed up in parts of 128, and two of them make one sum in any order.
    """
    files: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        folder = tmp_path / name / "same-name"  # the model card carries the folder's name
        result = compress.run("bundled", method, folder, calib="bundled", eval="bundled", seq_len=512)
        assert result.notes == [], "a step that cannot be captured, for one"
        assert result.score is not None
        assert result.original is not None
        assert result.score.perplexity < 1.12 * result.original.perplexity
        layers(Weights(Checkpoint.open(folder)), result.records, "")  # the run asked the device, this asks the CPU
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
            assert torch.equal(
                read.dequantize().cpu(), form.unpack("blocks.0.layer", form.pack(back), config).dequantize()
            )


@pytest.mark.parametrize("line", METHODS)
def test_packed_linear_on_the_gpu(line: str) -> None:
    """A packed layer that moves computes on the GPU what it computed here, in its stored bytes; back here, the same."""
    from compress.linear import PackedLinear
    from compress.recipe import Recipe, parse
    from compress.types import LayerStats, tensor_bytes_of

    g = torch.Generator().manual_seed(4)
    x = torch.randn(400, 128, generator=g) @ (torch.randn(128, 128, generator=g) * 0.1 + torch.eye(128))
    weight = torch.randn(96, 128, generator=g).bfloat16()
    given = [x.T @ x / 400, x.abs().amax(0), x.abs().mean(0), x.mean(0), (x.abs() >= 2).float().mean(0)]
    (method,) = (p.settle([128]) for p in Recipe.of(parse(line)).passes)
    packed = method(weight, LayerStats(400, *given), torch.bfloat16).packed
    layer = PackedLinear.of(packed, bias=torch.randn(96, generator=g))
    inputs = torch.randn(40, 128, generator=g)
    here = layer(inputs)
    layer(inputs.bfloat16())  # perhaps in the layout of a CPU kernel now
    layer.cuda()
    assert all(b.is_cuda for b in layer.buffers())
    assert layer.weight_bytes == tensor_bytes_of(packed)
    assert torch.equal(layer.dense(torch.float32).cpu(), packed.dequantize().float())
    for dtype, near in ((torch.float32, 1e-2), (torch.bfloat16, 0.1), (torch.float16, 0.02)):
        there = layer(inputs.cuda().to(dtype))
        assert there.dtype == dtype
        assert torch.allclose(there.float().cpu(), here, rtol=0.02, atol=near * float(here.abs().max()))
    layer.cpu()
    assert all(
        torch.equal(a, b) for a, b in zip(layer.packed().tensors().values(), packed.tensors().values(), strict=True)
    )
    assert torch.equal(layer(inputs), here)


def test_a_layer_above_the_budget_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dense weight is never whole: peak memory stays near the budget."""
    from compress import linear
    from compress.passes.rtn import RTN

    packed = RTN(bits=4, group_size=128)(torch.randn(8192, 4096), LayerStats(0), torch.bfloat16).packed
    layer = linear.PackedLinear.of(packed, torch.bfloat16).cuda()
    x = torch.randn(4, 4096, device="cuda", dtype=torch.bfloat16)
    whole = layer(x)
    monkeypatch.setattr(linear, "BUDGET", 1 << 22)
    monkeypatch.setattr(linear, "_AT_ONCE_ELSEWHERE", 1 << 20)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts = layer(x)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 25  # the dense weight is 2^26 bytes
    assert torch.allclose(parts, whole, rtol=0.02, atol=0.02 * float(whole.abs().max()))


def small_moe(folder: Path, tokenizer: object) -> Path:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=320,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


@pytest.mark.parametrize("line", ["nf4 double_quant=true", "rtn bits=4 group_size=32", "absmax activations=token"])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_whole_packed_models_on_the_gpu(family: str, line: str, toy: Path, tokenizer: object, tmp_path: Path) -> None:
    """compress.load and plain from_pretrained put the packed model on the GPU; both generate what the CPU computes."""
    from transformers import AutoModelForCausalLM

    from compress.linear import PackedLinear
    from compress.recipe import parse

    source = toy if family == "llama" else small_moe(tmp_path / "moe", tokenizer)
    folder = tmp_path / "out"
    compress.run(source, parse(line), folder, format="native", no_eval=True, no_verify=True, device="cpu")
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = compress.load(folder, device="cpu", dtype="float32")(tokens).logits
    ours = compress.load(folder, device="cuda", dtype="float32")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": 0}, output_loading_info=True
    )
    assert not any(info.values())
    moved = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to("cuda")
    for model in (ours, theirs, moved):
        assert all(t.is_cuda for t in (*model.parameters(), *model.buffers()))
        assert any(isinstance(m, PackedLinear) for m in model.modules())
        with torch.no_grad():
            found = model(tokens.cuda()).logits.cpu()
        assert float((found - want).abs().mean()) < 0.01 * float(want.abs().mean())
        made = model.generate(tokens[:1].cuda(), max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        assert made.shape == (1, 28)
    back = theirs.to("cpu")
    with torch.no_grad():
        assert float((back(tokens).logits - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("bits", range(1, 9))
def test_packer(bits: int) -> None:
    """The same words on both, of odd widths as well."""
    from compress import bits as bitpack

    g = torch.Generator().manual_seed(bits)
    for shape in ((3, 7), (5, 32), (2, 4, 100), (300, 1000), (1, 0)):
        codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=g)
        words = bitpack.pack(codes.cuda(), bits)
        assert torch.equal(words.cpu(), bitpack.pack(codes, bits))
        assert torch.equal(bitpack.unpack(words, bits, shape[-1]).cpu(), codes)


@pytest.mark.parametrize(
    "line", ["rtn bits=4 group_size=64", "spqr", "sparsegpt pattern=2:4", "absmax activations=token"]
)
def test_verified_through_its_client(line: str, tmp_path: Path, asking: None) -> None:
    """A native checkpoint is loaded by plain transformers onto the GPU, packed, and computes what its files hold."""
    from compress.recipe import parse

    given = {"calib": "bundled", "samples": 8, "seq_len": 128, "no_eval": True, "format": "native", "device": "cuda"}
    result = compress.run("bundled", parse(line), tmp_path / "out", **given)
    assert result.proof is not None
    assert "loads it, no key missing or unknown" in result.proof.clients[0], result.proof.clients


@pytest.mark.parametrize("whole", [False, True])
def test_products_by_the_tensor_cores(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses by them are those of float64 to a part in 100,000, in one piece and in several."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 1500, generator=generator)
    x = (7 * x).round() if whole else x * 0.01
    mix = torch.randn(3000, 1500, generator=generator)
    h = mix.t() @ mix / 3000
    exact, most = x.double() @ h.double(), x.double().abs() @ h.double().abs()
    for at_once in (8192, 700):
        monkeypatch.setattr(second_order, "_AT_ONCE", at_once)
        found = second_order.product(x.cuda(), h.cuda(), whole).cpu().double()
        assert float(((found - exact).abs() / most).max()) < 2.0**-14
        losses = row_losses(x.cuda(), h.cuda()).cpu().double()
        torch.testing.assert_close(losses, (exact * x).sum(1), rtol=1e-5, atol=0)
