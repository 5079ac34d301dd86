"""Does the folder hold what the solver returned? Asked of the files, after every write and by `compress verify`."""

from __future__ import annotations

import hashlib
import json
import math
import queue
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.ahead import in_order
from compress.blocks import BlockModel, refuse_infinite
from compress.checkpoint import Checkpoint, Stored, read_tensor, tensor_bytes
from compress.errors import CompressError
from compress.gguf.writer import COMPUTED
from compress.hashes import hash_files
from compress.lane import lane_to
from compress.output import RECORD, WEIGHT_FILES, read_record
from compress.weights import Weights

#: bytes that a number of a layer takes at most while it is unpacked and dequantised
_UNPACKING = 16
#: numbers of a copied tensor that are compared at once: a model has few that are large, and many threads
_PIECE = 1 << 24
#: layers that are unpacked on a GPU at the same time
_AT_ONCE = 2
_CPU = torch.device("cpu")
_AGAIN = "run again with --fresh"
_COPY = "copy the folder again"


@dataclass(frozen=True)
class Proof:
    """What was checked.

    Attributes:
        layers: packed layers whose dequantised weights equal the solver's to the last bit.
        copied: dense tensors equal to the source's to the last byte.
        parameters: parameters of the model that the files fill, none missing.
        files: weight files whose sha256 is that of the bytes that were sent to the disk.
        clients: what each client that reads the format answered, or why it was not asked.
    """

    layers: int
    copied: int
    parameters: int
    files: int = 0
    clients: Sequence[str] = ()


@dataclass(frozen=True)
class Seen:
    """Files that were read back before the folder was whole, see `compress.early`.

    Attributes:
        config: config.json with which their layers were unpacked.
        layers: names of the layers in each, by `state_of` the file.
    """

    config: Mapping[str, Any]
    layers: Mapping[tuple[int, ...], frozenset[str]]

    def of(self, written: Weights, hashes: Mapping[str, str]) -> tuple[set[str], set[str]]:
        """The files of a folder, among `hashes`, and the layers in them that need not be read again."""
        if written.checkpoint.config != json.loads(json.dumps(self.config)):
            return set(), set()
        here = {file: self.layers.get(state_of(file)) for file in written.checkpoint.files() if file.name in hashes}
        found = {file: names for file, names in here.items() if names is not None}
        tensors = written.checkpoint.tensors
        layers = {
            name
            for file, names in found.items()
            for name in names
            if all(n in tensors and tensors[n].file == file for n in written.stored(f"{name}.weight"))
        }
        return {file.name for file in found}, layers


def state_of(file: Path) -> tuple[int, ...]:
    """What stays as it is while a file does, by whatever name: device, inode, size, time of the last change."""
    found = file.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def digest(dense: Tensor) -> str:
    """sha256 of a dequantised weight's bytes."""
    return hashlib.sha256(tensor_bytes(dense.cpu())).hexdigest()


def verify(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    source: Checkpoint,
    trust_remote_code: bool = False,
    changed: Mapping[str, str] | None = None,
    owned: Iterable[str] | None = None,
    hashes: Mapping[str, str] | None = None,
    device: torch.device = _CPU,
    seen: Seen | None = None,
) -> Proof:
    """Re-read a folder and compare.

    Args:
        records: with "name" and "sha256_dense" of each packed layer, as the solver returned it.
        source: the original, whose other tensors must have been copied.
        changed: sha256 of the dense tensors that a transform replaced, by name.
        owned: tensors of the source that were packed anew; by default the weights of the layers in `records`.
        hashes: sha256 of the weight files as they were written, by name.
        device: where layers are unpacked and dequantised.
        seen: what was read back before.

    Raises:
        CompressError: the first difference.
    """
    written = Weights(Checkpoint.open(folder))
    known, ready = (set(), set()) if seen is None else seen.of(written, hashes or {})
    rest = {name: sha for name, sha in (hashes or {}).items() if name not in known}
    with ThreadPoolExecutor(1, "sha256") as beside:
        files = beside.submit(wrong_files, folder, rest, _AGAIN)
        try:
            counts = _read_back(written, records, source, trust_remote_code, changed or {}, owned, device, ready)
        except Exception:
            files.result()  # that a file is not the one that was written says more than what was read from it
            raise
        files.result()
    return Proof(*counts, len(hashes or {}))


def _read_back(
    written: Weights, records: Sequence[Mapping[str, Any]], source: Checkpoint, trust_remote_code: bool,
    changed: Mapping[str, str], owned: Iterable[str] | None, device: torch.device, ready: Container[str],
) -> tuple[int, int, int]:  # fmt: skip
    """How many layers are the solver's, how many tensors the source's, how many parameters they fill."""
    layers(written, records, _AGAIN, device=device, ready=ready)
    model = BlockModel(written, torch.float32, torch.device("cpu"), trust_remote_code)
    for name, sha in changed.items():
        if digest(written.checkpoint.read(name)) != sha:
            raise CompressError("the file does not hold what the transform made", name, _AGAIN)
    gone = {f"{r['name']}.weight" for r in records} if owned is None else set(owned)
    copied = [n for n in source.tensors if n not in gone and n not in changed]
    if written.format_name == "gguf":
        copied = [n for n in copied if not n.endswith(COMPUTED)]

    def check(pair: tuple[str, Stored, Stored]) -> None:
        name, theirs, ours = pair
        original = read_tensor(theirs, name)
        if not equal(read_tensor(ours, name), original):
            raise CompressError("the copied tensor is not the original's", name, _AGAIN)
        if name not in model.unexpected and original.is_floating_point():
            refuse_infinite(original, name)  # a pass that runs no activations has not looked at it

    pairs = [pair for name in copied for pair in _pairs(name, source, written.checkpoint)]
    largest = max((theirs.nbytes for _, theirs, _ in pairs), default=0)
    deque(in_order(check, pairs, 3 * largest), maxlen=0)
    return len(records), len(copied), sum(1 for _ in model.model.named_parameters())


def _pairs(name: str, source: Checkpoint, written: Checkpoint) -> list[tuple[str, Stored, Stored]]:
    """What must be equal for a tensor to be a copy, in pieces where it lies the same way in both."""
    theirs, ours = source.tensors[name], written.tensors.get(name)
    if ours is None:
        raise CompressError("the copied tensor is not the original's", name, _AGAIN)
    if (theirs.dtype, theirs.shape) != (ours.dtype, ours.shape) or theirs.rope_heads or ours.rope_heads:
        return [(name, theirs, ours)]
    return [(name, *pair) for pair in zip(theirs.pieces(_PIECE), ours.pieces(_PIECE), strict=True)]


def wrong_files(folder: Path, hashes: Mapping[str, str], remedy: str = _AGAIN) -> None:
    """Raise CompressError for the first file that is missing or does not have the sha256 that is listed."""
    missing = [name for name in hashes if not (folder / name).is_file()]
    if missing:
        raise CompressError("the file is missing", str(folder / missing[0]), remedy)
    found = hash_files([folder / name for name in hashes])
    for name, sha in hashes.items():
        if found[name] != sha:
            raise CompressError("the file is not the one that was written (sha256)", str(folder / name), remedy)


class Unpacking:
    """Packed layers as dense tensors on the host. Any thread may ask; on a GPU a few are unpacked at once, in streams
    of their own: a run may be at work in torch's.

    Args:
        device: where they are unpacked and dequantised; one that has no room there, on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._lane = device, lane_to(device)
        self._places: queue.SimpleQueue[AbstractContextManager[Any]] = queue.SimpleQueue()
        for _ in range(_AT_ONCE if device.type == "cuda" else 0):
            self._places.put(torch.cuda.stream(torch.cuda.Stream(device)))  # type: ignore[no-untyped-call]

    def read(self, written: Weights, layer: str) -> Tensor:
        """A layer's dequantised weight [out, in]."""
        if self._device.type != "cuda":
            return written.read(f"{layer}.weight")
        place = self._places.get()
        try:
            with place:
                dense = self._lane.down(written.read(f"{layer}.weight", self._device))
                mark = self._lane.mark()
        except torch.OutOfMemoryError:
            return written.read(f"{layer}.weight")
        finally:
            self._places.put(place)
        mark.synchronize()
        return dense

    def check(self, written: Weights, record: Mapping[str, Any], remedy: str = _AGAIN) -> Tensor:
        """`read`, of a layer that must be what its record says. Raises CompressError."""
        dense = self.read(written, str(record["name"]))
        if record.get("transposed"):
            dense = dense.t().contiguous()
        if digest(dense) != record.get("sha256_dense"):
            what = "the file does not dequantise to what the solver returned"
            raise CompressError(what, str(record["name"]), remedy)
        return dense


def layers(
    written: Weights,
    records: Sequence[Mapping[str, Any]],
    remedy: str,
    seen: Callable[[str, Tensor], None] | None = None,
    device: torch.device = _CPU,
    ready: Container[str] = (),
) -> None:
    """Raise CompressError unless the packed layers are those recorded and dequantise to what was recorded.

    Args:
        seen: given each layer's name and dequantised weight [out, in], on the host.
        device: see `Unpacking`.
        ready: layers that were read before.
    """
    expected = {str(r["name"]) for r in records}
    if written.format_name is not None and written.packed != expected:
        wrong = sorted(written.packed ^ expected)[0]
        raise CompressError("packed in the files or in the records, not in both", wrong, remedy)
    unpacking = Unpacking(device)

    def check(record: Mapping[str, Any]) -> tuple[str, Tensor | None]:
        dense = unpacking.check(written, record, remedy)
        return str(record["name"]), None if seen is None else dense

    asked = [record for record in records if str(record["name"]) not in ready]
    for name, dense in in_order(check, asked, room_to_unpack(asked)):
        if seen is not None and dense is not None:
            seen(name, dense)


def room_to_unpack(records: Iterable[Mapping[str, Any]]) -> int:
    """Bytes of host memory that the largest layer takes at most while it is unpacked and dequantised."""
    return max((_UNPACKING * math.prod(r["shape"]) for r in records), default=0)


def same(written: Weights, name: str, original: Tensor) -> bool:
    """Whether a tensor was copied: the same bytes, or the same values in a wider dtype (GGUF's norms)."""
    return name in written.checkpoint.tensors and equal(written.checkpoint.read(name), original)


def equal(found: Tensor, original: Tensor) -> bool:
    """Whether a tensor holds another's bytes, or its values in a wider dtype."""
    wider = torch.promote_types(found.dtype, original.dtype) == found.dtype
    if not wider or found.shape != original.shape:
        return False
    # bytes, as bytes: of numbers NaN would differ from itself, and 0 be the same as -0
    found, original = (t.contiguous().reshape(-1).view(torch.uint8) for t in (found.to(original.dtype), original))
    if any(int(t.storage_offset()) % 8 for t in (found, original)):  # a slice
        return torch.equal(found, original)
    words = found.numel() // 8 * 8  # by eights: torch compares numbers, and these are fewer
    eights = (t[:words].view(torch.int64) for t in (found, original))
    return torch.equal(*eights) and torch.equal(found[words:], original[words:])


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
        raise CompressError("lists no files of this folder", str(folder / RECORD), _COPY)
    added = [f.name for f in sorted(folder.iterdir()) if f.name.endswith(WEIGHT_FILES) and f.name not in listed]
    if added:
        raise CompressError("was not written with the others", str(folder / added[0]), "remove it")
    wrong_files(folder, listed, _COPY)
    return len(listed)
