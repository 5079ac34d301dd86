"""GGUF files in llama.cpp on a CPU (through node-llama-cpp): logits, tokens of a text, a sentence.

Two files are asked about for each model. One holds our dequantised weights as float32: whatever is wrong with names,
the order of rows, rotary embeddings, biases or hyperparameters shows in it. What is left there is llama.cpp's cache of
keys and values in float16, and float32 sums in another order: 0.01 times the deviation of the logits. The other is the
compressed file itself. llama.cpp multiplies quantised weights by inputs that it rounds to 8 bits in blocks of 32, which
no dequantised model does: a KL divergence of 0.02 nats a token, and the most likely token is the same at 85% of the
positions.

Texts are cut into the same tokens by both, by every rule that we have a name for.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from compress import GPTQ, RTN
from compress.assets import folder
from compress.checkpoint import Checkpoint
from compress.gguf import tokenizer as gguf_tokenizer
from compress.gguf import writer

pytestmark = [pytest.mark.clients, pytest.mark.xdist_group("llamacpp")]

HERE = Path(__file__).resolve().parent
MODULES = Path(os.environ.get("COMPRESS_CLIENTS", HERE.parent.parent / ".clients")).resolve() / "llamacpp"
DENSE_FAR, PACKED_KL, PACKED_SAME = 0.01, 0.02, 0.85
COUNT, GENERATE = 32, 24
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
MODELS = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=64),
    "llama, rope of llama 3": LlamaConfig(**SIZES, head_dim=64, rope_parameters=LLAMA3),
    "llama, linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=64),
}
TEXTS = {"bundled": "Once upon a time", "SmolLM2-135M": "The capital of France is"}


@dataclass(frozen=True)
class Case:
    """A file to write and ask about."""

    model: str
    method: Any = field(default_factory=lambda: RTN(bits=4, group_size=32))

    def __str__(self) -> str:
        return f"{self.model}, gguf, {self.method.name} {self.method.bits} bits, group {self.method.group_size}"


CASES = [
    *(Case(m) for m in MODELS),
    *(Case(f"llama, text cut by {rule}") for rule in ("smollm", "llama-bpe", "qwen2", "tekken", "pieces")),
    *(Case("llama", RTN(bits=b, group_size=32)) for b in (2, 3, 6, 8)),
    Case("llama", GPTQ(bits=4, group_size=64)),
    Case("qwen3", GPTQ(bits=8, group_size=-1)),
    Case("bundled"),
    Case("bundled", GPTQ(bits=8, group_size=32)),
    Case("SmolLM2-135M"),
    Case("SmolLM2-135M", GPTQ(bits=8, group_size=32)),
]


CORPUS = "In 1234 days I don't stop, it's 12345 fine.\n\nDON'T  Stop  123 the red fox, a caf\u00e9 2024! "
SPLITS = {
    "smollm": None,
    **{name: rule for rule, name in gguf_tokenizer._RULES.items()},
}


def bytes_cut_by(rule: str) -> Any:
    """A byte-level tokenizer that cuts text by a rule and has learned numbers, blanks and contractions."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    if SPLITS[rule] is None:
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        steps = [
            pre_tokenizers.Split(Regex(SPLITS[rule]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    bpe.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    bpe.train_from_iterator([CORPUS * 50], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>")


def pieces() -> Any:
    """Llama 2's kind: bytes to fall back on, a blank in front, a token to begin with."""
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "r"), ("e", "d"), ("\u2581r", "ed")]
    merges += [("f", "o"), ("fo", "x"), ("\u2581", "fox"), ("\u2581", "\u2581")]
    words = [a + b for a, b in merges]
    single = sorted(set("".join(words)))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *single, *words]
    return LlamaTokenizer(vocab={t: i for i, t in enumerate(dict.fromkeys(names))}, merges=merges, add_bos_token=True)


def tokens(model: str) -> list[int]:
    """Random ids; of SmolLM2 a text, because its answers to random ids are of no use."""
    if model == "SmolLM2-135M":
        text = (folder("calib") / "text").glob("*.txt")
        words = next(iter(sorted(text))).read_text(encoding="utf-8")[2000:4000]
        ids = AutoTokenizer.from_pretrained(os.environ["COMPRESS_SMOLLM2"])(words)["input_ids"]
        return [int(i) for i in ids[: 2 * COUNT]]
    top = 4096 if model == "bundled" else 300
    return torch.randint(top, (COUNT,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: Any, make_model: Any, tokenizer: Any, compressed: Any, dense_twin: Any) -> Any:
    """By case: the folder that we wrote, and what llama.cpp answered about its dense twin and about itself."""
    if not (MODULES / "complete").exists() or shutil.which("node") is None:
        pytest.skip("no llama.cpp: run `make clients` where there is npm")
    smol = os.environ.get("COMPRESS_SMOLLM2")
    sources: dict[str, Path] = {"bundled": folder("calib") / "tiny"} | ({"SmolLM2-135M": Path(smol)} if smol else {})
    jobs, folders = [], {}
    for case in CASES:
        if case.model == "SmolLM2-135M" and not smol:
            continue
        if case.model not in sources:
            name, _, rule = case.model.partition(", text cut by ")
            own = tokenizer if not rule else pieces() if rule == "pieces" else bytes_cut_by(rule)
            place = tmp_path_factory.mktemp("source") / "model"
            sources[case.model] = make_model(MODELS[name], place, own, torch.float16)
        out = compressed(sources[case.model], case.method, format="gguf", no_verify=True)
        twin = dense_twin(out, torch.float32)
        checkpoint = Checkpoint.open(twin)
        writer.write(twin / "dense.gguf", checkpoint.tensors.items(), checkpoint, {})
        folders[str(case)] = (len(jobs), out, twin)
        text = TEXTS.get(case.model, CORPUS)
        common = {"tokens": tokens(case.model), "text": text, "generate": GENERATE}
        jobs += [{"file": str(f), **common} for f in (twin / "dense.gguf", out / "model.gguf")]
    place = tmp_path_factory.mktemp("answers")
    (place / "job.json").write_text(json.dumps(jobs))
    command = ["node", str(HERE / "ask_llamacpp.mjs"), str(MODULES), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-3000:]
    return place, folders, jobs


def answered(place: Path, number: int) -> tuple[dict[str, Any], Tensor]:
    """What was said of a file, and its logits [tokens, vocabulary]."""
    error = place / f"{number}.error"
    assert not error.exists(), error.read_text()
    said = json.loads((place / f"{number}.json").read_text())
    raw = np.fromfile(place / f"{number}.f32", dtype=np.float32)
    return said, torch.from_numpy(raw).reshape(-1, said["size"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, answers: Any, answer: Any) -> None:
    place, folders, jobs = answers
    if str(case) not in folders:
        pytest.skip("COMPRESS_SMOLLM2 names no folder with SmolLM2")
    number, out, twin = folders[str(case)]
    model = AutoModelForCausalLM.from_pretrained(twin, dtype=torch.float32).eval()
    with torch.no_grad():
        ours = model(torch.tensor([jobs[number]["tokens"]])).logits[0]
    said, dense = answered(place, number)
    far, same = answer("llama.cpp", f"{case}, as float32", ours, dense)
    assert far < DENSE_FAR * max(1.0, float(ours.std()))
    assert same == 1.0
    packed_said, packed = answered(place, number + 1)
    _, same = answer("llama.cpp", str(case), ours, packed)
    p, q = ours.double().log_softmax(-1), packed.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert kl < PACKED_KL
    assert same > PACKED_SAME

    tokenizer = AutoTokenizer.from_pretrained(out)
    expected = tokenizer(jobs[number]["text"])["input_ids"]
    assert said["prompt"] == packed_said["prompt"] == expected
    rule = case.model.partition(", text cut by ")[2]
    assert not rule or packed_said["type"] == ("default" if rule == "pieces" else rule)
    assert packed_said["special"] == {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    with torch.no_grad():
        made = model.generate(torch.tensor([expected]), max_new_tokens=GENERATE, do_sample=False, pad_token_id=0)
    ended = [i for i in made[0, len(expected) :].tolist() if i != tokenizer.eos_token_id]
    assert said["made"][: len(ended)] == ended[: len(said["made"])], "the dense file writes another text than we"
    if case.model in TEXTS:
        assert len(packed_said["text"].split()) > 4
        print(f"\n{case}: {jobs[number]['text']}{packed_said['text']}")
