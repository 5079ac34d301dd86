"""The ways in which a layer in fragment order can be multiplied: to run one, to write it down, to list those to try."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.cuda import choice, ops
from compress.cuda.tuned import Way as Written

Way = choice.Way

_REGISTERS, _MOST_REGISTERS = 65536, 255  # of a multiprocessor, of a thread
_OTHERS = 48  # registers of a thread besides codes, statistics and sums
_PITCH = 272  # bytes of a token's part of a chunk
_SIZES = (8, 16, 32, 64, 128, 256)  # tokens of a block of wide.cu
_SHARES = ((1, 1, 256), (1, 2, 64), (2, 1, 64), (3, 1, 16))  # its blocks and phases, up to so many tokens


def multiply(x: Tensor, layer: ops.Layer, out: Tensor, way: Way) -> None:
    """x [tokens, columns] times a layer into out, in one way."""
    if isinstance(way, choice.Narrow):
        ops.narrow(x, layer, out, way)
    elif isinstance(way, choice.Wide):
        ops.broad(x, layer, out, way)
    else:
        weight = torch.ops.compress.dequantize(*layer.arguments, x.shape[1], x.dtype)
        torch.mm(x, weight.t(), out=out)


def written(way: Way) -> Written:
    """("narrow", 1, 2, 8, 3)"""
    return (type(way).__name__.lower(), *vars(way).values())


def candidates(
    layer: ops.Layer, shape: tuple[int, int], tokens: int, hopper: bool, processors: int, shared: int
) -> list[Way]:
    """What is worth a try: what fits registers and shared memory, and is not plainly too small or too large.

    Args:
        layer: of the kind, of any size.
        shape: rows and columns of those that are meant.
        tokens: inputs.
        hopper: the device has wgmma.
        processors: multiprocessors.
        shared: bytes of shared memory that a block can have.
    """
    found: list[Way] = [w for w in _narrow(tokens) if _fits(w, layer, shape, tokens, shared)]
    if hopper and layer.outlier_rows is None and tokens > 2:
        found += dict.fromkeys(_wide(layer, shape, tokens, processors))
    if tokens >= 64 or not found:
        found.append(choice.Library())
    return found


def _narrow(tokens: int) -> Iterator[choice.Narrow]:
    if tokens > 64:
        return
    most = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    for token_tiles in (most, most // 2) if most > 2 else (most,):
        for row_tiles in (1, 2) if most == 1 else (1, 2, 4):
            for warps in (4, 8, 16):
                for depth in (2, 3, 4) if most == 1 else (1, 2, 3):
                    yield choice.Narrow(token_tiles, row_tiles, warps, depth)


def _fits(way: choice.Narrow, layer: ops.Layer, shape: tuple[int, int], tokens: int, shared: int) -> bool:
    """By an estimate; what still does not fit fails when it is compiled or launched, and costs a moment."""
    if way.warps > max(4, -(-shape[1] // 128)) or way.row_tiles * 16 > max(16, shape[0]):
        return False
    statistics = 12 if layer.kind == ops.BILEVEL else layer.groups * (2 if layer.offsets is not None else 1)
    held = way.depth * way.row_tiles * (2 * layer.bits + statistics)
    registers = held + 4 * way.row_tiles * (way.token_tiles + 1) + 4 * way.token_tiles + _OTHERS
    if registers > min(_MOST_REGISTERS, _REGISTERS // (32 * way.warps)):
        return False
    taken = 8 * way.token_tiles
    inputs = way.warps * way.depth * min(tokens, taken) * _PITCH
    sums = way.warps * way.row_tiles * 16 * (taken + 1) * 4
    tables = {ops.TABLE: 32768 if way.token_tiles == 1 else 2048, ops.BOOK: way.row_tiles * 32 * (2**layer.bits + 2)}
    corrections = 64 * way.row_tiles * taken if layer.outlier_rows is not None else 0
    return bool(tables.get(layer.kind, 0) + corrections + max(inputs, sums) <= shared)


def _wide(layer: ops.Layer, shape: tuple[int, int], tokens: int, processors: int) -> Iterator[choice.Wide]:
    """Columns are split only where there are blocks to spare for it."""
    enough = next((s for s in _SIZES if s >= tokens), _SIZES[-1])
    for size in (enough, enough // 2) if enough > 64 else (enough,):
        tiles = -(-shape[0] // 128) * -(-tokens // size)
        for blocks, phases in ((b, p) for b, p, most in _SHARES if size <= most):
            places = 2 * blocks * processors
            for split in (s for s in (1, 2, 4, 8) if s == 1 or (shape[1] >= 256 * s and tiles * s <= places)):
                for stages in (4, 8):
                    yield choice.fit(layer.kind, layer.bits, choice.Wide(size, stages, split, blocks, phases))
