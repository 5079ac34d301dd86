"""Writes a checkpoint as one GGUF file: what llama.cpp needs to know of the model, its tokenizer, its tensors.

The file itself is laid out by the package gguf. Tensors are copied one at a time; packed rows and matrices byte for
byte, but for the order of the rows of q_proj and k_proj of models named llama; tensors of one dimension as float32,
which llama.cpp wants them in and which holds every float16 and bfloat16.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from compress.checkpoint import Checkpoint, Stored, read_tensor, side_by_side, tensor_bytes
from compress.errors import CompressError
from compress.formats.gguf import TYPES
from compress.gguf.config import rope_factors
from compress.gguf.header import LAYERS_KEY, ROPE_FREQS
from compress.gguf.names import rope_heads, to_gguf
from compress.hashes import hash_files
from compress.writer import _durably

SINGLE = "model.gguf"
#: model_type -> llama.cpp's architecture
WRITABLE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
#: tensors of old checkpoints that readers compute from the config; they are not written
COMPUTED = ".rotary_emb.inv_freq"
_FLOATS = ("F32", "F16", "BF16")
_OTHER = "use --format compressed-tensors, or native"
_KINDS = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
#: general.file_type by the type that most bytes have (llama.h, llama_ftype)
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "BF16": 32}


def refuse(source: Checkpoint) -> None:
    """Raise CompressError for a model that cannot be written as GGUF. Asked before any work starts."""
    describe(source)
    for name, stored in source.tensors.items():
        _place(name, stored)


def describe(source: Checkpoint) -> tuple[str, dict[str, Any]]:
    """llama.cpp's architecture, and the metadata of model and tokenizer.

    Raises:
        CompressError: gguf is not installed; something of the model that llama.cpp does not compute.
    """
    from compress.gguf.tokenizer import describe as describe_tokenizer
    from compress.skeleton import load_config

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise CompressError("needs the package gguf", "--format gguf", "pip install 'compress-llm[gguf]'") from None
    model_type = source.config.get("model_type")
    if model_type not in WRITABLE:
        what = f"model_type {model_type!r} is not written to GGUF: {', '.join(WRITABLE)} are"
        raise CompressError(what, str(source.folder), _OTHER)
    config = load_config(source.folder)
    architecture = WRITABLE[str(model_type)]
    metadata = _model(config, architecture, str(source.folder))
    return architecture, metadata | describe_tokenizer(source.folder, config.vocab_size)


def _model(config: Any, arch: str, where: str) -> dict[str, Any]:
    """The hyperparameters, of a transformers config. Raises CompressError."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.hidden_act != "silu":
        raise CompressError(f"hidden_act {config.hidden_act} is not silu, llama.cpp's own", where, _OTHER)
    longest = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if isinstance(window, int) and getattr(config, "use_sliding_window", True):
        longest = min(longest, window)  # llama.cpp attends to everything, which is the same up to the window's length
    out: dict[str, Any] = {
        "general.type": "model",
        f"{arch}.vocab_size": config.vocab_size,
        f"{arch}.context_length": longest,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": config.num_key_value_heads,
        f"{arch}.attention.key_length": head_dim,
        f"{arch}.attention.value_length": head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        f"{arch}.rope.dimension_count": head_dim,
    }
    rope = dict(config.rope_parameters)
    out[f"{arch}.rope.freq_base"] = float(rope.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", "default")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "type"}
    known |= {"low_freq_factor", "high_freq_factor"} if kind == "llama3" else set()
    usual = {"partial_rotary_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}  # llama.cpp's, when they are not given
    other = sorted(k for k, v in rope.items() if k not in known and v is not None and v != usual.get(k))
    if kind not in ("default", "linear", "yarn", "llama3") or other:
        what = f"rope of type {kind}" + (f" with {other[0]} {rope[other[0]]}" if other else "")
        raise CompressError(f"{what} is not written to GGUF", where, _OTHER)
    if kind in ("linear", "yarn"):
        out[f"{arch}.rope.scaling.type"] = kind
        out[f"{arch}.rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        out[f"{arch}.rope.scaling.original_context_length"] = int(original)
    if kind == "llama3":
        out[ROPE_FREQS] = rope_factors(rope, head_dim)  # a tensor, see `write`
    return out


def _place(name: str, stored: Stored) -> tuple[str, str] | None:
    """GGUF's name of a tensor and its type there, None for what is not written. Raises CompressError."""
    if name.endswith(COMPUTED):
        return None
    found = to_gguf(name)
    if found is None:
        raise CompressError("this tensor has no place in a GGUF file", name, _OTHER)
    target, leaf = found
    if leaf.upper() in _FILE_TYPES:
        return target, leaf.upper()
    if leaf in TYPES:
        raise CompressError(f"{leaf.upper()} is read, not written", name, "pass a model in 16 bits")
    if stored.dtype not in _FLOATS:
        raise CompressError(f"stored as {stored.dtype}, not as 16- or 32-bit floats", name, _OTHER)
    return target, "F32" if len(stored.shape) == 1 else stored.dtype


def write(
    path: Path, tensors: Iterable[tuple[str, Stored]], source: Checkpoint, quantization: Mapping[str, Any]
) -> dict[str, str]:
    """Write the whole file durably.

    Args:
        tensors: names as in Hugging Face checkpoints, packed layers with the suffixes of `formats.gguf`.
        source: the model's config and tokenizer.
        quantization: its "layers" are kept, see `formats.gguf`.

    Returns:
        sha256 of the file, by its name.

    Raises:
        CompressError: what `refuse` refuses; the disk does not take it.
    """
    architecture, metadata = describe(source)
    from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter

    factors = metadata.pop(ROPE_FREQS, None)
    placed = [(name, stored, place) for name, stored in tensors if (place := _place(name, stored)) is not None]
    sizes: dict[str, int] = {}
    for _, stored, (_, kind) in placed:
        sizes[kind] = sizes.get(kind, 0) + stored.nbytes
    packed = {k: n for k, n in sizes.items() if k not in _FLOATS}
    if packed:
        metadata["general.quantization_version"] = GGML_QUANT_VERSION
    kinds = packed or sizes
    metadata["general.file_type"] = _FILE_TYPES[max(kinds, key=lambda k: kinds[k])]
    if quantization.get("layers"):
        metadata[LAYERS_KEY] = json.dumps(quantization["layers"], separators=(",", ":"), sort_keys=True)

    heads = metadata[f"{architecture}.attention.head_count"]
    kv_heads = metadata[f"{architecture}.attention.head_count_kv"]
    with _durably(path, sum(sizes.values())) as file:
        writer = GGUFWriter(file.name, architecture)  # which opens the same temporary file
        try:
            for key, value in metadata.items():
                if value != []:
                    writer.add_key_value(key, value, GGUFValueType[_KINDS[type(value)]])
            if factors is not None:
                _announce(writer, ROPE_FREQS, "F32", (len(factors),))
            for _, stored, (target, kind) in placed:
                _announce(writer, target, kind, _shape(stored, kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(torch.tensor(factors, dtype=torch.float32).numpy())
            for name, stored, (target, _) in placed:
                value = read_tensor(stored, name)
                turned = rope_heads(architecture, target, heads, kv_heads)
                value = side_by_side(value, turned) if turned else value
                writer.write_tensor_data(numpy.asarray(tensor_bytes(value.float() if value.dim() == 1 else value)))
        finally:
            writer.close()
    return hash_files([path])


def _shape(stored: Stored, kind: str) -> tuple[int, ...]:
    """How many weights a tensor has along each dimension."""
    if kind.lower() not in TYPES:
        return stored.shape
    block = TYPES[kind.lower()]
    return stored.shape[0], stored.shape[1] // block.nbytes * block.weights


def _announce(writer: Any, name: str, kind: str, shape: tuple[int, ...]) -> None:
    """A tensor's entry in the header."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    number = GGMLQuantizationType[kind]
    weights, nbytes = GGML_QUANT_SIZES[number]
    size = math.prod(shape) // weights * nbytes
    writer.add_tensor_info(name, shape, numpy.dtype(numpy.float32), size, raw_dtype=number)
