"""`compress verify`: everything that can be checked of a folder, whoever wrote it, with or without the original."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from compress.asking import ask
from compress.blocks import BlockModel, refuse_infinite
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.output import read_record
from compress.verify import check_hashes, layers, same
from compress.weights import Weights

_AGAIN = "copy the folder again, or compress again"


def examine(
    folder: Path,
    against: Path | None = None,
    *,
    client: bool = True,
    device: torch.device | None = None,
    trust_remote_code: bool = False,
    step: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Check a checkpoint folder.

    Args:
        against: the original: its other tensors must be in the folder, and each layer's distance from it is told.
        client: load it through the client that reads its format, where that is installed.
        device: where layers are unpacked and the client is asked.
        step: called with (packed layers read, packed layers in all).

    Returns:
        what was found to be right, a line each.

    Raises:
        CompressError: the first fault.
    """
    record = read_record(folder) if folder.is_dir() else None
    found = []
    if record is None:
        found.append("files: no compress.json, so no list of sha256 to compare with (another tool's, or an older one)")
    else:
        found.append(f"files: {check_hashes(folder)} have the sha256 that compress.json lists")
    weights = Weights(Checkpoint.open(folder))
    original = None if against is None else Weights(Checkpoint.open(against))
    turned = set() if original is None else _turned(original, trust_remote_code)
    distances: dict[str, float] = {}
    seen = 0

    def look(name: str, dense: Tensor) -> None:
        nonlocal seen
        refuse_infinite(dense, name)
        if original is not None:
            distances[name] = _distance(original, name, dense, name in turned)
        seen += 1
        step(seen, len(weights.packed))

    records = None if record is None else record.get("layers")
    if isinstance(records, list) and weights.format_name is not None:
        layers(weights, records, _AGAIN, look, device or torch.device("cpu"))
        found.append(f"layers: {seen} dequantise to the last bit to what was recorded when they were written")
    else:
        for name in sorted(weights.packed):
            look(name, weights.read(name + ".weight"))
        found.append(f"layers: {seen} packed ones dequantise, all values are finite")
    model = BlockModel(weights, torch.float32, torch.device("cpu"), trust_remote_code)
    count = sum(1 for _ in model.model.named_parameters())
    unused = [n for n in model.unexpected if n not in weights.owners()]
    found.append(
        f"model: all {count} parameters are filled" + (f"; {len(unused)} tensors belong to none" if unused else "")
    )
    if original is not None:
        found += _beside(weights, original, distances, set((record or {}).get("changed") or ()))
    if client:
        found.append(f"client: {ask(folder, None, device or torch.device('cpu'), trust_remote_code).line()}")
    return found


def _turned(original: Weights, trust_remote_code: bool) -> set[str]:
    """The layers that a model keeps as [in, out]."""
    model = BlockModel(original, torch.float32, torch.device("cpu"), trust_remote_code)
    return {x.name for block in range(len(model.block_names)) for x in model.linears(block) if x.transposed}


def _distance(original: Weights, name: str, dense: Tensor, turned: bool) -> float:
    """Of a layer's weights from the original's, which may keep them as [in, out], relative to their norm."""
    if name + ".weight" not in original.shapes_cache():
        raise CompressError("the original has no such layer", name, "pass the model that this one was made from")
    before = original.read(name + ".weight").double()
    if turned:
        before = before.t()
    if before.shape != dense.shape:
        what = f"is {list(dense.shape)}, the original's is {list(before.shape)}"
        raise CompressError(what, name, "pass the model that this one was made from")
    norm = float(before.norm())
    return float((dense.double() - before).norm()) / norm if norm else 0.0


def _beside(weights: Weights, original: Weights, distances: dict[str, float], changed: set[str]) -> list[str]:
    """What stands beside the packed layers must be the original's; how far those are from it."""
    out = []
    if distances:
        worst = max(distances, key=lambda n: distances[n])
        mean = sum(distances.values()) / len(distances)
        out.append(
            f"weights: {100 * mean:.2f}% of their norm away from the original's on average, at most "
            f"{100 * distances[worst]:.2f}% ({worst})"
        )
    owners, equal = weights.owners(), 0
    packed = {f"{layer}.weight" for layer in weights.packed}
    for name in original.shapes_cache():
        if name in packed or name in changed or name in owners:
            continue
        if not same(weights, name, original.read(name)):
            what = "is not in the files" if name not in weights.checkpoint.tensors else "is not the original's"
            raise CompressError(what, name, "pass the model that this one was made from")
        equal += 1
    rescaled = f"; {len(changed)} were changed by a transform" if changed else ""
    out.append(f"other tensors: {equal} equal the original's to the last byte{rescaled}")
    return out
