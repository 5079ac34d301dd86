"""Facts -> Markdown: the tables of the page, without its figures."""

from __future__ import annotations

from collections.abc import Iterator

from compress.report.html import pareto, tables
from compress.report.html.facts import MEASURES, Facts
from compress.report.html.page import GENERATOR, checks, title, warnings
from compress.report.html.words import headline, sentence, spent

#: what marks a file as one that may be written over
MARK = f"<!-- {GENERATOR} -->"


def markdown(facts: Facts) -> str:
    """The whole document."""
    return "\n".join(line for part in _parts(facts) for line in (*part, "")).rstrip() + "\n"


def _parts(facts: Facts) -> Iterator[list[str]]:
    yield [MARK, f"# {_line(title(facts))}"]
    yield [f"Made {facts.date} by compress {facts.versions['compress']}."]
    yield [f"- **{_line(m.name)}**: {headline(m)} ({_line(m.method)}, {m.format})" for m in facts.models]
    yield ["## Size against quality"]
    why = pareto.why_not(facts)
    yield [why] if why else _table(tables.front(facts))
    yield ["## Perplexity and divergence"]
    for made in tables.quality(facts):
        yield [f"{_line(made.caption)}:"]
        yield _table(made)
    yield [f"- {_line(note)}" for note in tables.quality_notes(facts)]
    found = tables.tasks(facts)
    if found is not None:
        yield _table(found)
    yield ["## Errors of layers"]
    for model in facts.models:
        yield [f"### {_line(model.name)}"]
        yield [f"{sentence(MEASURES[model.measure or 'unknown'])}."]
        yield _table(tables.errors(model))
    yield ["## Weights before and after"]
    for model in facts.models:
        yield [f"### {_line(model.name)}"]
        yield [_line(model.unseen)] if model.unseen else _table(tables.weights(model))
    yield ["## Outliers"]
    for model in facts.models:
        yield [f"### {_line(model.name)}"]
        yield _table(tables.outliers(model)) if model.outliers else ["No weights or columns are kept apart."]
    yield ["## Time and memory"]
    yield _table(tables.seconds(facts))
    yield _table(tables.memory(facts))
    yield ["## Warnings and fallbacks"]
    yield _lines(warnings(facts)) or ["None."]
    yield ["### What was verified"]
    yield _lines(checks(facts)) or ["Nothing is recorded."]
    yield ["## Commands and versions"]
    for model in facts.models:
        told = "as typed" if model.command else "made from the record, which holds no command line"
        yield [f"{_line(model.name)}, {told}:", "", *_fenced(model.command or model.rebuilt)]
        yield [*(f"- {_line(line)}" for line in model.words), f"- calibration: {_line(model.calibration) or 'none'}"]
    for found_file in facts.evaluations:
        told = f" (seconds: {_line(spent(found_file.seconds))})" if found_file.seconds else ""
        yield [f"{_line(found_file.file)}{told}:", "", *_fenced(found_file.command or "no command was recorded")]
    yield ["This report:", "", *_fenced(facts.command or "made from Python")]
    yield _table(tables.versions(facts))


def _table(made: tables.Table) -> list[str]:
    head = [f"| {' | '.join(_line(name) for name in made.head)} |", f"|{'---|' * len(made.head)}"]
    return [*head, *(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in made.rows)]


def _cell(cell: tables.Cell) -> str:
    return _line(cell.text) + (f" ({_line(cell.note)})" if cell.note else "")


def _lines(found: list[tuple[str, str, list[str], list[str]]]) -> list[str]:
    out = []
    for topic, text, models, layers in found:
        told = f" ({_line(', '.join(models))})" if models else ""
        out.append(f"- {topic}: {_line(text)}{told}")
        out += [f"  - {_line(name)}" for name in layers] if len(layers) > 1 else []
    return out


def _fenced(text: str) -> list[str]:
    return ["```", *text.replace("```", "'''").splitlines(), "```"]


def _line(text: str) -> str:
    """Text as it may stand in a line or a cell: no tags, no cell borders, no emphasis of its own."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return plain.replace("|", "\\|").replace("*", "\\*").replace("`", "\\`").replace("[", "\\[")
