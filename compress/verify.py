"""Does the folder hold what the solver returned? Asked of the files, after every write."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel, refuse_infinite
from compress.checkpoint import Checkpoint, hash_files, tensor_bytes
from compress.errors import CompressError
from compress.output import RECORD, WEIGHT_FILES, read_record
from compress.weights import Weights


@dataclass(frozen=True)
class Proof:
    """What was checked.

    Attributes:
        layers: packed layers whose dequantised weights equal the solver's to the last bit.
        copied: dense tensors equal to the source's to the last byte.
        parameters: parameters of the model that the files fill, none missing.
    """

    layers: int
    copied: int
    parameters: int


def digest(dense: Tensor) -> str:
    """sha256 of a dequantised weight's bytes."""
    return hashlib.sha256(tensor_bytes(dense.cpu())).hexdigest()


def verify(
    folder: Path,
    records: list[dict[str, Any]],
    source: Checkpoint,
    trust_remote_code: bool = False,
    changed: Mapping[str, str] | None = None,
) -> Proof:
    """Re-read a folder and compare.

    Args:
        records: with "name" and "sha256_dense" of each packed layer, as the solver returned it.
        source: the original, whose other tensors must have been copied.
        changed: sha256 of the dense tensors that a transform replaced, by name.

    Raises:
        CompressError: the first difference.
    """
    written = Weights(Checkpoint.open(folder))
    expected = {r["name"]: r["sha256_dense"] for r in records}
    if written.packed != set(expected):
        wrong = sorted(written.packed ^ set(expected))[0]
        raise CompressError("packed in the files or in the records, not in both", wrong, "run again with --fresh")
    for name, sha in expected.items():
        if digest(written.read(name + ".weight")) != sha:
            raise CompressError(
                "the file does not dequantise to what the solver returned", name, "run again with --fresh"
            )
    model = BlockModel(written, torch.float32, torch.device("cpu"), trust_remote_code)
    unused = set(model.unexpected)
    changed = changed or {}
    for name, sha in changed.items():
        if digest(written.checkpoint.read(name)) != sha:
            raise CompressError("the file does not hold what the transform made", name, "run again with --fresh")
    copied = [n for n in source.tensors if n.removesuffix(".weight") not in expected and n not in changed]
    for name in copied:
        original = source.read(name)
        found = written.checkpoint.tensors.get(name)
        if found is None or tensor_bytes(written.checkpoint.read(name)) != tensor_bytes(original):
            raise CompressError("the copied tensor is not the original's", name, "run again with --fresh")
        if name not in unused and original.is_floating_point():
            refuse_infinite(original, name)  # a pass that runs no activations has not looked at it
    return Proof(len(expected), len(copied), sum(1 for _ in model.model.named_parameters()))


def check_hashes(folder: Path) -> int:
    """Compare a folder with the sha256 list of its compress.json. Returns how many files were compared.

    Raises:
        CompressError: a file is missing or changed, weights were added; the folder is not ours.
    """
    record = read_record(folder)
    if record is None:
        raise CompressError("no compress.json", str(folder), "only folders written by compress carry one")
    listed = record.get("sha256")
    if not isinstance(listed, dict) or not listed or any(Path(name).name != name for name in listed):
        raise CompressError("lists no files of this folder", str(folder / RECORD), "copy the folder again")
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise CompressError("the file is missing", str(folder / missing[0]), "copy the folder again")
    added = [f.name for f in sorted(folder.iterdir()) if f.name.endswith(WEIGHT_FILES) and f.name not in listed]
    if added:
        raise CompressError("was not written with the others", str(folder / added[0]), "remove it")
    found = hash_files([folder / name for name in listed])
    for name, sha in listed.items():
        if found[name] != sha:
            raise CompressError(
                "the file is not the one that was written (sha256)", str(folder / name), "copy it again"
            )
    return len(listed)
