"""What a refiner is given of a block: the calibration rows in pieces, and the block as a function of its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.hidden import TOKENS, Activations


class BlockTask:
    """See `compress.types.Task`. A piece is as many rows as go through a block at once, or as 16 thousand tokens are.

    Args:
        linears: the layers that are tuned, by block; the blocks are loaded and follow each other.
        inputs: the hidden states that enter the first block in the compressed model.
        targets: the hidden states that leave the last in the original model, in batches of the same size.
    """

    def __init__(
        self, model: BlockModel, linears: Mapping[int, Sequence[Linear]], inputs: Activations, targets: Activations
    ) -> None:
        self._model = model
        self._linears = {block: {x.name: x for x in mine} for block, mine in linears.items()}
        self._params = {block: model.vectors(block) for block in linears}
        self._inputs, self._targets = inputs, targets
        rows = min(inputs.rows, max(1, TOKENS // inputs.tokens.shape[1]))
        if len(inputs.tokens) <= rows and rows > 1:
            rows = -(-rows // 2)  # of one piece nothing could be held out
        self._pieces = [
            (i, slice(first, min(first + rows, len(inputs.batch(i)))))
            for i in range(len(inputs))
            for first in range(0, len(inputs.batch(i)), rows)
        ]

    @property
    def dtype(self) -> torch.dtype:
        return self._model.dtype

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        params = {name: param for mine in self._params.values() for name, param in mine.items()}
        stored = {name: self._model.weights.dtype(name) for name in params}
        return {n: self._model.model.get_parameter(p).data.to(stored[n]) for n, p in params.items()}

    def __len__(self) -> int:
        return len(self._pieces)

    def piece(self, i: int) -> tuple[Tensor, Tensor]:
        batch, rows = self._pieces[i]
        return self._inputs.states(batch)[rows], self._targets.states(batch)[rows]

    def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        shape = (len(inputs), self._inputs.tokens.shape[1])
        states = inputs
        for block, linears in self._linears.items():
            mine = [(linears[n], w) for n, w in weights.items() if n in linears]
            others = {self._params[block][n]: w for n, w in weights.items() if n in self._params[block]}
            states = self._model.output(block, states, shape, mine, others)
        return states

    def repeated(self, work: Callable[..., None]) -> Callable[..., None]:
        return self._inputs.replays.of(work)
