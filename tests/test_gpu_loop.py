"""The block loop on a CUDA device: its streams and threads against one thing after another, and against memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.api
from compress import flows, hidden, pipeline, stats
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.evaluate import states
from compress.job import Clock
from compress.lane import Here, Stream
from compress.types import Needs
from compress.weights import Weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

GPU = torch.device("cuda")
RUN: dict[str, Any] = {"calib": "bundled", "seq_len": 256, "device": "cuda", "no_client": True}
METHODS: dict[str, Any] = {
    "gptq": compress.GPTQ(bits=4, quality="balanced"),
    "rtn": compress.RTN(bits=4),
    "smoothquant": compress.passes.load("smoothquant")(),
}


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "report.json"}


def digests(result: Any) -> list[str]:
    return [r["sha256_dense"] for r in result.records]


@pytest.mark.parametrize("tier", ["device", "host", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_streams_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, tier: str) -> None:
    """The slow twin copies everything in the stream of the work, when it is needed."""
    for module in (flows, states):
        monkeypatch.setattr(module, "batch_rows", lambda *given: 16)
    monkeypatch.setattr(hidden, "choose_tier", lambda *given: tier)
    fast = compress.run("bundled", METHODS[method], tmp_path / "a" / "out", eval="bundled", **RUN)
    assert fast.room["next_block"] == "cuda"
    assert fast.room["blocks_without_room_ahead"] == 0
    for module in (pipeline, hidden, states):
        monkeypatch.setattr(module, "lane_to", lambda device: Here())
    compress.run("bundled", METHODS[method], tmp_path / "b" / "out", eval="bundled", **RUN)
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")


def test_low_memory_changes_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 16)
    plain = compress.run("bundled", compress.GPTQ(bits=4, quality="balanced"), tmp_path / "a", no_eval=True, **RUN)
    low = compress.run(
        "bundled", compress.GPTQ(bits=4, quality="balanced"), tmp_path / "b", no_eval=True, low_memory=True, **RUN
    )
    assert (plain.room["hidden_states"], low.room["hidden_states"]) == ("device", "host")
    assert digests(low) == digests(plain)


@pytest.fixture
def memory() -> Iterator[None]:
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_full_device_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: None) -> None:
    """A limit between what 64 and what 4 rows at once take: the run ends, and says how."""

    def run(rows: int, name: str) -> tuple[Any, int]:
        monkeypatch.setattr(flows, "batch_rows", lambda *given: rows)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result = compress.run(
            "bundled", compress.GPTQ(bits=4, quality="balanced"), tmp_path / name, no_eval=True, **RUN
        )
        return result, torch.cuda.max_memory_reserved()

    (_, most), (_, least) = run(64, "a"), run(4, "b")
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((most + least) / 2 / total)
    result, _ = run(64, "c")
    assert 1 <= result.room["rows_at_once"] < 64
    assert result.notes[0] == "out of device memory with 64 rows at once: 32 from there on"
    torch.cuda.set_per_process_memory_fraction(1.0)
    wanted, _ = run(result.room["rows_at_once"], "d")
    assert digests(result) == digests(wanted)


def test_the_device_is_waited_for_once_a_step(tmp_path: Path) -> None:
    """However many tensors and batches there are."""
    model = BlockModel(Weights(Checkpoint.open(compress.api.find_model("bundled"))), torch.bfloat16, GPU)
    flow = hidden.Activations(model, torch.randint(0, 300, (24, 64)), 2, tmp_path / "spill", held=0)
    flow.enter()

    def load() -> None:
        with model.ahead([0], Stream(GPU)) as ahead:
            model.load(0, ahead.take(0))

    def collect() -> None:
        stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True))

    for step in (load, collect, lambda: flow.advance(0)):
        step()
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            step()
            torch.cuda.set_sync_debug_mode("default")
        waits = [
            f"{w.filename}:{w.lineno}"
            for w in seen
            if "prototype" not in str(w.message) and "synchronizing" in str(w.message)
        ]
        assert len(waits) <= 1, waits


def test_the_clock_does_not_wait() -> None:
    clock = Clock(GPU)
    torch.cuda.synchronize()
    with clock("forward"):
        torch.cuda._sleep(200_000_000)
        with clock("hessian"):
            torch.cuda._sleep(100_000_000)
    assert not torch.cuda.current_stream().query(), "the work is not over when its part is left"
    assert clock.seconds["forward"] == pytest.approx(2 * clock.seconds["hessian"], rel=0.2)


def test_hidden_states_are_those_that_were_put(tmp_path: Path) -> None:
    """Round after round on busy streams, in every place."""
    for tier in ("device", "host", "disk"):
        states = hidden.HiddenStates(GPU, tmp_path / "spill", tier)
        first = [torch.randn(4, 512, 512, device=GPU, dtype=torch.bfloat16) for _ in range(6)]
        for i, value in enumerate(first):
            states.put(i, value.clone())
        for _ in range(5):
            for i in range(6):
                torch.cuda._sleep(2_000_000)
                states.put(i, states.get(i) * 2)
        for i, value in enumerate(first):
            assert torch.equal(states.get(i), value * 32)
        states.close()
