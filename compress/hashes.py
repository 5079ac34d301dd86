"""sha256 of files, many at once and large ones in pieces."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

_READ_BYTES = 1 << 24


def hash_files(paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, by its name, hashed in parallel."""
    return {path.name: digest.hex() for path, digest in zip(paths, hash_parts([(p, 0) for p in paths]), strict=True)}


def hash_parts(
    parts: Sequence[tuple[Path, int]], nbytes: int = sys.maxsize, stop: threading.Event | None = None
) -> list[bytes]:
    """sha256 of at most `nbytes` of each file, from an offset on."""

    def one(part: tuple[Path, int]) -> bytes:
        path, start = part
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as f:
            left = min(nbytes, os.fstat(f.fileno()).st_size - start)
            f.seek(start)
            chunk = memoryview(bytearray(min(_READ_BYTES, max(left, 1))))
            got = -1
            while left > 0 and got:
                if stop is not None and stop.is_set():
                    raise CancelledError
                got = f.readinto(chunk[:left])
                digest.update(chunk[:got])
                left -= got
        return digest.digest()

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(one, parts))
