"""Our kernels beside the card's ceilings and other libraries, shape by shape: what `compress bench kernels` runs.

As reports of others are read, so this is made: graphs are replayed, weights go round copies that hold four times the
cache, the median counts, and nothing is timed that was not compared with the definition first.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.bench import ceilings, peers, record, timing
from compress.bench.cases import CASES
from compress.bench.checks import coarseness, difference, poisoned
from compress.bench.layers import Built, Case, Setting, Shape
from compress.bench.tune import Tuned, small, tune
from compress.bench.warm import Job, warm
from compress.bench.ways import chosen, forget
from compress.cuda import tuned
from compress.errors import CompressError

SHAPES: tuple[Shape, ...] = ((4096, 4096), (11008, 4096), (4096, 11008), (8192, 8192), (28672, 8192), (8192, 28672))
TOKENS = (1, 8, 16, 32, 64, 256, 2048)
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}

Told = Callable[[str], None]
Row = dict[str, Any]
Rivals = dict[str, tuple[peers.Peer, peers.Found]]


@dataclass(frozen=True)
class Plan:
    """What is measured: every combination of the first three.

    Attributes:
        kinds: of `CASES`.
        shapes: out_features, in_features.
        tokens: inputs.
        device: CUDA's index.
        dtype: "float16" or "bfloat16".
        group, asymmetric: of integer grids.
        others: other libraries too.
        tune: find the fastest launch shapes first, and save them for this user.
    """

    kinds: tuple[str, ...]
    shapes: tuple[Shape, ...] = SHAPES
    tokens: tuple[int, ...] = TOKENS
    device: int = 0
    dtype: str = "float16"
    group: int = 128
    asymmetric: bool = False
    others: bool = True
    tune: bool = False

    @property
    def setting(self) -> Setting:
        return Setting(f"cuda:{self.device}", _DTYPES[self.dtype], self.group, self.asymmetric)


def run(plan: Plan, told: Told) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        plan: what to measure.
        told: is called with a line before something that takes long.

    Raises:
        CompressError: tuning stopped the device.
    """
    with torch.cuda.device(plan.device), torch.no_grad():
        report = record.head(plan.device)
        told("ceilings: copying, reading, dense products")
        limits = ceilings.measure(plan.device)
        found = _tune(plan, told) if plan.tune else []
        _warm(plan, told)
        rows: list[Row] = []
        seen: dict[str, str] = {}
        for shape in plan.shapes:
            rivals = _rivals(plan, shape, told, seen)
            for kind in plan.kinds:
                told(f"{shape[0]}x{shape[1]}: {kind}")
                some = _measure(plan, CASES[kind], shape, limits, rivals)
                told("  ".join(f"{r['tokens']}: {r['failed'] or r['us']}" for r in some))
                rows += some
            if not _alive():  # a kernel read where it must not: nothing runs any more
                break
    rows.sort(key=lambda r: plan.kinds.index(r["kind"]))
    return report | {
        "kind": "kernels",
        "setting": {"dtype": plan.dtype, "group": plan.group, "asymmetric": plan.asymmetric},
        "ceilings": limits.as_json(),
        "cases": {kind: CASES[kind].what for kind in plan.kinds},
        "rows": _quoted(rows, report["machine"]["device"]),
        "absent": seen,
        "tuned": [t.as_json() for t in found],
        "failed": sum(bool(r["failed"]) for r in rows),
        "missing": len(plan.kinds) * len(plan.shapes) * len(plan.tokens) - len(rows),
    }


def _tune(plan: Plan, told: Told) -> list[Tuned]:
    """Find the fastest ways, and let the operators know them."""
    if plan.group != 128 or plan.asymmetric:
        remedy = "leave --group and --asymmetric away"
        raise CompressError("the table is for symmetric groups of 128", "--tune", remedy)
    card = torch.cuda.get_device_properties(plan.device)
    found: list[Tuned] = []
    for part in tune(plan.kinds, plan.shapes, plan.tokens, plan.setting, told):
        found += part
        entries = [t.entry for t in part]
        tuned.save(card.name, (card.major, card.minor), card.multi_processor_count, record.today(), entries)
    forget()
    told(f"saved {len(found)} launch shapes: {tuned.user_file(card.name)}")
    return found


def _warm(plan: Plan, told: Told) -> None:
    """Compile side by side what will run."""
    jobs = []
    for kind in plan.kinds:
        layer = small(kind, plan.setting)
        if layer is None:
            continue
        for shape in plan.shapes:
            for count in plan.tokens:
                jobs.append(Job(kind, plan.setting, count, chosen(layer, shape, count, plan.device)))
    told("compiling kernels")
    warm(jobs)


def _rivals(plan: Plan, shape: Shape, told: Told, seen: dict[str, str]) -> Rivals:
    """What other libraries take, by name and kind; `seen` gets the reasons of those that are absent."""
    out = {}
    for peer in peers.wanted(plan.kinds) if plan.others else ():
        told(f"{shape[0]}x{shape[1]}: {peer.name} ({', '.join(peer.kinds) or 'all kinds'})")
        found = peers.measure(peer, shape, plan.tokens, plan.setting)
        out[_title(peer)] = (peer, found)
        if peer.fewest > 1:
            seen[f"{_title(peer)}, below {peer.fewest} tokens"] = "it takes no fewer"
        for count, reason in found.why_not.items():
            where = "" if peer.absent() else f", {shape[0]}x{shape[1]}" + (f", {count} tokens" if count else "")
            seen[_title(peer) + where] = reason
    return out


def _title(peer: peers.Peer) -> str:
    return f"{peer.name} ({', '.join(peer.kinds)})" if peer.kinds else peer.name


def _measure(plan: Plan, case: Case, shape: Shape, limits: ceilings.Ceilings, rivals: Rivals) -> list[Row]:
    """A row for each number of tokens."""
    rows: list[Row] = [{"kind": case.name, "tokens": count, "failed": ""} for count in plan.tokens]
    for row in rows:
        row |= {"rows": shape[0], "columns": shape[1]}
    limit = case.limit * coarseness(plan.setting.dtype)
    try:
        built = case.build(shape, plan.setting)
        errors = _errors(built, plan, shape, limit, rows)
        subject, size, way = built.subject, built.size, built.way
        del built  # with what the reference holds
        others = timing.copies(size, plan.device) - 1
        subjects = [subject, *(copy.deepcopy(subject) for _ in range(others))]
    except (CompressError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        for row in rows:
            row["failed"] = row["failed"] or _reason(error)
        return rows
    for row in rows:
        count = row["tokens"]
        if row["failed"]:
            continue
        x = plan.setting.normal(count, shape[1])
        moved = size + x.nbytes + count * shape[0] * x.element_size()
        floor = limits.floor(moved, 2.0 * count * shape[0] * shape[1] * case.work, case.operand)
        try:
            us = timing.graph([partial(s.linear, x) for s in subjects])
        except (CompressError, RuntimeError) as error:
            row["failed"] = _reason(error)
            continue
        row |= {
            "us": round(us, 2), "gbps": round(moved / us / 1e3, 1), "bytes": moved, "floor_us": round(floor, 2),
            "of_floor": round(floor / us, 4), "way": way(count), "error": errors[count],
            "peers": _beside(case.name, count, us, rivals),
        }  # fmt: skip
    return rows


def _errors(built: Built, plan: Plan, shape: Shape, limit: float, rows: list[Row]) -> dict[int, float]:
    """Relative errors by the number of tokens; rows whose result is wrong are told so."""
    errors: dict[int, float] = {}
    reference = built.reference()
    for row in rows:
        x = plan.setting.normal(row["tokens"], shape[1])
        try:
            with poisoned():
                out = built.subject.linear(x)
            errors[row["tokens"]] = error = difference(out, reference(x))
        except (CompressError, RuntimeError) as raised:
            row["failed"] = _reason(raised)
            continue
        if not error <= limit:
            row |= {"failed": f"wrong result: relative error {error:.1e}", "way": built.way(row["tokens"])}
    return errors


def _beside(kind: str, tokens: int, us: float, rivals: Rivals) -> dict[str, dict[str, Any]]:
    """Other libraries' times, and how many times as long they take."""
    out = {}
    for peer, found in rivals.values():
        if (not peer.kinds or kind in peer.kinds) and tokens in found.us:
            theirs, error = found.us[tokens], found.error[tokens]
            out[peer.name] = {
                "us": round(theirs, 2), "ratio": round(theirs / us, 3), "error": error, "timing": peer.timing
            }  # fmt: skip
    return out


@functools.cache
def quoted() -> dict[str, Any]:
    """What others measured on one card: see quoted.json."""
    found: dict[str, Any] = json.loads(Path(__file__).with_name("quoted.json").read_text(encoding="utf-8"))
    return found


def _quoted(rows: list[Row], device: str) -> list[Row]:
    """The rows with what is quoted of libraries that this run did not time, if it ran on such a card."""
    if quoted()["device"] != device:
        return rows
    for row in rows:
        shape, count = f"{row['rows']}x{row['columns']}", str(row["tokens"])
        row["quoted"] = {
            peer["name"]: {"us": peer["us"][shape][count], "ratio": round(peer["us"][shape][count] / row["us"], 3)}
            for peer in quoted()["peers"]
            if peer["kind"] == row["kind"] and peer["name"] not in row.get("peers", {})
            if count in peer["us"].get(shape, {}) and "us" in row
        }
    return rows


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(str(error).split())[:300]


def _alive() -> bool:
    """Whether the device still answers: a kernel that reads where it must not ends all that follow."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
