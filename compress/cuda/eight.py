"""The product with both sides in 8 bits, of LLM.int8() and of W8A8 with a scale a token: `compress::linear8`.

    out[m, n] = sx[m] sw[n] sum over k of xq[m, k] wq[n, k]  +  sum over outlier columns o of x[m, o] W[n, o]

in whole numbers, then float32, rounded once to x's dtype. Two launches: kernels/quantise.cu makes xq, sx and the
outlier inputs; kernels/narrow8.cu or wide8.cu multiplies. Nothing waits for the device, so CUDA graphs can hold it.
Without outlier columns it gives, bit for bit, what `compress.int8.linear` gives on a CPU with activations "token".

kernels/codes8.cuh has the layout of the weights: one of words, of four 8-bit codes or of two outlier weights.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import int8
from compress.cuda import layout
from compress.cuda.boxes import boxes
from compress.cuda.choice import Library, Narrow
from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

MOST_COLUMNS = 131071  # whose sums are sure to stay within 31 bits
_BYTES = 128  # a chunk's, of one row or token
_PITCH = _BYTES + 16  # of a token's chunk in shared memory, as in narrow8.cu
OUTLIER_CHUNK = _BYTES // 2  # outlier columns of a chunk
_BAND_ROWS = layout.BAND * layout.TILE
_ROWS, _THREADS = 128, 384  # of a block of wide8.cu
_SHARED = 225 * 1024  # bytes of shared memory that blocks of wide8.cu may ask for together, on sm_90
_NAMES = {torch.float16: "Half", torch.bfloat16: "BFloat"}

library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
_LAYER = "Tensor codes, Tensor scales, Tensor? outlier_columns, Tensor? outlier_weight, int rows"
library.define(f"linear8(Tensor x, {_LAYER}) -> Tensor")


# --- layout ----------------------------------------------------------------------------------------------------------


def pack(codes: Tensor) -> Tensor:
    """uint8 [rows, columns], of which 128 stands for zero -> int32 [bands, chunks, tiles of a band, 512]."""
    return _pack(codes ^ 128, _BYTES).view(torch.int32)


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Exact inverse of `pack`."""
    return _unpack(packed.view(torch.uint8), rows, columns) ^ 128


def pack_outliers(weight: Tensor) -> Tensor:
    """[rows, outlier columns] -> [bands, chunks of 64 columns, tiles of a band, 1024] in its dtype, any float."""
    return _pack(weight, OUTLIER_CHUNK)


def unpack_outliers(packed: Tensor, rows: int, count: int) -> Tensor:
    """Exact inverse of `pack_outliers`."""
    return _unpack(packed, rows, count)


def _pack(values: Tensor, chunk: int) -> Tensor:
    """[rows, n] -> [bands, chunks, tiles of a band, 16 * chunk] with zeros in what fills up."""
    padded = F.pad(values, (0, -values.shape[1] % chunk, 0, -values.shape[0] % _BAND_ROWS))
    bands, chunks = padded.shape[0] // _BAND_ROWS, padded.shape[1] // chunk
    # row 16 tile + 8 hi + g, bytes 128 chunk + 32 s + 16 h + 4 c and on  ->  step s, lane 4 g + c, word 2 h + hi
    split = padded.reshape(bands, layout.BAND, 2, 8, chunks, 4, 2, 4, chunk // 32)
    return split.permute(0, 4, 1, 5, 3, 7, 6, 2, 8).flatten(3)


def _unpack(packed: Tensor, rows: int, width: int) -> Tensor:
    split = packed.reshape(*packed.shape[:3], 4, 8, 4, 2, 2, packed.shape[3] // 512)
    padded = split.permute(0, 2, 7, 4, 1, 3, 6, 5, 8).flatten(4).flatten(0, 3)
    return padded[:rows, :width].contiguous()


# --- a layer ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EightBit:
    """Codes of 8 bits for both sides, a `compress.fast.Kernel`. The first five are the arguments of the operator.

    Attributes:
        codes: see `pack`.
        scales: float32 [rows].
        outlier_columns: int32 [n], ascending; None for a grid alone.
        outlier_weight: see `pack_outliers`.
        rows, columns: of the layer.
        group_size, stored: of the grid, and the dtype of its scales.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)

    codes: Tensor
    scales: Tensor
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None
    rows: int
    columns: int = 0
    group_size: int = -1
    stored: torch.dtype = torch.float32

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        inner = storage.inner if storage.kind == OutlierColumns.kind else storage
        if inner is None or inner.kind != UniformGrid.kind or not inner.activations:
            return "not a uniform grid with quantised inputs"
        if inner.activations != "token":
            return f"inputs quantised by {inner.activations}, not by token with a symmetric grid"
        if inner.bits != 8 or not inner.symmetric or inner.ordered_groups or 0 < inner.group_size < shape[1]:
            return "not 8 bits, symmetric, a scale a row"
        return f"{shape[1]} columns, more than {MOST_COLUMNS}" if shape[1] > MOST_COLUMNS else None

    @classmethod
    def of(cls, packed: Packed) -> Self:
        grid = packed.inner if isinstance(packed, OutlierColumns) else packed
        assert isinstance(grid, UniformGrid)
        columns, weight = None, None
        if isinstance(packed, OutlierColumns):
            columns, weight = packed.columns, pack_outliers(packed.weight)
        codes, scales = pack(grid.codes), grid.scales[:, 0].float()
        return cls(codes, scales, columns, weight, *packed.shape, grid.group_size, grid.scales.dtype)

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.compress.linear8(x, *self.arguments)
        return out

    def restore(self) -> UniformGrid | OutlierColumns:
        codes, scales = unpack(self.codes, self.rows, self.columns), self.scales[:, None].to(self.stored)
        grid = UniformGrid(codes, scales, None, 8, self.group_size, activations="token")
        if self.outlier_columns is None or self.outlier_weight is None:
            return grid
        weight = unpack_outliers(self.outlier_weight, self.rows, len(self.outlier_columns))
        return OutlierColumns(grid, self.outlier_columns, weight)

    def tensors(self) -> dict[str, Tensor]:
        found = {"codes": self.codes, "scales": self.scales}
        if self.outlier_columns is not None and self.outlier_weight is not None:
            found |= {"outlier_columns": self.outlier_columns, "outlier_weight": self.outlier_weight}
        return found

    @property
    def arguments(self) -> tuple[Tensor | int | None, ...]:
        return self.codes, self.scales, self.outlier_columns, self.outlier_weight, self.rows

    @property
    def chunks(self) -> int:
        return self.codes.shape[1]

    @property
    def outlier_chunks(self) -> int:
        return 0 if self.outlier_weight is None else self.outlier_weight.shape[1]

    def outliers_in(self, dtype: torch.dtype) -> Tensor | None:
        """The outlier columns' weight, as packed, for inputs of this dtype."""
        return None if self.outlier_weight is None else self.outlier_weight.to(dtype)


# --- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """Quantised inputs.

    Attributes:
        rows: uint8 [tokens, 128 * (chunks + chunks of outliers)]: codes, then the outlier inputs' bytes.
        scales: float32 [tokens].
    """

    rows: Tensor
    scales: Tensor


def quantise(x: Tensor, layer: EightBit) -> Inputs:
    """By quantise.cu. x: [tokens, columns], contiguous, columns a multiple of 8, at a multiple of 16 bytes."""
    tokens, columns = x.shape
    chunks, outlier_chunks = layer.chunks, layer.outlier_chunks
    rows = torch.empty(tokens, (chunks + outlier_chunks) * _BYTES, dtype=torch.uint8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device)
    vectors, threads = spread(tokens, chunks)
    shape: tuple[tuple[str, int | str], ...] = (
        ("T", _NAMES[x.dtype]), ("VECTORS", vectors), ("OUTLIERS", int(outlier_chunks > 0)),
    )  # fmt: skip
    count = 0 if layer.outlier_columns is None else len(layer.outlier_columns)
    launch(
        function(Kernel("quantise", "quantise.cu", shape), x.device.index),
        (tokens,),
        (threads,),
        (x, layer.outlier_columns, rows, scales, columns, chunks, count, outlier_chunks),
        chunks * 16 if outlier_chunks else 0,
        x,
    )
    return Inputs(rows, scales)


def spread(tokens: int, chunks: int) -> tuple[int, int]:
    """How a token is shared out: vectors of 8 inputs that a thread holds, and threads. For few tokens as many threads
    as there can be, since then a block's latency counts."""
    pieces = chunks * 16
    vectors = 1 if tokens <= 128 else 4
    while pieces > 1024 * vectors:
        vectors *= 2
    return vectors, -(-pieces // (32 * vectors)) * 32


def narrow(x: Inputs, layer: EightBit, out: Tensor, way: Narrow) -> None:
    """By narrow8.cu, into out [tokens, rows]."""
    tokens, taken = len(out), 8 * way.token_tiles
    shape = _shape(layer, out.dtype, NT=way.token_tiles, RT=way.row_tiles, WARPS=way.warps, DEPTH=way.depth)
    launch(
        function(Kernel("narrow8", "narrow8.cu", shape), out.device.index),
        (-(-layout.tiles(layer.rows) // way.row_tiles), -(-tokens // taken)),
        (32 * way.warps,),
        (
            layer.codes, layer.outliers_in(out.dtype), layer.scales, x.rows, x.scales, out, tokens, layer.rows,
            layer.chunks, layer.outlier_chunks,
        ),
        narrow_shared(way, tokens),
        out,
    )  # fmt: skip


def narrow_shared(way: Narrow, tokens: int) -> int:
    """Bytes of shared memory of a block of narrow8.cu."""
    taken = 8 * way.token_tiles
    inputs = way.warps * way.depth * min(tokens, taken) * _PITCH
    return max(inputs, way.warps * way.row_tiles * layout.TILE * (taken + 1) * 4)


def wide(x: Inputs, layer: EightBit, out: Tensor, way: Wide) -> None:
    """By wide8.cu, into out [tokens, rows]."""
    tokens = len(out)
    shape = _shape(layer, out.dtype, TOKENS=way.tokens, STAGES=way.stages, SPLIT=way.split, BLOCKS=way.blocks)
    launch(
        function(Kernel("wide8", "wide8.cu", shape, hopper=True), out.device.index),
        (-(-layer.rows // _ROWS) * -(-tokens // way.tokens), 1, way.split),
        (_THREADS,),
        (
            layer.codes, layer.outliers_in(out.dtype), layer.scales,
            boxes(x.rows.view(torch.int16), way.tokens), x.scales, out, tokens, layer.rows, layer.chunks,
            layer.outlier_chunks,
        ),
        way.shared,
        out,
    )  # fmt: skip


def _shape(layer: EightBit, dtype: torch.dtype, **macros: int) -> tuple[tuple[str, int | str], ...]:
    return ("T", _NAMES[dtype]), *macros.items(), ("OUTLIERS", int(layer.outlier_chunks > 0))


# --- which of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wide:
    """Shape of a launch of wide8.cu.

    Attributes:
        tokens: of a block: 16, 32, 64, 128 or 256.
        stages: places of the ring, 3 or more.
        split: blocks that share out the columns: 1, 2, 4 or 8.
        blocks: that share a multiprocessor: 1, or 2 for up to 64 tokens.
    """

    tokens: int
    stages: int
    split: int = 1
    blocks: int = 1

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        stage = self.tokens * _BYTES + _ROWS * _BYTES
        return max(self.stages * stage, self.tokens * (4 * (_ROWS + 4) if self.split > 1 else 2 * _ROWS + 16))


def fit(way: Wide) -> Wide:
    """With as many stages as there is room for."""
    stages = (s for s in range(way.stages, 2, -1) if replace(way, stages=s).shared <= _SHARED // way.blocks)
    return replace(way, stages=next(stages))


@functools.lru_cache(4096)
def choose(tokens: int, rows: int, columns: int, device: int) -> Narrow | Wide | Library:
    """How to multiply so many inputs by a layer."""
    found = torch.cuda.get_device_properties(device)
    hopper = (found.major, found.minor) == (9, 0)
    if tokens <= (16 if hopper else 64):
        return choose_narrow(tokens, rows, columns, found.multi_processor_count)
    return choose_wide(tokens, rows, columns, found.multi_processor_count) if hopper else Library()


def choose_narrow(tokens: int, rows: int, columns: int, processors: int) -> Narrow:
    """The rule for few tokens."""
    token_tiles = 1 if tokens <= 8 else 2 if tokens <= 16 else 4 if tokens <= 32 else 8
    row_tiles = 2 if token_tiles < 8 and layout.tiles(rows) >= processors else 1
    return Narrow(token_tiles, row_tiles, 8 if layout.chunks(columns) >= 8 else 4, 1 if token_tiles == 8 else 2)


def choose_wide(tokens: int, rows: int, columns: int, processors: int) -> Wide:
    """The rule for many tokens on Hopper: enough blocks for the device, split by columns where rows are too few."""
    row_blocks = -(-rows // _ROWS)
    size = next((s for s in (32, 64, 128) if tokens <= s), 256)
    if size == 256 and row_blocks * -(-tokens // size) < processors:
        size = 128
    blocks, split = row_blocks * -(-tokens // size), 1
    while split < 8 and 2 * blocks * split <= processors + 8 and layout.chunks(columns) >= 8 * split:
        split *= 2
    return fit(Wide(size, 8, split, blocks=2 if size <= 64 and blocks > processors else 1))


# --- the operator ----------------------------------------------------------------------------------------------------


def _linear8_cuda(x: Tensor, *args: Any) -> Tensor:
    layer, columns = EightBit(*args), x.shape[-1]
    if x.dtype not in _NAMES or columns > MOST_COLUMNS:
        return _linear8_plain(x, *args)
    assert layer.scales.dtype == torch.float32, f"scales in {layer.scales.dtype}"
    flat = layout.inputs(x)
    out = torch.empty(len(flat), layer.rows, dtype=x.dtype, device=x.device)
    if out.numel():
        way = choose(len(flat), layer.rows, columns, x.device.index)
        inputs = quantise(flat, layer)
        if isinstance(way, Narrow):
            narrow(inputs, layer, out, way)
        elif isinstance(way, Wide):
            wide(inputs, layer, out, way)
        else:
            out = by_library(inputs, layer, x.dtype)
    return out.reshape(*x.shape[:-1], layer.rows)


def by_library(x: Inputs, layer: EightBit, dtype: torch.dtype) -> Tensor:
    """By torch's whole-number product, for what no kernel of ours takes."""
    wide = layer.chunks * _BYTES
    codes = (unpack(layer.codes, layer.rows, wide) ^ 128).view(torch.int8)
    total = int8.int_mm(x.rows[:, :wide].view(torch.int8), codes)
    out = (total.float() * x.scales[:, None]).mul_(layer.scales)
    packed = layer.outliers_in(dtype)
    if packed is not None:
        weight = unpack_outliers(packed, layer.rows, layer.outlier_chunks * OUTLIER_CHUNK)
        out += F.linear(x.rows[:, wide:].contiguous().view(dtype).float(), weight.float())
    return out.to(dtype)


def _linear8_plain(x: Tensor, *args: Any) -> Tensor:
    """What the kernels are to give, by definition."""
    layer, columns = EightBit(*args), x.shape[-1]
    flat = x.reshape(-1, columns)
    inner = flat
    if layer.outlier_columns is not None:
        inner = flat.index_fill(1, layer.outlier_columns.long(), 0)
    codes, scale, _ = int8.quantise(inner, "token")
    weight = (unpack(layer.codes, layer.rows, columns) ^ 128).view(torch.int8)
    out = (int8.product(codes, None, weight, None).float() * scale).mul_(layer.scales)
    packed = layer.outliers_in(x.dtype)
    if layer.outlier_columns is not None and packed is not None:
        dense = unpack_outliers(packed, layer.rows, len(layer.outlier_columns))
        out += F.linear(flat.index_select(1, layer.outlier_columns.long()).float(), dense.float())
    return out.to(x.dtype).reshape(*x.shape[:-1], layer.rows)


def _linear8_shape(x: Tensor, *args: Any) -> Tensor:
    out: Tensor = x.new_empty(*x.shape[:-1], EightBit(*args).rows)
    return out


library.impl("linear8", _linear8_cuda, "CUDA")
library.impl("linear8", _linear8_plain, "CPU")
torch.library.register_fake("compress::linear8", _linear8_shape, lib=library)
