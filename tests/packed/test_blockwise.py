"""Blockwise: what is stored comes back exactly, and dequantises as its definition says. The code tables."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import tables
from compress.packed.blockwise import NESTED_BLOCK, Blockwise, describe
from compress.types import Packed, Storage, bits_per_weight, tensor_bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def layer(out: int, columns: int, size: int, table: str, nested: bool, dtype: torch.dtype, seed: int) -> Blockwise:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (out, columns), generator=g, dtype=torch.uint8)
    blocks = math.ceil(out * columns / size)
    if not nested:
        return Blockwise(codes, torch.rand(blocks, generator=g), table, size, dtype)
    absmax = torch.randint(256, (blocks,), generator=g, dtype=torch.uint8)
    second = torch.rand(math.ceil(blocks / NESTED_BLOCK), generator=g)
    return Blockwise(codes, absmax, table, size, dtype, second, torch.rand(1, generator=g))


layers = st.builds(
    layer,
    out=st.integers(1, 9),
    columns=st.integers(1, 70),
    size=st.sampled_from([1, 32, 64, 128]),  # 1: more than 256 blocks
    table=st.sampled_from(tables.NAMES),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def same(a: Blockwise, b: Blockwise) -> bool:
    """Equal in every field, to the byte."""
    return (a.table, a.block_size, a.dtype) == (b.table, b.block_size, b.dtype) and all(
        equal(getattr(a, name), getattr(b, name)) for name in Blockwise.parts
    )


@given(layers)
@settings(deadline=None, max_examples=60)
def test_tensors_and_back(packed: Blockwise) -> None:
    stored = packed.tensors()
    assert set(stored) <= set(Blockwise.parts)
    storage = Storage.from_json(packed.storage.as_json())
    assert storage == packed.storage
    assert same(Blockwise.from_tensors(stored, storage, packed.shape, packed.dtype), packed)
    assert Blockwise.stored_bytes(storage, packed.shape, packed.dtype) == tensor_bytes_of(packed)


@given(layers)
@settings(deadline=None, max_examples=40)
def test_dequantize_is_table_times_absmax(packed: Blockwise) -> None:
    """A loop over the flattened matrix. The product of two float32 numbers is exact in a Python float."""
    values = tables.table(packed.table).tolist()
    scales = []
    for block in range(len(packed.absmax)):
        if packed.nested_absmax is None or packed.nested_offset is None:
            scales.append(float(packed.absmax[block]))
            continue
        code = tables.dynamic_map()[int(packed.absmax[block])]
        scales.append(float(code * packed.nested_absmax[block // NESTED_BLOCK] + packed.nested_offset[0]))
    flat = packed.codes.flatten().tolist()
    exact = torch.tensor(
        [values[code] * scales[i // packed.block_size] for i, code in enumerate(flat)], dtype=torch.float64
    )
    dense = packed.dequantize()
    assert dense.dtype == packed.dtype
    assert torch.equal(dense, exact.float().to(packed.dtype).reshape(packed.shape))
    x = torch.randn(2, packed.shape[1], generator=torch.Generator().manual_seed(1)).to(packed.dtype)
    assert torch.equal(packed.linear(x), torch.nn.functional.linear(x, dense))


def test_rows() -> None:
    packed = layer(6, 128, 64, "nf4", False, torch.bfloat16, 1)
    part = packed.rows(2, 5)
    assert part.storage == packed.storage
    assert torch.equal(part.dequantize(), packed.dequantize()[2:5])
    assert same(packed.rows(0, 6), packed)
    crossing = layer(5, 48, 64, "nf4", False, torch.bfloat16, 1)  # four rows fill three blocks
    assert torch.equal(crossing.rows(0, 4).dequantize(), crossing.dequantize()[:4])
    assert torch.equal(crossing.rows(4, 5).dequantize(), crossing.dequantize()[4:])
    with pytest.raises(AssertionError):
        crossing.rows(1, 5)
    nested = layer(6, 128, 64, "nf4", True, torch.bfloat16, 1)
    assert same(nested.rows(0, 6), nested)
    with pytest.raises(AssertionError):
        nested.rows(0, 3)


def test_storage_and_bits() -> None:
    packed = layer(64, 256, 64, "nf4", False, torch.bfloat16, 0)
    assert isinstance(packed, Packed)
    assert packed.storage == Storage("blockwise", 4, 64, details=(("double_quant", False), ("table", "nf4")))
    assert bits_per_weight(packed) == 4.5
    nested = layer(256, 4096, 64, "fp4-bnb", True, torch.bfloat16, 0)
    assert nested.storage == describe("fp4-bnb", 64, True)
    assert bits_per_weight(nested) == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)


def test_nf4_table_is_the_published_one() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(tables.table("nf4"), functional.get_4bit_type("nf4", device="cpu"))
    probability = 1 - (1 / 32 + 1 / 30) / 2
    quantiles = [NormalDist().inv_cdf(0.5 + (probability - 0.5) * i / 8) for i in range(1, 9)]
    quantiles += [-NormalDist().inv_cdf(0.5 + (probability - 0.5) * i / 7) for i in range(8)]
    wanted = torch.tensor(sorted(quantiles), dtype=torch.float64) / max(quantiles)
    torch.testing.assert_close(tables.table("nf4").double(), wanted, rtol=0, atol=2e-7)


def test_float_tables() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(tables.table("fp4-bnb"), functional.get_4bit_type("fp4", device="cpu"))
    wanted = {
        "fp4-e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6],
        "fp4-e1m2": [0, 1, 2, 3, 4, 5, 6, 7],
        "fp4-e3m0": [0, 1, 2, 4, 8, 16, 32, 64],
    }
    for name, half in wanted.items():
        positive = torch.tensor(half) / max(half)
        assert torch.equal(tables.table(name), torch.cat([positive, -positive]))
        assert not torch.signbit(tables.table(name)[8])
    with pytest.raises(KeyError):
        tables.table("fp4")


def test_levels_are_the_values_in_order() -> None:
    for name in tables.NAMES:
        values, codes = tables.levels(name)
        assert bool((values.diff() > 0).all())
        assert torch.equal(tables.table(name)[codes.long()], values)
        assert set(values.tolist()) == set(tables.table(name).tolist())
        assert int(codes[values == 0]) == int((tables.table(name) == 0).nonzero()[0])


def test_dynamic_map_is_that_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(tables.dynamic_map(), functional.create_dynamic_map())
