"""BiLevel: what is stored comes back exactly, and dequantises as its definition says."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.packed.bilevel import BiLevel, Statistic, storage_of
from compress.types import Packed, Storage, bits_per_weight, tensor_bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def statistic(g: torch.Generator, out: int, groups: int, bits: int, run: int, dtype: torch.dtype, lift: float):  # type: ignore[no-untyped-def]
    if bits == 16:
        return Statistic((torch.rand(out, groups, generator=g) + 0.1).to(dtype), run)
    runs = -(-out // run)
    codes = torch.randint(2**bits, (out, groups), generator=g, dtype=torch.uint8)
    scales = (torch.rand(runs, groups, generator=g) * 0.1 + 0.01).to(dtype)
    return Statistic(scales, run, bits, codes, (-torch.rand(runs, groups, generator=g) * 3 - lift).to(dtype))


def layer(
    out: int = 5, columns: int = 40, bits: int = 3, size: int = 16, scale_bits: int = 3, zero_bits: int = 3,
    run: int = 16, dtype: torch.dtype = torch.bfloat16, seed: int = 0,
) -> BiLevel:  # fmt: skip
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)
    codes = torch.randint(2**bits, (out, columns), generator=g, dtype=torch.uint8)
    scale = statistic(g, out, groups, scale_bits, run, dtype, 0.1)
    return BiLevel.of(codes, scale, statistic(g, out, groups, zero_bits, run, dtype, 0.0), bits, size, dtype)


def same(a: BiLevel, b: BiLevel) -> bool:
    """Equal in every field, to the byte."""
    for f in fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if isinstance(x, Tensor):
            if x.dtype != y.dtype or not torch.equal(x, y):
                return False
        elif x != y:
            return False
    return True


layers = st.builds(
    layer,
    out=st.integers(1, 40),
    columns=st.integers(1, 50),
    bits=st.integers(2, 8),
    size=st.sampled_from([8, 16, 64]),
    scale_bits=st.sampled_from([2, 3, 8, 16]),
    zero_bits=st.sampled_from([2, 3, 5, 16]),
    run=st.sampled_from([2, 8, 16]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)


@given(layers)
@settings(deadline=None, max_examples=60)
def test_tensors_and_back(packed: BiLevel) -> None:
    tensors = packed.tensors()
    assert set(tensors) <= set(BiLevel.parts)
    assert all(t.is_contiguous() for t in tensors.values())
    storage = Storage.from_json(packed.storage.as_json())
    assert same(BiLevel.from_tensors(tensors, storage, packed.shape, packed.dtype), packed)


@given(layers)
@settings(deadline=None, max_examples=40)
def test_stored_bytes_are_those_of_the_tensors(packed: BiLevel) -> None:
    assert BiLevel.stored_bytes(packed.storage, packed.shape, packed.dtype) == tensor_bytes_of(packed)


def naive(packed: BiLevel) -> Tensor:
    """A loop in NumPy float32, one operation at a time."""

    def number(s: Statistic, r: int, g: int) -> np.float32:
        if s.codes is None or s.zeros is None:
            return np.float32(float(s.scales[r, g]))
        scale, zero = (np.float32(float(x[r // s.run, g])) for x in (s.scales, s.zeros))
        return scale * (np.float32(int(s.codes[r, g])) - zero)

    out, columns = packed.shape
    dense = np.empty((out, columns), dtype=np.float32)
    for r in range(out):
        for c in range(columns):
            g = c // packed.group_size
            code = np.float32(int(packed.codes[r, c]))
            dense[r, c] = number(packed.scale, r, g) * (code - number(packed.zero, r, g))
    return torch.from_numpy(dense).to(packed.dtype)


@given(layers)
@settings(deadline=None, max_examples=30)
def test_dequantize_is_the_naive_loop(packed: BiLevel) -> None:
    dense = packed.dequantize()
    assert dense.dtype == packed.dtype
    assert torch.equal(dense, naive(packed))


@given(layers, st.data())
@settings(deadline=None, max_examples=40)
def test_rows(packed: BiLevel, data: st.DataObject) -> None:
    unit = 1 if packed.qq_scale_bits == packed.qq_zero_bits == 16 else packed.qq_groupsize
    out = packed.shape[0]
    start = data.draw(st.integers(0, (out - 1) // unit)) * unit
    stop = min(data.draw(st.integers(start // unit + 1, -(-out // unit))) * unit, out)
    part = packed.rows(start, stop)
    assert part.shape == (stop - start, packed.shape[1])
    assert part.storage == packed.storage
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    assert same(BiLevel.from_tensors(part.tensors(), part.storage, part.shape, part.dtype), part)


def test_bits_of_a_usual_layer() -> None:
    """The paper's figure: 3 + (3 + 3) / 16 + 4 * 16 / (16 * 16)."""
    assert bits_per_weight(layer(64, 512)) == 3 + 6 / 16 + 64 / 256
    assert bits_per_weight(layer(64, 512, bits=4, size=32)) == 4 + 6 / 32 + 64 / 512
    assert bits_per_weight(layer(64, 512, scale_bits=16, zero_bits=16)) == 3 + 32 / 16


def test_storage_and_linear() -> None:
    packed = layer(6, 40)
    assert isinstance(packed, Packed)
    assert packed.storage == storage_of(3, 16, 3, 3, 16)
    assert not packed.storage.symmetric
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(packed.linear(x), x @ packed.dequantize().float().T)


def test_rows_cannot_split_a_run() -> None:
    with pytest.raises(AssertionError):
        layer(32, 16).rows(8, 16)
