"""What tests share: a toy Llama with a tokenizer made on the spot, the bundled model, the emulation of CUDA kernels."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)

WORDS = (
    "the river runs under an old stone bridge and the miller counts his sacks while a red fox waits for evening rain "
    "because nobody told her that bread is made from corn not stones and every winter ends with a small green leaf"
).split()


def pytest_collection_finish() -> None:
    """What is imported and collected by now stays to the end: a collection of garbage that walks through all of it
    takes a third of a second, tests make hundreds, and forked children copy the pages besides."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def unasked():  # type: ignore[no-untyped-def]
    """Runs do not load their result through transformers, which would take longer than they do; but see `asking`."""
    from compress import pipeline
    from compress.asking import Answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ask", lambda *given: Answer("transformers", reason="this is a test of something else"))
        yield


@pytest.fixture(scope="module")
def asking(unasked):  # type: ignore[no-untyped-def]
    """Runs of this module do."""
    from compress import pipeline
    from compress.asking import ask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "ask", ask)
        yield


def make_text(words: int, seed: int = 0) -> str:
    """Sentences of seeded random words: enough structure to tokenise, never the same twice."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[i] + ("." if n % 11 == 10 else "") for n, i in enumerate(picks))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long text file."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(make_text(20000))
    return path


@pytest.fixture(scope="session")
def tokenizer(text_file: Path):  # type: ignore[no-untyped-def]
    """A byte-level BPE tokenizer with 300 entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([str(text_file)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|end|>", eos_token="<|end|>")


def save_model(config, folder: Path, tokenizer=None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:  # type: ignore[no-untyped-def]
    """A random-weight model of any config, larger than its default initialisation so that blocks matter."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:  # type: ignore[no-untyped-def]
    """A 4-block Llama of width 64 in bf16 with tied embeddings, its tokenizer beside it. Read only."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=320,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return save_model(config, tmp_path_factory.mktemp("toy") / "toy", tokenizer, torch.bfloat16)


@pytest.fixture(scope="session")
def make_model():  # type: ignore[no-untyped-def]
    """`save_model` for tests that need other configs."""
    return save_model


@pytest.fixture(scope="session")
def emulate() -> ModuleType:
    """emulate.py as a module."""
    name = "kernels_emulate"
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("kernels") / "emulate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    if not module.available():
        pytest.skip("the kernels' CPU build needs g++ on Linux")
    return module


@pytest.fixture(scope="session")
def build(emulate: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """build(file, defines): a kernel file compiled for this CPU, once a session."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # what all workers share
    return partial(emulate.build, work=base / "emulated")


@pytest.fixture
def four_experts(tmp_path: Path, make_model: Callable[..., Path]) -> Path:
    """A model of one block with four experts, of which a token goes to two."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=32, moe_intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, vocab_size=320, num_experts=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return make_model(config, tmp_path / "moe")
