"""The methods: one file a method, one line here. Loaded on use, so that --help needs no torch.

Another installed package adds a method through the entry-point group "compress.passes": the entry's name is the
sub-command, its object the class.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compress.types import Pass, Transform

GROUP = "compress.passes"


class Entry(NamedTuple):
    """Where a pass lives and what the command line says of it."""

    module: str
    cls: str
    summary: str


PASSES: dict[str, Entry] = {
    "gptq": Entry("compress.passes.gptq", "GPTQ", "GPTQ: second-order rounding on calibration data (2 to 8 bits)"),
    "rtn": Entry("compress.passes.rtn", "RTN", "round to nearest, no calibration (2 to 8 bits)"),
    "absmax": Entry("compress.passes.absmax", "Absmax", "8-bit weights, and 8-bit activations if asked (W8A16, W8A8)"),
    "int8": Entry("compress.passes.int8", "Int8", "LLM.int8(): outlier features in 16 bits, the rest vector-wise int8"),
    "sparsegpt": Entry(
        "compress.passes.sparsegpt", "SparseGPT", "SparseGPT: prune to a share or N:M, and quantise along"
    ),
    "spqr": Entry("compress.passes.spqr", "SpQR", "SpQR: small groups, two-level statistics, sparse 16-bit outliers"),
    "nf4": Entry("compress.passes.nf4", "NF4", "NormalFloat4 in blocks (QLoRA), statistics quantised too if asked"),
    "fp4": Entry("compress.passes.fp4", "FP4", "4-bit floats in blocks: E2M1, E1M2, E3M0"),
    "kmeans": Entry("compress.passes.kmeans", "KMeans", "code books by k-means, weighted by the Hessian's diagonal"),
    "equalize": Entry("compress.passes.equalize", "Equalize", "data-free cross-layer equalisation, then rounding"),
    "smoothquant": Entry(
        "compress.passes.smoothquant", "SmoothQuant", "SmoothQuant: activation outliers into weights, W8A8"
    ),
    "awq": Entry("compress.passes.awq", "AWQ", "AWQ: protect the weights that large activations meet, then round"),
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
