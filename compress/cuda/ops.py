"""The operators of packed layers in fragment order: `compress::linear` and `compress::dequantize`.

Registered with torch, with shapes for meta tensors, so that they run under torch.compile, in CUDA graphs and on every
CUDA device. On other devices they compute through the plain layout: slowly, and by definition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import tables
from compress.cuda import choice, layout
from compress.cuda.boxes import boxes
from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.packed.outliers import positions
from compress.packed.uniform import group_index

#: what a code stands for, as in kernels/weights.cuh
GRID, TABLE, BOOK, BILEVEL = range(4)
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "Float"}
_PITCH = layout.CHUNK * 2 + 16  # bytes of a row of a chunk in shared memory, as in the kernels

#: bytes of a dequantised weight that may exist at once before a library's product
BUDGET = 1 << 28

library: Any = torch.library.Library("compress", "DEF")  # type: ignore[no-untyped-call]
_LAYER = (
    "Tensor codes, Tensor? scales, Tensor? offsets, Tensor? table, Tensor? outlier_rows, Tensor? outlier_columns,"
    " Tensor? outlier_values, Tensor? outlier_steps, int kind, str numbers, int bits, int groups, int shift, int rows"
)
library.define(f"linear(Tensor x, {_LAYER}) -> Tensor")
library.define(f"dequantize({_LAYER}, int columns, ScalarType dtype) -> Tensor")


@dataclass(frozen=True)
class Layer:
    """The arguments that both operators share.

    Attributes:
        codes: int32 [tiles, chunks, words], see `layout.pack`.
        scales, offsets: see `layout.pack_statistics`; offsets are uint8 zero points, or minima in the scales' dtype.
            Of BILEVEL: the second level's codes and grids.
        table: [rows, 2**bits] of BOOK.
        outlier_rows: int32 [rows + 1], where the outliers of each row begin.
        outlier_columns: int16, the bits of an unsigned column.
        outlier_values: the weights themselves.
        outlier_steps: what each adds to the weight that the codes give there.
        kind, bits: of the codes.
        numbers: of TABLE: which of `compress.tables` its codes stand for; kernels are compiled with its numbers.
        groups, shift: see `layout.group_layout`.
        rows: out_features.
    """

    codes: Tensor
    scales: Tensor | None
    offsets: Tensor | None
    table: Tensor | None
    outlier_rows: Tensor | None
    outlier_columns: Tensor | None
    outlier_values: Tensor | None
    outlier_steps: Tensor | None
    kind: int
    numbers: str
    bits: int
    groups: int
    shift: int
    rows: int

    @classmethod
    def of(
        cls,
        kind: int,
        bits: int,
        group_size: int,
        shape: tuple[int, int],
        codes: Tensor,
        scales: Tensor | None = None,
        offsets: Tensor | None = None,
        table: Tensor | None = None,
        outlier_rows: Tensor | None = None,
        outlier_columns: Tensor | None = None,
        outlier_values: Tensor | None = None,
        outlier_steps: Tensor | None = None,
        numbers: str = "",
    ) -> Layer:
        """With the layout of a group size. Raises ValueError for one that no kernel takes."""
        tensors = (codes, scales, offsets, table, outlier_rows, outlier_columns, outlier_values, outlier_steps)
        return cls(*tensors, kind, numbers, bits, *layout.group_layout(group_size), shape[0])

    @property
    def arguments(self) -> tuple[Tensor | int | str | None, ...]:
        """Of the operators, in their order."""
        return (
            self.codes, self.scales, self.offsets, self.table, self.outlier_rows, self.outlier_columns,
            self.outlier_values, self.outlier_steps, self.kind, self.numbers, self.bits, self.groups, self.shift,
            self.rows,
        )  # fmt: skip

    @property
    def chunks(self) -> int:
        return self.codes.shape[1]

    def part(self, start: int, stop: int) -> Layer:
        """Its rows start .. stop - 1, without outliers; start is a multiple of a band's rows."""
        tiles = slice(start // layout.TILE, layout.tiles(stop))
        bands = slice(tiles.start // layout.BAND, -(-tiles.stop // layout.BAND))
        rows = slice(start, layout.TILE * tiles.stop)
        return replace(
            self,
            codes=self.codes[bands],
            scales=None if self.scales is None else self.scales[tiles],
            offsets=None if self.offsets is None else self.offsets[tiles],
            table=None if self.table is None else self.table[rows],
            outlier_rows=None,
            outlier_columns=None,
            outlier_values=None,
            outlier_steps=None,
            rows=stop - start,
        )

    def kernel(self, name: str, dtype: torch.dtype, *more: tuple[str, int | str], hopper: bool = False) -> Kernel:
        """The variant of a kernel for this layer."""
        stored = self.scales if self.kind == GRID else self.table if self.kind == BOOK else self.offsets
        scale = _NAMES[dtype if stored is None else stored.dtype]
        offset = 0 if self.offsets is None or self.kind != GRID else 1 if self.offsets.dtype == torch.uint8 else 2
        own: tuple[tuple[str, int | str], ...] = (
            ("KIND", self.kind), ("BITS", self.bits), ("GROUPS", self.groups), ("SCALE", scale), ("OFFSET", offset),
        )  # fmt: skip
        if self.kind == TABLE:
            own += (("NUMBERS", tables.NAMES.index(self.numbers)),)
        return Kernel(name, f"{name}.cu", (*own, ("T", _NAMES[dtype]), *more), hopper)

    @property
    def weight(self) -> tuple[Tensor | None, ...]:
        """What every kernel is given first."""
        return self.codes, self.scales, self.offsets, self.table


def _linear_cuda(x: Tensor, *args: Any) -> Tensor:
    layer = Layer(*args)
    columns = x.shape[-1]
    flat = layout.inputs(x)
    out = torch.empty(len(flat), layer.rows, dtype=x.dtype, device=x.device)
    if out.numel():
        _product(flat, layer, out, columns)
    return out.reshape(*x.shape[:-1], layer.rows)


def _product(x: Tensor, layer: Layer, out: Tensor, columns: int) -> None:
    """x [tokens, columns, a multiple of 8] times the weight, into out."""
    way = choice.choose(
        layer.kind, layer.bits, len(x), layer.rows, columns, x.device.index, layer.outlier_rows is not None
    )
    if isinstance(way, choice.Single):
        single(x, layer, out, way)
    elif isinstance(way, choice.Narrow):
        narrow(x, layer, out, way)
    elif isinstance(way, choice.Wide):
        broad(x, layer, out, way)
    else:
        _by_library(x, layer, out)


def _by_library(x: Tensor, layer: Layer, out: Tensor) -> None:
    """Some rows of the weight at a time in 16 bits, and torch's product with them."""
    band = layout.BAND * layout.TILE
    step = layer.rows
    if layer.outlier_rows is None:  # whose places are those of the whole matrix
        step = max(band, BUDGET // (2 * x.shape[1]) // band * band)
    for start in range(0, layer.rows, step):
        stop = min(start + step, layer.rows)
        part = layer if (start, stop) == (0, layer.rows) else layer.part(start, stop)
        torch.mm(x, _dequantize(part, x.shape[1], x.dtype).t(), out=out[:, start:stop])


def single(x: Tensor, layer: Layer, out: Tensor, way: choice.Single) -> None:
    """One token, by single.cu."""
    outliers = layer.outlier_rows is not None
    shape = (("RT", way.row_tiles), ("WARPS", way.warps), ("DEPTH", way.depth), ("OUTLIERS", int(outliers)))
    launch(
        function(layer.kernel("single", x.dtype, *shape), x.device.index),
        (-(-layout.tiles(layer.rows) // way.row_tiles),),
        (32 * (way.warps + (4 if outliers else 0)),),
        (
            *layer.weight, layer.outlier_rows, layer.outlier_columns, layer.outlier_steps,
            x, out, layer.rows, x.shape[1], layer.chunks, layer.shift,
        ),
        way.shared(layer.kind, layer.bits, outliers),
        x,
    )  # fmt: skip


def narrow(x: Tensor, layer: Layer, out: Tensor, way: choice.Narrow) -> None:
    """By narrow.cu."""
    tokens, columns = x.shape
    outliers = layer.outlier_rows is not None
    turned = None
    if outliers:  # a list of single weights is followed through inputs that lie token beside token
        taken = 8 * way.token_tiles
        turned = F.pad(x, (0, 0, 0, -tokens % taken)).t().contiguous()
    kernel = layer.kernel("narrow", x.dtype, *way.macros, ("OUTLIERS", int(outliers)), hopper=way.split > 1)
    launch(
        function(kernel, x.device.index),
        way.grid(tokens, layer.rows),
        (32 * (way.warps * way.beside + (4 if outliers else 0)),),
        (
            *layer.weight, layer.outlier_rows, layer.outlier_columns, layer.outlier_steps,
            turned, x, out, tokens, layer.rows, columns, layer.chunks, layer.shift,
        ),
        way.shared(layer.kind, layer.bits, layer.groups, tokens, outliers),
        x,
    )  # fmt: skip


def broad(x: Tensor, layer: Layer, out: Tensor, way: choice.Wide) -> None:
    """By wide.cu."""
    tokens, columns = x.shape
    shape = (
        ("TOKENS", way.tokens), ("STAGES", way.stages), ("SPLIT", way.split), ("BLOCKS", way.blocks),
        ("PHASES", way.phases),
    )  # fmt: skip
    kernel = layer.kernel("wide", x.dtype, *shape, hopper=True)
    blocks = -(-layer.rows // 128) * -(-tokens // way.tokens)
    launch(
        function(kernel, x.device.index),
        (blocks, 1, way.split),
        (128 + 256 * way.phases,),
        (*layer.weight, boxes(x, way.tokens), out, tokens, layer.rows, columns, layer.chunks, layer.shift),
        way.shared(layer.kind, layer.bits),
        x,
    )


def _dequantize(layer: Layer, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] by dequantize.cu; columns may be more than the layer has."""
    warps = 4
    out = torch.empty(layer.rows, columns, dtype=dtype, device=layer.codes.device)
    kernel = layer.kernel("dequantize", dtype, ("WARPS", warps))
    numbers = {TABLE: 16 * 32 * 4, BOOK: 16 * (2**layer.bits + 2) * 2}.get(layer.kind, 0)
    launch(
        function(kernel, out.device.index),
        (-(-layer.chunks // warps), layout.tiles(layer.rows)),
        (32 * warps,),
        (*layer.weight, out, layer.rows, columns, layer.chunks, layer.shift),
        numbers + warps * 16 * _PITCH,
        out,
    )
    if layer.outlier_rows is not None and layer.outlier_columns is not None and layer.outlier_values is not None:
        out[positions(layer.outlier_rows, layer.outlier_columns)] = layer.outlier_values.to(dtype)
    return out


def _dequantize_cuda(*args: Any) -> Tensor:
    *layer, columns, dtype = args
    return _dequantize(Layer(*layer), columns, dtype)


def plain(layer: Layer, columns: int, dtype: torch.dtype) -> Tensor:
    """The dense weight [rows, columns], by torch alone."""
    codes = layout.unpack(layer.codes, layer.bits, layer.rows, columns, layer.kind == TABLE)
    size = layout.group_size(layer.groups, layer.shift)
    groups = 1 if size == -1 else -(-columns // size)
    column = group_index(columns, size, codes.device)

    def statistic(packed: Tensor) -> Tensor:
        return layout.unpack_statistics(packed, layer.rows, groups)[:, column]

    if layer.kind == TABLE:
        assert layer.scales is not None
        dense = tables.table(layer.numbers, codes.device)[codes.long()] * statistic(layer.scales)
    elif layer.kind == BOOK:
        assert layer.table is not None
        dense = layer.table[: layer.rows].gather(1, codes.long())
    elif layer.kind == GRID:
        assert layer.scales is not None
        scale = statistic(layer.scales).float()
        if layer.offsets is None:
            dense = scale * (codes.float() - 2 ** (layer.bits - 1))
        elif layer.offsets.dtype == torch.uint8:
            dense = scale * (codes.float() - statistic(layer.offsets).float())
        else:
            dense = scale * codes.float() + statistic(layer.offsets).float()
    else:
        assert layer.scales is not None
        assert layer.offsets is not None
        scale, zero = layout.unpack_second_level(layer.scales, layer.offsets, layer.rows, groups)
        dense = scale[:, column] * (codes.float() - zero[:, column])
    dense = dense.to(dtype)
    if layer.outlier_rows is not None and layer.outlier_columns is not None and layer.outlier_values is not None:
        dense[positions(layer.outlier_rows, layer.outlier_columns)] = layer.outlier_values.to(dtype)
    return dense


def _linear_plain(x: Tensor, *args: Any) -> Tensor:
    layer = Layer(*args)
    return F.linear(x, plain(layer, x.shape[-1], x.dtype))


def _dequantize_plain(*args: Any) -> Tensor:
    *layer, columns, dtype = args
    return plain(Layer(*layer), columns, dtype)


def _linear_shape(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], Layer(*args).rows)


def _dequantize_shape(codes: Tensor, *args: Any) -> Tensor:
    *_, rows, columns, dtype = args
    out: Tensor = codes.new_empty(rows, columns, dtype=dtype)
    return out


library.impl("linear", _linear_cuda, "CUDA")
library.impl("dequantize", _dequantize_cuda, "CUDA")
library.impl("linear", _linear_plain, "CPU")
library.impl("dequantize", _dequantize_plain, "CPU")
torch.library.register_fake("compress::linear", _linear_shape, lib=library)
torch.library.register_fake("compress::dequantize", _dequantize_shape, lib=library)
