"""Copies between the host and a device, beside what is computed there.

On a GPU they have a stream of their own and pinned memory, so that they wait for the tensors they copy and nothing
waits for them before it must; elsewhere there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A point in the work of a lane."""

    def synchronize(self) -> None:
        """Wait until the lane has come so far."""
        ...


class Lane(Protocol):
    """Copies between the host and a device, in the order in which they are asked for."""

    @property
    def device(self) -> torch.device:
        """Where `up` puts tensors."""
        ...

    def empty(self, nbytes: int) -> Tensor:
        """uint8 [nbytes] on the host, for what is to go up."""
        ...

    def up(self, host: Tensor) -> Tensor:
        """A tensor on its way to the device, not to be used before `arrive`."""
        ...

    def down(self, value: Tensor, into: Tensor | None = None) -> Tensor:
        """A tensor on its way to the host (there already: itself), not to be read before `mark().synchronize()`.

        Args:
            into: what an earlier `down` of the same shape and dtype gave, to be filled again.
        """
        ...

    def mark(self) -> Mark:
        """Behind every copy that was asked for until now."""
        ...

    def arrive(self, values: Iterable[Tensor], mark: Mark) -> None:
        """Let the work that is queued from here on use what went up before `mark`."""
        ...


class _Passed:
    def synchronize(self) -> None:
        pass


class Here:
    """The lane of a CPU, and of tensors that are to stay on the host."""

    device = torch.device("cpu")

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def up(self, host: Tensor) -> Tensor:
        return host

    def down(self, value: Tensor, into: Tensor | None = None) -> Tensor:
        return value.cpu()

    def mark(self) -> Mark:
        return _Passed()

    def arrive(self, values: Iterable[Tensor], mark: Mark) -> None:
        pass


class Stream:
    """The lane of a GPU: a stream of its own, pinned memory on the host.

    What goes up lies in memory of this stream, what comes down in that of the stream it was made in: `record_stream`
    keeps either from being given to others before both streams are done with it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def up(self, host: Tensor) -> Tensor:
        try:
            with torch.cuda.stream(self._stream):
                return host.to(self.device, non_blocking=True)
        except torch.OutOfMemoryError:  # it goes when its turn comes, and what is there now is gone
            return host

    def down(self, value: Tensor, into: Tensor | None = None) -> Tensor:
        if not value.is_cuda:
            return value
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True) if into is None else into
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            host.copy_(value, non_blocking=True)
        value.record_stream(self._stream)
        return host

    def mark(self) -> Mark:
        event: torch.cuda.Event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # waiters sleep
        event.record(self._stream)
        return event

    def arrive(self, values: Iterable[Tensor], mark: Mark) -> None:
        assert isinstance(mark, torch.cuda.Event)
        now = torch.cuda.current_stream(self.device)
        now.wait_event(mark)
        for value in values:
            if value.is_cuda:
                value.record_stream(now)


def lane_to(device: torch.device) -> Lane:
    """A lane between the host and `device`."""
    return Stream(device) if device.type == "cuda" else Here()
