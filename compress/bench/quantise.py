"""How long it takes to compress a whole model, from a folder to a verified folder: `compress bench quantise`.

The model has random weights in a published shape, or its first blocks: what only some blocks took is carried on to all
of them, and is called that. Each run is a process of its own.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress import grid
from compress.bench import models, once, record
from compress.bench.models import MODELS, Sizes
from compress.bench.once import FREE, METHODS, Request
from compress.bench.quantisers import TOOLS
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.plan import check_room

#: (model, method, with low memory) -> what was set out for an H100: figure of a row -> the most that it may be
GOALS: dict[tuple[str, str, bool], dict[str, float]] = {
    ("llama-2-7b", "gptq-fast", False): {"seconds": 45.0, "peak_device_bytes": 24 * 2.0**30},
    ("llama-2-7b", "gptq", False): {"seconds": 60.0, "peak_device_bytes": 24 * 2.0**30, "times_tool": 0.25},
    ("llama-2-7b", "gptq-best", False): {"refine_block_seconds": 5.0},
    ("llama-2-7b", "gptq", True): {"peak_device_bytes": 10 * 2.0**30, "times_default": 1.5},
    ("llama-3-70b", "gptq", False): {"seconds_all": 720.0, "peak_device_bytes": 40 * 2.0**30},
    ("smollm2-135m", "gptq", False): {"seconds": 10.0, "solve_seconds": 3.0},
    **{("llama-2-7b", method, False): {"times_copy": 1.5} for method in FREE},
}
#: figures that say as much of some blocks as of all
ANY_BLOCKS = "seconds_all", "peak_device_bytes", "times_tool", "refine_block_seconds"
_CHUNK = 1 << 26  # bytes written at once

Told = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: every method on the model with each number of blocks.

    Attributes:
        model: of `MODELS`.
        blocks: how many of its blocks; none: all.
        methods: of `METHODS`.
        device: CUDA's index; None: the CPU.
        bits, group: of integer grids; group None: the largest of 128, 64 and 32 that fits.
        samples, seq_len: calibration rows.
        low_memory: what calibrates runs once more with low memory.
        cold: files are not in the system's cache when a run begins.
        peers: other tools too.
        work: folder for the model and results; None: the system's for temporary files.
    """

    model: str = "llama-2-7b"
    blocks: tuple[int, ...] = ()
    methods: tuple[str, ...] = tuple(METHODS)
    device: int | None = 0
    bits: int = 4
    group: int | None = None
    samples: int = 128
    seq_len: int = 2048
    low_memory: bool = False
    cold: bool = False
    peers: bool = False
    work: Path | None = None

    @property
    def place(self) -> str:
        return "cpu" if self.device is None else f"cuda:{self.device}"

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks of each model that is written."""
        return tuple(dict.fromkeys(MODELS[self.model].cut(n).blocks for n in self.blocks or (1 << 20,)))

    def runs(self) -> list[tuple[str, bool]]:
        """Method or tool, and whether with low memory."""
        found = [(method, low) for method in self.methods for low in (False, True)]
        tools = [(tool.name, False) for tool in TOOLS if self.peers and not tool.absent()]
        return [(m, low) for m, low in found if not low or (self.low_memory and m not in FREE)] + tools


def run(plan: Plan, told: Told) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        plan: what to measure.
        told: is called with a line before something that takes long.

    Raises:
        CompressError: the disk has no room, or a setting cannot be had.
    """
    sizes = MODELS[plan.model]
    if plan.seq_len > sizes.context:
        what = f"{plan.seq_len} tokens a row, {plan.model}'s context is {sizes.context}"
        raise CompressError(what, "--seq-len", f"use {sizes.context} or less")
    if plan.cold and sys.platform != "linux":
        raise CompressError("only Linux forgets files when it is asked to", "--cold", "leave it out")
    report = record.head(plan.device)
    rows: list[Row] = []
    wanted = [sizes.cut(count) for count in plan.counts]
    place = Path(tempfile.gettempdir()) if plan.work is None else plan.work
    check_room(place / "any", 9 * max(cut.nbytes for cut in wanted) // 4)  # the model, a journal, a result of 8 bits
    place.mkdir(parents=True, exist_ok=True)
    for cut in wanted:
        with tempfile.TemporaryDirectory(prefix="compress-bench-", dir=place) as folder:
            told(f"{plan.model}, {cut.blocks} blocks: writing {cut.nbytes / 1e9:.2f} GB of random weights")
            begun = time.perf_counter()
            source = Path(folder) / "model"
            size = models.write(source, cut, torch.device(plan.place))
            if plan.device is not None:
                torch.cuda.empty_cache()
            told(f"written in {time.perf_counter() - begun:.1f} s")
            rows += _model(plan, cut, source, size, told)
    compare(rows, sizes.blocks)
    return report | {
        "kind": "quantise",
        "model": {"name": plan.model, **vars(sizes), "parameters": sizes.parameters},
        "setting": {
            "bits": plan.bits, "group": _group(plan, sizes), "samples": plan.samples, "seq_len": plan.seq_len,
            "cold": plan.cold,
        },
        "rows": rows,
        "absent": {tool.name: tool.absent() for tool in TOOLS if plan.peers and tool.absent()},
        "goals": goals(plan.model, rows),
        "failed": sum(bool(r["failed"]) for r in rows),
        "missing": 0,
    }  # fmt: skip


def _group(plan: Plan, sizes: Sizes) -> int:
    return grid.settle_group_size(plan.group, (sizes.hidden, sizes.intermediate))


def _model(plan: Plan, sizes: Sizes, source: Path, size: int, told: Told) -> list[Row]:
    """A row for each run on one model."""
    rows = []
    for method, low in plan.runs():
        told(f"{sizes.blocks} blocks: {method}{', low memory' if low else ''}")
        out = source.with_name("out")
        request = Request(
            str(source), str(out), method, plan.bits, _group(plan, sizes), plan.samples, plan.seq_len,
            sizes.vocabulary, plan.place, low,
        )  # fmt: skip
        if plan.cold:
            _forget(source)
        row: Row = {"method": method, "low_memory": low, "blocks": sizes.blocks, "bytes_in": size}
        row |= once.apart(request, source.with_name("answer.json"))
        for left in (out, out.with_name("out.partial")):
            shutil.rmtree(left, ignore_errors=True)
        source.with_name("answer.json").unlink(missing_ok=True)
        if not row["failed"]:
            _beyond(plan, row, source)
        rows.append(row)
        told(row["failed"] or f"{row['seconds']:.1f} s: {_shares(row.get('phases', {}))}")
    return rows


def _shares(phases: dict[str, float]) -> str:
    """ "solve 12.1, forward 8.3", the longest first."""
    return ", ".join(f"{part} {took:.1f}" for part, took in sorted(phases.items(), key=lambda x: -x[1]) if took >= 0.05)


def _beyond(plan: Plan, row: Row, source: Path) -> None:
    """What is worked out of a run: the solver's time, and for methods without calibration the least time."""
    phases = row.get("phases", {})
    row["solve_seconds"] = phases.get("solve", 0.0)
    if "refine" in phases:
        row["refine_block_seconds"] = round(phases["refine"] / row["blocks"], 3)
    if row["method"] in FREE:
        if plan.cold:
            _forget(source)
        took = {"read_seconds": reading(source), "write_seconds": writing(source.with_name("copy"), row["bytes_out"])}
        row |= {name: round(seconds, 3) for name, seconds in took.items()}
        row["times_copy"] = round(row["seconds"] / max(sum(took.values()), 1e-9), 3)


def reading(source: Path) -> float:
    """Seconds in which a thread reads every tensor of a folder once."""
    begun = time.perf_counter()
    checkpoint = Checkpoint.open(source)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return time.perf_counter() - begun


def writing(path: Path, size: int) -> float:
    """Seconds in which a thread writes so many bytes to the disk, in a file that is then removed."""
    chunk = memoryview(os.urandom(min(_CHUNK, size)))
    begun = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, _CHUNK):
            file.write(chunk[: size - start])
        os.fsync(file.fileno())
    took = time.perf_counter() - begun
    path.unlink()
    return took


def _forget(folder: Path) -> None:
    """Let the system drop a folder's files from its cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(rows: Sequence[Row], blocks: int) -> None:
    """Work out seconds a block, carry rows of some blocks on to all of them, and set runs beside each other.

    With two numbers of blocks or more, by the line through the least and the most: what grows with blocks, and what
    does not. With one, its seconds a block times all blocks: what does not grow is counted too, so that is too long.
    """
    good = [r for r in rows if not r["failed"]]
    for row in good:
        same = sorted((r for r in good if _name(r) == _name(row)), key=lambda r: int(r["blocks"]))
        few, many = same[0], same[-1]
        if few is many:
            each = row["seconds"] / row["blocks"]
        else:
            each = (many["seconds"] - few["seconds"]) / (many["blocks"] - few["blocks"])
        row["seconds_a_block"] = round(each, 4)
        if row is many and row["blocks"] < blocks:
            row["seconds_all"] = round(row["seconds"] + each * (blocks - row["blocks"]), 1)
            row["carried_on"] = [r["blocks"] for r in same]
        beside = {_name(r): r["seconds"] for r in good if r["blocks"] == row["blocks"]}
        if row["low_memory"] and (row["method"], False) in beside:
            row["times_default"] = round(row["seconds"] / beside[row["method"], False], 3)
        tools = [seconds for (name, _), seconds in beside.items() if name not in METHODS]
        if tools and row["method"] in METHODS and row["method"] not in FREE:
            row["times_tool"] = round(row["seconds"] / max(min(tools), 1e-3), 4)


def _name(row: Row) -> tuple[str, bool]:
    return row["method"], row["low_memory"]


def goals(model: str, rows: Sequence[Row]) -> list[Row]:
    """What was set out, beside what came: of whole models, of memory, and of what was carried on."""
    found = []
    for row in rows:
        whole = row["blocks"] == MODELS[model].blocks
        for figure, most in GOALS.get((model, row["method"], row["low_memory"]), {}).items():
            if figure in row and (whole or figure in ANY_BLOCKS):
                name = row["method"] + (", low memory" if row["low_memory"] else "") + f", {row['blocks']} blocks"
                met = row[figure] <= most
                found.append({"what": name, "figure": figure, "goal": most, "measured": row[figure], "met": met})
    return found
