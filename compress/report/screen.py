"""What a person sees: the plan, one progress line, one table, the next command. The only file that imports rich."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from compress.formats import FORMATS
from compress.report import (
    bytes_after,
    make_record,
    notes,
    peak_device_bytes,
    peak_host_bytes,
    stored_bits,
    timings,
    words,
)

if TYPE_CHECKING:
    from compress.job import Job, Result, Status
    from compress.job import Progress as Report
    from compress.verify import Proof

_MB = 1e6


@contextmanager
def progress_line(hidden: bool) -> Iterator[Report]:
    """One line on stderr: phase, block i of n, layers done, time left, peak memory."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}"),
        console=Console(stderr=True),
        disable=hidden,
        transient=True,
    )
    with bar:
        task = bar.add_task("load", total=None, memory="")
        phase = ""

        def report(status: Status) -> None:
            nonlocal phase
            if status.phase != phase:
                bar.reset(task, total=status.total)
                phase = status.phase
            layers = f" · layers {status.layers}/{status.all_layers}" if status.all_layers else ""
            bar.update(
                task,
                completed=status.done,
                description=f"{status.phase}: block {status.done}/{status.total}{layers}",
                memory=f"peak {_peak_text()}",
            )

        yield report


def _peak_text() -> str:
    import torch

    host = f"{peak_host_bytes() / 1e9:.2f} GB host"
    if not torch.cuda.is_available():
        return host
    return f"{host}, {peak_device_bytes(torch.device('cuda')) / 1e9:.2f} GB device"


def dry_run(job: Job) -> dict[str, Any]:
    """The plan of a job as plain values; no weight is loaded, nothing is written."""
    from compress.pipeline import make_plan, open_model

    _, model = open_model(job)
    plan = make_plan(job, model)
    return {
        "source": job.origin,
        "method": plan.recipe.as_json(),
        "steps": [
            {"step": line, "layers": count} for line, count in zip(plan.recipe.lines(), plan.taken(), strict=True)
        ],
        "format": plan.format.name,
        "blocks": len(plan.blocks),
        "layers": plan.layers,
        "packed_parameters": plan.packed_weights,
        "total_parameters": plan.total_weights,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "device_bytes_estimate": plan.device_bytes,
        "skipped": [dataclasses.asdict(s) for s in plan.skipped],
    }


def print_plan(plan: dict[str, Any]) -> None:
    """The plan as a table."""
    table = Table(title=f"plan for {plan['source']} (nothing was written)", show_header=False)
    share = 100 * plan["packed_parameters"] / plan["total_parameters"]
    rows = [
        *((f"step {i + 1}", f"{s['step']} ({s['layers']} layers)") for i, s in enumerate(plan["steps"])),
        ("format", plan["format"]),
        ("compressed", f"{plan['layers']} matrices in {plan['blocks']} blocks, {share:.1f}% of the parameters"),
        ("weights on disk", f"{plan['bytes_before'] / _MB:.1f} MB -> {plan['bytes_after'] / _MB:.1f} MB"),
        ("bits per weight", f"{plan['bits_per_weight']:.3f}"),
        ("peak on the device, without activations", f"about {plan['device_bytes_estimate'] / _MB:.0f} MB"),
    ]
    rows += [("left dense", f"{s['name']} ({s['weights']:,}): {s['reason']}") for s in plan["skipped"][:12]]
    if len(plan["skipped"]) > 12:
        rows.append(("", f"and {len(plan['skipped']) - 12} more"))
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def methods() -> list[dict[str, Any]]:
    """Every known method as plain values."""
    from compress.formats import holders
    from compress.passes import known, load
    from compress.recipe import Recipe

    out = []
    for name, entry in known().items():
        recipe = Recipe.of(load(name)())
        held = [set(holders(p.storage)) for p in recipe.passes]
        formats = [f for f in FORMATS if all(f in h for h in held)]
        paper = load(name).paper
        out.append({"name": name, "summary": entry.summary, "paper": paper, "formats": formats})
    return out


def print_methods(found: list[dict[str, Any]]) -> None:
    """The methods as a table."""
    table = Table()
    for heading in ("method", "what it does", "paper", "held by, at its defaults"):
        table.add_column(heading)
    for method in found:
        table.add_row(method["name"], method["summary"], method["paper"], ", ".join(method["formats"]))
    Console().print(table)


def as_json(result: Result) -> dict[str, Any]:
    """A run's record and timings as plain values."""
    return {"out": str(result.job.out), **make_record(result), **timings(result)}


def print_result(result: Result) -> None:
    """The closing table and the next command."""
    plan, score, base = result.plan, result.score, result.original
    table = Table(title=f"{result.job.origin} -> {result.job.out}")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("weights on disk", f"{plan.bytes_before / _MB:.1f} MB", f"{bytes_after(result) / _MB:.1f} MB")
    dense_bits = 8 * result.plan.scale_dtype.itemsize
    table.add_row("bits per weight (compressed layers)", f"{dense_bits}", f"{stored_bits(result):.3f}")
    if score is not None and base is not None:
        table.add_row("perplexity", f"{base.perplexity:.4f}", f"{score.perplexity:.4f}")
        table.add_row("KL from the original, nats a token", "0", f"{score.kl:.5f}")
        table.add_row("same most likely token", "100%", f"{100 * (score.top1 or 0):.2f}%")
    share = 100 * plan.packed_weights / plan.total_weights
    table.add_row("quantised parameters", "", f"{plan.packed_weights:,} of {plan.total_weights:,} ({share:.1f}%)")
    times = timings(result)
    table.add_row("seconds", "", f"{times['seconds']['total']:.1f}")
    table.add_row("peak host memory", "", f"{times['peak_host_bytes'] / 1e9:.2f} GB")
    if times["peak_device_bytes"]:
        table.add_row("peak device memory", "", f"{times['peak_device_bytes'] / 1e9:.2f} GB")
    console = Console()
    console.print(table)
    console.print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in result.seconds.items()), highlight=False)
    console.print("of threads beside: " + ", ".join(f"{k} {v:.1f}" for k, v in result.beside.items()), highlight=False)
    console.print("kept: " + ", ".join(f"{k} {v}" for k, v in result.room.items()), highlight=False)
    for line in words(result):
        console.print(line, highlight=False, markup=False)
    for note in notes(result):
        console.print(f"note: {note}", highlight=False, markup=False)
    for line in proof_lines(result.proof):
        console.print(line, highlight=False, markup=False)
    if score is not None and result.job.text is not None:
        console.print(
            f"text: {result.job.text.source}; {result.job.text.protocol}; BOS: {result.job.text.bos}",
            highlight=False,
            markup=False,
        )
    hub = "/" in result.job.origin or result.job.origin == "bundled"
    against = result.job.origin if hub else result.job.source
    console.print(f"next: compress eval {result.job.out} --against {against}", highlight=False, soft_wrap=True)


def proof_lines(proof: Proof | None) -> list[str]:
    """What was verified."""
    if proof is None:
        return ["not verified (--no-verify)"]
    first = (
        f"verified: {proof.layers} layers dequantise to the solver's weights, {proof.copied} tensors copied byte "
        f"for byte, {proof.parameters} parameters filled"
    )
    return [first, *proof.clients]
