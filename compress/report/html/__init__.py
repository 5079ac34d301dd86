"""`compress report`: folders -> one HTML page, and the same facts as JSON and as Markdown.

Two stages. `gather` (gather.py) reads records, evaluation files and the weights themselves into `Facts` (facts.py);
`page`, `markdown` and `as_json` only read those. Figures are drawn by matplotlib: svg.py says how they come to
belong to the page.

The JSON, schema 1. A key that is not listed may come without a new number; one that is listed keeps its meaning:

    schema, kind          1, "report"
    date, machine, command, versions{name: version}      of the report itself
    notes[]               what is true of the comparison as a whole
    evaluations[]         file, command, machine, date, seconds{}, versions{}, notes[]
    models[]
      name, folder, source, method, format, device, recipe[], words[], calibration, headline
      bytes, bytes_before, parameters, packed_parameters, bits_per_weight, average_bits, smaller
      scores[]            text, protocol, measured, perplexity, original, kl, kl_tail{median, p99, p999, max}, top1,
                          flips{share, lost, gained}, bits_per_byte; a figure is null or {value, low, high}, its ends
                          null where no interval was measured
      layers[]            name, block, kind, method, shape, bytes, bits_per_weight, error, tokens, outliers, notes[],
                          measure: what `error` is, a key of facts.MEASURES
      histograms[]        layer, error, low, high, before[], after[], outside, zeros (before, after), distance
      unseen, rescaled    why there are no histograms, or ""; whether a transform rescaled channels before rounding
      outliers            null, or unit, strips[] (kind, features, blocks[], rows[block][bin], total), mask (layer,
                          shape, cells[row][column], total)
      seconds{}, beside{}, host_bytes, device_bytes, room{}
      warnings[]          topic, text, layers[]
      checks[]            what was verified
      command, rebuilt    as typed; or made from the record
      versions{}, tasks{}
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.report.html.evaluations import SWEEP, swept
from compress.report.html.facts import Facts
from compress.report.html.gather import gather
from compress.report.html.markdown import MARK, markdown
from compress.report.html.page import GENERATOR, page
from compress.report.html.svg import library
from compress.report.html.words import headline
from compress.writer import write_json, write_text

SCHEMA = 1
KIND = "report"

__all__ = ["KIND", "SCHEMA", "Facts", "as_json", "gather", "markdown", "page", "write"]


def write(
    folders: Sequence[Path],
    out: Path,
    evaluated: Sequence[Path] = (),
    against: Sequence[Path] = (),
    command: str = "",
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Gather and write OUT.html, OUT.json and OUT.md.

    Args:
        folders: outputs of compress, of `compress sweep` too; what ends in .json among them is an evaluation.

    Returns:
        the files.

    Raises:
        CompressError: an input that cannot be read, an output in the place of something else, no matplotlib.
    """
    library()
    targets = outputs(out)
    given = [*evaluated, *(path for path in folders if path.suffix == ".json")]
    runs: list[Path] = []
    for folder in (path for path in folders if path.suffix != ".json"):
        if (folder / SWEEP).is_file():
            given.append(folder / SWEEP)
            runs += swept(folder)
        else:
            runs.append(folder)
    facts = gather(runs, given, against, command, step)
    made = page(facts)
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    write_text(targets[0], made)
    write_json(targets[1], as_json(facts))
    write_text(targets[2], markdown(facts))
    return targets


def as_json(facts: Facts) -> dict[str, Any]:
    """The facts as plain values; see the module's text."""
    made = asdict(facts)
    for values, model in zip(made["models"], facts.models, strict=True):
        values |= {"headline": headline(model), "average_bits": model.average_bits, "smaller": model.smaller}
    plain: dict[str, Any] = json.loads(json.dumps({"schema": SCHEMA, "kind": KIND, **made}, default=str))
    return plain


def outputs(out: Path) -> list[Path]:
    """OUT.html, OUT.json and OUT.md. Raises CompressError where one would replace what is no report."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise CompressError(
            "is not the name of a page", f"-o {out}", f"name one, such as -o {out.name or 'report'}.html"
        )
    targets = [out, out.with_suffix(".json"), out.with_suffix(".md")]
    for path in targets:
        if path.exists() and not _ours(path):
            raise CompressError("exists and is not a report", str(path), "choose another -o")
    return targets


def _ours(path: Path) -> bool:
    """Whether a file is an earlier report: any other is never written over (a run has a report.json of its own)."""
    if not path.is_file():
        return False
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(found, dict) and found.get("kind") == KIND
    with path.open(encoding="utf-8", errors="replace") as f:
        begin = f.read(4096)
    return f'<meta name="generator" content="{GENERATOR}' in begin or begin.startswith(MARK)
