"""One decoder block in rotated coordinates: its layers are turned by the roles that they play, and the block is proved.

A block is run in float32 on random hidden states before and after; where the rotated output is not the rotation of the
output, it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.folding.tap import Block, Node, parts_of
from compress.rotation.asked import INSTEAD, ROWS, TOKENS, TOLERANCE, Made, Rotation
from compress.rotation.matrices import Orthogonal, rotation
from compress.rotation.outside import final_norm
from compress.rotation.roles import Roles, find_roles, kind_of, turned


def rotate_block(
    model: BlockModel, block: int, settings: Rotation, matrix: Orthogonal | None, known: dict[Any, Roles]
) -> Made:
    """Rotate a block and prove it. Raises CompressError where its function would change.

    Args:
        known: what was found in earlier blocks; one of the same kind is first tried with it.
    """
    seed = (settings.seed + 1) * 1_000_003 + block  # of this block's heads
    for again in (False, True):
        model.load(block)
        try:
            room = _room(model, block)
            kind = kind_of(room)
            tried = known.get(kind)
            roles = find_roles(room, settings.residual, settings.heads) if tried is None or again else tried
            matrices = [rotation(heads.width, settings.kind, seed) for heads in roles.heads]
            made = _turn(room, roles, matrix, matrices)
        finally:
            model.free(block)
        if made.record["error"] <= TOLERANCE:
            known[kind] = roles
            return made
        if tried is None:
            break
    what = f"rotated, its output moves by {made.record['error']:.0e} of what it adds to the residual stream"
    remedy = "this architecture is not supported" if matrix is None else INSTEAD
    raise CompressError(f"{what}, {TOLERANCE:.0e} is allowed", model.block_names[block], remedy)


def _room(model: BlockModel, block: int) -> Block:
    """A loaded block with random hidden states."""
    hidden = torch.randn(ROWS, TOKENS, model.hidden_size, generator=torch.Generator().manual_seed(0))
    return Block(model, block, hidden.to(model.device))


def looked_at(model: BlockModel, settings: Rotation) -> dict[Any, Roles]:
    """The roles in block 0, by its kind. Raises CompressError for most models that are refused, before any writing."""
    model.embed(torch.zeros((ROWS, TOKENS), dtype=torch.int64))  # shows how blocks are called
    if settings.residual:
        final_norm(model)
    model.rest()
    model.load(0)
    try:
        room = _room(model, 0)
        return {kind_of(room): find_roles(room, settings.residual, settings.heads)}
    finally:
        model.free(0)


def _turn(room: Block, roles: Roles, matrix: Orthogonal | None, matrices: Sequence[Orthogonal]) -> Made:
    """Rotate the weights of a loaded block in place, and compare its outputs: in float32, then as they are stored."""
    model, cut = room.model, len(room.prefix)
    plain = room.output()
    made = Made({}, {"name": room.prefix.rstrip("."), "untied": False, "added_bytes": 0, "rounding": None})
    places: dict[str, Linear | str] = {}

    def put(name: str, place: Linear | str, value: Tensor) -> None:
        if isinstance(place, Linear):
            model.set_weight(place, value)
            value = value.t() if place.transposed else value
        else:
            model.model.get_parameter(place).data.copy_(value)
        places[name] = place
        made.tensors[name] = value.to(model.weights.dtype(name)).contiguous().cpu()

    counts = {"gains": len(roles.gains), "readers": 0, "writers": 0, "heads": sum(len(h.rows) for h in roles.heads)}
    zeros = weights = 0
    for node in room.nodes.values():
        change = _change(room, node, roles, matrix, matrices)
        if change is None:
            continue
        counts["readers"] += len(node.linears) * (node.param[cut:] in roles.readers)
        counts["writers"] += len(node.linears) * (node.param[cut:] in roles.writers)
        for linear in node.linears:
            old = model.weight(linear).double()
            zeros, weights = zeros + int((old == 0).sum()), weights + old.numel()
            name = parts_of(model, node.param)[0] if linear.expert is None else f"{linear.name}.weight"
            put(name, linear, change(old, False))
        if node.bias is not None:
            bias = model.model.get_parameter(node.bias).data.double()
            if not torch.equal(new := change(bias, True), bias):
                put(parts_of(model, node.bias)[0], node.bias, new)
    for gain, offset in roles.gains.items():
        param = f"{room.prefix}{gain}.weight"
        put(parts_of(model, param)[0], param, torch.full_like(model.model.get_parameter(param).data, 1 - offset))
    if zeros > weights / 10:
        made.notes.append("weights that were 0, more than a tenth, are no longer: a rotation undoes pruning")
    made.record |= counts | {"error": _moved(room, plain, matrix)}
    if any(value.dtype != torch.float32 for value in made.tensors.values()):
        for name, place in places.items():
            value = made.tensors[name].to(model.device)
            if isinstance(place, Linear):
                model.set_weight(place, value.t() if place.transposed else value)
            else:
                model.model.get_parameter(place).data.copy_(value)
        made.record["rounding"] = _moved(room, plain, matrix)
    return made


def _change(
    room: Block, node: Node, roles: Roles, matrix: Orthogonal | None, matrices: Sequence[Orthogonal]
) -> Callable[[Tensor, bool], Tensor] | None:
    """What happens to a node: a function of a matrix [out, in], or (True) of its bias; None for nothing."""
    cut = len(room.prefix)
    name = node.param[cut:]
    norm, writes = roles.readers.get(name), name in roles.writers
    pairs = list(zip(roles.heads, matrices, strict=True))
    made, read = [p for p in pairs if p[0].maker == name], [p for p in pairs if p[0].reader == name]
    if norm is None and not (writes or made or read):
        return None
    gain = None
    if norm is not None:
        gain = room.model.model.get_parameter(f"{room.prefix}{norm}.weight").data.double() + roles.gains[norm]

    def change(value: Tensor, bias: bool) -> Tensor:
        if matrix is not None and gain is not None and not bias:
            value = matrix.times(value * gain)
        for heads, turn in read:
            value = value if bias else turned(value, heads, turn, makes=False)
        for heads, turn in made:
            value = turned(value, heads, turn, makes=True)
        if matrix is not None and writes:
            value = matrix.times(value) if bias else matrix.before(value)
        return value

    return change


def _moved(room: Block, plain: Tensor, matrix: Orthogonal | None) -> float:
    """How far the block's output on rotated hidden states is from the rotation of `plain`, token by token.

    As a share of what the block adds to the stream (of a thousandth of the stream, if that is more: float32 shows no
    less). Where tokens go to experts, which rounding may change, the quarter of them that moved most is left out.
    """
    hidden, want = room.hidden, plain
    if matrix is not None:
        want = matrix.times(plain).float()
    kept, room.hidden = hidden, hidden if matrix is None else matrix.times(hidden).float()
    try:
        now = room.output()
    finally:
        room.hidden = kept
    added = (plain - hidden).flatten(0, -2).norm(dim=-1).square().mean().sqrt()
    size = torch.maximum(added, 1e-3 * plain.flatten(0, -2).norm(dim=-1).mean())
    share = 0.75 if any(node.experts for node in room.nodes.values()) else 1.0
    return float((now - want).flatten(0, -2).norm(dim=-1).quantile(share) / size)


# -- embeddings, final norm, head ---------------------------------------------------------------------------------
