"""Sparse: what is stored comes back exactly, and takes the bits that the pattern says."""

from __future__ import annotations

from itertools import combinations, islice
from math import ceil, comb, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import bits as bitpack
from compress.packed.dense import Dense
from compress.packed.sparse import Sparse, mask_words, pack_mask, storage_around, unpack_mask
from compress.packed.uniform import UniformGrid, group_index
from compress.solvers.masks import Pattern, by_score
from compress.types import Packed, Storage, bits_per_weight, tensor_bytes_of

NM = [(2, 4), (1, 4), (3, 4), (4, 8), (3, 8), (5, 6), (1, 2), (8, 16), (15, 16), (9, 18), (20, 32)]
patterns = st.one_of(
    st.sampled_from(NM).map(lambda nm: Pattern(*nm)),
    st.builds(Pattern, sparsity=st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.95]), by_row=st.booleans()),
)


def layer(
    pattern: Pattern, rows: int, groups: int, bits: int | None, size: int, symmetric: bool, ordered: bool, seed: int
) -> Sparse:
    g = torch.Generator().manual_seed(seed)
    columns = groups * (pattern.m or 5)
    mask = by_score(torch.rand(rows, columns, generator=g), pattern)
    if bits is None:
        values = torch.where(mask, torch.randn(rows, columns, generator=g), 0.0).to(torch.bfloat16)
        values[:, :2] *= 0  # a kept value may be zero
        return Sparse(mask, Dense(values), pattern)
    count = 1 if size == -1 else -(-columns // size)
    codes = torch.randint(2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = (torch.randn(rows, count, generator=g) * 0.1).to(torch.bfloat16)
    zeros = None if symmetric else torch.randint(1, 2**bits, (rows, count), generator=g, dtype=torch.uint8)
    index = group_index(columns, size)
    g_idx = index[torch.randperm(columns, generator=g)].to(torch.int32) if ordered else None
    of = index if g_idx is None else g_idx.long()
    level0 = torch.full_like(codes, 2 ** (bits - 1)) if zeros is None else zeros[:, of]
    return Sparse(mask, UniformGrid(torch.where(mask, codes, level0), scales, zeros, bits, size, g_idx), pattern)


layers = st.builds(
    layer, patterns, st.integers(1, 5), st.integers(1, 9), st.sampled_from([None, 2, 3, 4, 8]),
    st.sampled_from([-1, 3, 16]), st.booleans(), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip


def assert_same(a: Sparse, b: Sparse) -> None:
    assert a.pattern == b.pattern
    assert torch.equal(a.mask, b.mask)
    one, two = a.inner, b.inner
    assert type(one) is type(two)
    assert one.storage == two.storage
    for (name, x), (other, y) in zip(one.tensors().items(), two.tensors().items(), strict=True):
        assert name == other
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@given(layers)
@settings(deadline=None, max_examples=120)
def test_tensors_and_back(packed: Sparse) -> None:
    tensors = packed.tensors()
    assert set(tensors) <= {*Sparse.parts, *packed.inner.parts}
    storage = Storage.from_json(packed.storage.as_json())
    assert storage == packed.storage
    back = Sparse.from_tensors(tensors, storage, packed.shape, torch.bfloat16)
    assert_same(back, packed)
    assert torch.equal(back.dequantize(), packed.dequantize())
    assert Sparse.stored_bytes(storage, packed.shape, torch.bfloat16) == tensor_bytes_of(packed)


@given(layers, st.data())
@settings(deadline=None, max_examples=50)
def test_rows(packed: Sparse, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, packed.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, packed.shape[0]))
    part = packed.rows(start, stop)
    assert part.storage == packed.storage
    assert torch.equal(part.dequantize(), packed.dequantize()[start:stop])
    if packed.pattern.m or packed.pattern.by_row:
        assert_same(Sparse.from_tensors(part.tensors(), part.storage, part.shape, torch.bfloat16), part)


def stored_by_hand(mask: Tensor, pattern: Pattern) -> int:
    """The bit string of one row of the mask, from its definition, as a number."""
    width = ceil(log2(comb(pattern.m, pattern.n)))
    ranked = pattern.m <= 16 and width < pattern.m
    subsets = (
        sorted(combinations(range(pattern.m), pattern.n), key=lambda s: s[::-1]) if ranked else []
    )  # colexicographic
    number = shift = 0
    for group in mask.reshape(-1, pattern.m).tolist():
        places = tuple(i for i, kept in enumerate(group) if kept)
        if (pattern.n, pattern.m) == (2, 4):
            number |= (places[0] | places[1] << 2) << shift
            shift += 4
        elif ranked:
            number |= subsets.index(places) << shift
            shift += width
        else:
            number |= sum(1 << i for i in places) << shift
            shift += pattern.m
    return number


@pytest.mark.parametrize(("n", "m"), NM)
def test_every_mask_of_a_group(n: int, m: int) -> None:
    """Against the ranks of all subsets listed in order, and the layout that the module's text gives."""
    pattern = Pattern(n, m)
    sets = list(islice(combinations(range(m), n), 13000))  # all of them up to 8 of 16
    mask = torch.zeros(len(sets), m, dtype=torch.bool)
    mask[torch.arange(len(sets))[:, None], torch.tensor(sets)] = True
    packed = pack_mask(mask, pattern)
    assert torch.equal(unpack_mask(packed, pattern, m), mask)
    for i in range(0, len(sets), max(1, len(sets) // 20)):
        words = [int(w) & 0xFFFFFFFF for w in packed[i]]
        assert sum(w << 32 * j for j, w in enumerate(words)) == stored_by_hand(mask[i], pattern)


@pytest.mark.parametrize(
    ("n", "m", "bits_a_group"), [(2, 4, 4), (1, 4, 2), (4, 8, 7), (1, 8, 3), (8, 16, 14), (1, 2, 1), (9, 18, 18)]
)
def test_bits_of_the_mask(n: int, m: int, bits_a_group: int) -> None:
    assert mask_words(Pattern(n, m), 64 * m) == 2 * bits_a_group
    many = by_score(torch.rand(3, 64 * m), Pattern(n, m))
    assert torch.equal(unpack_mask(pack_mask(many, Pattern(n, m)), Pattern(n, m), 64 * m), many)


def test_bits_per_weight_of_usual_layers() -> None:
    def of(pattern: Pattern, bits: int | None) -> float:
        columns = 256
        mask = by_score(torch.rand(64, columns), pattern)
        if bits is None:
            return bits_per_weight(Sparse(mask, Dense(mask.to(torch.bfloat16)), pattern))
        codes = torch.full((64, columns), 2 ** (bits - 1), dtype=torch.uint8)
        scales = torch.ones(64, 2, dtype=torch.bfloat16)
        return bits_per_weight(Sparse(mask, UniformGrid(codes, scales, None, bits, 128), pattern))

    assert of(Pattern(2, 4), 4) == 3 + 16 / 128  # 2 bits of codes, 1 of positions, scales
    assert of(Pattern(2, 4), None) == 8 + 1
    assert of(Pattern(4, 8), 4) == 2 + 7 / 8 + 16 / 128
    assert of(Pattern(sparsity=0.5), 4) == 3 + 16 / 128
    assert of(Pattern(sparsity=0.75), None) == 4 + 1


def test_kept_codes_are_dense() -> None:
    """3-bit codes of kept weights, row after row without a gap where rows differ in length."""
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    codes = torch.where(mask, torch.tensor([[1, 0, 2, 3], [0, 0, 5, 0]], dtype=torch.uint8), 4).to(torch.uint8)
    packed = Sparse(mask, UniformGrid(codes, torch.ones(2, 1), None, 3, -1), Pattern(sparsity=0.5))
    kept = packed.tensors()["kept"]
    assert bitpack.unpack(kept, 3, 4).tolist() == [1, 2, 3, 5]
    assert packed.tensors()["mask"].flatten().tolist() == [0b1101, 0b0100]


def test_protocol_and_wrap() -> None:
    dense = layer(Pattern(2, 4), 4, 4, None, -1, True, False, 0)
    assert isinstance(dense, Packed)
    assert dense.storage == Storage("sparse", 16, details=(("m", 4), ("n", 2)), inner=Storage("dense", 16))
    codes = layer(Pattern(2, 4), 4, 4, 4, 16, False, False, 0)
    wrapped = Sparse.wrap(codes.mask, codes.inner, like=dense)
    assert_same(wrapped, codes)
    assert wrapped.storage == storage_around(codes.inner.storage, dense.pattern)
    assert wrapped.storage.inner == Storage("uniform", 4, 16, False)
    assert (wrapped.storage.bits, wrapped.storage.group_size, wrapped.storage.symmetric) == (4, 16, False)
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(wrapped.linear(x), x @ wrapped.dequantize().float().t())


def test_nothing_is_lost_silently() -> None:
    mask = torch.tensor([[True, True, False, False]])
    with pytest.raises(AssertionError, match="not zero"):
        Sparse(mask, Dense(torch.ones(1, 4)), Pattern(2, 4)).tensors()
    with pytest.raises(AssertionError, match="more or fewer"):
        Sparse(mask, Dense(torch.zeros(1, 4)), Pattern(1, 4)).tensors()
