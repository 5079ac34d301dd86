"""Work that is done many times over with tensors of the same shapes, captured as a CUDA graph: the launches of a small
model's layers take longer than the layers."""

from __future__ import annotations

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
        self._pool: torch.cuda.MemPool | None = None
        self._stream: torch.cuda.Stream | None = None
        self._made: list[Replayed] = []
        self._why = ""  # graphs cannot be had

    def of(self, work: Work) -> Work:
        """`work`, whose second call with the same shapes is captured, and which is replayed from there on; see
        `compress.types.Task.repeated`."""
        if self._device.type != "cuda" or self._why:
            return work
        if self._pool is None:
            self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        assert self._stream is not None
        self._made.append(Replayed(work, self._pool, self._stream))
        return self._made[-1]

    def rest(self) -> list[str]:
        """Forget the graphs that were made; their memory, too, unless it is little. Returns what must be said."""
        notes = list(dict.fromkeys(made.why for made in self._made if made.why))
        self._why = self._why or "".join(notes[:1])
        for made in self._made:
            made.forget()
        self._made.clear()
        if (
            self._pool is not None
            and _held(self._pool) > _KEPT * torch.cuda.get_device_properties(self._device).total_memory
        ):
            self.close()
        return [f"a step of this block {_CANNOT}, so each of its launches is made anew ({why})" for why in notes]

    def close(self) -> None:
        """Give the memory back."""
        for made in self._made:
            made.forget()
        self._made.clear()
        if self._pool is not None:
            self._pool = self._stream = None
            torch.cuda.empty_cache()


def _held(pool: torch.cuda.MemPool) -> int:
    """Bytes that a pool has from the device."""
    segments: Any = pool.snapshot()  # type: ignore[no-untyped-call]
    return sum(int(segment["total_size"]) for segment in segments)


class Replayed:
    """A function of tensors, as a graph for each set of their shapes.

    The first call with some shapes runs the function as it is: libraries make themselves ready then.

    Attributes:
        why: what CUDA said where it would not capture the function, which runs as it is from there on.
    """

    def __init__(self, work: Work, pool: torch.cuda.MemPool, stream: torch.cuda.Stream) -> None:
        self.why = ""
        self._work, self._pool, self._stream = work, pool, stream
        self._graphs: dict[_Shapes, tuple[torch.cuda.CUDAGraph, list[Tensor]] | None] = {}

    def __call__(self, *given: Tensor) -> None:
        shapes = tuple((x.shape, x.dtype) for x in given)
        if shapes not in self._graphs:
            self._graphs[shapes] = None
            self._aside(self._work, *given)
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

    def _aside(self, work: Work, *given: Tensor) -> None:
        """Run it where it will be captured, with the memory that the graph will have."""
        now = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            work(*given)
        now.wait_stream(self._stream)

    def _captured(self, given: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]] | None:
        """A graph, and where it reads what it is given; None where the function cannot be captured."""
        places = [torch.empty_like(x) for x in given]
        graph = torch.cuda.CUDAGraph()
        error: Exception | None = None
        torch.cuda.synchronize(self._stream.device)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(
                pool=cast(Any, self._pool.id), capture_error_mode="thread_local"
            )  # other threads may copy
            try:
                self._work(*places)
            except (RuntimeError, CompressError) as found:
                error = found
            try:
                graph.capture_end()
            except RuntimeError as found:
                error = error or found
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
