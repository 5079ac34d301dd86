"""What is asked of a rotation, what one part of the model becomes, and how exactly that is proved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from compress.errors import CompressError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["hadamard", "orthogonal"]
KINDS: tuple[str, ...] = get_args(Kind)

#: hidden states that a block is proved on
ROWS, TOKENS = 2, 32
#: how far a rotated block's output may be from the rotation of its output, as a share of what it adds to the stream
TOLERANCE = 1e-3
INSTEAD = "this architecture is not supported; --no-residual rotates the value heads alone"


@dataclass(frozen=True)
class Rotation:
    """Rotations that are folded into the weights (QuaRot, Ashkboos et al. 2024; SpinQuant, Liu et al. 2024)."""

    residual: bool = field(
        default=True, metadata={"help": "R1: rotate the residual stream; a tied head becomes a tensor of its own"}
    )
    heads: bool = field(default=True, metadata={"help": "R2: rotate each value head"})
    kind: Kind = field(
        default="hadamard",
        metadata={"help": "hadamard: randomised Hadamard matrices; orthogonal: uniformly random orthogonal ones"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the random signs and matrices"})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise CompressError(f"no kind {self.kind!r} of rotation", "--kind", f"use {' or '.join(KINDS)}")
        if not (self.residual or self.heads):
            raise CompressError("nothing is left to rotate", "--no-residual --no-heads", "leave one of them out")
        if not 0 <= self.seed < 2**31:
            raise CompressError(f"seed {self.seed} is out of range", "--seed", "use 0 to 2147483647")


@dataclass
class Made:
    """The rotated tensors of a block, or of what stands outside, by name on disk, in their stored dtype on the CPU."""

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    notes: list[str] = field(default_factory=list)
