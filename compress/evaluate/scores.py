"""Final hidden states -> what each position says, through the heads, a bounded piece of logits at a time.

For each piece of positions the original's log-probabilities are made once, then every model's beside them; a piece is
as long as its logits take `CHUNK_BYTES`, so no vocabulary and no window is too large. Nothing is copied to the host
before the end: of each position four numbers are kept, from which every figure is made (figures.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.blocks import BlockModel
from compress.evaluate.states import States
from compress.evaluate.windows import Windows

#: of float32 logits at once, on a GPU and on a CPU; a handful of tensors of this size is alive
CHUNK_BYTES = {"cuda": 64 << 20, "cpu": 16 << 20}
#: of them that a CPU works on at once, so that what is made of them stays in its cache
_CACHE_BYTES = 1 << 20


@dataclass
class Seen:
    """A model, and what it made of all windows: its final states in batches of `size` rows."""

    model: BlockModel
    states: States
    size: int


@dataclass(frozen=True)
class Values:
    """What one model says at each position, on the host. All [windows, window]; position j predicts token j + 1.

    Attributes:
        nll: float32, negative log likelihood of the next token, in nats.
        right: bool, the next token is the most likely one.
        kl: float32, KL divergence of the original's distribution from this one's in nats; None without an original.
        same: bool, the most likely token is the original's; None without an original.
    """

    nll: Tensor
    right: Tensor
    kl: Tensor | None = None
    same: Tensor | None = None


class _Sink:
    """The numbers of one model while they are made, on the device."""

    def __init__(self, windows: Windows, device: torch.device, compared: bool) -> None:
        self._numbers = torch.zeros(4 if compared else 2, *windows.rows.shape, device=device)  # nll, right, kl, same
        self._compared = compared

    def put(self, at: tuple[slice, slice], numbers: Sequence[Tensor]) -> None:
        """Fill a piece: [rows * columns] values of each kind."""
        for kind, values in enumerate(numbers):
            part = self._numbers[kind][at]
            part.copy_(values.view(part.shape))

    def values(self) -> Values:
        host = self._numbers.cpu()
        if not self._compared:
            return Values(host[0], host[1].bool())
        return Values(host[0], host[1].bool(), host[2], host[3].bool())


@torch.no_grad()
def read_off(
    windows: Windows, base: Seen | None, models: Sequence[Seen], chunk: int | None = None
) -> tuple[Values | None, list[Values]]:
    """Run the heads over all positions that count.

    Args:
        base: what the models are compared with.
        models: with states in batches of the base's size.
        chunk: bytes of logits at once; None for `CHUNK_BYTES`.

    Returns:
        the base's values (None without one), each model's.

    Raises:
        CompressError: a model's logits hold NaN.
    """
    every = [*([base] if base is not None else []), *models]
    assert len({seen.size for seen in every}) == 1, "batches of another size"
    device, size = every[0].model.device, every[0].size
    sinks = [_Sink(windows, device, base is not None and seen is not base) for seen in every]
    vocabulary = max(_vocabulary(seen.model) for seen in every)
    positions = (chunk or CHUNK_BYTES[device.type]) // (4 * vocabulary)
    for i in range(len(every[0].states)):
        hidden = [seen.states.states(i) for seen in every]
        begin = i * size
        tokens = windows.rows[begin : begin + size].to(device)
        for rows, columns in pieces(windows, begin, len(tokens), positions):
            here = (slice(begin + rows.start, begin + rows.stop), columns)
            following = tokens.roll(-1, 1)[rows, columns].reshape(-1)
            _piece(every, [h[rows, columns] for h in hidden], tokens[rows, columns], following, sinks, here, base)
    found = [sink.values() for sink in sinks]
    return (None, found) if base is None else (found[0], found[1:])


def _piece(
    every: Sequence[Seen],
    hidden: Sequence[Tensor],
    tokens: Tensor,
    following: Tensor,
    sinks: Sequence[_Sink],
    here: tuple[slice, slice],
    base: Seen | None,
) -> None:
    """One piece of every model. tokens: int64 [rows, columns]; following: int64 [rows * columns], those to predict."""
    original: _Original | None = None
    for seen, states, sink in zip(every, hidden, sinks, strict=True):
        logits = seen.model.logits(states, tokens).flatten(0, 1)
        if seen is base:
            original = _Original()
        here_at_once = _CACHE_BYTES // (4 * logits.shape[1]) if logits.device.type == "cpu" else len(logits)
        at, made = 0, []
        for part in torch.split(logits, max(1, here_at_once)):
            made.append(_numbers(part, following[at : at + len(part)], original, at, seen is base))
            at += len(part)
        sink.put(here, [torch.cat(kind) for kind in zip(*made, strict=True)])


@dataclass
class _Original:
    """What the original says of the positions of a piece, in the parts that it was made in."""

    log_p: dict[int, Tensor] = field(default_factory=dict)
    p: dict[int, Tensor] = field(default_factory=dict)
    top: dict[int, Tensor] = field(default_factory=dict)


def _numbers(logits: Tensor, following: Tensor, original: _Original | None, at: int, base: bool) -> list[Tensor]:
    """nll, right and, of a model that is compared, kl and same, of the part of a piece that begins at `at`."""
    log_q = F.log_softmax(logits, -1)
    top = log_q.max(-1).indices
    found = [-log_q.gather(1, following[:, None])[:, 0], top.eq(following)]
    if original is None:
        return found
    if base:
        original.log_p[at], original.p[at], original.top[at] = log_q, log_q.exp(), top
        return found
    kl = (original.log_p[at] - log_q).mul_(original.p[at]).sum(-1)
    return [*found, kl, top.eq(original.top[at])]


def pieces(windows: Windows, begin: int, count: int, positions: int) -> Iterator[tuple[slice, slice]]:
    """Pieces of `count` rows from row `begin` on, (rows, columns), of at most `positions` positions (or one)."""
    row = 0
    while row < count:
        columns = windows.columns(begin + row)
        end = row + 1
        while end < count and windows.columns(begin + end) == columns:
            end += 1
        yield from _rectangle(row, end, *columns, max(1, positions))
        row = end


def _rectangle(top: int, bottom: int, left: int, right: int, positions: int) -> Iterator[tuple[slice, slice]]:
    width = min(right - left, positions)
    height = max(1, positions // (right - left))
    for row in range(top, bottom, height):
        for column in range(left, right, width):
            yield slice(row, min(row + height, bottom)), slice(column, min(column + width, right))


def _vocabulary(model: BlockModel) -> int:
    """How many logits a position has."""
    head = model.model.get_output_embeddings()
    return int(model.model.config.get_text_config().vocab_size if head is None else head.weight.shape[0])
