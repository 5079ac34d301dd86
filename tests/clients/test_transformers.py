"""compressed-tensors checkpoints in plain transformers, which knows nothing of us: same weights, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from compress import GPTQ, RTN

CLIENT = f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"
TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = LlamaConfig(**SIZES)
MOE = {**SIZES, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}
EXPERTS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**MOE, mlp_only_layers=[]),
}


def logits(folder: Path, dtype: torch.dtype) -> Tensor:
    """Logits of a folder that loads without a missing, unexpected or mismatched key."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {dtype}
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.fixture(scope="module")
def source(make_model: Any, tokenizer: Any, tmp_path_factory: Any) -> Callable[[PreTrainedConfig, torch.dtype], Path]:
    """source(config, dtype): a random model with a tokenizer, made once."""
    made: dict[tuple[int, torch.dtype], Path] = {}

    def get(config: PreTrainedConfig, dtype: torch.dtype) -> Path:
        key = (id(config), dtype)
        if key not in made:
            made[key] = make_model(config, tmp_path_factory.mktemp("source") / "model", tokenizer, dtype)
        return made[key]

    return get


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize(("group_size", "symmetric"), [(32, True), (64, True), (-1, True), (32, False), (-1, False)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_llama(
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    source: Any,
    compressed: Any,
    dense_twin: Any,
    answer: Any,
) -> None:
    packed = compressed(source(LLAMA, dtype), GPTQ(bits=bits, group_size=group_size, symmetric=symmetric))
    label = f"llama {name(dtype)}, {bits} bits, group {group_size}, {'symmetric' if symmetric else 'asymmetric'}"
    far, _ = answer(CLIENT, label, logits(dense_twin(packed, dtype), dtype), logits(packed, dtype))
    assert far == 0.0


def test_negated_scales(source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    """A searched symmetric scale may be negative, which puts the 16th level on the positive side."""
    packed = compressed(source(LLAMA, torch.bfloat16), GPTQ(group_size=32))
    scales = [t for n, t in load_file(packed / "model.safetensors").items() if n.endswith("weight_scale")]
    assert min(float((s < 0).float().mean()) for s in scales) > 0.1
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, "llama bfloat16, 4 bits, group 32, symmetric, some scales negative", ours, theirs)[0] == 0.0


def test_tied_embeddings(toy: Path, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(toy, GPTQ(bits=3, group_size=32))
    assert not any("lm_head" in n for n in load_file(packed / "model.safetensors"))
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, "llama bfloat16, tied embeddings, 3 bits, group 32, symmetric", ours, theirs)[0] == 0.0
    assert not torch.equal(theirs, logits(toy, torch.bfloat16)), "equal to the original: nothing was compared"


@pytest.mark.parametrize("method", [RTN(), GPTQ(act_order="none"), GPTQ(bits=5), GPTQ(bits=6), GPTQ(bits=7)], ids=repr)
def test_other_settings(method: Any, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(LLAMA, torch.bfloat16), method)
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, f"llama bfloat16, {method}", ours, theirs)[0] == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_left_dense(symmetric: bool, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    patterns = ("*.0.mlp.down_proj", "*.1.self_attn.*")
    packed = compressed(source(LLAMA, torch.bfloat16), GPTQ(symmetric=symmetric), exclude=patterns)
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, f"llama bfloat16, five layers left dense, symmetric {symmetric}", ours, theirs)[0] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(family: str, dtype: torch.dtype, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(EXPERTS[family], dtype), GPTQ(group_size=32))
    stored = load_file(packed / "model.safetensors")
    assert sum("experts" in n and n.endswith("weight_packed") for n in stored) == 2 * 4 * 3
    ours, theirs = (logits(f, dtype) for f in (dense_twin(packed, dtype), packed))
    far, _ = answer(CLIENT, f"{family} {name(dtype)}, 4 bits, group 32, symmetric", ours, theirs)
    assert far == 0.0
