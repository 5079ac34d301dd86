"""A sweep makes every setting once, goes on where it stopped, and chooses what a search through all would."""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import cli, pipeline, stats
from compress.errors import CompressError
from compress.options import Options
from compress.report import html
from compress.report import sweep as report
from compress.report.html.evaluations import swept
from compress.sizes import parse_size
from compress.stats import Shared
from compress.sweep.front import Point, Wish, choose, front
from compress.sweep.run import Sweep, run
from compress.sweep.settings import settings

# --- which to take


def points(seed: int, count: int) -> list[Point]:
    random.seed(seed)
    return [
        Point(str(i), random.randint(1, 9), random.choice([2.0, 3.0, 4.0]), random.randint(1, 9) / 10, 9.0)
        for i in range(count)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_front_and_the_choice_are_those_of_a_search(seed: int) -> None:
    found = points(seed, 12)
    beaten = {
        a.name
        for a, b in itertools.product(found, found)
        if b.bytes <= a.bytes and b.kl <= a.kl and (b.bytes, b.kl) != (a.bytes, a.kl)
    }
    best = front(found)
    assert {(p.bytes, p.kl) for p in best} == {(p.bytes, p.kl) for p in found if p.name not in beaten}
    assert sorted(best, key=lambda p: p.bytes) == best
    for wish in (Wish(max_bytes=5), Wish(avg_bits=3.0), Wish(max_bytes=6, max_kl=0.5), Wish(max_kl=0.4)):
        chosen, fit = choose(found, wish), [p for p in found if wish.holds(p)]
        if not fit:
            assert chosen is None
        elif wish == Wish(max_kl=0.4):
            assert chosen is not None
            assert chosen.bytes == min(p.bytes for p in fit)
        else:
            assert chosen is not None
            assert chosen.kl == min(p.kl for p in fit)


def test_what_is_no_number_is_not_taken() -> None:
    broken = Point("a", 1, 2.0, float("nan"), 9.0)
    assert front([broken]) == []
    assert choose([broken, replace(broken, kl=float("inf"))], Wish(avg_bits=3.0)) is None


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("700 MiB", 700 << 20), ("12", 12), ("3kb", 3000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--max-size") == size


@pytest.mark.parametrize("text", ["", "GiB", "2XB", "-1GB", "1.2.3MB", "1 I"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(CompressError, match="is no size"):
        parse_size(text, "--max-size")


# --- what is tried


def test_every_combination_that_there_is(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("steps: [{rtn: {bits: 8}}]")
    found = settings(["rtn", "nf4", "awq"], [4, 3, 4], [32, -1], [tmp_path / "mine.yaml"])
    assert [s.name for s in found] == [
        "rtn-4bit-g32", "rtn-4bit-grow", "rtn-3bit-g32", "rtn-3bit-grow", "nf4",
        "awq-4bit-g32", "awq-4bit-grow", "awq-3bit-g32", "awq-3bit-grow", "mine",
    ]  # fmt: skip
    assert found[0].recipe.passes == [compress.RTN(bits=4, group_size=32)]
    assert found[7].recipe.passes[0].storage.bits == 3
    options = Options(calib="bundled", include=("a", "b c"), lm_head=True)
    assert found[0].command("m", "o", options) == (
        "compress rtn m --bits 4 --group-size 32 --calib bundled --include a --include 'b c' --lm-head -o o"
    )
    assert found[-1].command("m", "o", Options()).startswith("compress run ")


@pytest.mark.parametrize(
    ("methods", "bits", "says"),
    [(["nope"], [4], "no method 'nope'"), ([], [4], "no setting to try"), (["rtn"], [99], "bits")],
)
def test_what_cannot_be_tried_at_all(methods: list[str], bits: list[int], says: str) -> None:
    with pytest.raises(CompressError, match=says):
        settings(methods, bits, [32])


# --- the whole


@pytest.fixture
def sweep(toy: Path, text_file: Path, tmp_path: Path) -> Sweep:
    text = tmp_path / "short.txt"
    text.write_text(text_file.read_text()[:4000])
    options = Options(calib=str(text_file), eval=str(text), samples=6, seq_len=48, device="cpu")
    return Sweep(str(toy), tuple(settings(["rtn", "gptq"], [3, 4], [32])), tmp_path / "sweep", options)


def test_a_sweep_goes_on_where_it_stopped(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in its third run: that one is made anew, those before it are not, and the first block is seen once."""
    made: list[str] = []
    collected: list[int] = []
    whole, collect = pipeline.compress_checkpoint, stats.collect

    def counting(job: Any, progress: Any) -> Any:
        made.append(job.out.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(job, progress)

    def watched(model: Any, block: int, *rest: Any) -> Any:
        collected.append(block)
        return collect(model, block, *rest)

    monkeypatch.setattr(pipeline, "compress_checkpoint", counting)
    monkeypatch.setattr(stats, "collect", watched)
    with pytest.raises(KeyboardInterrupt):
        run(sweep, lambda line: None)
    found = run(sweep, lambda line: None)
    names = [s.name for s in sweep.settings]
    assert made == [*names[:3], names[2], names[3]]
    assert collected.count(0) == 1
    assert collected.count(1) == 2
    assert [s["name"] for s in found["settings"]] == names
    assert all(s["texts"][0]["kl"]["mean"]["value"] > 0 for s in found["settings"])
    by = {s["name"]: s for s in found["settings"]}
    assert (
        by["gptq-3bit-g32"]["texts"][0]["kl"]["mean"]["value"] < by["rtn-3bit-g32"]["texts"][0]["kl"]["mean"]["value"]
    )
    alone = sweep.out.with_name("alone")
    settled = {k: v for k, v in vars(sweep.options).items() if k != "out"} | {"no_eval": True}
    compress.run(sweep.model, compress.GPTQ(bits=4, group_size=32), alone, **settled)
    a, b = (compress.checkpoint.Checkpoint.open(f) for f in (alone, sweep.out / "gptq-4bit-g32"))
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.tensors)
    assert swept(sweep.out) == [sweep.out / name for name in names]
    pages = {m.name: m.scores for m in html.gather(swept(sweep.out), [sweep.out / "sweep.json"]).models}
    for name, (score,) in pages.items():
        assert score.measured == "sweep.json"
        assert score.kl is not None
        assert score.original is not None
        assert score.kl.value == by[name]["texts"][0]["kl"]["mean"]["value"]
        assert score.original.value == found["base"]["texts"][0]["perplexity"]["value"]
    before = len(made)
    again = run(replace(sweep, wish=Wish(max_bytes=by["rtn-3bit-g32"]["bytes"])), lambda line: None)
    assert len(made) == before
    assert again["choice"] == "gptq-3bit-g32"
    assert json.loads((sweep.out / "sweep.json").read_text())["choice"] == "gptq-3bit-g32"
    for path in report.write(sweep.out / "told", again):
        assert "gptq-3bit-g32" in path.read_text()
    with pytest.raises(CompressError, match=r"earlier sweep differs in options\.samples"):
        run(replace(sweep, options=replace(sweep.options, samples=7)), lambda line: None)
    other = replace(sweep, settings=tuple(replace(sweep.settings[0], name=s.name) for s in sweep.settings[1:2]))
    with pytest.raises(CompressError, match="was made by other settings"):
        run(other, lambda line: None)
    anew = run(replace(other, options=replace(sweep.options, fresh=True)), lambda line: None)
    assert [s["refused"] for s in anew["settings"]] == [""]
    assert {p.name for p in sweep.out.iterdir() if p.is_dir()} == {names[1]}


def test_measured_and_discarded(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What cannot be is told and left out; a checkpoint is gone when it is measured."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    told: list[str] = []
    odd = (*settings(["rtn"], [4], [32]), *settings(["rtn"], [4], [4096]))
    found = run(replace(sweep, settings=odd, discard=True, wish=Wish(max_kl=1e-9)), told.append)
    assert [bool(s["refused"]) for s in found["settings"]] == [False, True]
    assert any("rtn-4bit-g4096 is left out" in line for line in told)
    assert not (sweep.out / "rtn-4bit-g32").exists()
    assert found["choice"] is None
    with pytest.raises(CompressError, match="the sweep kept none of 2 checkpoints"):
        swept(sweep.out)
    assert "none of 1 keeps to KL at most 1e-09" in report.notes(found)
    with pytest.raises(CompressError, match="none of 1 settings can be tried"):
        run(replace(sweep, settings=odd[1:], out=tmp_path / "other"), told.append)


def test_a_folder_of_something_else_is_left_alone(sweep: Sweep) -> None:
    sweep.out.mkdir()
    (sweep.out / "precious").write_text("x")
    with pytest.raises(CompressError, match="is not the folder of a sweep"):
        run(replace(sweep, options=replace(sweep.options, fresh=True)), lambda line: None)
    assert (sweep.out / "precious").exists()


def test_on_the_command_line(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*args: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0)

    given = (
        "sweep",
        sweep.model,
        "--methods",
        "rtn",
        "--bits",
        "3,4",
        "--group-size",
        32,
        "--eval",
        sweep.options.eval,
    )
    assert line(*given, "--avg-bits", 4.2, "-o", sweep.out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["choice"] == "rtn-3bit-g32"
    assert line(*given, "--max-size", "1kB", "-o", sweep.out) == 0
    assert "none of 2 keeps to" in " ".join(capsys.readouterr().out.split())
    assert line(*given, "--bits", "x", "-o", sweep.out) == 2
    assert "is no list of numbers" in capsys.readouterr().err


def test_what_is_shared_is_found_once() -> None:
    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

    shared, calls = Shared(), []
    made: Callable[[Any], Any] = lambda: calls.append(1) or [stats.Inputs([mine[1], mine[0]], "s")]  # type: ignore  # noqa: E731
    for _ in range(2):
        mine: Any = [Named("a"), Named("b")]
        (found,) = shared.get(compress.types.Needs(hessian=True), mine, made)
        assert found.linears == [mine[1], mine[0]]
    assert len(calls) == 1
    shared.get(compress.types.Needs(), mine, made)
    assert len(calls) == 2
