"""Every method in every format for three kinds of model: written, read back and loaded, or refused before any work.

There is no third outcome. What is written is read back to the bits that the solver returned; every client of it that
is installed here, and compress.load, compute what our own reading computes, within what LIMITS allows. What is refused
says why, in words that REFUSED knows, and what would work instead.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import final_states
from compress.formats import FORMATS
from compress.passes import PASSES
from compress.recipe import parse
from compress.verify import digest
from compress.weights import Weights

pytestmark = pytest.mark.xdist_group("matrix")  # else each worker would find the outcomes

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
MOE = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "mlp_only_layers": []}
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=320, n_positions=64, bos_token_id=0, eos_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE, num_key_value_heads=2),
}
#: every pass, and a second setting where it is stored in another way
METHODS = (
    "rtn bits=4 group_size=32",
    "rtn bits=3 group_size=-1 symmetric=false",
    "absmax",
    "absmax activations=token",
    "int8 threshold=3",
    "gptq bits=4 group_size=32",
    "gptq bits=4 group_size=32 act_order=groups",
    "sparsegpt sparsity=0.5",
    "sparsegpt pattern=2:4 bits=4 group_size=32",
    "spqr bits=3 group_size=16",
    "nf4",
    "nf4 block_size=32 double_quant=true",
    "fp4",
    "fp4 variant=bnb",
    "kmeans bits=3",
    "equalize",
    "smoothquant",
    "awq group_size=32",
)

#: what a format cannot hold, and why: the words of the refusal, and the reason in ours
REFUSED = {
    "compressed-tensors": {
        r"cannot hold the kind '(blockwise|codebook|sparse|outliers|outlier_columns)'": "its readers know integers",
        r"a Conv1D weight": "its readers fill nn.Linear alone, as [out, in]",
        r"holds no g_idx": "current readers refuse groups that follow an activation order",
        r"cannot load asymmetric experts": "transformers hands no zero points to fused experts",
        r"quantised activations of fused experts": "transformers computes experts with dequantised weights",
    },
    "gptq": {
        r"cannot hold the kind '(blockwise|codebook|sparse|outliers|outlier_columns)'": "its readers know integers",
        r"weight-only": "it has no words for inputs",
        r"experts kept as one 3-D tensor": "its readers replace modules, and these are none",
    },
    "bitsandbytes": {
        r"cannot hold the kind '(codebook|sparse|outliers)'": "its readers know NF4, FP4 and 8-bit rows",
        r"has no table 'fp4-e2m1'": "its FP4 has another smallest number",
        r"not [34] bits in groups of \d+|not 3 bits in whole rows": "its only integers have 8 bits and a scale a row",
        r"keeps no column in its original precision": "it multiplies outlier features by dequantised codes",
        r"quantises the inputs of 8-bit layers too": "weight-only 8 bits would be another function",
        r"fills no fused experts": "transformers replaces nn.Linear, and these are none",
    },
    "gguf": {
        r"cannot hold the kind '(blockwise|codebook|sparse|outliers|outlier_columns)'": "blocks of integers",
        r"no groups that follow an activation order": "a block is 32 neighbours",
        r"no zero points": "a minimum, in float16, is not a zero point",
        r"weight-only": "llama.cpp rounds inputs in its own way",
        r"experts are not written": "names of fused experts are not mapped",
        r"layers kept as \[in, out\]": "GPT-2's tensors are not mapped",
    },
    "native": {},
    "dense": {r"quantise no activations": "ordinary weights say nothing of inputs"},
}
REFUSED["gptq_v2"] = REFUSED["gptq"]

#: what a client of a format needs installed
CLIENTS = {
    "compressed-tensors": ("compressed_tensors", "accelerate"),
    "gptq": ("gptqmodel", "optimum"),
    "gptq_v2": ("gptqmodel", "optimum"),
    "bitsandbytes": ("bitsandbytes", "accelerate"),
    "gguf": ("gguf",),
    "native": (),
    "dense": (),
}
#: mean |difference| of logits, in standard deviations: of the same float32 products in another order
EXACT = 1e-5
#: where a client computes something else, and what:
LIMITS = {
    ("transformers", "compressed-tensors", "token"): 0.03,  # it divides a token's largest value by 127.5, not 127
    ("transformers", "bitsandbytes", "token"): 0.03,  # inputs pass through float16, ties fall the other way
    ("transformers", "gguf", ""): 1e-3,  # it multiplies in float32 what we round to float16
}
ROWS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(3))


class Outcome:
    """What became of a method in a format: a folder and its records, or a refusal.

    Attributes:
        folder: None where it was refused.
        records: of the layers.
        error: None where it was written.
    """

    def __init__(self, folder: Path | None, records: list[dict[str, Any]], error: CompressError | None) -> None:
        self.folder, self.records, self.error = folder, records, error


@pytest.fixture(scope="module")
def outcome(make_model: Any, tokenizer: Any, text_file: Path, tmp_path_factory: Any) -> Callable[..., Outcome]:
    """outcome(model, method, format): found out once."""
    sources: dict[str, Path] = {}
    known: dict[tuple[str, str, str], Outcome] = {}
    text = tmp_path_factory.mktemp("text") / "short.txt"
    text.write_text(text_file.read_text()[:20000])

    def get(model: str, line: str, format: str) -> Outcome:
        key = (model, line, format)
        if model not in sources:
            sources[model] = make_model(MODELS[model], tmp_path_factory.mktemp("source") / model, tokenizer)
        if key not in known:
            place = tmp_path_factory.mktemp("out")
            options = {"format": format, "calib": str(text), "samples": 8, "seq_len": 32, "no_eval": True}
            try:
                result = compress.run(sources[model], parse(line), place / "out", **options)
                known[key] = Outcome(place / "out", result.records, None)
            except CompressError as error:
                assert not list(place.iterdir()), "refused after work was begun"
                known[key] = Outcome(None, [], error)
        return known[key]

    return get


@torch.no_grad()
def our_logits(folder: Path, spill: Path) -> Tensor:
    """float32 [rows, seq, vocab]: block by block, as `compress eval` computes."""
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, torch.device("cpu"))
    flow = final_states(model, ROWS, spill)
    found = torch.cat([model.logits(flow.states(i), flow.batch(i)) for i in range(len(flow))])
    flow.close()
    return found.float()


@torch.no_grad()
def client_logits(client: str, folder: Path, format: str) -> Tensor:
    """float32 [rows, seq, vocab] of a model that loads without a missing, unexpected or mismatched key."""
    if client == "compress.load":
        model = compress.load(folder, device="cpu", dtype="float32")
    else:
        more = {"gguf_file": next(folder.glob("*.gguf")).name} if format == "gguf" else {}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **more
        )
        assert not any(info.values()), info
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' second way on some CPUs, in bfloat16
            module.support_avx512bf16_for_cpu = False
    found: Tensor = model.eval()(ROWS).logits.float()
    return found


def test_every_pass_and_every_format_is_here() -> None:
    assert {line.split()[0] for line in METHODS} == set(PASSES)
    assert set(CLIENTS) == set(REFUSED) == set(FORMATS)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("line", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_written_or_refused(model: str, line: str, format: str, outcome: Any, tmp_path: Path) -> None:
    found = outcome(model, line, format)
    if found.error is not None:
        check_refusal(found.error, model, line, format, outcome)
        return
    weights = Weights(Checkpoint.open(found.folder))
    assert weights.format_name == (format if FORMATS[format].quantised else None)
    assert weights.packed == ({r["name"] for r in found.records} if FORMATS[format].quantised else set())
    for record in found.records:
        dense = weights.read(f"{record['name']}.weight")
        if not FORMATS[format].quantised and model == "gpt2":
            dense = dense.t()
        assert digest(dense.contiguous()) == record["sha256_dense"]
    ours = our_logits(found.folder, tmp_path / "states")
    activations = {weights.activations(layer) for layer in weights.packed} - {""}
    for client in ("transformers", "compress.load"):
        if client == "transformers" and not all(map(importlib.util.find_spec, CLIENTS[format])):
            continue
        theirs = client_logits(client, found.folder, format)
        far = float((theirs - ours).abs().mean() / ours.std())
        assert far <= LIMITS.get((client, format, "".join(activations)), EXACT), f"{client}: {far:.2g}"


def check_refusal(error: CompressError, model: str, line: str, format: str, outcome: Any) -> None:
    """The reason is a known one; a format that the remedy names takes it, or a setting that it names would."""
    reasons = [words for words in REFUSED[format] if re.search(words, error.what)]
    assert len(reasons) == 1, error
    named = re.findall(r"--format ([\w-]+?)(?:,|$| )", error.remedy) + re.findall(r"or (native)$", error.remedy)
    others = re.sub(r"--format [\w-]+", "", error.remedy)
    settings = re.search(r"--|variant|rtn or gptq|absmax|exclude", others)
    assert named or settings, error
    if not settings and format != "gguf":
        assert any(outcome(model, line, other).error is None for other in named), error
