"""The original of a run, found again: where the record says, or where the user says; and proved to be the one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.assets import folder as assets
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.verify import same
from compress.weights import Weights

#: tensors beside the packed layers are compared up to this size: enough to know a model by
_SMALL = 1 << 22


def find(
    record: Mapping[str, Any], folder: Path, weights: Weights, against: Sequence[Path]
) -> tuple[Weights | None, str]:
    """The original's weights, or None and why not.

    Args:
        folder, weights: the compressed model.
        against: where the user says that originals are.
    """
    name = str(record["source"].get("name") or "")
    refused = ""
    for place in _places(name, folder, record, against):
        try:
            found = Weights(Checkpoint.open(place))
        except CompressError as error:
            refused = refused or error.line()
            continue
        wrong = _differs(found, weights, record)
        if not wrong:
            return found, ""
        refused = refused or f"{place.name} is not the original: {wrong}"
    what = refused or f"the original {name!r} is not on this machine any more"
    return None, f"{what}; --against FOLDER names it"


def _places(name: str, folder: Path, record: Mapping[str, Any], against: Sequence[Path]) -> Iterator[Path]:
    """Folders that may hold the original, likeliest first. Nothing is downloaded."""
    yield from against
    told = record["source"].get("folder")
    if isinstance(told, str) and Path(told).exists():
        yield Path(told)
    if name == "bundled":
        yield assets("calib") / "tiny"
    if not name or name in (".", ".."):
        return
    for place in (Path(name).expanduser(), folder.resolve().parent / Path(name).name):
        if place.is_dir() and place.resolve() != folder.resolve():
            yield place
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        yield from _cached(name)


def _cached(name: str) -> Iterator[Path]:
    """The snapshot of a hub model that is on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        yield Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return


def _differs(original: Weights, weights: Weights, record: Mapping[str, Any]) -> str:
    """What shows that this is another model; "" if nothing does."""
    shapes = original.shapes_cache()
    for layer in record["layers"]:
        name = f"{layer['name']}.weight"
        if name not in shapes:
            return f"it has no {name}"
        if sorted(shapes[name]) != sorted(layer.get("shape") or shapes[name]):
            return f"its {name} is {list(shapes[name])}"
    skip = {*weights.owners(), *original.owners(), *(record.get("changed") or ())}
    for name, stored in original.checkpoint.tensors.items():
        if name not in skip and stored.nbytes <= _SMALL and name in weights.checkpoint.tensors:
            if f"{name.removesuffix('.weight')}" in {x["name"] for x in record["layers"]}:
                continue  # written as ordinary weights, compressed all the same
            if not same(weights, name, original.checkpoint.read(name)):
                return f"its {name} has other values"
    return ""
