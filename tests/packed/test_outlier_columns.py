"""OutlierColumns: the kept columns to the bit, the rest as its grid; no outlier and all outliers included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.packed.outlier_columns import OutlierColumns
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage, tensor_bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(
    out: int = 6,
    columns: int = 24,
    share: float = 0.2,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    activations: str = "token",
    seed: int = 0,
) -> OutlierColumns:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 256, (out, columns), generator=g, dtype=torch.uint8)
    scales = (torch.rand(out, 1, generator=g) * 0.1 + 0.01).to(dtype)
    zeros = None if symmetric else torch.randint(1, 256, (out, 1), generator=g, dtype=torch.uint8)
    kept = (torch.rand(columns, generator=g) < share).nonzero()[:, 0]
    codes[:, kept] = 128 if zeros is None else zeros
    inner = UniformGrid(codes, scales, zeros, 8, -1, None, activations)
    return OutlierColumns(inner, kept.to(torch.int32), torch.randn(out, len(kept), generator=g).to(dtype))


layers = st.builds(
    layer,
    out=st.integers(1, 9),
    columns=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.2, 1.0]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    activations=st.sampled_from(["", "token", "tensor"]),
    seed=st.integers(0, 10**6),
)


def same(a: OutlierColumns, b: OutlierColumns) -> bool:
    ours, theirs = a.tensors(), b.tensors()
    return (
        a.storage == b.storage
        and list(ours) == list(theirs)
        and all(t.dtype == theirs[n].dtype and torch.equal(t, theirs[n]) for n, t in ours.items())
    )


@given(layers, st.data())
@settings(deadline=None, max_examples=50)
def test_tensors_and_back_and_rows(packed: OutlierColumns, data: st.DataObject) -> None:
    assert isinstance(packed, Packed)
    assert set(packed.tensors()) <= set(OutlierColumns.parts)
    start = data.draw(st.integers(0, packed.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, packed.shape[0]))
    part = packed.rows(start, stop)
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    for whole in (packed, part):
        storage = Storage.from_json(whole.storage.as_json())
        assert storage == whole.storage
        dtype = whole.weight.dtype
        assert same(OutlierColumns.from_tensors(whole.tensors(), storage, whole.shape, dtype), whole)
        n = len(whole.columns)
        grid_bytes = UniformGrid.stored_bytes(whole.inner.storage, whole.shape, dtype)
        assert tensor_bytes_of(whole) == grid_bytes + n * 4 + whole.weight.numel() * dtype.itemsize
        if n == min(7, whole.shape[1]):
            assert OutlierColumns.stored_bytes(storage, whole.shape, dtype) == tensor_bytes_of(whole)


@given(layers)
@settings(deadline=None, max_examples=50)
def test_dequantize_by_column(packed: OutlierColumns) -> None:
    dense, grid = packed.dequantize(), packed.inner.dequantize()
    assert dense.dtype == packed.weight.dtype
    where = packed.columns.tolist()
    for c in range(packed.shape[1]):
        assert torch.equal(dense[:, c], packed.weight[:, where.index(c)] if c in where else grid[:, c])
        if c in where:
            assert bool((grid[:, c] == 0).all())


@given(layers, st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=50)
def test_linear_is_the_sum_of_the_two_parts(packed: OutlierColumns, dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, packed.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    columns = packed.columns.long()
    x[..., columns] *= 60
    rest = x.clone()
    rest[..., columns] = 0
    exact = packed.inner.linear(rest).double() + x[..., columns].double() @ packed.weight.to(dtype).double().t()
    y = packed.linear(x)
    assert y.dtype == dtype
    scale = float(exact.abs().max()) + float((x.double().abs() @ packed.dequantize().double().abs().t()).max())
    assert bool(((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * scale + 1e-6).all())
    assert torch.equal(rest[..., columns], torch.zeros_like(rest[..., columns]))
    x[..., columns] = before[..., columns]
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_outlier_leaves_the_other_features_alone(dtype: torch.dtype) -> None:
    """With a zero column stored for the outlier, its magnitude changes nothing; on a plain grid it ruins the token."""
    packed = layer(share=0.0, dtype=dtype)
    split = replace(packed, columns=torch.tensor([5], dtype=torch.int32), weight=torch.zeros(6, 1, dtype=dtype))
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    huge = x.clone()
    huge[:, 5] = 1000
    assert torch.equal(split.linear(x), split.linear(huge))
    assert not torch.equal(packed.linear(x), packed.linear(huge))


def test_storage() -> None:
    inner = Storage("uniform", 8, -1, False, activations="token_zeropoint")
    packed = layer(symmetric=False, activations="token_zeropoint")
    assert packed.storage == Storage("outlier_columns", 8, -1, False, activations="token_zeropoint", inner=inner)
    assert replace(packed, columns=packed.columns[:0], weight=packed.weight[:, :0]).storage == packed.storage
