"""Kernels compiled side by side: what is left for later, and what is told of those that do not compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.bench import warm
from compress.bench.layers import Setting
from compress.bench.warm import Job
from compress.cuda import ops, pruned
from compress.cuda.choice import Library, Narrow
from compress.errors import CompressError

CPU = Setting("cpu")


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `warm` takes from its process comes back; until it does, a launch fails."""
    for module in (ops, pruned):
        monkeypatch.setattr(module, "launch", None)


def jobs(count: int) -> list[Job]:
    return [Job("w4", CPU, 1 + i, Library()) for i in range(count)]


def test_a_few_are_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 * 10**9, 80 * 10**9))
    monkeypatch.setattr(warm, "ProcessPoolExecutor", None)  # would be called
    assert warm.warm(jobs(8) * 3) == {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10**9, 80 * 10**9))
    assert warm.warm(jobs(100)) == {}


def test_one_that_does_not_compile_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kernel: Any, device: Any) -> Any:
        raise CompressError("does not compile")

    monkeypatch.setattr(ops, "function", refuse)
    assert warm._compile(Job("w4", CPU, 1, Narrow(1, 1, 4, 2))) == "does not compile"
    assert warm._compile(Job("w4", CPU, 1, Library())) == ""


def test_nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    for module in (ops, pruned):
        monkeypatch.setattr(module, "function", lambda kernel, device: asked.append(kernel))
    assert warm._compile(Job("w3", CPU, 2, Narrow(1, 2, 8, 3))) == ""
    assert warm._compile(Job("sparse-w4", CPU, 2, Narrow(1, 2, 8, 3, split=2))) == ""
    first, second = (dict(kernel.defines) for kernel in asked)
    assert (first["BITS"], first["RT"], first["WARPS"], first["BESIDE"]) == (3, 2, 8, 1)
    assert (second["BITS"], second["RT"], second["SPLIT"], second["SPARSE"]) == (4, 2, 2, 1)
