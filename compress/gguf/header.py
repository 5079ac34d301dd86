"""The header of a GGUF file: its metadata, and where each tensor lies.

The header (ggml/docs/gguf.md, versions 2 and 3, little-endian) is parsed here with every count, length and offset
checked against the file's size, because a file may be damaged or hostile; strings and arrays that nobody asks for are
stepped over, never kept.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import CompressError
from compress.formats.gguf import TYPES

MAGIC = b"GGUF"
#: our key in the metadata: {layer: [bits, group size]}, see `compress.formats.gguf`
LAYERS_KEY = "compress.layers"
ROPE_FREQS = "rope_freqs.weight"
#: general.architecture -> model_type in config.json
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

DAMAGED = "the file is damaged: download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
FLOATS = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
QUANTISED = {t.number: suffix for suffix, t in TYPES.items()}
# more are not believed: no model has them, and stepping over them takes its time
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 65_536, 1_000_000, 10_000_000
_LONGEST_NAME, _LONGEST_KEY = 1024, 65_535


@dataclass(frozen=True)
class Array:
    """An array in the metadata that is not kept.

    Attributes:
        kind: type number of its elements.
        count: how many.
    """

    kind: int
    count: int


@dataclass(frozen=True)
class Info:
    """A tensor of the file.

    Attributes:
        shape: as in torch, the longest-striding dimension first.
        type: number of the tensor type.
        start: first byte in the file.
        nbytes: how many.
    """

    shape: tuple[int, ...]
    type: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        metadata: plain values, and `Array` in place of arrays.
        tensors: by the file's own names.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Info]

    @property
    def architecture(self) -> str:
        """A key of ARCHITECTURES. Raises CompressError for what cannot be read."""
        found = self.metadata.get("general.architecture")
        if found not in ARCHITECTURES:
            what = f"architecture {str(found)[:40]!r}, readable are {', '.join(ARCHITECTURES)}"
            raise CompressError(what, str(self.path), "convert it with transformers (from_pretrained gguf_file=)")
        return str(found)

    def number(self, key: str, default: int | None = None) -> int:
        """A positive whole number under "<architecture>.<key>". Raises CompressError."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            what = f"{self.architecture}.{key} is {brief(value)}, not one positive number"
            raise CompressError(what, str(self.path), DAMAGED)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number under "<architecture>.<key>", float32 as the shortest decimal. Raises CompressError."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            what = f"{self.architecture}.{key} is {brief(value)}, not a finite number"
            raise CompressError(what, str(self.path), DAMAGED)
        return next(x for n in range(6, 18) if _float32(x := float(f"{value:.{n}g}")) == _float32(value))


def _float32(value: float) -> float:
    """The nearest number in float32 (that of a number beyond its range is itself)."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float(value)


def brief(value: Any) -> str:
    text = "absent" if value is None else "an array" if isinstance(value, Array) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


class _Reader:
    """Reads a file's header from front to back; nothing is read or promised beyond its end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.at = 0

    def fault(self, what: str, remedy: str = DAMAGED) -> CompressError:
        return CompressError(f"{what} (byte {self.at} of {self.size})", str(self.path), remedy)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise self.fault(f"{what} of {count} bytes goes beyond the end of the file")

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        found = self.file.read(count)
        if len(found) != count:
            raise self.fault("the file was cut while it was read")
        self.at += count
        return found

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.file.seek(count, 1)
        self.at += count

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.scalar("Q", what)
        if longest is not None and length > longest:
            raise self.fault(f"{what} of {length} bytes, more than {longest} are not believed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fault(f"{what} is not UTF-8") from None

    def value(self, kind: int, key: str) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(key, 0)
        raise self.fault(f"{key!r} has type {kind}, which GGUF does not know")

    def array(self, key: str, depth: int) -> Array:
        """Steps over an array."""
        kind, count = self.scalar("I", key), self.scalar("Q", key)
        if kind in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[kind]), f"{key!r}")
            return Array(kind, count)
        if kind not in (_STRING, _ARRAY) or depth > 3:
            raise self.fault(f"{key!r} holds elements of type {kind}" + (" too deep" if depth > 3 else ""))
        if count > _MOST_STRINGS:
            raise self.fault(f"{key!r} of {count} elements, more than {_MOST_STRINGS} are not believed")
        self.need(count * (8 if kind == _STRING else 12), f"{key!r}")
        for _ in range(count):
            if kind == _STRING:
                self.skip(self.scalar("Q", key), f"a string in {key!r}")
            else:
                self.array(key, depth + 1)
        return Array(kind, count)


def read_header(path: Path) -> Header:
    """The header of a GGUF file, all of it checked. Raises CompressError for anything malformed."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            return _header(_Reader(file, path, size))
    except OSError as error:
        raise CompressError(f"cannot be read ({error.strerror})", str(path), "pass a .gguf file") from None


def _header(reader: _Reader) -> Header:
    if reader.size < 24 or reader.take(4, "the magic") != MAGIC:
        raise reader.fault("not a GGUF file")
    version = reader.scalar("I", "the version")
    if version not in (2, 3):
        big = version in (2 << 24, 3 << 24)
        what = "a big-endian file" if big else f"GGUF version {version}, readable are 2 and 3"
        raise reader.fault(what, "convert it again with a current llama.cpp")
    tensors, keys = reader.scalar("Q", "the tensor count"), reader.scalar("Q", "the key count")
    if tensors > _MOST_TENSORS or keys > _MOST_KEYS or 24 * tensors + 13 * keys > reader.size - reader.at:
        raise reader.fault(f"{tensors} tensors and {keys} keys do not fit into the file")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string("a key", _LONGEST_KEY)
        if key in metadata:
            raise reader.fault(f"the key {key[:80]!r} comes twice")
        metadata[key] = reader.value(reader.scalar("I", key), key[:80])
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = reader.string("a tensor's name", _LONGEST_NAME)
        if name in infos:
            raise reader.fault(f"tensor {name[:80]!r} comes twice")
        infos[name] = _info(reader, name[:80])
    alignment = metadata.get("general.alignment", 32)
    valid = isinstance(alignment, int) and not isinstance(alignment, bool) and 1 <= alignment <= 65536
    if not valid or alignment & (alignment - 1):
        raise reader.fault(f"general.alignment is {brief(alignment)}, not a power of two up to 65536")
    return Header(reader.path, metadata, _placed(reader, infos, reader.at + -reader.at % alignment, alignment))


def _info(reader: _Reader, name: str) -> tuple[tuple[int, ...], int, int]:
    """Shape, type and offset of one tensor."""
    dims = reader.scalar("I", name)
    if not 1 <= dims <= 4:
        raise reader.fault(f"tensor {name!r} has {dims} dimensions")
    shape = tuple(reader.scalar("Q", name) for _ in range(dims))[::-1]
    if min(shape) < 1 or math.prod(shape) >= 2**63:
        raise reader.fault(f"tensor {name!r} has the shape {list(shape)}")
    kind = reader.scalar("I", name)
    if kind not in FLOATS and kind not in QUANTISED:
        raise reader.fault(f"tensor {name!r} has type {kind}, which cannot be read", "quantise it to Q8_0 or Q4_0")
    return shape, kind, reader.scalar("Q", name)


def _placed(
    reader: _Reader, infos: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, alignment: int
) -> dict[str, Info]:
    """The tensors with their places: aligned, within the file, none on top of another."""
    found: dict[str, Info] = {}
    for name, (shape, kind, offset) in infos.items():
        if kind in FLOATS:
            nbytes = math.prod(shape) * FLOATS[kind][1]
        else:
            block = TYPES[QUANTISED[kind]]
            if shape[-1] % block.weights:
                raise reader.fault(f"tensor {name[:80]!r}: blocks of {block.weights} do not divide {list(shape)}")
            nbytes = math.prod(shape) // block.weights * block.nbytes
        if offset % alignment or base + offset + nbytes > reader.size:
            raise reader.fault(
                f"tensor {name[:80]!r} lies at {offset}, {nbytes} bytes: not aligned, or not in the file"
            )
        found[name] = Info(shape, kind, base + offset, nbytes)
    end = 0
    for name, info in sorted(found.items(), key=lambda item: item[1].start):
        if info.start < end:
            raise reader.fault(f"tensor {name[:80]!r} lies on another")
        end = info.start + info.nbytes
    return found
