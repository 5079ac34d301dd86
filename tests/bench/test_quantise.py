"""`compress bench quantise`: tiny models on the CPU, mostly in this process; what is worked out of rows given here."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import cli
from compress.bench import models, once, quantise, quantise_tables, record
from compress.bench.models import MODELS
from compress.bench.once import Request
from compress.bench.quantisers import Tool
from compress.checkpoint import Checkpoint
from compress.errors import CompressError

TINY = MODELS["tiny"]
CPU = torch.device("cpu")


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "bench", "quantise", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Runs happen in this process."""
    asked: list[Request] = []

    def apart(request: Request, answer: Path) -> dict[str, Any]:
        asked.append(request)
        try:
            return {"process_seconds": 1.0} | once.run(request)
        except CompressError as error:
            return {"process_seconds": 1.0, "failed": str(error)}

    monkeypatch.setattr(once, "apart", apart)
    return asked


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama-2-7b", 6_738_415_616), ("llama-3-8b", 8_030_261_248), ("llama-3-70b", 70_553_706_496),
        ("smollm2-135m", 134_515_008),
    ],
)  # fmt: skip
def test_published_shapes(name: str, parameters: int) -> None:
    assert MODELS[name].parameters == parameters
    assert {n.split(".")[2] for n, _ in MODELS[name].cut(2).tensors() if ".layers." in n} == {"0", "1"}


def test_a_checkpoint_is_one_that_transformers_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr(models, "SHARD", 300_000)
    size = models.write(tmp_path / "model", TINY, CPU)
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    assert size == sum(f.stat().st_size for f in shards)
    assert {n: t.shape for n, t in Checkpoint.open(tmp_path / "model").tensors.items()} == dict(TINY.tensors())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert sum(p.numel() for p in model.parameters()) == TINY.parameters
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("a text", return_tensors="pt")["input_ids"]
    assert model(ids).logits.isfinite().all()
    weight = model.model.layers[1].mlp.down_proj.weight.detach()
    assert 0.018 < float(weight.float().std()) < 0.022
    assert bool((model.model.norm.weight == 1).all())


def test_tied_embeddings_have_no_head() -> None:
    assert "lm_head.weight" not in dict(MODELS["smollm2-135m"].tensors())


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ran(monkeypatch, "--help") == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("--model", "--blocks", "--low-memory", "--peers", "--cold", "--work"))


# --- runs ------------------------------------------------------------------------------------------------------------


def test_every_method(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, here: list[Request]) -> None:
    words = (
        "--model",
        "tiny",
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--device",
        "cpu",
        "--work",
        str(tmp_path / "work"),
    )
    out = ("--low-memory", "--json", "--quiet", "-o", str(tmp_path / "runs"))
    assert ran(monkeypatch, *words, *out, "--cold") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "runs.json").read_text())
    rows = {(r["method"], r["low_memory"]): r for r in report["rows"]}
    assert list(rows) == [
        ("gptq-fast", False), ("gptq-fast", True), ("gptq", False), ("gptq", True), ("gptq-best", False),
        ("gptq-best", True), ("rtn", False), ("nf4", False), ("absmax", False),
    ]  # fmt: skip
    assert [(r.method, r.low_memory) for r in here] == list(rows)
    for (method, _), row in rows.items():
        assert (row["blocks"], row["layers"], row["verified"], row["failed"]) == (2, 14, 14, "")
        assert {"load", "solve", "write", "verify"} <= set(row["phases"])
        assert ("hessian" in row["phases"]) == method.startswith("gptq")
        assert ("refine_block_seconds" in row) == (method == "gptq-best")
        assert row["bytes_in"] > TINY.nbytes
        assert row["seconds"] > 0
        assert row["peak_host_bytes"] > 10**8
        assert len(row["blocks_done"]) == 2
        assert ("times_copy" in row) == (method in once.FREE)
        assert "seconds_all" not in row  # it was the whole model
    assert rows["nf4", False]["format"] == "bitsandbytes"
    assert rows["gptq", True]["times_default"] > 0
    assert report["setting"]["group"] == 64
    assert list((tmp_path / "work").iterdir()) == []
    page = (tmp_path / "runs.md").read_text()
    assert page.startswith("# Whole runs\n\n`compress bench quantise --model tiny")
    assert "| gptq, low memory | 2 |" in page
    assert "**Where the time went**" in page


def test_fewer_blocks_are_carried_on(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, here: list[Request]
) -> None:
    monkeypatch.setitem(models.MODELS, "tiny", replace(TINY, blocks=12))
    words = ("--model", "tiny", "--blocks", "1,2", "--methods", "rtn", "--samples", "1", "--seq-len", "8")
    assert ran(monkeypatch, *words, "--device", "cpu", "--quiet", "-o", str(tmp_path / "runs")) == 0
    report = json.loads((tmp_path / "runs.json").read_text())
    assert [r["blocks"] for r in report["rows"]] == [1, 2]
    assert report["rows"][1]["carried_on"] == [1, 2]
    assert "worked out from runs on 1 and 2 blocks, by that line" in (tmp_path / "runs.md").read_text()


def test_a_run_that_fails(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, here: list[Request]) -> None:
    def broken(setting: Any) -> Any:
        raise CompressError("no such thing", "--bits")

    monkeypatch.setitem(once.METHODS, "gptq", broken)
    words = ("--model", "tiny", "--methods", "gptq,rtn", "--samples", "1", "--seq-len", "8", "--device", "cpu")
    assert ran(monkeypatch, *words, "--quiet", "-o", str(tmp_path / "runs")) == 1
    report = json.loads((tmp_path / "runs.json").read_text())
    assert [r["failed"] for r in report["rows"]] == ["--bits: no such thing", ""]
    for table in quantise_tables.tables(report):
        assert {len(row) for row in table.rows} == {len(table.headings)}, table.title
    assert "FAILED: --bits: no such thing" in (tmp_path / "runs.md").read_text()


def request(tmp_path: Path, **more: Any) -> Request:
    given = {"method": "rtn", "bits": 4, "group": 64, "samples": 1, "seq_len": 8, "vocabulary": 4096, "device": "cpu"}
    return Request(**({"source": str(tmp_path / "model"), "out": str(tmp_path / "out")} | given | more))


def test_a_process_of_its_own(tmp_path: Path) -> None:
    models.write(tmp_path / "model", TINY.cut(1), CPU)
    found = once.apart(request(tmp_path), tmp_path / "answer.json")
    assert (found["failed"], found["verified"]) == ("", 7)
    assert found["process_seconds"] > found["seconds"]
    assert (tmp_path / "out" / "config.json").exists()


def test_a_process_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, told in (("import sys; sys.exit('killed')", "killed"), ("raise SystemExit(3)", "it ended with 3")):
        monkeypatch.setattr(once, "_START", start)
        assert once.apart(request(tmp_path), tmp_path / "answer.json")["failed"] == told


def test_what_a_process_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(given: Request) -> dict[str, Any]:
        print("a banner")
        raise CompressError("no room", "here") if given.bits == 4 else torch.OutOfMemoryError("CUDA")

    monkeypatch.setattr(once, "run", run)
    answer = tmp_path / "answer.json"
    for bits, told in ((4, "here: no room"), (3, "out of memory")):
        monkeypatch.setattr(sys, "argv", ["-c", json.dumps(asdict(request(tmp_path, bits=bits))), str(answer)])
        once.answer()
        assert json.loads(answer.read_text()) == {"failed": told}
    assert capsys.readouterr().out == ""


def test_rows_of_tokens(tmp_path: Path) -> None:
    one = request(tmp_path, samples=3, seq_len=16, vocabulary=10)
    assert one.rows().shape == (3, 16)
    assert torch.equal(one.rows(), one.rows())
    assert int(one.rows().max()) < 10


def test_other_tools(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, here: list[Request]) -> None:
    seen: list[Any] = []

    def compress(source: Path, rows: torch.Tensor, out: Path, setting: Any, device: torch.device) -> None:
        seen.append((sorted(f.suffix for f in source.iterdir())[0], tuple(rows.shape), setting.group))
        out.mkdir()
        (out / "model.safetensors").write_bytes(bytes(100))

    def nothing(*given: Any) -> Any:
        raise AssertionError

    other = Tool("other", "torch", nothing, nothing, compress)
    for module in (once, quantise):
        monkeypatch.setattr(module, "TOOLS", (other, replace(other, name="gone", package="no_such_package")))
    plan = quantise.Plan("tiny", (), ("gptq-fast",), None, samples=2, seq_len=16, peers=True, work=tmp_path)
    report = quantise.run(plan, lambda line: None)
    assert seen == [(".json", (2, 16), 64)]
    ours, theirs = report["rows"]
    assert (theirs["method"], theirs["bytes_out"], theirs["failed"]) == ("other", 100, "")
    assert ours["times_tool"] == pytest.approx(ours["seconds"] / max(theirs["seconds"], 1e-3), rel=0.5)
    assert report["absent"] == {"gone": "no_such_package is not installed"}
    assert "phases" not in theirs
    for table in quantise_tables.tables(report):
        assert {len(row) for row in table.rows} == {len(table.headings)}, table.title


def test_reading_and_writing(tmp_path: Path) -> None:
    models.write(tmp_path / "model", TINY.cut(1), CPU)
    assert quantise.reading(tmp_path / "model") > 0
    assert quantise.writing(tmp_path / "copy", 3 * 10**6) > 0
    assert not (tmp_path / "copy").exists()


# --- what is worked out ----------------------------------------------------------------------------------------------


def row(
    method: str = "gptq", blocks: int = 32, seconds: float = 40.0, low: bool = False, **more: Any
) -> dict[str, Any]:
    given = {"peak_device_bytes": 20 * 2**30, "reserved_device_bytes": 0, "peak_host_bytes": 0, "process_seconds": 0.0}
    given |= {"bytes_in": 0, "bytes_out": 0}
    return {"method": method, "low_memory": low, "blocks": blocks, "seconds": seconds, "failed": ""} | given | more


def test_from_two_numbers_of_blocks_on() -> None:
    rows = [row(blocks=2, seconds=30.0), row(blocks=4, seconds=46.0), row("rtn", blocks=2, failed="out of memory")]
    quantise.compare(rows, 80)
    assert [r.get("seconds_a_block") for r in rows] == [8.0, 8.0, None]
    assert [r.get("seconds_all") for r in rows] == [None, 14.0 + 80 * 8.0, None]
    assert rows[1]["carried_on"] == [2, 4]


def test_from_one_number_of_blocks_on() -> None:
    rows = [row(blocks=8, seconds=16.0)]
    quantise.compare(rows, 32)
    assert (rows[0]["seconds_a_block"], rows[0]["seconds_all"], rows[0]["carried_on"]) == (2.0, 64.0, [8])
    model = {"name": "llama-2-7b", "blocks": 32, "parameters": 6738415616}
    setting = {"bits": 4, "group": 128, "samples": 128, "seq_len": 2048, "cold": False}
    report = {"model": model, "setting": setting, "rows": rows, "goals": [], "absent": {}, "failed": 0, "missing": 0}
    (table,) = quantise_tables.tables(report)
    assert table.headings[:6] == ("method", "blocks", "s", "process, s", "s a block", "all 32, carried on, s")
    assert table.rows[0][:6] == ("gptq", "8", "16.00", "0.0", "2.000", "64")
    assert "not measured, but worked out from runs on 8 blocks, too long" in "\n".join(quantise_tables.notes(report))


def test_runs_beside_each_other() -> None:
    rows = [row(seconds=40.0), row(seconds=50.0, low=True), row("rtn", seconds=9.0), row("GPTQModel", seconds=200.0)]
    quantise.compare(rows, 32)
    assert (rows[1]["times_default"], rows[0]["times_tool"]) == (1.25, 0.2)
    assert "times_tool" not in rows[2]


def test_goals() -> None:
    rows = [
        row(seconds=61.0, times_tool=0.2), row(low=True, peak_device_bytes=9 * 2**30, times_default=1.2),
        row("rtn", times_copy=1.6), row("gptq-fast", blocks=8, seconds=10.0),
    ]  # fmt: skip
    found = quantise.goals("llama-2-7b", rows)
    assert [(g["what"], g["figure"], g["met"]) for g in found] == [
        ("gptq, 32 blocks", "seconds", False),
        ("gptq, 32 blocks", "peak_device_bytes", True),
        ("gptq, 32 blocks", "times_tool", True),
        ("gptq, low memory, 32 blocks", "peak_device_bytes", True),
        ("gptq, low memory, 32 blocks", "times_default", True),
        ("rtn, 32 blocks", "times_copy", False),
        ("gptq-fast, 8 blocks", "peak_device_bytes", True),  # its seconds are not those of the whole model
    ]
    model = {"name": "llama-2-7b", "blocks": 32}
    table = quantise_tables.tables({"model": model, "rows": [], "goals": found})[-1]
    assert table.rows[1] == ("gptq, 32 blocks: device memory", "at most 24 GiB", "20 GiB", "yes")


def test_blocks_of_a_plan() -> None:
    assert quantise.Plan().counts == (32,)
    assert quantise.Plan("llama-3-70b", (2, 4, 99)).counts == (2, 4, 80)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--model", "gpt-2"), "--model: there is no 'gpt-2' here; there are llama-2-7b"),
        (("--blocks", "2,x"), "--blocks: 'x' is no number"),
        (("--methods", "awq"), "--methods: there is no 'awq' here; there are gptq-fast"),
        (
            ("--model", "tiny", "--seq-len", "513"),
            "--seq-len: 513 tokens a row, tiny's context is 512; use 512 or less",
        ),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: tuple[str, ...], told: str) -> None:
    assert ran(monkeypatch, *words, "--device", "cpu") == 2
    assert capsys.readouterr().err.startswith(f"error: {told}")


def test_the_host_on_a_page() -> None:
    told = record.lines(record.head(None))
    assert " CPU cores, " in told[1]
    assert "multiprocessors" not in told[1]
