"""Several models against one original on one text: one walk through each, one pass of all heads.

The original's final states are made once (or taken from a cache), whatever the number of models. All states wait on the
device, in pinned memory or on disk (hidden.py) until the heads run over them together, so that the original's head runs
once too. Where the heads of all models do not fit beside each other, the models go in groups, and that is told.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compress.ahead import Timed, untimed
from compress.blocks import BlockModel
from compress.evaluate.layers import Distances, check_alike, walk
from compress.evaluate.scores import Seen, Values, read_off
from compress.evaluate.states import Cache, Step, final_states, fitting, key_of
from compress.evaluate.windows import Windows
from compress.hidden import Activations, free_memory
from compress.weights import Weights

_HEADS = 0.3  # of the free memory, at most, for what stands outside the blocks of all models


@dataclass(frozen=True)
class Setting:
    """Where and how models run."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    low_memory: bool = False

    def open(self, weights: Weights) -> BlockModel:
        """The streamed model of a checkpoint."""
        return BlockModel(weights, self.dtype, self.device, self.trust_remote_code, self.low_memory)


@dataclass
class Measured:
    """Values of each model on one text, and what came with them.

    Attributes:
        base: None without an original.
        distances: of each model, empty unless asked for.
        forwards: walks through a model that were made.
        notes: what a reader must know.
    """

    models: list[Values] = field(default_factory=list)
    base: Values | None = None
    distances: list[Distances] = field(default_factory=list)
    forwards: int = 0
    notes: list[str] = field(default_factory=list)


def measure(
    models: Sequence[Weights],
    base: Weights | None,
    windows: Windows,
    setting: Setting,
    step: Step = lambda done, total: None,
    cache: Cache | None = None,
    layers: bool = False,
    clock: Timed = untimed,
) -> Measured:
    """See the module's text.

    Args:
        step: called with (walks through a block done, all of them).
        cache: where the base's states are kept for later runs.
        layers: tell the distance of each layer and block from the base's, which must be there.

    Raises:
        CompressError: a checkpoint that cannot be read, states or logits that are NaN.
    """
    found = Measured()
    with tempfile.TemporaryDirectory(prefix="compress-eval-") as scratch, ExitStack() as stack:
        opened = [setting.open(weights) for weights in models]
        original = None if base is None else setting.open(base)
        run = _Run(windows, setting, Path(scratch), step, clock, [*([original] if original else []), *opened])
        group = run.group(len(opened))
        if len(opened) > group:
            found.notes.append(
                f"{group} models at a time: the heads of all would not fit; the base's ran once for each group"
            )
        if layers:
            assert original is not None, "no original to tell the distance from"
            for model in opened:
                check_alike(original, model)
        seen = None
        if original is not None and not layers:
            seen = run.base_states(original, cache, found)
            stack.callback(seen.states.close)
        for at in range(0, len(opened), group):
            run.measure_group(opened[at : at + group], original if layers else None, seen, found)
    return found


class _Run:
    """What `measure` does to each model in turn."""

    def __init__(
        self,
        windows: Windows,
        setting: Setting,
        scratch: Path,
        step: Step,
        clock: Timed,
        every: Sequence[BlockModel],
    ) -> None:
        self._windows, self._setting, self._scratch = windows, setting, scratch
        self._step, self._clock = step, clock
        self._size = min(fitting(model, windows.rows, setting.low_memory) for model in every)
        self._heads = max(_outside(model) for model in every)
        self._done, self._total = 0, sum(len(model.block_names) for model in every)
        self._files = 0

    def group(self, models: int) -> int:
        """How many models' heads fit beside the base's."""
        room = _HEADS * free_memory(self._setting.device)
        return max(1, min(models, int(room / self._heads) - 1))

    def base_states(self, base: BlockModel, cache: Cache | None, found: Measured) -> Seen:
        """The base's final states, from the cache if they are there."""
        rows = self._windows.rows
        key = key_of(base, rows) if cache is not None else ""
        if cache is not None and (kept := cache.find(key, self._size, self._setting.device)) is not None:
            found.notes.append("the base's states were taken from the cache")
            self._total -= len(base.block_names)
            return Seen(base, kept, self._size)
        seen = self._walked(base, found)
        if cache is not None:
            with self._clock("cache"):
                refused = cache.keep(key, seen.states, len(rows))
            found.notes += [refused] if refused else []
        return seen

    def _walked(self, model: BlockModel, found: Measured) -> Seen:
        blocks, done = len(model.block_names), self._done

        def step(block: int, total: int) -> None:
            self._step(done + block, self._total)

        with self._clock("forward"):
            rows, low = self._windows.rows, self._setting.low_memory
            flow = final_states(model, rows, self._spill(), step, low, self._size)
        self._done += blocks
        found.forwards += 1
        return Seen(model, flow, self._size)

    def measure_group(
        self, models: Sequence[BlockModel], walked: BlockModel | None, base: Seen | None, found: Measured
    ) -> None:
        """Models whose heads run together; with `walked`, the base that they walk beside."""
        with ExitStack() as stack:
            if walked is not None:
                base, seen = self._side_by_side(walked, models, found)
                stack.callback(base.states.close)
            else:
                seen = [self._walked(model, found) for model in models]
            for one in seen:
                stack.callback(one.states.close)
            with self._clock("heads"):
                found.base, values = read_off(self._windows, base, seen)
            found.models += values
            for model in models:
                model.lean = True  # what stands outside the blocks is not needed again
                model.rest()

    def _side_by_side(self, base: BlockModel, models: Sequence[BlockModel], found: Measured) -> tuple[Seen, list[Seen]]:
        """All models behind their last blocks, and their distances from the base on the way."""
        low = self._setting.low_memory
        flows: list[Activations] = []
        with self._clock("layers"):
            for model in (base, *models):
                flow = Activations(model, self._windows.rows, self._size, self._spill(), low_memory=low)
                flow.enter()
                flows.append(flow)
            found.distances += walk(base, flows[0], list(zip(models, flows[1:], strict=True)), self._step)
        found.forwards += 2 + len(models)  # the base's blocks run twice
        first, *others = [Seen(m, f, self._size) for m, f in zip((base, *models), flows, strict=True)]
        return first, others

    def _spill(self) -> Path:
        self._files += 1
        return self._scratch / str(self._files)


def _outside(model: BlockModel) -> int:
    """Bytes of what stands outside the blocks: embeddings, norm, head."""
    inside = model.block_names[0].rpartition(".")[0] + "."
    counts: dict[int, int] = {id(p): p.numel() for n, p in model.model.named_parameters() if not n.startswith(inside)}
    held: int = sum(counts.values()) * model.dtype.itemsize
    return max(1, held)
