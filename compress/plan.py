"""What a run will do, from config.json and shard headers alone: layers, sizes, memory, what is left dense and why."""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compress.blocks import ROUTERS, BlockModel, Linear
from compress.errors import CompressError
from compress.formats.base import Format
from compress.packed.uniform import UniformGrid
from compress.types import Needs, Pass, Storage


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
        method: the pass with every setting filled.
        blocks: for each decoder block, the matrices that will be compressed.
        skipped: matrices that stay dense.
        total_weights: all parameters of the checkpoint.
        packed_weights: parameters that will be compressed.
        bytes_before, bytes_after: weight bytes on disk (after: computed from the format).
        bits_per_weight: stored bits for each compressed parameter.
        device_bytes: estimate of the peak on the device.
    """

    method: Pass
    format: Format
    scale_dtype: torch.dtype
    blocks: list[list[Linear]]
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

    def quantization_config(self) -> dict[str, Any]:
        """What config.json will say. Raises CompressError for a mix of layers that the format cannot tell apart."""
        linears = [linear for block in self.blocks for linear in block]
        storages = {linear.param.removesuffix(".weight"): self.method.storage for linear in linears}
        ignored = [s.module for s in self.skipped if s.module is not None]
        return self.format.config(storages, ignored, any(linear.own_forward for linear in linears))


def make_plan(
    model: BlockModel,
    method: Pass,
    format: Format,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    lm_head: bool = False,
) -> Plan:
    """Choose layers, settle the pass, ask the format about each layer, add up sizes.

    Args:
        include, exclude: shell patterns on disk names of layers ("*.mlp.*"); include defaults to all.
        lm_head: compress the output head too, as one more block behind the last.

    Raises:
        CompressError: a pattern that matches nothing, nothing left to compress, a layer the format cannot hold, a head
            that is tied to the embeddings, an architecture most of whose weights are not in linear layers.
    """
    everything = [model.linears(i) for i in range(len(model.block_names))]
    names = [linear.name for block in everything for linear in block]
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                what = f"pattern {pattern!r} matches none of {len(names)} layers"
                raise CompressError(what, option, f"names look like {names[0]}")
    chosen: list[list[Linear]] = []
    skipped: list[Skipped] = []
    for block in everything:
        reasons = {linear: _reason(linear, include, exclude) for linear in block}
        chosen.append([linear for linear, reason in reasons.items() if reason is None])
        skipped += [
            Skipped(x.name, x.shape[0] * x.shape[1], reason, x.param.removesuffix(".weight"))
            for x, reason in reasons.items()
            if reason is not None
        ]
    if not any(chosen):
        raise CompressError(f"0 of {len(names)} layers are left", "--include/--exclude", "widen the patterns")
    skipped += _uncovered(model, everything)
    head = _head(model) if lm_head else None
    if head is not None:
        chosen.append([head])
    weights = model.weights
    for name in model.dense_linears():
        if head is None or head.param != name + ".weight":
            weight = model.model.get_submodule(name).weight
            skipped.append(Skipped(name, weight.numel(), "outside the decoder blocks", name))
    skipped += _unused(model)
    method = method.settle(sorted({linear.shape[1] for block in chosen for linear in block}))
    first = next(linear for block in chosen for linear in block)
    stored = weights.dtype(first.name + ".weight")
    scale_dtype = format.scale_dtype(stored)
    refuse(method.storage, format, (linear for block in chosen for linear in block))

    tensors = weights.checkpoint.tensors
    before = sum(t.nbytes for t in tensors.values())
    gone = sum(tensors[linear.name + ".weight"].nbytes for block in chosen for linear in block)
    packed = sum(layer_bytes(linear, method.storage, format, scale_dtype) for block in chosen for linear in block)
    count = sum(linear.shape[0] * linear.shape[1] for block in chosen for linear in block)
    plan = Plan(
        method,
        format,
        scale_dtype,
        chosen,
        skipped,
        sum(t.numel for t in tensors.values()),
        count,
        before,
        before - gone + packed,
        8.0 * packed / count,
        _device_estimate(model, chosen, method),
    )
    plan.quantization_config()  # refuses now what could not be written later
    return plan


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


def _reason(linear: Linear, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why a layer stays dense, None if it does not."""
    if any(fnmatch.fnmatch(linear.name, p) for p in exclude):
        return "--exclude"
    if include and not any(fnmatch.fnmatch(linear.name, p) for p in include):
        return "not in --include"
    if not include and ROUTERS.search(linear.name):
        return "routes tokens to experts"
    return None


def refuse(storage: Storage, format: Format, linears: Iterable[Linear]) -> None:
    """Raise CompressError for the first layer that the format cannot hold."""
    for linear in linears:
        reason = format.why_not(storage, linear.layer_shape)
        if reason is not None:
            what, _, remedy = reason.partition(": ")
            raise CompressError(what, f"layer {linear.name}", remedy)


def layer_bytes(linear: Linear, storage: Storage, format: Format, scale_dtype: torch.dtype) -> int:
    """Bytes on disk of one layer, by packing it on the meta device."""
    rows, columns = linear.shape
    groups = 1 if storage.group_size == -1 else -(-columns // storage.group_size)
    meta = torch.device("meta")
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=meta)
    scales = torch.empty(rows, groups, dtype=scale_dtype, device=meta)
    zeros = None if storage.symmetric else torch.empty(rows, groups, dtype=torch.uint8, device=meta)
    parts = format.pack(UniformGrid(codes, scales, zeros, storage.bits, storage.group_size))
    return sum(t.numel() * t.element_size() for t in parts.values())


def _device_estimate(model: BlockModel, chosen: list[list[Linear]], method: Pass) -> int:
    """Bytes: the largest block in the compute dtype, its Hessians, and four float32 copies of its widest layer."""
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
        if Needs.HESSIAN in method.needs:
            need += sum(hessians.values()) + 4 * square
        most = max(most, need)
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
