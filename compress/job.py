"""What a run is asked (Job), where it is (Status, Clock), and what it did (Result): plain values, no work."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from compress.calibration import EvalText, Rows
from compress.evaluate.perplexity import Score
from compress.plan import Plan
from compress.recipe import Recipe
from compress.stats import Shared
from compress.verify import Proof

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        source: the model's folder.
        out: the output folder's final name.
        recipe: what to do.
        format: name in the FORMATS table.
        rows: calibration rows; None when the pass needs none.
        text: evaluation text; None for no evaluation.
        device, dtype: where and in what precision blocks run; dtype None for the checkpoint's own.
        true_sequential: collect each layer's statistics after the layers before it in the block are compressed.
        include, exclude: patterns on layer names.
        target: the client that must be able to load the result.
        blocks: the blocks to compress, "0-3,-1"; "" for all.
        lm_head: compress the output head too.
        low_memory: keep nothing on the device that can be elsewhere.
        seed: recorded; the rows were drawn with it.
        fallback: the format was picked, not asked for: our own where a layer's shape does not fit it.
        verify: read the result back (verify.py).
        client: and load it whole through the client that reads its format, where it fits in memory (asking.py).
        origin: what the user called the model (a hub id), for the records.
        push_to: the hub repository that the finished folder is uploaded to.
        push_public: a repository that does not exist yet is made public.
        notes: what the report is to say beside what the run itself finds: how the recipe came about.
        files: further text files of the output folder, by name.
        shared: what runs on the same rows, model, device and dtype need not find out each for itself.
    """

    source: Path
    out: Path
    recipe: Recipe
    format: str = "compressed-tensors"
    rows: Rows | None = None
    text: EvalText | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype | None = None
    true_sequential: bool = False
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    blocks: str = ""
    target: str | None = None
    lm_head: bool = False
    low_memory: bool = False
    seed: int = 0
    origin: str = ""
    fallback: bool = False
    verify: bool = True
    client: bool = True
    overwrite: bool = False
    fresh: bool = False
    allow_pickle: bool = False
    trust_remote_code: bool = False
    push_to: str | None = None
    push_public: bool = False
    notes: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    shared: Shared | None = None


@dataclass(frozen=True)
class Status:
    """Where a run is; handed to the caller's progress line.

    Attributes:
        phase: "calibrate", "compress", "verify", "evaluate", "upload".
        done, total: blocks (or what the phase counts).
        layers, all_layers: layers compressed so far.
    """

    phase: str
    done: int
    total: int
    layers: int = 0
    all_layers: int = 0


class Instant(Protocol):
    """A moment in the work of a device, as torch.cuda.Event has it."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...
    def elapsed_time(self, end: Self) -> float: ...


class _Now:
    """A moment of this process."""

    def __init__(self) -> None:
        self.seconds = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Now) -> float:
        return 1e3 * (end.seconds - self.seconds)


def _event(device: torch.device) -> torch.cuda.Event:
    """A moment in the work that is queued on a GPU."""
    made: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    made.record(torch.cuda.current_stream(device))
    return made


class Clock:
    """Seconds spent in each part of a run. A part inside another counts as itself alone, so parts add up.

    On a GPU the moments are events in the stream of the work and nothing waits for them: a part's seconds are those in
    which that stream stood in it, at work or waiting for the host.

    Args:
        instant: what the moment is now; by default one in the work of the device.
    """

    def __init__(self, device: torch.device = _CPU, instant: Callable[[], Any] | None = None) -> None:
        here = device.type != "cuda"
        self._instant = instant or (_Now if here else partial(_event, device))
        self._inside: list[str] = []
        self._last: Instant | None = None
        self._spans: deque[tuple[str, Instant, Instant]] = deque()  # not known to be over
        self._seconds: dict[str, float] = {}
        self._beside: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._turn()
        self._inside.append(part)
        try:
            yield
        finally:
            self._turn()
            self._inside.pop()

    @contextmanager
    def beside(self, part: str) -> Iterator[None]:
        """The seconds of a thread, while the run goes on."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._beside[part] = self._beside.get(part, 0.0) + time.perf_counter() - begun

    @property
    def seconds(self) -> dict[str, float]:
        """By part of the run. Waits for the device."""
        while self._spans:
            self._spans[0][2].synchronize()
            self._add_up()
        return dict(self._seconds)

    @property
    def seconds_beside(self) -> dict[str, float]:
        """By part, of threads that worked while the run went on: no share of its time."""
        with self._lock:
            return dict(self._beside)

    def _turn(self) -> None:
        """What has passed since the last turn belongs to the innermost part."""
        now = self._instant()
        if self._inside and self._last is not None:
            self._spans.append((self._inside[-1], self._last, now))
        self._last = now
        self._add_up()

    def _add_up(self) -> None:
        """Add the spans that are over to their parts."""
        while self._spans and self._spans[0][2].query():
            part, begun, ended = self._spans.popleft()
            self._seconds[part] = self._seconds.get(part, 0.0) + begun.elapsed_time(ended) / 1e3


@dataclass(frozen=True)
class Result:
    """What a run did; report/ turns it into tables and files.

    Attributes:
        records: for each compressed layer its error, tokens and notes.
        score, original: figures of the written file and of the original on the evaluation text.
        proof: what was verified; None with --no-verify.
        seconds: by part of the run.
        beside: seconds of the threads that read, hashed and wrote while the run went on.
        room: where the run kept what, as decided from free memory.
        resumed: blocks taken over from an earlier, stopped run.
        notes: what transforms had to say.
        changed: names of tensors beside the packed layers that they replaced.
    """

    job: Job
    plan: Plan
    records: list[dict[str, Any]]
    proof: Proof | None
    score: Score | None
    original: Score | None
    seconds: dict[str, float]
    resumed: int
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    changed: tuple[str, ...] = ()
    beside: dict[str, float] = field(default_factory=dict)
    room: dict[str, Any] = field(default_factory=dict)


Progress = Callable[[Status], None]
