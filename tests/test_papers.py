"""reports/papers: every sweep can be read and made into recipes, and one runs through on the bundled model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compress.errors import CompressError
from compress.recipe import make_recipe, read_yaml

FOLDER = Path(__file__).resolve().parent.parent / "reports" / "papers"
FILES = sorted(FOLDER.glob("*.yaml"))
by_name = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)


@pytest.fixture(scope="module")
def script() -> Any:
    """run.py as a module of its own name: reports/methods has a run.py, too."""
    spec = importlib.util.spec_from_file_location("papers_run", FOLDER / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_there_are_sweeps() -> None:
    assert {p.stem for p in FILES} >= {"gptq-opt", "gptq-bloom", "sparsegpt-opt", "llmint8-c4", "spqr-llama"}


@by_name
def test_schema(path: Path, script: Any) -> None:
    sweep = script.read_sweep(path)  # raises what is wrong
    assert isinstance(sweep.paper["year"], int)
    assert all(model.count("/") == 1 for model in sweep.models)
    assert set(sweep.texts) | {sweep.calibration["text"]} <= {"wikitext2", "c4", "ptb", "pile"}
    assert sum(not row.steps for row in sweep.rows) == 1, "one dense row"
    assert len({row.key for row in sweep.rows}) == len(sweep.rows), "two rows are the same run"
    assert all(len(str(text)) > 20 for text in sweep.sources.values())


@by_name
def test_steps_make_recipes(path: Path) -> None:
    for row in read_yaml(path.read_text())["rows"]:
        if row["steps"]:
            recipe = make_recipe({"steps": row["steps"], "options": row.get("options", {})}, row["name"], path.name)
            assert len(recipe.steps) == len(row["steps"])


@by_name
def test_figures(path: Path, script: Any) -> None:
    sweep = script.read_sweep(path)
    dense = next(row for row in sweep.rows if not row.steps)
    for row in sweep.rows:
        for (model, text), figure in row.paper.items():
            assert figure is None or figure > 0
            base = dense.paper[model, text]
            assert base is not None
            if figure is not None:  # no method of these tables beats the model by more than noise
                assert figure > 0.99 * base


def test_anchors(script: Any) -> None:
    """The figures of the GPTQ code's README, which were read first hand."""
    rows = script.read_sweep(FOLDER / "gptq-llama.yaml").rows
    found = [row.paper["huggyllama/llama-7b", "wikitext2"] for row in rows]
    assert found == [5.68, 6.29, 6.09, 25.54, 8.07, 6.61]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("group_size=-1", "group_sizes=-1", "no setting 'group_sizes'"),
        ("37.28", "-37.28", "is no figure"),
        ("37.28", "'?'", "is no figure"),
        ("table:", "tables:", "has not the keys"),
        ("source: copy", "source: hearsay", "says not where"),
        ("RTN 3 bits", "RTN 4 bits", "two rows of one name"),
        ("      facebook/opt-350m: 24.24\n", "", "not for the models"),
    ],
)
def test_slips_are_found(old: str, new: str, said: str, script: Any, tmp_path: Path) -> None:
    text = (FOLDER / "gptq-opt.yaml").read_text()
    assert old in text
    (tmp_path / "bad.yaml").write_text(text.replace(old, new))
    with pytest.raises(CompressError, match=said):
        script.read_sweep(tmp_path / "bad.yaml")


def test_stand_in(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Compressed, scored, written down; a second call has nothing left to do; other settings are refused."""
    args = [str(FOLDER / "gptq-opt.yaml"), "--stand-in", "bundled", "--only", "RTN 4 bits", "--device", "cpu"]
    small = ["--out", str(tmp_path), "--tokens", "512"]
    assert script.main([*args, *small]) == 0
    first = capsys.readouterr()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert len(rows) == 2
    dense, rtn = rows.values()
    assert 1 < dense["perplexity"]["bundled"] < rtn["perplexity"]["bundled"] < 100
    assert 4 < rtn["bits"] < 4.5
    assert f"| RTN 4 bits | {rtn['perplexity']['bundled']:.2f} |" in first.out
    assert first.out == (tmp_path / "table.md").read_text()
    assert "37.28" not in first.out, "a stand-in's figure stands beside no paper's"
    assert script.main([*args, *small]) == 0
    assert capsys.readouterr().err == ""
    assert script.main([*args, *small[:2], "--tokens", "640"]) == 2
    assert "other settings" in capsys.readouterr().err


def test_side_by_side(script: Any, tmp_path: Path) -> None:
    """The table from made-up results: figure, mark, difference, failure."""
    arguments = [str(FOLDER / "squeezellm-llama.yaml"), "--out", str(tmp_path), "--device", "cpu"]
    run = script.make_run(script.parse(arguments))
    model = run.models[0]
    said = {"windows": {"wikitext2": "", "c4": ""}, "protocol": {"wikitext2": "", "c4": ""}}
    for row in run.rows:
        run.results[f"{model} | {row.key}"] = {"perplexity": {"wikitext2": 6.32, "c4": 7.75}, "bits": 3.02, **said}
    run.results[f"{model} | {run.rows[-1].key}"] = {"error": "RuntimeError: out of memory"}
    table = "\n".join(script.report(run))
    assert "| 16 bits | 5.68 / 6.32 (+11.3%) |" in table
    assert "| SqueezeLLM 3 bits | 6.32? / 6.32 (+0.0%) | 3.02 |" in table
    assert "| SqueezeLLM 3 bits | 7.75 / 7.75 (+0.0%) | 3.02 |" in table
    assert "| SqueezeLLM 4 bits | 5.79? / failed |" in table
    assert "out of memory" in table


def test_errors_are_one_line(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No hub (the tests run offline), no such model, no such file: exit code 2 and a line."""
    file = str(FOLDER / "gptq-opt.yaml")
    for args in ([file, "--models", "opt-125m"], [file, "--models", "gpt-5"], [str(tmp_path / "none.yaml")]):
        assert script.main([*args, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
