"""FP4: blocks of weights on the values of a 4-bit float; needs no calibration.

A sign, e exponent bits and m mantissa bits: E2M1 (also that of the OCP Microscaling formats), E1M2 (with its subnormals
an evenly spaced grid) and E3M0 (powers of two). They have subnormals and neither infinities nor NaN; the table is
divided by its largest value, so that a block's largest magnitude is met exactly. "bnb" is the FP4 of the bitsandbytes
library: an E2M1 whose smallest number is 1/192 of the largest instead of 1/12; it is the one that bitsandbytes
checkpoints can hold. Blocks and double quantisation are those of NF4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from compress.errors import CompressError
from compress.passes.nf4 import TablePass

_TITLES = {"e2m1": "FP4 (E2M1)", "e1m2": "FP4 (E1M2)", "e3m0": "FP4 (E3M0)", "bnb": "FP4 (bitsandbytes)"}


@dataclass(frozen=True)
class FP4(TablePass):
    """FP4: 4-bit floats in blocks scaled by their largest magnitude; needs no calibration (Dettmers et al. 2023)."""

    name: ClassVar[str] = "fp4"
    paper: ClassVar[str] = (
        "Dettmers, Zettlemoyer: The case for 4-bit precision: k-bit Inference Scaling Laws, ICML 2023"
    )

    variant: Literal["e2m1", "e1m2", "e3m0", "bnb"] = field(
        default="e2m1",
        metadata={"help": "exponent and mantissa bits: e2m1, e1m2, e3m0; bnb: the table of bitsandbytes' FP4"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in _TITLES:
            raise CompressError(f"no FP4 {self.variant!r}", "--variant", f"use {', '.join(_TITLES)}")

    @property
    def table(self) -> str:
        return f"fp4-{self.variant}"

    @property
    def title(self) -> str:
        return _TITLES[self.variant]
