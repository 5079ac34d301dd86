"""The tables of a report, once: the page and Markdown show the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.evaluate.intervals import Estimate
from compress.report.html import heat, pareto
from compress.report.html.facts import Facts, Model, Score
from compress.report.html.panels import GROUPS
from compress.report.html.words import (
    duration,
    estimate,
    figures,
    has_intervals,
    interval,
    kinds,
    percent,
    perplexity,
    size,
)


@dataclass(frozen=True)
class Cell:
    """One cell: what it says, what is said smaller below it, and what it is sorted by (its text, if None)."""

    text: str
    note: str = ""
    sort: float | None = None
    wide: bool = False


@dataclass(frozen=True)
class Table:
    """`head`: of the columns; `rows`: of cells, the first of each row names it."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def _number(value: float | None, text: str) -> Cell:
    return Cell(text, sort=value)


def _estimate(found: Estimate | None, how: str) -> Cell:
    return Cell(estimate(found, how), interval(found, how), None if found is None else found.value)


Protocol = tuple[str, str, str]


def protocols(facts: Facts) -> list[Protocol]:
    """Text, protocol and origin of every score, each once."""
    return list(dict.fromkeys((s.text, s.protocol, s.measured) for m in facts.models for s in m.scores))


def quality(facts: Facts) -> list[Table]:
    """What every model became: size, perplexity, divergence; a table for each text and protocol."""
    made = [_quality(facts, key) for key in protocols(facts)]
    rest = tuple(_sizes(m) for m in facts.models if not m.scores)
    return [*made, Table("Not measured", _SIZES, rest)] if rest else made


_SIZES = ("model", "bits a weight", "on disk", "smaller")


def _quality(facts: Facts, key: Protocol) -> Table:
    """The originals, then the models, on one text."""
    found = [(m, s) for m in facts.models for s in m.scores if (s.text, s.protocol, s.measured) == key]
    bases = {m.source: (m, s) for m, s in reversed(found) if s.original is not None}
    tail = any("p999" in s.kl_tail for _, s in found)
    rows = [*(_original(m, s, tail) for m, s in reversed(bases.values())), *(_scored(m, s, tail) for m, s in found)]
    head = (*_SIZES, "perplexity", "KL, nats a token", *(["KL p99.9"] if tail else []), "same top token")
    return Table(f"On {key[0]}, from {key[2]}", head, tuple(rows))


def _sizes(model: Model) -> tuple[Cell, ...]:
    return (
        Cell(model.name, model.method if model.method != model.name else ""),
        Cell(f"{model.bits_per_weight:.3f}", f"{model.average_bits:.2f} a parameter", model.bits_per_weight),
        Cell(size(model.bytes), sort=model.bytes),
        Cell(f"{model.smaller:.2f}x", sort=model.smaller),
    )


def _original(model: Model, score: Score, tail: bool) -> tuple[Cell, ...]:
    """The original's row."""
    bits = 8.0 * model.bytes_before / model.parameters if model.parameters else 0.0
    return (
        Cell(model.source, "original"),
        Cell(f"{bits:.3f}", sort=bits),
        Cell(size(model.bytes_before), sort=model.bytes_before),
        Cell("1x", sort=1.0),
        _estimate(score.original, "perplexity"),
        *[Cell("0", sort=0.0)] * (1 + tail),
        Cell("100%", sort=1.0),
    )


def _scored(model: Model, score: Score, tail: bool) -> tuple[Cell, ...]:
    most = score.kl_tail.get("p999")
    return (
        *_sizes(model),
        _estimate(score.perplexity, "perplexity"),
        _estimate(score.kl, "figures"),
        *([_number(most, figures(most))] if tail else []),
        _estimate(score.top1, "share"),
    )


def quality_notes(facts: Facts) -> list[str]:
    """What a reader of these tables must know."""
    out = [f"{text}, figures from {measured}: {protocol}." for text, protocol, measured in protocols(facts)]
    scores = [s for m in facts.models for s in m.scores]
    if has_intervals(scores):
        out.append("Below a figure stands its 95% interval, where one was measured; the other figures have none.")
    elif scores:
        out.append("No intervals: the runs measured none. A file of compress eval, given as --eval FILE, brings them.")
    if any(not m.scores for m in facts.models):
        out.append("What was not measured was compressed with --no-eval, and no evaluation file tells of it.")
    return out


def front(facts: Facts) -> Table:
    """The points of the plot."""
    rows = []
    names = {"kl": "KL, nats a token", "perplexity": "perplexity"}
    points = {name: {p.name: p for p in pareto.points(facts, name)} for name in names}
    for model in sorted(pareto.measured(facts), key=lambda m: m.bytes):
        cells = [Cell(model.name), Cell(size(model.bytes), f"{model.average_bits:.2f} bits a parameter", model.bytes)]
        for name in names:
            p = points[name].get(model.name)
            told = "-" if p is None else (perplexity if name == "perplexity" else figures)(p.quality.value)
            on_front = "" if p is None or not p.front else "on the front"
            cells.append(Cell(told, on_front, None if p is None else p.quality.value))
        rows.append(tuple(cells))
    return Table("The points of the plot", ("model", "on disk", *names.values()), tuple(rows))


def errors(model: Model) -> Table:
    """Errors by decoder block and kind of layer, as in the heat map."""
    found = heat.grid(model)
    short = kinds(list(found.kinds))
    rows = [
        (
            Cell(f"block {block}", sort=float(block)),
            *(_number(found.cells[i][j], percent(found.cells[i][j])) for i in range(len(found.kinds))),
        )
        for j, block in enumerate(found.blocks)
    ]
    return Table(f"Errors of {model.name}", ("", *(short[k] for k in found.kinds)), tuple(rows))


def layers(model: Model) -> Table:
    """Every compressed layer."""
    apart = any(x.outliers is not None for x in model.layers)
    head = ("layer", "method", "shape", "bits a weight", "error", "tokens", *(["outliers"] if apart else []))
    rows = []
    for x in model.layers:
        row = [
            Cell(x.name, wide=True),
            Cell(x.method),
            Cell("x".join(map(str, x.shape)), sort=float(x.bytes)),
            _number(x.bits_per_weight, f"{x.bits_per_weight:.3f}"),
            _number(x.error, percent(x.error)),
            Cell(f"{x.tokens:,}" if x.tokens else "-", sort=float(x.tokens)),
        ]
        if apart:
            row.append(Cell("-" if x.outliers is None else f"{x.outliers:,}", sort=float(x.outliers or 0)))
        rows.append(tuple(row))
    return Table(f"All {len(rows)} compressed layers of {model.name}", head, tuple(rows))


def weights(model: Model) -> Table:
    """The layers whose weights are shown."""
    head = ("layer", "error", "weights moved by", "zeros before", "zeros after", "largest shown", "outside")
    rows = [
        (
            Cell(h.layer, wide=True),
            _number(h.error, percent(h.error)),
            _number(h.distance, percent(h.distance)),
            _number(h.zeros[0], percent(h.zeros[0])),
            _number(h.zeros[1], percent(h.zeros[1])),
            _number(h.high, figures(h.high)),
            _number(h.outside[0], percent(h.outside[0])),
        )
        for h in model.histograms
    ]
    return Table(f"Layers of {model.name} with the largest errors", head, tuple(rows))


def outliers(model: Model) -> Table:
    """Outliers by kind of layer."""
    assert model.outliers is not None
    unit = model.outliers.unit
    rows = []
    for strip in model.outliers.strips:
        shares = [sum(row) / len(row) for row in strip.rows]
        most = max(range(len(shares)), key=shares.__getitem__)
        rows.append(
            (
                Cell(strip.kind, wide=True),
                Cell(f"{strip.features:,}", sort=float(strip.features)),
                _number(strip.total, percent(strip.total)),
                Cell(f"{strip.blocks[most]}", percent(shares[most]), shares[most]),
            )
        )
    head = ("kind of layer", "input features", f"share of {unit}", "most, in block")
    return Table(f"Outlier {unit} of {model.name}", head, tuple(rows))


def seconds(facts: Facts) -> Table:
    """Every part of every run."""
    order = [p for _, parts in GROUPS.values() for p in parts]
    told = {p for m in facts.models for p in m.seconds if p != "total"}
    parts = [p for p in order if p in told] + sorted(told - set(order))
    rows = []
    for m in facts.models:
        total = m.seconds.get("total", sum(m.seconds.values())) if m.seconds else None
        cells = [_number(m.seconds.get(p), duration(m.seconds.get(p))) for p in parts]
        beside = sum(m.beside.values()) if m.beside else None
        rows.append((Cell(m.name), _number(total, duration(total)), *cells, _number(beside, duration(beside))))
    return Table("Seconds by part of the run", ("model", "in all", *parts, "threads beside"), tuple(rows))


def memory(facts: Facts) -> Table:
    """Peaks, and where the run kept what."""
    rooms = list(dict.fromkeys(k for m in facts.models for k in m.room))
    rows = []
    for m in facts.models:
        device = "no GPU" if m.device_bytes == 0 else size(m.device_bytes)
        kept = [Cell(str(m.room.get(k, "-"))) for k in rooms]
        peaks = (_number(m.host_bytes, size(m.host_bytes)), _number(m.device_bytes, device))
        rows.append((Cell(m.name), Cell(m.device), *peaks, *kept))
    head = ("model", "device", "peak, host", "peak, device", *(k.replace("_", " ") for k in rooms))
    return Table("Peak memory, and where the run kept what", head, tuple(rows))


def versions(facts: Facts) -> Table:
    """Of every run, every evaluation and this report."""
    every = [(m.name, m.versions) for m in facts.models]
    every += [(e.file, e.versions) for e in facts.evaluations] + [("this report", facts.versions)]
    names = list(dict.fromkeys(k for _, found in every for k in found))
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, found in every:
        alike.setdefault(tuple(found.get(k, "-") for k in names), []).append(name)
    rows = [(Cell(", ".join(who)), *map(Cell, values)) for values, who in alike.items()]
    return Table("Versions", ("", *names), tuple(rows))


def tasks(facts: Facts) -> Table | None:
    """Tasks that an evaluation ran, where it did."""
    names = list(dict.fromkeys(k for m in facts.models for k in m.tasks))
    if not names:
        return None
    rows: list[tuple[Cell, ...]] = []
    for m in facts.models:
        found = [m.tasks.get(k) for k in names]
        rows.append((Cell(m.name), *map(_task, found)))
    return Table("Tasks", ("model", *names), tuple(rows))


def _task(value: object) -> Cell:
    from compress.report.html.evaluations import estimate as read

    if isinstance(value, dict) and "value" not in value:
        value = next((v for v in value.values() if read(v) is not None), None)
    return _estimate(read(value), "share")


def merged(entries: Sequence[tuple[str, str, str, tuple[str, ...]]]) -> list[tuple[str, str, list[str], list[str]]]:
    """Lines (topic, text, model, layers) that say the same, once: topic, text, models, "model: layer" of all."""
    found: dict[tuple[str, str], tuple[list[str], list[str]]] = {}
    for topic, text, model, names in entries:
        models, every = found.setdefault((topic, text), ([], []))
        models.append(model)
        every += [f"{model}: {name}" for name in names]
    return [(topic, text, models, every) for (topic, text), (models, every) in found.items()]
