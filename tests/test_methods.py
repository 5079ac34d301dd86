"""Every method as a person types it, on the bundled model: compressed, written, read back, scored."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from compress import cli
from compress.assets import folder
from compress.checkpoint import Checkpoint
from compress.formats import FORMATS, holders, of_config
from compress.passes import PASSES, known, load
from compress.recipe import Recipe
from compress.types import Storage, Transform
from compress.weights import Weights

COMMANDS = {
    # RTN
    "rtn --bits 3 --asymmetric --scale-search": "compressed-tensors",
    "rtn --bits 8 --group-size 0": "compressed-tensors",
    "rtn --bits 4 --group-size -1 --format gptq": "gptq",
    # 8-bit products
    "absmax": "compressed-tensors",
    "absmax --weights tensor --zeropoint": "compressed-tensors",
    "absmax --activations token": "compressed-tensors",
    "absmax --weights tensor --activations tensor": "native",
    "absmax --activations token --zeropoint": "native",
    "int8 --threshold 3": "native",
    "int8 --threshold 3 --zeropoint --weights tensor --rule paper": "native",
    # GPTQ
    "gptq --bits 2 --asymmetric --group-size 32": "compressed-tensors",
    # SparseGPT
    "sparsegpt": "native",
    "sparsegpt --pattern 2:4 --method wanda": "native",
    "sparsegpt --pattern 4:8 --method magnitude --blocks 1-2": "native",
    "sparsegpt --pattern 2:4 --bits 4 --group-size 64 --blocks 1-2": "native",
    "sparsegpt --sparsity 0.3 --bits 3 --group-size 64 --blocks 1": "native",
    # SpQR
    "spqr": "native",
    "spqr --bits 3 --group-size 32 --average-bits 3.6": "native",
    # data types and code books
    "nf4": "bitsandbytes",
    "nf4 --double-quant": "bitsandbytes",
    "nf4 --format native": "native",
    "fp4": "native",
    "fp4 --variant e3m0": "native",
    "fp4 --variant e1m2": "native",
    "fp4 --variant bnb": "bitsandbytes",
    "kmeans --bits 3": "native",
    "kmeans --bits 2 --group-size 64 --no-weighted": "native",
    # transforms
    "equalize": "compressed-tensors",
    "smoothquant": "compressed-tensors",
    "awq --bits 3": "compressed-tensors",
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One window of the held-out text."""
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text((folder("calib") / "text" / "heldout.txt").read_text()[:3000])
    return path


def call(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: Any) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    seen = capsys.readouterr()
    assert (stop.value.code or 0) == 0, seen.err
    found: dict[str, Any] = json.loads(seen.out)
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_command(
    command: str, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = command.split()
    run = ["--calib", "bundled", "--samples", 4, "--seq-len", 128, "--eval", short, "--device", "cpu", "--json"]
    report = call(monkeypatch, capsys, name, "bundled", *options, *run, "-o", tmp_path / "out")
    assert report["format"] == COMMANDS[command]
    score = report["evaluation"]
    limit = 12.0 if "sparsegpt" in command or "--bits 2" in command or "e3m0" in command else 1.6
    assert score["compressed"]["perplexity"] < limit * score["original"]["perplexity"]
    assert 0 < score["compressed"]["kl"] < 3
    layers = report["layers"]
    assert report["verified"]["layers"] == len(layers)
    stored = sum(r["bytes"] for r in layers)
    shapes = sum(r["shape"][0] * r["shape"][1] for r in layers)
    assert report["size"]["bits_per_weight"] == pytest.approx(8 * stored / shapes)
    assert report["size"]["bits_per_weight"] < 16
    weights = Weights(Checkpoint.open(tmp_path / "out"))
    declared = of_config(weights.checkpoint.config)
    assert declared is not None
    assert declared[0].name == report["format"]
    files = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert files == pytest.approx(report["size"]["bytes_after"], rel=0.02, abs=20_000)
    card = (tmp_path / "out" / "README.md").read_text()
    assert name in card


def test_obq_on_a_layer(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cubic in the columns for every row: a small layer of the toy model."""
    run = ["--calib", text_file, "--samples", 8, "--seq-len", 64, "--no-eval", "--device", "cpu", "--json"]
    options = ["--bits", 3, "--group-size", 32, "--include", "*.0.self_attn.k_proj", "--reference", "obq"]
    report = call(monkeypatch, capsys, "gptq", toy, *options, *run, "-o", tmp_path / "out")
    assert [r["name"] for r in report["layers"]] == ["model.layers.0.self_attn.k_proj"]
    assert 0 < report["layers"][0]["relative_error"] < 0.2


def test_every_method_is_a_command_above() -> None:
    assert {c.split()[0] for c in COMMANDS} == set(PASSES)


@pytest.mark.parametrize("name", PASSES)
def test_defaults_are_held_somewhere(name: str) -> None:
    recipe = Recipe.of(load(name)())
    for method in recipe.passes:
        assert holders(method.storage)
    assert load(name).paper or name == "rtn"
    assert isinstance(load(name)(), Transform) == (len(recipe.steps) == 2)


def test_methods_lists_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = call(monkeypatch, capsys, "methods", "--json")
    assert [m["name"] for m in found] == list(known())
    by_name = {m["name"]: m for m in found}  # type: ignore[index]
    assert "compressed-tensors" in by_name["gptq"]["formats"]
    assert by_name["spqr"]["formats"] == ["native"]
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["compress", "methods"])
    with pytest.raises(SystemExit):
        cli.main()
    table = capsys.readouterr().out
    assert all(name in table for name in known())


def test_storage_through_json() -> None:
    inner = Storage("uniform", 4, 64)
    storage = Storage("sparse", 4, 64, details=(("m", 4), ("n", 2)), inner=inner)
    plain = json.loads(json.dumps(storage.as_json()))
    assert Storage.from_json(plain) == storage
    assert Storage.from_json(json.loads(json.dumps(inner.as_json()))) == inner
    assert FORMATS["native"].name == "native"


def test_another_package_adds_a_method(monkeypatch: pytest.MonkeyPatch, toy: Path, tmp_path: Path) -> None:
    """Through the entry-point group: listed, loaded, never in place of ours."""
    from importlib import metadata

    points = [
        metadata.EntryPoint("half", "compress.passes.rtn:RTN", "compress.passes"),
        metadata.EntryPoint("gptq", "compress.passes.rtn:RTN", "compress.passes"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "compress.passes" else [])
    known.cache_clear()
    try:
        assert "half" in known()
        assert load("half") is load("rtn")
        assert load("gptq") is not load("rtn")
    finally:
        known.cache_clear()


def test_notes_of_many_blocks_are_one_line() -> None:
    from compress.report import merged

    lines = [f"awq: model.layers.{i}.self_attn.o_proj: not rescaled: no norm feeds it" for i in range(80)]
    assert merged([*lines, "awq: model.layers.3.mlp.up_proj: odd", "plain"]) == [
        "awq: model.layers.*.self_attn.o_proj: not rescaled: no norm feeds it (80 blocks)",
        "awq: model.layers.3.mlp.up_proj: odd",
        "plain",
    ]
