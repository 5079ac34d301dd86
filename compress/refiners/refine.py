"""Refining: the codes, scales and zeros of a whole block are tuned to what the block makes in the original model.

A solver minimises each layer's own error. What counts is what the block makes of the inputs that it really gets, which
earlier blocks changed: layers can make up for each other, for nonlinearities between them and for those blocks. So,
from the solved codes on, some dozens of steps of gradient descent (tuned.py) on the mean squared error of the block's
output against the original's, on pieces of the calibration rows in random order, the size of the moves falling to 0.
Each token counts by its error's share of its output, since the next block's norm sees no more than that: the few tokens
whose states are thousands of times as long as others' would else be all that counts. Some pieces are held out: what is
kept is the state with the least error on those, the solver's among them, so refining never makes it worse there.

Block-wise reconstruction: Li et al., "BRECQ", ICLR 2021; signed descent on rounding and ranges from round-to-nearest:
Cheng et al., SignRound (AutoRound), 2023. Differences: it starts from a solver's codes, gradients count by their size,
scales keep the solver's sign and are tuned themselves rather than through clipping ranges, and the target is the
original model's own stream rather than the dense block's output on the compressed stream, so that what earlier blocks
lost is won back where it can be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.refiners.tuned import Tuned, paces, tunable, tuned, tuned_vector
from compress.repeatable import ordered
from compress.types import Packed, Refined, Task

#: levels that a usual gradient moves a rounding, times the root of the steps
_FAR = 0.07


@dataclass(frozen=True)
class Refine:
    """Tune rounding, scales and zeros of whole blocks to the original's output, from the solver's solution on."""

    name: ClassVar[str] = "refine"
    paper: ClassVar[str] = "Li et al.: BRECQ, ICLR 2021; Cheng et al.: SignRound (AutoRound), 2023"

    steps: int = field(default=100, metadata={"help": "steps of a block, a piece of the calibration rows each"})
    rate: float | None = field(
        default=None,
        metadata={
            "help": "levels that a usual gradient moves a rounding in the first step; falls to 0. By default 0.07 over "
            "the root of the steps"
        },
    )
    scale_rate: float = field(
        default=0.0025, metadata={"help": "share of itself that a scale moves in the first step; falls to 0"}
    )
    held_out: float = field(
        default=0.0625, metadata={"help": "share of the calibration rows that decides what is kept"}
    )
    norms: bool = field(default=False, metadata={"help": "tune the gains of norms and the biases of the block, too"})
    window: int = field(default=1, metadata={"help": "neighbouring blocks that are refined together, 1 or more"})
    looks: int | None = field(
        default=None,
        metadata={"help": "how often the held-out rows are looked at, evenly over the steps; default: 4, or each step"},
    )

    def __post_init__(self) -> None:
        if self.rate is None:  # so steps in random directions lead equally far, however many there are
            object.__setattr__(self, "rate", round(_FAR / max(self.steps, 1) ** 0.5, 6))
        if self.looks is None:
            object.__setattr__(self, "looks", max(1, min(4, self.steps)))
        assert self.rate is not None
        assert self.looks is not None
        for flag, value, low, high in (
            ("steps", self.steps, 1, 100_000), ("rate", self.rate, 0.0, 1.0), ("looks", self.looks, 1, self.steps),
            ("window", self.window, 1, 64),
            ("scale_rate", self.scale_rate, 0.0, 0.4), ("held_out", self.held_out, 1e-4, 0.5),
        ):  # fmt: skip
            if not low <= value <= high:
                raise CompressError(f"{flag} {value:g} is out of range", "refine", f"use {low:g} to {high:g}")

    def refine(self, layers: Mapping[str, Packed], weights: Mapping[str, Tensor], task: Task, seed: int) -> Refined:
        """See `compress.types.Refiner`. Layers of a kind that cannot be tuned stay as they are, and a note says so."""
        moving = {name: tuned(packed, weights[name]) for name, packed in layers.items() if tunable(packed)}
        notes = []
        if len(moving) < len(layers):
            kinds = sorted({p.kind for name, p in layers.items() if name not in moving})
            notes.append(f"refine: {len(layers) - len(moving)} layers ({', '.join(kinds)}) stay as they were solved")
        held = max(1, round(self.held_out * len(task)))
        if len(task) < held + 1:
            notes.append("refine: the calibration rows are one piece, of which nothing can be held out: not refined")
            moving = {}
        if not moving:
            return Refined(layers, 0.0, 0.0, notes=tuple(notes))
        gains = task.vectors if self.norms else {}
        vectors = {name: tuned_vector(x) for name, x in gains.items()}
        parts = {**moving, **vectors}
        like = {**{n: weights[n] for n in moving}, **gains}
        leaves = {n: torch.empty_like(x, dtype=task.dtype) for n, x in like.items()}
        first, best = self._descend(parts, {n: x.requires_grad_() for n, x in leaves.items()}, task, held, seed)
        packed = {**layers, **{name: x.packed() for name, x in moving.items()}}
        changed = {name: x.packed().dequantize() for name, x in vectors.items()} if best < first else {}
        return Refined(packed, first, best, changed, tuple(notes))

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """One line: the steps, and what the blocks' held-out errors became."""
        shares = [x["figures"]["refined"] for x in layers if "refined" in x["figures"]]
        if not shares:
            return []
        mean, kept = sum(shares) / len(shares), sum(share == 1 for share in shares) / len(shares)
        line = (
            f"refined in {self.steps} steps a block: on held-out rows the blocks' outputs are off by {mean:.1%} of the "
        )
        line += "squared error that they had as solved, on average"
        return [line + (f"; {kept:.0%} of the layers stayed as they were solved" if kept else "")]

    def _descend(
        self, moving: Mapping[str, Tuned], leaves: Mapping[str, Tensor], task: Task, held: int, seed: int
    ) -> tuple[float, float]:
        """Tune in place; what is left remembered is the best. Returns the held-out error before and after.

        Args:
            leaves: memory for the weights of each, of which gradients are taken.
        """
        last = range(len(task) - held, len(task))
        _write(moving, leaves)
        first = best = _error(leaves, task, last)
        assert self.rate is not None
        assert self.looks is not None
        pace = paces(self.steps, self.rate, self.scale_rate, task.device)
        step = task.repeated(partial(_step, moving, leaves, task))
        every = max(1, self.steps // self.looks)
        for i, piece in enumerate(_order(len(task) - held, self.steps, seed)):
            step(*task.piece(piece), pace[i])
            if (i + 1) % every and i + 1 < self.steps:
                continue
            found = _error(leaves, task, last)
            if found < best:  # while moves are large the error may rise first: it is never given up on
                best = found
                for layer in moving.values():
                    layer.keep()
        return first, best


def _order(pieces: int, steps: int, seed: int) -> list[int]:
    """Which piece each step takes: all of them in a random order, then all in another."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(pieces, generator=generator).tolist()
    return order[:steps]


@torch.no_grad()
def _write(moving: Mapping[str, Tuned], leaves: Mapping[str, Tensor]) -> None:
    """Weights as they are now."""
    for name, layer in moving.items():
        layer.write(leaves[name])


@torch.no_grad()
def _error(leaves: Mapping[str, Tensor], task: Task, pieces: Sequence[int]) -> float:
    """Mean of the errors on some pieces."""
    sums, count = [], 0
    for i in pieces:
        inputs, target = task.piece(i)
        off = _off(task.output(leaves, inputs), target)
        sums.append(off.square().sum(dtype=torch.float64))
        count += off.numel()
    return float(torch.stack(sums).sum()) / count


def _off(output: Tensor, target: Tensor) -> Tensor:
    """float32 [rows, seq, hidden]: how far an output is off, in units of the token's root mean square."""
    target = target.float()
    return (output.float() - target) * target.square().mean(-1, keepdim=True).clamp_(min=1e-12).rsqrt_()


def _step(
    moving: Mapping[str, Tuned], leaves: Mapping[str, Tensor], task: Task, inputs: Tensor, target: Tensor, pace: Tensor
) -> None:
    """Move everything against its gradient on a piece, which is scaled so that 16-bit floats neither overflow nor lose
    it."""
    with ordered(task.device), torch.enable_grad():
        square = _off(task.output(leaves, inputs), target).square().sum()
        root = square / square.detach().sqrt().clamp(min=1e-20)
        # an expert that no token of the piece reaches has no part in it
        slopes = torch.autograd.grad(root, list(leaves.values()), allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        for (name, layer), slope in zip(moving.items(), slopes, strict=True):
            layer.step(slope, pace, leaves[name])
