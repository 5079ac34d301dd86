"""Hidden states of a few rows on their way through the model: the model's own, and those of every variant of it.

A variant is the model with the layers of one group rounded. It leaves the model's own way at that group's block and
goes on through the other blocks as they are, so one walk over the blocks serves all variants. Behind the last block the
KL divergence of each variant's predictions from the model's is taken, a bounded piece of logits at a time.

States lie where hidden.py has room for them: on the device, in host memory or on disk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.blocks import BlockModel, Linear
from compress.evaluate.scores import CHUNK_BYTES, pieces
from compress.evaluate.windows import make_windows
from compress.hidden import HiddenStates, choose_tier

#: of the model's own log-probabilities, kept while every variant's are made beside them
_KEPT_BYTES = 256 << 20


class Variants:
    """See the module's text.

    Args:
        tokens: int64 [rows, seq], the probes.
        count: how many variants there will be.
        spill: file for states that fit in no memory.
        held, low_memory: see `hidden.choose_tier`.
    """

    def __init__(
        self,
        model: BlockModel,
        tokens: Tensor,
        count: int,
        spill: Path,
        held: int | None = None,
        low_memory: bool = False,
    ) -> None:
        self._model, self._tokens = model, tokens
        nbytes = (count + 1) * tokens.numel() * model.hidden_size * model.dtype.itemsize
        self.tier = choose_tier(nbytes, model.device, held, low_memory)
        self._states = HiddenStates(model.device, spill, self.tier)
        self._ahead = 1  # slots that hold states; slot 0 is the model's own
        self._heads: dict[int, tuple[Linear, Tensor]] = {}

    def __len__(self) -> int:
        return self._ahead - 1

    def enter(self) -> None:
        """Embed the probes."""
        self._states.put(0, self._model.embed(self._tokens))

    def advance(self, block: int, weights: list[list[tuple[Linear, Tensor]]]) -> None:
        """Send every variant through a loaded block, and let those of `weights` leave the model's own way in it.

        Args:
            weights: for each new variant its layers of this block and their rounded weights [out, in].
        """
        own = self._states.get(0)
        fresh = [self._rounded(block, own, layers) for layers in weights]
        for slot in range(self._ahead):
            self._states.put(slot, self._run(block, own if slot == 0 else self._states.get(slot)))
        for out in fresh:
            self._states.put(self._ahead, out)
            self._ahead += 1

    def round_head(self, linear: Linear, weight: Tensor) -> None:
        """A variant whose output head alone is rounded. weight: [out, in]."""
        self._heads[self._ahead] = (linear, weight.to(self._model.dtype))
        self._ahead += 1

    def _run(self, block: int, states: Tensor) -> Tensor:
        shape = (self._tokens.shape[0], self._tokens.shape[1])
        return self._model.run(block, states, shape)

    def _rounded(self, block: int, states: Tensor, layers: list[tuple[Linear, Tensor]]) -> Tensor:
        """What the block makes of states with these weights in it; it is left as it was."""
        before = [self._model.weight(linear).clone() for linear, _ in layers]
        for linear, weight in layers:
            self._model.set_weight(linear, weight)
        out = self._run(block, states)
        for (linear, _), weight in zip(layers, before, strict=True):
            self._model.set_weight(linear, weight)
        return out

    @torch.no_grad()
    def divergences(self) -> list[float]:
        """For each variant, in the order in which they left: mean KL(model || variant) in nats a token."""
        rows, seq = self._tokens.shape
        head = self._model.model.get_output_embeddings()
        vocabulary = int(self._model.model.config.get_text_config().vocab_size if head is None else len(head.weight))
        positions = max(1, CHUNK_BYTES[self._model.device.type] // (4 * vocabulary))
        every = list(pieces(make_windows(self._tokens.reshape(-1), seq), 0, rows, positions))
        sums = torch.zeros(self._ahead, dtype=torch.float64, device=self._model.device)
        together = max(1, _KEPT_BYTES // CHUNK_BYTES[self._model.device.type])
        for at in range(0, len(every), together):
            part = every[at : at + together]
            own = self._states.get(0)
            kept = [F.log_softmax(self._logits(own[piece]), -1) for piece in part]
            for slot in range(1, self._ahead):
                states = own if slot in self._heads else self._states.get(slot)
                with self._head(slot):
                    for piece, log_p in zip(part, kept, strict=True):
                        log_q = F.log_softmax(self._logits(states[piece]), -1)
                        sums[slot] += ((log_p - log_q) * log_p.exp()).sum(-1).double().sum()
        found: list[float] = (sums[1:] / (rows * seq)).tolist()
        return found

    @contextmanager
    def _head(self, slot: int) -> Iterator[None]:
        """The output head of a variant, for as long as the context lasts."""
        if slot not in self._heads:
            yield
            return
        linear, weight = self._heads[slot]
        parameter = self._model.model.get_parameter(linear.param)
        before, parameter.data = parameter.data, weight
        try:
            yield
        finally:
            parameter.data = before

    def _logits(self, states: Tensor) -> Tensor:
        """float32 [positions, vocab]."""
        return self._model.logits(states, torch.zeros(states.shape[:2], dtype=torch.int64)).flatten(0, 1)

    def close(self) -> None:
        """Free the memory, remove the spill file."""
        self._states.close()
