"""A text's tokens -> windows of one length, and which of their positions count.

Two ways to cut:
    side by side   windows that do not overlap; the tail that fills no window is dropped (Frantar et al. 2023, GPTQ,
                   and its reference code). A window's first token has nothing before it, so it is not predicted.
    strided        windows that begin every `stride` tokens, until one reaches the text's end; of each only the tokens
                   that no window before it held are predicted (transformers' guide "Perplexity of fixed-length
                   models"). Every token but the text's first is predicted once, with window - stride tokens or more
                   before it. The last window is filled up behind the text's end, which a causal model does not see
                   from before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError

#: tokens a window, where neither the user nor the model's context says less
WINDOW = 2048


@dataclass(frozen=True)
class Windows:
    """Rows that go through a model, and what of them counts. Position j of a row predicts the token at j + 1.

    Attributes:
        rows: int64 [windows, window].
        starts: int64 [windows], where each begins in the text.
        first, last: int64 [windows]; the tokens first <= t < last of a row are predicted (first >= 1).
        stride: tokens from one window to the next; None for windows side by side.
        tokens: of the text.
    """

    rows: Tensor
    starts: Tensor
    first: Tensor
    last: Tensor
    stride: int | None
    tokens: int

    @property
    def window(self) -> int:
        """Tokens a row."""
        return int(self.rows.shape[1])

    @property
    def predictions(self) -> Tensor:
        """bool [windows, window]: positions whose next token is predicted, and counts."""
        at = torch.arange(self.window)
        return (at >= self.first[:, None] - 1) & (at < self.last[:, None] - 1)

    @property
    def positions(self) -> Tensor:
        """bool [windows, window]: positions whose distribution is compared with the original's.

        Side by side all of them, the last of a window too, whose next token is in no window; strided those of
        `predictions`.
        """
        return torch.ones_like(self.rows, dtype=torch.bool) if self.stride is None else self.predictions

    def columns(self, row: int) -> tuple[int, int]:
        """The positions of a row that count, as a range: what the head must be run on."""
        if self.stride is None:
            return 0, self.window
        return int(self.first[row]) - 1, int(self.last[row]) - 1

    def target_bytes(self, sizes: Tensor) -> Tensor:
        """int64 [windows, window]: bytes of the token that each position predicts, 0 where none counts.

        Args:
            sizes: int64 [tokens], bytes of each token of the text.
        """
        at = (self.starts[:, None] + torch.arange(1, self.window + 1)).clamp(max=len(sizes) - 1)
        return torch.where(self.predictions, sizes[at], 0)

    def cut(self, most: int | None) -> Windows:
        """The first `most` windows."""
        if most is None or most >= len(self.rows):
            return self
        return Windows(
            self.rows[:most], self.starts[:most], self.first[:most], self.last[:most], self.stride, self.tokens
        )


def make_windows(
    tokens: Tensor, window: int, stride: int | None = None, most: int | None = None, option: str = "--text"
) -> Windows:
    """Cut a text.

    Args:
        tokens: int64 [n].
        window: tokens a window, 2 or more.
        stride: None for windows side by side.
        most: keep only the first so many windows.
        option: the one that named the text, for errors.

    Raises:
        CompressError: the text is too short, the stride is none.
    """
    if most is not None and most < 1:
        raise CompressError(f"{most} windows are too few", "--windows", "use 1 or more")
    if stride is None:
        return side_by_side(tokens, window, option).cut(most)
    if not 1 <= stride <= window:
        what = f"a stride of {stride} does not fit windows of {window} tokens"
        raise CompressError(what, "--stride", f"use 1 to {window}")
    return strided(tokens, window, stride, option).cut(most)


def cut_windows(tokens: Tensor, window: int, option: str = "--eval") -> Tensor:
    """int64 [n] -> [windows, window]; the tail is dropped. Raises CompressError when the text is too short."""
    count = len(tokens) // window
    if count == 0:
        raise _too_short(tokens, window, option)
    return tokens[: count * window].reshape(count, window)


def _too_short(tokens: Tensor, window: int, option: str) -> CompressError:
    less = "--no-eval" if option == "--eval" else "a smaller --window"
    return CompressError(
        f"the text has {len(tokens)} tokens, one window needs {window}", option, f"pass a longer text, or {less}"
    )


def side_by_side(tokens: Tensor, window: int, option: str) -> Windows:
    """See the module's text."""
    rows = cut_windows(tokens, window, option)
    count = len(rows)
    return Windows(
        rows,
        torch.arange(count) * window,
        torch.ones(count, dtype=torch.int64),
        torch.full((count,), window),
        None,
        len(tokens),
    )


def strided(tokens: Tensor, window: int, stride: int, option: str) -> Windows:
    """See the module's text; a text shorter than a window is one window."""
    total = len(tokens)
    if total < 2:
        raise _too_short(tokens, 2, option)
    count = 1 + max(0, -(-(total - window) // stride))
    starts = torch.arange(count) * stride
    ends = (starts + window).clamp(max=total)
    before = torch.cat([torch.ones(1, dtype=torch.int64), ends[:-1]])  # nothing predicts the text's first token
    first = (before - starts).clamp(min=1)  # where windows touch, as stride = window lets them
    at = starts[:, None] + torch.arange(window)
    rows = torch.where(at < total, tokens[at.clamp(max=total - 1)], tokens[0])
    return Windows(rows, starts, first, ends - starts, stride, total)
