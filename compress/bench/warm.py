"""Compiles many kernels at once, in processes that launch none: each finds its machine code in CuPy's cache on disk."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from compress.bench.cases import CASES
from compress.bench.layers import Setting
from compress.bench.ways import Way, layer_of, multiply

_SHAPE = (128, 2048)  # of a layer that stands for all of its kind
_FEW = 8  # kernels that are compiled as they are met
_MEMORY = 10**9  # bytes of the device that a process takes, generously


@dataclass(frozen=True)
class Job:
    """A kernel: which kind of layer, how it is made, how many inputs, in which way."""

    kind: str
    setting: Setting
    tokens: int
    way: Way


def warm(jobs: Sequence[Job]) -> dict[Job, str]:
    """Compile what is not yet in the cache; a few, or with little memory, are left for when they are met.

    Returns:
        Of those that do not compile the reason.
    """
    todo = list(dict.fromkeys(jobs))
    free, _ = torch.cuda.mem_get_info()
    count = min(os.cpu_count() or 1, 16, len(todo) // 4, free // _MEMORY)
    if len(todo) <= _FEW or count < 2:
        return {}
    chunk = max(1, min(8, len(todo) // (4 * count)))
    try:
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            said = list(pool.map(_compile, todo, chunksize=chunk))
    except BrokenProcessPool:  # one was killed: for want of memory, say
        return {}
    return {job: reason for job, reason in zip(todo, said, strict=True) if reason}


def _compile(job: Job) -> str:
    """In a process of its own, where launching does nothing. What went wrong, or nothing."""
    from compress.cuda import ops, pruned
    from compress.errors import CompressError

    for module in (ops, pruned):
        vars(module)["launch"] = lambda *launch: None
    try:
        layer = layer_of(CASES[job.kind].build(_SHAPE, job.setting).subject)
        assert layer is not None
        x = job.setting.normal(job.tokens, _SHAPE[1])
        multiply(x, layer, x.new_empty(job.tokens, _SHAPE[0]), job.way)
    except (CompressError, RuntimeError) as error:
        return str(error)
    return ""
