"""Which settings each layer may get, which layers must get the same, and what each setting stores. Before any work."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from compress import clients
from compress import plan as planning
from compress.auto.asked import Ask
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.formats import FORMATS, OWN, holders
from compress.formats.base import Format
from compress.job import Job
from compress.packed.uniform import UniformGrid
from compress.recipe import Recipe, Step, Where, parse
from compress.types import Pass, Transform, defaults

#: that a layer on an integer grid is stored as, in any format
_MOST_TENSORS = 5
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Candidate:
    """One setting. method: with its bits and group size."""

    method: Pass

    @property
    def key(self) -> str:
        """ "3g128", "4row": what measurements are stored under."""
        storage = self.method.storage
        return f"{storage.bits}row" if storage.group_size == -1 else f"{storage.bits}g{storage.group_size}"

    @property
    def words(self) -> str:
        storage = self.method.storage
        size = "a scale a row" if storage.group_size == -1 else f"groups of {storage.group_size}"
        return f"{storage.bits} bits, {size}"


@dataclass(frozen=True)
class Group:
    """Layers that get the same setting.

    Attributes:
        block: of the model; the head's is one more than the last.
        sizes: bytes on disk by candidate; None where a layer of it may not take that one.
    """

    block: int
    linears: tuple[Linear, ...]
    sizes: tuple[int | None, ...]

    @property
    def key(self) -> str:
        """What measurements are stored under: the layer's name, or the first one's with a digest of all."""
        names = "\n".join(x.name for x in self.linears)
        first = self.linears[0].name
        return first if len(self.linears) == 1 else f"{first}+{hashlib.sha256(names.encode()).hexdigest()[:12]}"

    @property
    def weights(self) -> int:
        return sum(x.shape[0] * x.shape[1] for x in self.linears)

    @property
    def parts(self) -> int:
        """How many layers it counts as: all experts of a projection are one."""
        return len({_EXPERT.sub(".experts.*.", x.name) for x in self.linears})

    @property
    def options(self) -> list[int]:
        return [c for c, size in enumerate(self.sizes) if size is not None]

    @property
    def kind(self) -> str:
        """What its layers are in any block: "self_attn.q_proj", "mlp.gate_proj + mlp.up_proj"."""
        names = [re.sub(r"^.*?\.\d+\.", "", _EXPERT.sub(".experts.*.", x.name)) for x in self.linears]
        return " + ".join(dict.fromkeys(names))


@dataclass(frozen=True)
class Field:
    """What there is to choose from.

    Attributes:
        notes: candidates that nobody may take, and why.
        dense_bytes: of the tensors that stay as they are, and of file headers at most.
    """

    candidates: tuple[Candidate, ...]
    groups: tuple[Group, ...]
    format: str
    notes: tuple[str, ...]
    dense_bytes: int

    @property
    def weights(self) -> int:
        return sum(group.weights for group in self.groups)


def base_method(ask: Ask) -> Pass:
    """The pass whose bits and group size are to be chosen. Raises CompressError for one that has none."""
    method = parse(ask.method)
    fields = defaults(method).keys()
    plain = not isinstance(method, Transform) and method.storage.kind == UniformGrid.kind
    if isinstance(method, Transform) or not plain or not {"bits", "group_size"} <= fields or method.storage.activations:
        what = f"{method.name} has no integer grid whose bits and group size could be chosen for each layer"
        raise CompressError(what, "--method", "use gptq or rtn")
    return method


def candidates_of(ask: Ask) -> list[Candidate]:
    """Every bits with every group size, smallest first. Raises CompressError."""
    method: Any = base_method(ask)
    sizes = ask.counts("group_size")
    wrong = [size for size in sizes if size < 1 and size != -1]
    if wrong:
        raise CompressError(f"group size {wrong[0]} is out of range", "--group-size", "use -1 or 1 and more")
    coarse = sorted(sizes, key=lambda size: -size if size > 0 else float("-inf"))
    return [Candidate(replace(method, bits=b, group_size=g)) for b in ask.counts("bits") for g in coarse]


def survey(model: BlockModel, job: Job, ask: Ask, wanted: str) -> Field:
    """Ask the format and the target about every layer and candidate; tie layers; count bytes.

    Args:
        wanted: the format's name, or "auto".

    Raises:
        CompressError: no candidate is left (for all layers, or for one), a client or format that refuses the mix.
    """
    found, notes, name = _for_client(candidates_of(ask), wanted, job.target)
    format = FORMATS[name]
    job = replace(job, format=name, fallback=False)
    chosen = planning.make_plan(
        model, Recipe.of(found[0].method), FORMATS[OWN], job.include, job.exclude, job.blocks, job.lm_head
    )
    first = next(x for block in chosen.blocks for x in block)
    dtype = format.scale_dtype(model.weights.dtype(first.name + ".weight"))
    groups = []
    for block, linears in enumerate(chosen.blocks):
        for tied in _ties(linears, job.target):
            sizes = tuple(_size(format, c, tied, dtype) for c in found)
            if all(size is None for size in sizes):
                reason = _reason(format, found[0], tied) or "its layers fit different settings"
                what, _, remedy = reason.partition(": ")
                remedy = "use --format native" if tied[0].transposed else remedy  # others that hold it hold no mix
                raise CompressError(f"no candidate fits: {what}", f"layer {tied[0].name}", remedy)
            groups.append(Group(block, tuple(tied), sizes))
    used = [c for c in range(len(found)) if any(group.sizes[c] is not None for group in groups)]
    notes += [f"{found[c].words}: fits no layer" for c in range(len(found)) if c not in used]
    groups = [replace(group, sizes=tuple(group.sizes[c] for c in used)) for group in groups]
    field = Field(tuple(found[c] for c in used), tuple(groups), name, tuple(notes), _dense_bytes(model, format, groups))
    trial = [group.options[i % len(group.options)] for i, group in enumerate(groups)]
    mixed = planning.make_plan(  # refuses now what could not be written later: a mix that the format or client lacks
        model, recipe_of(field, trial), format, job.include, job.exclude, job.blocks, job.lm_head, job.target
    )
    assert sum(group.sizes[c] or 0 for group, c in zip(groups, trial, strict=True)) == _packed(mixed)
    _readable(mixed)
    return field


def _readable(plan: planning.Plan) -> None:
    """Raise CompressError for a layer whose setting readers would not find in config.json.

    compressed-tensors names modules there, and fused experts are none: transformers then reads all of them alike.
    """
    config = plan.quantization_config()
    for linear in (x for block in plan.blocks for x in block):
        try:
            plan.format.activations(linear.name, config)
        except CompressError:
            what = f"{plan.format.name} cannot say which of several settings the experts have"
            raise CompressError(
                what, f"layer {linear.name}", "use --format native, or one --bits and one --group-size"
            ) from None


def _packed(plan: planning.Plan) -> int:
    """Bytes of the compressed layers of a plan."""
    return round(plan.bits_per_weight * plan.packed_weights / 8)


def _for_client(given: list[Candidate], wanted: str, target: str | None) -> tuple[list[Candidate], list[str], str]:
    """The candidates that a client reads from some format, notes on the others, and the format for all of them."""
    if target is not None and target not in clients.CLIENTS:
        raise CompressError(f"no client {target!r}", "--target", f"there are {', '.join(clients.CLIENTS)}")

    def refusal(candidate: Candidate, name: str | None) -> str | None:
        storage = candidate.method.storage
        tried = [name] if name else [*holders(storage), OWN]
        reasons = [None if target is None else clients.why_not(target, one, storage) for one in tried]
        return None if None in reasons else next(reason for reason in reasons if reason)

    fixed = None if wanted == "auto" else wanted
    kept = [c for c in given if refusal(c, fixed) is None]
    name = clients.pick(wanted, [c.method.storage for c in kept], target)
    notes = [f"{c.words}: {refusal(c, fixed)}" for c in given if c not in kept]
    kept, before = [c for c in kept if refusal(c, name) is None], kept
    notes += [f"{c.words}: {refusal(c, name)}" for c in before if c not in kept]
    if not kept:
        what, _, remedy = notes[0].partition(": ")[2].partition(": ")
        raise CompressError(f"no candidate is left: {what}", "--bits / --group-size", remedy)
    return kept, notes, name


def _size(format: Format, candidate: Candidate, linears: Sequence[Linear], dtype: Any) -> int | None:
    """Bytes of these layers under a candidate, None where one of them may not take it."""
    if _reason(format, candidate, linears) is not None:
        return None
    return sum(format.nbytes(candidate.method.storage, x.shape, dtype) for x in linears)


def _reason(format: Format, candidate: Candidate, linears: Sequence[Linear]) -> str | None:
    storage = candidate.method.storage
    for linear in linears:
        if storage.group_size > linear.shape[1]:
            return f"group size {storage.group_size} is larger than in_features {linear.shape[1]}: use a smaller one"
        reason = format.why_not(storage, linear.layer_shape)
        if reason is not None:
            return reason
    return None


def _ties(linears: Sequence[Linear], target: str | None) -> list[list[Linear]]:
    """The layers of a block by what must be stored alike.

    Experts of one fused parameter share one entry in config.json; a client that runs layers as one (`clients.tied`)
    also runs all experts of a block as one.
    """
    label = {x.name: x.name for x in linears}
    for names in clients.tied(target, [x.name for x in linears if not _EXPERT.search(x.name)]):
        label |= dict.fromkeys(names, names[0])
    for linear in linears:
        if _EXPERT.search(linear.name):
            projection = _EXPERT.sub(".experts.*.", linear.name) if linear.expert is None else linear.param
            label[linear.name] = linear.name.partition(".experts.")[0] if target in clients.SERVERS else projection
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(label[linear.name], []).append(linear)
    return list(groups.values())


def _dense_bytes(model: BlockModel, format: Format, groups: Iterable[Group]) -> int:
    """What is stored beside the packed layers, at most: dense tensors, and what headers say of all tensors."""
    tensors = model.weights.checkpoint.tensors
    packed = {x.name for group in groups for x in group.linears}
    dense = [(n, t.nbytes) for n, t in tensors.items() if n.removesuffix(".weight") not in packed]
    entry = len('"":{"dtype":"BF16","shape":[],"data_offsets":[,]},') + 60  # numbers of up to 15 digits
    suffixes = sorted(format.suffixes, key=len)[-_MOST_TENSORS:]
    names = [n for n, _ in dense] + [f"{n}.{suffix}" for n in packed for suffix in suffixes]
    files = len(model.block_names) + 2 + sum(size for _, size in dense) // 10**9
    return sum(size for _, size in dense) + sum(len(n) + entry for n in names) + 128 * files


def recipe_of(field: Field, choice: Sequence[int], options: dict[str, Any] | None = None) -> Recipe:
    """The recipe that gives each group its candidate: a step a candidate, with exact names (experts by a pattern)."""
    everything = [x.name for group in field.groups for x in group.linears]
    steps = []
    for c, candidate in enumerate(field.candidates):
        mine = [x.name for group, pick in zip(field.groups, choice, strict=True) if pick == c for x in group.linears]
        if mine:
            steps.append(Step(candidate.method, Where(layers=_patterns(mine, everything))))
    return Recipe(tuple(steps), "auto", options or {})


def _patterns(mine: Sequence[str], everything: Sequence[str]) -> tuple[str, ...]:
    """`mine` as patterns that match nothing else: names, with one pattern for all experts where that is exact."""
    found: dict[str, list[str]] = {}
    for name in mine:
        found.setdefault(_EXPERT.sub(".experts.*.", name), []).append(name)
    out: list[str] = []
    for pattern, names in found.items():
        exact = pattern == names[0] or len(fnmatch.filter(everything, pattern)) == len(names)
        out += [pattern] if exact else names
    return tuple(out)
