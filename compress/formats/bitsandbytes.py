"""The bitsandbytes format: NF4, FP4 and 8-bit rows, what transformers loads where bitsandbytes is installed.

4 bits, for each linear layer P of N = out * in weights: P.weight uint8 [ceil(N / 2), 1], codes along the rows, the even
one in the high half of a byte; P.weight.absmax float32 [blocks]; P.weight.quant_map float32 [16], the code table;
P.weight.quant_state.bitsandbytes__nf4 (or __fp4) uint8 [bytes], a JSON object with the block size, the shape and the
dtype of the dequantised weight. With double quantisation absmax is uint8 [blocks], and there are P.weight.nested_absmax
float32 [ceil(blocks / 256)] and P.weight.nested_quant_map float32 [256]; the JSON also holds nested_offset.

8 bits: P.weight int8 [out, in], P.SCB float32 [out], the largest magnitude of each row (weight = code * SCB / 127), and
P.weight_format uint8, 0 for rows. With llm_int8_threshold 0 bitsandbytes computes the plain vector-wise product, inputs
quantised by token, which is what `Storage.activations` "token" means; so such files are written with 0. With a larger
threshold it looks for outlier features in every batch and multiplies them in 16 bits: layers of such files are read as
8-bit weights whose inputs stay in 16 bits, which is nearer to it than a product that quantises outliers.

Facts that shape this file (bitsandbytes 0.50, transformers 5.23):
- every linear layer, the head too, must be packed or named in llm_int8_skip_modules, where full names match themselves;
- only nn.Linear itself and Conv1D are filled: no fused experts, no module of a class of its own;
- a Conv1D (GPT-2) is filled as [out, in], as every other layer;
- on a CPU with AVX-512 BF16 layers are repacked in 32 rows, and blocks that cross rows come out wrong;
- the scale SCB / 127 of a file of ours comes back in bnb_4bit_compute_dtype, a key that 8-bit readers leave alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import tables
from compress.errors import CompressError
from compress.formats.base import Held, LayerShape, marked
from compress.packed import blockwise
from compress.packed.blockwise import NESTED_BLOCK, Blockwise
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

METHOD = "bitsandbytes"
#: what bitsandbytes calls our tables
_TYPES = {"nf4": "nf4", "fp4-bnb": "fp4"}
_TABLES = {theirs: ours for ours, theirs in _TYPES.items()}
_STATE = "weight.quant_state.bitsandbytes__"
_MAP, _NESTED_MAP = "weight.quant_map", "weight.nested_quant_map"
_ABSMAX, _NESTED_ABSMAX = "weight.absmax", "weight.nested_absmax"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BLOCK_SIZES = tuple(2**n for n in range(5, 13))
#: rows that bitsandbytes' CPU kernel packs together
_ROWS = 32
#: far more than any of these objects takes
_MOST_JSON = 4096
#: digits of a nested_offset, for estimates alone
_OFFSET_DIGITS = 20
_DAMAGED = "the file is damaged or of another tool: download it again"


@dataclass(frozen=True)
class State:
    """What the JSON of a 4-bit layer says.

    Attributes:
        table: a name in `tables.NAMES`.
        dtype: of the dequantised weight.
        offset: the mean of the block maxima, None without double quantisation.
    """

    table: str
    block_size: int
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: float | None

    def as_tensor(self) -> Tensor:
        """uint8 [bytes]: keys in the order in which bitsandbytes writes them."""
        value: dict[str, Any] = {
            "quant_type": _TYPES[self.table],
            "blocksize": self.block_size,
            "dtype": _name(self.dtype),
            "shape": list(self.shape),
        }
        if self.offset is not None:
            value |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}
        return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)

    @classmethod
    def of(cls, blob: Tensor, name: str, nested: bool) -> State:
        """Inverse of `as_tensor`. Raises CompressError for anything else than such an object."""
        if blob.dtype != torch.uint8 or blob.numel() > _MOST_JSON:
            raise _damaged(f"its quant_state is {blob.numel()} numbers of {_name(blob.dtype)}, not a short text", name)
        try:
            value = json.loads(bytes(blob.flatten().tolist()))
        except (ValueError, RecursionError) as error:
            raise _damaged(f"its quant_state is not JSON ({error})", name) from None
        if not isinstance(value, dict):
            raise _damaged(f"its quant_state is a {type(value).__name__}, not a JSON object", name)
        table, dtype = _TABLES.get(str(value.get("quant_type"))), _DTYPES.get(str(value.get("dtype")))
        if table is None or dtype is None:
            what = f"quant_type {value.get('quant_type')!r} with dtype {value.get('dtype')!r} cannot be read"
            raise CompressError(what, name, "nf4 and fp4 of float32, bfloat16 and float16 can")
        size, shape = value.get("blocksize"), value.get("shape")
        if not _is_count(size) or size not in _BLOCK_SIZES:
            raise _damaged(f"its blocksize is {size!r}, not a power of two from 32 to 4096", name)
        if not isinstance(shape, list) or len(shape) != 2 or not all(map(_is_count, shape)):
            raise _damaged(f"its shape is {str(shape)[:60]}, not [out, in]", name)
        offset = value.get("nested_offset")
        if not nested:
            return cls(table, size, dtype, (shape[0], shape[1]), None)
        if value.get("nested_blocksize") != NESTED_BLOCK or value.get("nested_dtype") != "float32":
            found = value.get("nested_blocksize"), value.get("nested_dtype")
            raise CompressError(f"double quantisation in blocks of {found[0]!r} with {found[1]!r} cannot be read", name)
        if isinstance(offset, bool) or not isinstance(offset, int | float) or not math.isfinite(offset):
            raise _damaged(f"its nested_offset is {offset!r}, not a number", name)
        return cls(table, size, dtype, (shape[0], shape[1]), float(offset))

    def blocks(self) -> int:
        return -(-self.shape[0] * self.shape[1] // self.block_size)


class BitsAndBytes:
    """The format as a value; see the module's text."""

    name = METHOD
    suffixes = (
        "weight", _ABSMAX, _MAP, _NESTED_ABSMAX, _NESTED_MAP, *(_STATE + t for t in _TABLES), "SCB", "weight_format",
    )  # fmt: skip
    container = "safetensors"
    quantised = True

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The model's: 4-bit readers round table times absmax, kept in float32, once to the dtype that they compute in.

        A 16-bit scale of 8-bit rows comes back exactly from SCB = 127 * scale; for float32 see `_row_maxima`.
        """
        return model_dtype

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        if storage.kind == Blockwise.kind:
            reason = _why_not_blocks(storage, layer)
        elif storage.kind == UniformGrid.kind:
            reason = _why_not_rows(storage, layer)
        elif storage.kind == OutlierColumns.kind:
            reason = (
                "bitsandbytes keeps no column in its original precision, it multiplies outlier features by the "
                "dequantised codes: use --format native, or absmax --activations token"
            )
        else:
            reason = f"bitsandbytes cannot hold the kind {storage.kind!r}: use --format native"
        if reason is None and layer.expert:
            reason = "transformers fills no fused experts from bitsandbytes: use --format native"
        if reason is None and layer.head:
            reason = "transformers keeps the head out of bitsandbytes: leave out --lm-head, or use --format native"
        return reason

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        """Exact but for the digits of a nested offset."""
        count = shape[0] * shape[1]
        if storage.kind != Blockwise.kind:
            return count + 4 * shape[0] + 1
        nested = bool(storage.detail("double_quant"))
        state = State(storage.detail("table"), storage.group_size, scale_dtype, shape, 0.0 if nested else None)
        fixed = -(-count // 2) + 4 * 16 + state.as_tensor().numel()
        if not nested:
            return fixed + 4 * state.blocks()
        return fixed + _OFFSET_DIGITS - 3 + state.blocks() + 4 * -(-state.blocks() // NESTED_BLOCK) + 4 * 256

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        if isinstance(packed, UniformGrid):
            return {
                "weight": (packed.codes ^ 128).view(torch.int8),  # code - 128
                "SCB": _row_maxima(packed.scales[:, 0]),
                "weight_format": torch.zeros((), dtype=torch.uint8),
            }
        assert isinstance(packed, Blockwise)  # why_not refused every other kind
        codes, table = packed.codes.flatten(), tables.table(packed.table, packed.codes.device)
        codes = F.pad(codes, (0, len(codes) % 2), value=int((table == 0).nonzero()[0]))
        offset = None if packed.nested_offset is None else float(packed.nested_offset)
        state = State(packed.table, packed.block_size, packed.dtype, packed.shape, offset)
        out = {
            "weight": ((codes[::2] << 4) | codes[1::2])[:, None],
            _ABSMAX: packed.absmax,
            _MAP: table.clone(),  # one a layer: files share no storage
            _STATE + _TYPES[packed.table]: state.as_tensor(),
        }
        if packed.nested_absmax is not None:
            out |= {_NESTED_ABSMAX: packed.nested_absmax, _NESTED_MAP: tables.dynamic_map(codes.device).clone()}
        return out

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Packed:
        """Exact inverse of `pack`. `config` is the checkpoint's quantization_config."""
        return _blocks(name, tensors) if _is_4bit(config) else _rows(name, tensors, config)

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        return marked(names, _ABSMAX if _is_4bit(config) else "SCB", METHOD)

    def described(
        self,
        config: Mapping[str, Any],
        layers: Iterable[str],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> Mapping[str, Any]:
        """The config with "layers": what the JSON of each 4-bit layer says, by its name."""
        if not _is_4bit(config):
            return config
        states = {}
        for layer in layers:
            name = next((n for t in _TABLES if (n := f"{layer}.{_STATE}{t}") in shapes), None)
            if name is None or math.prod(shapes[name]) > _MOST_JSON:
                raise _damaged("it has no quant_state of a known type", layer)
            states[layer] = State.of(read(name), layer, f"{layer}.{_NESTED_ABSMAX}" in shapes)
            if not name.endswith(_TYPES[states[layer].table]):
                raise _damaged(f"its quant_state does not say what its name {name!r} does", layer)
        return {**config, "layers": states}

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out, in): of 4-bit layers as their JSON says, see `described`."""
        if not _is_4bit(config):
            return shapes["weight"][0], shapes["weight"][1]
        state: State = config["layers"][name]
        if math.prod(shapes[_ABSMAX]) != state.blocks():
            raise _damaged(f"{shapes[_ABSMAX]} block maxima do not belong to the shape {list(state.shape)}", name)
        return state.shape

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        if not _is_4bit(config):
            return _compute_dtype(config)
        state: State = config["layers"][name]
        return state.dtype

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        if not _is_4bit(config):
            return Storage(UniformGrid.kind, 8, -1, activations=self.activations(name, config))
        state: State = config["layers"][name]
        return blockwise.describe(state.table, state.block_size, _NESTED_ABSMAX in shapes)

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        """By token in 8-bit files without outlier features (threshold 0)."""
        return "" if _is_4bit(config) or _threshold(config) > 0 else "token"

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        """quantization_config for config.json, with every key that bitsandbytes' own files have.

        Raises:
            CompressError: 4-bit and 8-bit layers, or NF4 and FP4, in one checkpoint; a module of a class of its own.
        """
        if dense_on_load:
            what = "transformers fills no linear layer of a class of its own from bitsandbytes"
            raise CompressError(what, "--format bitsandbytes", "use --format compressed-tensors, or native")
        tabled = {h.storage.detail("table") if h.storage.kind == Blockwise.kind else "8-bit rows" for h in layers}
        if len(tabled) > 1:
            what = f"a bitsandbytes checkpoint holds one data type, not {' and '.join(sorted(tabled))}"
            raise CompressError(what, "--format bitsandbytes", "use one of them for all layers, or --format native")
        table = tabled.pop()
        nested = [bool(h.storage.details and h.storage.detail("double_quant")) for h in layers]
        return {
            "quant_method": METHOD,
            "load_in_4bit": table in _TYPES,
            "load_in_8bit": table not in _TYPES,
            "llm_int8_threshold": 0.0,
            "llm_int8_skip_modules": sorted({*ignored, "lm_head"}),
            "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False,
            "bnb_4bit_quant_type": _TYPES.get(table, "fp4"),
            "bnb_4bit_use_double_quant": any(nested),
            "bnb_4bit_compute_dtype": _name(layers[0].dtype),
            "bnb_4bit_quant_storage": "uint8",
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files a reader wants: none."""
        return {}


def declares(config: Mapping[str, Any]) -> bool:
    """Whether a quantization_config is bitsandbytes': early ones do not name their method."""
    method = config.get("quant_method")
    return method == METHOD or (method is None and (_flag(config, "load_in_4bit") or _flag(config, "load_in_8bit")))


def _why_not_blocks(storage: Storage, layer: LayerShape) -> str | None:
    table, size = storage.detail("table"), storage.group_size
    if table not in _TYPES:
        return f"bitsandbytes has no table {table!r}: use --variant bnb, or --format native"
    if size not in _BLOCK_SIZES:
        return f"bitsandbytes has blocks of 32 to 4096 weights, a power of two, not {size}: use --block-size 64"
    if layer.in_features % size:
        fits = [s for s in _BLOCK_SIZES if s <= size and layer.in_features % s == 0]
        remedy = f"use --block-size {fits[-1]}, or --format native" if fits else "use --format native"
        what = f"blocks of {size} cross the rows of {layer.in_features} in_features, which bitsandbytes' CPU kernel"
        return f"{what} reads wrongly: {remedy}"
    if layer.out_features % _ROWS:
        what = f"bitsandbytes' CPU kernel takes {_ROWS} rows at a time, which {layer.out_features} out_features are not"
        return f"{what} a multiple of: use --format native, or --exclude this layer"
    return None


def _why_not_rows(storage: Storage, layer: LayerShape) -> str | None:
    other = "use --format native" if layer.transposed else "use --format compressed-tensors, or native"
    if storage.bits != 8 or storage.group_size != -1 or storage.ordered_groups:
        size = "whole rows" if storage.group_size == -1 else f"groups of {storage.group_size}"
        return f"bitsandbytes holds integers of 8 bits with a scale a row, not {storage.bits} bits in {size}: {other}"
    if storage.activations == "":
        return f"bitsandbytes quantises the inputs of 8-bit layers too: use absmax --activations token, or {other[4:]}"
    if storage.activations != "token" or not storage.symmetric:
        return "bitsandbytes has no zero points and a scale for each token: use --activations token without --zeropoint"
    return None


def _blocks(name: str, tensors: Mapping[str, Tensor]) -> Blockwise:
    """A 4-bit layer from its tensors, every one compared with the JSON."""
    blob = next((tensors[_STATE + t] for t in _TABLES if _STATE + t in tensors), None)
    if blob is None:
        raise _damaged("it has no quant_state of a known type", name)
    nested = tensors.get(_NESTED_ABSMAX)
    state = State.of(blob, name, nested is not None)
    count = state.shape[0] * state.shape[1]
    packed = tensors["weight"].contiguous().flatten().view(torch.uint8)  # bnb_4bit_quant_storage may name another dtype
    absmax = tensors[_ABSMAX]
    sizes = (len(packed), absmax.numel(), absmax.dtype)
    if sizes != (-(-count // 2), state.blocks(), torch.float32 if nested is None else torch.uint8):
        what = f"{sizes[0]} bytes and {sizes[1]} block maxima in {_name(sizes[2])} do not belong to"
        raise _damaged(f"{what} the shape {list(state.shape)} in blocks of {state.block_size}", name)
    _same_map(name, tensors[_MAP], tables.table(state.table))
    offset = None
    if nested is not None:
        if nested.numel() != -(-state.blocks() // NESTED_BLOCK) or nested.dtype != torch.float32:
            raise _damaged(f"{nested.numel()} second maxima do not belong to {state.blocks()} blocks", name)
        _same_map(name, tensors[_NESTED_MAP], tables.dynamic_map())
        offset = torch.tensor([state.offset], dtype=torch.float32, device=absmax.device)
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count].reshape(state.shape)
    return Blockwise(codes, absmax.flatten(), state.table, state.block_size, state.dtype, nested, offset)


def _same_map(name: str, found: Tensor, ours: Tensor) -> None:
    """The table as stored must be the one that we compute with: bitsandbytes computes with its own as well.

    Equal as nearly as float32 is: a table that another build of torch made may differ in the last bit.
    """
    if found.shape != ours.shape or not torch.allclose(found.float().cpu(), ours, rtol=1e-6, atol=1e-9):
        raise CompressError("its code table is not the one of its quant_type", name, _DAMAGED)


def _rows(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> UniformGrid:
    """An 8-bit layer. Its scales are in the dtype that the config names where that holds them exactly, else float32."""
    weight, maxima = tensors["weight"], tensors["SCB"].float().flatten()
    if weight.dtype != torch.int8 or weight.dim() != 2 or len(maxima) != len(weight):
        raise _damaged(f"{list(weight.shape)} of {_name(weight.dtype)} with {len(maxima)} row maxima", name)
    layout = tensors.get("weight_format")
    if layout is not None and bool(layout.any()):
        raise CompressError(f"weight_format {layout.tolist()} cannot be read", name, "rows (0) can")
    scales = maxima / 127
    rounded = scales.to(_compute_dtype(config))
    if torch.equal(rounded.float() * 127, maxima):
        scales = rounded
    codes = weight.contiguous().view(torch.uint8) ^ 128  # code + 128
    activations = "" if _threshold(config) > 0 else "token"
    return UniformGrid(codes, scales[:, None], None, 8, -1, None, activations)


def _row_maxima(scales: Tensor) -> Tensor:
    """float32 [out]: the numbers whose 127th part is the scale again, to the last bit.

    127 times a 16-bit scale is exact in float32. A float32 scale that is the 127th part of a row's maximum, as `absmax`
    makes it, comes back from 127 * scale or from a neighbour of that number.
    """
    scales = scales.float()
    maxima = scales * 127
    for limit in (math.inf, -math.inf):
        other = torch.nextafter(scales * 127, torch.full_like(scales, limit))
        maxima = torch.where(maxima / 127 == scales, maxima, other)
    if not torch.equal(maxima / 127, scales):
        what = "a float32 scale is no row maximum divided by 127, which is what bitsandbytes stores"
        raise CompressError(what, "", "use --format compressed-tensors, or a model in bfloat16")
    return maxima


def _is_4bit(config: Mapping[str, Any]) -> bool:
    return _flag(config, "load_in_4bit") or _flag(config, "_load_in_4bit")


def _flag(config: Mapping[str, Any], key: str) -> bool:
    return config.get(key) is True


def _threshold(config: Mapping[str, Any]) -> float:
    """6.0 is what bitsandbytes takes where a file does not say."""
    return float(config.get("llm_int8_threshold", 6.0))


def _compute_dtype(config: Mapping[str, Any]) -> torch.dtype:
    return _DTYPES.get(str(config.get("bnb_4bit_compute_dtype")), torch.float32)


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _damaged(what: str, name: str) -> CompressError:
    return CompressError(what, name, _DAMAGED)
