"""The hidden states of all token rows between two blocks, batch by batch: on the device while they fit, else in pinned
host memory, else on disk, the next batch on its way while one is worked on. Calibration and evaluation both flow
through here. Where something is kept and how many rows make a batch is decided from free memory, once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import psutil
import torch
from torch import Tensor

from compress.checkpoint import read_into, tensor_bytes
from compress.cuda.replay import Replays
from compress.errors import CompressError
from compress.lane import Lane, Mark, lane_to

if TYPE_CHECKING:
    from compress.blocks import BlockModel

T = TypeVar("T")
Tier = Literal["device", "host", "disk"]
#: bytes that can still be had on a device (of "cpu": of the host)
Free = Callable[[torch.device], int]

_DEVICE_SHARE = 0.35  # of free device memory, where nobody says what a block needs of it
_DEVICE_FULL = 0.9  # of it, where somebody does
_HOST_SHARE = 0.5
_BATCH_SHARE = 0.25
#: tokens a batch, on a GPU and on a CPU, and in a run that is to need little memory the share of them
TOKENS, _TOKENS_CPU, _LOW_SHARE = 16384, 4096, 4
#: hidden size and widest activation of the blocks (of Llama-2-7B) that keep a GPU busy with so many tokens
_WIDE = 4096, 11008
#: what torch and its libraries say when a device has no memory left, beside torch.OutOfMemoryError
_NO_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: of a GPU, what torch keeps for later among them."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class HiddenStates:
    """One tensor [rows, seq, hidden] a batch; `put` replaces, `get` returns it on the device.

    Args:
        device: where `get` returns tensors.
        spill: file used by the disk tier.
        tier: where they are kept.
        lane: to the device and back.
    """

    def __init__(self, device: torch.device, spill: Path, tier: Tier, lane: Lane | None = None) -> None:
        self.device = device
        self.tier: Tier = tier
        self._kept: dict[int, Tensor] = {}
        self._lane = lane_to(device) if lane is None else lane
        self._coming: dict[int, tuple[Tensor, Mark] | Future[tuple[Tensor, Mark]]] = {}  # the next batch, at most
        self._spill = spill
        self._places: dict[int, tuple[int, torch.Size, torch.dtype]] = {}
        self._end = 0
        self._thread = ThreadPoolExecutor(1, "hidden-states") if tier == "disk" else None  # reads and writes in order
        self._writing: Future[None] | None = None

    def put(self, i: int, value: Tensor) -> None:
        self._coming.pop(i, None)
        if self.tier == "device":
            self._kept[i] = value
        elif self.tier == "host":
            self._kept[i] = self._lane.down(value, self._kept.get(i))
        else:
            self._spilled(i, value)

    def get(self, i: int) -> Tensor:
        if self.tier == "device":
            return self._kept[i]
        coming = self._coming.pop(i, None) or self._fetch(i)
        self._coming.clear()
        if i + 1 in self._kept or i + 1 in self._places:
            self._coming[i + 1] = self._fetch(i + 1)
        value, mark = coming.result() if isinstance(coming, Future) else coming
        self._lane.arrive([value], mark)
        return value.to(self.device)

    def _fetch(self, i: int) -> tuple[Tensor, Mark] | Future[tuple[Tensor, Mark]]:
        if self._thread is not None:
            return self._thread.submit(self._read, *self._places[i], i)
        return self._lane.up(self._kept[i]), self._lane.mark()

    def _spilled(self, i: int, value: Tensor) -> None:
        """Let the thread write a batch, once the one before it is written."""
        at, shape, dtype = self._places.get(i, (self._end, value.shape, value.dtype))
        if shape != value.shape or dtype != value.dtype:
            raise ValueError(f"batch {i} changed its shape from {shape} to {value.shape}")
        self._places[i] = (at, shape, dtype)
        self._end = max(self._end, at + value.numel() * value.element_size())
        self._written()
        assert self._thread is not None
        self._writing = self._thread.submit(self._write, at, self._lane.down(value), self._lane.mark())

    def _written(self) -> None:
        """Wait for the last write. Raises OSError when the disk did not take it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, at: int, value: Tensor, mark: Mark) -> None:
        mark.synchronize()
        with self._spill.open("r+b" if self._spill.exists() else "wb") as f:
            f.seek(at)
            f.write(tensor_bytes(value))

    def _read(self, at: int, shape: torch.Size, dtype: torch.dtype, i: int) -> tuple[Tensor, Mark]:
        flat = self._lane.empty(shape.numel() * dtype.itemsize)
        read_into(self._spill, at, flat, f"the hidden states of batch {i}")
        return self._lane.up(flat.view(dtype).reshape(shape)), self._lane.mark()

    def close(self) -> None:
        """Free the memory, remove the spill file."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._kept.clear()
        self._coming.clear()
        self._spill.unlink(missing_ok=True)


def choose_tier(
    nbytes: int,
    device: torch.device,
    held: int | None = None,
    low_memory: bool = False,
    free: Free = free_memory,
) -> Tier:
    """The fastest tier with room for `nbytes`.

    Args:
        held: bytes on the device that a block, its statistics and a batch take; None: not known.
        low_memory: not on a GPU.
    """
    if device.type == "cuda" and not low_memory:
        room = _DEVICE_SHARE * free(device) if held is None else _DEVICE_FULL * free(device) - held
        if nbytes < room:
            return "device"
    if nbytes < _HOST_SHARE * free(torch.device("cpu")):
        return "host"
    return "disk"


class Activations:
    """Token rows on their way through the model: what enters the next block, for every batch.

    Where the device runs out of memory, fewer rows go through a block at once; what is kept stays in batches of `size`.

    Args:
        model: the streamed model.
        tokens: int64 [rows, seq].
        size: rows a batch.
        spill: file for what fits in no memory.
        held, low_memory, free: see `choose_tier`.

    Attributes:
        rows: how many rows go through a block at once, `size` at most.
        replays: for what is done to many of them.
    """

    def __init__(
        self,
        model: BlockModel,
        tokens: Tensor,
        size: int,
        spill: Path,
        held: int | None = None,
        low_memory: bool = False,
        free: Free = free_memory,
    ) -> None:
        self.tokens = tokens
        self.size = self.rows = size
        self._notes: list[str] = []
        self._model = model
        self._room = (held, low_memory, free)
        nbytes = tokens.numel() * model.hidden_size * model.dtype.itemsize
        self._states = HiddenStates(model.device, spill, choose_tier(nbytes, model.device, held, low_memory, free))
        self.replays = Replays(model.device)

    def beside(self, spill: Path) -> Activations:
        """The same rows in batches of the same size, on a way of their own."""
        held, low_memory, free = self._room
        taken = self.tokens.numel() * self._model.hidden_size * self._model.dtype.itemsize
        held = None if held is None else held + (taken if self.tier == "device" else 0)
        return Activations(self._model, self.tokens, self.size, spill, held, low_memory, free)

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.size)

    def __enter__(self) -> Activations:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def tier(self) -> Tier:
        """Where the hidden states are kept."""
        return self._states.tier

    def batch(self, i: int) -> Tensor:
        """int64 [rows, seq]: the tokens of batch i."""
        return self.tokens[i * self.size : (i + 1) * self.size]

    def states(self, i: int) -> Tensor:
        """[rows, seq, hidden]: the hidden states of batch i, on the device."""
        return self._states.get(i)

    def enter(self) -> None:
        """Embed every batch: the hidden states that enter block 0."""
        for i in range(len(self)):
            self._states.put(i, self.within(partial(self._embedded, i)))
        self._model.rest()

    def _embedded(self, i: int) -> Tensor:
        return _joined([self._model.embed(tokens) for tokens in self._pieces(self.batch(i))])

    def pieces(self, rows: int | None = None) -> Iterator[Tensor]:
        """The hidden states, `rows` rows at a time within each batch."""
        for i in range(len(self)):
            yield from torch.split(self.states(i), self.rows if rows is None else rows)

    def run(self, block: int, states: Tensor) -> Tensor:
        """What a loaded block makes of some rows."""
        return self._model.run(block, states, (len(states), self.tokens.shape[1]))

    def follow(self, other: Activations, block: int) -> None:
        """Take what a loaded block makes of another's hidden states, which stay."""
        for i in range(len(self)):
            states = other.states(i)
            self._states.put(i, self.within(partial(self._made, block, states)))

    def _made(self, block: int, batch: Tensor) -> Tensor:
        return _joined([self.run(block, states) for states in self._pieces(batch)])

    def advance(self, block: int) -> None:
        """Replace the hidden states by what a loaded block makes of them.

        Raises:
            CompressError: the block's output is NaN or infinite.
        """
        finite = []
        for i in range(len(self)):
            out = self.within(partial(self._advanced, block, i))
            finite.append(torch.isfinite(out).all())
            self._states.put(i, out)
        if not bool(torch.stack(finite).all()):
            name = self._model.block_names[block]
            raise CompressError("its output holds NaN or infinity", name, "try --dtype float32")

    def _advanced(self, block: int, i: int) -> Tensor:
        return self._made(block, self.states(i))

    def _pieces(self, batch: Tensor) -> Sequence[Tensor]:
        return torch.split(batch, self.rows)

    def within(self, work: Callable[[], T]) -> T:
        """What `work` returns; where the device has no memory for it, once more with half as many rows at once.

        `work` runs anew from its beginning, so it must not have kept anything of what it did.
        """
        while True:
            try:
                return work()
            except RuntimeError as error:
                if self.rows == 1 or not out_of_memory(error):
                    raise
            self.note(f"out of device memory with {self.rows} rows at once: {self.rows // 2} from there on")
            self.rows //= 2
            gc.collect()  # only here is all that `work` made out of reach
            self.replays.close()
            torch.cuda.empty_cache()

    def note(self, text: str) -> None:
        """Let the report say something."""
        self._notes.append(text)

    def told(self) -> list[str]:
        """What the report must say and was not told before."""
        notes, self._notes = self._notes, []
        return notes

    def close(self) -> None:
        """Free the memory, remove the spill file."""
        self.replays.close()
        self._states.close()


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether it was for want of memory on the device."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _NO_MEMORY)


def row_bytes(seq: int, hidden: int, widest: int) -> int:
    """Bytes that one row takes inside a block, generously.

    Args:
        hidden, widest: hidden size and the widest activation of a block, in elements a token.
    """
    return seq * (6 * hidden + 4 * widest) * 4


def batch_rows(
    rows: int,
    seq: int,
    hidden: int,
    widest: int,
    device: torch.device,
    low_memory: bool = False,
    free: Free = free_memory,
) -> int:
    """Rows a batch: a power of two, less where free memory is short.

    On a CPU about 4 thousand tokens. On a GPU 16 thousand, and more of a narrow model, whose kernels would else be
    shorter than what it takes to launch them: as many as take what 16 thousand of a model of 7 billion parameters do.

    Args:
        hidden, widest: see `row_bytes`.
        low_memory: a quarter of that.
    """
    most = max(1, int(_BATCH_SHARE * free(device) / row_bytes(seq, hidden, widest)))
    narrow = row_bytes(1, *_WIDE) / row_bytes(1, hidden, widest)
    tokens = int(TOKENS * max(1.0, narrow)) if device.type == "cuda" else _TOKENS_CPU
    wanted = max(1, (tokens // _LOW_SHARE if low_memory else tokens) // seq)
    size = 1
    while size * 2 <= min(most, wanted, rows):
        size *= 2
    return size
