"""Size against quality: every model a point with its name beside it, the front as a line, the original as a mark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from compress.evaluate.intervals import Estimate
from compress.report.html.facts import Facts, Model
from compress.report.html.svg import colour, figure, style
from compress.report.html.words import cut, perplexity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: a front is of at least two
FEWEST = 2
#: from so many models on a plot has the whole width
_MANY = 8
#: figures above so many times the least, and so many times the worst on the front, are drawn at the edge
_FAR = (10, 3)
#: where a label may stand, in pixels from its point: (x, y, side of the label that is there)
_PLACES = [
    (9, 0, "left", "center"), (7, 10, "left", "center"), (7, -11, "left", "center"), (-9, 0, "right", "center"),
    (0, 14, "center", "center"), (0, -15, "center", "center"), (-7, 10, "right", "center"),
    (-7, -11, "right", "center"), (14, 22, "left", "center"), (14, -22, "left", "center"),
    (-14, 22, "right", "center"), (-14, -22, "right", "center"), (0, 28, "center", "center"),
    (0, -28, "center", "center"),
]  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One model in a plot; `front`: no other is both smaller and better."""

    name: str
    size: float
    quality: Estimate
    front: bool = False


def why_not(facts: Facts) -> str:
    """Why there is no plot; "" where there is one."""
    if len(facts.models) < FEWEST:
        return "One model makes no front: its figures are above. Give several folders to compare them."
    if len(measured(facts)) < FEWEST:
        return (
            "Fewer than two of these models have a measured perplexity or KL divergence, so there is nothing to plot."
        )
    return ""


def measured(facts: Facts) -> list[Model]:
    """The models that can be plotted."""
    return [m for m in facts.models if m.score is not None and (m.score.kl or m.score.perplexity)]


def unit(facts: Facts) -> tuple[str, float]:
    """The axis of sizes and what one of its units is in bytes; bits a parameter (0) where originals differ."""
    if len(facts.sources) > 1:
        return "bits a parameter, all of the model", 0.0
    largest = max(max(m.bytes, m.bytes_before) for m in facts.models)
    return ("weights on disk, GB", 1e9) if largest >= 2e9 else ("weights on disk, MB", 1e6)


def points(facts: Facts, figure_name: str) -> list[Point]:
    """Every model that has the figure ("kl" or "perplexity"), the smallest first."""
    step = unit(facts)[1]
    found = []
    for model in measured(facts):
        quality = getattr(model.score, figure_name)
        if quality is not None:
            found.append(Point(model.name, model.bytes / step if step else model.average_bits, quality))
    found.sort(key=lambda p: (p.size, p.quality.value))
    out, best = [], float("inf")
    for point in found:
        better = point.quality.value < best
        best = min(best, point.quality.value)
        out.append(Point(point.name, point.size, point.quality, better))
    return out


def originals(facts: Facts) -> Point | None:
    """The original, where all models come from one and its perplexity is known."""
    if len(facts.sources) > 1:
        return None
    for model in measured(facts):
        if model.score is not None and model.score.original is not None:
            return Point(model.source, model.bytes_before / unit(facts)[1], model.score.original)
    return None


def draw(facts: Facts, wide: bool) -> Figure:
    """Both plots, beside or below each other."""
    panels = [name for name in ("kl", "perplexity") if len(points(facts, name)) >= FEWEST]
    with style():
        across, down = (len(panels), 1) if wide and len(facts.models) < _MANY else (1, len(panels))
        made = figure(800 if wide else 350, (360 if wide else 310) * down)
        every = made.subplots(down, across, squeeze=False)
        for axes, name in zip(every.flat, panels, strict=True):
            _panel(axes, facts, name)
        made.tight_layout(w_pad=3.0, h_pad=2.5)
        for axes, name in zip(every.flat, panels, strict=True):
            _label(axes, facts, name, 22 if wide else 14)
    return made


def _shown(facts: Facts, name: str) -> tuple[list[Point], float]:
    """The points as they are drawn, those too far up at the edge, and where that is."""
    found = points(facts, name)
    least = min((p.quality.value for p in found if p.quality.value > 0), default=float("inf"))
    edge = max(_FAR[0] * least, *(_FAR[1] * p.quality.value for p in found if p.front))
    near = [p if p.quality.value <= edge else replace(p, quality=Estimate(edge)) for p in found]
    return near, edge


def _panel(axes: Axes, facts: Facts, name: str) -> None:
    (found, edge), base = _shown(facts, name), originals(facts)
    values = [p.quality.value for p in found]
    ends = [v for p in found for v in (p.quality.low, p.quality.high) if v is not None]
    positive = [v for v in values if v > 0]
    log = bool(positive) and max(positive) > (3 if name == "perplexity" else 8) * min(positive)
    for p in found:
        if p.quality.low is not None and p.quality.high is not None:
            axes.plot([p.size] * 2, [p.quality.low, p.quality.high], color=colour("shade"), linewidth=1.4, zorder=1)
    front = [p for p in found if p.front]
    axes.step(
        [p.size for p in front], [p.quality.value for p in front], where="post", color=colour("accent"), linewidth=1.4,
        alpha=0.55, zorder=1,
    )  # fmt: skip
    for p in found:
        axes.plot(
            p.size, p.quality.value, "^" if p.quality.value == edge else "o", markersize=7, markeredgewidth=1.4,
            markeredgecolor=colour("accent"), markerfacecolor=colour("accent" if p.front else "paper"), zorder=3,
        )  # fmt: skip
    _scale(axes, [p.size for p in found] + ([base.size] if base else []), [*values, *ends], log, name)
    if base is not None:
        _mark(axes, base, name)
    axes.set_title("KL divergence from the original, nats a token" if name == "kl" else "perplexity", pad=10)
    axes.set_xlabel(unit(facts)[0], fontsize=10)


def _scale(axes: Axes, sizes: Sequence[float], values: Sequence[float], log: bool, name: str) -> None:
    """Limits with room for labels; few ticks, plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = min(sizes), max(sizes)
    room = 0.12 * (high - low or high or 1.0)
    axes.set_xlim(max(0.0, low - room), high + 1.6 * room)
    least, most = min(values), max(values)
    if log:
        least = min(v for v in values if v > 0)
        axes.set_yscale("log")
        axes.set_ylim(least / 3, most * 2)
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0) if most < 300 * least else (1.0,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        space = (most - least or most or 1.0) * 0.15
        axes.set_ylim((0.0 if name == "kl" else least - 2.2 * space), most + space)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.tick_params(length=3, labelsize=10.5)
    axes.grid(True, axis="y", color=colour("line"), linewidth=0.6, zorder=0)
    axes.set_axisbelow(True)


def _mark(axes: Axes, base: Point, name: str) -> None:
    """The original: a diamond; its KL divergence of 0 is at the floor of the plot."""
    floor = axes.get_ylim()[0]
    least = base.quality.value if name == "perplexity" else floor
    if name == "perplexity":
        if axes.get_yscale() != "log" and least < floor + 0.1 * (axes.get_ylim()[1] - floor):
            axes.set_ylim(least - 0.12 * (axes.get_ylim()[1] - least), axes.get_ylim()[1])
        axes.axhline(least, color=colour("soft"), linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    axes.plot(
        base.size, least, "D", markersize=7, color=colour("ink"), zorder=4, clip_on=False, markeredgewidth=0
    )  # fmt: skip


def _label(axes: Axes, facts: Facts, name: str, longest: int) -> None:
    """Names beside their points, each at the free place that is first in _PLACES."""
    (found, edge), base = _shown(facts, name), originals(facts)
    real = {p.name: p.quality.value for p in points(facts, name)}
    named = []
    for p in found:
        beyond = f", {real[p.name]:.2g}" if p.quality.value == edge else ""
        named.append((p.size, p.quality.value, cut(p.name, longest) + beyond, "ink" if p.front else "soft"))
    if base is not None:
        at = base.quality.value if name == "perplexity" else axes.get_ylim()[0]
        named.append((base.size, at, "original" + (", 0" if name == "kl" else f", {perplexity(at)}"), "soft"))
    from matplotlib.text import Text

    far = {"arrowstyle": "-", "color": colour("soft"), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 5}
    canvas: Any = axes.figure.canvas
    renderer = canvas.get_renderer()
    limits = axes.get_window_extent(renderer)
    spots = [axes.transData.transform((x, y)) for x, y, _, _ in named]
    taken: list[tuple[float, ...]] = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    if base is not None and name == "perplexity":
        y = float(spots[-1][1])
        taken.append((limits.x0, y - 1, float(spots[-1][0]) - 6, y + 1))
    taken += _line([axes.transData.transform((p.size, p.quality.value)) for p in found if p.front])
    front = {i for i, p in enumerate(found) if p.front}
    for i in sorted(range(len(named)), key=lambda i: (i not in front, -named[i][0])):  # the last has room to its right
        x, y, text, tone = named[i]
        best = None
        for dx, dy, ha, va in _PLACES:
            made = axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset pixels", ha=ha, va=va, fontsize=11, color=colour(tone),
                annotation_clip=False, zorder=5, arrowprops=far if abs(dx) + abs(dy) > 20 else None,
            )  # fmt: skip
            made.update_positions(renderer)
            box = Text.get_window_extent(made, renderer)  # without its line
            area = (box.x0 - 1, box.y0 - 1, box.x1 + 1, box.y1 + 1)
            cost = sum(_overlap(area, other) for j, other in enumerate(taken) if j != i)
            cost += 4 * (max(0.0, limits.x0 - area[0]) + max(0.0, area[2] - limits.x1 - 4)) * 10
            cost += 10 * (max(0.0, limits.y0 - area[1]) + max(0.0, area[3] - limits.y1 - 6))
            if best is None or cost < best[0]:
                if best is not None:
                    best[1].remove()
                best = (cost, made, area)
            else:
                made.remove()
            if cost == 0:
                break
        assert best is not None
        if best[0] > 0 and i < len(found) and not found[i].front:
            best[1].remove()  # the table has its name
        else:
            taken.append(best[2])


def _line(corners: Sequence[Any]) -> list[tuple[float, ...]]:
    """The front as boxes that labels keep away from."""
    out: list[tuple[float, ...]] = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        out += [(x0 + 5, y0 - 1, x1, y0 + 1), (x1 - 1, y1 + 5, x1 + 1, y0)]
    return out


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
