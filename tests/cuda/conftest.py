"""A CUDA machine as far as compress.cuda sees one: torch's few calls, and a CuPy that compiles anything."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from compress.cuda import compiler, support


class CompileException(Exception):
    """As cupy.cuda.compiler has it: no RuntimeError."""


class Machine:
    """State that the tests set, and what was asked of it."""

    CompileException = CompileException

    def __init__(self) -> None:
        self.capability, self.count, self.driver, self.cupy_cuda = (9, 0), 2, 13000, 13020
        self.current, self.stream = 0, 0
        self.nvrtc: tuple[int, int] | Exception = (13, 0)
        self.headers: str | None = "/include"
        self.compile_error: Exception | None = None
        self.launch_error: Exception | None = None
        self.modules: list[tuple[int, str, tuple[str, ...]]] = []  # device, source, options
        self.streams: list[int] = []  # handles that were wrapped
        self.launches: list[tuple[Any, ...]] = []  # device, name, grid, block, args, shared, handle

    def version(self) -> tuple[int, int]:
        if isinstance(self.nvrtc, Exception):
            raise self.nvrtc
        return self.nvrtc

    @contextmanager
    def on(self, device: Any) -> Any:
        before, self.current = self.current, int(device)
        yield
        self.current = before

    def install(self, patch: Any) -> None:
        """Into torch and sys.modules, for the length of a test."""
        machine = self
        patch.setattr(support, "driver_version", lambda: machine.driver)
        patch.setattr(torch.version, "cuda", "13.0")
        patch.setattr(torch.cuda, "is_available", lambda: machine.count > 0)
        patch.setattr(torch.cuda, "device_count", lambda: machine.count)
        patch.setattr(torch.cuda, "current_device", lambda: machine.current)
        patch.setattr(torch.cuda, "device", self.on)
        patch.setattr(torch.cuda, "get_device_properties", self.properties)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: machine.current, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: machine.stream, raising=False)

        class Stream:
            def __init__(self, ptr: int) -> None:
                self.ptr = ptr

            @classmethod
            def from_external(cls, other: Any) -> Stream:
                version, handle = other.__cuda_stream__()
                assert version == 0
                machine.streams.append(handle)
                return cls(handle)

        class RawKernel:
            num_regs, local_size_bytes, shared_size_bytes, max_threads_per_block = 80, 0, 1024, 256
            max_dynamic_shared_size_bytes = 0

            def __init__(self, name: str) -> None:
                self.name = name

            @property
            def kernel(self) -> Any:
                def run(grid: Any, block: Any, args: Any, shared: int, stream: Stream) -> None:
                    if machine.launch_error is not None:
                        raise machine.launch_error
                    machine.launches.append((machine.current, self.name, grid, block, args, shared, stream.ptr))

                run.ptr = 0x123  # type: ignore[attr-defined]
                return run

        class RawModule:
            def __init__(self, *, code: str, options: tuple[str, ...], backend: str) -> None:
                assert backend == "nvrtc"
                machine.modules.append((machine.current, code, options))

            def get_function(self, name: str) -> RawKernel:
                if machine.compile_error is not None:
                    raise machine.compile_error
                return RawKernel(name)

        nvrtc = types.SimpleNamespace(getVersion=self.version, getSupportedArchs=lambda: (75, 80, 86, 89, 90, 120))
        runtime = types.SimpleNamespace(
            runtimeGetVersion=lambda: machine.cupy_cuda, deviceGetAttribute=lambda attribute, device: 232448
        )
        names = {
            "cupy": {"__version__": "14.2.0", "RawModule": RawModule},
            "cupy.cuda": {"Device": self.on, "Stream": Stream, "nvrtc": nvrtc, "runtime": runtime},
            "cupy.cuda.compiler": {"CompileException": CompileException},
            "cuda": {},
            "cuda.pathfinder": {"find_nvidia_header_directory": lambda name: machine.headers},
        }
        for name, attributes in names.items():
            module = types.ModuleType(name)
            module.__dict__.update(attributes)
            patch.setitem(sys.modules, name, module)
        vars(sys.modules["cupy"])["cuda"] = sys.modules["cupy.cuda"]

    def properties(self, device: int) -> Any:
        major, minor = self.capability
        return types.SimpleNamespace(name="NVIDIA H100", major=major, minor=minor, total_memory=80 * 10**9)


def forget() -> None:
    support._look.cache_clear()
    support._told.clear()
    compiler._functions.clear()
    compiler._streams.clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Two H100 that are not there, in a process that has not looked yet."""
    made = Machine()
    made.install(monkeypatch)
    monkeypatch.delenv("COMPRESS_KERNELS", raising=False)
    forget()
    yield made
    forget()
