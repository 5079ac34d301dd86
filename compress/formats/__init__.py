"""On-disk formats: one file a format, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import CompressError
from compress.formats.base import Format, LayerShape
from compress.formats.bitsandbytes import BitsAndBytes, declares
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.dense import DenseFormat
from compress.formats.gguf import GGUF
from compress.formats.gguf import METHOD as GGUF_METHOD
from compress.formats.gptq import GPTQFormat
from compress.formats.native import METHOD as NATIVE
from compress.formats.native import Native
from compress.types import Storage

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQFormat(1),
    "gptq_v2": GPTQFormat(2),
    "bitsandbytes": BitsAndBytes(),
    "gguf": GGUF(),
    "native": Native(),
    "dense": DenseFormat(),
}


#: what `--format auto` writes, and what it falls back to where no client holds the result
DEFAULT, OWN = "compressed-tensors", "native"


def holders(storage: Storage) -> list[str]:
    """The formats that can hold layers stored like this as they are, for layers of ordinary shapes."""
    width = 4096 if storage.group_size < 1 else 4096 * storage.group_size
    layer = LayerShape("layer", 4096, width)
    return [n for n, format in FORMATS.items() if format.quantised and format.why_not(storage, layer) is None]


def of_config(config: Mapping[str, Any]) -> tuple[Format, Mapping[str, Any]] | None:
    """The format a model's config.json declares, with its quantization_config; None for a dense model.

    Raises:
        CompressError: a quantisation that cannot be read.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if method == NATIVE:
        return FORMATS["native"], declared
    if isinstance(declared, dict) and declares(declared):
        return FORMATS["bitsandbytes"], declared
    if method == "compressed-tensors":
        return FORMATS["compressed-tensors"], declared
    if method == GGUF_METHOD:
        return FORMATS["gguf"], declared
    if method == "gptq":
        label = declared.get("checkpoint_format") or declared.get("format") or "gptq"
        if label in FORMATS:
            return FORMATS[label], declared
        method = f"gptq ({label})"
    raise CompressError(
        f"quantisation method {method!r} cannot be read", "config.json", f"readable: {', '.join(sorted(FORMATS))}"
    )
