"""compressed-tensors checkpoints in plain transformers, which knows nothing of us: same weights, to the last bit."""

from __future__ import annotations

import json
import re
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

from compress import GPTQ, RTN, CompressError, method
from compress.checkpoint import Checkpoint
from compress.linear import install
from compress.recipe import make_recipe
from compress.weights import Weights

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


OTHERS = {
    "RTN": RTN(),
    "no act order": GPTQ(act_order="none"),
    "5 bits": GPTQ(bits=5),
    "6 bits": GPTQ(bits=6),
    "7 bits": GPTQ(bits=7),
}


@pytest.mark.parametrize("label", OTHERS)
def test_other_settings(label: str, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(LLAMA, torch.bfloat16), OTHERS[label])
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, f"llama bfloat16, {label}, symmetric", ours, theirs)[0] == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_layers_left_dense(symmetric: bool, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    patterns = ("*.0.mlp.down_proj", "*.1.self_attn.*")
    packed = compressed(source(LLAMA, torch.bfloat16), GPTQ(symmetric=symmetric), exclude=patterns)
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    label = f"llama bfloat16, five layers left dense, {'symmetric' if symmetric else 'asymmetric'}"
    assert answer(CLIENT, label, ours, theirs)[0] == 0.0


@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_head(symmetric: bool, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(LLAMA, torch.bfloat16), GPTQ(symmetric=symmetric), lm_head=True)
    assert "lm_head.weight_packed" in load_file(packed / "model.safetensors")
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    label = f"llama bfloat16, head packed too, {'symmetric' if symmetric else 'asymmetric'}"
    assert answer(CLIENT, label, ours, theirs)[0] == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(family: str, dtype: torch.dtype, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(EXPERTS[family], dtype), GPTQ(group_size=32))
    stored = load_file(packed / "model.safetensors")
    assert sum("experts" in n and n.endswith("weight_packed") for n in stored) == 2 * 4 * 3
    ignored = json.loads((packed / "config.json").read_text())["quantization_config"]["ignore"]
    assert re.match(ignored[-1].removeprefix("re:"), "model.layers.0.mlp.gate"), "vLLM would look for a packed router"
    ours, theirs = (logits(f, dtype) for f in (dense_twin(packed, dtype), packed))
    far, _ = answer(CLIENT, f"{family} {name(dtype)}, 4 bits, group 32, symmetric", ours, theirs)
    assert far == 0.0


@pytest.mark.parametrize("patterns", ["*.experts.*", "*.1.*.experts.2.*"])
@pytest.mark.parametrize("family", EXPERTS)
def test_dense_experts_are_refused(family: str, patterns: str, source: Any, compressed: Any) -> None:
    """transformers would leave them random: a MISSING line in a table, no error."""
    with pytest.raises(CompressError, match="leaves dense experts random"):
        compressed(source(EXPERTS[family], torch.bfloat16), RTN(group_size=32), exclude=(patterns,))


def test_asymmetric_experts_are_refused(source: Any, compressed: Any) -> None:
    """transformers hands no zero points to experts: "Asymmetric quant requires zero-point values"."""
    with pytest.raises(CompressError, match="asymmetric experts"):
        compressed(source(EXPERTS["mixtral"], torch.bfloat16), RTN(group_size=32, symmetric=False))


W8A8 = {
    "absmax": method("absmax", activations="token"),
    "GPTQ": GPTQ(bits=8, activations="token"),
    "SmoothQuant": method("smoothquant"),
}


def rounded_inputs(x: Tensor, half: float) -> Tensor:
    """8-bit inputs, a symmetric scale a token: its largest magnitude / half."""
    scale = x.abs().amax(-1, keepdim=True) / half
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("label", W8A8)
def test_w8a8(label: str, source: Any, compressed: Any, answer: Any) -> None:
    """The weights are ours to the bit. Inputs: compressed-tensors divides a token's largest value by 127.5; LLM.int8(),
    vLLM's kernels and we by 127. The two roundings differ from each other as much as from no rounding at all."""
    packed = compressed(source(LLAMA, torch.float32), W8A8[label])
    stored = load_file(packed / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8
    weights = Weights(Checkpoint.open(packed))
    dense = {n: t for n, t in stored.items() if n.rpartition(".")[0] not in weights.packed}
    dense |= {f"{n}.weight": weights.read(f"{n}.weight") for n in weights.packed}
    model = AutoModelForCausalLM.from_config(LLAMA, dtype=torch.float32).eval()
    model.load_state_dict(dense)

    def with_inputs(half: float) -> Tensor:
        hooks = [
            model.get_submodule(n).register_forward_pre_hook(lambda m, args: (rounded_inputs(args[0], half),))
            for n in weights.packed
        ]
        with torch.no_grad():
            out = model(TOKENS).logits
        for hook in hooks:
            hook.remove()
        return out

    as_client, as_we = with_inputs(127.5), with_inputs(127.0)
    for n in weights.packed:
        install(model.get_submodule(n), weights.read_packed(n))
    with torch.no_grad():
        ours = model(TOKENS).logits
    near = ((ours - as_we).abs().amax(-1) < 1e-4).float().mean()  # a tie that falls the other way moves its token
    assert float(near) > 0.8, "integer products are not what rounded floats give"
    far, _ = answer(CLIENT, f"llama float32, W8A8, {label}", as_client, logits(packed, torch.float32))
    assert far < 1e-4
    answer(CLIENT, f"llama float32, W8A8, {label}, inputs / 127 as we evaluate", ours, logits(packed, torch.float32))


def test_rescaled_norms(source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    """AWQ changes norms, which are stored dense beside the packed layers."""
    packed = compressed(source(LLAMA, torch.bfloat16), method("awq", group_size=32))
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, "llama bfloat16, AWQ, 4 bits, group 32, asymmetric", ours, theirs)[0] == 0.0


def test_mixed_bits(source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    steps = [{"gptq": {"bits": 8, "layers": "*.down_proj"}}, {"rtn": {"bits": 3, "blocks": "0"}}, "gptq bits=4"]
    packed = compressed(source(LLAMA, torch.bfloat16), make_recipe({"steps": steps}, "mixed", "mixed"))
    ours, theirs = (logits(f, torch.bfloat16) for f in (dense_twin(packed, torch.bfloat16), packed))
    assert answer(CLIENT, "llama bfloat16, 3, 4 and 8 bits in one file", ours, theirs)[0] == 0.0
