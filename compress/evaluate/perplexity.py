"""Perplexity by the protocol of the GPTQ papers, streamed block by block, and the distance from the original.

Protocol (Frantar et al. 2023 and its reference code): the whole text is tokenised once and cut into windows of 2048
tokens that do not overlap; the tail is dropped; a window of n tokens gives n - 1 predictions; perplexity is exp of the
mean negative log likelihood of a prediction. The same windows give the mean KL divergence of the original's
next-token distribution from the compressed model's, in nats, and the share of positions where both have one favourite.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.ahead import Here, lane_to
from compress.blocks import BlockModel
from compress.errors import CompressError
from compress.hidden import Activations, batch_rows
from compress.weights import Weights


@dataclass(frozen=True)
class Score:
    """Figures of one model on one text.

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        windows, tokens: how many windows; how many predictions in all.
        window: tokens a window.
        kl: mean KL divergence original || this model in nats a token, None without an original.
        top1: share of positions with the original's most likely token, None without an original.
    """

    perplexity: float
    windows: int
    tokens: int
    window: int
    kl: float | None = None
    top1: float | None = None


def cut_windows(tokens: Tensor, window: int) -> Tensor:
    """int64 [n] -> [windows, window]; the tail is dropped. Raises CompressError when the text is too short."""
    count = len(tokens) // window
    if count == 0:
        raise CompressError(
            f"the text has {len(tokens)} tokens, one window needs {window}",
            "--eval",
            "pass a longer text, or --no-eval",
        )
    return tokens[: count * window].reshape(count, window)


def window_length(model: BlockModel, wanted: int = 2048) -> int:
    """`wanted`, or the model's own context length where that is shorter."""
    config = model.model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return min(wanted, longest) if isinstance(longest, int) and longest > 0 else wanted


def final_states(
    model: BlockModel,
    rows: Tensor,
    spill: Path,
    step: Callable[[int, int], None] | None = None,
    low_memory: bool = False,
) -> Activations:
    """Hidden states behind the last block for every row, one block in memory at a time.

    Args:
        rows: int64 [windows, window].
        spill: file for hidden states that fit in no memory.
        step: called with (blocks done, blocks in all).
        low_memory: keep nothing on the device that can be elsewhere.
    """
    size = batch_rows(len(rows), rows.shape[1], model.hidden_size, 4 * model.hidden_size, model.device, low_memory)
    flow = Activations(model, rows, size, spill, low_memory=low_memory)
    flow.enter()
    total = len(model.block_names)
    with model.ahead(range(total), Here() if low_memory else lane_to(model.device)) as ahead:
        for block in range(total):
            model.load(block, ahead.take(block))
            flow.advance(block)
            model.free(block)
            if step is not None:
                step(block + 1, total)
    return flow


@torch.no_grad()
def evaluate(
    weights: Weights,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    original: Weights | None = None,
    window: int | None = None,
    trust_remote_code: bool = False,
    step: Callable[[int, int], None] | None = None,
    low_memory: bool = False,
) -> tuple[Score, Score | None]:
    """Score a checkpoint on a text; with `original`, that too, and the distance between them.

    Args:
        tokens: int64 [n], the whole text.
        window: tokens a window; None for 2048 or the model's context.
        low_memory: see `final_states`.

    Returns:
        score of `weights`, score of `original` (None without one).
    """
    step = step or (lambda done, total: None)
    rounds = 1 if original is None else 2
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as scratch:
        model = BlockModel(weights, dtype, device, trust_remote_code, low_memory)
        rows = cut_windows(tokens, window or window_length(model))
        flow = final_states(
            model,
            rows,
            Path(scratch) / "a",
            lambda d, t: step(d, t * rounds),
            low_memory,
        )
        base = base_flow = None
        if original is not None:
            base = BlockModel(original, dtype, device, trust_remote_code, low_memory)
            base_flow = final_states(
                base,
                rows,
                Path(scratch) / "b",
                lambda d, t: step(t + d, 2 * t),
                low_memory,
            )
        sums = _compare(model, flow, base, base_flow)
        flow.close()
        if base_flow is None:
            return _score(sums.nll, rows, None, None), None
        base_flow.close()
    return _score(sums.nll, rows, sums.kl, sums.same), _score(sums.base_nll, rows, None, None)


@dataclass
class _Sums:
    """Means over predictions (nll) and positions (kl, same)."""

    nll: float = 0.0
    base_nll: float = 0.0
    kl: float = 0.0
    same: float = 0.0


def _score(nll: float, rows: Tensor, kl: float | None, top1: float | None) -> Score:
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return Score(perplexity, len(rows), len(rows) * (rows.shape[1] - 1), rows.shape[1], kl, top1)


def _compare(model: BlockModel, flow: Activations, base: BlockModel | None, base_flow: Activations | None) -> _Sums:
    """Likelihoods, and with a base model KL and agreement. One row of logits at a time."""
    sums = _Sums()
    for i in range(len(flow)):
        hidden, tokens = flow.states(i), flow.batch(i).to(model.device)
        base_hidden = None if base_flow is None else base_flow.states(i)
        for r in range(len(tokens)):
            row = tokens[r : r + 1]
            log_q = F.log_softmax(model.logits(hidden[r : r + 1], row)[0], -1)
            sums.nll += _negative_log_likelihood(log_q, row[0])
            if base is not None and base_hidden is not None:
                log_p = F.log_softmax(base.logits(base_hidden[r : r + 1], row)[0], -1)
                sums.base_nll += _negative_log_likelihood(log_p, row[0])
                sums.same += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
                sums.kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    rows, seq = flow.tokens.shape
    predictions, positions = rows * (seq - 1), rows * seq
    return _Sums(sums.nll / predictions, sums.base_nll / predictions, sums.kl / positions, sums.same / positions)


def _negative_log_likelihood(log_probs: Tensor, row: Tensor) -> float:
    """Sum over the predictions of one row: log_probs [seq, vocab], row int64 [seq]."""
    return -float(log_probs[:-1].gather(1, row[1:, None]).double().sum())
