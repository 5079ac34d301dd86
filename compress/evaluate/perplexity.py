"""Perplexity by the protocol of the GPTQ papers, streamed block by block, and the distance from the original.

Protocol (Frantar et al. 2023 and its reference code): the whole text is tokenised once and cut into windows of 2048
tokens that do not overlap; the tail is dropped; a window of n tokens gives n - 1 predictions; perplexity is exp of the
mean negative log likelihood of a prediction. The same windows give the KL divergence of the original's next-token
distributions from the compressed model's, in nats, and the share of positions where both have one favourite.

This is the door that a run's own evaluation takes: one model, one original. `compress eval` takes suite.py.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compress.evaluate.figures import Score, all_figures
from compress.evaluate.measure import Setting, measure
from compress.evaluate.states import Step, final_states
from compress.evaluate.windows import WINDOW, cut_windows, make_windows
from compress.skeleton import load_config
from compress.weights import Weights

__all__ = ["Score", "cut_windows", "evaluate", "final_states", "window_length"]


def window_length(folder: Path, trust_remote_code: bool = False, wanted: int = WINDOW) -> int:
    """`wanted`, or the model's own context length where that is shorter."""
    config = load_config(folder, trust_remote_code).get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    return min(wanted, longest) if isinstance(longest, int) and longest > 0 else wanted


def evaluate(
    weights: Weights,
    tokens: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    original: Weights | None = None,
    window: int | None = None,
    trust_remote_code: bool = False,
    step: Step | None = None,
    low_memory: bool = False,
    sizes: Tensor | None = None,
    stride: int | None = None,
) -> tuple[Score, Score | None]:
    """Score a checkpoint on a text; with `original`, that too, and the distance between them.

    Args:
        tokens: int64 [n], the whole text.
        window: tokens a window; None for 2048 or the model's context.
        low_memory: keep nothing on the device that can be elsewhere.
        sizes: int64 [n], UTF-8 bytes of each token (`texts.sizes_of`), for bits per byte; None: none are told.
        stride: see windows.py; None for windows that do not overlap.

    Returns:
        score of `weights`, score of `original` (None without one).
    """
    setting = Setting(device, dtype, trust_remote_code, low_memory)
    windows = make_windows(tokens, window or window_length(weights.folder, trust_remote_code), stride, option="--eval")
    found = measure([weights], original, windows, setting, step or (lambda done, total: None))
    base, scores, _ = all_figures(found.base, found.models, windows, sizes)
    return scores[0], base
