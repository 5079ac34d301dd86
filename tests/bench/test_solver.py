"""`compress bench solver`: on the CPU, where every solver runs as its own twin, and with results that stand here."""

from __future__ import annotations

import inspect
import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import cli
from compress.bench import quantisers, record, solver, solver_tables, stages, sums, tables, timing
from compress.bench.quantisers import Tool
from compress.bench.stages import METHODS, Layer, Setting
from compress.cuda import columns as cuda_columns
from compress.passes import gptq
from compress.solvers import columns
from compress.solvers.kernel import Fast
from compress.types import LayerStats

PLAN = solver.Plan(("gptq",), ((64, 128),), None, group=64, tokens=256, others=False, runs=1)
CARD = "NVIDIA H100 80GB HBM3"


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "bench", "solver", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ran(monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--methods", "--asymmetric", "--tokens", "--no-others", "--tf32"))


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    words = ("--shapes", "64x256,64x128", "--tokens", "256", "--group", "64", "--runs", "1", "--device", "cpu")
    assert ran(monkeypatch, *words, "--json", "--quiet", "--no-others", "-o", str(tmp_path / "solver")) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "solver.json").read_text())
    assert report["machine"]["cores"] == os.cpu_count()
    assert [(r["method"], r["columns"]) for r in report["rows"]] == [(m, n) for n in (256, 128) for m in METHODS]
    for row in report["rows"]:
        stages_of = {"sparsegpt": {"refit"}, "spqr": {"grid", "descent"}, "gptq": {"grid", "losses"}}
        assert {"hessian", "factor", "loop", "whole"} | stages_of.get(row["method"], set()) <= set(row["ms"])
        assert ("descent" in row["ms"]) == (row["method"] in ("gptq-search", "spqr"))
        assert all(took > 0 for took in row["ms"].values())
        assert 0 < row["loss"] < 0.2
        assert ("twin" in row) == (row["columns"] == 128)  # the smallest shape
        assert row.get("twin", {"ratio": 1, "equal": 1})["ratio"] == 1
        assert row.get("twin", {"ratio": 1, "equal": 1})["equal"] == 1
    page = (tmp_path / "solver.md").read_text()
    assert page.startswith("# Solvers\n\n`compress bench solver --shapes 64x256,64x128")
    assert "**gptq-search: GPTQ as it is by default" in page
    assert "timed on 256" in page


@pytest.mark.parametrize("more", [{"asymmetric": True}, {"group": -1, "dtype": "bfloat16"}, {"bits": 3, "tf32": True}])
def test_other_settings(more: dict[str, Any]) -> None:
    report = solver.run(replace(PLAN, **more), lambda line: None)
    assert (report["failed"], report["rows"][0]["twin"]["equal"]) == (0, 1)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert set(more) <= set(report["setting"])


def test_search_pays() -> None:
    report = solver.run(replace(PLAN, methods=("gptq", "gptq-search")), lambda line: None)
    plain, searched = report["rows"]
    assert searched["loss"] < plain["loss"]


def test_a_wrong_loop_is_told(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = columns.sweep

    def wrong(w: Tensor, *rest: Any) -> Tensor:
        k = right(w, *rest)
        return k if os.environ.get("COMPRESS_KERNELS") == "0" else k.roll(1, 1)

    monkeypatch.setattr(gptq.columns, "sweep", wrong)
    words = ("--methods", "gptq", "--shapes", "64x128", "--tokens", "256", "--group", "64", "--device", "cpu")
    assert ran(monkeypatch, *words, "--runs", "1", "--no-others") == 1
    said = capsys.readouterr()
    assert "wrong result" in said.err
    assert "1 rows failed" in said.out
    assert "COMPRESS_KERNELS" not in os.environ


def test_what_cannot_be_solved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*given: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(solver, "accumulate", no_memory)
    report = solver.run(PLAN, lambda line: None)
    assert (report["failed"], report["rows"][0]["failed"]) == (1, "out of memory")
    (table,) = solver_tables.tables(report)
    assert {len(row) for row in table.rows} == {len(table.headings)}


def test_nothing_of_the_layer_is_changed() -> None:
    layer = stages.drawn((64, 128), 256, torch.device("cpu"), torch.float16)
    again = stages.drawn((64, 128), 256, torch.device("cpu"), torch.float16)
    for name, method in METHODS.items():
        made = method.make(Setting(group=64))
        for stage, run in method.stages(made, layer, torch.float16):
            one, two = run(), run()
            if isinstance(one, Tensor):
                assert torch.equal(one, two), (name, stage)  # type: ignore[arg-type]
        assert torch.equal(layer.weight, again.weight)
        assert torch.equal(layer.hessian, again.hessian)


def test_stages_make_what_the_pass_makes() -> None:
    layer = stages.drawn((64, 128), 256, torch.device("cpu"), torch.float16)
    for name in ("gptq", "gptq-search"):
        method = METHODS[name].make(Setting(group=64))
        found = {stage: run() for stage, run in METHODS[name].stages(method, layer, torch.float16)}
        solved = method(layer.weight, LayerStats(256, layer.hessian), torch.float16)
        visit = torch.argsort(layer.hessian.diagonal(), descending=True, stable=True)
        levels = found["descent" if "descent" in found else "loop"]
        assert isinstance(levels, Tensor)
        share = (levels.t() + 8 == stages.codes(solved.packed)[:, visit]).float().mean()
        assert share > 0.99  # but for rows that were rounded to nearest


def test_a_block_is_given_what_its_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are those of the kernel's function, and of the shapes that this has."""
    signature = inspect.signature(cuda_columns.block)
    seen: list[dict[str, Any]] = []

    def find(*given: Any, **more: Any) -> Fast:
        rule = SimpleNamespace(bits=given[2])
        return Fast(lambda *a, **b: seen.append(signature.bind(rule, *a, **b).arguments), 128, True)

    monkeypatch.setattr(stages, "kernel", SimpleNamespace(find=find))
    monkeypatch.setattr(timing, "graph", lambda calls: calls[0]() or 12.25)
    report = solver.run(replace(PLAN, methods=tuple(METHODS), shapes=((64, 256),)), lambda line: None)
    assert [r["block_us"] for r in report["rows"]] == [12.25] * 4
    assert len(seen) == 4
    for given in seen:
        assert given["factor"].shape == (128, 128)
        assert given["inverse"].shape == (128,)
        for name in ("w", "scale", "zero", "alive", "k", "error", "value", "kept"):
            if given.get(name) is not None:
                assert (given[name].shape, given[name].is_contiguous()) == ((128, 64), True), name
    present = [{name for name, value in given.items() if value is not None} for given in seen]
    common = {"rule", "w", "factor", "inverse", "k", "error"}
    assert present == [common | {"scale"}, common | {"scale"}, common | {"kept"},
                       common | {"scale", "zero", "alive", "value"}]  # fmt: skip
    assert "128 columns, µs" in solver_tables.tables(report)[0].headings


# --- other tools -----------------------------------------------------------------------------------------------------


def fake(ready: Callable[[Layer, Setting], Callable[[], Tensor]], **more: Any) -> Tool:
    return Tool("other", "torch", lambda layer: lambda: layer.x.float().sum(), ready, lambda *given: None, **more)


def test_a_tool_on_the_same_tensors(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[Layer] = []

    def ready(layer: Layer, setting: Setting) -> Callable[[], Tensor]:
        asked.append(layer)
        print("a banner")
        return lambda: layer.weight * 0.5

    monkeypatch.setattr(solver, "TOOLS", (fake(ready), replace(fake(ready), name="gone", package="no_such_package")))
    report = solver.run(replace(PLAN, others=True, runs=2), lambda line: None)
    (row,) = report["tools"]
    assert (row["tool"], row["quoted"]) == ("other", False)
    assert row["loss"] == pytest.approx(0.25)
    assert len(asked) == 3
    assert all(torch.equal(layer.weight, asked[0].weight) for layer in asked)
    assert report["absent"] == {"gone": "no_such_package is not installed"}
    assert report["failed"] == 0
    assert capsys.readouterr().out == ""  # what goes to stdout is the report


def test_a_tool_that_raises_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(layer: Layer, setting: Setting) -> Callable[[], Tensor]:
        raise ValueError("not on this card\nmore")

    monkeypatch.setattr(solver, "TOOLS", (fake(ready),))
    report = solver.run(replace(PLAN, others=True), lambda line: None)
    assert (report["tools"], report["failed"]) == ([], 0)
    assert report["absent"] == {"other, 64x128": "ValueError: not on this card"}


def test_quoted_on_such_a_card_only() -> None:
    plan = replace(PLAN, shapes=(*sums.BLOCK, (64, 128)), group=128, tokens=131072, others=True)
    assert solver._quoted(plan, [], "another card") == []
    assert solver._quoted(replace(plan, bits=3), [], CARD) == []
    found = solver._quoted(plan, [{"tool": "GPTQModel"}], CARD)
    assert [(r["tool"], r["rows"], r["columns"]) for r in found] == [("llm-compressor", *shape) for shape in sums.BLOCK]
    assert (found[0]["hessian_ms"], found[0]["solve_ms"], found[0]["quoted"]) == (92.3, 44.0, True)


# --- a block of Llama-2-7B -------------------------------------------------------------------------------------------


def rows(method: str = "gptq", **more: float) -> list[dict[str, Any]]:
    ms = {"hessian": 10.0, "factor": 5.0, "loop": 2.0, "whole": 99.0} | more
    return [{"method": method, "rows": r, "columns": c, "failed": "", "ms": ms} for r, c in sums.BLOCK]


def test_seven_layers_have_four_inputs() -> None:
    found = sums.block(rows(), [], {})
    assert found["ours"] == {"gptq": {"hessian": 40.0, "factor": 20.0, "loop": 14.0}}
    calls = {"gptq": [{"rows": 1, "columns": 1, "ms": 3.0, "hessian_ms": 4.0}] * 4}
    assert sums.block(rows(), [], calls)["ours"]["gptq"]["calls"] == 28.0
    broken = rows()
    broken[1]["failed"] = "wrong result"
    assert sums.block(broken, [], {})["ours"] == {}


def test_what_is_quoted_adds_up_to_what_was_measured() -> None:
    plan = replace(PLAN, shapes=tuple(sums.BLOCK), group=128, tokens=262144, others=True)
    tools = sums.block([], solver._quoted(plan, [], CARD), {})["tools"]
    seconds = {name: (t["hessian"] + t["solve"]) / 1e3 for name, t in tools.items()}
    assert seconds == pytest.approx({"llm-compressor": 2.82, "GPTQModel": 2.80}, abs=0.01)


def test_goals() -> None:
    ours = [*rows(), *rows("gptq-search", grid=50.0, refit=10.0, descent=5.0)]
    ours[0]["block_us"] = 20.0
    plan = replace(PLAN, shapes=tuple(sums.BLOCK), group=128, tokens=262144, others=True)
    found = sums.goals(ours, sums.block(ours, solver._quoted(plan, [], CARD), {}))
    assert [(g["measured"], g["met"]) for g in found] == [
        (74.0, True), (pytest.approx(2800 / 74, abs=0.2), True), (455.0, False), (20.0, False)
    ]  # fmt: skip
    assert "GPTQModel, quoted" in found[1]["what"]
    assert sums.goals([], {}) == []


def test_a_block_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {(64, 128): (4, 2), (128, 128): (2, 1)}
    for module in (solver, sums):
        monkeypatch.setattr(module, "BLOCK", small)
    monkeypatch.setattr(solver, "CALLS", ((192, 128), (64, 128)))
    told = record.head(None) | {"machine": record.machine(None) | {"device": CARD}}
    monkeypatch.setattr(record, "head", lambda device: told)
    known = quantisers.quoted() | {"tools": [
        {"name": "llm-compressor", "hessian": {"128": 100.0}, "solve": {"64x128": 40, "128x128": 50}}
    ]}  # fmt: skip
    monkeypatch.setattr(quantisers, "quoted", lambda: known)
    monkeypatch.setattr(solver, "TOOLS", ())
    plan = replace(PLAN, methods=("gptq", "gptq-search"), shapes=tuple(small), group=128, others=True)
    report = solver.run(plan, lambda line: None)
    assert report["failed"] == 0
    made = solver_tables.tables(report)
    for table in made:
        assert {len(row) for row in table.rows} == {len(table.headings)}, table.title
    page = tables.markdown("Solvers", report, made, solver_tables.notes(report))
    assert "| llm-compressor, quoted, not this run | 64x128 |" in page
    assert "**The 7 linear layers of a Llama-2-7B block; ms**" in page
    assert "the same beside llm-compressor, quoted" in page
    assert "Quoted: milliseconds on one NVIDIA H100" in page
    calls = report["block"]["calls"]["gptq"]
    assert [(c["rows"], c["columns"]) for c in calls] == [(192, 128), (64, 128)]
    assert set(report["block"]["ours"]["gptq"]) >= {"hessian", "factor", "loop", "calls"}


def test_switching_kernels_off_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "1")
    with stages.in_python():
        assert os.environ["COMPRESS_KERNELS"] == "0"
    assert os.environ["COMPRESS_KERNELS"] == "1"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--methods", "obq"), "--methods: there is no 'obq' here; there are gptq, gptq-search, sparsegpt, spqr"),
        (("--shapes", "7"), "--shapes: '7' is no shape"),
        (("--device", "mps"), "--device: no CUDA device 'mps'"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: tuple[str, ...], told: str) -> None:
    assert ran(monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_tf32_is_of_the_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that are timed make their products as the passes make them: in the loops, and nowhere else."""
    setting = Setting(group=32, tf32=True)
    layer = stages.drawn((16, 64), 128, torch.device("cpu"), torch.float16)
    seen: list[bool] = []
    plain = columns.lazily

    def lazily(*given: Any) -> None:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        plain(*given)

    monkeypatch.setattr(columns, "lazily", lazily)
    for method in METHODS.values():
        made = method.make(setting)
        for name, stage in method.stages(made, layer, torch.float16):
            if name in ("loop", "descent"):
                stage()
        stages.whole(made, layer, torch.float16)()
    assert seen
    assert all(seen)
    assert not torch.backends.cuda.matmul.allow_tf32
