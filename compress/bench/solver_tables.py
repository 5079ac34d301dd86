"""The report of `compress bench solver` as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compress.bench.tables import Table, failures, goals_table, number

Row = dict[str, Any]
_STAGES = ("hessian", "factor", "grid", "loop", "block", "refit", "descent", "losses")


def tables(report: dict[str, Any]) -> list[Table]:
    """A table a method, other tools, a block of Llama-2-7B, what was set out."""
    found = [_stages(report, name) for name in report["methods"]]
    return [*found, *_tools(report), *_sums(report), *goals_table(report["goals"])]


def _stages(report: dict[str, Any], name: str) -> Table:
    rows = [r for r in report["rows"] if r["method"] == name]
    known = [s for s in _STAGES if any(s in r.get("ms", {}) or (s == "block" and "block_us" in r) for r in rows)]
    titles = {"hessian": "Hessian", "block": "128 columns, µs", "grid": "grids"}
    headings = ["shape", *(titles.get(s, s) for s in known), "whole call", "rest", "error", "over Python", "equal", ""]
    return Table(f"{name}: {report['methods'][name]}; ms", tuple(headings), tuple(_staged(r, known) for r in rows))


def _staged(row: Row, known: Sequence[str]) -> tuple[str, ...]:
    shape = f"{row['rows']}x{row['columns']}"
    if "ms" not in row:
        return (shape, "FAILED", *("",) * (len(known) + 4), row["failed"])
    ms = row["ms"]
    cells = [number(row["block_us"]) if s == "block" and "block_us" in row else _ms(ms.get(s)) for s in known]
    rest = ms["whole"] - sum(took for stage, took in ms.items() if stage not in ("whole", "hessian"))
    twin = row.get("twin")
    same = (f"{twin['ratio']:.5f}", f"{twin['equal']:.2%}") if twin else ("", "")
    failed = f"FAILED: {row['failed']}" if row["failed"] else ""
    return (shape, *cells, _ms(ms["whole"]), _ms(rest), f"{row['loss']:.3e}", *same, failed)


def _tools(report: dict[str, Any]) -> list[Table]:
    ours = {(r["rows"], r["columns"]): r for r in report["rows"] if r["method"] == "gptq" and not r["failed"]}
    rows = []
    for r in report["tools"]:
        mine = ours.get((r["rows"], r["columns"]))
        ratios = ["-", "-"]
        if mine is not None:
            solve = mine["ms"]["factor"] + mine["ms"]["loop"]
            ratios = [f"{r['hessian_ms'] / mine['ms']['hessian']:.1f}", f"{r['solve_ms'] / solve:.1f}"]
        loss = f"{r['loss']:.3e}" if "loss" in r else "-"
        times = (_ms(r["hessian_ms"]), ratios[0], _ms(r["solve_ms"]), ratios[1])
        rows.append((_said(r["tool"], r), f"{r['rows']}x{r['columns']}", *times, loss))
    headings = ("tool", "shape", "Hessian", "times ours", "factor + loop", "times ours", "error")
    return [Table("Other tools; ms", headings, tuple(rows))] if rows else []


def _sums(report: dict[str, Any]) -> list[Table]:
    found = report["block"]
    if not found:
        return []
    rows = []
    for name, took in found["ours"].items():
        three = [took[stage] for stage in ("hessian", "factor", "loop")]
        added = sum(took.get(stage, 0.0) for stage in ("grid", "refit", "descent"))
        rows.append((name, *map(_ms, (*three, sum(three), added, took.get("calls")))))
    for name, took in found["tools"].items():
        hessian, solve = took["hessian"], took["solve"]
        rows.append((_said(name, took), _ms(hessian), "in the next", _ms(solve), _ms(hessian + solve), "-", "-"))
    headings = ("", "Hessian", "factor", "loop", "these three", "grids, refit, descent", "as a run calls it")
    return [Table("The 7 linear layers of a Llama-2-7B block; ms", headings, tuple(rows))]


def notes(report: dict[str, Any]) -> list[str]:
    """How to read the tables, and what is missing."""
    s = report["setting"]
    products = "TF32" if s["tf32"] else "float32"
    told = [
        f"Medians of {s['runs']} calls, as a host drives them. {s['bits']} bits, groups of {s['group']}, "
        f"{'asymmetric' if s['asymmetric'] else 'symmetric'}, unless a method has grids of its own; weights and inputs "
        f"random, {s['dtype']}; products of the loops in {products}.",
        f"Hessian: of {s['tokens']} tokens, timed on {s['timed_tokens']} and multiplied. Whole call: the pass on one "
        "layer, factor in, Hessian not; rest: what it takes beyond the stages beside it (orders, copies, what has no "
        "column). Error: the layer's, relative, under the Hessian.",
        "Over Python: the loss over that of the same loops in Python, from the same tensors on the same device, on the "
        "smallest shape; equal: the share of codes (where weights are pruned, of kept or not) that are the same.",
    ]
    if report["block"]:
        told.append(
            "A block: four inputs, so four Hessians and factors, and seven loops; other tools make a Hessian and a "
            "factor for each layer. As a run calls it: layers of one input in one call, everything in, Hessians too."
        )
    if any(t["quoted"] for t in report["tools"]):
        from compress.bench.quantisers import quoted

        told.append(f"Quoted: {quoted()['source']}.")
    told += [f"Absent: {what}: {reason}." for what, reason in report["absent"].items()]
    return told + failures(report)


def _said(name: str, found: Row) -> str:
    return name + (", quoted, not this run" if found["quoted"] else "")


def _ms(took: float | None) -> str:
    return "-" if took is None else number(took) if took >= 1 else f"{took:.3f}"
