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

#: numbers that are worked on at a time on a CPU: too few for torch to share them out among its threads, which would
#: wait for one another after each of the small steps
_CHUNK = 32_000


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
    if bits == 8:
        padded = F.pad(codes, (0, -n % 4))
        shape = (*codes.shape[:-1], words(n, bits))  # named: a last dimension of 0 has strides that `view` refuses
        return _plain(padded.reshape(-1)).view(torch.int32).reshape(shape)
    padded = F.pad(codes, (0, -n % 32)) if n % 32 else codes
    shape = (*codes.shape[:-1], padded.shape[-1] // 32 * bits)
    eights = _viewed(padded.reshape(padded.numel() // 32, 32), torch.int64)  # [runs, 4], eight codes in each
    packed = torch.empty(len(eights), bits, dtype=torch.int32, device=codes.device)
    for first, last in _chunks(eights):
        part = eights[first:last]
        for lane in (8, 16, 32):  # what two neighbouring lanes hold moves together
            filled = bits * lane // 8
            low = _lanes(2 * lane, filled)
            part = (part & low).bitwise_or_((part >> (lane - filled)).bitwise_and_(low << filled))
        if bits == 4:  # eight codes are a word
            packed[first:last] = part
            continue
        for word in range(bits):
            pieces = [_shifted(part[:, i], at) for i, at in _overlaps(word, bits)]
            for piece in pieces[1:]:
                pieces[0] = pieces[0] | piece
            packed[first:last, word] = pieces[0]  # the cast keeps the low 32 bits
    rows = packed.reshape(shape)
    return _plain(rows[..., : words(n, bits)]) if n % 32 else rows


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Exact inverse of `pack`: int32 [..., words] -> uint8 [..., count].

    Raises:
        ValueError: the words do not hold exactly `count` elements.
    """
    if packed.shape[-1] != words(count, bits):
        raise ValueError(f"{packed.shape[-1]} words cannot hold {count} elements of {bits} bits")
    if bits == 8:
        return _plain(_plain(packed).view(torch.uint8)[..., :count])
    each = -(-count // 32)
    padded = F.pad(packed, (0, each * bits - packed.shape[-1])) if count % 32 else packed
    runs = padded.reshape(padded.numel() // bits, bits)
    eights = torch.empty(len(runs), 4, dtype=torch.int64, device=packed.device)  # eight codes in each
    for first, last in _chunks(runs):
        part = runs[first:last].to(torch.int64)
        if bits != 4:  # where it is 4, eight codes are a word
            part = _gathered(part & 0xFFFFFFFF, bits)
        for lane in (32, 16, 8):
            filled = bits * lane // 8
            low = _lanes(2 * lane, filled)
            part = (part & low).bitwise_or_((part & (low << filled)) << (lane - filled))
        eights[first:last] = part
    rows = eights.view(torch.uint8).reshape(*packed.shape[:-1], each * 32)
    return _plain(rows[..., :count]) if count % 32 else rows


def _gathered(wide: Tensor, bits: int) -> Tensor:
    """int64 [runs, bits], 32 bits in each -> int64 [runs, 4], 8 * bits bits in each (what is above them is not 0)."""
    part = torch.empty(len(wide), 4, dtype=torch.int64, device=wide.device)
    for i in range(4):
        pieces = [_shifted(wide[:, w], -at) for w in range(bits) for j, at in _overlaps(w, bits) if j == i]
        for piece in pieces[1:]:
            pieces[0] = pieces[0] | piece
        part[:, i] = pieces[0]
    return part


def _viewed(runs: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes as wider numbers; without a copy where they lie plainly."""
    plain = runs.stride() == (runs.shape[1], 1) and runs.storage_offset() % dtype.itemsize == 0
    return (runs if plain else _plain(runs)).view(dtype)


def _chunks(runs: Tensor) -> Iterator[tuple[int, int]]:
    """Pieces of a tensor of runs: on a CPU small enough for what is made of them to stay in the cache."""
    step = _CHUNK // max(4, runs.shape[1]) if runs.device.type == "cpu" else max(1, len(runs))
    for first in range(0, len(runs), step):
        yield first, min(first + step, len(runs))


def _lanes(width: int, filled: int) -> int:
    """A mask over 64 bits: the low `filled` bits of every lane of `width`."""
    return sum(((1 << filled) - 1) << at for at in range(0, 64, width))


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
