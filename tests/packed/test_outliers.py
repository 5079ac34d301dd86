"""Outliers: compressed sparse rows over a base come back exactly, and replace the base's weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import packed as kinds
from compress.packed.bilevel import BiLevel, Statistic
from compress.packed.outliers import Outliers
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage, moved, tensor_bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (BiLevel, Outliers, UniformGrid):
        monkeypatch.setitem(kinds.KINDS, kind.kind, kind)


def base(out: int, columns: int, two_levels: bool, dtype: torch.dtype, g: torch.Generator) -> Packed:
    groups = -(-columns // 8)
    codes = torch.randint(8, (out, columns), generator=g, dtype=torch.uint8)
    if not two_levels:
        return UniformGrid(codes, torch.rand(out, groups, generator=g).to(dtype), None, 3, 8)
    runs = -(-out // 4)
    scale, zero = (
        Statistic(
            torch.rand(runs, groups, generator=g).to(dtype),
            4, 3, torch.randint(8, (out, groups), generator=g, dtype=torch.uint8),
            -torch.rand(runs, groups, generator=g).to(dtype),
        )
        for _ in range(2)
    )  # fmt: skip
    return BiLevel.of(codes, scale, zero, 3, 8, dtype)


def layer(
    out: int, columns: int, share: float, two_levels: bool = True, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> tuple[Outliers, Tensor, Tensor]:
    """A layer, and the mask and the values it was made of."""
    g = torch.Generator().manual_seed(seed)
    inner = base(out, columns, two_levels, dtype, g)
    mask = torch.rand(out, columns, generator=g) < share
    values = torch.randn(out, columns, generator=g).to(dtype)
    return Outliers.of(inner, mask, values), mask, values


made = st.builds(
    layer,
    out=st.integers(1, 20),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    two_levels=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)


@given(made)
@settings(deadline=None, max_examples=60)
def test_outliers_replace_the_base(case: tuple[Outliers, Tensor, Tensor]) -> None:
    packed, mask, values = case
    dense = packed.dequantize()
    assert dense.dtype == values.dtype
    assert torch.equal(dense, torch.where(mask, values, packed.inner.dequantize()))


@given(made)
@settings(deadline=None, max_examples=40)
def test_compressed_sparse_rows(case: tuple[Outliers, Tensor, Tensor]) -> None:
    packed, mask, values = case
    found = torch.zeros_like(mask)
    for r in range(len(mask)):
        mine = slice(int(packed.row_pointers[r]), int(packed.row_pointers[r + 1]))
        columns = [c & 0xFFFF for c in packed.columns[mine].tolist()]
        assert columns == sorted(set(columns))
        found[r, columns] = True
        assert torch.equal(packed.values[mine], values[r, columns])
    assert torch.equal(found, mask)
    assert int(packed.row_pointers[-1]) == len(packed.values) == int(mask.sum())


@given(made)
@settings(deadline=None, max_examples=60)
def test_tensors_and_back(case: tuple[Outliers, Tensor, Tensor]) -> None:
    packed, _, values = case
    tensors = packed.tensors()
    assert not set(packed.inner.tensors()) & set(Outliers.parts)
    storage = Storage.from_json(packed.storage.as_json())
    assert storage == packed.storage
    again = Outliers.from_tensors(tensors, storage, packed.shape, values.dtype)
    assert type(again.inner) is type(packed.inner)
    for name, tensor in again.tensors().items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    assert torch.equal(again.dequantize(), packed.dequantize())


@given(made, st.data())
@settings(deadline=None, max_examples=40)
def test_rows(case: tuple[Outliers, Tensor, Tensor], data: st.DataObject) -> None:
    packed, _, values = case
    out = packed.shape[0]
    start = data.draw(st.integers(0, (out - 1) // 4)) * 4
    stop = min(data.draw(st.integers(start // 4 + 1, -(-out // 4))) * 4, out)
    part = packed.rows(start, stop)
    assert part.shape == (stop - start, packed.shape[1])
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    again = Outliers.from_tensors(part.tensors(), part.storage, part.shape, values.dtype)
    assert torch.equal(again.dequantize(), part.dequantize())


@pytest.mark.parametrize(("columns", "dtype"), [(40000, torch.int16), (65536, torch.int16), (65537, torch.int32)])
def test_columns_of_wide_layers(columns: int, dtype: torch.dtype) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[0, [0, 32767, 32768, columns - 1]] = True
    mask[1, columns - 1] = True
    values = torch.arange(2 * columns, dtype=torch.float32).reshape(2, columns)
    inner = UniformGrid(torch.zeros(2, columns, dtype=torch.uint8), torch.ones(2, 1), None, 2, -1)
    packed = Outliers.of(inner, mask, values)
    assert packed.columns.dtype == dtype
    assert packed.positions()[1].tolist() == [0, 32767, 32768, columns - 1, columns - 1]
    assert torch.equal(packed.dequantize(), torch.where(mask, values, -2.0))


def test_bytes() -> None:
    """Four bytes an outlier in 16 bits, and the row pointers; before there are any, one weight in 100 is assumed."""
    packed, mask, _ = layer(16, 200, 0.03)
    assert tensor_bytes_of(packed) == tensor_bytes_of(packed.inner) + 4 * 17 + 4 * int(mask.sum())
    assumed = Outliers.stored_bytes(packed.storage, packed.shape, torch.bfloat16)
    assert assumed == tensor_bytes_of(packed.inner) + 4 * 17 + 4 * 32


def test_protocol_device_and_linear() -> None:
    packed, _, _ = layer(6, 24, 0.1)
    assert isinstance(packed, Packed)
    assert torch.equal(moved(packed, torch.device("cpu")).dequantize(), packed.dequantize())
    inner = moved(packed, torch.device("meta")).inner  # type: ignore[attr-defined]
    assert inner.scale_codes.device.type == "meta"
    x = torch.randn(3, 24)
    torch.testing.assert_close(packed.linear(x), x @ packed.dequantize().float().T)
