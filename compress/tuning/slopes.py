"""How far the packed model's predictions are off the original's, and the gradient of that in every factor.

Some rows at a time: through all blocks of both models, then what the head makes of them, then back through the packed
model's blocks, each computed again from what entered it. Both ways through the blocks are CUDA graphs on a GPU: a small
model's launches, and those that make its weights from factors, take longer than what they launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from compress.blocks import BlockModel
from compress.cuda.replay import Replays
from compress.repeatable import ordered
from compress.tuning.whole import Student

_Shape = tuple[int, int]


class Slopes:
    """Divergences of two whole models on one device, and their gradients.

    Attributes:
        sums: the gradients so far, shaped as the student's factors.
    """

    def __init__(self, teacher: BlockModel, student: Student) -> None:
        self.student = student
        self.sums = [torch.zeros_like(x) for x in student.factors]
        self._teacher = teacher
        self._count = len(student.model.block_names)
        ends = [0]
        for block in range(self._count):
            ends.append(ends[-1] + len(student.factors_of(block)))
        self._parts = [self.sums[a:b] for a, b in pairwise(ends)]
        self._states: dict[_Shape, list[Tensor]] = {}  # what enters each block, and leaves the last; and the original's
        self._begin()

    def _begin(self) -> None:
        self._replays = Replays(self._teacher.device)
        self._forth, self._back = self._replays.of(self._forwards), self._replays.of(self._backwards)

    def drop(self) -> None:
        """Give back all memory but that of `sums`, which become 0."""
        self.close()
        for total in self.sums:
            total.zero_()
        self._begin()

    def close(self) -> list[str]:
        """Give memory back; nothing more can be asked then. Returns what must be said."""
        notes = self._replays.rest()
        self._replays.close()
        self._states.clear()
        del self._forth, self._back  # which hold this, and so both models
        return notes

    @torch.no_grad()
    def divergence(self, tokens: Tensor) -> Tensor:
        """float32 [rows, seq], nats, of token ids [rows, seq]."""
        *_, last, wanted = self._through(tokens)
        return self._off(last, wanted, tokens)

    def add(self, tokens: Tensor, weight: float) -> None:
        """Add `weight` times the gradient of the sum of `divergence` to `sums`."""
        *_, last, wanted = self._through(tokens)
        with torch.enable_grad():
            last = last.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(self._off(last, wanted, tokens).sum() * weight, [last])
        self._back(slope)

    def _off(self, last: Tensor, wanted: Tensor, tokens: Tensor) -> Tensor:
        """float32 [rows, seq]: divergence of what the head makes of two models' last hidden states."""
        right = torch.log_softmax(self._teacher.logits(wanted, tokens), -1)
        found = torch.log_softmax(self.student.model.predict(last, tokens).float(), -1)
        return (right.exp() * (right - found)).sum(-1)

    def _through(self, tokens: Tensor) -> Sequence[Tensor]:
        """The states of these rows."""
        theirs, ours = self._teacher.embed(tokens), self.student.model.embed(tokens)
        shape = (tokens.shape[0], tokens.shape[1])
        if shape not in self._states:
            self._states[shape] = [torch.empty_like(ours) for _ in range(self._count + 2)]
        self._forth(theirs, ours)
        return self._states[shape]

    @torch.no_grad()
    def _forwards(self, theirs: Tensor, ours: Tensor) -> None:
        """Fill the states, from those that enter block 0 of both models."""
        shape = (ours.shape[0], ours.shape[1])
        states = self._states[shape]
        for block in range(self._count):
            states[block].copy_(ours)
            theirs = self._teacher.run(block, theirs, shape)
            ours = self.student.block(block, ours, shape)
        states[-2].copy_(ours)
        states[-1].copy_(theirs)

    def _backwards(self, slope: Tensor) -> None:
        """Add to `sums`, from the gradient in what leaves the last block."""
        shape = (slope.shape[0], slope.shape[1])
        for block in reversed(range(self._count)):
            with ordered(slope.device), torch.enable_grad():
                entered = self._states[shape][block].detach().requires_grad_()
                left = self.student.block(block, entered, shape)
                leaves = [entered, *self.student.factors_of(block)]
                # an expert that no token reaches has no part in it
                found = torch.autograd.grad([left], leaves, [slope], allow_unused=True, materialize_grads=True)
            slope = found[0]
            for total, part in zip(self._parts[block], found[1:], strict=True):
                total.add_(part)
