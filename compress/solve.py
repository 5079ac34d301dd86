"""One loaded block: statistics, transforms, passes, records. What the pipeline does between load and free."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compress import stats
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.hidden import Activations
from compress.job import Clock
from compress.plan import Plan
from compress.types import LayerStats, Pass, Solved
from compress.verify import digest

#: for each layer of a block that asked for a survey, the share of tokens above the threshold in every block
Survey = dict[str, Tensor]


@dataclass
class Block:
    """What became of one block.

    Attributes:
        tensors: to store, by full name on disk.
        records: one a compressed layer.
        changed: sha256 of every other tensor that a transform changed, by name.
        notes: what the report must say of the block.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    changed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compress_block(
    model: BlockModel,
    plan: Plan,
    block: int,
    flow: Activations | None,
    survey: Survey,
    true_sequential: bool,
    clock: Clock,
) -> Block:
    """Compress every chosen layer of a loaded block, in place."""
    linears = plan.blocks[block]
    done = Block()
    if not linears:
        return done
    if flow is None:
        inputs = [stats.Inputs([linear], LayerStats(0)) for linear in linears]
    else:
        with clock("hessian"):
            inputs = stats.collect(model, block, linears, flow, plan.needs)
    if plan.recipe.transforms and block < len(model.block_names):
        with clock("fold"):
            inputs = _transform(model, plan, block, inputs, flow, done)
    for position in range(len(inputs)):
        group = inputs[position]
        if flow is not None and true_sequential and position and group.stage != inputs[position - 1].stage:
            with clock("hessian"):  # the layers before this one are compressed now
                rest = [linear for later in inputs[position:] for linear in later.linears]
                inputs[position:] = stats.collect(model, block, rest, flow, plan.needs)
            group = inputs[position]
        for part in _together(plan, group):
            with clock("solve"):
                solved = _solve(model, plan, part, survey)
            start = 0
            for linear in part.linears:
                stop = start + linear.shape[0]
                _store(model, plan, linear, part.stats, solved, start, stop, done)
                start = stop
    return done


def _together(plan: Plan, group: stats.Inputs) -> Iterator[stats.Inputs]:
    """The parts of a group that are solved in one call: the same passes, and row counts that keep rows independent."""
    by_passes: dict[int, list[Linear]] = {}
    for linear in group.linears:
        by_passes.setdefault(id(plan.choice[linear.name]), []).append(linear)
    same: dict[tuple[int, ...], list[Linear]] = {}
    for linears in by_passes.values():
        same.setdefault(tuple(id(p) for p in plan.choice[linears[0].name]), []).extend(linears)
    for linears in same.values():
        units = {p.row_unit for p in plan.choice[linears[0].name]}
        if 0 in units or any(x.shape[0] % unit for unit in units for x in linears):
            yield from (stats.Inputs([linear], group.stats) for linear in linears)
        else:
            yield stats.Inputs(linears, group.stats)


def _solve(model: BlockModel, plan: Plan, part: stats.Inputs, survey: Survey) -> Solved:
    """Run the passes on the rows of all layers of a part; errors name the layers."""
    weight = torch.cat([model.weight(linear).float() for linear in part.linears])
    spread = survey.get(part.linears[0].name)
    given = part.stats if spread is None else replace(part.stats, spread=spread)
    try:
        return run_passes(plan.choice[part.linears[0].name], weight, given, plan.scale_dtype)
    except CompressError as error:
        names = ", ".join(linear.name for linear in part.linears)
        raise CompressError(error.what, error.where or f"layer {names}", error.remedy) from None


def run_passes(passes: tuple[Pass, ...], weight: Tensor, given: LayerStats, dtype: torch.dtype) -> Solved:
    """One pass, or one that prunes and one that quantises what is left with the zeros kept.

    Args:
        weight: float32 [out, in].
    """
    solved = passes[0](weight, given, dtype)
    if len(passes) == 1:
        return solved
    from compress.packed.sparse import Sparse

    pruned = solved.packed
    assert isinstance(pruned, Sparse)
    later = passes[1](pruned.dequantize().float(), replace(given, mask=pruned.mask), dtype)
    packed = Sparse.wrap(pruned.mask, later.packed, pruned)
    error = weight - packed.dequantize().float()
    if given.hessian is None:
        loss, norm = error.square().sum(1), weight.square().sum(1)
    else:
        loss, norm = (((e @ given.hessian) * e).sum(1) for e in (error, weight))
    figures = {**solved.figures, **later.figures}
    return Solved(packed, loss, norm, solved.notes + later.notes, figures)


def _store(
    model: BlockModel,
    plan: Plan,
    linear: Linear,
    layer_stats: LayerStats,
    solved: Solved,
    start: int,
    stop: int,
    done: Block,
) -> None:
    """Put a solved layer into the block and its tensors and record into `done`."""
    part = solved.packed.rows(start, stop)
    dense = model.set_packed(linear, part)
    stored = {f"{linear.name}.{s}": t.cpu() for s, t in plan.format.pack(part).items()}
    done.tensors |= stored
    done.records.append(_record(plan, linear, layer_stats, solved, start, stop, stored, dense))


def _record(
    plan: Plan,
    linear: Linear,
    layer_stats: LayerStats,
    solved: Solved,
    start: int,
    stop: int,
    stored: dict[str, Tensor],
    dense: Tensor,
) -> dict[str, Any]:
    """What the report says of one layer."""
    loss, norm = float(solved.row_loss[start:stop].sum()), float(solved.row_norm[start:stop].sum())
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = f"its error overflows float32 (weights up to {float(dense.abs().max()):.1e})"
        raise CompressError(what, f"layer {linear.name}", f"--exclude '{linear.name}' leaves it dense")
    notes = list(solved.notes)
    if linear.expert is not None and plan.needs.hessian and layer_stats.tokens < linear.shape[1]:
        notes.append(f"only {layer_stats.tokens} calibration tokens reached this expert ({linear.shape[1]} inputs)")
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    return {
        "name": linear.name,
        "method": "+".join(p.name for p in plan.choice[linear.name]),
        "shape": list(linear.shape),
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (linear.shape[0] * linear.shape[1]),
        "tokens": layer_stats.tokens,
        "relative_error": loss / norm if norm > 0 else 0.0,
        "figures": {k: float(v) for k, v in solved.figures.items()},
        "notes": notes,
        "sha256_dense": digest(dense),
    }


def _transform(
    model: BlockModel, plan: Plan, block: int, inputs: list[stats.Inputs], flow: Activations | None, done: Block
) -> list[stats.Inputs]:
    """Apply the recipe's transforms to the block, in order; the statistics follow the rescaled channels."""
    from compress.folding import fold

    raise NotImplementedError


def survey_model(model: BlockModel, plan: Plan, flow: Activations, clock: Clock) -> Survey:
    """Run the dense model once through all blocks for the passes that decide from every block at once."""
    found: dict[str, list[tuple[int, str, Tensor]]] = {}
    for block, linears in enumerate(plan.blocks):
        mine = [x for x in linears if any(p.needs.survey for p in plan.choice[x.name])]
        with clock("load"):
            model.load(block)
        with clock("survey"):
            if mine:
                for group in stats.collect(model, block, mine, flow, replace(plan.needs, hessian=False)):
                    for linear in group.linears:
                        assert group.stats.above is not None
                        found.setdefault(_role(model, linear, block), []).append(
                            (block, linear.name, group.stats.above)
                        )
            if block + 1 < len(model.block_names):
                flow.advance(block)
        model.free(block)
    with clock("survey"):
        flow.enter()
    out: Survey = {}
    for layers in found.values():
        spread = torch.stack([above for _, _, above in layers])
        out |= {name: spread for _, name, _ in layers}
    return out


def _role(model: BlockModel, linear: Linear, block: int) -> str:
    """What a layer is in its block: the same name in every block."""
    prefix = "" if linear.head else model.block_names[block] + "."
    return f"{linear.param.removeprefix(prefix)}/{linear.expert}/{linear.first_row}/{linear.shape[1]}"
