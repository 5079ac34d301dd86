"""cli.py: options come from the dataclasses, results go to stdout, one line goes to stderr, and a dry run is dry."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress import api, checkpoint, cli, pipeline
from compress.commands import shared
from compress.errors import CompressError
from compress.options import Options
from compress.passes import PASSES, load
from compress.report import screen


class Line:
    """The command line in this process."""

    def __init__(self, folder: Path, toy: Path, text: Path, monkeypatch: Any, capsys: Any) -> None:
        self.folder, self.toy, self.text = folder, toy, text
        self.short = folder.parent / "short.txt"
        self.short.write_text(text.read_text()[:8000])
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: Any, code: int = 0) -> tuple[str, str]:
        self._monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = self._capsys.readouterr()
        assert (stop.value.code or 0) == code, seen
        return seen.out, seen.err


@pytest.fixture
def line(tmp_path: Path, toy: Path, text_file: Path, monkeypatch: Any, capsys: Any) -> Line:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    return Line(folder, toy, text_file, monkeypatch, capsys)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- help


def test_help_lists_every_command(line: Line) -> None:
    out, err = line("--help")
    assert not err
    for name, entry in PASSES.items():
        assert name in out
        assert entry.summary.split(":")[0] in out
    assert "eval" in out
    assert "demo" in out


def test_no_arguments_give_help(line: Line) -> None:
    out, err = line(code=2)
    assert "Usage: compress" in out + err
    assert "gptq" in out + err


def test_version(line: Line) -> None:
    assert line("--version") == (compress.__version__ + "\n", "")


@pytest.mark.parametrize("name", PASSES)
def test_every_setting_is_an_option(line: Line, name: str) -> None:
    out, _ = line(name, "--help")
    for field in (*dataclasses.fields(load(name)), *dataclasses.fields(Options)):
        flags = field.metadata.get("flags") or ["--" + field.name.replace("_", "-")]
        assert all(flag in out for flag in flags), field.name
        assert str(field.metadata["help"]).split()[0] in out, f"{field.name} has no help"
    for flag in ("--dry-run", "--json", "--quiet"):
        assert flag in out


def test_options_reach_the_job(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def stop(model: str, method: Any, options: Options, **rest: Any) -> Any:
        seen.extend((model, method, options))
        raise CompressError("enough")

    monkeypatch.setattr(api, "make_job", stop)
    args = ["--bits", 3, "--group-size", 64, "--asymmetric", "--act-order", "none", "--no-refit", "--descent", 0]
    more = [
        "-o",
        "OUT",
        "--include",
        "a*",
        "--include",
        "b*",
        "--exclude",
        "c",
        "--seq-len",
        32,
        "--fresh",
        "--no-eval",
    ]
    line("gptq", "MODEL", *args, *more, code=2)
    model, method, options = seen
    assert model == "MODEL"
    assert method == load("gptq")(  # type: ignore[call-arg]
        bits=3, group_size=64, symmetric=False, act_order="none", refit=False, descent=0
    )
    assert options == Options(
        out=Path("OUT"), include=("a*", "b*"), exclude=("c",), seq_len=32, fresh=True, no_eval=True
    )


# --- a dry run


@pytest.mark.parametrize("kind", ["safetensors", "pickle"])
@pytest.mark.parametrize("method", PASSES)
def test_dry_run_reads_no_weight_and_writes_nothing(
    line: Line, monkeypatch: pytest.MonkeyPatch, method: str, kind: str
) -> None:
    model = line.folder / "model"
    shutil.copytree(line.toy, model)
    if kind == "pickle":
        torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
        (model / "model.safetensors").unlink()
    before = everything(line.folder)

    def read(*args: Any) -> Any:
        raise AssertionError("a weight was read")

    for owner, name in ((checkpoint, "read_tensor"), (checkpoint, "hash_parts"), (pipeline, "compress_checkpoint")):
        monkeypatch.setattr(owner, name, read)
    out, err = line(method, model, "--dry-run", "--json", "--allow-pickle")
    plan = json.loads(out)
    assert not err
    assert plan["layers"] == 28
    assert plan["blocks"] == 4
    assert 0 < plan["bytes_after"] < plan["bytes_before"]
    assert everything(line.folder) == before
    assert {p.name for p in line.folder.iterdir()} == {"model"}
    table, _ = line(method, model, "--dry-run", "--allow-pickle")
    assert "nothing was written" in table
    assert "28 matrices in 4 blocks" in table


def test_dry_run_needs_neither_tokenizer_nor_text(line: Line) -> None:
    model = line.folder / "model"
    shutil.copytree(line.toy, model, ignore=shutil.ignore_patterns("tokenizer*"))
    line("gptq", model, "--dry-run", "--calib", "nowhere.txt", "--eval", "nowhere.txt")


def test_dry_run_promises_what_a_run_keeps(line: Line) -> None:
    plan = json.loads(line("rtn", line.toy, "--dry-run", "--json")[0])
    line("rtn", line.toy, "-o", "out", "--no-eval", "--device", "cpu")
    written = load_file(line.folder / "out" / "model.safetensors")
    assert sum(t.numel() * t.element_size() for t in written.values()) == plan["bytes_after"]


@pytest.mark.parametrize(
    "args",
    [["--bits", "9"], ["--group-size", "24"], ["--include", "nope"], ["--format", "nope"], ["--device", "nope"]],
    ids=" ".join,
)
def test_dry_run_refuses_what_a_run_would(line: Line, args: list[str]) -> None:
    for more in (["--dry-run"], ["--no-eval", "-o", "out", "--calib", str(line.text), "--seq-len", "64"]):
        _, err = line("gptq", line.toy, *args, *more, code=2)
        assert err.startswith("error: ")
        assert args[1] in err
    assert not (line.folder / "out").exists()


def test_unused_blocks_are_counted(line: Line) -> None:
    """A config with fewer blocks than the files: the others are named, not lost without a word."""
    model = line.folder / "model"
    shutil.copytree(line.toy, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    plan = json.loads(line("rtn", model, "--dry-run", "--json")[0])
    assert plan["layers"] == 21
    unused = [s for s in plan["skipped"] if s["reason"] == "the model has no such parameter"]
    assert len(unused) == 7
    assert all(".layers.3." in s["name"] for s in unused)


# --- a run


def test_json_is_all_there_is_on_stdout(line: Line) -> None:
    args = ["--calib", line.text, "--eval", line.short, "--samples", 32, "--seq-len", 64, "--device", "cpu"]
    out, err = line("gptq", line.toy, "-o", "out", *args, "--json")
    assert not err
    result = json.loads(out)
    assert result["out"] == "out"
    assert len(result["layers"]) == 28
    assert result["evaluation"]["compressed"]["perplexity"] > 1
    out, err = line("eval", "out", "--text", line.short, "--against", line.toy, "--device", "cpu", "--json")
    assert not err
    again = json.loads(out)["models"][0]["texts"][0]
    told = result["evaluation"]["compressed"]
    assert again["perplexity"]["value"] == pytest.approx(told["perplexity"], rel=1e-6)
    assert again["kl"]["mean"]["value"] == pytest.approx(told["kl"], rel=1e-4)
    assert again["kl"]["p99"] == pytest.approx(told["kl_p99"], rel=1e-3)


def test_tables(line: Line) -> None:
    out, err = line("rtn", line.toy, "-o", "out", "--eval", line.short, "--device", "cpu")
    assert not err, "the progress line is for terminals alone"
    for part in ("bits per weight", "perplexity", "verified: 28 layers", "next: compress eval out"):
        assert part in out
    out, _ = line("eval", "out", "--text", line.short, "--device", "cpu")
    assert "perplexity" in out


def test_default_output_name(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    model = line.folder / "my-model"
    shutil.copytree(line.toy, model)
    line("rtn", model, "--bits", 3, "--no-eval", "--device", "cpu")
    assert (line.folder / "my-model-rtn-3bit" / "config.json").exists()
    monkeypatch.chdir(model)  # a folder without a name of its own
    job = api.make_job(".", load("rtn")(), Options(no_eval=True))
    assert job.out == Path("my-model-rtn-4bit")


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not shared.hidden(quiet=False, as_json=False)
    assert shared.hidden(quiet=True, as_json=False)
    assert shared.hidden(quiet=False, as_json=True)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert shared.hidden(quiet=False, as_json=False)


def test_demo_refuses_unknown_models(line: Line) -> None:
    _, err = line("demo", "--model", "gpt5", code=2)
    assert err == "error: --model: no demo model 'gpt5'; use bundled or smollm2\n"


def test_a_message_of_many_lines_takes_one(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise CompressError("first\nsecond", "here", "do\nthis")

    monkeypatch.setattr(screen, "dry_run", fails)
    assert line("rtn", line.toy, "--dry-run", code=2) == ("", "error: here: first second; do this\n")


def test_out_of_device_memory(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    monkeypatch.setattr(pipeline, "compress_checkpoint", fails)
    _, err = line("rtn", line.toy, "-o", "out", "--no-eval", "--device", "cpu", code=2)
    assert err.startswith("error: --device cpu: out of memory (CUDA out of memory); finished blocks are kept")
    assert err.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError(2, "No such file", "ours")

    monkeypatch.setattr(screen, "dry_run", fails)
    monkeypatch.setattr(sys, "argv", ["compress", "rtn", str(line.toy), "--dry-run"])
    with pytest.raises(FileNotFoundError):
        cli.main()


def test_as_a_process(line: Line) -> None:
    """The installed command: exit code, one line on stderr, nothing on stdout."""
    command = [sys.executable, "-c", "from compress.cli import main; main()", "rtn", "./nope", "--no-eval"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr == "error: ./nope: no such folder; pass a model folder or a hub id such as org/name\n"


# --- recipes


RECIPE = """
name: mixed
steps:
  - keep: {blocks: 0}
  - sparsegpt: {pattern: 2:4, blocks: 1}
  - gptq: {bits: 8, layers: "*.down_proj", group_size: 32}
  - rtn: {bits: 4, group_size: 32}
options: {samples: 4, seq-len: 32, no-eval: true}
"""


def test_show_prints_what_a_recipe_would_do(line: Line) -> None:
    file = line.folder / "mixed.yaml"
    file.write_text(RECIPE)
    before = everything(line.folder)
    out, err = line("run", file, line.toy, "--show", "--device", "cpu")
    assert not err
    plain = " ".join(out.split())
    for step in ("keep: blocks=0 (0 layers)", "pattern=2:4", "(7 layers)", "layers=['*.down_proj'] (3", "(18 layers)"):
        assert step in plain.replace("│ ", "").replace(" │", ""), (step, out)
    assert everything(line.folder) == before
    plan = json.loads(line("run", file, line.toy, "--show", "--json", "--device", "cpu")[0])
    assert [s["layers"] for s in plan["steps"]] == [0, 7, 3, 18]
    assert plan["format"] == "native"


def test_a_recipe_runs(line: Line) -> None:
    file = line.folder / "mixed.yaml"
    file.write_text(RECIPE)
    out, _ = line("run", file, line.toy, "--calib", line.text, "--device", "cpu", "--json", "-o", "OUT")
    report = json.loads(out)
    assert {r["method"] for r in report["layers"]} == {"sparsegpt+gptq", "sparsegpt+rtn", "gptq", "rtn"}
    assert report["calibration"]["samples"] == 4
    assert [s["name"] for s in report["method"]["steps"]] == ["keep", "sparsegpt", "gptq", "rtn"]
    assert "model.layers.0.mlp.up_proj.weight" in load_checkpoint(line.folder / "OUT")
    card = (line.folder / "OUT" / "README.md").read_text()
    assert "sparsegpt: " in card
    assert "2:4" in card


def load_checkpoint(folder: Path) -> dict[str, Any]:
    return dict(checkpoint.Checkpoint.open(folder).tensors)
