"""The methods: one file a method, one line here. Loaded on use, so that --help needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compress.types import Pass


class Entry(NamedTuple):
    """Where a pass lives and what the command line says of it."""

    module: str
    cls: str
    summary: str


PASSES: dict[str, Entry] = {
    "gptq": Entry("compress.passes.gptq", "GPTQ", "GPTQ: second-order rounding on calibration data (2 to 8 bits)"),
    "rtn": Entry("compress.passes.rtn", "RTN", "round to nearest, no calibration (2 to 8 bits)"),
}


def load(name: str) -> type[Pass]:
    """The pass class registered under `name`. Raises KeyError."""
    entry = PASSES[name]
    found: type[Pass] = getattr(import_module(entry.module), entry.cls)
    return found
