"""Hidden states behind the last block for every window: made by one walk through a model, or kept from an earlier one.

The kept ones (`Cache`) are files under the user's cache folder, one for each base, text and way to cut it. They are
bounded in bytes: what was not used for longest goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.blocks import BlockModel
from compress.checkpoint import read_header, tensor_bytes
from compress.errors import CompressError
from compress.hidden import Activations, batch_rows
from compress.lane import Here, lane_to

#: (blocks done, blocks in all)
Step = Callable[[int, int], None]
_NAME, _STALE = "states", 86400.0  # seconds after which a file that nobody finished is removed
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


class States(Protocol):
    """Final hidden states, batch by batch."""

    def __len__(self) -> int: ...

    def states(self, i: int) -> Tensor:
        """[rows, window, hidden] of batch i, on the device."""
        ...

    def close(self) -> None:
        """Give back what they take."""
        ...


def final_states(
    model: BlockModel,
    rows: Tensor,
    spill: Path,
    step: Step | None = None,
    low_memory: bool = False,
    size: int | None = None,
) -> Activations:
    """Hidden states behind the last block for every row, one block in memory at a time.

    Args:
        rows: int64 [windows, window].
        spill: file for hidden states that fit in no memory.
        step: called with (blocks done, blocks in all).
        low_memory: keep nothing on the device that can be elsewhere.
        size: rows a batch; None: what `fitting` says.
    """
    flow = Activations(model, rows, size or fitting(model, rows, low_memory), spill, low_memory=low_memory)
    flow.enter()
    total = len(model.block_names)
    with model.ahead(range(total), Here() if low_memory else lane_to(model.device)) as ahead:
        for block in range(total):
            model.load(block, ahead.take(block))
            flow.advance(block)
            model.free(block)
            if step is not None:
                step(block + 1, total)
    return flow


def fitting(model: BlockModel, rows: Tensor, low_memory: bool) -> int:
    """How many rows make a batch."""
    hidden = model.hidden_size
    return batch_rows(len(rows), rows.shape[1], hidden, 4 * hidden, model.device, low_memory)


class Kept:
    """States read from a file of `Cache`.

    Args:
        file: open; stays readable when another process removes it.
        start: its first byte of states.
        shape: (rows, window, hidden).
        size: rows a batch.
    """

    def __init__(
        self, file: FileIO, start: int, shape: tuple[int, ...], dtype: torch.dtype, size: int, device: torch.device
    ) -> None:
        self._file, self._start, self._shape, self._dtype = file, start, shape, dtype
        self._size, self._device = size, device

    def __len__(self) -> int:
        return -(-self._shape[0] // self._size)

    def states(self, i: int) -> Tensor:
        rows, window, hidden = self._shape
        count = min(self._size, rows - i * self._size)
        out = torch.empty(count, window, hidden, dtype=self._dtype)
        self._file.seek(self._start + i * self._size * window * hidden * self._dtype.itemsize)
        view = tensor_bytes(out)
        done = 0
        while done < len(view):
            got = self._file.readinto(view[done:])
            if not got:
                raise CompressError("the file ends inside the states", self._file.name, "remove it")
            done += got
        return out.to(self._device)

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class Cache:
    """Final states kept for later runs.

    Attributes:
        folder: where; made when something is kept.
        limit: bytes of all files together.
    """

    folder: Path
    limit: int

    def find(self, key: str, size: int, device: torch.device) -> Kept | None:
        """What `keep` wrote under the key, None where there is nothing whole. `size`: rows a batch."""
        path = self._path(key)
        try:
            stored = read_header(path)[_NAME]
            file = path.open("rb", buffering=0)
        except (OSError, CompressError, KeyError):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return Kept(file, stored.start, stored.shape, stored.torch_dtype, size, device)

    def keep(self, key: str, states: States, rows: int) -> str | None:
        """Write states under the key, and remove the files used longest ago until all fit.

        Returns:
            why they are not kept, None if they are.
        """
        from filelock import FileLock

        first = states.states(0)
        shape = (rows, *first.shape[1:])
        nbytes = rows * first[0].numel() * first.element_size()
        if nbytes > self.limit:
            return f"the base's states take {nbytes / 1e9:.2f} GB, --cache allows {self.limit / 1e9:.2f} GB"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self.folder / ".lock"):
                self._make_room(nbytes)
            path = self._path(key)
            temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
            with temporary.open("wb") as file:
                file.write(_header(shape, first.dtype, nbytes))
                for i in range(len(states)):
                    file.write(tensor_bytes(states.states(i).cpu()))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as error:  # no reason to lose an evaluation
            return f"the base's states could not be kept in {self.folder} ({error.strerror})"
        return None

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _make_room(self, nbytes: int) -> None:
        """Remove files, those used longest ago first, until `nbytes` more fit; and what a killed run left."""
        for left in self.folder.glob("*.tmp"):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink(missing_ok=True)
        found = sorted((f.stat().st_mtime, f.stat().st_size, f) for f in self.folder.glob("*.safetensors"))
        held = sum(size for _, size, _ in found)
        for _, size, file in found:
            if held + nbytes <= self.limit:
                break
            file.unlink(missing_ok=True)
            held -= size


def _header(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> bytes:
    """The start of a safetensors file with one tensor."""
    entry = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [0, nbytes]}
    raw = json.dumps({_NAME: entry}, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def key_of(model: BlockModel, rows: Tensor) -> str:
    """sha256 (hex, its first half) of everything that a model's final states depend on.

    A checkpoint's files are known by place, size and time of change (of the file that a link leads to, which in the
    hub's cache is named by its content): reading them all would take as long as the walk that is saved.
    """
    import transformers

    from compress import __version__

    checkpoint = model.weights.checkpoint
    files = [checkpoint.folder / "config.json", *checkpoint.files()]
    known: list[Any] = [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.exists()]
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
    known += [str(model.dtype), device, __version__, torch.__version__, transformers.__version__, list(rows.shape)]
    digest = hashlib.sha256(json.dumps(known).encode())
    digest.update(rows.to("cpu", torch.int64).contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]
