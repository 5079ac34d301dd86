"""A packed checkpoint in another format: the same codes, zero points and scales, nothing rounded again.

Where the other format cannot hold them as they are, what would be lost is said and nothing is written, unless it is
allowed (`lossy`). Layers are read, converted and written one block at a time; a stopped export goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import clients
from compress.asking import ask, model_dtype
from compress.blocks import BlockModel, Linear
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.formats import FORMATS, OWN
from compress.formats.base import Format, Held
from compress.gguf import writer as gguf_writing
from compress.journal import Journal
from compress.output import assemble, read_record, seal
from compress.packed.affine import Affine
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage
from compress.verify import Proof, digest, verify
from compress.weights import Weights

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Way:
    """How a layer gets into another format.

    Attributes:
        change: the packed layer as the format can hold it.
        storage: of the changed layer.
        loss: what does not survive; "" for nothing.
    """

    change: Callable[[Packed], Packed]
    storage: Storage
    loss: str = ""


@dataclass
class Exported:
    """What an export did.

    Attributes:
        layers: packed layers written.
        largest_change: of a layer's dequantised weights, relative to their norm; 0 where only codes were moved.
        losses: what was lost, each with the number of layers.
        proof: what was verified; None where that was not wanted.
    """

    out: Path
    format: str
    layers: int
    largest_change: float = 0.0
    losses: dict[str, int] = field(default_factory=dict)
    proof: Proof | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        proof = None if self.proof is None else {**vars(self.proof), "clients": list(self.proof.clients)}
        return {**vars(self), "out": str(self.out), "proof": proof}


def export(
    source: Path,
    out: Path,
    format: str,
    *,
    lossy: bool = False,
    target: str | None = None,
    overwrite: bool = False,
    check: bool = True,
    client: bool = True,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    step: Step = lambda done, total: None,
) -> Exported:
    """Write the checkpoint in `source` to `out` in another format.

    Args:
        format: a name in the FORMATS table.
        lossy: go on where something is lost.
        target: the client that must be able to load the result (a name in clients.CLIENTS).
        check: read the result back.
        client: and load it through its client.
        device: where the client is asked.

    Raises:
        CompressError: something would be lost, a layer that the format cannot hold, or anything a user can mend;
            nothing is left under the final name.
    """
    if format not in FORMATS:
        raise CompressError(f"no format {format!r}", "--format", f"there are {', '.join(FORMATS)}")
    form, weights = FORMATS[format], Weights(Checkpoint.open(source))
    if not weights.packed and format not in ("gguf", "dense"):
        what = "nothing in it is packed, so there are no codes to move"
        raise CompressError(what, str(source), "compress it first: `compress methods` lists how")
    model = BlockModel(weights, torch.float32, torch.device("cpu"), trust_remote_code)
    blocks = packed_blocks(model, weights)
    dtype = stored_dtype(form, weights)
    ways = {x.name: plan(weights.storage(x.name), form, x) for block in blocks for x in block}
    done = Exported(out, format, len(ways))
    for way in ways.values():
        if way.loss:
            done.losses[way.loss] = done.losses.get(way.loss, 0) + 1
    refuse_losses(done.losses, lossy, source)
    held = [
        Held(x.name, x.param.removesuffix(".weight"), x.shape, ways[x.name].storage, dtype) for b in blocks for x in b
    ]
    quantization = form.config(held, left_dense(model, held), any(x.own_forward for b in blocks for x in b))
    if form.container == "gguf":
        gguf_writing.describe(weights.checkpoint)  # refuses a model or a tokenizer that the file cannot describe
    if target is not None:
        clients.refuse(target, format, held)

    with Journal(out, overwrite, source) as journal:
        sources = weights.checkpoint.fingerprint()
        ready = journal.start(lambda: {"export": format, "checkpoint": sources}, fresh=False)
        for number, block in enumerate(blocks):
            if number >= ready:
                tensors: dict[str, Tensor] = {}
                records = []
                for linear in block:
                    packed = weights.read_packed(linear.name)
                    record, stored = _convert(packed, ways[linear.name], form, dtype, linear)
                    tensors |= stored
                    records.append(record)
                refuse_losses(_counted(records), lossy, source)
                journal.add(number, tensors, records)
            step(number + 1, len(blocks))
        records, _, _ = journal.everything(len(blocks))
        done.losses = _counted(records)
        done.largest_change = max((r["relative_change"] for r in records), default=0.0)
        owners = {n: layer for n, layer in weights.owners().items() if layer in ways}
        packed_tensors = {n: s for block in range(len(blocks)) for n, s in journal.tensors(block).items()}
        files = [journal.written(block) for block in range(len(blocks))]
        hashes = assemble(journal.final, form, quantization, weights.checkpoint, owners, packed_tensors, files)
        if check:
            done.proof = verify(
                journal.final, records, weights.checkpoint, trust_remote_code, owned=owners, hashes=hashes,
                device=device or torch.device("cpu"),
            )  # fmt: skip
            if client:
                answer = ask(journal.final, None, device or torch.device("cpu"), trust_remote_code)
                done.proof = replace(done.proof, clients=(answer.line(),))
        _finish(journal.final, source, done, records, weights.format_name or "dense", hashes)
        journal.publish()
    return done


def stored_dtype(form: Format, weights: Weights) -> torch.dtype:
    """Of the scales in the new files; our own format takes any, so there they stay what they are."""
    if form.name == OWN and weights.packed:
        return weights.dtype(min(weights.packed) + ".weight")
    return form.scale_dtype(model_dtype(weights))


def plan(storage: Storage, form: Format, linear: Linear) -> Way:
    """The first way into a format. Raises CompressError when there is none."""
    first = None
    for way in ways_of(storage, form):
        reason = form.why_not(way.storage, linear.layer_shape)
        if reason is None:
            return way
        first = first or reason
    assert first is not None
    what, _, remedy = first.partition(": ")
    raise CompressError(what, f"layer {linear.name}", remedy)


def ways_of(storage: Storage, form: Format) -> Iterator[Way]:
    """What a layer may be changed to, the least change first."""
    yield Way(lambda p: p, storage)
    if storage.kind == Sparse.kind and storage.inner is not None:
        for way in ways_of(storage.inner, form):  # its zeros are codes of level 0 in the layer inside
            yield replace(way, change=_behind(way.change))
        return
    if storage.kind != UniformGrid.kind:
        return
    if storage.symmetric and not storage.activations and storage.bits not in (4, 8):
        for wider in (b for b in (4, 8) if b > storage.bits):
            yield Way(partial(widened, bits=wider), replace(storage, bits=wider))
    if not storage.symmetric and storage.bits <= 4 and form.container == "gguf":
        loss = "zero points, which become a minimum a group, rounded to float16"
        affine = Storage(Affine.kind, storage.bits, storage.group_size, symmetric=False)
        yield Way(as_affine, affine, loss)
    if storage.activations:
        plain = replace(storage, activations="")
        loss = "the 8-bit activations: only the weights stay quantised"
        yield Way(lambda p: replace(_uniform(p), activations=""), plain, loss)


def widened(packed: Packed, bits: int) -> UniformGrid:
    """The same symmetric grid in wider codes: code - 2^(b-1) stays what it was."""
    grid = _uniform(packed)
    assert grid.zeros is None
    assert bits > grid.bits
    return replace(grid, codes=grid.codes + (2 ** (bits - 1) - 2 ** (grid.bits - 1)), bits=bits)


def as_affine(packed: Packed) -> Affine:
    """An asymmetric grid with a minimum, -scale * zero, in place of each zero point; in float16, as Q4_1 has them."""
    grid = _uniform(packed)
    assert grid.zeros is not None
    minima = -(grid.scales.double() * grid.zeros.double())
    return Affine(grid.codes, grid.scales.half(), minima.half(), grid.bits, grid.group_size)


def _behind(change: Callable[[Packed], Packed]) -> Callable[[Packed], Packed]:
    """The change of what a sparse layer holds."""

    def both(packed: Packed) -> Packed:
        assert isinstance(packed, Sparse)
        return change(packed.inner)

    return both


def _uniform(packed: Packed) -> UniformGrid:
    assert isinstance(packed, UniformGrid)
    return packed


def _convert(
    packed: Packed, way: Way, form: Format, dtype: torch.dtype, linear: Linear
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A layer's record and its tensors by their names on disk."""
    if packed.storage != way.storage and packed.storage.ordered_groups:  # config.json did not say so
        way = plan(packed.storage, form, linear)
    changed = way.change(packed)
    loss = way.loss
    if isinstance(changed, UniformGrid) and form.quantised and changed.scales.dtype != dtype:
        changed, rounded = _rounded(changed, dtype)
        loss = loss or rounded
    tensors = form.pack(changed)
    before, after = packed.dequantize(), changed.dequantize()
    if linear.transposed and not form.quantised:
        tensors = {s: t.t().contiguous() for s, t in tensors.items()}
    nbytes = sum(t.nbytes for t in tensors.values())
    norm = float(before.double().norm())
    record = {
        "name": linear.name,
        "shape": list(linear.shape),
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (linear.shape[0] * linear.shape[1]),
        "relative_change": float((after.double() - before.double()).norm()) / norm if norm else 0.0,
        "loss": loss,
        "notes": [],
        "sha256_dense": digest(after),
        **({"transposed": True} if linear.transposed and not form.quantised else {}),
    }
    return record, {f"{linear.name}.{s}": t for s, t in tensors.items()}


def _rounded(grid: UniformGrid, dtype: torch.dtype) -> tuple[UniformGrid, str]:
    """The scales in another dtype, and what that loses: nothing where every one comes back."""
    scales = grid.scales.to(dtype)
    exact = bool((scales.double() == grid.scales.double()).all())
    names = [str(d).removeprefix("torch.") for d in (grid.scales.dtype, dtype)]
    return replace(grid, scales=scales), "" if exact else f"scales, which are {names[0]} and are stored as {names[1]}"


def _counted(records: list[dict[str, Any]]) -> dict[str, int]:
    losses: dict[str, int] = {}
    for record in records:
        if record["loss"]:
            losses[record["loss"]] = losses.get(record["loss"], 0) + 1
    return losses


def refuse_losses(losses: Mapping[str, int], allowed: bool, where: Path) -> None:
    """Raise CompressError for what would be lost, unless it may be."""
    if losses and not allowed:
        what = "; ".join(f"{loss} ({count} layers)" for loss, count in losses.items())
        raise CompressError(f"not lossless, it would round or drop: {what}", str(where), "pass --lossy to do it")


def packed_blocks(model: BlockModel, weights: Weights) -> list[list[Linear]]:
    """The packed layers by block, the head behind the last."""
    blocks = [[x for x in model.linears(i) if x.name in weights.packed] for i in range(len(model.block_names))]
    head = model.head()
    if head is not None and head.name in weights.packed:
        blocks.append([head])
    found = {x.name for block in blocks for x in block}
    lost = sorted(weights.packed - found)
    if lost:
        what = f"{len(lost)} packed layers are no part of the model's blocks"
        raise CompressError(what, lost[0], "this checkpoint cannot be exported")
    return blocks


def left_dense(model: BlockModel, held: list[Held]) -> list[str]:
    """Modules of linear layers that stay dense."""
    packed = {h.module for h in held}
    every = [x.param.removesuffix(".weight") for i in range(len(model.block_names)) for x in model.linears(i)]
    return [n for n in dict.fromkeys([*every, *model.dense_linears()]) if n not in packed]


def _finish(
    folder: Path, source: Path, done: Exported, records: list[dict[str, Any]], before: str, hashes: Mapping[str, str]
) -> None:
    """The record and the card: what the source's said, and what was moved."""
    from compress import __version__
    from compress.writer import write_text

    earlier = {k: v for k, v in (read_record(source) or {}).items() if k != "sha256"}
    moved = {"from": before, "to": done.format, "losses": done.losses, "largest_change": done.largest_change}
    proof = None if done.proof is None else vars(done.proof)
    old_card = source / "README.md"
    card = old_card.read_text(encoding="utf-8", errors="replace") if old_card.is_file() else ""
    write_text(folder / "README.md", f"{card}\n## Moved to another format\n\n{_words(done, before)}\n")
    seal(
        folder,
        {**earlier, "compress": __version__, "format": done.format, "export": moved, "verified": proof}
        | {"layers": records},
        hashes,
    )


def _words(done: Exported, before: str) -> str:
    lost = "; ".join(f"{loss} ({count} layers)" for loss, count in done.losses.items())
    what = f"{done.layers} packed layers were moved from {before} to {done.format} by `compress export`, "
    if not lost:
        return what + "every code, scale and zero point as it was."
    return what + f"with rounding: {lost}. The largest relative change of a layer is {done.largest_change:.1e}."
