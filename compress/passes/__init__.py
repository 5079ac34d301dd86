"""The methods: one file a method, one line here. Loaded on use, so that --help needs no torch.

Another installed package adds a method through the entry-point group "compress.passes": the entry's name is the
sub-command, its object the class.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compress.types import Pass, Refiner, Transform

GROUP = "compress.passes"


class Entry(NamedTuple):
    """Where a pass lives and what the command line says of it."""

    module: str
    cls: str
    summary: str


PASSES: dict[str, Entry] = {
    "gptq": Entry("compress.passes.gptq", "GPTQ", "GPTQ: second-order rounding on calibration data"),
    "rtn": Entry("compress.passes.rtn", "RTN", "RTN: round to nearest, no calibration"),
    "absmax": Entry("compress.passes.absmax", "Absmax", "int8 by absmax or zeropoint: W8A16 and W8A8"),
    "int8": Entry("compress.passes.int8", "Int8", "LLM.int8(): outlier features in 16 bits, the rest int8"),
    "sparsegpt": Entry(
        "compress.passes.sparsegpt", "SparseGPT", "SparseGPT: prune, any share or N:M, and quantise along"
    ),
    "spqr": Entry("compress.passes.spqr", "SpQR", "SpQR: small groups and sparse 16-bit outliers"),
    "nf4": Entry("compress.passes.nf4", "NF4", "NF4: NormalFloat4 in blocks (QLoRA), no calibration"),
    "fp4": Entry("compress.passes.fp4", "FP4", "FP4: 4-bit floats in blocks, no calibration"),
    "kmeans": Entry("compress.passes.kmeans", "KMeans", "k-means: a code book a row or group"),
    "equalize": Entry("compress.passes.equalize", "Equalize", "cross-layer equalisation without data, then rounding"),
    "smoothquant": Entry(
        "compress.passes.smoothquant", "SmoothQuant", "SmoothQuant: activation outliers into the weights"
    ),
    "awq": Entry("compress.passes.awq", "AWQ", "AWQ: rescale what large activations meet, then round"),
}

#: steps of a recipe that tune what passes solved; `--quality best` brings the first
REFINERS: dict[str, Entry] = {
    "refine": Entry("compress.refiners.refine", "Refine", "tune whole blocks to the original's output"),
}


@cache
def known() -> dict[str, Entry]:
    """Our methods, then those of other packages. A name that we have is never another package's."""
    from importlib.metadata import entry_points

    found = dict(PASSES)
    for point in sorted(entry_points(group=GROUP), key=lambda p: p.name):
        package = point.dist.name if point.dist is not None else point.module
        found.setdefault(point.name, Entry(point.module, point.attr, f"from the package {package}"))
    return found


def load(name: str) -> type[Pass] | type[Transform]:
    """The class registered under `name`. Raises KeyError."""
    entry = known()[name]
    found: type[Pass] | type[Transform] = getattr(import_module(entry.module), entry.cls)
    return found


def load_refiner(name: str) -> type[Refiner]:
    """The refiner registered under `name`. Raises KeyError."""
    entry = REFINERS[name]
    found: type[Refiner] = getattr(import_module(entry.module), entry.cls)
    return found
