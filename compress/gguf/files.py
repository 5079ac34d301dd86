"""A GGUF file as a checkpoint: its tensors under the names that they have in Hugging Face checkpoints, and its config.

X.weight are float tensors, P.q4_0 and the like (uint8 [out, bytes of a row]) quantised ones. Files of architecture
llama keep the rows of q_proj and k_proj in another order (each head's first and second half interleaved, for its
rotary embedding); `Stored.rope_heads` says so, and `read_tensor` puts them back, of packed rows too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compress.checkpoint import Stored, read_json
from compress.errors import CompressError
from compress.formats.gguf import METHOD, TYPES
from compress.gguf.config import config_of
from compress.gguf.header import DAMAGED, FLOATS, LAYERS_KEY, QUANTISED, ROPE_FREQS, Header, read_header
from compress.gguf.names import rope_heads, to_hugging_face


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
        raise CompressError(f"its key {LAYERS_KEY} holds no JSON object", str(header.path), DAMAGED)
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
            raise CompressError(what, str(header.path), DAMAGED)
        if info.type in FLOATS:
            found[known] = Stored(header.path, info.start, info.nbytes, FLOATS[info.type][0], info.shape, turned)
            continue
        if len(info.shape) != 2:
            what = f"tensor {name!r} of shape {list(info.shape)} is quantised, which only matrices can be"
            raise CompressError(what, str(header.path), DAMAGED)
        rows = info.shape[0]
        known = f"{known.rpartition('.')[0]}.{QUANTISED[info.type]}"
        found[known] = Stored(header.path, info.start, info.nbytes, "U8", (rows, info.nbytes // rows), turned)
    return found


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
