"""On-disk formats: one file a format, one line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compress.errors import CompressError
from compress.formats.base import Format
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.gptq import GPTQFormat

FORMATS: dict[str, Format] = {
    "compressed-tensors": CompressedTensors(),
    "gptq": GPTQFormat(1),
    "gptq_v2": GPTQFormat(2),
}


def of_config(config: Mapping[str, Any]) -> tuple[Format, Mapping[str, Any]] | None:
    """The format a model's config.json declares, with its quantization_config; None for a dense model.

    Raises:
        CompressError: a quantisation that cannot be read.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    if method == "compressed-tensors":
        return FORMATS["compressed-tensors"], declared
    if method == "gptq":
        label = declared.get("checkpoint_format") or declared.get("format") or "gptq"
        if label in FORMATS:
            return FORMATS[label], declared
        method = f"gptq ({label})"
    raise CompressError(
        f"quantisation method {method!r} cannot be read", "config.json", f"readable: {', '.join(sorted(FORMATS))}"
    )
