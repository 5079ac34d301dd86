"""Folders and evaluation files -> Facts. Records say what was done; sizes and weights are read back from the files."""

from __future__ import annotations

import datetime
import math
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import Checkpoint, read_json
from compress.errors import CompressError
from compress.output import RECORD, TIMED
from compress.report.html import evaluations, originals, recipes, remarks, tensors
from compress.report.html.facts import Evaluation, Facts, Layer, Model
from compress.report.html.tensors import number
from compress.report.html.words import size
from compress.weights import Weights

_BLOCK = re.compile(r"\.(\d+)\.")


def gather(
    folders: Sequence[Path],
    evaluated: Sequence[Path] = (),
    against: Sequence[Path] = (),
    command: str = "",
    step: Callable[[int, int], None] = lambda done, total: None,
) -> Facts:
    """Everything that is known of these folders.

    Args:
        folders: finished outputs of compress.
        evaluated: JSON files of `compress eval`.
        against: folders of originals, where the records' own names do not lead to them.
        command: what was typed.
        step: called with (folders read, folders in all).

    Raises:
        CompressError: a folder that compress did not write, an unfinished one, a damaged file.
    """
    if not folders:
        raise CompressError("no folder to report on", "compress report", "pass folders that compress wrote")
    files = [evaluations.read(path) for path in evaluated]
    names = _names(folders)
    models = []
    for i, folder in enumerate(folders):
        step(i, len(folders))
        models.append(_model(folder, names[i], files, against))
    step(len(folders), len(folders))
    return Facts(
        models=tuple(models),
        evaluations=tuple(_evaluation(file) for file in files),
        notes=tuple(_notes(models, files)),
        command=command,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        machine=f"{platform.system()} {platform.machine()}",
        versions=_versions(),
    )


def read_run(folder: Path) -> tuple[dict[str, Any], str]:
    """The record of a run, and what is missing from it ("" for nothing). Raises CompressError."""
    partial = folder.name.endswith(".partial") or (folder / "fingerprint.json").is_file()
    if not partial and not folder.exists():
        partial = folder.with_name(folder.name + ".partial").is_dir()
    if partial:
        raise CompressError("the run is not finished", str(folder), "give its command again: it goes on and finishes")
    if not folder.is_dir():
        raise CompressError("no such folder", str(folder), "pass folders that compress wrote")
    timed, plain = folder / TIMED[0], folder / RECORD
    found: dict[str, Any] = {}
    for path in (plain, timed):
        if path.is_file():
            found |= read_json(path, "the file is damaged: compress again")
    if not found:
        what = f"holds neither {RECORD} nor {TIMED[0]}: compress did not write it"
        raise CompressError(what, str(folder), "pass folders that compress wrote")
    kinds = {"layers": list, "method": dict, "source": dict, "size": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
    if wrong or not all(isinstance(x, dict) and isinstance(x.get("name"), str) for x in found["layers"]):
        what = f"is not the record of a run ({', '.join(wrong) or 'layers'})"
        raise CompressError(what, str(timed if timed.is_file() else plain), "compress again")
    return found, "" if timed.is_file() else f"{TIMED[0]} is not in the folder, so seconds and memory are not known"


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: its own, with as much of its path as tells it from the others."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        twice = next(f for i, f in enumerate(folders) if places[i] in places[:i])
        raise CompressError("is given twice", str(twice), "name each folder once")
    for parts in range(1, max(len(p.parts) for p in places) + 1):
        names = ["/".join(p.parts[-parts:]) for p in places]
        if len(set(names)) == len(names):
            break
    return names


def _model(folder: Path, name: str, files: Sequence[evaluations.File], against: Sequence[Path]) -> Model:
    record, missing = read_run(folder)
    weights = Weights(Checkpoint.open(folder))
    entries = [evaluations.entry(file, folder, name) for file in files]
    steps = recipes.steps(record)
    layers = tuple(_layer(x, steps, weights) for x in record["layers"])
    for entry in entries:
        layers = _measured(layers, entry)
    source = str(record["source"].get("name") or "not recorded")
    found, unseen = originals.find(record, folder, weights, against)
    rescaled = bool(record.get("changed"))
    worst = sorted((x for x in layers if x.error is not None), key=lambda x: -(x.error or 0.0))[: tensors.WORST]
    sizes = record["size"]
    return Model(
        name=name,
        folder=str(folder),
        source=source,
        method=str(record["method"].get("name", "not recorded")),
        recipe=tuple(recipes.lines(record)),
        words=tuple(recipes.words(record, steps)),
        format=str(record.get("format", "not recorded")),
        device=str(record.get("device", "not recorded")),
        calibration=remarks.calibration(record),
        bytes=sum(t.nbytes for t in weights.checkpoint.tensors.values()),
        bytes_before=int(number(sizes.get("bytes_before")) or 0),
        parameters=int(number(sizes.get("total_parameters")) or 0),
        packed_parameters=sum(math.prod(x.shape) for x in layers),
        bits_per_weight=_bits(layers),
        layers=layers,
        scores=tuple(evaluations.scores(record, entries)),
        histograms=() if found is None else tuple(tensors.histogram(weights, found, x) for x in worst),
        unseen=unseen,
        rescaled=rescaled,
        outliers=tensors.outliers(weights, layers),
        seconds=_numbers(record.get("seconds")),
        beside=_numbers(record.get("seconds_beside")),
        host_bytes=_count(record.get("peak_host_bytes")),
        device_bytes=_count(record.get("peak_device_bytes")),
        room=record.get("room") or {},
        warnings=tuple(remarks.warnings(record, folder, weights, rescaled, missing)),
        checks=tuple(remarks.checks(record)),
        command=str(record.get("command") or ""),
        rebuilt=recipes.command(record, steps, folder),
        versions={"compress": str(record.get("compress", "")), **(record.get("versions") or {})},
        tasks=next((e.values["tasks"] for e in entries if e is not None and e.values.get("tasks")), {}),
    )


def _layer(record: Mapping[str, Any], steps: Sequence[recipes.Step], weights: Weights) -> Layer:
    """A layer's facts: shape and bytes from the file's headers, error and notes from the run."""
    name = str(record["name"])
    block, kind = place(name)
    shape = tuple(int(n) for n in record.get("shape") or weights.shapes_cache().get(name + ".weight", ()))
    stored = weights.stored_bytes(name) if name in weights.packed else int(number(record.get("bytes")) or 0)
    tokens = int(number(record.get("tokens")) or 0)
    method = str(record.get("method", ""))
    return Layer(
        name=name,
        block=block,
        kind=kind,
        method=method,
        shape=shape,
        bytes=stored,
        bits_per_weight=8.0 * stored / math.prod(shape) if shape else 0.0,
        error=number(record.get("relative_error")),
        measure=recipes.measure(method, tokens, steps),
        tokens=tokens,
        outliers=tensors.count(weights, name),
        notes=tuple(map(str, record.get("notes") or ())),
    )


def place(name: str) -> tuple[int | None, str]:
    """The decoder block of a layer, and its kind within it; numbers behind the first (experts) become *."""
    found = _BLOCK.search(name)
    if found is None:
        return None, name
    return int(found[1]), _BLOCK.sub(".*.", "." + name[found.end() :]).lstrip(".")


def _measured(layers: tuple[Layer, ...], entry: evaluations.Entry | None) -> tuple[Layer, ...]:
    """The layers with the errors that an evaluation measured, if it measured all of them."""
    if entry is None:
        return layers
    errors = {str(x.get("name")): number(x.get("error")) for x in entry.values.get("layers") or () if x}
    if not layers or any(errors.get(x.name) is None for x in layers):
        return layers
    return tuple(replace(x, error=errors[x.name], measure="evaluation") for x in layers)


def _bits(layers: Sequence[Layer]) -> float:
    weights = sum(math.prod(x.shape) for x in layers)
    return 8.0 * sum(x.bytes for x in layers) / weights if weights else 0.0


def _numbers(value: Any) -> dict[str, float]:
    """The numbers of a JSON object, in its order."""
    if not isinstance(value, Mapping):
        return {}
    found = {str(k): number(v) for k, v in value.items()}
    return {k: v for k, v in found.items() if v is not None}


def _count(value: Any) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _evaluation(file: evaluations.File) -> Evaluation:
    """What stands beside the models in a file of `compress eval`."""
    values = file.values
    return Evaluation(
        file=file.path.name,
        command=str(values.get("command") or ""),
        machine=_machine(values.get("machine")),
        date=str(values.get("date") or ""),
        seconds=_numbers(values.get("seconds")),
        versions={str(k): str(v) for k, v in (values.get("versions") or {}).items()},
        notes=tuple(map(str, values.get("notes") or ())),
    )


def _machine(value: Any) -> str:
    """A machine as compress.bench.record.machine tells it, in a line."""
    if not isinstance(value, Mapping):
        return str(value or "")
    cores, memory = number(value.get("cores")), number(value.get("host_memory"))
    parts = [str(value.get("device") or "")]
    parts.append("" if cores is None else f"{cores:.0f} cores")
    parts.append("" if memory is None else size(memory))
    return ", ".join(part for part in parts if part)


def _notes(models: Sequence[Model], files: Sequence[evaluations.File]) -> list[str]:
    """What is true of the comparison as a whole."""
    sources = list(dict.fromkeys(m.source for m in models))
    out = []
    if len(sources) > 1:
        out.append(f"these models come from {len(sources)} originals ({', '.join(sources)}): compare within one only")
    texts = {s.text + s.protocol for m in models for s in m.scores[:1]}
    if len(texts) > 1:
        out.append("the models were measured on different texts or by different protocols: see the table")
    for file in files:
        unused = [
            str(x.get("name")) for x in file.models if not any(evaluations.same(x, Path(m.folder)) for m in models)
        ]
        if unused:
            out.append(f"{file.path.name} also measures {', '.join(unused)}, of which no folder was given")
    return out


def _versions() -> dict[str, str]:
    """Of what makes this report."""
    from compress import __version__
    from compress.report.html.svg import library

    return {
        "compress": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matplotlib": library().__version__,
    }
