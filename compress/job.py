"""What a run is asked (Job), where it is (Status, Clock), and what it did (Result): plain values, no work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from compress.calibration import EvalText, Rows
from compress.evaluate.perplexity import Score
from compress.plan import Plan
from compress.recipe import Recipe
from compress.verify import Proof


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
        seed: recorded; the rows were drawn with it.
        fallback: the format was picked, not asked for: our own where a layer's shape does not fit it.
        verify: read the result back (verify.py).
        client: and load it whole through the client that reads its format, where it fits in memory (asking.py).
        origin: what the user called the model (a hub id), for the records.
        push_to: the hub repository that the finished folder is uploaded to.
        push_public: a repository that does not exist yet is made public.
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


@dataclass
class Clock:
    """Seconds spent in each part of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        begun = self._now()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + self._now() - begun

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Result:
    """What a run did; report/ turns it into tables and files.

    Attributes:
        records: for each compressed layer its error, tokens and notes.
        score, original: figures of the written file and of the original on the evaluation text.
        proof: what was verified; None with --no-verify.
        seconds: by part of the run.
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


Progress = Callable[[Status], None]
