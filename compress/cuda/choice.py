"""Which kernel computes a product, and in which shape: a table that was measured, or rules where it has no entry."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, replace

import torch

from compress.cuda import tuned

_STAGE = 1024  # bytes to which a stage of wide.cu is rounded up
_SHARED = 226 * 1024  # bytes of shared memory that wide.cu may ask for on sm_90
_TABLE, _BOOK = 1, 2  # kinds of ops.py that have tables in shared memory


@dataclass(frozen=True)
class Single:
    """Shape of a launch of single.cu.

    Attributes:
        row_tiles: 16 rows each, of a block.
        warps: of a block; they share out the columns.
        depth: chunks that each has on their way.
    """

    row_tiles: int
    warps: int
    depth: int

    def shared(self, kind: int, bits: int, outliers: bool) -> int:
        """Bytes of shared memory of a block."""
        tables = {_TABLE: 256 * 32 * 4, _BOOK: self.row_tiles * _book(bits)}.get(kind, 0)
        return int(tables + 64 * self.row_tiles * (self.warps + outliers))


@dataclass(frozen=True)
class Narrow:
    """Shape of a launch of narrow.cu.

    Attributes:
        token_tiles: 8 tokens each.
        row_tiles: 16 rows each, of a warp.
        warps: teams of a block, of a warp each unless `beside` is more; they share out the columns.
        depth: chunks that each has on their way.
        beside: warps of a team, with rows of their own.
        split: blocks that share out the columns: more than 1 on Hopper only.
    """

    token_tiles: int
    row_tiles: int
    warps: int
    depth: int
    beside: int = 1
    split: int = 1

    @property
    def tiles(self) -> int:
        """Of 16 rows, of a block."""
        return self.row_tiles * self.beside

    @property
    def macros(self) -> tuple[tuple[str, int], ...]:
        """Of narrow.cu."""
        return (
            ("NT", self.token_tiles), ("RT", self.row_tiles), ("WARPS", self.warps), ("DEPTH", self.depth),
            ("BESIDE", self.beside), ("SPLIT", self.split),
        )  # fmt: skip

    def grid(self, tokens: int, rows: int) -> tuple[int, int, int]:
        """Blocks in x, y, z."""
        return -(-rows // (16 * self.tiles)), -(-tokens // (8 * self.token_tiles)), self.split

    def shared(self, kind: int, bits: int, groups: int, tokens: int, outliers: bool, chunk: int = 128) -> int:
        """Bytes of shared memory of a block for so many inputs; chunks of so many columns and groups."""
        taken = 8 * self.token_tiles
        after = self.token_tiles == 1 or (self.token_tiles == 2 and groups <= 2)  # as in narrow.cu
        lookup = (256 if after else 16) * 32 * 4
        tables = {_TABLE: lookup, _BOOK: self.tiles * _book(bits)}.get(kind, 0)
        corrections = 64 * self.tiles // self.split * taken if outliers else 0
        inputs = self.warps * self.depth * min(tokens, taken) * (2 * chunk + 16)
        sums = 64 * self.tiles * (self.warps * (taken + 1) + (taken if self.split > 1 else 0))
        return int(tables + corrections + max(inputs, sums))


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
        tables = {_TABLE: 16 * 32 * 4, _BOOK: 8 * _book(bits)}.get(kind, 0)
        sums = self.tokens * (132 * 4 if self.split > 1 else 512 if self.phases > 1 else 272)
        return int(max(self.stages * stage + tables, sums))


@dataclass(frozen=True)
class Library:
    """Dequantise, then the library's product."""


Way = Single | Narrow | Wide | Library
_NAMES: dict[str, type[Way]] = {"single": Single, "narrow": Narrow, "wide": Wide, "library": Library}

#: kinds of ops.py whose weights cost more to make than a block of wide.cu can hide
_SLOW_TO_MAKE = (2, 3)


def _book(bits: int) -> int:
    """Bytes of a tile's numbers of BOOK."""
    return int(16 * (2**bits + 2) * 2)


@functools.cache
def _card(device: int) -> tuple[bool, int, str]:
    """Whether it has wgmma, how many multiprocessors, and its name."""
    found = torch.cuda.get_device_properties(device)
    return (found.major, found.minor) == (9, 0), found.multi_processor_count, found.name


@functools.lru_cache(4096)
def choose(kind: int, bits: int, tokens: int, rows: int, columns: int, device: int, outliers: bool) -> Way:
    """How to multiply `tokens` inputs by a layer.

    Args:
        kind, bits: as in ops.Layer.
        tokens: 1 or more.
        rows, columns: out_features, in_features.
        device: CUDA's index.
        outliers: single weights are corrected, which narrow.cu alone does on the way.
    """
    hopper, processors, name = _card(device)
    known = tuned.nearest(tuned.load(name), kind, bits, tokens, rows, columns)
    found = None if known is None else parsed(known)
    if found is not None and not (outliers and isinstance(found, Wide)):
        return found
    return rule(kind, bits, tokens, rows, columns, hopper, processors, outliers)


def parsed(written: tuned.Way) -> Way | None:
    """A way of the table; None for one that an older version wrote."""
    name, *numbers = written
    kind = _NAMES.get(str(name))
    return kind(*map(int, numbers)) if kind is not None and len(fields(kind)) == len(numbers) else None


def rule(
    kind: int, bits: int, tokens: int, rows: int, columns: int, hopper: bool, processors: int, outliers: bool
) -> Way:
    """What is done where nothing similar was measured."""
    if tokens == 1:
        return single(bits, rows, columns, processors)
    if tokens <= 16 or (tokens <= 64 and not hopper and not outliers):
        return narrow(kind, bits, tokens, rows, columns, processors, hopper)
    if hopper and not outliers and kind not in _SLOW_TO_MAKE:
        return wide(kind, bits, tokens, rows, columns, processors)
    return Library()


def single(bits: int, rows: int, columns: int, processors: int) -> Single:
    """The rule for one token: so many warps that each processor has about sixteen."""
    tiles, chunks = -(-rows // 16), -(-columns // 128)
    warps = 16 if tiles < 2 * processors else 8 if tiles < 6 * processors else 4
    return Single(1, min(warps, 4 if chunks < 8 else 8 if chunks < 16 else 16), 2 if bits == 8 else 3)


def narrow(kind: int, bits: int, tokens: int, rows: int, columns: int, processors: int, hopper: bool = False) -> Narrow:
    """The rule for few tokens: blocks as high as leave one to (nearly) each processor, since all rows of a block share
    its inputs; with 9 to 16 tokens on Hopper twice as high, and two blocks to a cluster."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    tiles, chunks = -(-rows // 16), -(-columns // 128)
    if token_tiles > 2:
        row_tiles = 2 if tiles >= processors and token_tiles == 4 else 1
        return Narrow(token_tiles, row_tiles, 8 if chunks >= 8 else 4, 1)
    high = next((t for t in (8, 4, 2) if tiles >= 0.9 * t * processors), 1)
    split = 2 if hopper and token_tiles == 2 and high in (2, 4) and chunks >= 8 else 1
    high *= split
    beside = {8: 4, 4: 2 if token_tiles == 1 else 4, 2: token_tiles, 1: 1}[high]
    teams = 2 if high == 8 else 4 if beside == 4 else 8
    while teams > max(2, chunks // split):
        teams //= 2
    depth = 2 if bits == 8 or kind != 0 else 3
    return Narrow(token_tiles, high // beside, teams, depth, beside, split)


def wide(kind: int, bits: int, tokens: int, rows: int, columns: int, processors: int) -> Wide:
    """The rule for many tokens on Hopper: blocks enough for the device, split by columns where rows are too few."""
    bands = -(-rows // 128)
    size = next((s for s in (16, 32, 64, 128) if tokens <= s), 256)
    if size == 256 and bands * -(-tokens // size) < 0.45 * processors:
        size = 128
    blocks = bands * -(-tokens // size)
    split = 2 if 2 * blocks <= processors and columns >= 1024 else 1
    if size > 64:
        return fit(kind, bits, Wide(size, 6, split))
    if blocks * split > 1.25 * processors:
        return fit(kind, bits, Wide(size, 4, split, blocks=2))
    return fit(kind, bits, Wide(size, 6, split, phases=2))


def fit(kind: int, bits: int, way: Wide) -> Wide:
    """With as many stages as there is room for, and fewer tokens if there is none for two."""
    for stages in range(way.stages, 1, -1):
        fewer = replace(way, stages=stages)
        if fewer.shared(kind, bits) <= _SHARED // way.blocks:
            return fewer
    return fit(kind, bits, replace(way, tokens=way.tokens // 2))
