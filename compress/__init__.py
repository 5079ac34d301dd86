"""Post-training compression of language models. Importing this loads nothing heavy; names are loaded on use.

import compress
compress.run("MODEL", compress.GPTQ(bits=4), out="OUT")
model = compress.load("OUT")  # a transformers model whose linear layers stay packed

transformers' own from_pretrained reads what compress wrote in its own format once this package is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from compress import integration as _integration

__version__ = "0.1.0"

_HOMES = {
    "run": "compress.api",
    "load": "compress.loading",
    "score": "compress.api",
    "Options": "compress.options",
    "GPTQ": "compress.passes.gptq",
    "RTN": "compress.passes.rtn",
    "Recipe": "compress.recipe",
    "read_recipe": "compress.recipe",
    "method": "compress.recipe",
    "CompressError": "compress.errors",
}

__all__ = [
    "GPTQ",
    "RTN",
    "CompressError",
    "Options",
    "Recipe",
    "__version__",
    "load",
    "method",
    "read_recipe",
    "run",
    "score",
]

if TYPE_CHECKING:
    from compress.api import run, score
    from compress.errors import CompressError
    from compress.loading import load
    from compress.options import Options
    from compress.passes.gptq import GPTQ
    from compress.passes.rtn import RTN
    from compress.recipe import Recipe, method, read_recipe


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'compress' has no attribute {name!r}")


_integration.install()
