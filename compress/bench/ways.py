"""The ways in which a layer can be multiplied: to run one, to write it down, to list those to try.

Layers in fragment order have them, and those on a grid that are pruned 2:4; what differs between the two stands here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from compress.bench.layers import Laid, Shape, Subject
from compress.cuda import choice, layout, ops, pruned
from compress.cuda.pruned import PrunedGrid
from compress.cuda.tuned import Way as Written

Way = choice.Way
Few = choice.Single | choice.Narrow
Layer = ops.Layer | PrunedGrid

_REGISTERS, _MOST_REGISTERS = 65536, 255  # of a multiprocessor, of a thread
_OTHERS = 48  # registers of a thread besides codes, statistics and sums
_SIZES = (8, 16, 32, 64, 128, 256)  # tokens of a block of wide.cu
_SHARES = ((1, 1, 256), (1, 2, 64), (2, 1, 64), (3, 1, 16))  # its blocks and phases, up to so many tokens


def layer_of(subject: Subject) -> Layer | None:
    """What is multiplied, of what is timed; None where there are no ways to choose from."""
    if isinstance(subject, Laid):
        return subject.layer
    return subject if isinstance(subject, PrunedGrid) else None


def chosen(layer: Layer, shape: Shape, tokens: int, device: int) -> Way:
    """How the operator would multiply so many inputs by a layer of that kind and of some shape."""
    if isinstance(layer, PrunedGrid):
        return pruned.choose(layer.bits, tokens, *shape, device)
    return choice.choose(layer.kind, layer.bits, tokens, *shape, device, layer.outlier_rows is not None)


def forget() -> None:
    """Let `chosen` look into the table again."""
    choice.choose.cache_clear()
    pruned.choose.cache_clear()


def multiply(x: Tensor, layer: Layer, out: Tensor, way: Way) -> None:
    """x [tokens, columns] times a layer into out, in one way."""
    if isinstance(way, choice.Library):
        known = torch.ops.compress
        dense = known.sparse_dequantize if isinstance(layer, PrunedGrid) else known.dequantize
        torch.mm(x, dense(*layer.arguments, x.shape[1], x.dtype).t(), out=out)
    elif isinstance(layer, PrunedGrid):
        assert isinstance(way, choice.Narrow)
        pruned.few(x, layer, out, way)
    elif isinstance(way, choice.Single):
        ops.single(x, layer, out, way)
    elif isinstance(way, choice.Narrow):
        ops.narrow(x, layer, out, way)
    else:
        ops.broad(x, layer, out, way)


def written(way: Way) -> Written:
    """("narrow", 1, 2, 8, 3)"""
    return (type(way).__name__.lower(), *vars(way).values())


def candidates(layer: Layer, shape: Shape, tokens: int, hopper: bool, processors: int, shared: int) -> list[Way]:
    """What is worth a try: what fits registers and shared memory, and is not plainly too small or too large.

    Args:
        layer: of the kind, of any size.
        shape: rows and columns of those that are meant.
        tokens: inputs.
        hopper: the device has wgmma.
        processors: multiprocessors.
        shared: bytes of shared memory that a block can have.
    """
    sparse = isinstance(layer, PrunedGrid)
    few = _single() if tokens == 1 and not sparse else _narrow(tokens, hopper)
    found: list[Way] = [way for way in few if _fits(way, layer, shape, tokens, shared, processors)]
    if isinstance(layer, PrunedGrid):  # it is dequantised for more inputs than that, and only then
        return found or [choice.Library()]
    if hopper and layer.outlier_rows is None and tokens > 2:
        found += dict.fromkeys(_wide(layer, shape, tokens, processors))
    if tokens >= 64 or not found:
        found.append(choice.Library())
    return found


def _single() -> Iterator[choice.Single]:
    for row_tiles in (1, 2, 4):
        for warps in (4, 8, 16):
            for depth in (1, 2, 3, 4):
                yield choice.Single(row_tiles, warps, depth)


def _narrow(tokens: int, hopper: bool) -> Iterator[choice.Narrow]:
    if tokens > 64:
        return
    most = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    for token_tiles in (most, most // 2) if most > 2 else (most,):
        for row_tiles in (1, 2, 4) if most == 2 else (1, 2):
            for beside in (1, 2, 4):
                for warps in (4, 8, 16) if beside == 1 else (2, 4, 8):
                    for depth in (1, 2, 3) if most <= 2 else (1, 2):
                        for split in (1, 2, 4) if hopper else (1,):
                            yield choice.Narrow(token_tiles, row_tiles, warps, depth, beside, split)


def _fits(way: Few, layer: Layer, shape: Shape, tokens: int, shared: int, processors: int) -> bool:
    """By an estimate; what still does not fit fails when it is compiled or launched, and costs a moment."""
    chunks = -(-shape[1] // (pruned.CHUNK if isinstance(layer, PrunedGrid) else layout.CHUNK))
    held = way.depth * way.row_tiles * _held(layer)
    if isinstance(way, choice.Single):
        tiles, threads, split = way.row_tiles, 32 * way.warps, 1
        registers = held + 6 * way.row_tiles + 2 * way.depth + _OTHERS
    else:
        tiles, threads, split = way.tiles, 32 * way.warps * way.beside, way.split
        registers = held + 4 * way.row_tiles * (way.token_tiles + 1) + 4 * way.token_tiles + _OTHERS
    blocks = -(-shape[0] // (16 * tiles)) * split
    if (split > 1 and blocks > 3 * processors) or way.warps * split > max(4, chunks) or tiles * 16 > max(16, shape[0]):
        return False
    if tiles > 2 and blocks < processors // 3:
        return False
    if threads > 512 or registers > min(_MOST_REGISTERS, _REGISTERS // threads):
        return False
    return _shared(way, layer, tokens) <= shared


def _held(layer: Layer) -> int:
    """Registers of a thread for a chunk of a tile: codes, statistics and, of a pruned layer, where the codes belong."""
    places, offsets = (pruned.PLACES // 32, layer.zeros) if isinstance(layer, PrunedGrid) else (0, layer.offsets)
    statistics = 12 if layer.kind == ops.BILEVEL else layer.groups * (1 if offsets is None else 2)
    return 2 * layer.bits + statistics + places


def _shared(way: Few, layer: Layer, tokens: int) -> int:
    """Bytes of shared memory of a block."""
    if isinstance(layer, PrunedGrid):
        assert isinstance(way, choice.Narrow)
        return pruned.shared_bytes(way, tokens)
    outliers = layer.outlier_rows is not None
    if isinstance(way, choice.Single):
        return way.shared(layer.kind, layer.bits, outliers)
    return way.shared(layer.kind, layer.bits, layer.groups, tokens, outliers)


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
