"""Every warning and fallback of a run, and everything that was verified, as lines."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.report.html.facts import Warning
from compress.report.html.tensors import number
from compress.weights import Weights

_SECTION = "## Notes of the run"
#: topics, the most telling first
ORDER = "record,size,not checked,fallback,layer,memory,resumed,export,run,calibration,left dense".split(",")
#: those that tell how a run went, not what went otherwise than asked
CALM = ("run", "calibration", "left dense", "evaluation")


def warnings(
    record: Mapping[str, Any], folder: Path, weights: Weights, rescaled: bool, missing: str
) -> Iterator[Warning]:
    """What a reader must know, most telling first.

    Args:
        rescaled: a transform changed tensors beside the layers.
        missing: what the folder lacks.
    """
    if missing:
        yield Warning("record", missing)
    yield from _size(record, weights)
    if record.get("verified") is None:
        yield Warning("not checked", "the result was not read back when it was written (--no-verify)")
    if record.get("evaluation") is None:
        yield Warning("not checked", "the run measured no perplexity and no KL divergence (--no-eval)")
    resumed = int(number(record.get("resumed_blocks")) or 0)
    if resumed:
        yield Warning(
            "resumed", f"{resumed} blocks were taken over from an earlier, stopped run: seconds leave them out"
        )
    late = int(number((record.get("room") or {}).get("blocks_without_room_ahead")) or 0)
    if late:
        yield Warning("memory", f"{late} blocks were not read ahead: there was no room for them")
    yield from _layers(record)
    told = {note for layer in record["layers"] for note in layer.get("notes") or ()}
    calibration = list((record.get("calibration") or {}).get("notes") or ())
    yield from (Warning("calibration", str(note)) for note in calibration)
    for note in _run_notes(record, folder):
        if note not in calibration and not any(note.endswith(x) for x in told):
            yield Warning("fallback" if "native format" in note else "run", note)
    if rescaled:
        count = len(record["changed"])
        yield Warning("run", f"a transform changed {count} tensors beside the layers: weights differ by its scales too")
    export = record.get("export")
    for loss, count in (export.get("losses") or {}).items() if isinstance(export, Mapping) else ():
        yield Warning("export", f"{loss} ({count} layers)")
    yield from _skipped(record)


def _size(record: Mapping[str, Any], weights: Weights) -> Iterator[Warning]:
    """Whether the files are as large as the run said."""
    stored = sum(t.nbytes for t in weights.checkpoint.tensors.values())
    told = int(number(record["size"].get("bytes_after")) or 0)
    if told and stored != told:
        yield Warning(
            "size", f"the files hold {stored:,} bytes of tensors, the run recorded {told:,}; shown is the former"
        )


def _layers(record: Mapping[str, Any]) -> Iterator[Warning]:
    """Notes of layers, each distinct one once, numbers in it aside."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for layer in record["layers"]:
        for note in layer.get("notes") or ():
            lines.setdefault(re.sub(r"\d[\d.,e+-]*", "#", str(note)), []).append((str(note), str(layer["name"])))
    for found in lines.values():
        names = tuple(f"{name}: {note}" if note != found[0][0] else name for note, name in found)
        more = f", and alike in {len(found) - 1} more layers" if len(found) > 1 else f" ({found[0][1]})"
        yield Warning("layer", found[0][0] + more, names if len(found) > 1 else (found[0][1],))


def _skipped(record: Mapping[str, Any]) -> Iterator[Warning]:
    """Linear layers that were left as they are, by reason."""
    reasons: dict[str, list[Mapping[str, Any]]] = {}
    for entry in record.get("skipped") or ():
        reasons.setdefault(str(entry.get("reason", "no reason recorded")), []).append(entry)
    for reason, entries in reasons.items():
        weights = sum(int(number(x.get("weights")) or 0) for x in entries)
        what = "1 matrix" if len(entries) == 1 else f"{len(entries)} matrices"
        text = f"{what} ({weights:,} weights) left as before: {reason}"
        yield Warning("left dense", text, tuple(str(x.get("name", "")) for x in entries))


def _run_notes(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Notes of the run: of the record where it holds them, else those of the model card that the run wrote."""
    told = record.get("notes")
    if isinstance(told, list):
        return [str(note) for note in told]
    card = folder / "README.md"
    if not card.is_file():
        return []
    text = card.read_text(encoding="utf-8", errors="replace").partition(_SECTION)[2].partition("\n## ")[0]
    return [line[2:].replace("&lt;", "<") for line in text.splitlines() if line.startswith("- ")]


def checks(record: Mapping[str, Any]) -> Iterator[str]:
    """What was verified when the folder was written."""
    proof = record.get("verified")
    if not isinstance(proof, Mapping):
        return
    if proof.get("layers"):
        yield f"{proof['layers']} layers, read back from the files, dequantise to the solver's weights to the last bit"
    if proof.get("copied"):
        yield f"{proof['copied']} tensors beside them were copied byte for byte"
    if proof.get("parameters"):
        yield f"all {proof['parameters']} parameters of the model are filled"
    yield from (str(line) for line in proof.get("clients") or ())


def calibration(record: Mapping[str, Any]) -> str:
    """Which rows of which text; "" for none."""
    rows = record.get("calibration")
    if not isinstance(rows, Mapping):
        return ""
    told = f"{rows.get('samples')} rows of {rows.get('seq_len')} tokens from {rows.get('source')}"
    return f"{told}, seed {record.get('seed')}, sha256 {str(rows.get('sha256', 'not recorded'))[:16]}"
