"""The journal of a run: finished blocks on disk, so that a killed run goes on where it stopped.

The work folder OUT.partial holds fingerprint.json, and for each finished block block-00003.safetensors (its packed
tensors as the format stores them) and block-00003.json (its records, written last: a block without it is not finished).
The finished checkpoint is assembled in OUT.partial/final and renamed to OUT. Nothing here is ever pickled.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from compress.checkpoint import Stored, hash_files, read_header, read_json, save_tensors, write_json
from compress.errors import CompressError


class Journal:
    """The work folder beside an output folder.

    Args:
        out: the final name.
        overwrite: an existing output may be replaced at the very end.

    Raises:
        CompressError: the output exists and may not be replaced.
    """

    def __init__(self, out: Path, overwrite: bool) -> None:
        self.out = out
        self.folder = out.with_name(out.name + ".partial")
        self.final = self.folder / "final"
        self._lock = FileLock(out.with_name(out.name + ".lock"))
        if out.exists() and not overwrite:
            raise CompressError("the output exists", str(out), "pass --overwrite to replace it, or another -o")
        if out.exists() and not (out / "config.json").exists() and any(out.iterdir() if out.is_dir() else [out]):
            raise CompressError("exists and is not a model folder", str(out), "choose another -o")

    def __enter__(self) -> Journal:
        self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CompressError(
                "another run is writing this output", str(self.out), "wait for it, or choose another -o"
            ) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()
        Path(self._lock.lock_file).unlink(missing_ok=True)

    def earlier(self) -> dict[str, Any]:
        """The fingerprint of a run that was stopped here; empty if there was none."""
        recorded = self.folder / "fingerprint.json"
        return read_json(recorded) if recorded.exists() else {}

    def start(self, fingerprint: Mapping[str, Any], fresh: bool) -> int:
        """Open the work folder for a run described by `fingerprint`.

        Returns:
            how many blocks are finished already.

        Raises:
            CompressError: an earlier, different run was stopped here (names what differs).
        """
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        recorded = self.folder / "fingerprint.json"
        if recorded.exists():
            differences = compare(read_json(recorded), fingerprint)
            if differences:
                raise CompressError(
                    f"an unfinished run differs in {'; '.join(differences)}",
                    str(self.folder),
                    "pass --fresh to start over, or the earlier settings to go on",
                )
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(parents=True)
            write_json(recorded, fingerprint)
        shutil.rmtree(self.final, ignore_errors=True)
        done = 0
        while self._records(done).exists():
            done += 1
        return done

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _records(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def add(self, block: int, tensors: dict[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Write a finished block: tensors first, then the records that make it count."""
        digest = save_tensors(self._file(block), tensors)
        write_json(self._records(block), {"sha256": digest, "layers": records})

    def tensors(self, block: int) -> dict[str, Stored]:
        """Where a finished block's tensors are. Raises CompressError when the file is not what was written."""
        file = self._file(block)
        recorded = read_json(self._records(block))["sha256"]
        if hash_files([file])[file.name] != recorded:
            raise CompressError("the file changed since it was written", str(file), "pass --fresh to start over")
        return read_header(file)

    def records(self, block: int) -> list[dict[str, Any]]:
        """The layer records of a finished block."""
        layers: list[dict[str, Any]] = read_json(self._records(block))["layers"]
        return layers

    def publish(self) -> None:
        """Rename the assembled folder to the final name, replacing an earlier output whole, then clean up."""
        old = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(self.final, self.out)
        parent = os.open(self.out.absolute().parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.folder)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Differences between two fingerprints, as "name (was X, is Y)"."""
    out = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            out.extend(compare(a, b, f"{prefix}{key}."))
        elif a != b:
            out.append(f"{prefix}{key} (was {_brief(a)}, is {_brief(b)})")
    return out


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
