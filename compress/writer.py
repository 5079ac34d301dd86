"""Files written durably: safetensors, shards with their index, JSON and text. Nothing is half there under its name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from compress.checkpoint import DTYPE_NAMES, DTYPES, INDEX, SINGLE, Stored, read_header, read_tensor, tensor_bytes
from compress.errors import CompressError

_COPY_BYTES = 1 << 24


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write one safetensors file durably (temporary name, fsync, rename). Returns its sha256."""
    entries = [(n, DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()]
    chunks = {n: (lambda t=t: [tensor_bytes(t)]) for n, t in tensors.items()}
    return _write(path, entries, lambda name: chunks[name]())


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...], int]], content: Any) -> str:
    """Write a safetensors file; `content(name)` yields each tensor's bytes. Widest dtypes first, so all are aligned."""
    entries = sorted(entries, key=lambda e: -DTYPES[e[1]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256(len(raw).to_bytes(8, "little") + raw)
    with _durably(path, 8 + len(raw) + at) as f, ThreadPoolExecutor(1, "sha256") as hashing:
        f.write(len(raw).to_bytes(8, "little") + raw)
        last: Future[None] | None = None
        for name, *_ in entries:
            for chunk in content(name):
                hashed = hashing.submit(digest.update, chunk)  # while it is written: both take about as long
                f.write(chunk)
                if last is not None:
                    last.result()
                last = hashed
    return digest.hexdigest()


@contextmanager
def _durably(path: Path, nbytes: int) -> Iterator[BinaryIO]:
    """A file to write: temporary name, fsync, rename. Raises CompressError when the disk does not take it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        what = f"its {nbytes} bytes cannot be written ({error.strerror})"
        remedy = "mend that, then give the same command again: finished blocks are kept"
        raise CompressError(what, str(path), remedy) from error


def _file_chunks(stored: Stored) -> Iterator[bytes | memoryview]:
    if stored.rope_heads:
        yield tensor_bytes(read_tensor(stored))
        return
    with stored.file.open("rb") as f:
        f.seek(stored.start)
        left = stored.nbytes
        while left:
            chunk = f.read(min(left, _COPY_BYTES))
            if not chunk:
                raise CompressError("the file ends inside a tensor", str(stored.file), "download it again")
            left -= len(chunk)
            yield chunk


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Stored]],
    shard_bytes: int,
    written: Sequence[tuple[Path, str]] = (),
) -> dict[str, str]:
    """Put stored tensors into shards of at most `shard_bytes` (a larger tensor gets its own), with an index.

    Args:
        written: safetensors files with their sha256. One that holds nothing but tensors of the list becomes a shard as
            it is: by another name of the same file, or copied where the file system has no hard links.

    Returns:
        sha256 of every file written, by name.
    """
    digests = dict(written)
    ready: dict[Path, list[tuple[str, Stored]]] = {file: [] for file in digests}
    rest: list[tuple[str, Stored]] = []
    for name, stored in tensors:
        ready.get(stored.file, rest).append((name, stored))
    for part in [f for f, held in ready.items() if len(held) != len(read_header(f))]:
        rest += ready.pop(part)
    shards: list[tuple[Path | None, list[tuple[str, Stored]]]] = [(f, held) for f, held in ready.items() if held]
    room = 0
    for name, stored in rest:
        if not room or stored.nbytes > room:
            shards.append((None, []))
            room = shard_bytes
        shards[-1][1].append((name, stored))
        room = max(room - stored.nbytes, 0)
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, (file, shard) in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        if file is None:
            found = dict(shard)
            entries = [(n, s.dtype, s.shape, s.nbytes) for n, s in shard]
            hashes[name] = _write(folder / name, entries, lambda name, found=found: _file_chunks(found[name]))
        else:
            _same_file(file, folder / name)
            hashes[name] = digests[file]
        weight_map.update({n: name for n, _ in shard})
    if len(shards) > 1:
        total = sum(s.nbytes for _, shard in shards for _, s in shard)
        hashes[INDEX] = write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes


def has_links(folder: Path) -> bool:
    """Whether files of an existing folder can have two names; False where nothing can be written."""
    try:
        with tempfile.TemporaryDirectory(prefix=".compress-links-", dir=folder) as place:
            file = Path(place) / "a"
            file.touch()
            os.link(file, file.with_name("b"))
    except OSError:
        return False
    return True


def _same_file(file: Path, name: Path) -> None:
    """Give a finished file another name, or copy it durably."""
    try:
        os.link(file, name)
    except OSError:
        with _durably(name, file.stat().st_size) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy, _COPY_BYTES)


def write_json(path: Path, value: Any) -> str:
    """Write JSON durably (temporary name, fsync, rename). Returns its sha256."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> str:
    """Write a text file durably (temporary name, fsync, rename). Returns its sha256."""
    raw = text.encode()
    with _durably(path, len(raw)) as f:
        f.write(raw)
    return hashlib.sha256(raw).hexdigest()
