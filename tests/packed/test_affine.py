"""Affine grids: there and back, a naive loop, rows, bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.packed import KINDS
from compress.packed.affine import Affine
from compress.types import Packed, moved


def make(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype, seed: int = 0) -> Affine:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else -(-columns // group_size)
    codes = torch.randint(2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales, minima = (torch.randn(rows, groups, generator=g).to(dtype) for _ in range(2))
    return Affine(codes, scales, minima, bits, group_size)


CASES = {
    "rows": st.integers(1, 5),
    "columns": st.integers(1, 70),
    "bits": st.integers(2, 8),
    "group_size": st.sampled_from([-1, 1, 7, 32]),
    "dtype": st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
}


@settings(deadline=None)
@given(**CASES)
def test_there_and_back(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype) -> None:
    packed = make(rows, columns, bits, group_size, dtype)
    tensors = packed.tensors()
    assert set(tensors) <= set(Affine.parts)
    again = Affine.from_tensors(tensors, packed.storage, packed.shape, dtype)
    assert again.storage == packed.storage
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.dequantize(), packed.dequantize())
    stored = sum(t.numel() * t.element_size() for t in tensors.values())
    assert stored == Affine.stored_bytes(packed.storage, packed.shape, dtype)


@settings(deadline=None, max_examples=30)
@given(**CASES)
def test_a_naive_loop(rows: int, columns: int, bits: int, group_size: int, dtype: torch.dtype) -> None:
    packed = make(rows, columns, bits, group_size, dtype)
    dense = packed.dequantize()
    assert dense.dtype == dtype
    for i in range(rows):
        for j in range(columns):
            group = 0 if group_size == -1 else j // group_size
            scale, minimum = packed.scales[i, group].float(), packed.minima[i, group].float()
            assert dense[i, j] == (scale * int(packed.codes[i, j]) + minimum).to(dtype)


def test_rows_and_linear() -> None:
    packed = make(6, 64, 4, 32, torch.float16)
    assert torch.equal(packed.rows(2, 5).dequantize(), packed.dequantize()[2:5])
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed.linear(x), x @ packed.dequantize().float().T)
    assert isinstance(packed, Packed)
    assert KINDS["affine"] is Affine
    assert torch.equal(moved(packed, torch.device("cpu")).dequantize(), packed.dequantize())


def test_parts_do_not_clash_with_kinds_around() -> None:
    for kind in ("sparse", "outliers"):
        assert not set(KINDS[kind].parts) & set(Affine.parts)


def test_what_does_not_belong_together() -> None:
    packed = make(4, 64, 4, 32, torch.float16)
    with pytest.raises(ValueError, match="scales are"):
        replace(packed, scales=packed.scales[:, :1])
    with pytest.raises(ValueError, match="minima are"):
        replace(packed, minima=packed.minima[:2])
    with pytest.raises(ValueError, match="float32"):
        replace(packed, minima=packed.minima.float())
