"""What was measured, on disk: a killed measurement goes on, and another budget measures nothing again.

The folder holds fingerprint.json (everything that the figures depend on), and for each block block-00003.json: of every
layer and candidate the solver's loss. block-00003.safetensors holds the layers of that block whose divergence is still
to be measured, as they are stored; divergences.json, written last, makes it unnecessary. Every file is written whole
(temporary name, fsync, rename). Nothing here depends on a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from compress.auto.candidates import Candidate
from compress.blocks import Linear
from compress.checkpoint import read_header, read_json, read_tensor
from compress.errors import CompressError
from compress.journal import compare
from compress.packed import KINDS
from compress.types import Packed
from compress.writer import save_tensors, write_json

_FRESH = "pass --fresh to measure anew, or another folder with --measured"
#: {layer: {candidate: {"loss", "norm", "tokens"}}}
Losses = dict[str, dict[str, dict[str, float]]]
#: {group: {candidate: nats a token}}
Divergences = dict[str, dict[str, float]]


class Store:
    """See the module's text.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self, fingerprint: Callable[[], Mapping[str, Any]], fresh: bool) -> Iterator[Store]:
        """Keep other runs away. Raises CompressError where what is there was measured on something else."""
        self.folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder.with_name(self.folder.name + ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            remedy = "wait for it, or choose another folder with --measured"
            raise CompressError("another run is measuring", str(self.folder), remedy) from None
        try:
            self._begin(fingerprint(), fresh)
            yield self
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def _begin(self, fingerprint: Mapping[str, Any], fresh: bool) -> None:
        recorded = self.folder / "fingerprint.json"
        if recorded.exists() and not fresh:
            differences = compare(read_json(recorded, _FRESH), fingerprint)
            if differences:
                raise CompressError(f"was measured with other {'; '.join(differences)}", str(self.folder), _FRESH)
            return
        for old in [*self._files("block-*.json"), *self._files("block-*.safetensors"), *self._files("div*.json")]:
            old.unlink()
        self.folder.mkdir(exist_ok=True)
        write_json(recorded, fingerprint)

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self.folder.glob(pattern))

    def losses(self, block: int) -> Losses:
        """What is known of a block's layers."""
        path = self.folder / f"block-{block:05d}.json"
        found: Losses = read_json(path, _FRESH) if path.exists() else {}
        return found

    def divergences(self) -> Divergences:
        """What is known of the groups."""
        path = self.folder / "divergences.json"
        found: Divergences = read_json(path, _FRESH) if path.exists() else {}
        return found

    def add(self, block: int, losses: Losses, packed: Mapping[tuple[str, str], Packed]) -> None:
        """Write what was solved of a block: first the layers by (name, candidate), then the losses."""
        tensors: dict[str, Tensor] = {}
        for (name, key), layer in packed.items():
            tensors |= {f"{name}/{key}/{part}": t.contiguous().cpu() for part, t in layer.tensors().items()}
        if tensors:
            before = read_header(self._stash(block)) if self._stash(block).exists() else {}
            save_tensors(self._stash(block), {n: read_tensor(s) for n, s in before.items()} | tensors)
        merged = self.losses(block)
        for name, found in losses.items():
            merged[name] = merged.get(name, {}) | found
        write_json(self.folder / f"block-{block:05d}.json", merged)

    def keeps(self, block: int, linear: Linear, candidate: Candidate) -> bool:
        """Whether `packed` has this layer."""
        head = f"{linear.name}/{candidate.key}/"
        return self._stash(block).exists() and any(n.startswith(head) for n in read_header(self._stash(block)))

    def packed(self, block: int, linear: Linear, candidate: Candidate, dtype: torch.dtype) -> Packed:
        """A layer that `add` kept. dtype: of its scales."""
        head = f"{linear.name}/{candidate.key}/"
        stored = {n.removeprefix(head): s for n, s in read_header(self._stash(block)).items() if n.startswith(head)}
        storage = candidate.method.storage
        kind: Any = KINDS[storage.kind]
        found: Packed = kind.from_tensors({n: read_tensor(s) for n, s in stored.items()}, storage, linear.shape, dtype)
        return found

    def _stash(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def finish(self, divergences: Divergences) -> None:
        """Write the divergences of groups, beside those that are known, and remove what only they needed."""
        merged = self.divergences()
        for name, found in divergences.items():
            merged[name] = merged.get(name, {}) | found
        write_json(self.folder / "divergences.json", merged)
        for stash in self._files("block-*.safetensors"):
            stash.unlink()
