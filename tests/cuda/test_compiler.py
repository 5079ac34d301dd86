"""compiler.py against a CuPy that only writes down what it is asked for; the real one is tests/test_gpu.py's."""

from __future__ import annotations

import ctypes
import sys
import threading
import types
from typing import Any

import numpy
import pytest
import torch

from compress.cuda import compiler
from compress.cuda.compiler import function, launch, resources
from compress.cuda.source import Kernel
from compress.errors import CompressError

NARROW = Kernel("narrow", "narrow.cu", (("BITS", 4),))


@pytest.fixture(autouse=True)
def _sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "text", lambda file: f"// {file}")


def on(device: int) -> Any:
    """Stands for a tensor of a device."""
    return types.SimpleNamespace(get_device=lambda: device)


def test_compiled_once_a_kernel_and_device(machine: Any) -> None:
    first = function(NARROW, 0)
    assert function(Kernel("narrow", "narrow.cu", (("BITS", 4),)), 0) is first
    other, there = function(Kernel("narrow", "narrow.cu", (("BITS", 3),)), 0), function(NARROW, 1)
    assert len({id(first), id(other), id(there)}) == 3
    flags = ("--std=c++17", "-ftz=true", "-arch=sm_90a")
    assert machine.modules == [
        (0, "// narrow.cu", (*flags, "-DBITS=4")),
        (0, "// narrow.cu", (*flags, "-DBITS=3")),
        (1, "// narrow.cu", (*flags, "-DBITS=4")),
    ]
    assert machine.current == 0


def test_threads_share_one_compilation(machine: Any) -> None:
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(function(NARROW, 0))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(machine.modules) == 1
    assert all(f is found[0] for f in found)


def test_all_shared_memory_but_the_static(machine: Any) -> None:
    assert function(NARROW, 0).raw.max_dynamic_shared_size_bytes == 232448 - 1024


def test_resources(machine: Any) -> None:
    assert resources(function(NARROW, 1)) == {"registers": 80, "local": 0, "shared": 1024, "max_threads": 256}


def test_a_device_that_nvrtc_does_not_know_gets_ptx(machine: Any) -> None:
    machine.capability = (13, 0)
    function(NARROW, 0)
    assert not any(flag.startswith("-arch") for flag in machine.modules[0][2])


@pytest.mark.parametrize("compiler_said", [True, False])
def test_what_does_not_compile(machine: Any, compiler_said: bool) -> None:
    said = "kernels/narrow.cu(12): error: no\n\n  x = ;\n      ^\n1 error detected\n"
    machine.compile_error = machine.CompileException(said) if compiler_said else RuntimeError("no CUDA headers")
    with pytest.raises(CompressError) as caught:
        function(NARROW, 0)
    assert caught.value.where == "GPU kernel narrow (narrow.cu, BITS=4)"
    assert "COMPRESS_KERNELS=0" in caught.value.remedy
    assert ("kernels/narrow.cu(12): error: no; x = ;" if compiler_said else "no CUDA headers") in caught.value.what
    machine.compile_error = None
    function(NARROW, 0)  # nothing of the failure is kept


def test_launch_on_torchs_stream(machine: Any) -> None:
    built = function(NARROW, 0)
    for handle in (0, 77, 0, 77):
        machine.stream = handle
        launch(built, (3, 2), (256,), (1, 2), 512, on(0))
    assert [x[-1] for x in machine.launches] == [0, 77, 0, 77]
    assert machine.launches[0] == (0, "narrow", (3, 2), (256,), [1, 2], 512, 0)
    assert machine.streams == [0, 77], "one stream object a handle"


def test_launch_on_another_device(machine: Any) -> None:
    launch(function(NARROW, 1), (1,), (32,), (), 0, on(1))
    assert machine.launches[0][0] == 1
    assert machine.current == 0
    launch(function(NARROW, 0), (1,), (32,), (), 0, on(0))
    assert machine.streams == [0, 0], "handle 0 is another stream on another device"


def test_arguments(machine: Any) -> None:
    x = torch.zeros(4)
    launch(function(NARROW, 0), (1,), (32,), (x, x.data_ptr(), 0.5, None, numpy.int32(3)), 0, on(0))
    args = machine.launches[0][4]
    assert args == [x.data_ptr(), x.data_ptr(), 0.5, 0, 3]
    assert [type(a) for a in args] == [int, int, numpy.float32, int, numpy.int32]


def test_a_launch_that_cuda_refuses(machine: Any) -> None:
    built = function(NARROW, 0)
    machine.launch_error = RuntimeError("CUDA_ERROR_INVALID_VALUE: invalid argument")
    with pytest.raises(CompressError, match=r"narrow \(narrow.cu, BITS=4\).*\(9,\) blocks.*300000 bytes.*INVALID"):
        launch(built, (9,), (32,), (), 300000, on(0))


def test_an_older_cupy(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class External:
        def __init__(self, ptr: int) -> None:
            self.ptr = ptr

    monkeypatch.delattr(sys.modules["cupy.cuda"].Stream, "from_external")
    monkeypatch.setattr(sys.modules["cupy.cuda"], "ExternalStream", External, raising=False)
    machine.stream = 5
    launch(function(NARROW, 0), (1,), (32,), (), 0, on(0))
    assert machine.launches[0][-1] == 5


class Driver:
    """Of a launch that may begin early, what it was asked for."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[tuple[Any, ...]] = []

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: Any, extra: None) -> int:
        c = config._obj
        attribute = ctypes.cast(c.attributes, ctypes.POINTER(compiler._Attribute)).contents
        values = [ctypes.cast(p, ctypes.POINTER(t)).contents.value for p, t in zip(parameters, self.types, strict=True)]
        self.calls.append(
            (list(c.grid), list(c.block), c.shared, c.stream, c.count, attribute.id, attribute.value, values)
        )
        return self.error

    types = (ctypes.c_longlong, ctypes.c_int, ctypes.c_float, ctypes.c_longlong, ctypes.c_char * 5)


@pytest.mark.parametrize(("driver", "early"), [(13000, True), (12020, False)])
def test_a_kernel_that_waits_itself_is_launched_early(
    machine: Any, monkeypatch: pytest.MonkeyPatch, driver: int, early: bool
) -> None:
    monkeypatch.setattr(compiler, "text", lambda file: "wait_for_previous();")
    monkeypatch.setattr(compiler, "driver_version", lambda: driver)
    monkeypatch.setattr(compiler, "_driver", lambda: asked)
    asked, struct = Driver(), numpy.frombuffer(b"boxes", dtype="V5").reshape(())
    made = function(NARROW, 0)
    assert made.early is early
    launch(made, (7, 2), (256,), [1 << 40, -3, 0.5, None, struct], 4096, on(0))
    assert bool(asked.calls) is early
    if early:
        [(grid, block, shared, _, count, kind, value, values)] = asked.calls
        assert (grid, block, shared, count, kind, value) == ([7, 2, 1], [256, 1, 1], 4096, 1, 6, 1)
        assert values == [1 << 40, -3, 0.5, 0, b"boxes"]
        asked.error = 701
        with pytest.raises(CompressError, match=r"CUDA error 701"):
            launch(made, (7,), (256,), [0, 0, 0.0, 0, struct], 0, on(0))
