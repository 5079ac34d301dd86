"""Compiles kernels with CuPy (NVRTC) once a process and device, and launches them on torch's current stream.

What CuPy 14.2 does, read in its source, where this file leans on it:

- The machine code is kept on disk (CUPY_CACHE_DIR, default ~/.cupy/kernel_cache), keyed by source, options, device
  architecture, NVRTC's version and CuPy's headers. A kernel costs 0.1 to 1 s once, then 20 to 35 ms a process.
- To our options it adds -arch=sm_90 (its own guess), -ftz=true and include paths that our sources do not use. With two
  -arch NVRTC takes sm_90a, in either order.
- A Python int is handed over as 8 bytes, of which an `int` parameter takes the lower 4; a Python float as a double, of
  which a `float` parameter would take garbage. Function.__call__ takes of a stream nothing but `ptr`.
- `RawKernel.kernel` and its attributes are those of the device that is current when they are asked for.
- It has no way to ask for a launch that overlaps the kernel before (programmatic dependent launch): for kernels that
  call `wait_for_previous` (kernels/device.cuh) the driver is called instead, on Hopper and later.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from compress.cuda.source import Kernel, checked, options, text
from compress.cuda.support import driver_version, probe
from compress.errors import CompressError

_BLOCK_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking
_REMEDY = "set COMPRESS_KERNELS=0 to run without GPU kernels"
_LINES = 3  # of the compiler's messages that an error repeats
_EARLY = "wait_for_previous();"  # in a kernel that may begin before the one before it has ended
_EARLY_DRIVER = 12030  # the first that captures such launches in graphs
_SERIALIZATION = 6  # of CUDA's driver API: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION

_lock = threading.Lock()
_functions: dict[tuple[Kernel, int], Function] = {}
_streams: dict[tuple[int, int], Any] = {}


@dataclass(frozen=True, eq=False)
class Function:
    """A compiled kernel on one device.

    Attributes:
        kernel: what it was made from.
        device: CUDA's index.
        raw: cupy.RawKernel, for its attributes.
        run: cupy.cuda.function.Function; the module is kept by it.
        early: it is launched before the kernel before it has ended, and waits for that itself.
    """

    kernel: Kernel
    device: int
    raw: Any
    run: Any
    early: bool = False


def function(kernel: Kernel, device: int) -> Function:
    """The kernel, compiled for the device; the same object at every call. `probe(device)` must be usable.

    It may be launched with all the shared memory that a block can have (227 KiB on 9.0), less its static. The first
    call belongs before the capture of a CUDA graph: it loads a module.

    Raises:
        CompressError: the compiler refuses it, or CuPy lacks something.
    """
    found = _functions.get((kernel, device))
    if found is None:
        with _lock:
            found = _functions.get((kernel, device))
            if found is None:
                found = _functions[kernel, device] = _compile(kernel, device)
    return found


def _compile(kernel: Kernel, device: int) -> Function:
    import cupy
    from cupy.cuda import nvrtc
    from cupy.cuda.compiler import CompileException

    support = probe(device)
    try:
        flags = _known(options(kernel, support.capability), support.capability, nvrtc.getSupportedArchs())
        code = text(kernel.file)
        early = _EARLY in code and support.capability >= (9, 0) and driver_version() >= _EARLY_DRIVER
        with cupy.cuda.Device(device):
            module = cupy.RawModule(code=code, options=flags, backend="nvrtc")
            raw = module.get_function(kernel.name)
            if support.shared > _BLOCK_SHARED:
                raw.max_dynamic_shared_size_bytes = support.shared - raw.shared_size_bytes
            return Function(kernel, device, raw, raw.kernel, early and not checked())
    except CompileException as error:
        where = f"NVRTC {support.nvrtc} on {support.name}"
        raise _error(kernel, f"does not compile with {where}", error, "update CuPy and CUDA, or ") from error
    except (RuntimeError, OSError) as error:  # CUDA, headers or a library not found; the folder of the cache
        raise _error(kernel, "cannot be built", error, "compress doctor shows the versions; mend that, or ") from error


def _known(flags: tuple[str, ...], capability: tuple[int, int], targets: Sequence[int]) -> tuple[str, ...]:
    """The options without -arch for a device that NVRTC (`targets`: 80, 86, ...) is too old to know: CuPy then asks for
    PTX of the newest that it knows, which the driver compiles."""
    major, minor = capability
    return flags if 10 * major + minor in targets else tuple(flag for flag in flags if not flag.startswith("-arch="))


def launch(
    function: Function,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: Sequence[Any],
    shared: int,
    x: Tensor,
) -> None:
    """Put a launch on torch's current stream of x's device; returns before it has run.

    Args:
        function: compiled for that device.
        grid: blocks, up to three numbers.
        block: threads, up to three numbers.
        args: one a parameter. int: any integer, or a pointer (data_ptr(), the quickest); Tensor: its pointer; float:
            float32; None: a null pointer; numpy array: its bytes, for a struct. Other types go to CuPy as they are, if
            the kernel is not `early` (numpy scalars keep theirs).
        shared: bytes of dynamic shared memory.
        x: any tensor of the device.

    Raises:
        CompressError: CUDA refuses it, or an earlier kernel failed.
    """
    device = x.get_device()
    assert device == function.device, f"{function.kernel.title} is compiled for device {function.device}, not {device}"
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch(function, grid, block, args, shared, x)
    handle = torch._C._cuda_getCurrentRawStream(device)
    if function.early:
        return _launch_early(function, grid, block, args, shared, handle)
    stream = _streams.get((device, handle))
    if stream is None:
        stream = _streams[device, handle] = _stream(handle)
    values = [a if type(a) is int else _argument(a) for a in args]
    try:
        function.run(grid, block, values, shared, stream)
    except RuntimeError as error:
        raise _refused(function, grid, block, shared, error) from error


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


_allowed = _Attribute(_SERIALIZATION, 0, 1)


def _launch_early(
    function: Function, grid: tuple[int, ...], block: tuple[int, ...], args: Sequence[Any], shared: int, stream: int
) -> None:
    """As `launch`, with an edge in a CUDA graph that lets the kernel begin before the one before it has ended."""
    numbers = [_number(value) for value in args]
    parameters = (ctypes.c_void_p * len(numbers))(*map(ctypes.addressof, numbers))
    config = _Config(_three(grid), _three(block), shared, stream, ctypes.addressof(_allowed), 1)
    error = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function.run.ptr), parameters, None)
    if error:
        raise _refused(function, grid, block, shared, RuntimeError(f"CUDA error {error}"))


def _number(value: Any) -> Any:
    """A parameter's bytes: of a whole number an `int` parameter takes the lower 4; of a numpy array all."""
    if isinstance(value, numpy.ndarray):
        return (ctypes.c_char * value.nbytes).from_buffer_copy(value.tobytes())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(_argument(value))


def _three(size: tuple[int, ...]) -> tuple[int, ...]:
    return (*size, 1, 1)[:3]


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _refused(
    function: Function, grid: tuple[int, ...], block: tuple[int, ...], shared: int, error: Exception
) -> CompressError:
    what = f"launch of {grid} blocks of {block} threads, {shared} bytes of shared memory failed"
    remedy = "if an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which; else "
    return _error(function.kernel, what, error, remedy)


@dataclass(frozen=True)
class _Handle:
    """A stream of torch's, which lives as long as the process, by CUDA's stream protocol."""

    ptr: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr


def _stream(handle: int) -> Any:
    import cupy

    external = getattr(cupy.cuda.Stream, "from_external", None)
    return cupy.cuda.ExternalStream(handle) if external is None else external(_Handle(handle))  # CuPy 13; 14


def _argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return numpy.float32(value)
    return 0 if value is None else value


def resources(function: Function) -> dict[str, int]:
    """What the machine code takes: registers and bytes of local memory (spills, stack) a thread, bytes of static shared
    memory a block, and the most threads that a block can have."""
    import cupy

    with cupy.cuda.Device(function.device):
        raw = function.raw
        return {
            "registers": raw.num_regs,
            "local": raw.local_size_bytes,
            "shared": raw.shared_size_bytes,
            "max_threads": raw.max_threads_per_block,
        }


def _error(kernel: Kernel, what: str, error: Exception, remedy: str) -> CompressError:
    """With the first lines that a compiler or CUDA said."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return CompressError(f"{what} ({'; '.join(said[:_LINES])})", f"GPU kernel {kernel.title}", remedy + _REMEDY)
