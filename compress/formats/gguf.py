"""GGUF's blocks: what llama.cpp and everything built on it loads. `compress.gguf` is the file around them.

A row of in_features weights lies in blocks of 32 (llama.cpp, ggml-common.h):

    Q4_0  18 bytes  float16 d; 16 bytes, byte j = code[j] | code[j + 16] << 4      weight = d * (code - 8)
    Q4_1  20 bytes  float16 d; float16 m; codes as in Q4_0                         weight = d * code + m
    Q8_0  34 bytes  float16 d; 32 int8                                             weight = d * code

A packed layer P has one tensor, P.q4_0, P.q4_1 or P.q8_0, uint8 [out, in / 32 * bytes]. Our codes go in as they are:
symmetric grids of 2 to 4 bits into Q4_0 (2 and 3 bits moved to the middle of its 16 levels, so they take 4.5 bits on
disk), of 5 to 8 bits into Q8_0, affine ones of 2 to 4 bits into Q4_1; the scale of a larger group is repeated. Which
bits and group size a layer had, where it was not the block's own, stands in quantization_config["layers"] = {P: [bits,
group size]} (the file's key "compress.layers"). A file of another tool has none: 4 or 8 bits, groups of 32.

Block types that we do not write are read as ordinary weights in float32 through the package gguf.

Scales are float16, so weights dequantise here in float16: one rounding of what llama.cpp computes in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.base import Held, LayerShape
from compress.packed.affine import Affine
from compress.packed.dense import Dense
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

METHOD = "gguf"
BLOCK = 32


@dataclass(frozen=True)
class BlockType:
    """How a GGUF tensor type lays out weights.

    Attributes:
        number: of the type in tensor infos.
        weights: a block.
        nbytes: of a block.
    """

    number: int
    weights: int
    nbytes: int


#: quantised types by our suffix, which is llama.cpp's name in lower case (ggml.h, ggml-common.h)
TYPES = {
    "q4_0": BlockType(2, 32, 18),
    "q4_1": BlockType(3, 32, 20),
    "q5_0": BlockType(6, 32, 22),
    "q5_1": BlockType(7, 32, 24),
    "q8_0": BlockType(8, 32, 34),
    "q2_k": BlockType(10, 256, 84),
    "q3_k": BlockType(11, 256, 110),
    "q4_k": BlockType(12, 256, 144),
    "q5_k": BlockType(13, 256, 176),
    "q6_k": BlockType(14, 256, 210),
    "iq2_xxs": BlockType(16, 256, 66),
    "iq2_xs": BlockType(17, 256, 74),
    "iq3_xxs": BlockType(18, 256, 98),
    "iq1_s": BlockType(19, 256, 50),
    "iq4_nl": BlockType(20, 32, 18),
    "iq3_s": BlockType(21, 256, 110),
    "iq2_s": BlockType(22, 256, 82),
    "iq4_xs": BlockType(23, 256, 136),
    "iq1_m": BlockType(29, 256, 56),
    "tq1_0": BlockType(34, 256, 54),
    "tq2_0": BlockType(35, 256, 66),
    "mxfp4": BlockType(39, 32, 17),
}
#: the types that are read as codes and scales, with their bits
_CODED = {"q4_0": 4, "q4_1": 4, "q8_0": 8}


class GGUF:
    """The format as a value; see the module's text."""

    name = "gguf"
    suffixes = tuple(TYPES)
    container = "gguf"
    quantised = True

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        if storage.kind not in (UniformGrid.kind, Affine.kind):
            return f"GGUF cannot hold the kind {storage.kind!r}: use --format native, or rtn or gptq --symmetric"
        if storage.activations:
            return "GGUF is weight-only, it cannot quantise activations: use --format native"
        if storage.kind == UniformGrid.kind and not storage.symmetric:
            return "GGUF has no zero points: use --symmetric, or --format native"
        if storage.ordered_groups:
            return "GGUF has no groups that follow an activation order: use --act-order static"
        if storage.kind == Affine.kind and storage.bits > 4:
            return f"GGUF holds affine grids of 2 to 4 bits, not {storage.bits}: use --format native"
        if layer.expert:
            return "experts are not written to GGUF: use --format native, or --exclude them"
        if layer.transposed:
            return "layers kept as [in, out] are not written to GGUF: use --format native"
        return _group_fault(storage.group_size, layer.in_features)

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        return shape[0] * (shape[1] // BLOCK) * TYPES[_suffix(storage)].nbytes

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        assert isinstance(packed, (UniformGrid, Affine))  # why_not refused every other kind
        suffix = _suffix(packed.storage)
        rows, columns = packed.shape
        blocks = columns // BLOCK
        codes = packed.codes.reshape(rows, blocks, BLOCK)
        pieces = [_per_block(packed.scales, blocks)]
        if isinstance(packed, Affine):
            pieces.append(_per_block(packed.minima, blocks))
        else:  # in int16: uint8 would wrap around
            middle = 0 if suffix == "q8_0" else 8
            codes = (codes.to(torch.int16) - 2 ** (packed.bits - 1) + middle).to(torch.int8).view(torch.uint8)
        pieces.append(codes if suffix == "q8_0" else codes[..., :16] | codes[..., 16:] << 4)
        return {suffix: torch.cat(pieces, -1).reshape(rows, -1)}

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Packed:
        """Exact inverse of `pack`. Raises ValueError for facts in `config` that do not fit the blocks."""
        ((suffix, raw),) = tensors.items()
        if suffix not in _CODED:
            return Dense(_dequantised(name, suffix, raw))
        blocks = raw.reshape(raw.shape[0], -1, TYPES[suffix].nbytes)
        bits, group_size = _facts(name, suffix, config)
        header = 4 if suffix == "q4_1" else 2
        if suffix == "q8_0":
            codes = blocks[..., header:].contiguous().view(torch.int8).to(torch.int16)
        else:
            both = blocks[..., header:]
            codes = torch.cat((both & 15, both >> 4), -1).to(torch.int16)
        codes = codes.reshape(raw.shape[0], -1)
        scales = _per_group(blocks[..., :2], group_size, codes.shape[1])
        if suffix == "q4_1":
            minima = _per_group(blocks[..., 2:4], group_size, codes.shape[1])
            return Affine(_narrow(codes, bits, 4), scales, minima, bits, group_size)
        codes = codes + 2 ** (bits - 1) - (0 if suffix == "q8_0" else 8)
        return UniformGrid(_narrow(codes, bits, _CODED[suffix]), scales, None, bits, group_size)

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        found = {n.rpartition(".")[0] for n in names if n.rpartition(".")[2] in TYPES}
        if not found:
            raise CompressError("declares GGUF but holds no quantised tensor", "", "pass the .gguf file itself")
        return found

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        ((suffix, (rows, nbytes)),) = shapes.items()
        return rows, nbytes // TYPES[suffix].nbytes * TYPES[suffix].weights

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return torch.float16 if next(iter(dtypes)) in _CODED else torch.float32

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        suffix = next(iter(shapes))
        if suffix not in _CODED:
            return Storage(Dense.kind, 16)
        bits, group_size = _facts(name, suffix, config)
        if suffix == "q4_1":
            return Storage(Affine.kind, bits, group_size, symmetric=False)
        return Storage(UniformGrid.kind, bits, group_size)

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        return ""

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        facts = {h.name: [h.storage.bits, h.storage.group_size] for h in layers}
        own = {h.name: [_CODED[_suffix(h.storage)], BLOCK] for h in layers}
        return {"quant_method": METHOD, "layers": {n: f for n, f in facts.items() if f != own[n]}}

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _suffix(storage: Storage) -> str:
    """The block type that holds a storage."""
    if storage.kind == Affine.kind:
        return "q4_1"
    return "q4_0" if storage.bits <= 4 else "q8_0"


def _facts(name: str, suffix: str, config: Mapping[str, Any]) -> tuple[int, int]:
    """Bits and group size of a layer. Raises ValueError, TypeError for what are not two numbers."""
    bits, group_size = config.get("layers", {}).get(name, (_CODED[suffix], BLOCK))
    return int(bits), int(group_size)


def _group_fault(group_size: int, columns: int) -> str | None:
    """Why a group size does not go into blocks of 32, with the nearest that does."""
    if columns % BLOCK:
        return (
            f"GGUF keeps rows in blocks of 32, which do not divide in_features {columns}: use --exclude for this "
            "layer, or --format compressed-tensors"
        )
    if group_size == -1 or (group_size > 0 and group_size % BLOCK == 0 and columns % group_size == 0):
        return None
    fits = [g for g in range(BLOCK, columns + 1, BLOCK) if columns % g == 0]
    near = min(fits, key=lambda g: abs(g - group_size))
    what = f"group size {group_size} is not made of GGUF's blocks of 32, or does not divide in_features {columns}"
    return f"{what}: use --group-size {near} or -1"


def _per_block(values: Tensor, blocks: int) -> Tensor:
    """float16 [out, groups] -> uint8 [out, blocks, 2], each group's value repeated for its blocks."""
    repeated = values.to(torch.float16).repeat_interleave(blocks // values.shape[1], 1)
    return repeated.contiguous().view(torch.uint8).reshape(len(values), blocks, 2)


def _per_group(raw: Tensor, group_size: int, columns: int) -> Tensor:
    """uint8 [out, blocks, 2] -> float16 [out, groups]. Raises ValueError where a group's blocks differ."""
    if group_size != -1 and (group_size < BLOCK or group_size % BLOCK or columns % group_size):
        raise ValueError(f"no group size {group_size} in rows of {columns}")
    size = columns if group_size == -1 else group_size
    words = raw.contiguous().view(torch.int16).reshape(raw.shape[0], columns // size, size // BLOCK)
    if not bool((words == words[..., :1]).all()):
        raise ValueError(f"the blocks of a group of {size} have different scales")
    return words[..., 0].contiguous().view(torch.float16)


def _narrow(codes: Tensor, bits: int, held: int) -> Tensor:
    """int16 codes as uint8. Raises ValueError for one that `bits` do not reach."""
    if not 2 <= bits <= held:
        raise ValueError(f"{bits} bits in a block of {held}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes {int(codes.min())} to {int(codes.max())} are not {bits} bits")
    return codes.to(torch.uint8)


def _dequantised(name: str, suffix: str, raw: Tensor) -> Tensor:
    """float32 [out, in] of a block type that we do not write."""
    kind = suffix.upper()
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise CompressError(f"reading {kind} needs the package gguf", name, "pip install gguf") from None
    try:
        values = dequantize(raw.contiguous().numpy(), GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError):
        what = f"the installed gguf cannot dequantise {kind}"
        raise CompressError(what, name, "pip install --upgrade gguf, or quantise to Q4_0, Q4_1 or Q8_0") from None
    return torch.from_numpy(values)
