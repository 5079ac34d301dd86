"""Figures in words: the same on the page, in Markdown and on labels."""

from __future__ import annotations

import math
from collections.abc import Mapping

from compress.evaluate.intervals import Estimate
from compress.report.html.facts import Model, Score


def figures(value: float | None, digits: int = 3) -> str:
    """A number with so many significant figures, no exponent where it can be read without."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        return f"{mantissa}e{int(power)}"
    return f"{value:,.{max(0, digits - 1 - size)}f}"


def percent(value: float | None, digits: int = 3) -> str:
    """A share as a percentage."""
    return "-" if value is None else figures(100 * value, digits) + "%"


def size(count: float | None) -> str:
    """Bytes in the unit that fits."""
    if count is None:
        return "-"
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{figures(count / step)} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float | None) -> str:
    """Seconds as a person says them."""
    if seconds is None:
        return "-"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s" if seconds >= 0.95 else f"{seconds:.2f} s"


def spent(seconds: Mapping[str, float]) -> str:
    """Seconds of each part: "text 0.25 s, heads 7.0 s"."""
    return ", ".join(f"{part} {duration(value)}" for part, value in seconds.items())


def perplexity(value: float | None) -> str:
    """Two decimals, more where it is small, none where it is large."""
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def interval(found: Estimate | None, text: str) -> str:
    """ "8.90 to 8.98" by way of `text`, which says how an end is written; "" without one."""
    if found is None or found.low is None or found.high is None:
        return ""
    return f"{_as(text, found.low)} to {_as(text, found.high)}"


def estimate(found: Estimate | None, text: str) -> str:
    """A figure; "-" where it was not measured."""
    return "-" if found is None else _as(text, found.value)


def _as(text: str, value: float) -> str:
    if text == "perplexity":
        return perplexity(value)
    return percent(value, 4) if text == "share" else figures(value)


def headline(model: Model) -> str:
    """A model in one line: "4.13 bits a weight, 2.25x smaller, perplexity 8.75 → 8.94, KL 0.0226"."""
    parts = [f"{model.bits_per_weight:.2f} bits a weight"]
    if model.bytes_before:
        parts.append(f"{model.smaller:.2f}x smaller")
    score = model.score
    if score is None:
        return ", ".join([*parts, "quality not measured"])
    if score.perplexity is not None:
        before = "" if score.original is None else f"{perplexity(score.original.value)} → "
        parts.append(f"perplexity {before}{perplexity(score.perplexity.value)}")
    if score.kl is not None:
        parts.append(f"KL {figures(score.kl.value)}")
    return ", ".join(parts)


def kinds(names: list[str]) -> dict[str, str]:
    """The shortest endings of layer kinds that tell them apart: "q_proj" of "self_attn.q_proj"."""
    out = {}
    for name in names:
        parts = name.split(".")
        short = name
        for n in range(1, len(parts) + 1):
            short = ".".join(parts[-n:])
            if sum(other == short or other.endswith("." + short) for other in names) == 1:
                break
        out[name] = short
    return out


def has_intervals(scores: list[Score]) -> bool:
    """Whether any figure came with an interval."""
    found = [x for s in scores for x in (s.perplexity, s.kl, s.top1)]
    return any(x is not None and x.low is not None for x in found)


def cut(name: str, longest: int) -> str:
    """A name that fits a plot."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def sentence(text: str) -> str:
    """A text that begins with a capital."""
    return text[:1].upper() + text[1:]
