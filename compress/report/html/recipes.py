"""What was asked of a run: its steps, in words, as a recipe, and as a command that does it again."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.recipe import KEEP, build
from compress.report.html.tensors import number
from compress.types import Pass, Transform, defaults

_WHERE = ("layers", "exclude", "blocks")


@dataclass(frozen=True)
class Step:
    """One step as recorded. method: None for `keep`, and where this version cannot make it from its settings."""

    name: str
    settings: dict[str, Any]
    where: dict[str, Any]
    method: Pass | Transform | None


def steps(record: Mapping[str, Any]) -> list[Step]:
    """The steps of a run."""
    method = record["method"]
    listed = method.get("steps")
    found = []
    for values in listed if isinstance(listed, list) else [method]:
        mine = dict(values)
        name = str(mine.pop("name", ""))
        where = {k: mine.pop(k) for k in _WHERE if k in mine}
        found.append(Step(name, mine, where, _made(name, mine)))
    return found


def _made(name: str, settings: Mapping[str, Any]) -> Pass | Transform | None:
    if name == KEEP:
        return None
    finite = {k: float(v) if v in ("inf", "-inf") else v for k, v in settings.items()}
    try:
        return build(name, finite)
    except CompressError:  # a method of another package, or settings of another version
        return None


def measure(method: str, tokens: int, found: Sequence[Step]) -> str:
    """How the error of a layer was measured (a key of MEASURES): a solver that has a Hessian measures with it."""
    mine = [s.method for s in found if s.name == method.rpartition("+")[2]]
    if not mine or any(m is None for m in mine):
        return "unknown"
    if tokens and any(m is not None and m.needs.hessian for m in mine):
        return "output"
    others = any(s.method is not None and s.method.needs.hessian for s in found)
    return "unknown" if tokens and others else "weight"


def lines(record: Mapping[str, Any]) -> list[str]:
    """One line a step: its name and settings."""
    found = [
        f"{s.name}: " + " ".join(f"{k}={_plain(v)}" for k, v in {**s.settings, **s.where}.items())
        for s in steps(record)
    ]
    order = "sequential within a block" if record.get("true_sequential") else "a block at a time"
    return [*found, f"format {record.get('format', 'not recorded')}, seed {record.get('seed')}, statistics {order}"]


def words(record: Mapping[str, Any], found: Sequence[Step]) -> list[str]:
    """What each method did, in the words of its paper."""
    out: list[str] = []
    for step in found:
        if step.method is None or isinstance(step.method, Transform):
            continue
        mine = [x for x in record["layers"] if step.name in str(x.get("method", "")).split("+")]
        twins = sum(s.name == step.name for s in found) > 1  # which of them took a layer is not recorded
        try:
            out += step.method.words(mine) if mine and not twins else []
        except (KeyError, TypeError, ValueError, ZeroDivisionError):  # figures that another version did not record
            continue
    return out


def command(record: Mapping[str, Any], found: Sequence[Step], folder: Path) -> str:
    """A command with the settings of the record, only those that are not defaults.

    Of a recipe with several steps: the recipe's file in front of it.
    """
    source = str(record["source"].get("name") or "MODEL")
    tail = [*_options(record), "-o", folder.name]
    if len(found) == 1 and not found[0].where:
        return shlex.join(["compress", found[0].name, source, *_flags(found[0]), *tail])
    name = f"{record['method'].get('name', 'recipe')}.yaml"
    body = ["steps:"]
    for step in found:
        given = ", ".join(f"{k}: {_yaml(v)}" for k, v in {**_changed(step), **step.where}.items())
        body.append(f"  - {step.name}: {{{given}}}")
    text = "\n".join(f"# {name}: {line}" if line == body[0] else f"#   {line}" for line in body)
    return f"{text}\n{shlex.join(['compress', 'run', name, source, *tail])}"


def _changed(step: Step) -> dict[str, Any]:
    """The settings that are not at their defaults, and the bits in any case."""
    if step.method is None:
        return {k: v for k, v in step.settings.items() if v is not None}
    plain = defaults(step.method)
    return {k: v for k, v in step.settings.items() if v is not None and (k == "bits" or v != plain.get(k))}


def _flags(step: Step) -> list[str]:
    """Its settings as the command line takes them (cli.py makes the options from the same fields)."""
    metadata = {} if step.method is None else {f.name: f.metadata for f in dataclasses.fields(step.method)}  # type: ignore[arg-type]
    out: list[str] = []
    for key, value in _changed(step).items():
        flag = "--" + key.replace("_", "-")
        meta: Mapping[str, Any] = metadata.get(key) or {}
        flag = next((f for f in meta.get("flags") or () if f.startswith("--")), flag)
        if value is False:
            out.append(f"--{meta.get('off') or 'no-' + flag[2:]}")
        else:
            out += [flag] if value is True else [flag, _plain(value)]
    return out


def _options(record: Mapping[str, Any]) -> list[str]:
    """Calibration, evaluation, format, seed, device."""
    out: list[str] = []
    rows = record.get("calibration")
    if isinstance(rows, Mapping):
        out += ["--calib", _short(str(rows.get("source", "")))]
        for key in ("samples", "seq_len"):
            value = number(rows.get(key))
            out += [f"--{key.replace('_', '-')}", f"{value:.0f}"] if value else []
    text = record.get("evaluation")
    out += ["--eval", _short(str(text.get("text", "")))] if isinstance(text, Mapping) else ["--no-eval"]
    if record.get("format"):
        out += ["--format", str(record["format"])]
    out += ["--seed", str(record["seed"])] if record.get("seed") else []
    out += ["--true-sequential"] if record.get("true_sequential") else []
    return out


def _short(source: str) -> str:
    """A text's name as --calib takes it: "bundled" of "bundled (text/calibration.txt)"."""
    return source.partition(" (")[0].partition(" @ ")[0] or "TEXT"


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _yaml(value: Any) -> str:
    """A setting in a flow mapping: numbers as they are, text quoted where YAML would read something else."""
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else str(value)
