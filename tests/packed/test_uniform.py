"""UniformGrid: what is stored comes back exactly, and dequantises as its definition says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import int8
from compress.packed.uniform import UniformGrid, group_index
from compress.types import Packed, Storage, bits_per_weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(
    out: int,
    columns: int,
    bits: int,
    size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.bfloat16,
    ordered: bool = False,
    seed: int = 0,
) -> UniformGrid:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else -(-columns // size)
    codes = torch.randint(2**bits, (out, columns), generator=g, dtype=torch.uint8)
    scales = (torch.randn(out, groups, generator=g) * 0.1).to(dtype)
    zeros = None if symmetric else torch.randint(1, 2**bits, (out, groups), generator=g, dtype=torch.uint8)
    index = group_index(columns, size)[torch.randperm(columns, generator=g)].to(torch.int32) if ordered else None
    return UniformGrid(codes, scales, zeros, bits, size, index)


def same(a: UniformGrid, b: UniformGrid) -> bool:
    """Equal in every field, to the byte."""

    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    return (
        (a.bits, a.group_size, a.activations) == (b.bits, b.group_size, b.activations)
        and equal(a.codes, b.codes)
        and equal(a.scales, b.scales)
        and equal(a.zeros, b.zeros)
        and equal(a.g_idx, b.g_idx)
    )


def again(packed: UniformGrid) -> UniformGrid:
    """Stored and read back."""
    return UniformGrid.from_tensors(packed.tensors(), packed.storage, packed.shape, packed.scales.dtype)


layers = st.builds(
    layer,
    out=st.integers(1, 9),
    columns=st.integers(1, 50),
    bits=st.integers(2, 8),
    size=st.sampled_from([-1, 1, 4, 7, 16, 64]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    ordered=st.booleans(),
    seed=st.integers(0, 10**6),
)


@given(layers)
@settings(deadline=None, max_examples=150)
def test_tensors_and_back(packed: UniformGrid) -> None:
    assert same(again(packed), packed)


@given(layers)
@settings(deadline=None, max_examples=60)
def test_dequantize_is_scale_times_code_less_zero(packed: UniformGrid) -> None:
    """A double loop in Python floats: scale * integer has at most 32 bits, so float64 holds it exactly."""
    out, columns = packed.shape
    exact = torch.empty(out, columns, dtype=torch.float64)
    for r in range(out):
        for c in range(columns):
            if packed.g_idx is not None:
                g = int(packed.g_idx[c])
            else:
                g = 0 if packed.group_size == -1 else c // packed.group_size
            zero = 2 ** (packed.bits - 1) if packed.zeros is None else int(packed.zeros[r, g])
            exact[r, c] = float(packed.scales[r, g]) * (int(packed.codes[r, c]) - zero)
    dense = packed.dequantize()
    assert dense.dtype == packed.scales.dtype
    assert torch.equal(dense, exact.to(packed.scales.dtype))


@given(layers, st.data())
@settings(deadline=None, max_examples=60)
def test_rows(packed: UniformGrid, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, packed.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, packed.shape[0]))
    part = packed.rows(start, stop)
    assert part.shape == (stop - start, packed.shape[1])
    assert part.storage == packed.storage
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    assert same(again(part), part)


@given(layers)
@settings(deadline=None, max_examples=60)
def test_bits_per_weight_counts_bytes(packed: UniformGrid) -> None:
    out, columns = packed.shape
    groups = packed.scales.shape[1]
    bytes_ = 4 * out * -(-columns * packed.bits // 32) + out * groups * (
        4 if packed.scales.dtype == torch.float32 else 2
    )
    if packed.zeros is not None:
        bytes_ += 4 * out * -(-groups * packed.bits // 32)
    if packed.g_idx is not None:
        bytes_ += 4 * columns
    assert bits_per_weight(packed) == pytest.approx(8 * bytes_ / (out * columns), rel=1e-12)
    assert UniformGrid.stored_bytes(packed.storage, packed.shape, packed.scales.dtype) == bytes_
    assert set(packed.tensors()) <= set(UniformGrid.parts)


def test_bits_per_weight_of_a_usual_layer() -> None:
    assert bits_per_weight(layer(64, 256, 4, 128, symmetric=True)) == 4 + 16 / 128
    assert bits_per_weight(layer(64, 256, 3, -1, symmetric=True)) == 3 + 16 / 256
    assert bits_per_weight(layer(64, 1024, 4, 128, symmetric=False)) == 4 + (16 + 4) / 128


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
def test_storage_tells_the_kind(symmetric: bool, ordered: bool) -> None:
    packed = layer(4, 40, 3, 16, symmetric, ordered=ordered)
    assert packed.storage == Storage("uniform", 3, 16, symmetric, ordered)
    assert packed.kind == UniformGrid.kind
    assert isinstance(packed, Packed)


def test_extreme_codes() -> None:
    """The full range of 8 bits: code - zero needs 9 bits and a sign."""
    codes = torch.tensor([[0, 255, 1, 128]], dtype=torch.uint8)
    zeros = torch.tensor([[255]], dtype=torch.uint8)
    for dtype in DTYPES:
        scales = torch.tensor([[-0.5]], dtype=dtype)
        assert UniformGrid(codes, scales, zeros, 8, -1).dequantize().tolist() == [[127.5, 0.0, 127.0, 63.5]]
        assert UniformGrid(codes, scales, None, 8, -1).dequantize().tolist() == [[64.0, -63.5, 63.5, 0.0]]


@given(packed=layers, dtype=st.sampled_from(DTYPES), shape=st.sampled_from([(), (3,), (2, 3), (2, 0)]))
@settings(deadline=None, max_examples=40)
def test_linear_multiplies_by_the_dequantised_weight(
    packed: UniformGrid, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    x = torch.randn(*shape, packed.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    y = packed.linear(x)
    assert y.dtype == dtype
    assert torch.equal(y, torch.nn.functional.linear(x, packed.dequantize().to(dtype)))


@pytest.mark.parametrize("activations", int8.MODES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_eight_bit_product(symmetric: bool, activations: str) -> None:
    """Near the product with the dequantised weight, exactly the one of int8.py, and its mode is stored."""
    packed = replace(layer(9, 50, 8, -1, symmetric, torch.float32), activations=activations)
    x = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(1))
    y = packed.linear(x)
    zeros = None if packed.zeros is None else packed.zeros[:, 0]
    assert torch.equal(y, int8.linear(x, packed.codes, packed.scales[:, 0], zeros, activations))
    dense = x @ packed.dequantize().t()
    assert not torch.equal(y, dense)
    assert float((y - dense).norm()) < 0.02 * float(dense.norm())
    assert packed.storage.activations == activations
    assert Storage.from_json(packed.storage.as_json()) == packed.storage
    assert same(again(packed), packed)
    part = packed.rows(2, 7)
    assert part.activations == activations
    assert torch.equal(part.linear(x), y[..., 2:7])


def test_eight_bit_product_takes_eight_bits_and_one_scale_a_row() -> None:
    x = torch.ones(1, 32)
    for bits, size in ((4, -1), (8, 16)):
        with pytest.raises(AssertionError, match="8-bit codes"):
            replace(layer(4, 32, bits, size, True, torch.float32), activations="token").linear(x)
    one_group = replace(layer(4, 32, 8, 64, True, torch.float32), activations="token")
    assert one_group.linear(x).shape == (1, 4)


def test_group_index() -> None:
    assert group_index(5, -1).tolist() == [0, 0, 0, 0, 0]
    assert group_index(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert group_index(5, 1).tolist() == [0, 1, 2, 3, 4]
    assert group_index(5, 9).tolist() == [0, 0, 0, 0, 0]
