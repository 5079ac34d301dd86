"""Which kernel computes a product, and in which shape: a table that was measured, or rules where it has no entry."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

_STAGE = 1024  # bytes to which a stage of wide.cu is rounded up
_SHARED = 226 * 1024  # bytes of shared memory that wide.cu may ask for on sm_90


@dataclass(frozen=True)
class Narrow:
    """Shape of a launch of narrow.cu.

    Attributes:
        token_tiles: 8 tokens each.
        row_tiles: 16 rows each, of a warp.
        warps: of a block; they share out the columns.
        depth: chunks that each has on their way.
    """

    token_tiles: int
    row_tiles: int
    warps: int
    depth: int


@dataclass(frozen=True)
class Wide:
    """Shape of a launch of wide.cu.

    Attributes:
        tokens: of a block: 8, 16, 32, 64, 128 or 256.
        stages: places of the ring.
        split: blocks that share out the columns.
        blocks: that share a multiprocessor: 1, or 2 for up to 64 tokens.
        phases: 2 for pairs of warpgroups that take turns, with one block; or 1.
    """

    tokens: int
    stages: int
    split: int
    blocks: int = 1
    phases: int = 1

    def shared(self, kind: int, bits: int) -> int:
        """Bytes of shared memory of a block."""
        stage = self.tokens * 256 + -(-8 * 256 * bits // _STAGE) * _STAGE
        tables = {1: 16 * 32 * 4, 2: 8 * 16 * (2**bits + 2) * 2}.get(kind, 0)
        sums = self.tokens * (132 * 4 if self.split > 1 else 512 if self.phases > 1 else 272)
        return int(max(self.stages * stage + tables, sums))


@dataclass(frozen=True)
class Library:
    """Dequantise, then the library's product."""


@functools.cache
def _hopper(device: int) -> tuple[bool, int]:
    """Whether it has wgmma, and how many multiprocessors."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) == (9, 0), found.multi_processor_count


@functools.lru_cache(4096)
def choose(
    kind: int, bits: int, tokens: int, rows: int, columns: int, device: int, outliers: bool
) -> Narrow | Wide | Library:
    """How to multiply `tokens` inputs by a layer."""
    hopper, processors = _hopper(device)
    if tokens <= (16 if hopper and not outliers else 64 if not outliers else 16):
        return narrow(kind, bits, tokens, rows, columns, processors)
    if hopper and not outliers:
        return wide(kind, bits, tokens, rows, columns, processors)
    return Library()


def narrow(kind: int, bits: int, tokens: int, rows: int, columns: int, processors: int) -> Narrow:
    """The rule for few tokens."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    tiles, chunks = -(-rows // 16), -(-columns // 128)
    row_tiles = 2 if kind == 0 and token_tiles > 1 and tiles >= 2 * processors else 1
    warps = 8 if chunks >= 8 else 4
    if chunks > 64 and row_tiles == 1 and token_tiles == 1:
        warps = 16
    depth = 4 if bits < 8 and kind == 0 and token_tiles * row_tiles == 1 else 2
    return Narrow(token_tiles, row_tiles, warps, depth)


def wide(kind: int, bits: int, tokens: int, rows: int, columns: int, processors: int) -> Wide:
    """The rule for many tokens on Hopper: blocks enough for the device, split by columns where rows are too few."""
    size = 32 if tokens <= 32 else 64 if tokens <= 64 else 128 if tokens <= 128 else 256
    row_blocks = -(-rows // 128)
    split = 1
    while split < 8 and row_blocks * -(-tokens // size) * split * 2 <= processors + 8 and columns // (128 * split) >= 8:
        split *= 2
    return fit(kind, bits, Wide(size, 6, split))


def fit(kind: int, bits: int, way: Wide) -> Wide:
    """With as many stages as there is room for, and fewer tokens if there is none for two."""
    for stages in range(way.stages, 1, -1):
        fewer = replace(way, stages=stages)
        if fewer.shared(kind, bits) <= _SHARED // way.blocks:
            return fewer
    return fit(kind, bits, replace(way, tokens=way.tokens // 2))
