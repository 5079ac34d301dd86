"""Decoding step by step on a static cache gives what the whole model gives; nothing in a step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.bench import decode, tables
from compress.bench.cases import CASES
from compress.bench.layers import Setting

SMALL = decode.Model(layers=2, hidden=256, intermediate=512, heads=4, vocabulary=300)
HALF = Setting("cpu", torch.float16, std=0.05)
PROMPT, STEPS = 7, 9


class NoWaiting(TorchDispatchMode):
    """Raises where a value would have to be known on the host, which a CUDA graph cannot hold."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "masked_select", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["dense", "w4", "nf4"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield decode.build(SMALL, request.param, HALF)


def greedy(model: Any, prompt: Tensor, steps: int) -> Tensor:
    """Without a cache."""
    tokens = prompt
    for _ in range(steps):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[:, prompt.shape[1] :]


def test_steps_are_greedy_decoding(model: Any) -> None:
    prompt = torch.randint(0, SMALL.vocabulary, (3, PROMPT))
    decoder = decode.Decoder(model, 3, 32)
    decoder.prefill(prompt)
    first = decoder.token.clone()
    with NoWaiting():
        for _ in range(STEPS):
            decoder.step()
    told = decoder.history[:, PROMPT : PROMPT + STEPS + 1].clone()
    assert torch.equal(told, greedy(model, prompt, STEPS + 1))
    assert bool(decoder.finite)
    assert int(decoder.position) == PROMPT + STEPS
    decoder.rewind(first, PROMPT)
    decoder.history.zero_()
    for _ in range(STEPS):
        decoder.step()
    assert torch.equal(decoder.history[:, PROMPT + 1 : PROMPT + STEPS + 1], told[:, 1:])


def test_numbers_that_are_not_finite_are_seen(model: Any) -> None:
    decoder = decode.Decoder(model, 1, 16)
    model.lm_head.weight[0, 0] = float("nan")
    decoder.prefill(torch.zeros(1, 3, dtype=torch.long))
    assert not bool(decoder.finite)


def test_bytes(model: Any) -> None:
    total, read = decode.weights(model)
    embeddings = SMALL.vocabulary * SMALL.hidden * 2
    assert total - read == embeddings
    packed = [m for m in model.modules() if isinstance(m, decode.Packed)]
    if not packed:
        assert total == 2 * decode.parameters(SMALL) == 2 * sum(p.numel() for p in model.parameters())
    else:
        assert len(packed) == 7 * SMALL.layers
        layers = (decode.parameters(SMALL) * 2 - 2 * embeddings) / 2
        assert 0.45 * layers < total - 2 * embeddings < 0.65 * layers


@pytest.mark.parametrize("method", list(CASES))
def test_every_kind_can_be_built(method: str) -> None:
    with torch.no_grad():
        model = decode.build(decode.Model(1, 256, 512, 4, 64), method, HALF)
        assert model(torch.zeros(1, 2, dtype=torch.long)).logits.isfinite().all()


def test_the_size_of_llama_2_7b() -> None:
    assert decode.parameters(decode.Model()) == 6_738_415_616


@dataclass(frozen=True)
class OnCPU(decode.Plan):
    @property
    def setting(self) -> Setting:
        return HALF


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that runs its step as it is, each in 2 milliseconds."""

    def replay(decoder: decode.Decoder, steps: int) -> float:
        for _ in range(steps):
            decoder.step()
        return 2.0 * steps

    monkeypatch.setattr(decode, "_captured", lambda decoder, first, position: decoder)
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
