"""The other figures: weights before and after, where outliers lie, where time and memory went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.report.html.facts import Histogram, Mask, Model, Outliers
from compress.report.html.svg import colour, figure, style
from compress.report.html.words import cut, duration, figures, kinds, percent, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: what the parts of a run are for; those of no group are "other"
GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "read": ("reading and hashing the source", ("load", "hash")),
    "look": ("calibration", ("forward", "hessian", "survey")),
    "solve": ("solving and packing", ("fold", "solve", "pack")),
    "write": ("writing", ("write", "upload")),
    "check": ("verifying and evaluating", ("verify", "evaluate")),
}
#: a raster has no CSS variables: one tone that stands out from light and dark, as dense as outliers are
_TONE = (0xD4, 0x62, 0x1B)


def grouped(seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds by group, in the order of GROUPS; parts of no group as "other"."""
    out = {group: sum(seconds.get(p, 0.0) for p in parts) for group, (_, parts) in GROUPS.items()}
    named = {p for _, parts in GROUPS.values() for p in parts}
    out["other"] = sum(v for k, v in seconds.items() if k not in named and k != "total")
    return {k: v for k, v in out.items() if v > 0}


def histogram(found: Histogram) -> Figure:
    """One layer's weights: before as a filled shape, after as a line."""
    with style():
        made = figure(262, 148)
        axes = made.add_axes((0.03, 0.2, 0.94, 0.74))
        edges = np.linspace(found.low, found.high, len(found.before) + 1)
        axes.stairs(found.before, edges, fill=True, color=colour("shade"), linewidth=0)
        axes.stairs(found.after, edges, color=colour("accent"), linewidth=1.2)
        most = max(found.before) * 1.3 or 1.0
        axes.set_ylim(0, most)
        axes.set_xlim(found.low, found.high)
        zero = found.zeros[1]
        if zero > 0.01 and max(found.after) > most:
            axes.text(
                0.99, 0.97, f"{percent(zero, 2)} are 0", transform=axes.transAxes, fontsize=9.5, va="top", ha="right",
                color=colour("accent"),
            )  # fmt: skip
        reach = float(f"{found.high * 0.75:.1g}")
        axes.set_xticks([-reach, 0, reach], [f"-{figures(reach, 1)}", "0", figures(reach, 1)], fontsize=9.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=3)
    return made


def outlier_map(found: Outliers, wide: bool) -> Figure:
    """A strip for each kind of layer: a row a block, input features from left to right."""
    names = kinds([s.kind for s in found.strips])
    heights = [max(16.0, min(96.0, (9.0 if len(s.blocks) < 12 else 4.0) * len(s.blocks))) for s in found.strips]
    left, right = (96.0, 120.0) if wide else (66.0, 46.0)
    width, gap = (800.0 if wide else 350.0), 8.0
    last = [i + 1 == len(heights) or s.features != found.strips[i + 1].features for i, s in enumerate(found.strips)]
    with style():
        made = figure(width, sum(heights) + gap * len(heights) + 14 * sum(last) + 4)
        height = float(made.get_size_inches()[1]) * 72
        top = 4.0
        strongest = max((v for s in found.strips for row in s.rows for v in row), default=1.0) or 1.0
        for strip, high, ends in zip(found.strips, heights, last, strict=True):
            place = (left / width, 1 - (top + high) / height, (width - left - right) / width, high / height)
            axes = made.add_axes(place)
            _raster(axes, strip.rows, strongest)
            _ends(axes, ["input 0", f"{strip.features - 1:,}"] if ends else [])
            axes.set_ylabel(names[strip.kind], rotation=0, ha="right", va="center", fontsize=10, color=colour("ink"))
            told = percent(strip.total, 2) + (f" of {found.unit}" if wide else "")
            axes.text(1.015, 0.5, told, transform=axes.transAxes, fontsize=9.5, va="center", color=colour("soft"))
            top += high + gap + 14 * ends
    return made


def outlier_mask(found: Mask) -> Figure:
    """One layer whole: rows down, columns across."""
    across = 330.0
    tall = min(1.4 * across, max(90.0, across * found.shape[0] / found.shape[1]))
    with style():
        made = figure(across + 12, tall + 30)
        axes = made.add_axes((6 / (across + 12), 24 / (tall + 30), across / (across + 12), tall / (tall + 30)))
        _raster(axes, found.cells, max(max(row) for row in found.cells) or 1.0)
        _ends(axes, ["input 0", f"{found.shape[1] - 1:,}"])
    return made


def _ends(axes: Axes, names: list[str]) -> None:
    """The first and the last input feature, within the ends of the axis."""
    axes.set_xticks([0, 1][: len(names)], names, fontsize=9, color=colour("soft"))
    for i, label in enumerate(axes.get_xticklabels()):
        label.set_horizontalalignment("right" if i else "left")


def _raster(axes: Axes, rows: Sequence[Sequence[float]], strongest: float) -> None:
    """Shares as the opacity of one tone; the root of them, so that few outliers show beside many."""
    shares = np.sqrt(np.clip(np.array(rows, dtype=np.float64) / strongest, 0, 1))
    image = np.zeros((*shares.shape, 4), dtype=np.uint8)
    image[..., :3] = _TONE
    image[..., 3] = np.round(255 * shares)
    axes.imshow(image, extent=(0, 1, 0, 1), aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_linewidth(0.7)


def costs(models: Sequence[Model], wide: bool) -> tuple[Figure, dict[str, str]]:
    """Bars of seconds, by what they went to, and of peak memory; and what a pointer shows of each."""
    device = any(m.device_bytes for m in models)
    bar = 26.0 * len(models)
    with style():
        made = figure(800, bar + 74) if wide else figure(350, 2 * bar + 140)
        if wide:
            seconds, memory = made.subplots(1, 2, width_ratios=(2.1, 1))
        else:
            seconds, memory = made.subplots(2, 1)
        titles = _seconds(seconds, models)
        titles |= _memory(memory, models, device)
        names = [cut(m.name, 20 if wide else 13) for m in models]
        for axes in (seconds, memory):
            axes.set_yticks(range(len(models)), names if axes is seconds or not wide else [""] * len(models))
            axes.set_ylim(len(models) - 0.4, -0.6)
            axes.tick_params(length=0, labelsize=10)
            axes.yaxis.set_tick_params(labelcolor=colour("ink"))
            axes.spines["bottom"].set_visible(False)
            axes.set_xticks([])
        made.tight_layout(w_pad=2.0, h_pad=2.0)
    return made, titles


def _seconds(axes: Axes, models: Sequence[Model]) -> dict[str, str]:
    titles = {}
    longest = max((sum(grouped(m.seconds).values()) for m in models), default=0.0) or 1.0
    for i, model in enumerate(models):
        at = 0.0
        for group, value in grouped(model.seconds).items():
            name = f"s{i}.{group}"
            tone = colour("shade" if group == "other" else group)
            axes.barh(i, value, 0.56, at, color=tone, linewidth=0)
            axes.patches[-1].set_gid(name)
            what = GROUPS[group][0] if group in GROUPS else "other parts"
            titles[name] = f"{model.name}, {what}: {duration(value)}"
            at += value
        told = duration(at) if model.seconds else "not recorded"
        axes.text(at + 0.01 * longest, i, f" {told}", va="center", fontsize=10, color=colour("soft"))
    axes.set_xlim(0, 1.16 * longest)
    axes.set_title("time", pad=6)
    return titles


def _memory(axes: Axes, models: Sequence[Model], device: bool) -> dict[str, str]:
    titles = {}
    largest = max((max(m.host_bytes or 0, m.device_bytes or 0) for m in models), default=0) or 1
    for i, model in enumerate(models):
        kept = [("host", model.host_bytes, "shade"), *([("device", model.device_bytes, "look")] if device else [])]
        for j, (what, value, tone) in enumerate(kept):
            high = 0.56 / len(kept)
            at = i - 0.28 + (j + 0.5) * high
            axes.barh(at, value or 0, high, color=colour(tone), linewidth=0)
            axes.patches[-1].set_gid(f"m{i}.{what}")
            titles[f"m{i}.{what}"] = f"{model.name}, peak {what} memory: {size(value)}"
            told = "not recorded" if value is None else size(value) + (f" {what}" if device else "")
            axes.text((value or 0) + 0.02 * largest, at, told, va="center", fontsize=10 if len(kept) == 1 else 9,
                      color=colour("soft"))  # fmt: skip
    axes.set_xlim(0, 1.45 * largest)
    axes.set_title("peak memory" + ("" if device else " of the host"), pad=6)
    return titles
