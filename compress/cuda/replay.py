"""Work that is done many times over with tensors of the same shapes, captured as a CUDA graph: the launches of a small
model's layers take longer than the layers."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from compress.errors import CompressError

#: of the device's memory: what graphs took is kept for the next ones up to that share
_KEPT = 0.1
#: what a block does in vain under a capture: it waits for the device, or does something else at each call
_CANNOT = "cannot be captured as a CUDA graph"

Work = Callable[..., None]
_Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class Replays:
    """Makes graphs on one device, and holds the memory that they compute in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room: _Room | None = None
        self._made: list[Replayed] = []
        self._why = ""  # graphs cannot be had

    def of(self, work: Work) -> Work:
        """`work`, whose second call with the same shapes is captured, and which is replayed from there on; see
        `compress.types.Task.repeated`."""
        if self._device.type != "cuda" or self._why:
            return work
        if self._room is None:
            self._room = _Room(self._device)
        self._made.append(Replayed(work, self._room))
        return self._made[-1]

    def rest(self) -> list[str]:
        """Forget the graphs that were made; their memory, too, unless it is little. Returns what must be said."""
        notes = list(dict.fromkeys(made.why for made in self._made if made.why))
        self._why = self._why or "".join(notes[:1])
        self._forget()
        if self._room is not None and self._room.share() > _KEPT:
            self.close()
        return [f"a step of this block {_CANNOT}, so each of its launches is made anew ({why})" for why in notes]

    def close(self) -> None:
        """Give the memory back."""
        self._forget()
        if self._room is not None:
            self._room.leave()
            self._room = None
            torch.cuda.empty_cache()

    def _forget(self) -> None:
        for made in self._made:
            made.forget()
        self._made.clear()


class _Room:
    """Memory and a stream for graphs. Torch's allocators let go of a pool whose last graph is gone, and take it for an
    error when another is captured in it: so a graph stays that does next to nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.MemPool()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._keeper, _ = self.capture(lambda: torch.zeros(1, device=device))

    def capture(self, work: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, Exception | None]:
        """A graph of what `work` launches; or why there can be none."""
        graph = torch.cuda.CUDAGraph()
        error: Exception | None = None
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(pool=cast(Any, self.pool.id), capture_error_mode="thread_local")  # others may copy
            try:
                work()
            except (RuntimeError, CompressError) as found:
                error = found
            finally:  # also where Ctrl-C stops the run: it has blocks to write, which a stream in capture cannot
                try:
                    graph.capture_end()
                except RuntimeError as found:
                    error = error or found
                    _set_free(self.device)
        if error is not None:
            graph.reset()  # what is raised may be held for long, and the graph with it, and its pool
        return graph, error

    def share(self) -> float:
        """What the pool has of the device's memory."""
        segments: Any = self.pool.snapshot()  # type: ignore[no-untyped-call]
        held = sum(int(segment["total_size"]) for segment in segments)
        return held / int(torch.cuda.get_device_properties(self.device).total_memory)

    def leave(self) -> None:
        """Let the pool go; not while an error is passed on. That may be CUDA's last word, and torch ends the process
        where a pool's memory cannot be freed: who is to see the error would see that instead."""
        self._keeper.reset()
        if sys.exc_info()[0] is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.pool))


def _set_free(device: torch.device) -> None:
    """Random numbers again: torch takes the device's generator for one in a capture for good where a capture does not
    end as it should, and whatever draws from it fails from then on. A copy draws what it would have drawn."""
    numbers = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    numbers.graphsafe_set_state(numbers.clone_state())


class Replayed:
    """A function of tensors, as a graph for each set of their shapes.

    The first call with some shapes runs the function as it is: libraries make themselves ready then.

    Attributes:
        why: what CUDA said where it would not capture the function, which runs as it is from there on.
    """

    def __init__(self, work: Work, room: _Room) -> None:
        self.why = ""
        self._work, self._room = work, room
        self._graphs: dict[_Shapes, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}

    def __call__(self, *given: Tensor) -> None:
        shapes = tuple((x.shape, x.dtype) for x in given)
        if shapes not in self._graphs:
            self._graphs[shapes] = None
            self._aside(*given)
            return
        if self._graphs[shapes] is None and not self.why:
            self._graphs[shapes] = self._captured(given)
        found = self._graphs[shapes]
        if found is None:
            self._work(*given)
            return
        graph, places = found
        for place, value in zip(places, given, strict=True):
            place.copy_(value)
        graph.replay()

    def _aside(self, *given: Tensor) -> None:
        """Run it where it will be captured, with the memory that the graph will have."""
        now, aside = torch.cuda.current_stream(self._room.device), self._room.stream
        aside.wait_stream(now)
        with torch.cuda.stream(aside), torch.cuda.use_mem_pool(self._room.pool):
            self._work(*given)
        now.wait_stream(aside)

    def _captured(self, given: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]] | None:
        """A graph, and where it reads what it is given; None where the function cannot be captured."""
        places = [torch.empty_like(x) for x in given]
        graph, error = self._room.capture(lambda: self._work(*places))
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        if error is not None:
            self.why = str(error).strip().splitlines()[0]
            return None
        return graph, places

    def forget(self) -> None:
        """Let go of the graphs, whoever still holds this."""
        for made in self._graphs.values():
            if made is not None:
                made[0].reset()
        self._graphs.clear()
