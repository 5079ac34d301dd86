"""A block of Llama-2-7B out of what its layers take, and the goals that were set for it."""

from __future__ import annotations

from typing import Any

from compress.bench.stages import Shape

Row = dict[str, Any]

#: shape -> layers of a Llama-2-7B block, and inputs that these have: q, k, v share one, gate and up another
BLOCK: dict[Shape, tuple[int, int]] = {(4096, 4096): (4, 2), (11008, 4096): (2, 1), (4096, 11008): (1, 1)}
#: its layers as they are solved: q, k, v in one call, o, gate and up in one, down
CALLS: tuple[Shape, ...] = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))
#: what was set out for one H100
GOALS = {"layers": 300.0, "search": 300.0, "block_us": 17.0, "times_peer": 8.0}


def block(rows: list[Row], tools: list[Row], calls: dict[str, list[Row]]) -> dict[str, Any]:
    """Milliseconds of the seven layers: by method of each stage, and of the calls that a run makes of them; by tool,
    each layer with a Hessian of its own. Only of what ran on all shapes."""
    ours = {}
    for name in dict.fromkeys(r["method"] for r in rows):
        mine = {(r["rows"], r["columns"]): r["ms"] for r in rows if r["method"] == name and not r["failed"]}
        if set(BLOCK) <= set(mine):
            found = {
                stage: round(sum(mine[s][stage] * BLOCK[s][stage in ("hessian", "factor")] for s in BLOCK), 3)
                for stage in mine[next(iter(BLOCK))]
                if stage != "whole"
            }
            if calls.get(name):
                found["calls"] = round(sum(c["ms"] + c["hessian_ms"] for c in calls[name]), 3)
            ours[name] = found
    theirs = {}
    for name in dict.fromkeys(r["tool"] for r in tools):
        timed = {(r["rows"], r["columns"]): r for r in tools if r["tool"] == name}
        if set(BLOCK) <= set(timed):
            theirs[name] = {
                "hessian": round(sum(timed[s]["hessian_ms"] * BLOCK[s][0] for s in BLOCK), 3),
                "solve": round(sum(timed[s]["solve_ms"] * BLOCK[s][0] for s in BLOCK), 3),
                "quoted": any(timed[s]["quoted"] for s in BLOCK),
            }
    return {"ours": ours, "tools": theirs, "calls": calls}


def goals(rows: list[Row], sums: dict[str, Any]) -> list[Row]:
    """What was set out, beside what came; only what this run measured."""
    found = []
    ours = sums.get("ours", {})
    if "gptq" in ours:
        layers = sum(ours["gptq"][stage] for stage in ("hessian", "factor", "loop"))
        found.append(_goal("7 layers: Hessian + factor + loop", GOALS["layers"], layers, "ms"))
        others = {name: t["hessian"] + t["solve"] for name, t in sums["tools"].items()}
        if others:
            fastest = min(others, key=lambda name: others[name])
            told = f"the same beside {fastest}{', quoted' if sums['tools'][fastest]['quoted'] else ''}"
            found.append(_goal(told, GOALS["times_peer"], others[fastest] / layers, "times", least=True))
    if "gptq-search" in ours:
        extra = sum(ours["gptq-search"][stage] for stage in ("grid", "refit", "descent"))
        found.append(_goal("7 layers: scale search + refit + descent", GOALS["search"], extra, "ms"))
    for row in rows:
        if (row["method"], row["rows"]) == ("gptq", 4096) and "block_us" in row:
            told = f"128 columns of {row['rows']}x{row['columns']}"
            found.append(_goal(told, GOALS["block_us"], row["block_us"], "µs"))
    return found


def _goal(what: str, goal: float, measured: float, unit: str, least: bool = False) -> Row:
    met = measured >= goal if least else measured <= goal
    return {"what": what, "goal": goal, "least": least, "measured": round(measured, 3), "unit": unit, "met": met}
