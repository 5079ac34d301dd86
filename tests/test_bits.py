"""Packing: exact for every width and odd tail, and the layout is a little-endian bit string."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import bits as bitpack

WIDTHS = range(1, 9)


def as_words(codes: list[int], width: int) -> list[int]:
    """The layout in Python integers: element i occupies bits i*width.. of one long number."""
    number = sum(code << (i * width) for i, code in enumerate(codes))
    count = -(-len(codes) * width // 32)
    words = [(number >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [w - (1 << 32) if w >> 31 else w for w in words]


def random_codes(shape: tuple[int, ...], width: int, seed: int = 0) -> Tensor:
    return torch.randint(2**width, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[int]]:
    width = draw(st.integers(1, 8))
    return width, draw(st.lists(st.integers(0, 2**width - 1), min_size=1, max_size=140))


@given(rows_of_codes())
@settings(deadline=None, max_examples=300)
def test_layout_and_inverse(case: tuple[int, list[int]]) -> None:
    width, codes = case
    packed = bitpack.pack(torch.tensor(codes, dtype=torch.uint8), width)
    assert packed.dtype == torch.int32
    assert packed.tolist() == as_words(codes, width)
    back = bitpack.unpack(packed, width, len(codes))
    assert back.dtype == torch.uint8
    assert back.tolist() == codes


@pytest.mark.parametrize("width", WIDTHS)
def test_every_tail(width: int) -> None:
    for count in range(1, 100):
        codes = random_codes((3, count), width, count)
        packed = bitpack.pack(codes, width)
        assert packed.shape == (3, bitpack.words(count, width))
        assert packed.tolist() == [as_words(row, width) for row in codes.tolist()]
        assert torch.equal(bitpack.unpack(packed, width, count), codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_extreme_codes_do_not_leak_into_neighbours(width: int) -> None:
    top = 2**width - 1
    for count in (1, 31, 32, 33, 97):
        for hot in {0, count // 2, count - 1}:
            codes = torch.zeros(count, dtype=torch.uint8)
            codes[hot] = top
            for case in (codes, top - codes):
                assert torch.equal(bitpack.unpack(bitpack.pack(case, width), width, count), case)


@pytest.mark.parametrize("width", WIDTHS)
def test_unused_high_bits_are_zero(width: int) -> None:
    for count in (1, 5, 33):
        packed = bitpack.pack(torch.full((count,), 2**width - 1, dtype=torch.uint8), width)
        number = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(packed))
        assert number == (1 << (count * width)) - 1


@pytest.mark.parametrize("width", WIDTHS)
def test_batch_dimensions(width: int) -> None:
    codes = random_codes((2, 3, 5, 37), width)
    packed = bitpack.pack(codes, width)
    assert packed.shape == (2, 3, 5, bitpack.words(37, width))
    assert torch.equal(bitpack.unpack(packed, width, 37), codes)
    for i in range(2):
        for j in range(3):
            assert torch.equal(packed[i, j], bitpack.pack(codes[i, j], width))


@pytest.mark.parametrize("width", WIDTHS)
def test_strided_input(width: int) -> None:
    codes = random_codes((40, 6), width).t()  # not contiguous
    before = codes.clone()
    packed = bitpack.pack(codes, width)
    assert torch.equal(packed, bitpack.pack(codes.contiguous(), width))
    assert torch.equal(codes, before)
    strided = packed.t().contiguous().t()
    assert torch.equal(bitpack.unpack(strided, width, 40), codes)
    assert torch.equal(bitpack.unpack(bitpack.pack(codes[1:, 3:], width), width, 37), codes[1:, 3:])


@pytest.mark.parametrize("width", WIDTHS)
def test_dimensions_of_size_one(width: int) -> None:
    """torch calls them contiguous whatever their stride, and then refuses to view them as another type."""
    for count in range(1, 40):
        codes = random_codes((count, 6), width, count)
        for case in (codes[:, :1].t(), codes[:1, :1], codes[:1], codes[:, 2:3], codes[:1].t(), codes[None, :, :1]):
            packed = bitpack.pack(case, width)
            assert torch.equal(packed, bitpack.pack(case.clone(memory_format=torch.contiguous_format), width))
            assert packed.stride(-1) == 1
            spread = torch.stack([packed, packed], dim=-1)[..., 0]
            turned = packed.transpose(-1, -2).contiguous().transpose(-1, -2)
            for words in (packed, spread, turned):
                assert torch.equal(bitpack.unpack(words, width, case.shape[-1]), case)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("off", [-1, 1])
def test_wrong_word_count(width: int, off: int) -> None:
    words = bitpack.words(100, width) + off
    with pytest.raises(ValueError, match=f"{words} words cannot hold 100 elements of {width} bits"):
        bitpack.unpack(torch.zeros(2, words, dtype=torch.int32), width, 100)


def test_words_count_the_bits() -> None:
    for width in WIDTHS:
        for count in range(200):
            words = bitpack.words(count, width)
            assert 32 * (words - 1) < count * width <= 32 * words
