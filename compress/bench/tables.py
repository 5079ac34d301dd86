"""Reports as tables: in Markdown for a file, with rich for a screen. Both from the same cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from compress.bench import record

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Cells as text.

    Attributes:
        title: one line.
        headings: of the columns.
        rows: as many cells each.
    """

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def markdown(self) -> list[str]:
        lines = [f"**{self.title}**", ""]
        for row in (self.headings, ("---",) * len(self.headings), *self.rows):
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        return [*lines, ""]


def show(tables: Sequence[Table], notes: Sequence[str]) -> None:
    """On the screen."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    console = Console(highlight=False, markup=False)
    for table in tables:
        drawn = Drawn(title=table.title, box=box.SIMPLE, title_justify="left")
        for i, heading in enumerate(table.headings):
            drawn.add_column(heading, justify="right" if i else "left", overflow="fold")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)
    for note in notes:
        console.print(note, soft_wrap=True)


def markdown(title: str, report: dict[str, Any], tables: Sequence[Table], notes: Sequence[str]) -> str:
    """A whole page: what was run where, the tables, the notes."""
    lines = [f"# {title}", ""]
    for line in record.lines(report):
        lines += [line, ""]
    for table in tables:
        lines += table.markdown()
    lines += [f"- {note}" for note in notes]
    return "\n".join(lines).rstrip() + "\n"


# --- compress bench kernels -----------------------------------------------------------------------------------------


def kernels(report: dict[str, Any]) -> list[Table]:
    """The ceilings, then a table a kind."""
    return [_ceilings(report), *(_kind(report, kind) for kind in report["cases"]), *_tuned(report)]


def _ceilings(report: dict[str, Any]) -> Table:
    found = report["ceilings"]
    rows = [("copy, read + write", f"{found['copy_gbps']:.0f} GB/s", "")]
    rows += [
        (f"read {r['bytes'] / 1e6:g} MB", f"{r['gbps']:.0f} GB/s", number(r["us"]) + " µs") for r in found["reads"]
    ]
    rows += [(f"dense {name}", f"{rate:.0f} T/s", "") for name, rate in found["tera_per_second"].items()]
    return Table("What the card can do at most", ("", "rate", "time"), tuple(rows))


def _kind(report: dict[str, Any], kind: str) -> Table:
    rows = [r for r in report["rows"] if r["kind"] == kind]
    rivals = list(dict.fromkeys(name for r in rows for name in r.get("peers", {})))
    others = any(r.get("quoted") for r in rows)
    headings = ["shape", "M", "µs", "GB/s", "of floor", *(f"{n}: µs (ratio)" for n in rivals)]
    headings += ["quoted, not this run: µs (ratio)"] if others else []
    headings += ["ran", "error"]
    return Table(f"{kind}: {report['cases'][kind]}", tuple(headings), tuple(_cells(r, rivals, others) for r in rows))


def _cells(row: Row, rivals: Sequence[str], others: bool) -> tuple[str, ...]:
    start = (f"{row['rows']}x{row['columns']}", str(row["tokens"]))
    end = (row.get("way", ""),)
    if row["failed"]:
        return (*start, "FAILED", *("",) * (2 + len(rivals) + others), *end, row["failed"])
    numbers = (number(row["us"]), f"{row['gbps']:.0f}", f"{row['of_floor']:.2f}")
    beside = [_ratio(row["peers"][n]) if n in row["peers"] else "-" for n in rivals]
    if others:
        beside.append(", ".join(f"{name} {_ratio(found)}" for name, found in row.get("quoted", {}).items()) or "-")
    return (*start, *numbers, *beside, *end, f"{row['error']:.1e}")


def _tuned(report: dict[str, Any]) -> list[Table]:
    if not report["tuned"]:
        return []
    rows = tuple(
        (
            t["kind"], f"{t['rows']}x{t['columns']}", str(t["tokens"]), " ".join(map(str, t["way"])), number(t["us"]),
            t["before"], "-" if t["before_us"] is None else number(t["before_us"]), str(t["tried"]),
            str(len(t["failed"])),
        )
        for t in report["tuned"]
    )  # fmt: skip
    headings = ("kind", "shape", "M", "fastest", "µs", "before", "µs", "tried", "of these failed")
    return [Table("Tuned", headings, rows)]


def kernels_notes(report: dict[str, Any]) -> list[str]:
    """How to read the tables, and what is missing."""
    setting = report["setting"]
    notes = [
        f"Inputs and outputs are {setting['dtype']}; integer grids have groups of {setting['group']}"
        f"{', with zero points' if setting['asymmetric'] else ''}. M: tokens. Shapes are out_features x in_features.",
        "µs: median of graph replays over copies of the layer that hold four times the L2 together. GB/s: of the bytes "
        "that must move: packed weights, scales, outliers, input, output. Of floor: the time to read as many bytes, or "
        "of the operations at the dense rate above if that is longer, over the time taken. Ratio: how many times as "
        "long the other takes. Error: relative, Frobenius, from float32 by definition.",
    ]
    if any(r.get("quoted") for r in report["rows"]):
        from compress.bench.kernels import quoted

        notes.append(f"Quoted: {quoted()['source']}.")
    merged: dict[str, list[str]] = {}
    for what, reason in report["absent"].items():
        merged.setdefault(reason, []).append(what)
    notes += [f"Absent: {'; '.join(what)}: {reason}." for reason, what in merged.items()]
    if report["failed"] or report["missing"]:
        notes.append(f"{report['failed']} rows failed, {report['missing']} were not reached.")
    return notes


# --- compress bench decode ------------------------------------------------------------------------------------------


def decode(report: dict[str, Any]) -> list[Table]:
    """A row for each method and batch."""
    model = report["model"]
    title = (
        f"Greedy decoding, random Llama of {model['layers']} layers, hidden {model['hidden']}, "
        f"{model['parameters'] / 1e9:.2f} billion parameters, {report['setting']['dtype']}"
    )
    headings = ("method", "batch", "tokens/s", "ms a step", "times dense", "weights, GB", "GB/s", "peak memory, GB", "")
    dense = {r["batch"]: r["ms"] for r in report["rows"] if r["method"] == "dense" and not r["failed"]}
    rows = []
    for r in report["rows"]:
        start = (r["method"], str(r["batch"]))
        if r["failed"]:
            rows.append((*start, "FAILED", *("",) * 5, r["failed"]))
            continue
        ratio = f"{dense[r['batch']] / r['ms']:.2f}" if r["batch"] in dense else "-"
        size = (f"{r['weight_bytes'] / 1e9:.2f}", f"{r['gbps']:.0f}", f"{r['peak_bytes'] / 1e9:.2f}")
        rows.append((*start, f"{r['tokens_per_second']:.1f}", f"{r['ms']:.2f}", ratio, *size, ""))
    return [Table(title, headings, tuple(rows))]


def decode_notes(report: dict[str, Any]) -> list[str]:
    """How to read the table."""
    s = report["setting"]
    compiled = ", compiled by torch.compile" if s.get("compiled") else ""
    return [
        f"A prompt of {s['prompt']} tokens, then {s['steps']} replays of one captured step: the model, a static cache, "
        "argmax. ms a step: median of three such runs, device time. Each was made twice from the same state and gave "
        "the same tokens. GB/s: of the weights that a step reads. q, k and v are one product, gate and up another. "
        f"What lies between is plain torch{compiled}; embeddings and lm_head are torch's, in 16 bits. Only the linear "
        "layers of the blocks differ.",
    ]


def number(us: float) -> str:
    """With three digits or more that count."""
    return f"{us:.2f}" if us < 10 else f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def _ratio(found: dict[str, Any]) -> str:
    return f"{number(found['us'])} ({found['ratio']:.2f})"


# --- what several have ---------------------------------------------------------------------------------------------


def goals_table(goals: Sequence[Row]) -> list[Table]:
    """What was set out, beside what was measured; no table without any."""
    rows = []
    for g in goals:
        bound = "at least" if g["least"] else "at most"
        came, unit = f"{g['measured']:.4g} {g['unit']}", g["unit"]
        rows.append((g["what"], f"{bound} {g['goal']:g} {unit}", came, "yes" if g["met"] else "NO"))
    return [Table("What was set out, and what came", ("", "goal", "measured", "met"), tuple(rows))] if rows else []


def failures(report: dict[str, Any]) -> list[str]:
    """A note that rows failed, if any did."""
    failed, missing = report["failed"], report["missing"]
    return [f"{failed} rows failed, {missing} were not reached."] if failed or missing else []
