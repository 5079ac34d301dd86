"""One run -> compress.json (the record), report.json (with clock times), README.md (the model card)."""

from __future__ import annotations

import dataclasses
import math
import platform
import re
import resource
import shlex
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.formats import OWN, holders
from compress.output import seal
from compress.recipe import chained
from compress.report import card
from compress.writer import write_json, write_text

if TYPE_CHECKING:
    from jinja2 import Template

    from compress.evaluate.perplexity import Score
    from compress.job import Result


def finish(result: Result, folder: Path, hashes: Mapping[str, str]) -> None:
    """Write the records of a run into its output folder; the sha256 list comes last.

    Args:
        hashes: sha256 of the weight files as they were written, by name.
    """
    record = make_record(result)
    gguf = next((f.name for f in sorted(folder.glob("*.gguf"))), None)
    write_text(folder / "README.md", model_card(result, record, gguf))
    write_json(folder / "report.json", {**record, **timings(result)})
    seal(folder, record, hashes)


def make_record(result: Result) -> dict[str, Any]:
    """Everything about a run that is the same each time it is made: no clock, no folder names."""
    import safetensors
    import transformers

    from compress import __version__

    job, plan = result.job, result.plan
    rows, text = job.rows, job.text
    return {
        "compress": __version__,
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
        "source": {"name": job.origin},
        "method": plan.recipe.as_json(),
        "format": plan.format.name,
        "true_sequential": job.true_sequential,
        "device": device_name(job.device),
        "seed": job.seed,
        "calibration": None
        if rows is None
        else {
            "source": card.text_name(rows.source),
            "samples": rows.tokens.shape[0],
            "seq_len": rows.tokens.shape[1],
            "sha256": rows.sha256,
            "notes": list(rows.notes),
        },
        "size": {
            "bytes_before": plan.bytes_before,
            "bytes_after": bytes_after(result),
            "bits_per_weight": stored_bits(result),
            "packed_parameters": plan.packed_weights,
            "total_parameters": plan.total_weights,
        },
        "skipped": [dataclasses.asdict(s) for s in plan.skipped],
        "evaluation": None
        if text is None or result.score is None or result.original is None
        else {
            "text": card.text_name(text.source),
            "protocol": card.protocol(text),
            "bos": text.bos,
            "dtype": str(result.dtype).removeprefix("torch."),
            "compressed": score_values(result.score),
            "original": score_values(result.original),
        },
        "verified": None if result.proof is None else dataclasses.asdict(result.proof),
        "changed": sorted(result.changed),
        "layers": result.records,
    }


def stored_bits(result: Result) -> float:
    """Bits a compressed weight, counted from the bytes that were stored."""
    stored: int = sum(r["bytes"] for r in result.records)
    return 8.0 * stored / result.plan.packed_weights


def bytes_after(result: Result) -> int:
    """Weight bytes of the output: what the plan expected, with the sizes that the layers really took."""
    plan = result.plan
    expected = round(plan.bits_per_weight * plan.packed_weights / 8)
    return int(plan.bytes_after - expected + sum(r["bytes"] for r in result.records))


def words(result: Result) -> list[str]:
    """What each method did, in the words of its paper."""
    out = []
    for method in result.plan.recipe.passes:
        mine = [r for r in result.records if any(p is method for p in result.plan.choice[r["name"]])]
        out += method.words(mine) if mine else []
    refiner = result.plan.recipe.refiner
    out += [] if refiner is None else refiner.words(result.records)
    shares = [r["figures"]["past"] for r in result.records if "past" in r["figures"]]
    if shares:
        made = sum(shares) / len(shares)
        out.append(f"aimed at the original model's activations: held-out rows bore out {made:.0%} of the correction")
    return out


def score_values(score: Score) -> dict[str, Any]:
    """A score as JSON values; an infinite perplexity, which JSON cannot hold, becomes null."""
    return {k: v if isinstance(v, int) or v is None or math.isfinite(v) else None for k, v in vars(score).items()}


def timings(result: Result) -> dict[str, Any]:
    """What is of this one run: how it was called, what it said, its seconds and memory."""
    typed = Path(sys.argv[0]).stem == "compress"  # else a program of somebody's called the API
    return {
        "command": shlex.join(["compress", *_told(sys.argv[1:])]) if typed else None,
        "notes": notes(result),
        "seconds": {**result.seconds, "total": sum(result.seconds.values())},
        "seconds_beside": result.beside,
        "room": result.room,
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": peak_device_bytes(result.job.device),
        "resumed_blocks": result.resumed,
    }


def _told(words: Sequence[str]) -> list[str]:
    """A command line without the place that its result is sent to: that is nobody's business."""
    found: list[str] = []
    for before, word in zip(("", *words), words, strict=False):
        if not (word.startswith("--push-") or before == "--push-to"):
            found.append(word)
    return found


def peak_host_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def peak_device_bytes(device: torch.device) -> int:
    """Peak allocated device memory; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def notes(result: Result) -> list[str]:
    """What a reader must know: calibration notes, and each distinct note with the number of layers it is true of."""
    out = [] if result.job.rows is None else list(result.job.rows.notes)
    out += merged(result.notes)
    out += _native_note(result)
    damaged = card.source_card(result.job.source)[1]
    out += [] if damaged is None else [damaged]
    count: dict[str, list[str]] = {}
    for record in result.records:
        for note in record["notes"]:
            count.setdefault(note, []).append(record["name"])
    for note, names in count.items():
        more = f" and {len(names) - 1} more layers" if len(names) > 1 else ""
        out.append(f"{names[0]}{more}: {note}")
    return out


def merged(lines: Sequence[str]) -> list[str]:
    """Notes that say the same of the same layer in several blocks, as one line each, with how many."""
    count: dict[str, int] = {}
    first: dict[str, str] = {}
    for line in lines:
        pattern = re.sub(r"\.\d+\.", ".*.", line)
        count[pattern] = count.get(pattern, 0) + 1
        first.setdefault(pattern, line)
    return [first[p] if n == 1 else f"{p} ({n} blocks)" for p, n in count.items()]


def _native_note(result: Result) -> list[str]:
    """Why the result is in our own format, where another was not asked for and cannot hold it."""
    if result.plan.format.name != OWN:
        return []
    for passes in result.plan.choice.values():
        storage = chained(passes)
        if holders(storage) == [OWN]:
            return [f"written in the native format: no client's format holds the kind {storage.kind!r} as it is stored"]
    found = {chained(passes) for passes in result.plan.choice.values()}
    if not set.intersection(*(set(holders(storage)) - {OWN} for storage in found)):
        kinds = ", ".join(sorted({repr(storage.kind) for storage in found}))
        return [f"written in the native format: no client's format holds layers of the kinds {kinds} beside each other"]
    if result.job.format != OWN:
        return [f"written in the native format: the shapes of some layers do not fit {result.job.format}"]
    return []


@cache
def _card_template() -> Template:
    """card.md.j2. Compiling it takes longer than filling it in; a sweep writes many cards."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["line"] = card.one_line
    return environment.get_template("card.md.j2")


def model_card(result: Result, record: dict[str, Any], gguf_file: str | None = None) -> str:
    """README.md of the output folder.

    Args:
        gguf_file: the weights' file name where the format is GGUF.
    """
    job, plan = result.job, result.plan
    name = job.push_to or card.one_line(job.out.name)
    return _card_template().render(
        metadata=card.metadata(result, name),
        title=name,
        source=job.origin,
        method=plan.recipe.name,
        layers=plan.layers,
        bits_per_weight=stored_bits(result),
        packed=plan.packed_weights,
        total=plan.total_weights,
        bytes_before=plan.bytes_before,
        bytes_after=bytes_after(result),
        score=result.score,
        original=result.original,
        eval=record["evaluation"],
        dtype=str(result.dtype).removeprefix("torch."),
        recipe=[*plan.recipe.lines(), f"format={plan.format.name} true_sequential={job.true_sequential}"],
        words=words(result),
        calibration=record["calibration"],
        seed=job.seed,
        versions=", ".join(f"{k} {v}" for k, v in {"compress": record["compress"], **record["versions"]}.items()),
        notes=notes(result),
        load=card.load_snippet(plan.format.name, job.push_to or job.out.name, gguf_file),
    )
