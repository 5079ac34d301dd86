"""GGUF files: the header, tensor names, and a config from the metadata. What is read; `gguf_writer` writes.

The header (ggml/docs/gguf.md, versions 2 and 3, little-endian) is parsed here with every count, length and offset
checked against the file's size, because a file may be damaged or hostile; strings and arrays that nobody asks for are
stepped over, never kept. Bytes of tensors are then read like those of safetensors files.

Tensors come under the names that they have in Hugging Face checkpoints: X.weight for float ones, P.q4_0 and the like
(uint8 [out, bytes of a row]) for quantised ones. Files of architecture llama keep the rows of q_proj and k_proj in
another order (each head's first and second half interleaved, for its rotary embedding); `Stored.rope_heads` says so,
and `read_tensor` puts them back, of packed rows too.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from compress.checkpoint import Stored, read_json
from compress.errors import CompressError
from compress.formats.gguf import METHOD, TYPES

MAGIC = b"GGUF"
#: our key in the metadata: {layer: [bits, group size]}, see `compress.formats.gguf`
LAYERS_KEY = "compress.layers"
ROPE_FREQS = "rope_freqs.weight"
#: general.architecture -> model_type in config.json
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}

_DAMAGED = "the file is damaged: download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: ("F32", 4), 1: ("F16", 2), 30: ("BF16", 2)}
_QUANTISED = {t.number: suffix for suffix, t in TYPES.items()}
# more are not believed: no model has them, and stepping over them takes its time
_MOST_KEYS, _MOST_TENSORS, _MOST_STRINGS = 65_536, 1_000_000, 10_000_000
_LONGEST_NAME, _LONGEST_KEY = 1024, 65_535

_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TO_OUTSIDE = {v: k for k, v in _OUTSIDE.items()}
_TO_INSIDE = {v: k for k, v in _INSIDE.items()}


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
            what = f"{self.architecture}.{key} is {_brief(value)}, not one positive number"
            raise CompressError(what, str(self.path), _DAMAGED)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        """A finite number under "<architecture>.<key>", float32 as the shortest decimal. Raises CompressError."""
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            what = f"{self.architecture}.{key} is {_brief(value)}, not a finite number"
            raise CompressError(what, str(self.path), _DAMAGED)
        return next(x for n in range(6, 18) if _float32(x := float(f"{value:.{n}g}")) == _float32(value))


def _float32(value: float) -> float:
    """The nearest number in float32 (that of a number beyond its range is itself)."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float(value)


def _brief(value: Any) -> str:
    text = "absent" if value is None else "an array" if isinstance(value, Array) else repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


class _Reader:
    """Reads a file's header from front to back; nothing is read or promised beyond its end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file = file
        self.path = path
        self.size = size
        self.at = 0

    def fault(self, what: str, remedy: str = _DAMAGED) -> CompressError:
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
        raise reader.fault(f"general.alignment is {_brief(alignment)}, not a power of two up to 65536")
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
    if kind not in _FLOATS and kind not in _QUANTISED:
        raise reader.fault(f"tensor {name!r} has type {kind}, which cannot be read", "quantise it to Q8_0 or Q4_0")
    return shape, kind, reader.scalar("Q", name)


def _placed(
    reader: _Reader, infos: Mapping[str, tuple[tuple[int, ...], int, int]], base: int, alignment: int
) -> dict[str, Info]:
    """The tensors with their places: aligned, within the file, none on top of another."""
    found: dict[str, Info] = {}
    for name, (shape, kind, offset) in infos.items():
        if kind in _FLOATS:
            nbytes = math.prod(shape) * _FLOATS[kind][1]
        else:
            block = TYPES[_QUANTISED[kind]]
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


# -- names ------------------------------------------------------------------------------------------------------


def to_hugging_face(name: str) -> str | None:
    """The name of a tensor of GGUF in a Hugging Face checkpoint, None if it has none."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    inside = re.fullmatch(r"blk\.(0|[1-9]\d{0,5})\.(\w+)", stem)
    if inside is not None and inside[2] in _INSIDE:
        return f"model.layers.{inside[1]}.{_INSIDE[inside[2]]}.{leaf}"
    return f"{_OUTSIDE[stem]}.{leaf}" if stem in _OUTSIDE else None


def to_gguf(name: str) -> tuple[str, str] | None:
    """GGUF's name of a tensor and the suffix that it has here ("weight", "bias", "q4_0"); None if it has no place."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias", *TYPES):
        return None
    ending = "bias" if leaf == "bias" else "weight"
    inside = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem)
    if inside is not None and inside[2] in _TO_INSIDE:
        return f"blk.{inside[1]}.{_TO_INSIDE[inside[2]]}.{ending}", leaf
    return (f"{_TO_OUTSIDE[stem]}.{ending}", leaf) if stem in _TO_OUTSIDE else None


def rope_heads(architecture: str, name: str, heads: int, kv_heads: int) -> int:
    """For how many heads the rows of a tensor (GGUF's name) are interleaved; 0 where they are not."""
    if architecture != "llama":
        return 0  # qwen2 and qwen3 rotate halves, as transformers does
    part = name.split(".")[-2]
    return {"attn_q": heads, "attn_k": kv_heads}.get(part, 0)


# -- a checkpoint -----------------------------------------------------------------------------------------------


def find(place: Path) -> Path | None:
    """The GGUF file that a folder's weights are in, or the file itself; None for other checkpoints.

    Raises:
        CompressError: several of them and nothing else.
    """
    if place.is_file():
        return place if place.suffix == ".gguf" else None
    if not place.is_dir() or any(place.glob("*.safetensors")) or any(place.glob("pytorch_model*.bin")):
        return None
    found = sorted(place.glob("*.gguf"))
    if len(found) > 1:
        what = f"holds {len(found)} .gguf files, first {found[0].name}"
        raise CompressError(what, str(place), "pass one of the files")
    return found[0] if found else None


def model_place(file: Path) -> Path:
    """What to open for a GGUF file that was named: its folder where that is the folder of just this model."""
    alone = (file.parent / "config.json").is_file() and len(list(file.parent.glob("*.gguf"))) == 1
    return file.parent if alone and find(file.parent) is not None else file


def read(place: Path, file: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """config.json (the folder's own, or made from the metadata) and the tensors of a GGUF file."""
    header = read_header(file)
    tensors = stored_tensors(header)
    config = read_json(place / "config.json") if (place / "config.json").is_file() else config_of(header)
    config.pop("quantization_config", None)
    if any(n.rpartition(".")[2] in TYPES for n in tensors):
        config["quantization_config"] = {"quant_method": METHOD, "layers": _layers(header)}
    return config, tensors


def _layers(header: Header) -> dict[str, Any]:
    """What our key says; empty for files of other tools. Raises CompressError."""
    raw = header.metadata.get(LAYERS_KEY, "{}")
    try:
        value = json.loads(raw) if isinstance(raw, str) else None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CompressError(f"its key {LAYERS_KEY} holds no JSON object", str(header.path), _DAMAGED)
    return value


def stored_tensors(header: Header) -> dict[str, Stored]:
    """Where each tensor lies, by its name in Hugging Face checkpoints. Raises CompressError for one without a name."""
    architecture = header.architecture
    if header.metadata.get("split.count", 1) not in (0, 1):
        what = f"one of {header.metadata['split.count']} parts of a model"
        raise CompressError(what, str(header.path), "join them with llama-gguf-split --merge")
    heads = header.number("attention.head_count")
    kv_heads = header.number("attention.head_count_kv", heads)
    found: dict[str, Stored] = {}
    for name, info in header.tensors.items():
        if name == ROPE_FREQS:
            continue  # no weight: what config.json calls rope scaling
        known = to_hugging_face(name)
        if known is None:
            what = f"tensor {name[:80]!r} belongs to no {architecture} model"
            raise CompressError(what, str(header.path), "this variant of the architecture is not supported")
        turned = rope_heads(architecture, name, heads, kv_heads)
        if turned and info.shape[0] % (2 * turned):
            what = f"tensor {name!r} has {info.shape[0]} rows for {turned} heads"
            raise CompressError(what, str(header.path), _DAMAGED)
        if info.type in _FLOATS:
            found[known] = Stored(header.path, info.start, info.nbytes, _FLOATS[info.type][0], info.shape, turned)
            continue
        if len(info.shape) != 2:
            what = f"tensor {name!r} of shape {list(info.shape)} is quantised, which only matrices can be"
            raise CompressError(what, str(header.path), _DAMAGED)
        rows = info.shape[0]
        known = f"{known.rpartition('.')[0]}.{_QUANTISED[info.type]}"
        found[known] = Stored(header.path, info.start, info.nbytes, "U8", (rows, info.nbytes // rows), turned)
    return found


# -- a config from the metadata -----------------------------------------------------------------------------------


def config_of(header: Header) -> dict[str, Any]:
    """What config.json would say of a file that stands alone. Raises CompressError."""
    architecture = header.architecture
    if "token_embd.weight" not in header.tensors:
        raise CompressError("has no tensor token_embd.weight", str(header.path), "pass the model, not a part of it")
    heads, hidden = header.number("attention.head_count"), header.number("embedding_length")
    head_dim = header.number("attention.key_length", max(1, hidden // heads))
    biased = "blk.0.attn_q.bias" in header.tensors
    classes = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[architecture],
        "architectures": [classes[architecture]],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": header.number("feed_forward_length"),
        "num_hidden_layers": header.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": header.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": header.real("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": header.number("context_length"),
        "rope_parameters": _rope(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float16",
    }
    if architecture != "qwen2":  # whose q, k and v always have biases
        config["attention_bias"] = biased
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        value = header.metadata.get(f"tokenizer.ggml.{theirs}_token_id")
        config[ours] = value if isinstance(value, int) and 0 <= value < config["vocab_size"] else None
    return config


def _rope(header: Header, head_dim: int) -> dict[str, Any]:
    """rope_parameters of config.json. Raises CompressError for a scaling that transformers has not."""
    theta = header.real("rope.freq_base", 10000.0)
    rotated = header.number("rope.dimension_count", head_dim)
    if rotated != head_dim:
        what = f"rotates {rotated} of the {head_dim} dimensions of a head"
        raise CompressError(what, str(header.path), "this variant of the architecture is not supported")
    if ROPE_FREQS in header.tensors:
        return _llama3(header, theta, head_dim)
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if scaling == "none":
        return {"rope_type": "default", "rope_theta": theta}
    if scaling not in ("linear", "yarn"):
        what = f"rope scaling {_brief(scaling)}, readable are linear and yarn"
        raise CompressError(what, str(header.path), "put the model's config.json beside the file")
    found = {"rope_type": scaling, "rope_theta": theta, "factor": header.real("rope.scaling.factor")}
    if scaling == "yarn":
        found["original_max_position_embeddings"] = header.number("rope.scaling.original_context_length")
    return found


def rope_factors(rope: Mapping[str, Any], head_dim: int) -> list[float]:
    """By what Llama 3's scaling divides each of the head_dim / 2 frequencies, as llama.cpp keeps them.

    Between the two wavelengths the frequencies are blended linearly in 1 / wavelength (transformers,
    _compute_llama3_parameters; llama.cpp, convert_hf_to_gguf.py, generate_extra_tensors).
    """
    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    found = []
    for turns in _turns(float(rope["rope_theta"]), head_dim):
        blend = min(1.0, max(0.0, (original * turns - low) / (high - low)))
        found.append(1.0 / ((1.0 - blend) / factor + blend))
    return found


def _turns(theta: float, head_dim: int) -> list[float]:
    """1 / wavelength of each frequency, in tokens."""
    return [theta ** (-2 * i / head_dim) / (2 * math.pi) for i in range(head_dim // 2)]


def _llama3(header: Header, theta: float, head_dim: int) -> dict[str, Any]:
    """The scaling that gives the factors in the file: solved for from two of its blended frequencies.

    The blend is linear, a / wavelength - b, with a = original / (high - low) and b = low / (high - low): one number is
    free, so low_freq_factor is 1, as in every published model. Raises CompressError where nothing of the kind fits.
    """
    info = header.tensors[ROPE_FREQS]
    unsolved = "its rope_freqs.weight fits no rope scaling of transformers"
    remedy = "put the model's config.json beside the file"
    if info.type != 0 or info.shape != (head_dim // 2,):
        raise CompressError(unsolved, str(header.path), remedy)
    with header.path.open("rb") as file:
        file.seek(info.start)
        factors = struct.unpack(f"<{head_dim // 2}f", file.read(info.nbytes))
    plain = {"rope_type": "default", "rope_theta": theta}
    if all(f == 1.0 for f in factors):
        return plain
    factor = max(factors)
    turns = _turns(theta, head_dim)
    blended = [(t, (1 / f - 1 / factor) / (1 - 1 / factor)) for t, f in zip(turns, factors, strict=True) if f > 0]
    inner = [(t, s) for t, s in blended if 1e-4 < s < 1 - 1e-4]
    if len(inner) > 1 and math.isfinite(factor) and inner[0][0] != inner[-1][0]:
        (t0, s0), (t1, s1) = inner[0], inner[-1]
        a = (s1 - s0) / (t1 - t0)
        b = a * t0 - s0
        if a > 0 and b > 0:
            found = {
                "rope_type": "llama3",
                "rope_theta": theta,
                "factor": float(f"{factor:.6g}"),
                "low_freq_factor": 1.0,
                "high_freq_factor": float(f"{1 + 1 / b:.4g}"),
                "original_max_position_embeddings": round(a / b),
            }
            if all(abs(x - y) <= 1e-3 * y for x, y in zip(rope_factors(found, head_dim), factors, strict=True)):
                return found
    raise CompressError(unsolved, str(header.path), remedy)


# -- beside the weights -------------------------------------------------------------------------------------------

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def lone_config(place: Path) -> dict[str, Any] | None:
    """The config of a GGUF file that has no config.json beside it, None where there is one."""
    if (place / "config.json").is_file():
        return None
    file = find(place)
    return None if file is None else config_of(read_header(file))


def tokenizer_source(place: Path) -> tuple[Path, dict[str, str]]:
    """The folder and further arguments from which transformers loads the tokenizer of a model."""
    if place.is_dir() and any((place / name).is_file() for name in _TOKENIZER_FILES):
        return place, {}
    file = find(place)
    return (place, {}) if file is None else (file.parent, {"gguf_file": file.name})
