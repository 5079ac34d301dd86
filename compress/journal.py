"""The journal of a run: finished blocks on disk, so that a killed run goes on where it stopped.

The work folder OUT.partial holds fingerprint.json, and for each finished block block-00003.safetensors (its packed
tensors as the format stores them) and block-00003.json (its records, written last: a block without it is not finished).
The finished checkpoint is assembled in OUT.partial/final, where a large one's blocks are the same files by other names,
and renamed to OUT; an output that it replaces waits in
OUT.partial/replaced between the two renames. Nothing here is ever pickled.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from compress.checkpoint import Stored, read_header, read_json
from compress.errors import CompressError
from compress.hashes import hash_files
from compress.writer import save_tensors, write_json

_FRESH = "pass --fresh to start over"
#: what a run leaves in its work folder; a folder that holds anything else is not deleted
_OURS = re.compile(
    r"(fingerprint\.json|block-\d+\.(safetensors|json)|(hidden|original|inside)\.bin)(\.tmp)?|final|replaced"
)


def check_output(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raise CompressError unless a finished checkpoint may be renamed to `out`.

    Args:
        overwrite: an earlier output there may be replaced.
        source: the input, which must not be replaced with it.
    """
    if out.name in ("", ".."):
        raise CompressError("is not the name of a new folder", f"-o {out}", "name one, such as -o OUT")
    if out.is_symlink() and not out.exists():
        raise CompressError("is a link to nothing", str(out), "remove it, or choose another -o")
    if not out.exists():
        return
    if source is not None and (out.resolve() == source.resolve() or out.resolve() in source.resolve().parents):
        raise CompressError("the input is there", str(out), "choose another -o")
    if not overwrite:
        raise CompressError("the output exists", str(out), "pass --overwrite to replace it, or another -o")
    if not out.is_dir() or (not (out / "config.json").exists() and any(out.iterdir())):
        raise CompressError("exists and is not a model folder", str(out), "choose another -o")


class Journal:
    """The work folder beside an output folder; a context that keeps other runs away.

    Args:
        out: the final name.
        overwrite: an existing output may be replaced at the very end.
        source: the input.

    Raises:
        CompressError: the output exists and may not be replaced; another run is writing it.
    """

    def __init__(self, out: Path, overwrite: bool, source: Path | None = None) -> None:
        self.out = out
        self.overwrite = overwrite
        self.source = source
        check_output(out, overwrite, source)
        self.folder = out.with_name(out.name + ".partial")
        self.final = self.folder / "final"
        self.unpickled = out.with_name(out.name + ".unpickled")
        self._replaced = self.folder / "replaced"
        self._recorded = self.folder / "fingerprint.json"
        self._owed: Callable[[], Mapping[str, Any]] | None = None
        self._ready: Callable[[], bool] = lambda: True
        self._lock = FileLock(out.with_name(out.name + ".lock"))

    def __enter__(self) -> Journal:
        try:
            self.out.absolute().parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise CompressError(
                "another run is writing this output", str(self.out), "wait for it, or choose another -o"
            ) from None
        except OSError as error:
            what = f"cannot be locked ({error.strerror})"
            raise CompressError(what, self._lock.lock_file, "choose another folder with -o") from None
        try:
            self._put_back()
            check_output(self.out, self.overwrite, self.source)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.folder.is_dir() and not any(self.folder.iterdir()):  # a run that failed before its first block
            self.folder.rmdir()
        # unlinked while still held: one who opened the file before cannot lock it and believe to be alone
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def earlier(self) -> dict[str, Any]:
        """The fingerprint of a run that was stopped here; empty if there was none."""
        return read_json(self._recorded, _FRESH) if self._recorded.exists() else {}

    def start(
        self,
        fingerprint: Callable[[], Mapping[str, Any]],
        fresh: bool,
        ready: Callable[[], bool] = lambda: True,
    ) -> int:
        """Open the work folder for a run described by `fingerprint`.

        Args:
            fingerprint: called now if an earlier run was stopped here, else by the first `count` that finds it ready,
                at the latest by `settle`.
            fresh: an earlier run does not count.
            ready: whether `fingerprint` would not wait.

        Returns:
            how many blocks are finished already.

        Raises:
            CompressError: an earlier, different run was stopped here (names what differs).
        """
        earlier = {} if fresh else self.earlier()
        if earlier:
            differences = compare(earlier, fingerprint())
            if differences:
                raise CompressError(
                    f"an unfinished run differs in {'; '.join(differences)}",
                    str(self.folder),
                    f"{_FRESH}, or the earlier settings to go on",
                )
        else:
            self._discard()
            self.folder.mkdir(parents=True)
            self._owed, self._ready = fingerprint, ready
        for leftover in (self.final, self._replaced):
            if leftover.exists():
                shutil.rmtree(leftover)
        done = 0
        while self._records(done).exists():
            done += 1
        return done

    def _discard(self) -> None:
        """Delete the work folder, unless it is not one."""
        if not os.path.lexists(self.folder):
            return
        strange = ["a file"] if not self.folder.is_dir() else []
        strange = strange or [f.name for f in sorted(self.folder.iterdir()) if not _OURS.fullmatch(f.name)]
        if strange:
            what = f"is in the way and not ours to delete (it holds {strange[0]})"
            raise CompressError(what, str(self.folder), "move it away, or choose another -o")
        self._recorded.unlink(missing_ok=True)
        shutil.rmtree(self.folder)

    def _file(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.safetensors"

    def _records(self, block: int) -> Path:
        return self.folder / f"block-{block:05d}.json"

    def add(
        self,
        block: int,
        tensors: dict[str, Tensor],
        records: list[dict[str, Any]],
        changed: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        """Write a finished block: `store`, then `count`."""
        self.count(block, self.store(block, tensors), records, changed, notes)

    def store(self, block: int, tensors: dict[str, Tensor]) -> str:
        """Write a finished block's tensors, which count once `count` is called. Returns the sha256 of their file."""
        return save_tensors(self._file(block), tensors)

    def count(
        self,
        block: int,
        sha256: str,
        records: list[dict[str, Any]],
        changed: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        rows: int | None = None,
    ) -> Path:
        """Write the records that make a stored block count. To be called for one block after another.

        Args:
            sha256: what `store` returned.
            changed: sha256 of tensors that replace the source's without being packed, by name.
            notes: what the report must say of the block.
            rows: calibration rows that went through the block at once.

        Returns:
            the file of its tensors.
        """
        if self._ready():
            self._tell()
        value: dict[str, Any] = {
            "sha256": sha256,
            "layers": records,
            "changed": dict(changed or {}),
            "notes": list(notes),
        }
        if rows is not None:
            value["rows"] = rows
        write_json(self._records(block), value)
        return self._file(block)

    def settle(self) -> None:
        """Once the blocks are written or given up: what the run is, without which they would not count."""
        if self._records(0).exists():
            self._tell()

    def _tell(self) -> None:
        if self._owed is not None:
            write_json(self._recorded, self._owed())
            self._owed = None

    def tensors(self, block: int, check: bool = True) -> dict[str, Stored]:
        """Where a finished block's tensors are. Raises CompressError when the file is not what was written.

        Args:
            check: read the file and compare its sha256; one that this run wrote is checked in what it ends in.
        """
        file, recorded = self.written(block)
        if not file.is_file() or (check and hash_files([file])[file.name] != recorded):
            raise CompressError("is gone or changed since it was written (sha256)", str(file), _FRESH)
        return read_header(file)

    def written(self, block: int) -> tuple[Path, str]:
        """The file of a finished block, and the sha256 that it had when it was written."""
        return self._file(block), self._read(block)["sha256"]

    def records(self, block: int) -> list[dict[str, Any]]:
        """The layer records of a finished block."""
        layers: list[dict[str, Any]] = self._read(block)["layers"]
        return layers

    def rows(self, block: int) -> int | None:
        """How many calibration rows went through a finished block at once, where that was written down."""
        rows = self._read(block).get("rows")
        return rows if isinstance(rows, int) and rows > 0 else None

    def everything(self, blocks: int) -> tuple[list[dict[str, Any]], dict[str, str], list[str]]:
        """Layer records, changed tensors and notes of the first `blocks` blocks."""
        records: list[dict[str, Any]] = []
        changed: dict[str, str] = {}
        notes: list[str] = []
        for block in range(blocks):
            found = self._read(block)
            records += found["layers"]
            changed |= found["changed"]
            notes += [n for n in found["notes"] if n not in notes]
        return records, changed, notes

    def _read(self, block: int) -> dict[str, Any]:
        found = read_json(self._records(block), _FRESH)
        kinds = {"sha256": str, "layers": list, "changed": dict, "notes": list}
        if not all(isinstance(found.get(key), kind) for key, kind in kinds.items()):
            raise CompressError("holds no records of a block", str(self._records(block)), _FRESH)
        return found

    def publish(self) -> None:
        """Rename the assembled folder to the final name, replacing an earlier output whole, then clean up."""
        for path in (*self.final.iterdir(), self.final):
            _sync(path)
        check_output(self.out, self.overwrite, self.source)  # it may have appeared meanwhile
        try:
            if self.out.exists():
                os.replace(self.out, self._replaced)
            os.replace(self.final, self.out)
        finally:
            self._put_back()
        _sync(self.out.absolute().parent)
        self._discard()
        shutil.rmtree(self.unpickled, ignore_errors=True)

    def _put_back(self) -> None:
        """Undo half a replacement: a run was stopped between the two renames."""
        if self._replaced.exists() and not os.path.lexists(self.out):
            os.replace(self._replaced, self.out)


def _sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
