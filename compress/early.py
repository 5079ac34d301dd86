"""Blocks read back while later ones are worked on, where their files are to be the checkpoint's as they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress.ahead import Timed, threads_for, untimed
from compress.checkpoint import Checkpoint, read_header
from compress.verify import Seen, Unpacking, room_to_unpack, state_of, wrong_files
from compress.weights import Weights

#: that read and hash, of many cores: the run goes on beside them, and hashes what it solves
_THREADS = 8


@dataclass(frozen=True)
class _Asked:
    """A file that is being read: what it is, what must be in it, and the work on it."""

    state: tuple[int, ...]
    layers: frozenset[str]
    work: list[Future[None]]


class Early:
    """Reads files back in threads. A context: what is not begun when it ends is not done.

    Args:
        config: config.json of the checkpoint that they will be a part of.
        device: where layers are unpacked and dequantised.
        timed: counts the seconds of the threads as "read back".
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device, timed: Timed = untimed) -> None:
        self._config, self._device, self._timed = dict(config), device, timed
        self._pool: ThreadPoolExecutor | None = None
        self._unpacking: Unpacking | None = None
        self._asked: deque[_Asked] = deque()
        self._seen: dict[tuple[int, ...], frozenset[str]] = {}

    def __enter__(self) -> Early:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, file: Path, sha256: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Let a finished file be read: its bytes against `sha256`, its layers against their records."""
        if self._pool is None or self._unpacking is None:
            self._pool = ThreadPoolExecutor(threads_for(room_to_unpack(records), _THREADS), "read-back")
            self._unpacking = Unpacking(self._device)
        state, names = state_of(file), frozenset(str(r["name"]) for r in records)
        written = Weights(Checkpoint(file.parent, self._config, read_header(file)), part=names)
        work: list[Callable[[], object]] = [partial(wrong_files, file.parent, {file.name: sha256})]
        work += [partial(self._unpacking.check, written, record) for record in records]
        self._asked.append(_Asked(state, names, [self._pool.submit(self._do, one) for one in work]))

    def _do(self, work: Callable[[], object]) -> None:
        with self._timed("read back"):
            work()

    def check(self) -> None:
        """Raise what was found so far: a run whose disk does not hold what it writes need not go on."""
        while self._asked and all(work.done() for work in self._asked[0].work):
            self._take()

    def seen(self) -> Seen:
        """What need not be read again. Waits; raises CompressError for the first difference."""
        while self._asked:
            self._take()
        return Seen(self._config, self._seen)

    def _take(self) -> None:
        asked = self._asked.popleft()
        for work in asked.work:
            work.result()
        self._seen[asked.state] = asked.layers
