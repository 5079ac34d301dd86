"""Fragment order: the layout that all kernels read, made once when a layer is loaded, and undone exactly.

kernels/README.md draws it. Rows are filled up to tiles of 16 and bands of 4 tiles, columns to chunks of 128. In a chunk
each of the 32 lanes of a warp owns 32 pairs of codes; its words come in pieces of 16 bytes (3 bits: one of 16 and one
of 8), lane by lane.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
CHUNK = 128
BAND = 4  # tiles whose chunks lie together
PAIRS = 32  # a lane and chunk
_ROWS_AT_ONCE = 1024  # bounds the 64-bit temporaries


def inputs(x: Tensor) -> Tensor:
    """x [..., columns] as kernels read it: [tokens, columns], contiguous, filled up with zeros to a multiple of 8
    columns, at a multiple of 16 bytes. Copied only if it must be."""
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    if columns % 8:
        flat = F.pad(flat, (0, -columns % 8))
    flat = flat.contiguous()
    return flat.clone() if flat.data_ptr() % 16 else flat


def tiles(rows: int) -> int:
    return -(-rows // TILE)


def chunks(columns: int) -> int:
    return -(-columns // CHUNK)


def pack(codes: Tensor, bits: int, bytewise: bool = False) -> Tensor:
    """Codes in fragment order.

    Args:
        codes: uint8 [rows, columns], each below 2**bits.
        bits: 2, 3, 4 or 8.
        bytewise: 4 bits only: both codes of a pair in one byte, the first in its lower half (for byte-wise tables).

    Returns:
        int32 [bands, chunks, tiles of a band, 64 * bits].
    """
    parts = [_pack(part, bits, bytewise) for part in torch.split(codes, _ROWS_AT_ONCE)]
    tiled = torch.cat(parts)
    padded = F.pad(tiled, (0, 0, 0, 0, 0, -len(tiled) % BAND))
    return torch.unflatten(padded, 0, (-1, BAND)).transpose(1, 2).contiguous()


def unpack(packed: Tensor, bits: int, rows: int, columns: int, bytewise: bool = False) -> Tensor:
    """uint8 [rows, columns]: exact inverse of `pack`."""
    tiled = packed.transpose(1, 2).flatten(0, 1)[: tiles(rows)]
    parts = [_unpack(part, bits, bytewise) for part in torch.split(tiled, _ROWS_AT_ONCE // TILE)]
    return torch.cat(parts)[:rows, :columns].contiguous()


def _pack(codes: Tensor, bits: int, bytewise: bool) -> Tensor:
    rows, columns = codes.shape
    codes = F.pad(codes, (0, -columns % CHUNK, 0, -rows % TILE))
    count = chunks(columns)
    # row = 8 hi + g, column = 128 chunk + 16 s + 8 h + 2 c + e  ->  lane 4 g + c, pair 4 s + 2 h + hi, element e
    split = codes.reshape(-1, 2, 8, count, 8, 2, 4, 2)
    pairs = split.permute(0, 3, 2, 6, 4, 5, 1, 7).reshape(-1, count, 32, PAIRS, 2).to(torch.int64)
    return _pieces(_words(pairs, bits, bytewise).to(torch.int32))  # to int32 it wraps


def _unpack(packed: Tensor, bits: int, bytewise: bool) -> Tensor:
    count = packed.shape[1]
    pairs = _pairs(_lanes(packed), bits, bytewise)  # [tiles, chunks, 32, 32, 2]
    split = pairs.reshape(-1, count, 8, 4, 8, 2, 2, 2)  # tile, chunk, g, c, s, h, hi, e
    return split.permute(0, 6, 2, 1, 4, 5, 3, 7).reshape(-1, count * CHUNK)


def _words(pairs: Tensor, bits: int, bytewise: bool) -> Tensor:
    """int64 [..., 32 lanes, 32 pairs, 2] -> [..., 32 lanes, 2 * bits]: the words of a lane."""
    if bits == 3:
        both = pairs[..., 0] | pairs[..., 1] << 16
        inside = both[..., :30].reshape(*both.shape[:-1], 6, 5)
        words = reduce(torch.bitwise_or, (inside[..., j] << 3 * j for j in range(5)))
        top = both[..., 30:, None] >> torch.arange(3, device=pairs.device) & 0x10001  # [..., 2 pairs, 3 words]
        return words | top.flatten(-2) << 15
    each = 16 // bits
    steps, second = (8, 4) if bytewise else (bits, 16)
    inside = pairs.reshape(*pairs.shape[:-2], PAIRS // each, each, 2)
    shifts = [(steps * j + second * e, inside[..., j, e]) for j in range(each) for e in range(2)]
    return reduce(torch.bitwise_or, (codes << shift for shift, codes in shifts))


def _pairs(words: Tensor, bits: int, bytewise: bool) -> Tensor:
    """Inverse of `_words`: int32 [..., 2 * bits] -> uint8 [..., 32, 2]."""
    if bits == 3:
        halves = torch.stack([words & 0x7FFF, words >> 16 & 0x7FFF], -1)  # [..., 6, 2]
        inside = torch.stack([halves >> 3 * j & 7 for j in range(5)], -2).flatten(-3, -2)  # [..., 30, 2]
        tops = torch.unflatten(
            torch.stack([words >> 15 & 1, words >> 31 & 1], -1), -2, (2, 3)
        )  # [..., 2 pairs, 3 words, 2]
        last = tops[..., 0, :] | tops[..., 1, :] << 1 | tops[..., 2, :] << 2
        return torch.cat([inside, last], -2).to(torch.uint8)
    each, mask = 16 // bits, (1 << bits) - 1
    steps, second = (8, 4) if bytewise else (bits, 16)
    both = [torch.stack([words >> steps * j + second * e & mask for e in range(2)], -1) for j in range(each)]
    return torch.stack(both, -2).flatten(-3, -2).to(torch.uint8)


def _pieces(words: Tensor) -> Tensor:
    """[tiles, chunks, 32 lanes, words] -> [tiles, chunks, 32 * words]: pieces of four words, lane by lane."""
    whole = words.shape[-1] // 4 * 4
    first = torch.unflatten(words[..., :whole], -1, (-1, 4)).transpose(-3, -2).flatten(-3)
    return torch.cat([first, words[..., whole:].flatten(-2)], -1).contiguous()


def _lanes(packed: Tensor) -> Tensor:
    """Inverse of `_pieces`."""
    count = packed.shape[-1] // 32
    whole = count // 4 * 4
    first = torch.unflatten(packed[..., : 32 * whole], -1, (-1, 32, 4)).transpose(-3, -2).flatten(-2)
    return torch.cat([first, torch.unflatten(packed[..., 32 * whole :], -1, (32, -1))], -1)


def pack_statistics(values: Tensor, columns: int, group_size: int) -> Tensor:
    """Scales, zero points or minima as lanes want them.

    Args:
        values: [rows, groups], any dtype.
        columns: of the layer.
        group_size: 16, 32, 64, or 128 times a power of two; -1 for the whole row.

    Returns:
        [tiles, chunks or longer groups, 8, groups of a chunk, 2]: rows g and g + 8 beside each other. Rows and columns
        that fill up have 0.
    """
    each, shift = group_layout(group_size)
    rows = values.shape[0]
    count = 1 if shift == WHOLE_ROW else -(-chunks(columns) // (1 << shift))
    padded = F.pad(values, (0, count * each - values.shape[1], 0, -rows % TILE))
    return padded.reshape(-1, 2, 8, count, each).permute(0, 3, 2, 4, 1).contiguous()


def unpack_statistics(packed: Tensor, rows: int, groups: int) -> Tensor:
    """[rows, groups]: exact inverse of `pack_statistics`."""
    flat = packed.permute(0, 4, 2, 1, 3).reshape(packed.shape[0] * TILE, -1)
    return flat[:rows, :groups].contiguous()


WHOLE_ROW = 31  # `shift` of a group that is the whole row


def group_layout(group_size: int) -> tuple[int, int]:
    """Groups of a chunk, and log2 of the chunks of a group. Raises ValueError for a size no kernel takes."""
    if group_size == -1:
        return 1, WHOLE_ROW
    if group_size in (16, 32, 64, 128):
        return CHUNK // group_size, 0
    times = group_size // CHUNK
    if group_size > 0 and group_size % CHUNK == 0 and times & (times - 1) == 0:
        return 1, times.bit_length() - 1
    raise ValueError(f"groups of {group_size} columns")


def group_size(groups: int, shift: int) -> int:
    """Inverse of `group_layout`."""
    return -1 if shift == WHOLE_ROW else CHUNK // groups << shift


def pack_second_level(
    scale_codes: Tensor, scale_grid: Tensor, zero_codes: Tensor, zero_grid: Tensor
) -> tuple[Tensor, Tensor]:
    """Two-level statistics of groups of 16 columns as lanes want them.

    Args:
        scale_codes, zero_codes: uint8 [rows, groups], below 16.
        scale_grid, zero_grid: [ceil(rows / 16), groups, 2]: scale and zero point of the 16 rows' codes.

    Returns:
        uint8 [tiles, chunks, 8, 8, 2], the scale's code in the lower half of a byte; and the grids
        [tiles, chunks, 8, 4] in their dtype.
    """
    columns = scale_codes.shape[1] * 16
    packed = pack_statistics(scale_codes | zero_codes << 4, columns, 16)
    grids = torch.cat([scale_grid, zero_grid], -1)
    grids = F.pad(grids, (0, 0, 0, packed.shape[1] * 8 - grids.shape[1]))
    return packed, torch.unflatten(grids, 1, (-1, 8)).contiguous()


def unpack_second_level(packed: Tensor, grids: Tensor, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """float32 [rows, groups], twice: the scales and the zero points that `pack_second_level` was given."""
    codes = unpack_statistics(packed, rows, groups).float()
    low = codes.remainder(16)
    high = (codes - low) / 16
    grid = grids.flatten(1, 2)[:, :groups].float().repeat_interleave(TILE, 0)[:rows]
    return grid[..., 0] * (low - grid[..., 1]), grid[..., 2] * (high - grid[..., 3])
