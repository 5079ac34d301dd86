"""Dense: values come back as they are."""

from __future__ import annotations

import pytest
import torch

from compress.packed.dense import Dense
from compress.types import Packed, Storage, bits_per_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dense(dtype: torch.dtype) -> None:
    values = torch.randn(6, 5).to(dtype)
    packed = Dense(values)
    assert isinstance(packed, Packed)
    assert packed.shape == (6, 5)
    assert packed.storage == Storage("dense", 16)
    back = Dense.from_tensors(packed.tensors(), packed.storage, packed.shape, dtype)
    assert back.values.dtype == dtype
    assert torch.equal(back.dequantize(), values)
    assert set(packed.tensors()) <= set(Dense.parts)
    assert Dense.stored_bytes(packed.storage, (6, 5), dtype) == 30 * dtype.itemsize
    assert bits_per_weight(packed) == 8 * dtype.itemsize
    assert torch.equal(packed.rows(2, 4).dequantize(), values[2:4])
    x = torch.randn(3, 5)
    torch.testing.assert_close(packed.linear(x), x @ values.float().t())
