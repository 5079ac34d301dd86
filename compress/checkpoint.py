"""Checkpoint folders: a safetensors reader that takes one tensor at a time, and an atomic sharded writer.

Knows files, names, shapes and dtypes; knows no maths. The reader checks every header through the safetensors library
and then reads bytes with plain file reads, not through a memory map: a map would count every touched page of the file
as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {v: k for k, v in _DTYPES.items()}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_COPY_BYTES = 1 << 24


@dataclass(frozen=True)
class Stored:
    """Where one tensor's bytes lie.

    Attributes:
        file: the safetensors file.
        start: first byte in that file.
        nbytes: how many.
        dtype: safetensors' name of the dtype ("BF16").
        shape: as stored.
    """

    file: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CompressError when it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressError("no such file", str(path), "is this a Hugging Face model folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CompressError(f"not readable JSON ({error})", str(path), "download the file again") from None
    if not isinstance(value, dict):
        raise CompressError(f"holds a JSON {type(value).__name__}, not an object", str(path), "download it again")
    return value


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, every offset checked. Raises CompressError for anything malformed."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as opened:  # checks the header against the file's size
            opened.keys()
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length))
    except FileNotFoundError:
        raise CompressError("the shard is missing", str(path), "download the checkpoint again") from None
    except (SafetensorError, OSError, ValueError) as error:
        remedy = "the file is damaged: download it again"
        raise CompressError(f"not a readable safetensors file ({error})", str(path), remedy) from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise CompressError(f"tensor {name} has dtype {entry['dtype']}, which is not supported", str(path))
        begin, end = entry["data_offsets"]
        found[name] = Stored(path, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found


class Checkpoint:
    """A model folder on disk: config.json and the index of its tensors; tensors are read one at a time.

    Attributes:
        folder: the model folder.
        config: config.json.
        tensors: name -> where its bytes are.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tensors: dict[str, Stored]) -> None:
        self.folder = folder
        self.config = config
        self.tensors = tensors

    @classmethod
    def open(cls, folder: Path, allow_pickle: bool = False, pickle_cache: Path | None = None) -> Checkpoint:
        """Read config and headers; no weight is loaded.

        Args:
            folder: holds config.json and safetensors files.
            allow_pickle: also take pytorch_model.bin, through torch's weights-only unpickler.
            pickle_cache: where a pickled checkpoint is rewritten as safetensors (needed with allow_pickle).

        Raises:
            CompressError: no such folder, nothing readable in it, a damaged file, an index that points outside.
        """
        if not folder.is_dir():
            raise CompressError("no such folder", str(folder), "pass a model folder or a hub id such as org/name")
        config = read_json(folder / "config.json")
        names = _shards(folder, folder / _INDEX) if (folder / _INDEX).exists() else None
        if names is None and (folder / _SINGLE).exists():
            names = [_SINGLE]
        if names is None:
            names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
        root = folder
        if not names:
            root, names = _unpickled(folder, allow_pickle, pickle_cache)
        tensors: dict[str, Stored] = {}
        for shard in names:
            for name, stored in read_header(root / shard).items():
                if name in tensors:
                    raise CompressError(f"tensor {name} is in {tensors[name].file.name} too", str(root / shard))
                tensors[name] = stored
        if (folder / _INDEX).exists() and root is folder:
            missing = sorted(set(read_json(folder / _INDEX)["weight_map"]) - set(tensors))
            if missing:
                raise CompressError(
                    f"the index names {len(missing)} tensors that no shard holds, first {missing[0]}",
                    str(folder / _INDEX),
                    "download the checkpoint again",
                )
        return cls(folder, config, tensors)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored, in fresh memory."""
        return read_tensor(self.tensors[name], name)

    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({t.file for t in self.tensors.values()})

    def fingerprint(self) -> dict[str, str]:
        """sha256 of config.json and of every weight file, by file name. Hashed in parallel."""
        return hash_files([self.folder / "config.json", *self.files()])


def read_tensor(stored: Stored, name: str = "") -> Tensor:
    """The tensor whose bytes `stored` names, in fresh memory. Raises CompressError when the file is too short."""
    flat = torch.empty(stored.nbytes, dtype=torch.uint8)
    with stored.file.open("rb", buffering=0) as f:
        f.seek(stored.start)
        view = tensor_bytes(flat)
        done = 0
        while done < stored.nbytes:
            got = f.readinto(view[done:])
            if not got:
                raise CompressError(f"the file ends inside tensor {name}", str(stored.file), "download it again")
            done += got
    return flat.view(stored.torch_dtype).reshape(stored.shape)


def _shards(folder: Path, index: Path) -> list[str]:
    """Shard names from an index, each a plain name inside the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CompressError("weight_map is not a table of tensor names to files", str(index), "download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or name in ("", ".", ".."):
            raise CompressError(
                f"shard name {name!r} leads out of the folder", str(index), "do not trust this checkpoint"
            )
        if not (folder / name).exists():
            raise CompressError("the shard is missing", str(folder / name), "download the checkpoint again")
    return names


def _unpickled(folder: Path, allow: bool, cache: Path | None) -> tuple[Path, list[str]]:
    """Rewrite pytorch_model*.bin as safetensors in `cache`, one file at a time, weights only."""
    import pickle

    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise CompressError("no .safetensors file", str(folder), "pass a folder with model weights")
    if not allow or cache is None:
        raise CompressError(
            f"only pickled weights ({pickles[0].name}): a pickle can run code when it is opened",
            str(folder),
            "pass --allow-pickle to read them through torch's weights-only unpickler",
        )
    from safetensors.torch import save_file

    cache.mkdir(parents=True, exist_ok=True)
    names = []
    for file in pickles:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CompressError(f"the unpickler refused it ({str(error).splitlines()[0]})", str(file)) from None
        names.append(file.stem + ".safetensors")
        save_file({k: v.clone().contiguous() for k, v in state.items()}, str(cache / names[-1]))
    return cache, names


def hash_files(paths: Sequence[Path]) -> dict[str, str]:
    """sha256 of each file, by its name, hashed in parallel."""

    def one(path: Path) -> str:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip([p.name for p in paths], pool.map(one, paths), strict=True))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a CPU tensor."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type]


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write one safetensors file durably (temporary name, fsync, rename). Returns its sha256."""
    entries = [(n, _NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()]
    chunks = {n: (lambda t=t: [tensor_bytes(t)]) for n, t in tensors.items()}
    return _write(path, entries, lambda name: chunks[name]())


def _write(path: Path, entries: list[tuple[str, str, tuple[int, ...], int]], content: Any) -> str:
    """Write a safetensors file; `content(name)` yields each tensor's bytes. Widest dtypes first, so all are aligned."""
    entries = sorted(entries, key=lambda e: -_DTYPES[e[1]].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, dtype, shape, nbytes in entries:
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
        at += nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    digest = hashlib.sha256()
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as f:
        for piece in (len(raw).to_bytes(8, "little"), raw):
            f.write(piece)
            digest.update(piece)
        for name, *_ in entries:
            for chunk in content(name):
                f.write(chunk)
                digest.update(chunk)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    return digest.hexdigest()


def _file_chunks(stored: Stored) -> Iterator[bytes]:
    with stored.file.open("rb") as f:
        f.seek(stored.start)
        left = stored.nbytes
        while left:
            chunk = f.read(min(left, _COPY_BYTES))
            if not chunk:
                raise CompressError("the file ends inside a tensor", str(stored.file), "download it again")
            left -= len(chunk)
            yield chunk


def write_shards(folder: Path, tensors: Iterable[tuple[str, Stored]], shard_bytes: int) -> dict[str, str]:
    """Copy stored tensors into shards of at most `shard_bytes` (a larger tensor gets its own), with an index.

    Returns:
        sha256 of every file written, by name.
    """
    shards: list[list[tuple[str, Stored]]] = [[]]
    room = shard_bytes
    for name, stored in tensors:
        if shards[-1] and stored.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, stored))
        room -= stored.nbytes
    hashes: dict[str, str] = {}
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = _SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        found = dict(shard)
        entries = [(n, s.dtype, s.shape, s.nbytes) for n, s in shard]
        hashes[file] = _write(folder / file, entries, lambda name, found=found: _file_chunks(found[name]))
        weight_map.update(dict.fromkeys(found, file))
    if len(shards) > 1:
        total = sum(s.nbytes for shard in shards for _, s in shard)
        hashes[_INDEX] = write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return hashes


def write_json(path: Path, value: Any) -> str:
    """Write JSON durably (temporary name, fsync, rename). Returns its sha256."""
    return write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_text(path: Path, text: str) -> str:
    """Write a text file durably (temporary name, fsync, rename). Returns its sha256."""
    temporary = path.with_name(path.name + ".tmp")
    raw = text.encode()
    with temporary.open("wb") as f:
        f.write(raw)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)
    return hashlib.sha256(raw).hexdigest()
