"""The hidden states of all token rows between two blocks, batch by batch: on the device while they fit, else in host
memory, else on disk. Calibration and evaluation both flow through here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import torch
from torch import Tensor

from compress.checkpoint import read_into, tensor_bytes
from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.blocks import BlockModel

Tier = Literal["device", "host", "disk"]

_DEVICE_SHARE = 0.35  # of free device memory, the rest is for the block, its Hessians and one batch
_HOST_SHARE = 0.5


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
        read_into(self._spill, at, value, f"the hidden states of batch {i}")
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


class Activations:
    """Token rows on their way through the model: what enters the next block, for every batch.

    Args:
        model: the streamed model.
        tokens: int64 [rows, seq].
        size: rows a batch.
        spill: file for what fits in no memory.
    """

    def __init__(self, model: BlockModel, tokens: Tensor, size: int, spill: Path) -> None:
        self.tokens = tokens
        self.size = size
        self._model = model
        nbytes = tokens.numel() * model.hidden_size * model.dtype.itemsize
        self._states = HiddenStates(nbytes, model.device, spill)

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.size)

    def batch(self, i: int) -> Tensor:
        """int64 [rows, seq]: the tokens of batch i."""
        return self.tokens[i * self.size : (i + 1) * self.size]

    def states(self, i: int) -> Tensor:
        """[rows, seq, hidden]: the hidden states of batch i, on the device."""
        return self._states.get(i)

    def enter(self) -> None:
        """Embed every batch: the hidden states that enter block 0."""
        for i in range(len(self)):
            self._states.put(i, self._model.embed(self.batch(i)))

    def through(self, block: int) -> Iterator[tuple[int, Tensor]]:
        """What a loaded block makes of each batch, without keeping it."""
        for i in range(len(self)):
            tokens = self.batch(i)
            yield i, self._model.run(block, self.states(i), (len(tokens), tokens.shape[1]))

    def advance(self, block: int) -> None:
        """Replace the hidden states by what a loaded block makes of them.

        Raises:
            CompressError: the block's output is NaN or infinite.
        """
        for i, out in self.through(block):
            if not bool(torch.isfinite(out).all()):
                name = self._model.block_names[block]
                raise CompressError("its output holds NaN or infinity", name, "try --dtype float32")
            self._states.put(i, out)

    def close(self) -> None:
        """Free the memory, remove the spill file."""
        self._states.close()


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
