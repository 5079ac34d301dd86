"""Layers of which two of every four weights in a row are kept, on sparse tensor cores.

`PrunedGrid`: on a uniform grid, by kernels/narrow.cu and dequantize_sparse.cu: the operators `compress::sparse_linear`
and `compress::sparse_dequantize`, registered with torch as those of `compress.cuda.ops`. (Plain values: cusparselt.py.)

The layout of `PrunedGrid` is that of `compress.cuda.layout` with only the kept columns counted, and behind the codes of
a chunk (16 rows, 256 columns, 128 of them kept) 512 bytes that say where they belong: `_places` has their order.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import bits as bitpack
from compress.cuda import layout, tuned
from compress.cuda.choice import Library, Narrow, parsed
from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.cuda.support import probe
from compress.packed.sparse import Sparse, pack_mask, unpack_mask
from compress.packed.uniform import UniformGrid, group_index
from compress.solvers.masks import Pattern
from compress.types import Packed, Storage

TWO_OF_FOUR = Pattern(2, 4)
FOURS = 64  # groups of four columns in a row of a chunk
CHUNK = 4 * FOURS  # columns
PLACES = 128  # words of a chunk that say where codes belong
_BAND_ROWS = layout.BAND * layout.TILE
_ROWS_AT_ONCE = 16 * _BAND_ROWS  # bounds the 64-bit temporaries
MOST_TOKENS = 64  # that the kernel takes; for more the weight is dequantised
#: the kind of a `PrunedGrid` in the table of tuned.py; those below are of ops.py
PRUNED = 4
_GRID_KIND = 0  # of kernels/weights.cuh
_DENSE_PITCH = 16 * FOURS // 2 + 32
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "Float"}

library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_GRID = "Tensor codes, Tensor scales, Tensor? zeros, int bits, int groups, int shift, int rows"
library.define(f"sparse_linear(Tensor x, {_GRID}) -> Tensor")
library.define(f"sparse_dequantize({_GRID}, int columns, ScalarType dtype) -> Tensor")


# --- layout ----------------------------------------------------------------------------------------------------------


def _places(device: torch.device) -> Tensor:
    """int64 [32 lanes * 4 words * 8]: which group of four columns, FOURS * row + group of the row, bits 4 j to 4 j + 3
    of a lane's word tell of. This is the order of mma.sp's metadata (kernels/sparsity.cuh); nothing else here knows it.
    """
    lane, word, j = torch.arange(32)[:, None, None], torch.arange(4)[:, None], torch.arange(8)
    step = 2 * word + lane % 4 // 2  # lanes 0 and 1 of every four serve even steps, 2 and 3 odd ones
    row = lane // 4 + j // 4 * 8
    group = 8 * step + lane % 2 * 4 + j % 4
    return (row * FOURS + group).flatten().to(device)


def pack(codes: Tensor, mask: Tensor, bits: int) -> Tensor:
    """Kept codes and where they belong.

    Args:
        codes: uint8 [rows, columns]; what stands where nothing is kept is lost.
        mask: bool [rows, columns], two True in every four columns.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [bands, chunks, tiles of a band, 64 * bits + PLACES].
    """
    both = zip(torch.split(codes, _ROWS_AT_ONCE), torch.split(mask, _ROWS_AT_ONCE), strict=True)
    return torch.cat([_pack(c, m, bits) for c, m in both])


def _pack(codes: Tensor, mask: Tensor, bits: int) -> Tensor:
    rows, columns = codes.shape
    kept = layout.pack(kept_of(codes, mask), bits)
    bands, chunks = kept.shape[:2]
    fours = bitpack.unpack(pack_mask(mask, TWO_OF_FOUR), 4, columns // 4)
    filled = (0, chunks * FOURS - columns // 4, 0, bands * _BAND_ROWS - rows)
    fours = F.pad(fours, filled, value=0b0100)  # two positions that are not the same
    fours = fours.reshape(bands, layout.BAND, layout.TILE, chunks, FOURS).permute(0, 3, 1, 2, 4).flatten(3)
    places = _words(torch.unflatten(fours[..., _places(codes.device)], -1, (PLACES, 8)))
    return torch.cat([kept, places], -1)


def _words(nibbles: Tensor) -> Tensor:
    """uint8 [..., 8] -> int32 [...], the first in the lowest bits."""
    wide = nibbles.to(torch.int64)
    return reduce(torch.bitwise_or, (wide[..., j] << 4 * j for j in range(8))).to(torch.int32)  # it wraps


def unpack(packed: Tensor, bits: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """uint8 [rows, columns / 2] and bool [rows, columns]: the kept codes and the mask that `pack` was given."""
    parts = torch.split(packed, _ROWS_AT_ONCE // _BAND_ROWS)
    kept, mask = zip(*(_unpack(part, bits, columns) for part in parts), strict=True)
    return torch.cat(kept)[:rows], torch.cat(mask)[:rows]


def _unpack(packed: Tensor, bits: int, columns: int) -> tuple[Tensor, Tensor]:
    rows = len(packed) * _BAND_ROWS
    kept = layout.unpack(packed[..., :-PLACES], bits, rows, columns // 2)
    words = packed[..., -PLACES:]
    nibbles = torch.stack([words >> 4 * j & 15 for j in range(8)], -1).to(torch.uint8).flatten(3)
    fours = torch.empty_like(nibbles)
    fours[..., _places(packed.device)] = nibbles
    fours = torch.unflatten(fours, -1, (layout.TILE, FOURS)).permute(0, 2, 3, 1, 4).reshape(rows, -1)
    mask = bitpack.pack(fours[:, : columns // 4].contiguous(), 4)
    return kept, unpack_mask(mask, TWO_OF_FOUR, columns)


def kept_of(values: Tensor, mask: Tensor) -> Tensor:
    """[rows, columns / 2], a few rows at a time: indices take 64 bits."""
    runs = zip(torch.split(values, _ROWS_AT_ONCE), torch.split(mask, _ROWS_AT_ONCE), strict=True)
    return torch.cat([v[m].reshape(len(v), -1) for v, m in runs])


def spread(kept: Tensor, mask: Tensor, into: Tensor) -> None:
    """Inverse of `kept_of`: into[mask] = kept."""
    runs = (torch.split(t, _ROWS_AT_ONCE) for t in (kept, mask, into))
    for k, m, part in zip(*runs, strict=True):
        part[m] = k.flatten()


# --- uniform grids ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrunedGrid:
    """2:4 on a uniform grid, a `compress.fast.Kernel`. But for `columns` these are the arguments of the operators.

    Attributes:
        codes: see `pack`.
        scales: `layout.pack_statistics` with half the columns in a group.
        zeros: uint8, likewise, or None.
        bits: of a code.
        groups, shift: `layout.group_layout` of half the columns in a group.
        rows, columns: of the layer.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)
    kind: ClassVar[int] = PRUNED

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    groups: int
    shift: int
    rows: int
    columns: int = 0

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        inner = storage.inner
        if inner is None or not two_of_four(storage) or inner.kind != UniformGrid.kind or inner.activations:
            return "not a weight-only uniform grid pruned 2:4"
        if inner.bits not in (2, 3, 4, 8):
            return f"codes of {inner.bits} bits"
        if inner.ordered_groups:
            return "its groups follow an activation order"
        try:
            layout.group_layout(_half(inner.group_size))
        except ValueError:
            return f"groups of {inner.group_size} columns are not 32, 64, 128 or 256 times a power of two"
        return None

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, Sparse)
        assert isinstance(packed.inner, UniformGrid)
        inner, (rows, columns), size = packed.inner, packed.shape, _half(packed.inner.group_size)
        return cls(
            pack(inner.codes, packed.mask, inner.bits),
            layout.pack_statistics(inner.scales, columns // 2, size),
            None if inner.zeros is None else layout.pack_statistics(inner.zeros, columns // 2, size),
            inner.bits,
            *layout.group_layout(size),
            rows,
            columns,
        )

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.compress.sparse_linear(x, *self.arguments)
        return out

    def restore(self) -> Sparse:
        kept, mask = unpack(self.codes, self.bits, self.rows, self.columns)
        size = layout.group_size(self.groups, self.shift)
        count = 1 if size == -1 else -(-self.columns // (2 * size))
        scales = layout.unpack_statistics(self.scales, self.rows, count)
        zeros = None if self.zeros is None else layout.unpack_statistics(self.zeros, self.rows, count)
        codes = torch.full_like(mask, 2 ** (self.bits - 1), dtype=torch.uint8)
        grid = UniformGrid(codes, scales, zeros, self.bits, -1 if size == -1 else 2 * size)
        if zeros is not None:
            codes.copy_(zeros[:, grid.column_groups()])
        spread(kept, mask, codes)
        return Sparse(mask, grid, TWO_OF_FOUR)

    def tensors(self) -> dict[str, Tensor]:
        return _present(codes=self.codes, scales=self.scales, zeros=self.zeros)

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        return self.codes, self.scales, self.zeros, self.bits, self.groups, self.shift, self.rows

    @property
    def pointers(self) -> tuple[int, int, int]:
        return self.codes.data_ptr(), self.scales.data_ptr(), 0 if self.zeros is None else self.zeros.data_ptr()

    def kernel(self, name: str, dtype: torch.dtype, *more: tuple[str, int | str], hopper: bool = False) -> Kernel:
        """The variant of `narrow` or `dequantize_sparse` for this layer."""
        own: tuple[tuple[str, int | str], ...] = (
            ("BITS", self.bits), ("GROUPS", self.groups), ("SCALE", _NAMES[self.scales.dtype]),
            ("OFFSET", int(self.zeros is not None)), ("T", _NAMES[dtype]),
        )  # fmt: skip
        return Kernel(name, f"{name}.cu", (*own, *more), hopper)


@functools.lru_cache(4096)
def choose(bits: int, tokens: int, rows: int, columns: int, device: int) -> Narrow | Library:
    """How to multiply so many inputs, 1 or more, by a layer: as it was measured, or by the rule."""
    if tokens > MOST_TOKENS:
        return Library()
    card, known = torch.cuda.get_device_properties(device), probe(device)
    splits = known.capability == (9, 0)
    found = tuned.nearest(tuned.load(card.name), PRUNED, bits, tokens, rows, columns)
    way = None if found is None else parsed(found)
    if isinstance(way, Narrow) and shared_bytes(way, tokens) <= known.shared and (splits or way.split == 1):
        return way
    return rule(tokens, rows, columns, card.multi_processor_count, known.shared)


def rule(tokens: int, rows: int, columns: int, processors: int, shared: int) -> Narrow:
    """What is done where nothing similar was measured; `shared`: bytes of shared memory that a block can have."""
    way = _preferred(tokens, layout.tiles(rows), -(-columns // CHUNK), processors)
    lean = replace(way, depth=1)
    ways = [way, lean, replace(lean, warps=4), replace(lean, warps=2)]
    ways.append(replace(lean, token_tiles=min(way.token_tiles, 4), warps=2))
    return next((way for way in ways if shared_bytes(way, tokens) <= shared), ways[-1])


def _preferred(tokens: int, tiles: int, chunks: int, processors: int) -> Narrow:
    """The rule where shared memory is no matter. The rows of a block read the inputs together, and from three tokens on
    these weigh more than the codes: a block has as many rows as leave work for three processors in five.
    """

    def enough(each: int) -> bool:
        return 5 * tiles >= 3 * each * processors

    if tokens <= 2:
        warps = 8 if chunks >= 8 else 4
        return Narrow(1, 2 if tiles >= 3 * processors else 1, warps, 1 if chunks <= 2 * warps else 2)
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    if token_tiles <= 2 and enough(8):
        return Narrow(token_tiles, 2, 2, 2, beside=4)
    if token_tiles == 2 and enough(2):
        return Narrow(2, 2, 4, 2, beside=2)
    if token_tiles == 1 and enough(2):
        return Narrow(1, 1, 4, 3, beside=4 if enough(4) else 2)
    row_tiles = 2 if tiles >= processors else 1
    warps = 8 if chunks >= 8 and token_tiles == 1 else 4
    return Narrow(token_tiles, row_tiles, warps, 1 if row_tiles * token_tiles == 4 else 2)


def shared_bytes(way: Narrow, tokens: int) -> int:
    """Bytes of shared memory of a block."""
    return way.shared(_GRID_KIND, 0, 0, tokens, False, CHUNK)


def few(x: Tensor, layer: PrunedGrid, out: Tensor, way: Narrow) -> None:
    """x [tokens, columns, a multiple of 8] times the weight, into out, by `narrow`."""
    tokens, columns = x.shape
    more = ("KIND", _GRID_KIND), ("SPARSE", 1)
    kernel = layer.kernel("narrow", x.dtype, *way.macros, *more, hopper=way.split > 1)
    launch(
        function(kernel, x.device.index),
        way.grid(tokens, layer.rows),
        (32 * way.warps * way.beside,),
        (
            *layer.pointers, 0, 0, 0, 0, 0, x.data_ptr(), out.data_ptr(), tokens, layer.rows, columns,
            layer.codes.shape[1], layer.shift,
        ),
        shared_bytes(way, tokens),
        x,
    )  # fmt: skip


def dequantize(layer: PrunedGrid, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight by `dequantize_sparse`; columns, a multiple of 4, may be more than the layer has."""
    warps = 4
    out = torch.empty(layer.rows, columns, dtype=dtype, device=layer.codes.device)
    chunks = layer.codes.shape[1]
    launch(
        function(layer.kernel("dequantize_sparse", dtype, ("WARPS", warps)), out.device.index),
        (-(-chunks // warps), layout.tiles(layer.rows)),
        (32 * warps,),
        (*layer.pointers, out.data_ptr(), layer.rows, columns, chunks, layer.shift),
        warps * layout.TILE * _DENSE_PITCH,
        out,
    )
    return out


def _sparse_linear_cuda(x: Tensor, *args: Any) -> Tensor:
    layer = PrunedGrid(*args)
    columns = x.shape[-1]
    flat = layout.inputs(x)
    out = torch.empty(len(flat), layer.rows, dtype=x.dtype, device=x.device)
    if len(flat):
        way = choose(layer.bits, len(flat), layer.rows, columns, x.device.index)
        if isinstance(way, Narrow):
            few(flat, layer, out, way)
        else:
            torch.mm(flat, dequantize(layer, flat.shape[1], x.dtype).t(), out=out)
    return out.reshape(*x.shape[:-1], layer.rows)


def plain(layer: PrunedGrid, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [rows, columns], by torch alone."""
    kept, mask = unpack(layer.codes, layer.bits, layer.rows, columns)
    size = layout.group_size(layer.groups, layer.shift)
    group = group_index(columns // 2, size, kept.device)
    count = 1 if size == -1 else -(-columns // (2 * size))

    def statistic(packed: Tensor) -> Tensor:
        return layout.unpack_statistics(packed, layer.rows, count)[:, group].float()

    zero = 2.0 ** (layer.bits - 1) if layer.zeros is None else statistic(layer.zeros)
    dense = torch.zeros(layer.rows, columns, dtype=dtype, device=kept.device)
    dense[mask] = (statistic(layer.scales) * (kept.float() - zero)).to(dtype).flatten()
    return dense


def _sparse_linear_plain(x: Tensor, *args: Any) -> Tensor:
    layer = PrunedGrid(*args)
    return F.linear(x, plain(layer, x.shape[-1], x.dtype))


def _sparse_dequantize_cuda(*args: Any) -> Tensor:
    *layer, columns, dtype = args
    return dequantize(PrunedGrid(*layer), columns, dtype)


def _sparse_dequantize_plain(*args: Any) -> Tensor:
    *layer, columns, dtype = args
    return plain(PrunedGrid(*layer), columns, dtype)


def _sparse_dequantize_shape(codes: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, dtype = args
    out: Tensor = codes.new_empty(rows, columns, dtype=dtype)
    return out


# --- what they share -------------------------------------------------------------------------------------------------


def two_of_four(storage: Storage) -> bool:
    return storage.kind == Sparse.kind and Pattern.from_details(storage.details) == TWO_OF_FOUR


def _half(group_size: int) -> int:
    """Columns of a group that are kept. Odd sizes give one that `layout.group_layout` refuses."""
    return -1 if group_size == -1 else group_size // 2 if group_size % 2 == 0 else 0


def _present(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _linear_shape(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = x.new_empty(*x.shape[:-1], args[-1])
    return out


library.impl("sparse_linear", _sparse_linear_cuda, "CUDA")
library.impl("sparse_dequantize", _sparse_dequantize_cuda, "CUDA")
library.impl("sparse_linear", _sparse_linear_plain, "CPU")
library.impl("sparse_dequantize", _sparse_dequantize_plain, "CPU")
torch.library.register_fake("compress::sparse_linear", _linear_shape, lib=library)
torch.library.register_fake("compress::sparse_dequantize", _sparse_dequantize_shape, lib=library)
