"""The rows of reports/methods.md: for each table what is compared and what its paper found. Steps as in a recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """One comparison.

    Attributes:
        title: what is compared.
        claim: what the paper found.
        rows: name -> steps.
        orders: pairs (better, worse) of row names: the paper's ordering in KL.
    """

    title: str
    claim: str
    rows: dict[str, list[str]]
    orders: list[tuple[str, str]]


def _bits(bits: int) -> str:
    """At 2 bits all methods use zero points: a symmetric grid has one positive level there."""
    return f"bits={bits} group_size=64" + (" symmetric=false" if bits == 2 else "")


#: GPTQ without anything that came after its paper, at nearly the size of a symmetric grid of groups of 64
_PUBLISHED = "group_size=64 symmetric=false act_order=none scale_search=false refit=false descent=0 token_weights=false"

TABLES = [
    Table(
        "RTN and GPTQ",
        "GPTQ is far closer to the original than rounding at every width, the more so the fewer bits (Frantar et al. "
        "2023, tables 2 to 4).",
        {f"{m.upper()} {b} bits": [f"{m} {_bits(b)}"] for b in (4, 3, 2) for m in ("rtn", "gptq")},
        [(f"GPTQ {b} bits", f"RTN {b} bits") for b in (4, 3, 2)],
    ),
    Table(
        "Pruning",
        "SparseGPT is better than Wanda, Wanda than magnitude; 50% unstructured is easiest, then 4:8, then 2:4 "
        "(Frantar and Alistarh 2023, table 1; Sun et al. 2023, table 2).",
        {
            f"{m} {name}": [f"sparsegpt method={m} {setting}"]
            for name, setting in (("50%", "sparsity=0.5"), ("4:8", "pattern=4:8"), ("2:4", "pattern=2:4"))
            for m in ("magnitude", "wanda", "sparsegpt")
        },
        [
            pair
            for p in ("50%", "4:8", "2:4")
            for pair in ((f"sparsegpt {p}", f"wanda {p}"), (f"wanda {p}", f"magnitude {p}"))
        ]
        + [("sparsegpt 50%", "sparsegpt 4:8"), ("sparsegpt 4:8", "sparsegpt 2:4")],
    ),
    Table(
        "Pruning and quantising together",
        "50% sparse with 4 bits beats 3 bits dense at the same size (Frantar and Alistarh 2023, section 4.3, figure "
        "6); one sweep for both is no worse than one after the other.",
        {
            "2:4 and 4 bits in one sweep": ["sparsegpt pattern=2:4 bits=4 group_size=64"],
            "2:4, then 4 bits": ["sparsegpt pattern=2:4", "gptq bits=4 group_size=64"],
            "50% and 4 bits in one sweep": ["sparsegpt sparsity=0.5 bits=4 group_size=64"],
            "GPTQ 3 bits": ["gptq bits=3 group_size=64"],
        },
        [
            ("50% and 4 bits in one sweep", "GPTQ 3 bits"),
            ("2:4 and 4 bits in one sweep", "2:4, then 4 bits"),
        ],
    ),
    Table(
        "8-bit products: the nine rows of LLM.int8()",
        "vector-wise is better than row-wise, that than per tensor; zeropoint is better than absmax; with the outlier "
        "features in 16 bits both equal the original (Dettmers et al. 2022, table 1).",
        {
            "absmax": ["absmax weights=tensor activations=tensor"],
            "zeropoint": ["absmax weights=tensor activations=tensor zeropoint=true"],
            "absmax row-wise": ["absmax weights=tensor activations=token"],
            "absmax vector-wise": ["absmax weights=channel activations=token"],
            "zeropoint vector-wise": ["absmax weights=channel activations=token zeropoint=true"],
            "absmax row-wise + decomposition": ["int8 weights=tensor"],
            "absmax LLM.int8()": ["int8"],
            "zeropoint LLM.int8()": ["int8 zeropoint=true"],
            "absmax LLM.int8(), outliers by section 4.1's rule": ["int8 rule=paper"],
        },
        [
            ("zeropoint", "absmax"),
            ("absmax row-wise", "absmax"),
            ("absmax vector-wise", "absmax row-wise"),
            ("zeropoint vector-wise", "absmax vector-wise"),
            ("absmax row-wise + decomposition", "absmax row-wise"),
            ("absmax LLM.int8()", "absmax vector-wise"),
            ("zeropoint LLM.int8()", "zeropoint vector-wise"),
            ("absmax LLM.int8()", "absmax row-wise + decomposition"),
        ],
    ),
    Table(
        "Symmetric and asymmetric",
        "8 bits: no difference that matters; 4 bits: asymmetric is better (Yao et al. 2023, table 1; weights alone, "
        "one scale a row).",
        {
            f"W{b} {name}": [f"rtn bits={b} group_size=-1 symmetric={str(s).lower()}"]
            for b in (8, 4)
            for name, s in (("symmetric", True), ("asymmetric", False))
        },
        [("W4 asymmetric", "W4 symmetric"), ("W8 symmetric", "W4 asymmetric")],
    ),
    Table(
        "SpQR at equal size",
        "SpQR is better than GPTQ, GPTQ than RTN, at the same average bits (Dettmers et al. 2023, tables 1 and 2). "
        "GPTQ there is the published one; ours has act order, scale search, refit and descent on top.",
        {
            "RTN 4 bits": ["rtn bits=4 group_size=64"],
            "GPTQ 4 bits as published": [f"gptq bits=4 {_PUBLISHED}"],
            "GPTQ 4 bits": ["gptq bits=4 group_size=64"],
            "SpQR 4 bits, 4.25 on average": ["spqr bits=4 group_size=64 average_bits=4.25"],
            "SpQR 3 bits, 4.25 on average": ["spqr bits=3 average_bits=4.25"],
            "RTN 3 bits": ["rtn bits=3 group_size=64"],
            "GPTQ 3 bits as published": [f"gptq bits=3 {_PUBLISHED}"],
            "GPTQ 3 bits": ["gptq bits=3 group_size=64"],
            "SpQR 3 bits, 3.25 on average": ["spqr bits=3 group_size=64 average_bits=3.25"],
            "GPTQ 3 bits, groups of 32": ["gptq bits=3 group_size=32"],
            "SpQR 3 bits, 3.5 on average": ["spqr bits=3 group_size=32 average_bits=3.5"],
        },
        [
            ("GPTQ 4 bits as published", "RTN 4 bits"),
            ("SpQR 4 bits, 4.25 on average", "GPTQ 4 bits as published"),
            ("SpQR 4 bits, 4.25 on average", "GPTQ 4 bits"),
            ("SpQR 3 bits, 3.25 on average", "GPTQ 3 bits as published"),
            ("SpQR 3 bits, 3.25 on average", "GPTQ 3 bits"),
            ("SpQR 3 bits, 3.5 on average", "GPTQ 3 bits, groups of 32"),
        ],
    ),
    Table(
        "4-bit data types",
        "NF4 is better than FP4, both than int4, in blocks of 64; double quantisation of NF4 costs nothing (Dettmers "
        "et al. 2023, QLoRA, table 2 and figure 3).",
        {
            "NF4": ["nf4"],
            "NF4, double quantisation": ["nf4 double_quant=true"],
            "FP4 E2M1": ["fp4"],
            "FP4 E1M2": ["fp4 variant=e1m2"],
            "FP4 E3M0": ["fp4 variant=e3m0"],
            "int4": ["rtn bits=4 group_size=64"],
        },
        [("NF4", "FP4 E2M1"), ("FP4 E2M1", "int4"), ("FP4 E2M1", "FP4 E3M0")],
    ),
    Table(
        "Code books",
        "k-means is better than a linear grid, weighted k-means than plain (Kim et al. 2023, SqueezeLLM, table 1 and "
        "figure 1); all with one book or scale a row.",
        {
            f"{name} {b} bits": [steps.format(b)]
            for b in (4, 3)
            for name, steps in (
                ("linear", "rtn bits={} group_size=-1 symmetric=false"),
                ("k-means", "kmeans bits={} weighted=false"),
                ("weighted k-means", "kmeans bits={}"),
            )
        },
        [
            pair
            for b in (4, 3)
            for pair in (
                (f"k-means {b} bits", f"linear {b} bits"),
                (f"weighted k-means {b} bits", f"k-means {b} bits"),
            )
        ],
    ),
    Table(
        "Rescaling before rounding",
        "equalisation mends per-tensor 8 bits (Nagel et al. 2019, table 1); SmoothQuant mends W8A8 (Xiao et al. 2022, "
        "table 3); AWQ is better than RTN on the same grid (Lin et al. 2023, table 4).",
        {
            "RTN 8 bits per tensor": ["rtn bits=8 group_size=0"],
            "equalised, 8 bits per tensor": ["equalize"],
            "RTN 4 bits per tensor": ["rtn bits=4 group_size=0 symmetric=false"],
            "equalised, 4 bits per tensor": ["equalize then='rtn bits=4 group_size=0 symmetric=false'"],
            "W8A8 vector-wise": ["absmax activations=token"],
            "SmoothQuant W8A8": ["smoothquant"],
            "W8A8 per tensor": ["absmax weights=tensor activations=tensor"],
            "SmoothQuant W8A8 per tensor": ["smoothquant then='absmax weights=tensor activations=tensor'"],
            "RTN 4 bits": ["rtn bits=4 group_size=64 symmetric=false"],
            "AWQ 4 bits": ["awq bits=4 group_size=64"],
            "RTN 3 bits": ["rtn bits=3 group_size=64 symmetric=false"],
            "AWQ 3 bits": ["awq bits=3 group_size=64"],
        },
        [
            ("equalised, 8 bits per tensor", "RTN 8 bits per tensor"),
            ("equalised, 4 bits per tensor", "RTN 4 bits per tensor"),
            ("SmoothQuant W8A8", "W8A8 vector-wise"),
            ("SmoothQuant W8A8 per tensor", "W8A8 per tensor"),
            ("AWQ 4 bits", "RTN 4 bits"),
            ("AWQ 3 bits", "RTN 3 bits"),
        ],
    ),
]
