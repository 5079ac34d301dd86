"""compress doctor: what it shows is what is there, and it always ends well."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from typing import Any

import pytest
import torch

import compress
from compress import cli, doctor
from compress.cuda import support
from compress.cuda.support import Support

H100 = Support(True, "", 0, "NVIDIA H100", (9, 0), 80 * 10**9, 232448, "13.0", "13.0", "14.2.0", "13.0")


def said(monkeypatch: pytest.MonkeyPatch, capsys: Any, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["compress", "doctor", *args])
    monkeypatch.setenv("COLUMNS", "150")
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert (stop.value.code or 0) == 0
    seen = capsys.readouterr()
    assert not seen.err
    return str(seen.out)


def test_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    out = said(monkeypatch, capsys)
    for word in (compress.__version__, platform.python_version(), torch.__version__, "GPU kernels", "CPU kernels"):
        assert word in out
    assert "pip install 'lm-eval'" in out or "lm-eval" in out
    found = json.loads(said(monkeypatch, capsys, "--json"))
    assert found["torch"] == torch.__version__
    assert found["gpu_kernels"]["used"] == (not found["gpu_kernels"]["why_not"])
    assert found["cpu"]["capability"] == torch.backends.cpu.get_cpu_capability()
    assert {p["name"] for p in found["packages"]} == set(doctor.OPTIONAL)
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert all(c["free"] > 0 for c in found["caches"])


@pytest.mark.parametrize("usable", [True, False])
def test_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch, capsys: Any, usable: bool) -> None:
    why_not = "CuPy is not installed; pip install 'compress-llm[cuda13]'"
    other = dataclasses.replace(H100, usable=False, reason="too old", device=1, name="Tesla T4", capability=(7, 5))
    first = H100 if usable else dataclasses.replace(H100, usable=False, reason=why_not, cupy="", nvrtc="")
    monkeypatch.setattr(support, "cuda_devices", lambda: 2)
    monkeypatch.setattr(support, "probe", lambda device=0: (first, other)[device])
    monkeypatch.setattr(support, "driver_cuda", lambda: "13.0")
    monkeypatch.setattr(support, "driver_name", lambda: "580.159.04")
    out = said(monkeypatch, capsys)
    assert "580.159.04, runs CUDA 13.0" in out
    assert "NVIDIA H100, 9.0, 80.0 GB" in out
    assert "Tesla T4, 7.5" in out
    assert ("GPU 1: too old" in out) == usable
    assert (why_not in out) == (not usable)
    found = json.loads(said(monkeypatch, capsys, "--json"))
    assert [g["capability"] for g in found["gpus"]] == ["9.0", "7.5"]
    assert found["gpu_kernels"]["used"] == usable


def test_kernels_switched_off(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "0")
    found = json.loads(said(monkeypatch, capsys, "--json"))
    assert "COMPRESS_KERNELS=0" in found["gpu_kernels"]["why_not"]
    assert found["cpu"]["why_not"] == "COMPRESS_KERNELS=0"


def test_absent_packages(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    out = said(monkeypatch, capsys)
    assert "absent; pip install 'compress-llm[data]'" in out


def test_a_cache_that_is_not_there_yet(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "a" / "b"))
    cache = next(c for c in doctor.examine()["caches"] if c["what"] == "compiled kernels")
    assert cache["folder"] == str(tmp_path / "a" / "b")
    assert cache["free"] > 0
