"""Finds the fastest way for each kind, shape and number of tokens, for the table that choice.py reads.

Every candidate runs once and is compared with the product by definition. Those that are right go round the copies of
the layer once, in a graph that is replayed a few times; the best of these are timed as for a report.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.bench import timing
from compress.bench.cases import CASES
from compress.bench.checks import coarseness, difference
from compress.bench.layers import Setting, Shape, short
from compress.bench.warm import Job, warm
from compress.bench.ways import Layer, Way, candidates, chosen, layer_of, multiply, written
from compress.cuda import support
from compress.cuda.tuned import Entry
from compress.errors import CompressError

_FINALISTS = 5
_NEAR = 1.15  # finalists are within this of the best of the first round


@dataclass(frozen=True)
class Tuned:
    """What was found of one case.

    Attributes:
        kind: of `CASES`.
        entry: the winner.
        before: what would have run, and its microseconds; nan if it does not run or is wrong.
        tried, failed: candidates; those that did not compile or run, or were wrong.
    """

    kind: str
    entry: Entry
    before: tuple[str, float]
    tried: int
    failed: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        way, us = self.before
        e = self.entry
        return {
            "kind": self.kind, "rows": e.rows, "columns": e.columns, "tokens": e.tokens, "way": list(e.way),
            "us": round(e.us, 2), "before": way, "before_us": None if us != us else round(us, 2), "tried": self.tried,
            "failed": self.failed,
        }  # fmt: skip


def small(kind: str, setting: Setting) -> Layer | None:
    """A layer of a kind, as small as they come and on the CPU; None where there are no ways to choose from."""
    return layer_of(CASES[kind].build((16, 128), replace(setting, device="cpu")).subject)


def tune(
    kinds: Sequence[str], shapes: Sequence[Shape], tokens: Sequence[int], setting: Setting, told: Callable[[str], None]
) -> Iterator[list[Tuned]]:
    """The winner of each case whose kind has ways to choose from; a list for each kind and shape.

    Args:
        kinds, shapes, tokens: every combination.
        setting: on a CUDA device, which is the current one.
        told: is called with a line before something that takes long.

    Raises:
        CompressError: a candidate stopped the device.
    """
    device = torch.cuda.current_device()
    known, processors = support.probe(device), torch.cuda.get_device_properties(device).multi_processor_count
    hopper = known.capability == (9, 0)
    plan: dict[tuple[str, Shape, int], list[Way]] = {}
    for kind in kinds:
        layer = small(kind, setting)
        for shape in shapes if layer is not None else ():
            for count in tokens:
                assert layer is not None
                plan[kind, shape, count] = candidates(layer, shape, count, hopper, processors, known.shared)
    jobs = {Job(kind, setting, count, way) for (kind, _, count), ways in plan.items() for way in ways}
    told(f"compiling up to {len(jobs)} kernels")
    refused = warm(sorted(jobs, key=repr))
    for kind, shape in dict.fromkeys((kind, shape) for kind, shape, _ in plan):
        told(f"tuning {kind} {shape[0]}x{shape[1]}")
        layers, references = _layers(kind, shape, tokens, setting)
        found = []
        for count in tokens:
            ways = plan[kind, shape, count]
            bad = {short(w): reason for w in ways if (reason := refused.get(Job(kind, setting, count, w)))}
            good = [w for w in ways if short(w) not in bad]
            found.append(_case(kind, layers, references[count], good, bad))
        yield found


def _layers(
    kind: str, shape: Shape, tokens: Sequence[int], setting: Setting
) -> tuple[list[Layer], dict[int, tuple[Tensor, Tensor]]]:
    """Copies to go round, and inputs with their products by the number of tokens."""
    built = CASES[kind].build(shape, setting)
    reference, layer = built.reference(), layer_of(built.subject)
    assert layer is not None
    inputs = {count: setting.normal(count, shape[1]) for count in tokens}
    count = timing.copies(built.size, torch.cuda.current_device())
    return [copy.deepcopy(layer) for _ in range(count)], {n: (x, reference(x)) for n, x in inputs.items()}


def _case(
    kind: str, layers: list[Layer], known: tuple[Tensor, Tensor], ways: Sequence[Way], failed: dict[str, str]
) -> Tuned:
    """The winner of the ways for one number of tokens; `failed` grows."""
    (x, expected), layer = known, layers[0]
    out = torch.empty(len(x), layer.rows, dtype=x.dtype, device=x.device)

    def calls(way: Way) -> list[Callable[[], None]]:
        return [partial(multiply, x, each, out, way) for each in layers]

    before = chosen(layer, (layer.rows, x.shape[1]), len(x), out.device.index)
    first: dict[Way, float] = {}
    for way in dict.fromkeys((before, *ways)):
        reason = _wrong(calls(way)[0], out, expected, CASES[kind].limit * coarseness(x.dtype))
        if reason:
            failed[short(way)] = reason
        else:
            first[way] = once(calls(way))
    if not first:
        raise CompressError(f"nothing multiplies {len(x)} inputs by {kind}: {failed}", "--tune", "report this")
    best = sorted(first, key=lambda way: first[way])
    near = [w for w in best[:_FINALISTS] if first[w] <= _NEAR * first[best[0]]]
    times = {way: timing.graph(calls(way)) for way in dict.fromkeys((*near, *([before] if before in first else [])))}
    winner = min(times, key=lambda way: times[way])
    entry = Entry(layer.kind, layer.bits, len(x), layer.rows, x.shape[1], written(winner), times[winner])
    return Tuned(kind, entry, (short(before), times.get(before, float("nan"))), len(first) + len(failed), failed)


def _wrong(call: Callable[[], None], out: Tensor, expected: Tensor, limit: float) -> str:
    """Why a way cannot be taken; raises CompressError where it takes the device along."""
    out.fill_(float("nan"))
    try:
        call()
        error = difference(out, expected)
    except (CompressError, RuntimeError) as raised:
        try:
            torch.cuda.synchronize()
        except RuntimeError as dead:
            raise CompressError(f"the device stopped: {raised}", "--tune", "report this, with the command") from dead
        return " ".join(str(raised).split())[:200]
    return "" if error <= limit else f"relative error {error:.1e}"


def once(calls: Sequence[Callable[[], None]]) -> float:
    """Microseconds of a call, roughly: a graph of one round, the best of four replays."""
    rounds = max(1, 4 // len(calls))
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for call in (*calls,) * rounds:
            call()
    return 1e3 * min(timing.elapsed(recorded.replay) for _ in range(4)) / (rounds * len(calls))
