"""`compress bench`: its help, what it refuses, what it prints and how it ends. None of it needs a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import cli
from compress.bench import arguments, decode, kernels, record
from compress.cuda import support
from compress.errors import CompressError


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["compress", "bench", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), ("kernels", "decode")),
        (("kernels",), ("--kinds", "--tune", "--no-others", "--shapes")),
        (("decode",), ("--methods", "--batch", "--layers")),
    ],
)
def test_help(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: tuple[str, ...], told: tuple[str, ...]) -> None:
    assert ran(monkeypatch, *words, "--help") == 0
    out = capsys.readouterr().out
    assert all(word in out for word in told)


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['compress', 'bench', 'kernels', '--help']\n"
        "from compress import cli\n"
        "try: cli.main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["kernels", "decode"])
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str) -> None:
    reason = "no NVIDIA driver was found; on a machine with an NVIDIA GPU install NVIDIA driver 580 or newer"
    monkeypatch.setattr(support, "probe", lambda device=None: support.Support(False, reason))
    assert ran(monkeypatch, command) == 2
    assert capsys.readouterr().err == f"error: --device cuda: {reason}\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("kernels", "--kinds", "w9"), "--kinds: there is no 'w9' here; there are w4, w3"),
        (("kernels", "--kinds", ","), "--kinds: nothing is named"),
        (("kernels", "--tokens", "1,x"), "--tokens: 'x' is no number"),
        (("kernels", "--tokens", "0"), "--tokens: '0' is no number"),
        (("kernels", "--shapes", "4096"), "--shapes: '4096' is no shape"),
        (("kernels", "--shapes", "4096x100"), "--shapes: '4096x100' is no shape"),
        (("kernels", "--group", "100"), "--group: no kernel takes groups of 100 columns"),
        (("kernels", "--dtype", "float32"), "--dtype: there is no 'float32' here; there are float16, bfloat16"),
        (("kernels", "--device", "cpu"), "--device: no CUDA device 'cpu'; use cuda or cuda:1"),
        (("decode", "--methods", "gptq"), "--methods: there is no 'gptq' here; there are dense, w4"),
        (("decode", "--layers", "0"), "compress bench decode: Invalid value for '--layers'"),
        ((), "compress bench: Missing command"),
        (("other",), "compress bench: No such command 'other'"),
    ],
)
def test_what_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any, words: tuple[str, ...], told: str) -> None:
    assert ran(monkeypatch, *words) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {told}"), err
    assert err.count("\n") == 1


def test_lists() -> None:
    assert arguments.names("b, a,b", ("a", "b", "c"), "--x") == ("b", "a")
    assert arguments.names("all", ("a", "b"), "--x") == ("a", "b")
    assert arguments.counts("8,1,8", "--x") == (8, 1)
    assert arguments.shapes("4096x11008, 16X128", "--x") == ((4096, 11008), (16, 128))


class Card:
    """A GPU that is not there."""

    name, major, minor, multi_processor_count = "NVIDIA H100 80GB HBM3", 9, 0, 132
    total_memory, L2_cache_size, uuid = 85 * 10**9, 52428800, "no-such"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    found = support.Support(True, "", 0, Card.name, (9, 0), 85 * 10**9, 232448, "13.0", "13.0", "14.2.0", "13.0")
    monkeypatch.setattr(support, "probe", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("failed", [0, 1])
def test_a_run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, failed: int) -> None:
    asked: list[kernels.Plan] = []

    def run(plan: kernels.Plan, told: Any) -> dict[str, Any]:
        asked.append(plan)
        told("working")
        ceilings = {"copy_gbps": 1.0, "reads": [], "tera_per_second": {}}
        setting = {"dtype": "float16", "group": 128, "asymmetric": False}
        rest = {"cases": {}, "rows": [], "absent": {}, "tuned": [], "failed": failed, "missing": 0}
        return record.head(0) | {"setting": setting, "ceilings": ceilings} | rest

    monkeypatch.setattr(kernels, "run", run)
    words = ("kernels", "--kinds", "w4", "--shapes", "4096x4096", "--no-others", "--json", "-o", str(tmp_path / "out"))
    assert ran(monkeypatch, *words) == failed
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert (report["machine"]["device"], report["machine"]["sms"], report["schema"]) == (Card.name, 132, 1)
    assert report["command"].startswith("compress bench kernels --kinds w4")
    assert report["versions"]["torch"] == torch.__version__
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert (tmp_path / "out.md").read_text().startswith("# Kernels\n")
    assert said.err.startswith("working\n")
    assert asked == [kernels.Plan(("w4",), ((4096, 4096),), others=False)]


@pytest.mark.usefixtures("card")
def test_decoding_runs(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[decode.Plan] = []

    def run(plan: decode.Plan, told: Any) -> dict[str, Any]:
        asked.append(plan)
        model = vars(plan.model) | {"parameters": 1}
        setting = {"dtype": "float16", "prompt": 16, "steps": 8}
        return record.head(0) | {"model": model, "setting": setting, "rows": [], "failed": 0, "missing": 1}

    monkeypatch.setattr(decode, "run", run)
    assert ran(monkeypatch, "decode", "--methods", "dense,w4", "--batch", "2", "--layers", "4", "--quiet") == 1
    assert "Greedy decoding" in capsys.readouterr().out
    assert asked == [decode.Plan(("dense", "w4"), (2,), decode.Model(layers=4))]


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda:x", "cuda:-1", "mps", ""):
        with pytest.raises(CompressError, match="--device"):
            record.find_device(name)
    monkeypatch.setattr(support, "probe", lambda device=None: support.Support(True, "", device or 0))
    assert (record.find_device("cuda"), record.find_device("cuda:3")) == (0, 3)
