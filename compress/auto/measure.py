"""One walk over the model: each layer's loss under every candidate, and what each group alone does to the predictions.

The loss is the pass' own, on the statistics of the dense model's inputs: r = tr(E H E^T) / tr(W H W^T) with E the
rounding error, of what would be stored. The same r hurts differently in different layers, so that each group is put on
one scale by the KL divergence of the model with this group alone rounded (forks.py): the divergence is nearly linear in
the squared relative errors of the layers, and the layers' shares add up (Malinovskii, Panferov, Ilin, Guo, Richtarik,
Alistarh: "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem", 2024, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from compress import stats
from compress.auto.candidates import Candidate, Field, Group
from compress.auto.forks import Variants
from compress.auto.store import Divergences, Losses, Store
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.hidden import Activations
from compress.job import Progress, Status
from compress.lane import Here
from compress.sums import Inputs
from compress.types import LayerStats, Packed, Pass, moved

#: a group whose layers are rounded alone, by its candidate
Fork = tuple[Group, int]


@dataclass(frozen=True)
class Work:
    """What is measured on what.

    Attributes:
        dtype: of the stored scales.
        flow: the calibration rows; None where the method needs no statistics.
        probes: int64 [rows, seq], on which divergences are taken; None for losses alone.
        points: candidates under which a group's divergence is taken, see `forks_of`.
        spill: file for the probes' hidden states.
        held: bytes of the device that a block and what is done to it take.
    """

    model: BlockModel
    field: Field
    store: Store
    dtype: torch.dtype
    flow: Activations | None
    probes: Tensor | None
    spill: Path
    points: int = 1
    held: int | None = None
    low_memory: bool = False

    @property
    def blocks(self) -> int:
        return 1 + max(group.block for group in self.field.groups)


def forks_of(group: Group, candidates: Sequence[Candidate], points: int) -> list[int]:
    """The candidates under which a group's divergence is taken: the coarsest of each of its `points` lowest bits."""
    lowest: dict[int, int] = {}
    for c in group.options:
        lowest.setdefault(candidates[c].method.storage.bits, c)
    return [lowest[bits] for bits in sorted(lowest)][:points]


def measure(work: Work, progress: Progress) -> None:
    """Measure what the store does not hold yet, block by block. Raises CompressError."""
    forks = _forks_missing(work)
    wanted = [_wanted(work, block, forks) for block in range(work.blocks)]
    solving = [block for block, layers in enumerate(wanted) if layers]
    if not forks and not solving:
        return
    total = max(len(work.model.block_names), work.blocks) if forks else solving[-1] + 1
    variants = None
    if work.flow is not None and solving:
        work.flow.enter()
    if forks:
        assert work.probes is not None
        variants = Variants(work.model, work.probes, len(forks), work.spill, work.held, work.low_memory)
        variants.enter()
    try:
        with work.model.ahead(range(total), Here()) as ahead:
            for block in range(total):
                work.model.load(block, ahead.take(block))
                packed = _solved_block(work, block, wanted[block], forks) if block < len(wanted) else {}
                if variants is not None:
                    _fork(work, variants, block, [f for f in forks if f[0].block == block], packed)
                if work.flow is not None and solving and block < solving[-1]:
                    work.flow.advance(block)
                work.model.free(block)
                progress(Status("measure", block + 1, total))
        if variants is not None:
            progress(Status("compare", 0, 1))
            _finish(work, forks, variants.divergences())
    finally:
        if variants is not None:
            variants.close()


def _forks_missing(work: Work) -> list[Fork]:
    """Groups whose divergence is not known, by block, with the candidates for it."""
    if work.probes is None:
        return []
    known, candidates = work.store.divergences(), work.field.candidates
    return [
        (group, c)
        for group in sorted(work.field.groups, key=lambda group: group.block)
        for c in forks_of(group, candidates, work.points)
        if candidates[c].key not in known.get(group.key, {})
    ]


def _wanted(work: Work, block: int, forks: Sequence[Fork]) -> dict[str, set[int]]:
    """Of the layers of a block, the candidates that must be solved: their loss is not known, or they are to fork."""
    known, candidates = work.store.losses(block), work.field.candidates
    found: dict[str, set[int]] = {}
    for group in work.field.groups:
        if group.block != block:
            continue
        forking = {c for other, c in forks if other is group}
        for linear in group.linears:
            mine = known.get(linear.name, {})
            missing = {c for c in group.options if candidates[c].key not in mine}
            missing |= {c for c in forking if not work.store.keeps(block, linear, candidates[c])}
            if missing:
                found[linear.name] = missing
    return found


def _solved_block(
    work: Work, block: int, wanted: dict[str, set[int]], forks: Sequence[Fork]
) -> dict[tuple[str, str], Packed]:
    """Solve what is wanted of a loaded block, and store the losses. Returns the layers that fork, by (name, key)."""
    losses: Losses = {}
    packed: dict[tuple[str, str], Packed] = {}
    forking = {(x.name, c) for group, c in forks for x in group.linears}
    for group in _inputs(work, block, wanted):
        for c, candidate in enumerate(work.field.candidates):
            mine = [x for x in group.linears if c in wanted[x.name]]
            for linear, layer, loss, norm in solved(work.model, candidate.method, mine, group.stats, work.dtype):
                figures = {"loss": loss, "norm": norm, "tokens": float(group.stats.tokens)}
                losses.setdefault(linear.name, {})[candidate.key] = figures
                if (linear.name, c) in forking:
                    packed[linear.name, candidate.key] = layer
    if losses:
        work.store.add(block, losses, packed)
    return packed


def _inputs(work: Work, block: int, wanted: dict[str, set[int]]) -> list[Inputs]:
    """The wanted layers by common input, with statistics where the method needs them."""
    linears = [x for group in work.field.groups if group.block == block for x in group.linears if x.name in wanted]
    if work.flow is None or not linears:
        return [Inputs([x], LayerStats(0)) for x in linears]
    return stats.collect(work.model, block, linears, work.flow, work.field.candidates[0].method.needs)


def solved(
    model: BlockModel, method: Pass, linears: Sequence[Linear], given: LayerStats, dtype: torch.dtype
) -> Iterator[tuple[Linear, Packed, float, float]]:
    """Run a pass on loaded layers with one input: of each the packed layer, its loss and its norm.

    Raises:
        CompressError: an error that overflows float32 (names the layer).
    """
    unit = method.row_unit
    apart = unit == 0 or any(x.shape[0] % unit for x in linears)
    for part in [[x] for x in linears] if apart else [list(linears)] if linears else []:
        found = method(torch.cat([model.weight(x).float() for x in part]), given, dtype)
        start = 0
        for linear in part:
            rows = slice(start, start + linear.shape[0])
            start = rows.stop
            loss, norm = (float(x[rows].sum().double()) for x in (found.row_loss, found.row_norm))
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise CompressError("its error overflows float32", f"layer {linear.name}", "--exclude leaves it dense")
            yield linear, found.packed.rows(rows.start, rows.stop), loss, norm


def _fork(
    work: Work, variants: Variants, block: int, forks: Sequence[Fork], packed: dict[tuple[str, str], Packed]
) -> None:
    """Send the variants through a loaded block; those of its own groups begin here."""
    rounded: list[list[tuple[Linear, Tensor]]] = []
    for group, c in forks:
        candidate = work.field.candidates[c]
        layers = []
        for linear in group.linears:
            layer = packed.get((linear.name, candidate.key))
            if layer is None:  # an earlier, stopped run kept it
                layer = work.store.packed(block, linear, candidate, work.dtype)
            layers.append((linear, moved(layer, work.model.device).dequantize()))
        rounded.append(layers)
    if block < len(work.model.block_names):
        variants.advance(block, rounded)
        return
    for layers in rounded:
        variants.round_head(*layers[0])


def _finish(work: Work, forks: Sequence[Fork], found: Sequence[float]) -> None:
    divergences: Divergences = {}
    for (group, c), value in zip(forks, found, strict=True):
        if not math.isfinite(value):
            raise CompressError("its divergence is not finite", f"layer {group.linears[0].name}", "try --dtype float32")
        divergences.setdefault(group.key, {})[work.field.candidates[c].key] = value
    work.store.finish(divergences)
