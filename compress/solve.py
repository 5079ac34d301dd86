"""One loaded block: statistics, transforms, passes, records. What the pipeline does between load and free."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compress import stats
from compress.ahead import Outbox
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.hidden import Activations
from compress.job import Clock
from compress.lane import Here, Lane
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.plan import Plan
from compress.refiners.task import BlockTask
from compress.solvers.hessian import row_losses
from compress.solvers.past import aimed
from compress.sums import Inputs
from compress.types import LayerStats, Packed, Pass, Refined, Solved, Transform
from compress.verify import digest

#: of a correction of the past, as a share of H's mean diagonal
_DAMP = 0.01
#: for each layer of a block that asked for a survey, the share of tokens above the threshold in every block
Survey = dict[str, Tensor]


@dataclass
class Block:
    """What became of one block. Tensors are on their way to the host, and digests are made in threads, until `seal`.

    Attributes:
        number: of the block in the model.
        layers: those that are solved and wait for a refiner, until `close_blocks`.
        folds: what transforms left.
        tensors: to store, by full name on disk.
        records: one a compressed layer.
        digests: sha256 of each layer's dequantised weight, by its name.
        changed: sha256 of every other tensor that a transform changed, by name.
        notes: what the report must say of the block.
        words: what transforms did.
        unbiased: layers whose bias was to be corrected and that have none.
        rows: calibration rows that went through it at once.
    """

    number: int
    layers: list[Layer] = field(default_factory=list)
    folds: Folds = field(default_factory=lambda: Folds())
    tensors: dict[str, Tensor] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    digests: dict[str, Future[str]] = field(default_factory=dict)
    changed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    unbiased: int = 0
    rows: int | None = None

    def seal(self) -> None:
        """Fill in the digests, once the tensors are on the host."""
        for record in self.records:
            record["sha256_dense"] = self.digests.pop(record["name"]).result()
        self.changed.update({name: digest(self.tensors[name]) for name in self.changed})


@dataclass
class Folds:
    """What the transforms of a block left for its passes.

    Attributes:
        weights: float32 [out, in] by layer, where the block holds the rescaled weight only rounded.
        means: float32 [in] by layer, the analytic mean of its input.
        transforms: those that were applied.
        originals: float32 [out, in] by layer, the rescaled weight before a pass rounds it.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    transforms: list[Transform] = field(default_factory=list)
    originals: dict[str, Tensor] = field(default_factory=dict)

    def weight(self, model: BlockModel, linear: Linear) -> Tensor:
        """float32 [out, in]: what a pass is given."""
        found = self.weights.get(linear.name)
        return model.weight(linear).float() if found is None else found


def compress_block(
    model: BlockModel,
    plan: Plan,
    block: int,
    flow: Activations | None,
    survey: Survey,
    true_sequential: bool,
    clock: Clock,
    outbox: Outbox,
    shared: stats.Shared | None = None,
    original: Activations | None = None,
) -> Block:
    """Compress every chosen layer of a loaded block, in place; what is to be stored goes to the host by `outbox`, now
    or, of layers that wait for a refiner, in `close_blocks`.

    Args:
        shared: what other runs on the same rows found out about the first block, or will be given.
        original: the rows of `flow` where they enter the block in the original model, for steps that ask for them;
            where they leave it when this returns.
    """
    linears = plan.blocks[block]
    done = Block(block)
    folds = done.folds
    first, inside = block == 0, block < len(model.block_names)
    beside = original if plan.needs.past and inside and not first else None  # the first block's are the original's
    inputs = _inputs(model, plan, block, linears, flow, clock, shared if first else None, beside)
    if original is not None and inside:
        with clock("forward"):
            original.advance(block)
    refining = original is not None and plan.needs.outputs
    if plan.recipe.transforms and block < len(model.block_names):
        with clock("fold"):
            inputs = _transform(model, plan, block, inputs, flow, folds, done)
    for position in range(len(inputs)):
        group = inputs[position]
        if flow is not None and true_sequential and position and group.stage != inputs[position - 1].stage:
            rest = [linear for later in inputs[position:] for linear in later.linears]
            inputs[position:] = _inputs(model, plan, block, rest, flow, clock)  # those before are compressed now
            group = inputs[position]
        for part in _together(plan, group):
            with clock("solve"):
                solved = _solve(model, plan, part, folds, survey, keep=refining)
            with clock("pack"):
                for layer in solved:
                    dense = model.set_packed(layer.linear, layer.packed)
                    if refining:
                        done.layers.append(layer)
                    else:
                        _store(model, plan, layer, dense, done, outbox)
                        _correct_bias(model, block, layer.linear, part.stats, folds, done, outbox)
    return done


def window(model: BlockModel, plan: Plan, block: int) -> range:
    """The blocks that are refined together with a block, itself among them; the head is by itself."""
    end = len(model.block_names)
    first = block - block % plan.together
    return range(block, block + 1) if block >= end else range(first, min(first + plan.together, end))


def close_blocks(
    model: BlockModel,
    plan: Plan,
    made: Sequence[Block],
    flow: Activations | None,
    original: Activations | None,
    clock: Clock,
    outbox: Outbox,
) -> None:
    """Refine the layers of neighbouring blocks that wait for it, together, and send what is to be stored to the host.

    Args:
        made: loaded blocks.
        flow: the calibration rows where they enter the first of them.
        original: those rows where they leave the last of them in the original model.
    """
    if any(done.layers for done in made):
        assert flow is not None
        assert original is not None
        with clock("refine"):
            _refine(model, plan, made, flow, original, outbox)
    for done in made:
        with clock("pack"):
            for layer in done.layers:
                _store(model, plan, layer, model.set_packed(layer.linear, layer.packed), done, outbox)
                _correct_bias(model, done.number, layer.linear, layer.stats, done.folds, done, outbox)
        done.layers.clear()
        done.notes = done.words + done.notes
        if done.unbiased:
            done.notes.append("bias correction: a layer without a bias has nothing to take it")


def _inputs(
    model: BlockModel,
    plan: Plan,
    block: int,
    linears: Sequence[Linear],
    flow: Activations | None,
    clock: Clock,
    shared: stats.Shared | None = None,
    originals: Activations | None = None,
) -> list[Inputs]:
    """The layers by common input, with statistics where a step needs them; with originals, of the past too."""
    watched = [x for x in linears if plan.recipe.transforms or any(p.needs.statistics for p in plan.choice[x.name])]
    needs = plan.needs.statistics
    found: list[Inputs] = []
    if flow is not None and watched:
        collect = partial(stats.collect, model, block, watched, flow, needs, clock, originals)
        with clock("forward"):
            found = collect() if shared is None else shared.get(needs, watched, collect)
    known = {x.name for group in found for x in group.linears}
    return found + [Inputs([x], LayerStats(0)) for x in linears if x.name not in known]


def _together(plan: Plan, group: Inputs) -> Iterator[Inputs]:
    """The parts of a group that are solved in one call: the same passes, and row counts that keep rows independent."""
    same: dict[tuple[int, ...], list[Linear]] = {}
    for linear in group.linears:
        same.setdefault(tuple(id(p) for p in plan.choice[linear.name]), []).append(linear)
    for linears in same.values():
        units = {p.row_unit for p in plan.choice[linears[0].name]}
        if 0 in units or any(x.shape[0] % unit for unit in units for x in linears):
            yield from (Inputs([linear], group.stats) for linear in linears)
        else:
            yield Inputs(linears, group.stats)


@dataclass(frozen=True)
class Layer:
    """One solved layer.

    Attributes:
        solved: of all layers that were solved together.
        packed: its rows of that; what a refiner made of them.
        loss, norm: sums over its rows.
        weight: float32 [out, in], what the passes were given; None where nobody will ask.
    """

    linear: Linear
    stats: LayerStats
    solved: Solved
    packed: Packed
    loss: float
    norm: float
    weight: Tensor | None = None


def _solve(model: BlockModel, plan: Plan, part: Inputs, folds: Folds, survey: Survey, keep: bool) -> list[Layer]:
    """Run the passes on the rows of all layers of a part; errors name the layers. keep: their weights, too."""
    weight = torch.cat([folds.weight(model, linear) for linear in part.linears])
    spread = survey.get(part.linears[0].name)
    given = part.stats if spread is None else replace(part.stats, spread=spread)
    passes = plan.choice[part.linears[0].name]
    shares: list[float] = []
    if given.past is not None and given.hessian is not None and any(p.needs.past for p in passes):
        parts = torch.split(weight, [linear.shape[0] for linear in part.linears])
        found = [aimed(x, given.hessian, given.past, _DAMP) for x in parts]
        weight, shares = torch.cat([x for x, _ in found]), [t for _, t in found]
    try:
        solved = run_passes(passes, weight, given, plan.scale_dtype)
    except CompressError as error:
        names = ", ".join(linear.name for linear in part.linears)
        raise CompressError(error.what, error.where or f"layer {names}", error.remedy) from None
    if shares:
        solved = replace(solved, figures={**solved.figures, "past": sum(shares) / len(shares)})
    return [
        Layer(
            linear, part.stats, solved, solved.packed.rows(rows.start, rows.stop), *sums, weight[rows] if keep else None
        )
        for linear, rows, sums in _slices(part, solved)
    ]


def run_passes(passes: tuple[Pass, ...], weight: Tensor, given: LayerStats, dtype: torch.dtype) -> Solved:
    """One pass, or one that prunes and one that quantises what is left with the zeros kept.

    Args:
        weight: float32 [out, in].
    """
    solved = passes[0](weight, given, dtype)
    if len(passes) == 1:
        return solved
    pruned = solved.packed
    assert isinstance(pruned, Sparse)
    later = passes[1](pruned.dequantize().float(), replace(given, mask=pruned.mask), dtype)
    assert isinstance(later.packed, UniformGrid)  # the plan refused every other kind
    packed = Sparse.wrap(pruned.mask, later.packed, pruned)
    error = weight - packed.dequantize().float()
    if given.hessian is None:
        loss, norm = error.square().sum(1), weight.square().sum(1)
    else:
        loss, norm = (((e @ given.hessian) * e).sum(1) for e in (error, weight))
    figures = {**solved.figures, **later.figures}
    return Solved(packed, loss, norm, solved.notes + later.notes, figures)


def _slices(part: Inputs, solved: Solved) -> Iterator[tuple[Linear, slice, tuple[float, float]]]:
    """Each layer of a solved part, its rows, and the sums of their losses and norms: one look at the device for all."""
    ends = [0]
    for linear in part.linears:
        ends.append(ends[-1] + linear.shape[0])
    rows = [slice(a, b) for a, b in pairwise(ends)]
    sums = [x[r].sum().double() for r in rows for x in (solved.row_loss, solved.row_norm)]
    figures = torch.stack(sums).tolist()
    yield from zip(part.linears, rows, zip(figures[::2], figures[1::2], strict=True), strict=True)


def _refine(
    model: BlockModel,
    plan: Plan,
    made: Sequence[Block],
    flow: Activations,
    targets: Activations,
    outbox: Outbox,
) -> None:
    """Tune those layers of the blocks whose passes ask for it; the others stay as they are."""
    refiner, first = plan.recipe.refiner, made[0]
    layers = [x for done in made for x in done.layers]
    mine = [x for x in layers if any(p.needs.outputs for p in plan.choice[x.linear.name])]
    if refiner is None or not mine or first.number >= len(model.block_names):
        return
    if any(x.packed.storage.activations for x in layers):
        first.notes.append(f"{refiner.name}: blocks with quantised activations are not refined")
        return
    packed = {x.linear.name: x.packed for x in mine}
    weights = {x.linear.name: x.weight for x in mine if x.weight is not None}
    linears = {done.number: [x.linear for x in done.layers if x.linear.name in packed] for done in made}

    def work() -> Refined:
        try:
            return refiner.refine(packed, weights, BlockTask(model, linears, flow, targets), first.number)
        finally:
            first.notes += flow.replays.rest()

    found = flow.within(work)
    first.notes += found.notes
    share = found.after / found.before if found.before > 0 else 1.0
    for done in made:
        for name in [n for n in model.vectors(done.number) if n in found.vectors]:  # in order: it becomes the file's
            value = found.vectors[name]
            model.set_stored(done.number, name, value)
            done.tensors[name] = outbox.host(value)
            done.changed[name] = ""  # until `Block.seal`
        done.layers = [
            _remeasured(x, found.packed[x.linear.name], share) if x.linear.name in packed else x for x in done.layers
        ]


def _remeasured(layer: Layer, packed: Packed, share: float) -> Layer:
    """The layer with what a refiner made of it, and its loss anew."""
    assert layer.weight is not None
    error = layer.weight - packed.dequantize().float()
    hessian = layer.stats.hessian
    loss = error.square().sum() if hessian is None else row_losses(error, hessian).sum()
    solved = replace(layer.solved, figures={**layer.solved.figures, "refined": share})
    return replace(layer, solved=solved, packed=packed, loss=float(loss), weight=None)


def _store(model: BlockModel, plan: Plan, layer: Layer, dense: Tensor, done: Block, outbox: Outbox) -> None:
    """Put the tensors and the record of a layer that the block computes with, `dense` [out, in], into `done`."""
    linear = layer.linear
    packed = plan.format.pack(layer.packed)
    if linear.transposed and not plan.format.quantised:
        packed = {s: t.t().contiguous() for s, t in packed.items()}  # as the model keeps it
    stored = {f"{linear.name}.{s}": outbox.host(t) for s, t in packed.items()}
    done.tensors |= stored
    done.digests[linear.name] = outbox.later("digest", digest, dense)
    done.records.append(_record(plan, layer, stored, dense))


def _record(plan: Plan, layer: Layer, stored: dict[str, Tensor], dense: Tensor) -> dict[str, Any]:
    """What the report says of one layer, but for the sha256 of its dequantised weight."""
    linear, layer_stats, solved, loss, norm = layer.linear, layer.stats, layer.solved, layer.loss, layer.norm
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
        **({"transposed": True} if linear.transposed and not plan.format.quantised else {}),
    }


def _transform(
    model: BlockModel,
    plan: Plan,
    block: int,
    inputs: list[Inputs],
    flow: Activations | None,
    folds: Folds,
    done: Block,
) -> list[Inputs]:
    """Apply the recipe's transforms to the block, in order; the statistics follow the rescaled channels."""
    from compress.folding.fold import fold

    for step in plan.recipe.transforms:
        if not step.where.holds("", block, len(model.block_names)):
            continue
        assert isinstance(step.method, Transform)
        sample = None if flow is None else flow.states(0)
        folded = fold(model, block, inputs, step.method, sample, folds.weights)
        inputs = folded.inputs
        folds.weights = folded.weights
        folds.means |= folded.means
        folds.transforms.append(step.method)
        for name, tensor in folded.changed.items():
            done.tensors[name] = tensor
            done.changed[name] = ""  # until `Block.seal`
        done.words.append(f"{step.name}: channels of {folded.edges} places in a block rescaled, its function unchanged")
        done.notes += [f"{step.name}: {note}" for note in folded.notes]
    if any(t.shifts for t in folds.transforms):
        folds.originals = {x.name: folds.weight(model, x).clone() for group in inputs for x in group.linears}
    return inputs


def _correct_bias(
    model: BlockModel, block: int, linear: Linear, layer_stats: LayerStats, folds: Folds, done: Block, outbox: Outbox
) -> None:
    """Take the mean error of a rounded layer out of its bias, where a transform asks for it and there is a bias."""
    for transform in folds.transforms:
        if not transform.shifts:
            continue
        rounded = model.weight(linear)
        shift = transform.shift(folds.originals[linear.name], rounded, folds.means.get(linear.name), layer_stats)
        if shift is None:
            continue
        bias = model.bias(linear)
        if bias is None:
            done.unbiased += 1
            continue
        name, value = bias
        stored = (value.float() + shift.to(value.device)).to(model.weights.dtype(name))
        model.set_stored(block, name, stored)
        done.tensors[name] = outbox.host(stored)
        done.changed[name] = ""  # until `Block.seal`


def survey_model(model: BlockModel, plan: Plan, flow: Activations, clock: Clock, lane: Lane | None = None) -> Survey:
    """Run the dense model once through all blocks for the passes that decide from every block at once.

    Args:
        lane: where the next block's tensors wait; None: on the host.
    """
    found: dict[str, list[tuple[int, str, Tensor]]] = {}
    with model.ahead(range(len(plan.blocks)), lane or Here(), clock.beside) as ahead:
        for block, linears in enumerate(plan.blocks):
            mine = [x for x in linears if any(p.needs.survey for p in plan.choice[x.name])]
            with clock("load"):
                model.load(block, ahead.take(block))
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
