"""What a run will do, from config.json and shard headers alone: layers, sizes, memory, what is left dense and why."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress import clients
from compress.blocks import ROUTERS, BlockModel, Linear
from compress.errors import CompressError
from compress.formats import DEFAULT, FORMATS, OWN
from compress.formats.base import Format, Held
from compress.gguf import writer as gguf_writing
from compress.recipe import Recipe, Where, chained
from compress.types import Needs, Pass, Refiner, Storage, Transform


@dataclass(frozen=True)
class Skipped:
    """A weight matrix that stays as it is, and why.

    Attributes:
        name: on disk, or the model's parameter.
        weights: how many.
        module: the model's linear module, None where there is none.
    """

    name: str
    weights: int
    reason: str
    module: str | None = None


@dataclass(frozen=True)
class Plan:
    """What a run will do.

    Attributes:
        recipe: every setting filled.
        blocks: for each decoder block, the matrices that will be compressed.
        choice: by layer name, the passes that take it, in order.
        skipped: matrices that stay dense.
        total_weights: all parameters of the checkpoint.
        packed_weights: parameters that will be compressed.
        bytes_before, bytes_after: weight bytes on disk (after: computed from the format, an estimate for kinds whose
            size depends on the weights).
        bits_per_weight: stored bits for each compressed parameter.
        device_bytes: estimate of the peak on the device.
    """

    recipe: Recipe
    format: Format
    scale_dtype: torch.dtype
    blocks: list[list[Linear]]
    choice: dict[str, tuple[Pass, ...]]
    skipped: list[Skipped]
    total_weights: int
    packed_weights: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    device_bytes: int

    @property
    def layers(self) -> int:
        return sum(len(b) for b in self.blocks)

    @property
    def needs(self) -> Needs:
        return self.recipe.needs

    @property
    def together(self) -> int:
        """How many neighbouring blocks are refined together."""
        return 1 if self.recipe.refiner is None else self.recipe.refiner.window

    def storage(self, linear: Linear) -> Storage:
        """How a layer will be stored."""
        return chained(self.choice[linear.name])

    def taken(self) -> list[int]:
        """For each step of the recipe, how many layers it takes (a transform: those of the blocks that it is for)."""
        counts = []
        for step in self.recipe.steps:
            if isinstance(step.method, Refiner):
                counts.append(sum(any(p.needs.outputs for p in passes) for passes in self.choice.values()))
            elif isinstance(step.method, Transform):
                total = len(self.blocks)
                counts.append(sum(len(b) for i, b in enumerate(self.blocks) if step.where.holds("", i, total)))
            else:
                counts.append(sum(any(p is step.method for p in passes) for passes in self.choice.values()))
        return counts

    def held(self) -> list[Held]:
        """Every layer that will be stored packed."""
        return [_held(x, self.storage(x), self.scale_dtype) for block in self.blocks for x in block]

    def owners(self) -> dict[str, str]:
        """Tensor of the source -> the layer that takes its place."""
        return {f"{linear.name}.weight": linear.name for block in self.blocks for linear in block}

    def quantization_config(self) -> dict[str, Any]:
        """What config.json will say. Raises CompressError for a mix of layers that the format cannot tell apart."""
        ignored = [s.module for s in self.skipped if s.module is not None]
        own = any(linear.own_forward for block in self.blocks for linear in block)
        return self.format.config(self.held(), ignored, own)


def make_plan(
    model: BlockModel,
    recipe: Recipe,
    format: Format,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    blocks: str = "",
    lm_head: bool = False,
    target: str | None = None,
    fallback: bool = False,
) -> Plan:
    """Choose layers, settle the passes, ask the format about each layer, add up sizes.

    Args:
        include, exclude: shell patterns on disk names of layers ("*.mlp.*"); include defaults to all.
        blocks: the blocks to compress ("0-3,-1"); all by default.
        lm_head: compress the output head too, as one more block behind the last.
        target: the client that must be able to load the result (a name in clients.CLIENTS).
        fallback: take our own format where a layer's shape does not fit `format` (the default format refuses, since it
            says which setting would fit).

    Raises:
        CompressError: a pattern that matches nothing, a step that takes no layer, nothing left to compress, a layer the
            format cannot hold, a head that is tied to the embeddings, an architecture most of whose weights are not in
            linear layers.
    """
    everything = [model.linears(i) for i in range(len(model.block_names))]
    names = [linear.name for block in everything for linear in block]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                what = f"pattern {pattern!r} matches none of {len(names)} layers"
                raise CompressError(what, option, f"names look like {names[0]}")
    wanted = Where(tuple(include), tuple(exclude), blocks)
    chosen: list[list[Linear]] = []
    choice: dict[str, tuple[Pass, ...]] = {}
    skipped: list[Skipped] = []
    for i, block in enumerate(everything):
        chosen.append([])
        for linear in block:
            reason = _reason(linear, wanted, i, len(everything))
            passes = recipe.choose(linear.name, i, len(everything)) if reason is None else None
            if passes is None:
                module = linear.param.removesuffix(".weight")
                count = linear.shape[0] * linear.shape[1]
                skipped.append(Skipped(linear.name, count, reason or "kept by the recipe", module))
            else:
                choice[linear.name] = passes
                chosen[-1].append(linear)
    if not any(chosen):
        raise CompressError(f"0 of {len(names)} layers are left", "--include/--exclude", "widen the patterns")
    skipped += _uncovered(model, everything)
    head = _head(model) if lm_head else None
    if head is not None:
        passes = recipe.choose(head.name, len(everything), len(everything))
        if passes is None:
            raise CompressError("no step of the recipe takes the head", "--lm-head", "add one without patterns")
        choice[head.name] = passes
        chosen.append([head])
    weights = model.weights
    for name in model.dense_linears():
        if head is None or head.param != name + ".weight":
            weight = model.model.get_submodule(name).weight
            skipped.append(Skipped(name, weight.numel(), "outside the decoder blocks", name))
    skipped += _unused(model)
    if recipe.transforms and recipe.needs.survey:
        what = "a pass that surveys the whole model looks at it before the transforms of this recipe"
        raise CompressError(what, recipe.name, "use int8 --rule any, or leave the transform out")
    if recipe.transforms and recipe.needs.past:
        what = "the original's inputs are in other units once a transform has rescaled the block's"
        raise CompressError(what, "correct_past", "leave it or the transform out")
    recipe, choice = _settle(recipe, choice, chosen, names)
    first = next(linear for block in chosen for linear in block)
    stored = weights.dtype(first.name + ".weight")
    if fallback and format.name != DEFAULT and not _all_fit(choice, format, chosen, skipped):
        format = FORMATS[OWN]
    scale_dtype = format.scale_dtype(stored)
    refuse(choice, format, (linear for block in chosen for linear in block))

    tensors = weights.checkpoint.tensors
    before = sum(t.nbytes for t in tensors.values())
    gone = sum(tensors[linear.name + ".weight"].nbytes for block in chosen for linear in block)
    packed = sum(
        format.nbytes(chained(choice[linear.name]), linear.shape, scale_dtype) for block in chosen for linear in block
    )
    count = sum(linear.shape[0] * linear.shape[1] for block in chosen for linear in block)
    plan = Plan(
        recipe,
        format,
        scale_dtype,
        chosen,
        choice,
        skipped,
        sum(t.numel for t in tensors.values()),
        count,
        before,
        before - gone + packed,
        8.0 * packed / count,
        _device_estimate(model, chosen, recipe.needs, 1 if recipe.refiner is None else recipe.refiner.window),
    )
    plan.quantization_config()  # refuses now what could not be written later
    if format.container == "gguf":
        gguf_writing.refuse(weights.checkpoint)
    if target is not None:
        clients.refuse(target, format.name, plan.held())
    return plan


def _settle(
    recipe: Recipe, choice: dict[str, tuple[Pass, ...]], chosen: list[list[Linear]], names: Sequence[str]
) -> tuple[Recipe, dict[str, tuple[Pass, ...]]]:
    """Settle every pass for the widths of the layers that it takes. Raises CompressError for one that takes none."""
    settled: dict[int, Pass] = {}
    steps = []
    for i, step in enumerate(recipe.steps):
        method = step.method
        if isinstance(method, Refiner):
            pass
        elif isinstance(method, Transform):
            step = replace(step, method=method.settle(sorted({x.shape[1] for block in chosen for x in block})))
        elif method is not None:
            mine = [x for block in chosen for x in block if any(p is method for p in choice[x.name])]
            if not mine:
                what = f"step {i + 1} ({step.name}) takes none of {len(names)} layers"
                raise CompressError(what, recipe.name, "an earlier step has them, or its patterns match nothing")
            settled[id(method)] = method.settle(sorted({x.shape[1] for x in mine}))
            step = replace(step, method=settled[id(method)])
        steps.append(step)
    return replace(recipe, steps=tuple(steps)), {
        name: tuple(settled[id(p)] for p in passes) for name, passes in choice.items()
    }


def _head(model: BlockModel) -> Linear:
    found = model.head()
    if found is None:
        raise CompressError(
            "the output head is tied to the embeddings", "--lm-head", "leave it out: the head stays dense"
        )
    return found


def _uncovered(model: BlockModel, everything: list[list[Linear]]) -> list[Skipped]:
    """Matrices inside the blocks that no pass can reach. Raises CompressError when they are most of the weights."""
    found = [(n, count) for i in range(len(model.block_names)) for n, count in model.uncovered(i)]
    reached = sum(linear.shape[0] * linear.shape[1] for block in everything for linear in block)
    missed = sum(count for _, count in found)
    if missed > reached:
        raise CompressError(
            f"only {100 * reached / (reached + missed):.0f}% of the blocks' weights are in linear layers "
            f"(largest other: {max(found, key=lambda f: f[1])[0]})",
            str(model.weights.folder),
            "this architecture is not supported",
        )
    return [Skipped(name, count, "not a linear layer") for name, count in found]


def _unused(model: BlockModel) -> list[Skipped]:
    """Matrices in the files that the model does not have: blocks beyond num_hidden_layers, prediction heads."""
    tensors = model.weights.checkpoint.tensors
    found = [(n, tensors[n]) for n in model.unexpected if n in tensors and len(tensors[n].shape) > 1]
    return [Skipped(n, t.numel, "the model has no such parameter") for n, t in found]


def _reason(linear: Linear, wanted: Where, block: int, count: int) -> str | None:
    """Why a layer stays dense, None if it does not."""
    if any(fnmatch.fnmatch(linear.name, p) for p in wanted.exclude):
        return "--exclude"
    if not wanted.holds(linear.name, block, count):
        return "not in --blocks" if replace(wanted, blocks="").holds(linear.name, block, count) else "not in --include"
    if not wanted.layers and ROUTERS.search(linear.name):
        return "routes tokens to experts"
    return None


def _all_fit(
    choice: dict[str, tuple[Pass, ...]], format: Format, chosen: list[list[Linear]], skipped: Sequence[Skipped]
) -> bool:
    """Whether a format holds every layer, and all of them beside each other."""
    layers = [x for block in chosen for x in block]
    if any(format.why_not(chained(choice[x.name]), x.layer_shape) is not None for x in layers):
        return False
    held = [_held(x, chained(choice[x.name]), torch.float32) for x in layers]
    try:
        format.config(held, [s.module for s in skipped if s.module is not None], any(x.own_forward for x in layers))
    except CompressError:
        return False
    return True


def _held(linear: Linear, storage: Storage, dtype: torch.dtype) -> Held:
    return Held(linear.name, linear.param.removesuffix(".weight"), linear.shape, storage, dtype)


def refuse(choice: dict[str, tuple[Pass, ...]], format: Format, linears: Iterable[Linear]) -> None:
    """Raise CompressError for the first layer that the format cannot hold."""
    for linear in linears:
        reason = format.why_not(chained(choice[linear.name]), linear.layer_shape)
        if reason is not None:
            what, _, remedy = reason.partition(": ")
            raise CompressError(what, f"layer {linear.name}", remedy)


def _device_estimate(model: BlockModel, chosen: list[list[Linear]], needs: Needs, together: int) -> int:
    """Bytes: the largest block in the compute dtype, its Hessians, and four float32 copies of its widest layer.

    Args:
        together: blocks that are refined together.
    """
    width = model.dtype.itemsize
    most, outside = 0, 0
    shapes = model.weights.shapes_cache()
    for i, linears in enumerate(chosen):
        block = 0
        for n in model.disk_tensors(i) if i < len(model.block_names) else ():
            count = 1
            for d in shapes[n]:
                count *= d
            block += count * width
        hessians = {(linear.param, linear.expert): linear.shape[1] ** 2 * 4 for linear in linears}
        widest = max((linear.shape[0] * linear.shape[1] * 4 for linear in linears), default=0)
        square = max((linear.shape[1] ** 2 * 4 for linear in linears), default=0)
        need = block + 4 * widest
        if needs.hessian:
            need += sum(hessians.values()) * (4 if needs.past else 1) + 4 * square
        if (
            needs.outputs
        ):  # of each tuned weight its place, squares, the best state, a gradient, what the pass was given
            need += 20 * sum(linear.shape[0] * linear.shape[1] for linear in linears)
        most = max(most, together * need)
    inside = model.block_names[0].rpartition(".")[0] + "."
    for name, parameter in model.model.named_parameters():
        outside += 0 if name.startswith(inside) else int(parameter.numel())
    return most + outside * width


def check_room(out: Path, needed: int) -> None:
    """Raise CompressError unless `out` can be written and its disk has room for `needed` bytes."""
    parent = out.absolute().parent
    try:
        while not parent.exists():
            parent = parent.parent
        probe = parent / f".compress-{out.name}-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        what = f"cannot be written ({error.strerror})"
        raise CompressError(what, str(parent), "choose another folder with -o") from None
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CompressError(
            f"{free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed",
            str(parent),
            "free some space, or choose another disk with -o",
        )
