"""Does the folder hold what the solver returned? Asked of the files, after every write."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint, hash_files, tensor_bytes
from compress.errors import CompressError
from compress.output import read_record
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


def verify(folder: Path, records: list[dict[str, Any]], source: Checkpoint, trust_remote_code: bool = False) -> Proof:
    """Re-read a folder and compare.

    Args:
        records: with "name" and "sha256_dense" of each packed layer, as the solver returned it.
        source: the original, whose other tensors must have been copied.

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
    copied = 0
    for name, stored in written.checkpoint.tensors.items():
        original = source.tensors.get(name)
        if original is None:
            continue
        if tensor_bytes(written.checkpoint.read(name)) != tensor_bytes(source.read(name)):
            raise CompressError("the copied tensor differs from the original", name, "run again with --fresh")
        copied += stored is not None
    model = BlockModel(written, torch.float32, torch.device("cpu"), trust_remote_code)
    return Proof(len(expected), copied, sum(1 for _ in model.model.named_parameters()))


def check_hashes(folder: Path) -> int:
    """Compare a folder with the sha256 list of its compress.json. Returns how many files were compared.

    Raises:
        CompressError: a file is missing or changed; the folder is not ours.
    """
    record = read_record(folder)
    if record is None:
        raise CompressError("no compress.json", str(folder), "only folders written by compress carry one")
    listed: dict[str, str] = record["sha256"]
    missing = [name for name in listed if not (folder / name).exists()]
    if missing:
        raise CompressError("the file is missing", str(folder / missing[0]), "copy the folder again")
    found = hash_files([folder / name for name in listed])
    for name, sha in listed.items():
        if found[name] != sha:
            raise CompressError(
                "the file is not the one that was written (sha256)", str(folder / name), "copy it again"
            )
    return len(listed)
