"""What each position said -> the figures of a model on a text, with their intervals.

All are exact over the counted positions: per-position values are kept until here, so quantiles are of all of them. Sums
are in float64. Nothing here knows a model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from compress.evaluate.intervals import Array, Estimate, Units, ratio
from compress.evaluate.scores import Values
from compress.evaluate.windows import Windows

_MOST = 700.0  # nats, whose exp is still a float


@dataclass(frozen=True)
class Score:
    """Figures of one model on one text. Those with `_low` and `_high` beside them have a 95% interval (intervals.py).

    Attributes:
        perplexity: exp of the mean negative log likelihood.
        windows, tokens: how many windows; how many predictions in all.
        window: tokens a window.
        kl: mean KL divergence original || this model in nats a token, None without an original, as all from here on but
            bits per byte and accuracy.
        top1: share of positions with the original's most likely token.
        kl_median, kl_p99, kl_p999, kl_max: of the positions' KL divergences.
        bits_per_byte: negative log likelihood in bits over the UTF-8 bytes of the predicted tokens; None where the
            bytes are not known. Bytes of what is not predicted (each window's first token, the tail) are not counted.
        accuracy: share of predictions whose most likely token is the next one.
        lost, gained: share of predictions that the original has right and this model wrong, and the other way round.
        nll_more: mean negative log likelihood less the original's, in nats, by pairs of windows: exp of it is the
            ratio of the perplexities.
        stride: tokens from window to window; None where they lie side by side.
    """

    perplexity: float
    windows: int
    tokens: int
    window: int
    kl: float | None = None
    top1: float | None = None
    perplexity_low: float | None = None
    perplexity_high: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_low: float | None = None
    bits_per_byte_high: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_p999: float | None = None
    kl_max: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    nll_more: float | None = None
    nll_more_low: float | None = None
    nll_more_high: float | None = None
    accuracy: float | None = None
    lost: float | None = None
    gained: float | None = None
    stride: int | None = None

    def estimate(self, name: str) -> dict[str, float | None] | None:
        """A figure with its interval as JSON values; what is not finite, which JSON cannot hold, becomes null."""
        found = [getattr(self, name + end) for end in ("", "_low", "_high")]
        if found[0] is None:
            return None
        return dict(zip(("value", "low", "high"), map(finite, found), strict=True))

    def as_json(self) -> dict[str, Any]:
        """The figures of one text, as the schema of report/evaluation.py has them."""
        top1 = self.estimate("top1")
        made: dict[str, Any] = {
            "window": self.window,
            "stride": self.stride,
            "windows": self.windows,
            "predictions": self.tokens,
            "perplexity": self.estimate("perplexity"),
            "bits_per_byte": self.estimate("bits_per_byte"),
            "accuracy": self.accuracy,
        }
        if self.kl is None or top1 is None:
            return made
        quantiles = {name: finite(getattr(self, f"kl_{name}")) for name in ("median", "p99", "p999", "max")}
        turned = {k: None if v is None else 1.0 - v for k, v in top1.items()}
        share = {"value": turned["value"], "low": turned["high"], "high": turned["low"]}
        return made | {
            "kl": {"mean": self.estimate("kl"), **quantiles},
            "top1": top1,
            "flips": {"share": share, "lost": self.lost, "gained": self.gained},
            "nll_more": self.estimate("nll_more"),
        }


def finite(value: float | None) -> float | None:
    """None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None


def figures(values: Values, base: Values | None, windows: Windows, sizes: Tensor | None, units: Units) -> Score:
    """All figures of one model on one text.

    Args:
        base: the original's values; None for the original itself, and without one.
        sizes: int64 [tokens of the text], UTF-8 bytes of each token; None where they are not known.
    """
    counted, positions = windows.predictions, windows.positions
    predicted = units.folded(counted)
    nll = units.folded(values.nll.double().where(counted, 0.0))
    made: dict[str, Any] = _named("perplexity", _exponential(ratio(nll, predicted, units)))
    made["accuracy"] = _share(values.right, counted)
    if sizes is not None:
        held = units.folded(windows.target_bytes(sizes))
        if held.sum() > 0:
            made |= _named("bits_per_byte", ratio(nll / math.log(2), held, units))
    if base is not None and values.kl is not None and values.same is not None:
        compared = units.folded(positions)
        kl = values.kl.double().where(positions, 0.0)
        made |= _named("kl", _at_least_zero(ratio(units.folded(kl), compared, units)))
        made |= _quantiles(values.kl[positions])
        made |= _named("top1", _clipped(ratio(units.folded(values.same & positions), compared, units)))
        more = nll - units.folded(base.nll.double().where(counted, 0.0))
        made |= _named("nll_more", ratio(more, predicted, units))
        made["lost"] = _share(base.right & ~values.right, counted)
        made["gained"] = _share(values.right & ~base.right, counted)
    return Score(
        windows=len(windows.rows), tokens=int(predicted.sum()), window=windows.window, stride=windows.stride, **made
    )


def _named(name: str, found: Estimate) -> dict[str, float | None]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def _exponential(found: Estimate) -> Estimate:
    """exp of a figure and of its interval's ends."""

    def exp(value: float) -> float:
        return math.exp(value) if value < _MOST else math.inf

    low, high = (None if x is None else exp(x) for x in (found.low, found.high))
    return Estimate(exp(found.value), low, high)


def _at_least_zero(found: Estimate) -> Estimate:
    """Of what cannot be negative: rounding alone makes it so, and the low end of a wide interval."""
    low, high = (None if x is None else max(0.0, x) for x in (found.low, found.high))
    return Estimate(max(0.0, found.value), low, high)


def _clipped(found: Estimate) -> Estimate:
    low, high = (None if x is None else min(1.0, max(0.0, x)) for x in (found.low, found.high))
    return Estimate(found.value, low, high)


def _share(found: Tensor, counted: Tensor) -> float:
    return float((found & counted).sum()) / float(counted.sum())


def _quantiles(kl: Tensor) -> dict[str, float]:
    """Of float32 [positions], interpolated between neighbours."""
    found: Array = np.maximum(kl.numpy().astype(np.float64), 0.0)
    made = np.quantile(found, [0.5, 0.99, 0.999, 1.0]) if np.isfinite(found).all() else _of_sorted(found)
    return dict(zip(("kl_median", "kl_p99", "kl_p999", "kl_max"), map(float, made), strict=True))


def _of_sorted(found: Array) -> Array:
    """Quantiles where some are infinite, which cannot be interpolated."""
    places = np.ceil(np.array([0.5, 0.99, 0.999, 1.0]) * (len(found) - 1)).astype(int)
    made: Array = np.sort(found)[places]
    return made


def all_figures(
    base: Values | None, models: list[Values], windows: Windows, sizes: Tensor | None
) -> tuple[Score | None, list[Score], str]:
    """Scores of the original (None without one) and of each model, and a note on their intervals."""
    units = Units.of(windows.positions)
    own = None if base is None else figures(base, None, windows, sizes, units)
    return own, [figures(values, base, windows, sizes, units) for values in models], units.note
