"""Launches that may begin while the kernel before them still runs: programmatic dependent launch, from Hopper on.

Such a kernel fetches what nobody writes, then waits in `wait_for_previous` (kernels/eight.cuh) for the one before it.
In a CUDA graph the two become nodes with a programmatic edge. CuPy has no way to ask for it, so this calls the driver.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.cuda.compiler import Function, launch
from compress.errors import CompressError

_SERIALIZATION = 6  # of CUDA's driver API: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


@functools.cache
def overlaps(device: int) -> bool:
    """Whether the device can."""
    return torch.cuda.get_device_properties(device).major >= 9


_allowed = _Attribute(_SERIALIZATION, 0, 1)


def launch_early(
    function: Function, grid: Sequence[int], block: int, args: Sequence[Any], shared: int, x: Tensor
) -> None:
    """As `compiler.launch`, but it may begin before the kernel before it in the stream has ended.

    Args:
        function: of a kernel that calls `wait_for_previous` before it reads what that one writes.
        grid: blocks, one to three numbers.
        block: threads.
        args: tensors, whole numbers, None or numpy arrays (their bytes), one a parameter.
        shared, x: as there.

    Raises:
        CompressError: CUDA refuses it, or an earlier kernel failed.
    """
    device = x.get_device()
    if not overlaps(device):
        return launch(function, tuple(grid), (block,), args, shared, x)
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return launch_early(function, grid, block, args, shared, x)
    held = [_held(a) for a in args]
    parameters = (ctypes.c_void_p * len(held))(*(place for _, place in held))
    config = _Config(
        (*grid, *[1] * (3 - len(grid))), (block, 1, 1), shared, torch._C._cuda_getCurrentRawStream(device),
        ctypes.addressof(_allowed), 1,
    )  # fmt: skip
    error = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function.run.ptr), parameters, None)
    if error:
        what = f"launch of {tuple(grid)} blocks of {block} threads, {shared} bytes of shared memory: CUDA error {error}"
        remedy = "if an earlier kernel failed, CUDA_LAUNCH_BLOCKING=1 shows which; else set COMPRESS_KERNELS=0"
        raise CompressError(what, f"GPU kernel {function.kernel.title}", remedy)


def _held(value: Any) -> tuple[Any, int]:
    """What keeps a parameter's bytes, and their address. Of a whole number an `int` parameter takes the lower 4."""
    if isinstance(value, Tensor):
        value = value.data_ptr()
    if isinstance(value, int) or value is None:
        number = ctypes.c_longlong(value or 0)
        return number, ctypes.addressof(number)
    return value, value.ctypes.data


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
