"""How long a kernel takes on a GPU: CUDA events, graph replay, buffers that rotate through more than the cache."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

#: the buffers that a measurement goes through hold this many times the L2 cache together
ROTATION = 4
_TARGET_MS = 3.0  # of one replay
_REPLAYS = 7
_MOST_CALLS = 400


def copies(size: int, device: int = 0, most: int = 64) -> int:
    """How many buffers of `size` bytes must rotate so that none is found in the cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(most, math.ceil(ROTATION * cache / max(1, size))))


def graph(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds of a call, launch overhead excluded: a CUDA graph that goes round `calls` is replayed."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    per = max(elapsed(lambda: [call() for call in calls]) / len(calls), 1e-3)
    count = min(_MOST_CALLS, max(len(calls), math.ceil(_TARGET_MS / per)))
    count = math.ceil(count / len(calls)) * len(calls)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for i in range(count):
            calls[i % len(calls)]()
    for _ in range(2):
        recorded.replay()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(elapsed(recorded.replay) for _ in range(_REPLAYS)) / count


def eager(calls: Sequence[Callable[[], object]], repeats: int = 5) -> float:
    """Median microseconds of a call as a host drives it: for what cannot be captured in a graph."""
    for call in calls[:4]:
        call()
    torch.cuda.synchronize()
    per = max(elapsed(lambda: [call() for call in calls]) / len(calls), 1e-3)
    count = min(_MOST_CALLS, max(len(calls), math.ceil(_TARGET_MS / per)))
    times = [elapsed(lambda: [calls[i % len(calls)]() for i in range(count)]) for _ in range(repeats)]
    return 1e3 * statistics.median(times) / count


def elapsed(run: Callable[[], object]) -> float:
    """Milliseconds on the device."""
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
