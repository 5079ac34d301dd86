"""The variants of each kernel that tests compile without a GPU: a row a variant. A file without rows fails.

A row is the kernel's macros over its file's defaults, and the targets it is compiled for. Keep it to what differs in
kind (a packed kind, a dtype, an extreme of tile or width): every row and target costs about half a second.

    .venv/bin/python tests/kernels/test_compile.py --write     after a change here or in kernels/
"""

from __future__ import annotations

from typing import NamedTuple

ALL = ("sm_80", "sm_86", "sm_89", "sm_90a")
HOPPER = ("sm_90a",)  # of most rows: each kernel has one for ALL, and little else differs

Macros = dict[str, int | str]


class Variant(NamedTuple):
    """`kernel`: the extern "C" function."""

    kernel: str
    macros: Macros
    targets: tuple[str, ...]


#: what a file's rows start from
BASE: dict[str, Macros] = {
    "narrow.cu": {"KIND": "GRID", "BITS": 4, "T": "Half", "SCALE": "Half", "GROUPS": 1, "NT": 1, "RT": 2, "WARPS": 8,
                  "DEPTH": 2, "BESIDE": 1, "SPLIT": 1},
    "single.cu": {"KIND": "GRID", "BITS": 4, "T": "Half", "SCALE": "Half", "GROUPS": 1, "RT": 2, "WARPS": 8,
                  "DEPTH": 3},
    "read.cu": {"UNROLL": 8},
    "wide.cu": {"KIND": "GRID", "BITS": 4, "T": "Half", "SCALE": "Half", "GROUPS": 1, "TOKENS": 128, "STAGES": 4,
                "PHASES": 1, "SPLIT": 1, "BLOCKS": 1},
    "dequantize.cu": {"KIND": "GRID", "BITS": 4, "T": "Half", "SCALE": "Half", "GROUPS": 1, "WARPS": 4},
}  # fmt: skip

BF16: Macros = {"T": "BFloat", "SCALE": "BFloat"}
NF4: Macros = {"KIND": "TABLE", "SCALE": "Float", "GROUPS": 2}


def of(file: str, targets: tuple[str, ...] = HOPPER, kernel: str = "", **macros: int | str) -> Variant:
    """A row; the function is named as its file unless `kernel` says otherwise."""
    return Variant(kernel or file.removesuffix(".cu"), {**BASE[file], **macros}, targets)


VARIANTS: dict[str, list[Variant]] = {
    "narrow.cu": [
        of("narrow.cu", ALL),
        of("narrow.cu", NT=2, RT=1, WARPS=4, BESIDE=4, SPLIT=2),
        of("narrow.cu", **BF16, BITS=3),
        of("narrow.cu", **BF16, BITS=8, OFFSET=1),
        of("narrow.cu", BITS=2, GROUPS=4, OFFSET=2),
        of("narrow.cu", NT=4, OUTLIERS=1),
        of("narrow.cu", **NF4),
        of("narrow.cu", KIND="BOOK"),
        of("narrow.cu", KIND="BILEVEL", BITS=3),
    ],
    "single.cu": [
        of("single.cu", ALL),
        of("single.cu", **BF16, BITS=2, GROUPS=8, OFFSET=1),
        of("single.cu", **NF4),
        of("single.cu", KIND="BOOK"),
        of("single.cu", KIND="BILEVEL", BITS=3, DEPTH=2, OUTLIERS=1),
    ],
    "wide.cu": [
        of("wide.cu", HOPPER),
        of("wide.cu", HOPPER, **BF16, BITS=8, TOKENS=256, SPLIT=2),
        of("wide.cu", HOPPER, TOKENS=64, SPLIT=2, PHASES=2),
        of("wide.cu", HOPPER, TOKENS=16, BLOCKS=3),
    ],
    "read.cu": [
        of("read.cu", ALL, kernel="read_through"),
        of("read.cu", HOPPER, kernel="read_through", UNROLL=4),
    ],
    "dequantize.cu": [
        of("dequantize.cu", ALL),
        of("dequantize.cu", **BF16, BITS=3, OFFSET=1),
        of("dequantize.cu", **NF4),
    ],
}

SPARSE: Macros = {"GROUPS": 2, "SPARSE": 1}
VARIANTS["narrow.cu"] += [
    of("narrow.cu", ALL, **SPARSE),
    of("narrow.cu", **SPARSE, BITS=3, RT=1, OFFSET=1),
    of("narrow.cu", **SPARSE, NT=2, BESIDE=2),
    of("narrow.cu", **SPARSE, NT=8, DEPTH=1, WARPS=4),
]
BASE["dequantize_sparse.cu"] = {"BITS": 4, "T": "Half", "SCALE": "Half", "GROUPS": 2, "WARPS": 4}
VARIANTS["dequantize_sparse.cu"] = [
    of("dequantize_sparse.cu", ALL),
    of("dequantize_sparse.cu", **BF16, BITS=3, OFFSET=1),
]

BASE["quantise.cu"] = {"T": "Half", "VECTORS": 4, "OUTLIERS": 0}
BASE["narrow8.cu"] = {"T": "Half", "NT": 1, "RT": 1, "WARPS": 8, "DEPTH": 2, "OUTLIERS": 0}
BASE["wide8.cu"] = {"T": "Half", "TOKENS": 256, "STAGES": 4, "SPLIT": 1, "BLOCKS": 1, "OUTLIERS": 0}
VARIANTS["quantise.cu"] = [
    of("quantise.cu", ALL),
    of("quantise.cu", T="BFloat", OUTLIERS=1),
    of("quantise.cu", VECTORS=1, OUTLIERS=1),
]
VARIANTS["narrow8.cu"] = [
    of("narrow8.cu", ALL),
    of("narrow8.cu", T="BFloat", OUTLIERS=1),
    of("narrow8.cu", NT=2, RT=2, OUTLIERS=1),
    of("narrow8.cu", NT=8, OUTLIERS=1),
]
VARIANTS["wide8.cu"] = [
    of("wide8.cu", HOPPER),
    of("wide8.cu", HOPPER, OUTLIERS=1),
    of("wide8.cu", HOPPER, T="BFloat", SPLIT=4, OUTLIERS=1),
    of("wide8.cu", HOPPER, TOKENS=128, STAGES=6, OUTLIERS=1),
    of("wide8.cu", HOPPER, TOKENS=64, BLOCKS=2, OUTLIERS=1),
]

BASE["columns.cu"] = {"T": "Half", "LEVELS": 1, "ZERO": 0, "ALIVE": 0, "DESCEND": 0, "CHOOSE": 0}
VARIANTS["columns.cu"] = [
    of("columns.cu", ALL),
    of("columns.cu", ZERO=1, ALIVE=1, DESCEND=1),
    of("columns.cu", T="Single", LEVELS=0, ALIVE=1, CHOOSE=1),
    of("columns.cu", T="BFloat", LEVELS=2, ZERO=1, ALIVE=1),
    of("columns.cu", LEVELS=2, ZERO=1, ALIVE=1, DESCEND=1),
]

BASE["search.cu"] = {"T": "Half", "BITS": 4, "SYMMETRIC": 1, "WEIGHTED": 1, "TEAM": 8, "HELD": 16, "LONG": 0,
                     "LOWEST_ZERO": 1}  # fmt: skip
VARIANTS["search.cu"] = [
    of("search.cu", ALL),
    of("search.cu", T="BFloat", SYMMETRIC=0),
    of("search.cu", T="Single", SYMMETRIC=0, WEIGHTED=0, TEAM=4, HELD=4),
    of("search.cu", TEAM=32, LONG=1),
]

BASE["refine.cu"] = {"T": "BFloat", "S": "BFloat", "BITS": 4, "ZERO": 0, "ALIVE": 0, "TEAM": 8, "LONG": 0,
                     "LOWEST_ZERO": 1, "CELL": "0.49f", "LEAST": "0.6f", "MOST": "1.4f", "FAR": "10.0f"}  # fmt: skip
VARIANTS["refine.cu"] = [
    of("refine.cu", ALL),
    of("refine.cu", S="Half", ZERO=1, ALIVE=1),
    of("refine.cu", T="Single", S="Single", ZERO=1, ALIVE=1, TEAM=32, LONG=1),
]
