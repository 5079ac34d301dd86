"""A capture ends whatever happens in it. Without a GPU: torch's part is played; tests of graphs are in test_refine."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.cuda.replay import _Room
from compress.errors import CompressError


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("waits"), CompressError("a", "b", "c"), None])
def test_a_capture_ends_whatever_happens(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Graph:
        def capture_begin(self, **given: Any) -> None:
            said.append("begin")

        def capture_end(self) -> None:
            said.append("end")

        def reset(self) -> None:
            said.append("reset")

    def work() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    room: Any = object.__new__(_Room)
    room.device, room.stream, room.pool = torch.device("cpu"), None, SimpleNamespace(id=(0, 1))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            room.capture(work)
    else:
        assert room.capture(work)[1] is error
    broken = isinstance(error, RuntimeError | CompressError)  # whoever holds the error would hold the graph's memory
    assert said == ["begin", "end"] + ["reset"] * broken
