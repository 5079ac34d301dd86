"""Errors of layers: decoder blocks by kinds of layer, one hue from pale to strong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from compress.report.html.facts import Model
from compress.report.html.svg import LEVELS, colour, figure, style
from compress.report.html.words import kinds, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: up to so many blocks a cell has room for its value, and the map fits on a phone as it is
FEW = 12


@dataclass(frozen=True)
class Grid:
    """Errors by block and kind; of the experts of a block the largest. None where there is no such layer.

    Attributes:
        beside: layers outside of the blocks, with their errors.
    """

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: tuple[tuple[float | None, ...], ...]
    beside: tuple[tuple[str, float], ...]

    @property
    def values(self) -> list[float]:
        return [v for row in self.cells for v in row if v is not None]

    def level(self, value: float) -> int:
        """Its step of the map: even ones from the least error to the largest."""
        low, high = min(self.values), max(self.values)
        share = (value - low) / (high - low) if high > low else 0.5
        return min(LEVELS - 1, int(share * LEVELS))


def grid(model: Model) -> Grid:
    """The errors of a model's layers."""
    inside = [x for x in model.layers if x.block is not None and x.error is not None]
    names = tuple(dict.fromkeys(x.kind for x in inside))
    blocks = sorted({x.block for x in inside if x.block is not None})
    worst: dict[tuple[int, str], float] = {}
    for x in inside:
        key = (x.block or 0, x.kind)
        worst[key] = max(worst.get(key, 0.0), x.error or 0.0)
    cells = tuple(tuple(worst.get((b, k)) for b in range(blocks[0], blocks[-1] + 1)) for k in names) if blocks else ()
    beside = tuple((x.name, x.error) for x in model.layers if x.block is None and x.error is not None)
    return Grid(tuple(range(blocks[0], blocks[-1] + 1)) if blocks else (), names, cells, beside)


def draw(found: Grid, upright: bool) -> tuple[Figure, dict[str, str]]:
    """The map, and what a pointer shows of each cell.

    Args:
        upright: blocks go down, kinds across: for a narrow page.
    """
    few = len(found.blocks) <= FEW
    rows, columns = (len(found.kinds), len(found.blocks))
    if upright:
        rows, columns = columns, rows
    wide = 60.0 if few else (37.0 if upright else max(4.0, min(24.0, 640.0 / columns)))
    high = 27.0 if few else (11.0 if upright else 22.0)
    left, top = (34.0, 76.0) if upright else (104.0, 44.0)
    with style():
        made = figure(left + columns * wide + 8, top + rows * high + 26)
        width, height = (float(x) * 72 for x in made.get_size_inches())
        axes = made.add_axes((left / width, 26 / height, columns * wide / width, rows * high / height))
        titles = _cells(axes, found, upright, few)
        _axes(axes, found, upright, few)
        _key(made, found, left, width, height)
    return made, titles


def _cells(axes: Axes, found: Grid, upright: bool, few: bool) -> dict[str, str]:
    from matplotlib.patches import Rectangle

    titles = {}
    worst = max(found.values)
    for i, kind in enumerate(found.kinds):
        for j, block in enumerate(found.blocks):
            value = found.cells[i][j]
            x, y = (i, j) if upright else (j, i)
            if value is None:
                axes.plot(x + 0.5, y + 0.5, ".", markersize=2.5, color=colour("soft"))
                continue
            level, name = found.level(value), f"c{i}.{j}"
            edge = colour("alarm") if value == worst else "none"
            width = 2.0 if value == worst else 0.0
            cell = Rectangle((x, y), 1, 1, facecolor=colour(f"h{level}"), edgecolor=edge, linewidth=width, gid=name)
            cell.set_clip_on(False)
            cell.set_zorder(3 if value == worst else 1)
            axes.add_patch(cell)
            titles[name] = f"block {block}, {kind}: {percent(value)}"
            if few:
                axes.text(
                    x + 0.5, y + 0.5, percent(value, 2).rstrip("%"), ha="center", va="center", fontsize=9.5,
                    color=colour(f"i{level}"), zorder=4,
                )  # fmt: skip
    return titles


def _axes(axes: Axes, found: Grid, upright: bool, few: bool) -> None:
    """Names of kinds and numbers of blocks, the latter every so often."""
    short = list(kinds(list(found.kinds)).values())
    count = len(found.blocks)
    every = 1 if few else next(n for n in (4, 5, 8, 10, 16, 20, 32) if count / n <= 17 or n == 32)
    blocks = [i for i, b in enumerate(found.blocks) if b % every == 0]
    numbers = [str(found.blocks[i]) for i in blocks]
    axes.set_xlim(0, len(short) if upright else count)
    axes.set_ylim(count if upright else len(short), 0)
    named = [i + 0.5 for i in range(len(short))]
    if upright:
        axes.xaxis.tick_top()
        axes.set_xticks(named, short, rotation=50, ha="left", rotation_mode="anchor", fontsize=9.5)
        axes.set_yticks([i + 0.5 for i in blocks], numbers, fontsize=9.5)
    else:
        axes.set_yticks(named, short, fontsize=10)
        axes.set_xticks([i + 0.5 for i in blocks], numbers, fontsize=9.5)
        axes.text(0, len(short), "block ", ha="right", va="top", fontsize=9.5, color=colour("soft")).set_y(
            len(short) + 0.22
        )
    axes.tick_params(length=0, pad=4)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _key(made: Figure, found: Grid, left: float, width: float, height: float) -> None:
    """The steps of the map, with the least and the largest error."""
    from matplotlib.patches import Rectangle

    low, high = min(found.values), max(found.values)
    x, y, step = max(left, 56.0), height - 16.0, 12.0
    made.text((x - 6) / width, y / height, percent(low, 2), fontsize=9.5, color=colour("soft"), va="center", ha="right")
    for level in range(LEVELS):
        at = ((x + level * step) / width, (y - 5) / height)
        made.add_artist(
            Rectangle(
                at, step / width, 10 / height, facecolor=colour(f"h{level}"), linewidth=0, transform=made.transFigure
            )
        )
    end = (x + LEVELS * step + 6) / width
    made.text(end, y / height, percent(high, 2), fontsize=9.5, color=colour("soft"), va="center")
