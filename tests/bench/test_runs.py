"""What is measured, told and refused, with a clock that stands still: no GPU is needed to see a wrong result."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.bench import kernels, peers, tables, timing, tune, ways
from compress.bench.cases import CASES, grid
from compress.bench.ceilings import Ceilings
from compress.bench.layers import Built, Case, Laid, Setting, Shape
from compress.bench.peers import Peer, Ready
from compress.cuda import choice, pruned
from compress.cuda.choice import Narrow
from compress.errors import CompressError

CPU = Setting("cpu")
LIMITS = Ceilings(3000.0, ((1000, 1.0), (100_000, 2.0)), {"fp16": 700.0})


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call takes 4 microseconds; the list has how many calls went round."""
    rounds: list[int] = []

    def graph(calls: Sequence[Callable[[], object]]) -> float:
        rounds.append(len(calls))
        calls[0]()
        return 4.0

    monkeypatch.setattr(timing, "graph", graph)
    monkeypatch.setattr(timing, "eager", graph)
    monkeypatch.setattr(timing, "copies", lambda size, device=0, most=64: 3)
    for module in (choice, pruned):
        monkeypatch.setattr(module, "choose", lambda *case: Narrow(1, 1, 4, 2))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return rounds


@dataclass(frozen=True)
class OnCPU(kernels.Plan):
    @property
    def setting(self) -> Setting:
        return CPU


PLAN = OnCPU(("w4",), ((64, 256),), (1, 8))


def measured(case: Case = CASES["w4"], **found: Any) -> list[dict[str, Any]]:
    return kernels._measure(PLAN, case, PLAN.shapes[0], LIMITS, found)


def test_rows(clock: list[int]) -> None:
    rows = measured()
    assert clock == [3, 3]
    first = rows[0]
    assert (first["kind"], first["rows"], first["columns"], first["tokens"]) == ("w4", 64, 256, 1)
    assert first["bytes"] == 64 * 256 // 2 + 64 * 2 * 2 + 2 * (256 + 64)
    assert first["us"] == 4.0
    assert first["floor_us"] == pytest.approx(LIMITS.read(first["bytes"]), abs=0.01)
    assert first["of_floor"] == pytest.approx(first["floor_us"] / 4, abs=0.01)
    assert first["way"] == "narrow 1 1 4 2 1 1"
    assert first["error"] < 1e-3
    assert not first["failed"]


class Wrong:
    """A layer that leaves out the last row."""

    def __init__(self, subject: Laid) -> None:
        self.subject = subject

    def linear(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), 64, dtype=x.dtype)
        out[:, :-1] = self.subject.linear(x)[:, :-1]
        return out

    def tensors(self) -> dict[str, Tensor]:
        return self.subject.tensors()


def test_a_wrong_result_is_told_and_not_timed(clock: list[int]) -> None:
    def build(shape: Shape, setting: Setting) -> Built:
        right = grid(4, shape, setting)
        assert isinstance(right.subject, Laid)
        return replace(right, subject=Wrong(right.subject))

    rows = measured(Case("w4", "", build))
    assert [r["failed"] for r in rows] == ["wrong result: relative error nan"] * 2
    assert clock == []


@pytest.mark.parametrize(
    "error", [CompressError("no room", "here"), torch.OutOfMemoryError("CUDA out of memory\nmore")]
)
def test_what_cannot_be_built_is_told(error: Exception) -> None:
    def build(shape: Shape, setting: Setting) -> Built:
        raise error

    reasons = {r["failed"] for r in measured(Case("w4", "", build))}
    assert reasons == {"here: no room"} or reasons == {"out of memory"}


def test_others_stand_beside() -> None:
    peer = Peer("other", ("w4",), peers.dense, 1e-3)
    found = peers.Found(us={1: 8.0}, error={1: 2e-4})
    rows = measured(other=(peer, found), elsewhere=(replace(peer, name="of nf4", kinds=("nf4",)), found))
    assert rows[0]["peers"] == {"other": {"us": 8.0, "ratio": 2.0, "error": 2e-4, "timing": "graph replay"}}
    assert rows[1]["peers"] == {}


# --- other libraries -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cuBLAS 16-bit", "torch._int_mm"])
def test_peers_that_run_anywhere(name: str, clock: list[int]) -> None:
    peer = next(p for p in peers.PEERS if p.name == name)
    found = peers.measure(peer, (32, 256), (1, 24), CPU)
    assert found.why_not == {}
    assert set(found.us) == {n for n in (1, 24) if n >= peer.fewest}
    assert all(error <= peer.limit for error in found.error.values())
    assert set(clock) == {3}


def test_bitsandbytes_on_a_cpu() -> None:
    pytest.importorskip("bitsandbytes")
    for peer in (p for p in peers.PEERS if p.name == "bitsandbytes"):
        found = peers.measure(peer, (64, 256), (1, 3), CPU)
        assert found.why_not == {}, peer.kinds
        assert set(found.us) == {1, 3}


def test_absent_peers_have_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = Peer("none", (), peers.dense, 1.0, absent=lambda: "it is not installed")
    assert peers.measure(nothing, (32, 256), (1,), CPU).why_not == {0: "it is not installed"}
    tiny = next(p for p in peers.PEERS if p.name == "tinygemm")
    assert peers.measure(tiny, (32, 256), (1,), CPU).why_not[0].startswith("NotImplementedError")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers._no_bitsandbytes() == "bitsandbytes is not installed"


def test_a_peer_that_is_wrong_is_not_timed(clock: list[int]) -> None:
    def make(shape: Shape, setting: Setting) -> Ready:
        return Ready([lambda x: x * 2], lambda x: x.float(), lambda n: setting.normal(n, 4))

    found = peers.measure(Peer("off", (), make, 1e-3), (4, 4), (2,), CPU)
    assert found.why_not == {2: "wrong result: relative error 1.0e+00"}
    assert (found.us, clock) == ({}, [])


def test_reasons_are_told_once() -> None:
    told: list[str] = []
    seen: dict[str, str] = {}
    plan = OnCPU(("w4",), ((32, 256),), (1,))
    rivals = kernels._rivals(plan, (32, 256), told.append, seen)
    assert set(rivals) == {"cuBLAS 16-bit", "tinygemm (w4)"}
    assert list(seen) == ["tinygemm (w4), 32x256"]
    assert kernels._rivals(replace(plan, others=False), (32, 256), told.append, seen) == {}


# --- tuning ----------------------------------------------------------------------------------------------------------

FAST, SLOW, WRONG, BROKEN = Narrow(1, 2, 8, 3), Narrow(1, 2, 8, 4), Narrow(1, 1, 16, 2), Narrow(1, 2, 16, 4)
BEFORE = Narrow(1, 1, 4, 2)
TIMES = {FAST: 3.0, SLOW: 3.2, WRONG: 1.0, BROKEN: 1.0, BEFORE: 9.0}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ways that take the times above; one leaves the output alone, one raises."""

    def multiply(x: Tensor, layer: Any, out: Tensor, way: Any) -> None:
        if way == BROKEN:
            raise CompressError("no such launch")
        if way != WRONG:
            ways.multiply(x, layer, out, choice.Library())

    def time(calls: Sequence[Any]) -> float:
        return TIMES[calls[0].args[-1]]

    monkeypatch.setattr(tune, "multiply", multiply)
    monkeypatch.setattr(tune, "once", time)
    monkeypatch.setattr(timing, "graph", time)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def case(*tried: Any, kind: str = "w4") -> tune.Tuned:
    layers, known = tune._layers(kind, (32, 256), (3,), CPU)
    assert len(layers) == 3
    return tune._case(kind, layers, known[3], tried, {"narrow 9 9 9 9": "did not compile"})


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(("kind", "number"), [("w4", 0), ("sparse-w4", pruned.PRUNED)])
def test_the_fastest_that_is_right_wins(kind: str, number: int) -> None:
    found = case(SLOW, WRONG, FAST, BROKEN, kind=kind)
    assert found.entry.way == ("narrow", 1, 2, 8, 3, 1, 1)
    assert found.entry.case == (number, 4, 3, 32, 256)
    assert (found.entry.us, found.before) == (3.0, ("narrow 1 1 4 2 1 1", 9.0))
    assert found.tried == 6
    assert set(found.failed) == {"narrow 9 9 9 9", "narrow 1 1 16 2 1 1", "narrow 1 2 16 4 1 1"}
    assert found.as_json()["way"] == ["narrow", 1, 2, 8, 3, 1, 1]


@pytest.mark.usefixtures("fake")
def test_what_ran_before_is_never_beaten_by_something_slower() -> None:
    assert case().entry.way == ("narrow", 1, 1, 4, 2, 1, 1)


@pytest.mark.usefixtures("fake")
def test_a_rule_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *case: BROKEN)
    found = case(FAST)
    assert math.isnan(found.before[1])
    assert found.as_json()["before_us"] is None
    with pytest.raises(CompressError, match="nothing multiplies 3 inputs by w4"):
        case(WRONG)


@pytest.mark.usefixtures("fake")
def test_a_way_that_stops_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    with pytest.raises(CompressError, match="the device stopped: no such launch"):
        case(BROKEN)


def test_kernels_of_the_chosen_ways_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(kernels, "warm", asked.extend)
    kernels._warm(replace(PLAN, kinds=("w4", "int8", "sparse-w4")), print)
    assert [(job.kind, job.tokens, job.way) for job in asked] == [
        (kind, tokens, BEFORE) for kind in ("w4", "sparse-w4") for tokens in (1, 8)
    ]


def test_tuning_is_for_the_usual_groups() -> None:
    with pytest.raises(CompressError, match="--tune"):
        kernels._tune(replace(PLAN, asymmetric=True), print)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks of a GPU besides its clock."""
    told = {"schema": 1, "command": "compress bench kernels", "date": "2026-11-22", "versions": {"torch": "2.11"}}
    machine = {"device": "NVIDIA H100 80GB HBM3", "sms": 132, "memory": 85e9, "l2": 5e7, "driver": "580.159.04"}
    monkeypatch.setattr(kernels.record, "head", lambda device: told | {"machine": machine})
    monkeypatch.setattr(kernels.ceilings, "measure", lambda device: LIMITS)
    monkeypatch.setattr(kernels, "warm", lambda jobs: {})
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("card")
def test_a_whole_run_makes_a_report() -> None:
    told: list[str] = []
    plan = OnCPU(("w4", "nf4"), ((64, 256), (128, 256)), (1, 8))
    report = kernels.run(plan, told.append)
    assert [(r["kind"], r["rows"], r["tokens"]) for r in report["rows"]] == [
        (kind, rows, tokens) for kind in ("w4", "nf4") for rows in (64, 128) for tokens in (1, 8)
    ]
    assert (report["failed"], report["missing"]) == (0, 0)
    assert all(r["peers"]["cuBLAS 16-bit"]["ratio"] == 1.0 for r in report["rows"])
    assert json.loads(json.dumps(report)) == report
    page = tables.markdown("Kernels", report, tables.kernels(report), tables.kernels_notes(report))
    assert "**w4: 4 bits" in page
    assert any("64x256: nf4" in line for line in told)


@pytest.mark.usefixtures("card")
def test_a_device_that_died_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    plan = OnCPU(("w4",), ((64, 256), (128, 256)), (1, 8), others=False)
    report = kernels.run(plan, lambda line: None)
    assert (len(report["rows"]), report["missing"]) == (2, 2)
