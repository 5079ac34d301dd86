"""support.py: every way in which a machine can lack something has its own line, with what to do."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.cuda import support
from compress.cuda.support import probe, why_not_once


def test_this_machine_as_it_is() -> None:
    found = probe()
    assert found.usable == (not found.reason)
    assert "\n" not in found.reason


def test_usable(machine: Any) -> None:
    found = probe(1)
    assert found == support.Support(
        True, "", 1, "NVIDIA H100", (9, 0), 80 * 10**9, 232448, "13.0", "13.0", "14.2.0", "13.0"
    )
    assert probe(1) is found
    machine.current = 1
    assert probe() is found


def no_cupy(machine: Any) -> None:
    modules: dict[str, Any] = sys.modules
    modules["cupy"] = None


def two_cupys(machine: Any) -> None:
    machine.cupy_cuda = 12080


def no_nvrtc(machine: Any) -> None:
    machine.nvrtc = RuntimeError("libnvrtc.so.13")


def no_device(machine: Any) -> None:
    machine.count = 0


def no_driver(machine: Any) -> None:
    machine.count = machine.driver = 0


def old_driver(machine: Any) -> None:
    machine.count, machine.driver = 0, 12080


def old_device(machine: Any) -> None:
    machine.capability = (7, 5)


def no_headers(machine: Any) -> None:
    machine.headers = None


def strange(machine: Any) -> None:
    machine.nvrtc = KeyError("what\nis this")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (no_device, ["no CUDA device is visible", "CUDA_VISIBLE_DEVICES"]),
        (no_driver, ["no NVIDIA driver", "580"]),
        (old_driver, ["CUDA 12.8 at most", "13.0", "580", "torch for CUDA 12"]),
        (old_device, ["NVIDIA H100 has compute capability 7.5", "8.0"]),
        (no_cupy, ["CuPy is not installed", "pip install 'compress-llm[cuda13]'"]),
        (two_cupys, ["CuPy 14.2.0 is for CUDA 12", "pip uninstall cupy-cuda12x", "[cuda13]"]),
        (no_nvrtc, ["NVRTC", "pip install nvidia-cuda-nvrtc"]),
        (no_headers, ["headers", "pip install nvidia-cuda-runtime"]),
        (strange, ["KeyError", "report it"]),
    ],
)
def test_what_is_missing(
    machine: Any, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None], said: list[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", sys.modules["cupy"])  # put back what a case takes away
    change(machine)
    found = probe(0)
    assert not found.usable
    assert "\n" not in found.reason
    assert all(word in found.reason for word in said), found.reason


@pytest.mark.parametrize(("hip", "said"), [(None, "without CUDA"), ("7.0", "for ROCm 7.0")])
def test_torch_without_cuda(machine: Any, monkeypatch: pytest.MonkeyPatch, hip: str | None, said: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert said in probe(0).reason


def test_cuda_12(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "[cuda12]" in probe(0).reason
    support._look.cache_clear()
    machine.cupy_cuda, machine.nvrtc = 12090, OSError("libnvrtc.so.12")
    assert "nvidia-cuda-nvrtc-cu12" in probe(0).reason


def test_no_such_device(machine: Any) -> None:
    assert "no CUDA device 5; there are 2" in probe(5).reason


def test_cuda_that_does_not_start(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: int = 0) -> Any:
        raise RuntimeError("CUDA error: device is busy\nmore")

    monkeypatch.setattr(torch.cuda, "current_device", broken)
    monkeypatch.setattr(torch.cuda, "get_device_properties", broken)
    assert "CUDA error: device is busy;" in probe().reason


def test_switched_off_and_on_again(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESS_KERNELS", "0")
    off = probe(0)
    assert not off.usable
    assert "COMPRESS_KERNELS=0" in off.reason
    assert off.name == "NVIDIA H100"
    monkeypatch.delenv("COMPRESS_KERNELS")
    assert probe(0).usable


def test_one_line_a_reason(machine: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "compress.cuda"):
        for device in (5, 5, 0, 6):
            why_not_once(probe(device))
    assert [r.getMessage().partition(";")[0] for r in caplog.records] == [
        "GPU kernels are not used: there is no CUDA device 5",
        "GPU kernels are not used: there is no CUDA device 6",
    ]


def test_driver_version_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(support.ctypes, "CDLL", missing)
    assert support.driver_version() == 0
    assert support.driver_cuda() == ""


@pytest.mark.parametrize("error", [ModuleNotFoundError("No module named 'cupy'"), OSError("libcuda.so.1"), None])
def test_preloading_leaves_what_is_wrong_to_probe(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def imported(name: str) -> None:
        asked.append(name)
        if error is not None:
            raise error

    monkeypatch.setattr(support.importlib, "import_module", imported)
    monkeypatch.setenv("COMPRESS_KERNELS", "0")
    support.preload()
    assert not asked
    monkeypatch.delenv("COMPRESS_KERNELS")
    support.preload()
    assert asked == ["cupy"]
