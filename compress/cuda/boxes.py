"""Tensor maps: how Hopper's copy engine is told of a matrix and of the boxes that a kernel cuts out of it."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy
from torch import Tensor

from compress.errors import CompressError

_BYTES, _ALIGNMENT = 128, 64
#: of CUDA's driver API: CU_TENSOR_MAP_DATA_TYPE_UINT16, ..._SWIZZLE_128B, ..._L2_PROMOTION_L2_256B
_UINT16, _SWIZZLE_128, _PROMOTE_256 = 1, 3, 3
_TYPE = numpy.dtype(f"V{_BYTES}")


def boxes(x: Tensor, rows: int) -> Any:
    """The kernel argument for boxes of `rows` rows and 64 columns, swizzled in 128 bytes; what is outside reads as 0.

    Args:
        x: 16-bit [n, columns], contiguous, columns a multiple of 8, at a multiple of 16 bytes.
        rows: up to 256.

    Raises:
        CompressError: the driver refuses it.
    """
    return _boxes(x.data_ptr(), x.shape[0], x.shape[1], rows)


@functools.lru_cache(1024)
def _boxes(pointer: int, count: int, columns: int, rows: int) -> Any:
    """It holds nothing but these numbers, so that a map for memory that was used anew is the same."""
    room = ctypes.create_string_buffer(_BYTES + _ALIGNMENT)
    place = -(-ctypes.addressof(room) // _ALIGNMENT) * _ALIGNMENT
    sizes = (ctypes.c_uint64 * 2)(columns, count)
    strides = (ctypes.c_uint64 * 1)(2 * columns)
    box = (ctypes.c_uint32 * 2)(64, rows)
    ones = (ctypes.c_uint32 * 2)(1, 1)
    error = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place), _UINT16, 2, ctypes.c_void_p(pointer), sizes, strides, box, ones,
        0, _SWIZZLE_128, _PROMOTE_256, 0,
    )  # fmt: skip
    if error:
        what = f"no tensor map of [{count}, {columns}] in boxes of {rows} rows: CUDA error {error}"
        raise CompressError(what, "GPU kernel wide (wide.cu)", "set COMPRESS_KERNELS=0 to run without GPU kernels")
    return numpy.frombuffer(ctypes.string_at(place, _BYTES), dtype=_TYPE).reshape(())


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")
