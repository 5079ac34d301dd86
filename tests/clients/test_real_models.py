"""The bundled model and SmolLM2-135M through each client: it loads, computes what our files hold, and goes on in words.

Rounded to nearest, so that the tests take minutes; how good the weights are is not asked here. Every client is compared
with a plain checkpoint of our own dequantised weights in the same client and dtype, and continues a prompt greedily.
SmolLM2 comes from $COMPRESS_SMOLLM2, else from the published package that `compress demo --model smollm2` uses.
llama.cpp has a file of its own (test_llamacpp.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.assets import folder
from compress.errors import CompressError
from compress.recipe import parse

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("real")]

PROMPT = {
    "bundled": "It was a fine morning, and the captain",
    "SmolLM2": "The capital of France is Paris, and the longest river that runs through it is",
}
NEW = 12
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
CT, GROUP = "compressed-tensors", "group_size=64"


@dataclass(frozen=True)
class Case:
    """A checkpoint in a client.

    Attributes:
        far: largest difference of a logit from the dense twin's; None where the client rounds inputs or sums in 16 bits
            in another order, which over 30 blocks moves single logits: then how far the distributions are is asked.
    """

    client: str
    step: str
    format: str
    dtype: torch.dtype = torch.float32
    far: float | None = 0.0

    def __str__(self) -> str:
        return f"{self.client}: {self.step}, {self.format}"


CASES = [
    Case("transformers", f"rtn bits=4 {GROUP}", CT, torch.bfloat16),
    Case("transformers", f"rtn bits=4 {GROUP} symmetric=false", CT, torch.bfloat16),
    Case("transformers", f"rtn bits=3 {GROUP}", CT, torch.bfloat16),
    Case("transformers", "absmax activations=token", CT, torch.bfloat16, None),
    Case("transformers", "nf4", "bitsandbytes", torch.bfloat16, None),
    Case("transformers", "absmax activations=token", "bitsandbytes", torch.bfloat16, None),
    Case("transformers", f"rtn bits=4 {GROUP}", "dense", torch.bfloat16),
    Case("transformers + compress", "rtn bits=4 group_size=32", "native", torch.bfloat16, None),
    Case("transformers + compress", "nf4 double_quant=true", "native", torch.bfloat16),
    Case("gptqmodel", f"rtn bits=4 {GROUP}", "gptq", far=1e-4),
    Case("gptqmodel", f"rtn bits=3 {GROUP} symmetric=false", "gptq_v2", far=1e-4),
    Case("vllm-cpu", f"rtn bits=4 {GROUP}", CT, torch.bfloat16, None),
    Case("vllm-cpu", f"rtn bits=4 {GROUP}", "gptq", torch.bfloat16, None),
]


@pytest.fixture(scope="module")
def models() -> dict[str, Path]:
    """Name -> folder."""
    found = {"bundled": folder("calib") / "tiny"}
    given = os.environ.get("COMPRESS_SMOLLM2")
    if given:
        return found | {"SmolLM2": Path(given)}
    try:
        from compress.smollm2 import fetch

        return found | {"SmolLM2": fetch()}
    except CompressError as error:
        print(f"SmolLM2 is left out: {error.line()}")
        return found


@pytest.fixture(scope="module")
def tokens(models: dict[str, Path]) -> dict[str, Tensor]:
    """The prompt of each model as ids."""
    from transformers import AutoTokenizer

    return {n: AutoTokenizer.from_pretrained(p)(PROMPT[n], return_tensors="pt").input_ids for n, p in models.items()}


def in_transformers(path: Path, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [1, seq, vocabulary] and the tokens that follow."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        made = model.eval().generate(tokens, max_new_tokens=NEW, do_sample=False)[:, tokens.shape[1] :]
        return model(tokens).logits.float(), made


@pytest.fixture(scope="module")
def answers(models: Any, tokens: Any, tmp_path_factory: Any, dense_twin: Any, client: Any) -> Callable[..., Any]:
    """answers(client, model): for each case of that client (ours, theirs, tokens that follow), or an error."""
    known: dict[tuple[str, str], list[Any]] = {}

    def written(case: Case, model: str) -> Path:
        out = tmp_path_factory.mktemp("real") / "packed"
        compress.run(models[model], parse(case.step), out, format=case.format, no_eval=True, device="cpu")
        return out

    def ask(name: str, model: str) -> list[Any]:
        mine = [c for c in CASES if c.client == name]
        if name.startswith("transformers"):
            import compress.integration  # noqa: F401

            found = []
            for case in mine:
                packed = written(case, model)
                ours, _ = in_transformers(dense_twin(packed, case.dtype), tokens[model])
                found.append((ours, *in_transformers(packed, tokens[model])))
            return found
        python = client(name)
        packed = [written(case, model) for case in mine]
        scale = torch.bfloat16 if name == "vllm-cpu" else None
        bias = torch.float16 if name == "gptqmodel" else None
        twins = [dense_twin(p, c.dtype, scale_dtype=scale, bias_dtype=bias) for p, c in zip(packed, mine, strict=True)]
        out = tmp_path_factory.mktemp("answers")
        if name == "vllm-cpu":
            (out / "job.json").write_text(json.dumps([str(p) for p in packed + twins]))
            save_file({"tokens": tokens[model][0].contiguous()}, out / "tokens.safetensors")
            python("ask_vllm.py", out, **VLLM)
            got = [out / f"{n}.safetensors" for n in range(2 * len(mine))]
            read = [load_file(g) if g.exists() else (g.with_suffix(".error")).read_text() for g in got]
            pairs = zip(read[: len(mine)], read[len(mine) :], strict=True)
            return [(o["logprobs"], t["logprobs"], t["made"][None]) for t, o in pairs]
        asks = [{"folder": str(p), "loader": "transformers", "backend": None, "generate": NEW} for p in packed]
        (out / "job.json").write_text(json.dumps(asks))
        save_file({"tokens": tokens[model]}, out / "tokens.safetensors")
        python("ask_gptqmodel.py", out)
        found = []
        for n, twin in enumerate(twins):
            failed = out / f"{n}.error"
            assert not failed.exists(), failed.read_text()
            got = load_file(out / f"{n}.safetensors")
            from transformers import AutoModelForCausalLM

            with torch.no_grad():
                ours = AutoModelForCausalLM.from_pretrained(twin).eval()(tokens[model]).logits
            found.append((ours, got["logits"], got["made"]))
        return found

    def once(name: str, model: str) -> list[Any]:
        if (name, model) not in known:
            known[name, model] = ask(name, model)
        return known[name, model]

    return once


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("model", PROMPT)
def test_real_model(case: Case, model: str, answers: Any, models: Any, answer: Any) -> None:
    from transformers import AutoTokenizer

    if model not in models:
        pytest.skip("SmolLM2 could not be fetched")
    mine = [c for c in CASES if c.client == case.client]
    ours, theirs, made = answers(case.client, model)[mine.index(case)]
    text = AutoTokenizer.from_pretrained(models[model]).decode(made[0])
    far, same = answer(case.client, f"{model}: {case.step}, {case.format}", ours, theirs, text)
    if case.far is None:
        log_p, log_q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        assert float((log_p.exp() * (log_p - log_q)).sum(-1).mean()) < 0.1
        assert same >= 0.75
    else:
        assert far <= case.far
    assert len(made[0]) == NEW or made[0][-1] == AutoTokenizer.from_pretrained(models[model]).eos_token_id
    assert text.strip()
