"""Decoding step by step on a static cache gives what the whole model gives; nothing in a step waits for the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from compress.bench import decode, llama, tables
from compress.bench.cases import CASES
from compress.bench.layers import Setting

SMALL = llama.Model(layers=2, hidden=256, intermediate=512, heads=4, vocabulary=300)
HALF, WHOLE = (Setting("cpu", dtype, std=0.05) for dtype in (torch.float16, torch.float32))
PROMPT, STEPS = 7, 9


class NoWaiting(TorchDispatchMode):
    """Raises where a value would have to be known on the host, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["dense", "w4", "nf4"])
def model(request: pytest.FixtureRequest) -> Iterator[llama.Llama]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield decode.build(SMALL, request.param, WHOLE)  # a step rounds elsewhere than a prompt does


def greedy(model: llama.Llama, prompt: Tensor, steps: int) -> Tensor:
    """By whole prompts."""
    tokens = prompt
    for _ in range(steps):
        tokens = torch.cat([tokens, logits(model, tokens).argmax(-1, keepdim=True)], 1)
    return tokens[:, prompt.shape[1] :]


def logits(model: llama.Llama, tokens: Tensor) -> Tensor:
    """Behind the last token."""
    batch, count = tokens.shape
    return model(tokens, torch.arange(count), model.cache(batch, count), llama.PROMPT)


def test_steps_are_greedy_decoding(model: llama.Llama) -> None:
    prompt = torch.randint(0, SMALL.vocabulary, (3, PROMPT))
    decoder = decode.Decoder(model, 3, 32)
    decoder.prefill(prompt)
    first = decoder.token.clone()
    with NoWaiting():
        for _ in range(STEPS):
            decoder.step()
    told = decoder.history[:, PROMPT : PROMPT + STEPS + 1].clone()
    assert torch.equal(told, greedy(model, prompt, STEPS + 1))
    assert decoder.finite
    assert int(decoder.position) == PROMPT + STEPS
    decoder.rewind(first, PROMPT)
    decoder.history.zero_()
    for _ in range(STEPS):
        decoder.step()
    assert torch.equal(decoder.history[:, PROMPT + 1 : PROMPT + STEPS + 1], told[:, 1:])


def test_numbers_that_are_not_finite_are_seen(model: llama.Llama) -> None:
    decoder = decode.Decoder(model, 1, 16)
    model.lm_head.weight[0, 0] = float("nan")
    decoder.prefill(torch.zeros(1, 3, dtype=torch.long))
    assert not decoder.finite


def test_bytes(model: llama.Llama) -> None:
    total, read = decode.weights(model)
    embeddings = SMALL.vocabulary * SMALL.hidden * 4
    assert total - read == embeddings
    packed = [m for m in model.modules() if isinstance(m, decode.Packed)]
    if not packed:
        assert total == 4 * decode.parameters(SMALL) == 4 * sum(p.numel() for p in model.parameters())
    else:
        assert len(packed) == 4 * SMALL.layers
        layers = (decode.parameters(SMALL) * 4 - 2 * embeddings) / 8  # a byte for two
        assert layers < total - 2 * embeddings < 1.3 * layers


@pytest.mark.parametrize("method", list(CASES))
def test_every_kind_can_be_built(method: str) -> None:
    with torch.no_grad():
        model = decode.build(llama.Model(1, 256, 512, 4, 64), method, HALF)
        assert logits(model, torch.zeros(1, 2, dtype=torch.long)).isfinite().all()


def test_the_size_of_llama_2_7b() -> None:
    assert decode.parameters(llama.Model()) == 6_738_415_616


def refuses(graph: Any, inputs: Any) -> Any:
    raise OSError("no C compiler\nwas found")


@dataclass(frozen=True)
class OnCPU(decode.Plan):
    backend: Any = "eager"

    @property
    def setting(self) -> Setting:
        return HALF

    @property
    def parts(self) -> llama.Parts:
        return llama.STEP if self.eager else llama.compiled(self.backend)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that runs its step as it is, each in 2 milliseconds."""
    torch.compiler.reset()
    counters.clear()

    def captured(decoder: decode.Decoder, first: Tensor, position: int) -> decode.Decoder:
        decode._warm(decoder, first, position)
        decoder.rewind(first, position)
        return decoder

    def replay(decoder: decode.Decoder, steps: int) -> float:
        for _ in range(steps):
            decoder.step()
        return 2.0 * steps

    monkeypatch.setattr(decode, "_captured", captured)
    monkeypatch.setattr(decode, "_replay", replay)
    monkeypatch.setattr(decode.record, "head", lambda device: {"schema": 1})
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)


@pytest.mark.usefixtures("clock")
def test_a_whole_run_makes_a_report() -> None:
    plan = OnCPU(("dense", "w4"), (1, 3), SMALL, prompt=4, steps=5)
    report = decode.run(plan, lambda line: None)
    assert [(r["method"], r["batch"], r["failed"]) for r in report["rows"]] == [
        ("dense", 1, ""), ("dense", 3, ""), ("w4", 1, ""), ("w4", 3, "")
    ]  # fmt: skip
    assert [r["tokens_per_second"] for r in report["rows"]] == [500.0, 1500.0, 500.0, 1500.0]
    assert [r["times_dense"] for r in report["rows"]] == [1.0] * 4
    assert report["setting"]["compiled"] is True
    assert report["rows"][0]["weight_bytes"] > report["rows"][2]["weight_bytes"]
    assert (report["failed"], report["missing"]) == (0, 0)
    assert len(tables.decode(report)[0].rows) == 4


@pytest.mark.usefixtures("clock")
def test_runs_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def astray(decoder: decode.Decoder, steps: int) -> float:
        decoder.history.random_(0, 1000)
        return 1.0

    monkeypatch.setattr(decode, "_replay", astray)
    report = decode.run(OnCPU(("dense", "w4"), (2,), SMALL), lambda line: None)
    assert report["rows"][0]["differing_tokens"] > 0  # the library's products are its own business
    assert report["rows"][1]["failed"].startswith("two runs from one state differ in ")
    assert report["failed"] == 1


@pytest.mark.usefixtures("clock")
def test_a_model_that_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*given: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(decode, "build", build)
    report = decode.run(OnCPU(("dense",), (1, 2), SMALL), lambda line: None)
    assert [r["failed"] for r in report["rows"]] == ["out of memory"] * 2


@pytest.mark.usefixtures("clock")
def test_what_cannot_be_compiled_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = OnCPU(("dense",), (1,), SMALL, prompt=4, steps=5, backend=refuses)
    row = decode.run(plan, lambda line: None)["rows"][0]
    assert row["failed"].startswith("torch.compile (--eager runs without it): ")
    assert "OSError: no C compiler was found" in row["failed"]
    monkeypatch.setattr(llama, "compiled", lambda backend: replace(llama.STEP))  # as with TORCHDYNAMO_DISABLE=1
    row = decode.run(plan, lambda line: None)["rows"][0]
    assert "torch.compile did nothing" in row["failed"]
    report = decode.run(replace(plan, eager=True), lambda line: None)
    assert (report["rows"][0]["failed"], report["setting"]["compiled"]) == ("", False)


@pytest.mark.usefixtures("clock")
def test_many_batches() -> None:
    """More than torch.compile makes graphs for, if it is not told to."""
    plan = OnCPU(("dense",), tuple(range(1, 11)), llama.Model(1, 64, 64, 2, 32), prompt=1, steps=2)
    report = decode.run(plan, lambda line: None)
    assert [r["failed"] for r in report["rows"]] == [""] * 10
