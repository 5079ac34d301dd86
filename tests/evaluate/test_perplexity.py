"""Streamed scores against a whole model in memory, and the protocol's edges."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import compress
from compress.checkpoint import Checkpoint
from compress.evaluate.perplexity import cut_windows, evaluate
from compress.weights import Weights

CPU = torch.device("cpu")


def whole(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    """float64 log-probabilities of the model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return F.log_softmax(model(rows).logits.double(), -1)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 300, (5 * 64 + 17,), generator=torch.Generator().manual_seed(3))


def test_against_a_whole_model(toy: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    compress.run(toy, compress.RTN(bits=2, group_size=32), tmp_path / "packed", no_eval=True)
    packed = Weights(Checkpoint.open(tmp_path / "packed"))
    score, base = evaluate(packed, tokens, CPU, torch.float32, Weights(Checkpoint.open(toy)), window=64)
    assert base is not None
    rows = tokens[: 5 * 64].reshape(5, 64)
    p, q = whole(toy, rows), whole(tmp_path / "packed", rows)
    for found, log_probs in ((base, p), (score, q)):
        nll = -log_probs[:, :-1].gather(2, rows[:, 1:, None]).mean()
        assert found.perplexity == pytest.approx(math.exp(float(nll)), rel=1e-5)
        assert (found.windows, found.tokens, found.window) == (5, 5 * 63, 64)
    assert score.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert score.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.004)


def test_a_model_is_at_no_distance_from_itself(toy: Path, tokens: torch.Tensor) -> None:
    weights = Weights(Checkpoint.open(toy))
    score, base = evaluate(weights, tokens, CPU, torch.float32, weights, window=64)
    assert base is not None
    assert score.kl == pytest.approx(0.0, abs=1e-9)
    assert score.top1 == 1.0
    assert score.perplexity == base.perplexity


def test_window_is_the_context_where_that_is_shorter(toy: Path, tokens: torch.Tensor) -> None:
    score, _ = evaluate(Weights(Checkpoint.open(toy)), tokens, CPU, torch.float32)
    assert score.window == 128


def test_tail_is_dropped_and_too_short_is_refused(tokens: torch.Tensor) -> None:
    assert cut_windows(tokens, 64).shape == (5, 64)
    with pytest.raises(compress.CompressError, match="has 10 tokens, one window needs 64"):
        cut_windows(tokens[:10], 64)


def test_another_tools_checkpoint(toy: Path, tokens: torch.Tensor, tmp_path: Path) -> None:
    """A checkpoint that compressed-tensors itself wrote is read to the same numbers as transformers reads it."""
    compressed_tensors = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoModelForCausalLM

    assert compressed_tensors
    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.bfloat16)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    config = QuantizationConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}},
        ignore=["lm_head"],
        format="pack-quantized",
    )
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.data.float().unflatten(1, (-1, 32)).abs().amax(-1) / 7.5
            module.weight_scale.data = groups.to(module.weight_scale.dtype)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "theirs")
    compressor.update_config(str(tmp_path / "theirs"))
    read = Weights(Checkpoint.open(tmp_path / "theirs"))
    assert len(read.packed) == 4 * 7
    score, _ = evaluate(read, tokens, CPU, torch.float32, window=64)
    rows = tokens[: 5 * 64].reshape(5, 64)
    nll = -whole(tmp_path / "theirs", rows)[:, :-1].gather(2, rows[:, 1:, None]).mean()
    assert score.perplexity == pytest.approx(math.exp(float(nll)), rel=2e-3)  # they hold scales in float32 here
