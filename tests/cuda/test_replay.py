"""A capture ends whatever happens in it. Without a GPU: torch's part is played; tests of graphs are in test_refine."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.cuda.replay import _Room
from compress.errors import CompressError


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("waits"), CompressError("a", "b", "c"), None])
def test_a_capture_ends_whatever_happens(
    error: BaseException | None, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    numbers = torch.Generator().manual_seed(7)
    expected = torch.rand(5, generator=torch.Generator().manual_seed(7))

    class Graph:
        def capture_begin(self, **given: Any) -> None:
            said.append("begin")

        def capture_end(self) -> None:
            said.append("end")
            if fails:
                raise RuntimeError("capture failed due to a previous error")

        def reset(self) -> None:
            said.append("reset")

    def work() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)

    class Numbers:
        """The device's generator: what it does from a bad end on is in test_refine, on a GPU."""

        def clone_state(self) -> torch.Generator:
            return numbers.clone_state()

        def graphsafe_set_state(self, state: torch.Generator) -> None:
            said.append("set free")
            assert torch.equal(torch.rand(5, generator=state), expected)

    monkeypatch.setattr(torch.cuda, "default_generators", (Numbers(),))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    room: Any = object.__new__(_Room)
    room.device, room.stream, room.pool = torch.device("cpu"), None, SimpleNamespace(id=(0, 1))
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            room.capture(work)
    else:
        found = room.capture(work)[1]
        assert found is error or (error is None and fails and "previous error" in str(found))
    broken = isinstance(error, RuntimeError | CompressError) or (fails and error is None)
    assert (
        said == ["begin", "end"] + ["set free"] * fails + ["reset"] * broken
    )  # who has the error would hold the graph


def test_a_pool_outlives_an_error_that_is_passed_on() -> None:
    """Torch ends the process where the memory of a pool that goes cannot be freed, and the error would not be seen."""
    room: Any = object.__new__(_Room)
    room._keeper, room.pool = SimpleNamespace(reset=lambda: None), SimpleNamespace()

    def held() -> int:  # outside of assert, which holds what it looks at
        return sys.getrefcount(room.pool)

    def fails() -> None:
        try:
            raise RuntimeError("CUDA")
        finally:
            room.leave()

    before = held()
    room.leave()
    assert held() == before
    with pytest.raises(RuntimeError, match="CUDA"):
        fails()
    assert held() == before + 1
