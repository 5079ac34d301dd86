"""Blocks read back while later ones are worked on, where their files are to be the checkpoint's as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from compress.ahead import Timed, untimed
from compress.checkpoint import Checkpoint, read_header
from compress.verify import Seen, layers, state_of, wrong_files
from compress.weights import Weights

#: that hash what was read: few, since the run goes on, and each holds a dense layer
_THREADS = 4


class Early:
    """Reads files back in a thread, one after another. A context: what is not begun when it ends is not done.

    Args:
        config: config.json of the checkpoint that they will be a part of.
        device: where layers are unpacked and dequantised.
        timed: counts the seconds of the thread as "read back".
    """

    def __init__(self, config: Mapping[str, Any], device: torch.device, timed: Timed = untimed) -> None:
        self._config, self._device, self._timed = dict(config), device, timed
        self._thread = ThreadPoolExecutor(1, "read-back")
        self._asked: list[Future[tuple[tuple[int, ...], frozenset[str]]]] = []

    def __enter__(self) -> Early:
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def add(self, file: Path, sha256: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Let a finished file be read: its bytes against `sha256`, its layers against their records."""
        self._asked.append(self._thread.submit(self._read, file, sha256, records))

    def check(self) -> None:
        """Raise what was found so far: a run whose disk does not hold what it writes need not go on."""
        for asked in self._asked:
            if not asked.done():
                return
            asked.result()

    def seen(self) -> Seen:
        """What need not be read again. Waits; raises CompressError for the first difference."""
        return Seen(self._config, dict(asked.result() for asked in self._asked))

    def _read(
        self, file: Path, sha256: str, records: Sequence[Mapping[str, Any]]
    ) -> tuple[tuple[int, ...], frozenset[str]]:
        with self._timed("read back"):
            state = state_of(file)
            wrong_files(file.parent, {file.name: sha256})
            names = frozenset(str(r["name"]) for r in records)
            written = Weights(Checkpoint(file.parent, self._config, read_header(file)), part=names)
            layers(written, records, device=self._device, most=_THREADS)
            return state, names
