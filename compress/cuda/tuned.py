"""Launch shapes that were measured on a card: which one is the fastest for which layer and number of tokens.

`compress bench kernels --tune` writes them, `choice.py` reads them. A file holds one card's:

    {"schema": 1, "device": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "sms": 132, "date": "2026-11-22",
     "entries": [{"kind": 0, "bits": 4, "tokens": 1, "rows": 4096, "columns": 4096, "way": ["narrow", 1, 2, 8, 3],
                  "us": 5.3}, ...]}

`way` is the lower-case name of a class of choice.py and its fields in their order. Files that come with the package are
kernels/tuned*.json; a user's own is tuned-DEVICE.json in the cache folder, and what it has goes before theirs.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress import assets
from compress.errors import CompressError

SCHEMA = 1
#: how far a measured shape may be from the one that is asked for, in each dimension, and a number of tokens above it
SHAPES_APART, TOKENS_APART = 2.0, 4.0
_LOG = logging.getLogger("compress.cuda")

Way = tuple[str | int, ...]


@dataclass(frozen=True)
class Entry:
    """The fastest way for a layer and a number of tokens.

    Attributes:
        kind, bits: of the layer, as in ops.Layer; or pruned.PRUNED.
        tokens: inputs.
        rows, columns: out_features, in_features.
        way: ("narrow", 1, 2, 8, 3).
        us: microseconds that it took.
    """

    kind: int
    bits: int
    tokens: int
    rows: int
    columns: int
    way: Way
    us: float

    @property
    def case(self) -> tuple[int, ...]:
        """What it is an answer to."""
        return self.kind, self.bits, self.tokens, self.rows, self.columns


@functools.cache
def load(device: str) -> tuple[Entry, ...]:
    """What is known of a device, a user's own measurements first. Read once a process; a file that cannot be read is
    told in the log and left out.

    Args:
        device: its name, "NVIDIA H100 80GB HBM3".
    """
    files = [user_file(device), *sorted(assets.folder("kernels").glob("tuned*.json"))]
    return tuple(entry for file in files for entry in _entries(file, device))


def forget() -> None:
    """Let `load` read the files again."""
    load.cache_clear()


def save(device: str, capability: tuple[int, int], sms: int, date: str, entries: Iterable[Entry]) -> Path:
    """Add measurements to the user's file for a device; a newer one takes the place of an older one of the same case.

    Args:
        device: its name.
        capability: (9, 0).
        sms: multiprocessors.
        date: "2026-11-22".
        entries: in any order.

    Returns:
        The file.

    Raises:
        CompressError: the folder cannot be written.
    """
    from compress.writer import write_text

    file = user_file(device)
    every = {e.case: e for e in _entries(file, device)} | {e.case: e for e in entries}
    head = {"schema": SCHEMA, "device": device, "capability": list(capability), "sms": sms, "date": date}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, _text(head, [every[case] for case in sorted(every)]))
    except OSError as error:
        remedy = "set COMPRESS_CACHE to a folder that can be written"
        raise CompressError(error.strerror or str(error), str(file), remedy) from error
    forget()
    return file


def user_file(device: str) -> Path:
    """Where a user's own measurements are: tuned-NVIDIA-H100-80GB-HBM3.json in the cache folder."""
    from compress.smollm2 import cache_folder

    name = "-".join("".join(c if c.isalnum() or c in "._" else " " for c in device).split())
    return cache_folder() / f"tuned-{name}.json"


def nearest(entries: Sequence[Entry], kind: int, bits: int, tokens: int, rows: int, columns: int) -> Way | None:
    """The way that was fastest for the most similar case, or None where nothing similar was measured.

    Of the entries of this kind and these bits whose rows and columns are within a factor of `SHAPES_APART`: those with
    the next larger number of tokens, up to `TOKENS_APART` times as many; of these the nearest shape; of equals the
    first.
    """
    found: tuple[tuple[int, float], Way] | None = None
    for e in entries:
        if (e.kind, e.bits) != (kind, bits) or not 0 < tokens <= e.tokens <= TOKENS_APART * tokens:
            continue
        apart = abs(math.log2(e.rows / max(rows, 1))), abs(math.log2(e.columns / max(columns, 1)))
        rank = e.tokens, sum(x * x for x in apart)
        if max(apart) <= math.log2(SHAPES_APART) and (found is None or rank < found[0]):
            found = rank, e.way
    return None if found is None else found[1]


def _entries(file: Path, device: str) -> list[Entry]:
    """Of a file, if it is of that device; none where there is no such file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA or found["device"] != device:
            return []
        return [_entry(e) for e in found["entries"]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("measured launch shapes are not used: %s: %s: %s", file, type(error).__name__, error)
        return []


def _entry(found: dict[str, Any]) -> Entry:
    """Raises KeyError, TypeError or ValueError for what is none."""
    name, *numbers = found["way"]
    numbers = [int(n) for n in numbers]
    values = {k: int(found[k]) for k in ("kind", "bits", "tokens", "rows", "columns")}
    if not isinstance(name, str) or min(values["tokens"], values["rows"], values["columns"]) < 1:
        raise ValueError(f"no measurement: {found}")
    return Entry(**values, way=(name, *numbers), us=float(found["us"]))


def _text(head: dict[str, Any], entries: Sequence[Entry]) -> str:
    """JSON with an entry a line, so that a change can be read."""
    lines = ",\n    ".join(json.dumps({**asdict(e), "us": round(e.us, 2)}) for e in entries)
    start = json.dumps(head, indent=2).removesuffix("\n}")
    return f'{start},\n  "entries": [\n    {lines}\n  ]\n}}\n'
