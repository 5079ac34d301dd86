"""The calibration rows on their ways through the model: as compressed so far, and, where a step asks, as it was."""

from __future__ import annotations

from pathlib import Path

from compress.blocks import BlockModel
from compress.hidden import Activations, batch_rows, row_bytes
from compress.job import Job
from compress.plan import Plan

#: how much more than `Plan.device_bytes` a block is taken to need, the next one's tensors among it
SLACK = 2


class Flows:
    """A context that frees what they took.

    Attributes:
        compressed: where the rows enter the next block that is not finished; None for a run that needs none.
        original: where they enter the next block in the original model.
        inside: of blocks that are refined together, where they enter the next one.
    """

    def __init__(
        self, compressed: Activations | None, original: Activations | None, inside: Activations | None
    ) -> None:
        self.compressed, self.original, self.inside = compressed, original, inside

    def __enter__(self) -> Flows:
        return self

    def __exit__(self, *exc: object) -> None:
        for rows in (self.compressed, self.original, self.inside):
            if rows is not None:
                rows.close()

    def entering(self, block: int, together: range) -> Activations | None:
        """The rows where they enter a block of some that are refined together."""
        return self.compressed if block == together.start else self.inside

    def step_inside(self, block: int, together: range) -> None:
        """Go on from a loaded block to the next one of some that are refined together; `compressed` stays."""
        assert self.compressed is not None
        assert self.inside is not None
        if block == together.start:
            self.inside.rows = self.compressed.rows
            self.inside.follow(self.compressed, block)
        else:
            self.inside.advance(block)

    def told(self) -> tuple[int | None, list[str]]:
        """How many rows go through a block at once from here on, and what the report must say and was not told."""
        if self.compressed is None:
            return None, []
        notes = self.compressed.told()
        for beside in filter(None, (self.original, self.inside)):
            notes += [note for note in beside.told() if note not in notes]
        if self.inside is not None:
            self.compressed.rows = min(self.compressed.rows, self.inside.rows)
        return self.compressed.rows, notes


def start_flows(model: BlockModel, plan: Plan, job: Job, folder: Path, rows_before: int | None) -> Flows:
    """As many as the plan's steps ask for.

    Batches are sized to the free memory; a run that goes on keeps the size it began with, and so its sums. Hidden
    states may take what the device has beside a block, what is done to it, a batch and the next block.

    Args:
        folder: for what fits in no memory.
        rows_before: rows a batch of the run that goes on.
    """
    if job.rows is None or not plan.needs:
        return Flows(None, None, None)
    tokens = job.rows.tokens
    widest = max(linear.shape[0] for block in plan.blocks for linear in block)
    seq = tokens.shape[1]
    size = rows_before or batch_rows(len(tokens), seq, model.hidden_size, widest, job.device, job.low_memory)
    held = SLACK * plan.device_bytes + size * row_bytes(seq, model.hidden_size, widest)
    flow = Activations(model, tokens, size, folder / "hidden.bin", held, job.low_memory)
    dense = flow.beside(folder / "original.bin") if plan.needs.original else None
    inside = flow.beside(folder / "inside.bin") if plan.together > 1 else None
    return Flows(flow, dense, inside)
