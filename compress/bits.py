"""Small unsigned integers <-> 32-bit words: one packer for every format.

Layout: a little-endian bit string; element i of a row occupies bits i*b .. i*b+b-1. For 2, 4 and 8 bits no element
crosses a word; for 3, 5, 6 and 7 bits some do ("dense"). This is compressed-tensors' layout (0.18 and later) along a
row, and GPTQ's along a column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

#: runs of 32 codes that are packed at a time on a CPU
_CHUNK = 8192


def words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` elements of `bits` bits."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: uint8 [..., n], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(n * bits / 32)]; unused high bits of the last word are zero.
    """
    n = codes.shape[-1]
    padded = F.pad(codes, (0, -n % 32)) if n % 32 else codes
    runs = padded.reshape(padded.numel() // 32, 32)
    packed = torch.empty(len(runs), bits, dtype=torch.int32, device=codes.device)
    for first, last in _chunks(runs):
        if bits == 8:
            packed[first:last] = _plain(runs[first:last]).view(torch.int32)
            continue
        eights = _plain(runs[first:last]).view(torch.int64)  # [runs, 4], eight codes in each
        for lane in (8, 16, 32):  # the codes of two neighbouring lanes move together, into one of twice the width
            filled = bits * lane // 8
            moved = eights >> (lane - filled)
            moved |= eights
            eights = moved.bitwise_and_(_lanes(2 * lane, 2 * filled))
        for word in range(bits):
            pieces = [_shifted(eights[:, i], at) for i, at in _overlaps(word, bits)]
            for piece in pieces[1:]:
                pieces[0] = pieces[0] | piece
            packed[first:last, word] = pieces[0]  # the cast keeps the low 32 bits
    rows = packed.reshape(*codes.shape[:-1], padded.shape[-1] // 32 * bits)
    return _plain(rows[..., : words(n, bits)]) if n % 32 else rows


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Exact inverse of `pack`: int32 [..., words] -> uint8 [..., count].

    Raises:
        ValueError: the words do not hold exactly `count` elements.
    """
    if packed.shape[-1] != words(count, bits):
        raise ValueError(f"{packed.shape[-1]} words cannot hold {count} elements of {bits} bits")
    each = -(-count // 32)
    padded = F.pad(packed, (0, each * bits - packed.shape[-1])) if count % 32 else packed
    runs = padded.reshape(padded.numel() // bits, bits)
    codes = torch.empty(len(runs), 32, dtype=torch.uint8, device=packed.device)
    for first, last in _chunks(runs):
        if bits == 8:
            codes[first:last] = _plain(runs[first:last]).view(torch.uint8)
            continue
        wide = runs[first:last].to(torch.int64) & 0xFFFFFFFF
        eights = torch.zeros(last - first, 4, dtype=torch.int64, device=packed.device)
        for word in range(bits):
            for i, at in _overlaps(word, bits):
                eights[:, i] |= _shifted(wide[:, word], -at)
        eights &= (1 << 8 * bits) - 1
        for lane in (32, 16, 8):
            filled = bits * lane // 8
            moved = eights << (lane - filled)
            moved |= eights
            eights = moved.bitwise_and_(_lanes(lane, filled))
        codes[first:last] = eights.view(torch.uint8)
    rows = codes.reshape(*packed.shape[:-1], each * 32)
    return _plain(rows[..., :count]) if count % 32 else rows


def _chunks(runs: Tensor) -> Iterator[tuple[int, int]]:
    """Pieces of a tensor of runs: on a CPU small enough for what is made of them to stay in the cache."""
    step = _CHUNK if runs.device.type == "cpu" else max(1, len(runs))
    for first in range(0, len(runs), step):
        yield first, min(first + step, len(runs))


def _lanes(width: int, filled: int) -> int:
    """A mask over 64 bits: the low `filled` bits of every lane of `width`, as a signed number."""
    mask = sum(((1 << filled) - 1) << at for at in range(0, 64, width))
    return mask - (1 << 64) if mask >> 63 else mask


def _overlaps(word: int, bits: int) -> list[tuple[int, int]]:
    """Which of a run's four groups of eight codes lie in its 32-bit word: (group, its first bit less the word's)."""
    starts = [(i, 8 * bits * i - 32 * word) for i in range(4)]
    return [(i, at) for i, at in starts if -8 * bits < at < 32]


def _shifted(x: Tensor, by: int) -> Tensor:
    """x << by, or x >> -by."""
    return x << by if by > 0 else x >> -by if by < 0 else x


def _plain(x: Tensor) -> Tensor:
    """A copy with plain strides: `contiguous` keeps odd ones on dimensions of size 1, and then `view` refuses."""
    return x.clone(memory_format=torch.contiguous_format)
