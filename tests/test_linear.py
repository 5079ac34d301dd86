"""Layers whose input is quantised as it comes: streamed blocks compute what a whole model with packed layers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.hidden import Activations
from compress.linear import Experts, install, remove
from compress.passes.absmax import Absmax
from compress.passes.int8 import Int8
from compress.passes.rtn import RTN
from compress.types import LayerStats, Packed
from compress.weights import Weights

CPU = torch.device("cpu")


def packed_layer(out: int = 12, columns: int = 16, seed: int = 0) -> Packed:
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    return Absmax(activations="token")(weight, LayerStats(0), torch.float32).packed


def streamed_logits(folder: Path, tokens: Tensor, tmp: Path) -> Tensor:
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, CPU)
    flow = Activations(model, tokens, len(tokens), tmp / "spill")
    flow.enter()
    for block in range(len(model.block_names)):
        model.load(block)
        flow.advance(block)
        model.free(block)
    return model.logits(flow.states(0), tokens)


def replaced(folder: Path, original: Path, tokens: Tensor) -> Tensor:
    """A whole transformers model with every packed nn.Linear replaced by hand."""
    from transformers import AutoModelForCausalLM

    weights = Weights(Checkpoint.open(folder))
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32).eval()
    for name in weights.packed:
        module = model.get_submodule(name)
        packed = weights.read_packed(name)
        module.forward = lambda x, p=packed, b=module.bias: p.linear(x) if b is None else p.linear(x) + b
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


@pytest.mark.parametrize(
    "method", [Absmax(activations="token"), Absmax(activations="tensor", zeropoint=True), Int8(threshold=2.0)]
)
def test_streamed_equals_whole(method: Any, toy: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.run(toy, method, out, calib=str(text_file), samples=4, seq_len=32, no_eval=True)
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    ours = streamed_logits(out, tokens, tmp_path)
    theirs = replaced(out, toy, tokens)
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    plain = tmp_path / "plain"
    compress.run(toy, RTN(bits=8, group_size=-1), plain, no_eval=True)
    assert float((ours - streamed_logits(plain, tokens, tmp_path)).abs().max()) > 1e-3, "activations are quantised"


def test_install_and_remove() -> None:
    for bias in (True, False):
        layer = nn.Linear(16, 12, bias=bias)
        packed = packed_layer()
        x = torch.randn(3, 5, 16)
        before = layer(x)
        install(layer, packed)
        with torch.no_grad():
            want = packed.linear(x) + (layer.bias if bias else 0.0)
            assert torch.equal(layer(x), want)
        remove(layer)
        assert torch.equal(layer(x), before)


def test_experts_compute_slice_by_slice() -> None:
    fused = torch.randn(3, 24, 16)
    gate, up = packed_layer(seed=1), packed_layer(seed=2)
    x, bias = torch.randn(7, 16), torch.randn(24)
    with Experts([(fused, {1: [(0, gate), (12, up)], 2: [(12, up)]})]):
        both = F.linear(x, fused[1])
        half = F.linear(x, fused[2], bias)
        dense = F.linear(x, fused[0])
        other = F.linear(x, torch.ones(2, 16))
    assert torch.equal(both, torch.cat([gate.linear(x), up.linear(x)], -1))
    assert torch.allclose(half[:, :12], F.linear(x, fused[2, :12], bias[:12]), atol=1e-5)
    assert torch.allclose(half[:, 12:], up.linear(x) + bias[12:])
    assert torch.equal(dense, F.linear(x, fused[0]))
    assert other.shape == (7, 2)


def test_mixture_of_experts_end_to_end(
    make_model: Callable[..., Path], tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    """Fused experts with quantised inputs: written natively, scored as they compute, resumed block by block."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, vocab_size=320,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    source = make_model(config, tmp_path / "moe", tokenizer, torch.bfloat16)
    method = Absmax(activations="token")
    with pytest.raises(compress.CompressError, match="use --format native"):
        compress.run(source, method, tmp_path / "a", no_eval=True)
    short = tmp_path / "short.txt"
    short.write_text(text_file.read_text()[:4000])
    result = compress.run(source, method, tmp_path / "b", format="native", eval=str(short))
    assert result.score is not None
    assert result.score.kl is not None
    assert 0 < result.score.kl < 0.1
    tokens = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    dense = streamed_logits(source, tokens, tmp_path)
    ours = streamed_logits(tmp_path / "b", tokens, tmp_path)
    assert 0 < float((ours - dense).abs().max()) < 0.2 * float(dense.abs().max())
