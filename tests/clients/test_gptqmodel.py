"""GPTQ checkpoints in their clients on a CPU: transformers with optimum and gptqmodel, and gptqmodel's own loader.

Equal to the last bit: gptqmodel's plain kernels round (code - zero) * scale to float16 once, as our dequantised weights
are, and both models then multiply in the same dtype with the same torch. Readers keep the biases of packed layers in
float16, so the model compared with has them rounded. Only GPT-2 in float16 is a last bit away (0.002 for logits between
2 and 4): its own layer adds the bias inside the product, gptqmodel's kernel after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3MoeConfig

from compress import GPTQ, RTN

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("gptqmodel")]

TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
IDS = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {
    **IDS,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "gpt2": GPT2Config(**IDS, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, head_dim=32, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, mlp_only_layers=[]
    ),
}
# answers that are about the client; behind each a way around
WIDE_GROUP = "_weight_int4pack_mm_cpu: expect qGroupSize to be 32, 64, 128 or 256, got 192"  # backend="torch"
GPT2_INIT = "object has no attribute"  # transformers' own GPT2PreTrainedModel._init_weights: gptqmodel's loader
ASYMMETRIC_V1 = "only supported if produced by gptqmodel version >= 0.9.0"  # transformers, or gptq_v2
OWN: dict[str, Any] = {"loader": "gptqmodel", "backend": "torch"}


@dataclass(frozen=True)
class Case:
    """A checkpoint to write and ask about.

    Attributes:
        refusal: a part of the error with which the client answers, which is not about our file.
    """

    method: Any
    model: str = "llama"
    dtype: torch.dtype = torch.float32
    format: str = "gptq"
    exclude: tuple[str, ...] = ()
    loader: str = "transformers"
    backend: str | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        m = self.method
        order = f", act order {m.act_order}" if m.name == "gptq" and m.act_order != "static" else ""
        without = f", without {' '.join(self.exclude)}" if self.exclude else ""
        grid = "symmetric" if m.symmetric else "asymmetric"
        model = f"{self.model} {str(self.dtype).removeprefix('torch.')}"
        return f"{model}, {self.format}, {m.name} {m.bits} bits, group {m.group_size}, {grid}{order}{without}"


CASES = [
    *(
        Case(GPTQ(bits=b, group_size=32, symmetric=s, act_order=o))
        for b in (2, 3, 4, 8)
        for s in (True, False)
        for o in ("static", "groups")
    ),
    *(Case(GPTQ(bits=b, group_size=64, symmetric=s), format="gptq_v2") for b in (2, 3, 4, 8) for s in (True, False)),
    *(Case(GPTQ(bits=b, group_size=-1, symmetric=s)) for b in (2, 3, 8) for s in (True, False)),
    Case(GPTQ(group_size=-1), refusal=WIDE_GROUP),
    Case(GPTQ(group_size=-1), backend="torch"),
    Case(GPTQ(group_size=-1, symmetric=False), backend="torch"),
    Case(RTN(group_size=32)),
    Case(GPTQ(group_size=32), dtype=torch.bfloat16),
    Case(GPTQ(group_size=32), dtype=torch.float16),
    Case(GPTQ(group_size=32), "llama tied"),
    Case(GPTQ(group_size=32), exclude=("*.down_proj",)),
    Case(GPTQ(group_size=32, symmetric=False), exclude=("*.self_attn.*",)),
    Case(GPTQ(group_size=32), "qwen3_moe", exclude=("*.experts.*",)),
    Case(GPTQ(group_size=32), "llama biased"),
    Case(GPTQ(group_size=32), "gpt2", exclude=("*.c_proj",)),
    Case(GPTQ(group_size=32), "gpt2", refusal=GPT2_INIT),
    *(Case(GPTQ(bits=b, group_size=32), "gpt2", **OWN) for b in (3, 4)),
    *(Case(GPTQ(bits=b, group_size=32, symmetric=False), "gpt2", **OWN, format="gptq_v2") for b in (3, 4)),
    Case(GPTQ(group_size=32, act_order="groups"), "gpt2", **OWN),
    Case(GPTQ(group_size=32), **OWN),
    Case(GPTQ(group_size=-1), **OWN),
    Case(GPTQ(group_size=32), **OWN, exclude=("*.down_proj",)),
    Case(GPTQ(group_size=32), "qwen3_moe", **OWN, exclude=("*.experts.*",)),
    Case(GPTQ(group_size=32, symmetric=False), **OWN, refusal=ASYMMETRIC_V1),
    Case(GPTQ(group_size=32, symmetric=False), **OWN, format="gptq_v2"),
]


@pytest.fixture(scope="module")
def answers(
    tmp_path_factory: Any, make_model: Any, tokenizer: Any, compressed: Any, client: Any
) -> tuple[list[Path], Path]:
    """Our folders, and the folder with what was answered about each. One process asks about all."""
    python = client("gptqmodel")
    sources: dict[tuple[str, torch.dtype], Path] = {}
    folders = []
    for case in CASES:
        key = (case.model, case.dtype)
        if key not in sources:
            sources[key] = make_model(
                MODELS[case.model], tmp_path_factory.mktemp("source") / "model", tokenizer, case.dtype
            )
        folders.append(compressed(sources[key], case.method, format=case.format, exclude=case.exclude))
    out = tmp_path_factory.mktemp("answers")
    asks = [{"folder": str(f), "loader": c.loader, "backend": c.backend} for f, c in zip(folders, CASES, strict=True)]
    (out / "job.json").write_text(json.dumps(asks))
    save_file({"tokens": TOKENS}, out / "tokens.safetensors")
    python("ask_gptqmodel.py", out)
    return folders, out


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: str(CASES[n]))
def test_case(number: int, answers: Any, dense_twin: Callable[..., Path], answer: Any, refused: Any) -> None:
    folders, out = answers
    case, failed = CASES[number], out / f"{number}.error"
    error = failed.read_text() if failed.exists() else ""
    if case.refusal is not None:
        return refused(case.loader, str(case), error, case.refusal)
    assert not error, error
    dtype = torch.float16 if case.loader == "gptqmodel" else torch.float32
    twin = dense_twin(folders[number], dtype, conv1d=case.model == "gpt2", bias_dtype=torch.float16)
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(twin).eval()(TOKENS).logits
    with safe_open(out / f"{number}.safetensors", "pt") as file:
        theirs, kernels = file.get_tensor("logits"), file.metadata()["kernels"]
    far, _ = answer(f"{case.loader}, {kernels}", str(case), ours, theirs)
    assert far <= (0.004 if (case.model, case.loader) == ("gpt2", "gptqmodel") else 0.0)


def test_negated_scales(answers: Any) -> None:
    """The symmetric cases above hold negative scales, which put the 16th level on the positive side."""
    folders, _ = answers
    stored = load_file(folders[CASES.index(Case(GPTQ(group_size=32), dtype=torch.bfloat16))] / "model.safetensors")
    scales = [t for n, t in stored.items() if n.endswith(".scales")]
    assert min(float((s < 0).float().mean()) for s in scales) > 0.1
