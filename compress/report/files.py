"""What a person sees of checkpoints: their contents, what was checked, moved and rotated."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from compress.inventory import describe

if TYPE_CHECKING:
    from compress.export import Exported
    from compress.inventory import Inventory
    from compress.rotation.rotate import Rotated
    from compress.tuning.tune import Tuned


def print_inventory(found: Inventory) -> None:
    """A table a way of storing, a row a layer, then the rest by dtype, then the sums."""
    console = Console()
    console.print(f"{found.folder}: {found.format}", highlight=False, markup=False, soft_wrap=True)
    for storage in dict.fromkeys(x.storage for x in found.layers):
        mine = [x for x in found.layers if x.storage == storage]
        table = Table(title=f"{describe(storage)} ({len(mine)} layers)", box=None, title_justify="left")
        table.add_column("layer", overflow="fold")
        for heading in ("out x in", "bytes", "bits a weight"):
            table.add_column(heading, justify="right")
        for x in mine:
            table.add_row(x.name, f"{x.shape[0]} x {x.shape[1]}", f"{x.bytes:,}", f"{x.bits_per_weight:.3f}")
        console.print(table)
    for dtype, (tensors, parameters, size) in sorted(found.dense.items()):
        console.print(f"{dtype}: {tensors} tensors, {parameters:,} parameters, {size:,} bytes", highlight=False)
    packed = sum(x.weights for x in found.layers)
    if packed:
        bits = 8 * sum(x.bytes for x in found.layers) / packed
        share = 100 * packed / found.parameters
        line = f"packed: {len(found.layers)} layers, {packed:,} parameters ({share:.1f}%), {bits:.3f} bits a weight"
        console.print(line, highlight=False)
    console.print(f"all: {found.parameters:,} parameters, {found.bytes / 1e6:,.1f} MB", highlight=False)


def print_checks(folder: str, lines: list[str]) -> None:
    """What was found to be right, a line each."""
    console = Console()
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{folder}: nothing wrong was found", highlight=False, markup=False, soft_wrap=True)


def print_rotated(done: Rotated) -> None:
    """What was rotated, how exactly, what else must be known."""
    console = Console()
    lines = [f"the residual stream by a {done.residual}"] if done.residual else []
    lines += [f"{done.heads} value heads"] if done.heads else []
    lines = [f"rotated: {' and '.join(lines)}, in {done.blocks} blocks"]
    lines.append(f"proved in float32: outputs move by at most {done.largest_error:.1e} of what a block adds")
    if done.logits_change is not None:
        lines.append(f"of the files: logits move by {done.logits_change:.1e} of their norm")
    lines += [f"note: {note}" for note in done.notes]
    if done.proof is None:
        lines.append("not verified (--no-verify)")
    else:
        lines += list(done.proof.clients)
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {done.out}; next: compress gptq {done.out}", highlight=False, markup=False, soft_wrap=True)


def print_tuned(done: Tuned) -> None:
    """What was tuned, what it is worth, what was checked."""
    console = Console()
    lines = [f"scales of {done.layers} of {done.packed} packed layers and gains of norms tuned; every code stayed"]
    share = done.after / done.before if done.before > 0 else 1.0
    change = f"{done.before:.4f} to {done.after:.4f} nats a token ({share:.0%})"
    lines.append(f"divergence from the original on held-out rows: {change}")
    lines += [f"note: {note}" for note in done.notes]
    lines += ["not verified (--no-verify)"] if done.proof is None else list(done.proof.clients)
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {done.out}", highlight=False, markup=False, soft_wrap=True)


def print_export(done: Exported) -> None:
    """What was moved, what was lost, what was checked."""
    console = Console()
    lines = [f"{done.layers} packed layers, now {done.format}"]
    lines += [f"lost: {loss} ({count} layers)" for loss, count in done.losses.items()]
    if done.losses:
        lines.append(f"largest relative change of a layer's weights: {done.largest_change:.1e}")
    else:
        lines.append("every code, scale and zero point is as it was")
    if done.proof is None:
        lines.append("not verified (--no-verify)")
    else:
        lines.append(
            f"verified: {done.proof.layers} layers read back to the last bit, {done.proof.copied} tensors copied"
        )
        lines += list(done.proof.clients)
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"written: {done.out}", highlight=False, markup=False, soft_wrap=True)
