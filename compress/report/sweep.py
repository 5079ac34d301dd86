"""What `compress sweep` tells: one JSON object, and tables of it for a screen or a Markdown file.

Schema 1; head, estimates and units as in evaluation.py:

    schema, command, date, machine, versions
    kind         "sweep"
    model        what the user called the original
    base         the original, as in evaluation.py
    settings     name, command (that makes it alone), method, refused (why there is no such checkpoint, or ""),
                 on_front; of those that were made what evaluation.py says of a model, and seconds of the run by part
    wish         max_bytes, max_kl, avg_bits (null: any), words
    choice       the name of the setting that was chosen, or null; why_none says why where there was a wish
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bench import record
from compress.bench.tables import Table, markdown, show

Found = Mapping[str, Any]


def print_report(report: Found) -> None:
    """On the screen."""
    show(tables(report), notes(report))


def write(out: Path, report: dict[str, Any]) -> list[Path]:
    """OUT.json and OUT.md."""
    return record.write(out, report, markdown("Sweep", report, tables(report), notes(report)))


def tables(report: Found) -> list[Table]:
    """Settings by size; those that cannot be."""
    made = sorted((s for s in report["settings"] if not s["refused"]), key=lambda s: (s["bytes"], s["name"]))
    head = ("setting", "size, MB", "bits", "perplexity", "KL, nats", "top-1", "s", "front")
    found = [Table(f"{report['model']}, each setting", head, tuple(_row(s, report["choice"]) for s in made))]
    refused = tuple((s["name"], s["refused"]) for s in report["settings"] if s["refused"])
    return found + ([Table("Left out", ("setting", "why"), refused)] if refused else [])


def notes(report: Found) -> list[str]:
    """How to read them, and what to do."""
    made = [s for s in report["settings"] if not s["refused"]]
    found = ["front: no other setting is smaller and closer to the original. In brackets 95% intervals."]
    if report["base"]:
        base = report["base"]["texts"][0]
        text = f"{base['text']}; {base['protocol']}; {base['windows']} windows of {base['window']} tokens"
        found.append(
            f"the original: {report['base']['bytes'] / 1e6:.1f} MB, perplexity {_estimate(base['perplexity'])}; {text}"
        )
    found += list(dict.fromkeys(f"note: {note}" for s in made for note in s.get("notes", [])))
    if report["why_none"]:
        found.append(report["why_none"])
    for setting in made:
        if setting["name"] == report["choice"]:
            found.append(f"chosen for {report['wish']['words']}: {setting['name']}")
            found.append(f"it is there already; this makes it: {setting['command']}")
    return found


def _row(setting: Found, choice: str | None) -> tuple[str, ...]:
    text = setting["texts"][0]
    bits = setting["average_bits"]
    mark = "chosen" if setting["name"] == choice else "yes" if setting["on_front"] else ""
    return (
        setting["name"], f"{setting['bytes'] / 1e6:.1f}", "" if bits is None else f"{bits:.2f}",
        _estimate(text["perplexity"]), _estimate(text["kl"]["mean"]), f"{100 * text['top1']['value']:.1f}%",
        f"{setting['seconds'].get('total', 0):.1f}", mark,
    )  # fmt: skip


def _estimate(found: Found) -> str:
    value, low, high = (found[key] for key in ("value", "low", "high"))
    around = "" if low is None or high is None else f" ({low:.4g} to {high:.4g})"
    return f"{value:.4g}{around}"
