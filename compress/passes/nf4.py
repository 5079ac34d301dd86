"""NF4: blocks of weights on the 16 levels of 4-bit NormalFloat (QLoRA, section 3); needs no calibration.

The levels are quantiles of the normal distribution, which weights follow roughly; each block is scaled by its largest
magnitude, so that every weight lies within them. Double quantisation stores these maxima in 8 bits (about 0.127 instead
of 0.5 bits a weight for blocks of 64). The paper's text and appendix give the table; blocks, ties and statistics are
those of the released library, see `compress.packed.blockwise`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.packed import blockwise
from compress.solvers.hessian import row_losses
from compress.types import LayerStats, Needs, Solved, Storage

#: what bitsandbytes' kernels know
BLOCK_SIZES = tuple(2**n for n in range(5, 13))


@dataclass(frozen=True)
class TablePass:
    """What NF4 and FP4 share: blocks of weights on a fixed table."""

    # a mere attribute, not a setting: `settle` sets it on the copy it returns. Until then the worst is assumed.
    _rows_share_blocks: ClassVar[bool] = True

    block_size: int = field(default=64, metadata={"help": "weights that share a scale: a power of two, 32 to 4096"})
    double_quant: bool = field(default=False, metadata={"help": "store the blocks' scales in 8 bits"})
    quality: Literal["fast", "best"] = field(
        default="fast",
        metadata={
            "help": "fast: the nearest levels, without data; best: whole blocks of the model refined to the original's "
            "output"
        },
    )

    def __post_init__(self) -> None:
        if self.quality not in ("fast", "best"):
            raise CompressError(f"no quality {self.quality!r} of a table", "--quality", "use fast or best")
        if self.block_size not in BLOCK_SIZES:
            near = min(BLOCK_SIZES, key=lambda size: abs(size - self.block_size))
            what = f"block size {self.block_size} is not a power of two from 32 to 4096"
            raise CompressError(what, "--block-size", f"use {near}")

    @property
    def needs(self) -> Needs:
        return Needs(outputs=self.quality == "best")

    @property
    def table(self) -> str:
        """A name in `compress.tables.NAMES`."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The data type as the paper writes it."""
        raise NotImplementedError

    @property
    def row_unit(self) -> int:
        """1 where blocks end with the rows; 0 where they cross them or the matrix shares the statistics' mean."""
        return 0 if self.double_quant or self._rows_share_blocks else 1

    def settle(self, in_features: Collection[int]) -> Self:
        settled = replace(self)
        crossing = any(columns % self.block_size for columns in in_features)
        object.__setattr__(settled, "_rows_share_blocks", crossing)
        return settled

    @property
    def storage(self) -> Storage:
        return blockwise.describe(self.table, self.block_size, self.double_quant)

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        line = f"{self.title}, blocks of {self.block_size}" + ", double quantisation" * self.double_quant
        return [line + bits_in_words(layers)]

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Round one matrix [out, in] to the nearest levels; `stats` only measures the loss."""
        target = weight.float()
        packed = blockwise.fit(target, self.table, self.block_size, self.double_quant, scale_dtype)
        error = target - packed.dequantize().float()
        return Solved(packed, losses(error, stats.hessian), losses(target, stats.hessian))


@dataclass(frozen=True)
class NF4(TablePass):
    """NF4: 4-bit NormalFloat, levels at normal quantiles; needs no calibration (Dettmers et al. 2023)."""

    name: ClassVar[str] = "nf4"
    paper: ClassVar[str] = (
        "Dettmers, Pagnoni, Holtzman, Zettlemoyer: QLoRA: Efficient Finetuning of Quantized LLMs, NeurIPS 2023"
    )

    @property
    def table(self) -> str:
        return "nf4"

    @property
    def title(self) -> str:
        return "NF4"


def losses(error: Tensor, hessian: Tensor | None) -> Tensor:
    """float32 [out]: e H e^T of each row, or its squared sum where nothing was measured."""
    return error.square().sum(1) if hessian is None else row_losses(error, hessian.float())


def bits_in_words(layers: Sequence[Mapping[str, Any]]) -> str:
    """ ": 4.5 bits a weight" from the layers' bytes, "" without layers."""
    if not layers:
        return ""
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in layers)
    return f": {8 * sum(layer['bytes'] for layer in layers) / weights:.4g} bits a weight"
