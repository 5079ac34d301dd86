"""Local text files -> documents, read row by row in any order; nothing large is held.

.txt is one document; .jsonl is read by line offsets, .json whole, .parquet through the package `datasets`
(memory-mapped Arrow files), which nothing else here needs.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from compress.errors import CompressError

T = TypeVar("T")
Document = tuple[str, object]  # where it stands (for messages), the value of its column
Documents = Callable[[int | None], Iterator[Document]]  # seed -> in seeded order; None -> as they stand

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
MAX_JOINED = 256 * 2**20  # characters; tokenising them in one piece takes many times their memory


class Part(Protocol):
    """Rows that can be read in any order."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        """Where row `index` stands (for messages), and its columns."""


@dataclass(frozen=True)
class _Text:
    path: Path

    def __len__(self) -> int:
        return 1

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        where = str(self.path)
        if (size := self.path.stat().st_size) > MAX_JOINED:
            raise too_long(where, size)
        try:
            return where, {"text": self.path.read_text(encoding="utf-8-sig")}
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (byte 0x{error.object[error.start]:02x} at offset {error.start})"
            raise CompressError(what, where, "convert it, e.g. iconv -f LATIN1 -t UTF-8") from error


@dataclass(frozen=True)
class _Lines:
    path: Path
    offsets: array[int]  # in bytes, of every line that is not blank
    numbers: array[int]  # of these lines in the file, from 1

    def __len__(self) -> int:
        return len(self.offsets)

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        where = f"{self.path} line {self.numbers[index]}"
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return where, _columns(where, _json(where, file.readline()))


@dataclass(frozen=True)
class _Items:
    path: Path
    items: Sequence[object]

    def __len__(self) -> int:
        return len(self.items)

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        where = f"{self.path} item {index + 1}"
        return where, _columns(where, self.items[index])


@dataclass(frozen=True)
class _Table:
    name: str
    data: Any  # datasets.Dataset

    def __len__(self) -> int:
        return len(self.data)

    def row(self, index: int) -> tuple[str, Mapping[str, Any]]:
        return f"{self.name} row {index + 1}", self.data[index]


def read_files(path: Path, wanted: tuple[str, ...]) -> tuple[Documents, bool, tuple[str, ...]]:
    """The documents of a file, or of all text files directly in a folder, in the order of their names.

    Args:
        wanted: the columns to look for; the first one present is taken.

    Returns:
        the documents; whether they are one text (all of them .txt); notes for the report.

    Raises:
        CompressError: unreadable, not UTF-8 or JSON, no such column, a type that is not read, no `datasets`.
            What is wrong inside a document shows when it is read.
    """
    files: list[Path] = [path]
    notes: tuple[str, ...] = ()
    try:
        if path.is_dir():
            files, notes = _text_files(path)
        parts = [_part(file, wanted) for file in files]
    except OSError as error:
        what = f"cannot be read ({error.strerror or error})"
        raise CompressError(what, str(path), "check the path") from error
    return documents_of(parts, wanted), all(isinstance(part, _Text) for part in parts), notes


def documents_of(parts: Sequence[Part], wanted: tuple[str, ...]) -> Documents:
    """All rows of `parts`, one part after another or shuffled as a whole."""
    ends = list(accumulate(len(part) for part in parts))

    def documents(seed: int | None) -> Iterator[Document]:
        order: Sequence[int] = range(ends[-1])
        if seed is not None:
            order = torch.randperm(ends[-1], generator=torch.Generator().manual_seed(seed)).tolist()
        for index in order:
            which = bisect_right(ends, index)
            where, row = parts[which].row(index - (ends[which - 1] if which else 0))
            yield where, pick(where, row, wanted)

    return documents


def table(name: str, data: Any, wanted: tuple[str, ...]) -> Part:
    """A datasets.Dataset, of which only the wanted column is read."""
    for column in wanted:
        if column in data.column_names:
            return _Table(name, data.select_columns([column]))
    raise _no_column(name, wanted, data.column_names)


def pick(where: str, row: Mapping[str, Any], wanted: tuple[str, ...]) -> object:
    """The value of the first wanted column that the row has."""
    for name in wanted:
        if name in row:
            return row[name]
    raise _no_column(where, wanted, row)


def plain_text(where: str, value: object) -> str:
    """The value of a column as text that a tokenizer takes."""
    if not isinstance(value, str):
        hint = "add --chat-template for chats" if isinstance(value, list) else "name another with --calib-column"
        raise CompressError(f"the column holds {type(value).__name__}, not text", where, hint)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        what = f"half a character (lone surrogate) at {error.start}"
        raise CompressError(what, where, "mend the text") from error
    return value


def chat_messages(where: str, value: object) -> list[dict[str, Any]]:
    """The value of a column as [{"role", "content"}], also from ShareGPT's [{"from", "value"}]."""
    items: list[Any] = value if isinstance(value, list) and value else [None]
    if all(isinstance(item, dict) and "role" in item and "content" in item for item in items):
        return items
    if all(isinstance(item, dict) and "from" in item and "value" in item for item in items):
        return [{"role": _SHAREGPT.get(item["from"], item["from"]), "content": item["value"]} for item in items]
    what = 'not a list of {"role", "content"} messages'
    raise CompressError(what, where, "name the column of messages with --calib-column")


def import_datasets(where: str) -> Any:
    """The package `datasets`, which only parquet files and the hub need."""
    try:
        import datasets
    except ImportError as error:
        remedy = "pip install compress-llm[data], or pass .txt or .jsonl, or --calib bundled"
        raise CompressError(f"this needs the package datasets ({error})", where, remedy) from error
    return datasets


def attempt(call: Callable[[], T], where: str, remedy: str) -> T:
    """`call()`, a call into `datasets`, with its failure as one line.

    It lets through what huggingface_hub, httpx, fsspec and pyarrow raise: ConnectionError (hub not reached),
    FileNotFoundError, ValueError (unknown config or split), RuntimeError (script data set), ArrowInvalid, hub
    errors that derive from Exception alone. They share no base, so all are caught, here only, and chained.
    """
    try:
        return call()
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise CompressError(f"cannot be loaded ({type(error).__name__}: {text})", where, remedy) from error


def too_long(where: str, size: int) -> CompressError:
    """The error for a text that would have to be tokenised in one piece."""
    what = f"{size / 1e6:.0f} MB of text, at most {MAX_JOINED / 1e6:.0f} MB are tokenised in one piece"
    return CompressError(what, where, "pass a part of it, or its documents as .jsonl")


def _text_files(folder: Path) -> tuple[list[Path], tuple[str, ...]]:
    entries = sorted(folder.iterdir())
    files = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in SUFFIXES]
    if not files:
        what = f"no {', '.join(SUFFIXES)} directly in this folder"
        raise CompressError(what, str(folder), "pass a file or another folder")
    others = len(entries) - len(files)
    return files, (f"{len(files)} files of the folder read, {others} other entries skipped",)


def _part(path: Path, wanted: tuple[str, ...]) -> Part:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        what = f"{suffix or 'a file without suffix'} is not read"
        raise CompressError(what, str(path), f"pass {', '.join(SUFFIXES)} or a folder of these")
    with path.open("rb") as file:  # whatever cannot be opened fails here, not in the middle
        is_list = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if suffix == ".txt":
        return _Text(path)
    if suffix == ".parquet":
        datasets = import_datasets(str(path))
        options = {"path": "parquet", "data_files": [str(path)], "split": "train"}
        data = attempt(lambda: datasets.load_dataset(**options), str(path), "is it a parquet file?")
        return table(str(path), data, wanted)
    if suffix == ".json" and is_list:
        items = _json(str(path), path.read_bytes())
        assert isinstance(items, list)
        return _Items(path, items)
    return _index_lines(path)  # .jsonl, and .json with an object a line


def _index_lines(path: Path) -> _Lines:
    offsets, numbers, offset = array("q"), array("q"), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                offsets.append(offset)
                numbers.append(number)
            offset += len(line)
    return _Lines(path, offsets, numbers)


def _json(where: str, data: bytes) -> object:
    try:
        value: object = json.loads(data)
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CompressError(f"not JSON in UTF-8 ({error})", where, "mend or remove it") from error
    return value


def _columns(where: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        what = f"a {type(value).__name__} instead of an object with columns"
        raise CompressError(what, where, 'write each document as {"text": "..."}')
    return value


def _no_column(where: str, wanted: tuple[str, ...], present: Iterable[str]) -> CompressError:
    what = f"no column {' or '.join(wanted)}; the columns are {', '.join(present) or 'none'}"
    return CompressError(what, where, "name one of them with --calib-column")
