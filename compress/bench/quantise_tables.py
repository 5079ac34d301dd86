"""The report of `compress bench quantise` as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compress.bench.tables import Table, failures, goals_table

Row = dict[str, Any]

_FIGURES = {
    "seconds": ("seconds", 1.0, "s"),
    "seconds_all": ("seconds, carried on to all blocks", 1.0, "s"),
    "solve_seconds": ("seconds of solving", 1.0, "s"),
    "refine_block_seconds": ("seconds of refining a block", 1.0, "s"),
    "peak_device_bytes": ("device memory", 2.0**30, "GiB"),
    "times_copy": ("times reading and writing", 1.0, ""),
    "times_default": ("times the run without low memory", 1.0, ""),
    "times_tool": ("share of the fastest tool's seconds", 1.0, ""),
}


def tables(report: dict[str, Any]) -> list[Table]:
    """A row for each run, where its time went, what was set out."""
    rows, spent = report["rows"], [r for r in report["rows"] if r.get("phases")]
    phases, aside = (list(dict.fromkeys(p for r in spent for p in r[name])) for name in ("phases", "beside"))
    found = [_runs(report["model"], rows)]
    if spent:
        cells = tuple(_spent(r, phases) for r in spent)
        found.append(Table("Where the time went", ("method", "blocks", *phases, "elsewhere"), cells))
    if aside:
        cells = tuple((*_run_of(r), *(f"{r['beside'].get(p, 0.0):.2f}" for p in aside)) for r in spent)
        found.append(Table("Threads beside that; s", ("method", "blocks", *aside), cells))
    return [*found, *goals_table([_goal(g) for g in report["goals"]])]


def _goal(found: Row) -> Row:
    told, size, unit = _FIGURES[found["figure"]]
    units = {"goal": found["goal"] / size, "measured": found["measured"] / size, "unit": unit}
    return found | units | {"what": f"{found['what']}: {told}", "least": False}


def _runs(model: dict[str, Any], rows: Sequence[Row]) -> Table:
    """Figures by column; a column that no row fills is left out."""
    columns: dict[str, Callable[[Row], str]] = {
        "s": lambda r: f"{r['seconds']:.2f}",
        "before it, s": lambda r: f"{r['before_seconds']:.1f}",
        "process, s": lambda r: f"{r['process_seconds']:.1f}",
        "s a block": lambda r: f"{r['seconds_a_block']:.3f}",
        f"all {model['blocks']}, carried on, s": lambda r: f"{r['seconds_all']:.0f}",
        "device, GiB": lambda r: f"{r['peak_device_bytes'] / 2**30:.2f}",
        "reserved": lambda r: f"{r['reserved_device_bytes'] / 2**30:.2f}",
        "host, GiB": lambda r: f"{r['peak_host_bytes'] / 2**30:.2f}",
        "in, GB": lambda r: f"{r['bytes_in'] / 1e9:.2f}",
        "out, GB": lambda r: f"{r['bytes_out'] / 1e9:.2f}",
        "read + write, s": lambda r: f"{r['read_seconds'] + r['write_seconds']:.2f}",
        "times that": lambda r: f"{r['times_copy']:.2f}",
        "": lambda r: f"FAILED: {r['failed']}" if r["failed"] else "",
    }

    def cell(made: Callable[[Row], str], row: Row) -> str:
        try:
            return made(row)
        except KeyError:
            return "-"

    made = {name: [cell(column, r) for r in rows] for name, column in columns.items()}
    made = {name: cells for name, cells in made.items() if any(c != "-" for c in cells)}
    every = tuple((*_run_of(r), *(cells[i] for cells in made.values())) for i, r in enumerate(rows))
    return Table(f"{model['name']}: from a folder to a verified folder", ("method", "blocks", *made), every)


def _run_of(row: Row) -> tuple[str, str]:
    return row["method"] + (", low memory" if row["low_memory"] else ""), str(row["blocks"])


def _spent(row: Row, phases: Sequence[str]) -> tuple[str, ...]:
    """Seconds and the share of the run."""
    took = row["phases"]
    rest = row["seconds"] - sum(took.values())
    parts = [*(took.get(p, 0.0) for p in phases), rest]
    return (*_run_of(row), *(f"{t:.2f} ({t / row['seconds']:.0%})" if t else "-" for t in parts))


def notes(report: dict[str, Any]) -> list[str]:
    """How to read the tables, and what is missing."""
    s, sizes = report["setting"], report["model"]
    cache = (
        "Files were dropped from the system's cache before each run."
        if s["cold"]
        else "The model had just been written, so its files were in the system's cache as far as memory holds them."
    )
    told = [
        f"{sizes['parameters'] / 1e9:.3f} billion random weights, bfloat16; {s['bits']} bits, groups of {s['group']}; "
        f"{s['samples']} x {s['seq_len']} random token ids to calibrate on. {cache}",
        "Seconds: from loaded libraries and a device that is awake to a folder that was written, read back and "
        "compared; no client loads it, and nothing is evaluated; before it: imports and the start of the device. "
        "Each run is a process; process: from its start to its end. Device: the most that was allocated; "
        "reserved: the most that torch held; host: the most that was resident.",
        "s a block: with one number of blocks the seconds over the blocks; with more, by the line through the least "
        "and the most. Read + write: a thread reads each tensor once and writes as many bytes as the result has.",
    ]
    for blocks in sorted({tuple(r["carried_on"]) for r in report["rows"] if "carried_on" in r}):
        how = "by that line" if len(blocks) > 1 else "too long, as what does not grow with blocks is multiplied too"
        told.append(
            f"Carried on to all {sizes['blocks']} blocks: not measured, but worked out from runs on "
            f"{' and '.join(map(str, blocks))} blocks, {how}."
        )
    told += [f"Absent: {what}: {reason}." for what, reason in report["absent"].items()]
    return told + failures(report)
