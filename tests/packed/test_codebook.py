"""Codebook: what is stored comes back exactly, and every weight is an entry of its book."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.packed.codebook import Codebook
from compress.types import Packed, Storage, bits_per_weight, tensor_bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(out: int, columns: int, bits: int, size: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Codebook:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else -(-columns // size)
    codes = torch.randint(2**bits, (out, columns), generator=g, dtype=torch.uint8)
    book = torch.randn(out, groups, 2**bits, generator=g).sort(2).values.to(dtype)
    return Codebook(codes, book, bits, size)


layers = st.builds(
    layer,
    out=st.integers(1, 9),
    columns=st.integers(1, 50),
    bits=st.integers(2, 8),
    size=st.sampled_from([-1, 1, 4, 7, 16, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)


def same(a: Codebook, b: Codebook) -> bool:
    return (
        (a.bits, a.group_size, a.book.dtype) == (b.bits, b.group_size, b.book.dtype)
        and torch.equal(a.codes, b.codes)
        and torch.equal(a.book, b.book)
    )


@given(layers)
@settings(deadline=None, max_examples=60)
def test_tensors_and_back(packed: Codebook) -> None:
    stored, dtype = packed.tensors(), packed.book.dtype
    assert set(stored) == set(Codebook.parts)
    storage = Storage.from_json(packed.storage.as_json())
    assert storage == packed.storage
    assert same(Codebook.from_tensors(stored, storage, packed.shape, dtype), packed)
    assert Codebook.stored_bytes(storage, packed.shape, dtype) == tensor_bytes_of(packed)


@given(layers)
@settings(deadline=None, max_examples=30)
def test_dequantize_is_a_look_up(packed: Codebook) -> None:
    dense = packed.dequantize()
    out, columns = packed.shape
    assert dense.dtype == packed.book.dtype
    assert dense.shape == packed.shape
    for r in range(out):
        for c in range(columns):
            group = 0 if packed.group_size == -1 else c // packed.group_size
            assert dense[r, c] == packed.book[r, group, int(packed.codes[r, c])]
    x = torch.randn(2, columns, generator=torch.Generator().manual_seed(1)).to(dense.dtype)
    assert torch.equal(packed.linear(x), torch.nn.functional.linear(x, dense))


@given(layers, st.data())
@settings(deadline=None, max_examples=30)
def test_rows(packed: Codebook, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, packed.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, packed.shape[0]))
    part = packed.rows(start, stop)
    assert part.storage == packed.storage
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    assert same(Codebook.from_tensors(part.tensors(), part.storage, part.shape, part.book.dtype), part)


def test_storage_and_bits() -> None:
    packed = layer(8, 4096, 4, -1)
    assert isinstance(packed, Packed)
    assert packed.storage == Storage("codebook", 4)
    assert bits_per_weight(packed) == pytest.approx(4 + 16 * 16 / 4096)
    assert layer(8, 256, 3, 128).storage == Storage("codebook", 3, 128)
    assert bits_per_weight(layer(8, 256, 3, 128)) == pytest.approx(3 + 8 * 16 / 128)
