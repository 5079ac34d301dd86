"""Hidden states between two blocks, batch by batch: on the device while they fit, else in host memory, else on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from torch import Tensor

from compress.checkpoint import tensor_bytes

Tier = Literal["device", "host", "disk"]

_DEVICE_SHARE = 0.35  # of free device memory, the rest is for the block, its Hessians and one batch
_HOST_SHARE = 0.5


@dataclass(frozen=True)
class Batches:
    """Rows of tokens cut into batches of equal size (the last may be smaller).

    Attributes:
        tokens: int64 [rows, seq].
        size: rows a batch.
    """

    tokens: Tensor
    size: int

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.size)

    def __getitem__(self, i: int) -> Tensor:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.tokens[i * self.size : (i + 1) * self.size]

    def shape(self, i: int) -> tuple[int, int]:
        """(rows, seq) of batch i."""
        return len(self[i]), self.tokens.shape[1]


class HiddenStates:
    """One tensor [rows, seq, hidden] a batch; `put` replaces, `get` returns it on the device.

    Args:
        nbytes: the size of all batches together, for the choice of the tier.
        device: where `get` returns tensors.
        spill: file used by the disk tier.
        tier: force a tier; None chooses by free memory.
    """

    def __init__(self, nbytes: int, device: torch.device, spill: Path, tier: Tier | None = None) -> None:
        self.device = device
        self.tier: Tier = choose_tier(nbytes, device) if tier is None else tier
        self._kept: dict[int, Tensor] = {}
        self._spill = spill
        self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0

    def put(self, i: int, value: Tensor) -> None:
        if self.tier == "disk":
            self._write(i, value)
        elif self.tier == "host":
            self._kept[i] = value.cpu()
        else:
            self._kept[i] = value

    def get(self, i: int) -> Tensor:
        value = self._read(i) if self.tier == "disk" else self._kept[i]
        return value.to(self.device)

    def _write(self, i: int, value: Tensor) -> None:
        at, shape, dtype = self._places.get(i, (self._end, value.shape, value.dtype))
        if shape != value.shape or dtype != value.dtype:
            raise ValueError(f"batch {i} changed its shape from {shape} to {value.shape}")
        with self._spill.open("r+b" if self._spill.exists() else "wb") as f:
            f.seek(at)
            f.write(tensor_bytes(value.cpu()))
            self._end = max(self._end, f.tell())
        self._places[i] = (at, shape, dtype)

    def _read(self, i: int) -> Tensor:
        at, shape, dtype = self._places[i]
        value = torch.empty(shape, dtype=dtype)
        with self._spill.open("rb", buffering=0) as f:
            f.seek(at)
            view = tensor_bytes(value)
            done = 0
            while done < len(view):
                done += f.readinto(view[done:]) or 0
        return value

    def close(self) -> None:
        """Free the memory, remove the spill file."""
        self._kept.clear()
        self._spill.unlink(missing_ok=True)


def choose_tier(nbytes: int, device: torch.device) -> Tier:
    """The fastest tier with room for `nbytes`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if nbytes < _DEVICE_SHARE * free:
            return "device"
    if nbytes < _HOST_SHARE * psutil.virtual_memory().available:
        return "host"
    return "disk"


def batch_rows(rows: int, seq: int, hidden: int, widest: int, device: torch.device) -> int:
    """Rows a batch: a power of two, about 16 thousand tokens, less where free memory is short.

    Args:
        hidden, widest: hidden size and the widest activation of a block, in elements a token.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    a_row = seq * (6 * hidden + 4 * widest) * 4
    most = max(1, int(0.25 * free / a_row))
    wanted = max(1, (16384 if device.type == "cuda" else 4096) // seq)
    size = 1
    while size * 2 <= min(most, wanted, rows):
        size *= 2
    return size
