"""Checkpoint folders: a safetensors reader that takes one tensor at a time.

Knows files, names, shapes and dtypes; knows no maths. The reader checks every header through the safetensors library
and then reads bytes with plain file reads, not through a memory map: a map would count every touched page of the file
as this process's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.hashes import hash_parts

DTYPES = {
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
DTYPE_NAMES = {v: k for k, v in DTYPES.items()}
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Stored:
    """Where one tensor's bytes lie.

    Attributes:
        file: the safetensors or GGUF file.
        start: first byte in that file.
        nbytes: how many.
        dtype: safetensors' name of the dtype ("BF16").
        shape: as stored.
        rope_heads: the rows lie in GGUF's order for so many heads, see `compress.gguf.files`; 0: as they are.
    """

    file: Path
    start: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    rope_heads: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def numel(self) -> int:
        count = 1
        for n in self.shape:
            count *= n
        return count

    def pieces(self, most: int) -> list[Stored]:
        """It in pieces of at most `most` numbers, each [numbers], in order."""
        assert not self.rope_heads, "rows that lie in another order have no pieces"
        each = self.torch_dtype.itemsize
        return [
            Stored(self.file, self.start + at * each, min(most, self.numel - at) * each, self.dtype,
                   (min(most, self.numel - at),))
            for at in range(0, self.numel, most)
        ]  # fmt: skip


def read_json(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """A JSON object from a file. Raises CompressError when it is missing or not an object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CompressError("no such file", str(path), "is this a Hugging Face model folder?") from None
    except (OSError, ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of 5000 digits, 10^5 "["
        raise CompressError(f"not readable JSON ({error})", str(path), remedy) from None
    if not isinstance(value, dict):
        what = "null" if value is None else f"a {type(value).__name__}"
        raise CompressError(f"holds {what}, not a JSON object", str(path), remedy)
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a name that comes twice, of which readers keep one or the other."""
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 0)
    if count > 1:
        raise ValueError(f"{name!r} comes twice in its header")
    return dict(pairs)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, every offset checked. Raises CompressError for anything malformed."""
    from safetensors import SafetensorError, safe_open

    if not os.path.isfile(path):
        raise CompressError("the shard is missing", str(path), "download the checkpoint again")
    try:
        with safe_open(str(path), framework="pt") as opened:  # checks the header against the file's size
            opened.keys()
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length), object_pairs_hook=_once)
    except (SafetensorError, OSError, ValueError) as error:
        what = f"these {path.stat().st_size} bytes are not a safetensors file ({error})"
        raise CompressError(what, str(path), "the file is damaged: download it again") from None
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            what = f"tensor {name} has dtype {entry['dtype']}, which is not supported"
            raise CompressError(what, str(path), "pass a 16- or 32-bit checkpoint")
        begin, end = entry["data_offsets"]
        found[name] = Stored(path, 8 + length + begin, end - begin, entry["dtype"], tuple(entry["shape"]))
    return found


class Checkpoint:
    """A model folder on disk: config.json and the index of its tensors; tensors are read one at a time.

    Attributes:
        folder: the model folder, or a GGUF file that stands alone.
        config: config.json, or what the GGUF file says in its place.
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
            folder: holds config.json and safetensors files, or one GGUF file; or is a GGUF file.
            allow_pickle: also take pytorch_model.bin, through torch's weights-only unpickler.
            pickle_cache: where a pickled checkpoint is rewritten as safetensors; None: only names and shapes are
                wanted, nothing is written and no tensor of it can be read.

        Raises:
            CompressError: no such folder, nothing readable in it, a damaged file, an index that points outside.
        """
        from compress.gguf import files as gguf_files  # which reads its tensors through this module

        single = gguf_files.find(folder)
        if single is not None:
            return cls(folder, *gguf_files.read(folder, single))
        if not folder.is_dir():
            raise CompressError("no such folder", str(folder), "pass a model folder or a hub id such as org/name")
        config = read_json(folder / "config.json")
        index = folder / INDEX
        weight_map = _weight_map(index) if index.exists() else {}
        if weight_map:
            names = sorted(set(weight_map.values()))
        elif (folder / SINGLE).exists():
            names = [SINGLE]
        else:
            names = sorted(p.name for p in folder.glob("*.safetensors") if not p.name.startswith("adapter"))
        if names:
            tensors = _merge((folder / name, read_header(folder / name)) for name in names)
        else:
            tensors = _merge(_unpickled(folder, allow_pickle, pickle_cache))
        missing = sorted(set(weight_map) - set(tensors))
        if missing:
            raise CompressError(
                f"names {len(missing)} tensors that no shard holds, first {missing[0]}",
                str(index),
                "download the checkpoint again",
            )
        return cls(folder, config, tensors)

    def read(self, name: str, empty: Callable[[int], Tensor] | None = None) -> Tensor:
        """One tensor, as stored, in fresh memory: what `empty` makes (uint8 [bytes]), if it is given."""
        return read_tensor(self.tensors[name], name, empty)

    def files(self) -> list[Path]:
        """The safetensors files, or the GGUF file, sorted."""
        return sorted({t.file for t in self.tensors.values()})

    def fingerprint(self, stop: threading.Event | None = None) -> dict[str, str]:
        """What tells config.json and every weight file from any other, by file name.

        Not their sha256 but that of the sha256 of their pieces, which are hashed in parallel: shards are few and large.

        Args:
            stop: once it is set, the hashing ends with CancelledError.
        """
        config = self.folder / "config.json"
        files = [*([config] if config.is_file() else []), *self.files()]
        pieces = [(f, at) for f in files for at in range(0, max(f.stat().st_size, 1), _PIECE_BYTES)]
        found: dict[str, Any] = {file.name: hashlib.sha256() for file in files}
        for (file, _), digest in zip(pieces, hash_parts(pieces, _PIECE_BYTES, stop), strict=True):
            found[file.name].update(digest)
        return {name: digest.hexdigest() for name, digest in found.items()}


def read_into(file: Path, start: int, target: Tensor, what: str) -> None:
    """Fill a CPU tensor with the bytes of a file from `start` on. Raises CompressError when the file is too short."""
    view = tensor_bytes(target)
    with file.open("rb", buffering=0) as f:
        f.seek(start)
        done = 0
        while done < len(view):
            got = f.readinto(view[done:])
            if not got:
                raise CompressError(
                    f"the file ends inside {what}", str(file), "it was cut short: download or make it again"
                )
            done += got


def read_tensor(stored: Stored, name: str = "", empty: Callable[[int], Tensor] | None = None) -> Tensor:
    """The tensor whose bytes `stored` names, in fresh memory. Raises CompressError when the file is too short."""
    flat = torch.empty(stored.nbytes, dtype=torch.uint8) if empty is None else empty(stored.nbytes)
    read_into(stored.file, stored.start, flat, f"tensor {name}")
    found = flat.view(stored.torch_dtype).reshape(stored.shape)
    return halves_apart(found, stored.rope_heads) if stored.rope_heads else found


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows of q_proj or k_proj in transformers' order for rotary embeddings, from llama.cpp's for models named llama.

    There the two numbers that are rotated together lie side by side, here half a head apart. Inverse: `side_by_side`.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def side_by_side(rows: Tensor, heads: int) -> Tensor:
    """Inverse of `halves_apart`."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw little-endian bytes of a CPU tensor."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)  # type: ignore[arg-type]


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard from an index; every shard is a plain name inside the folder."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CompressError("weight_map is not a table of tensor names to files", str(index), "download it again")
    if not weight_map:
        raise CompressError("weight_map names 0 tensors", str(index), "download it again")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise CompressError(
                f"shard name {name!r} leads out of the folder", str(index), "do not trust this checkpoint"
            )
    return weight_map


def _merge(shards: Iterable[tuple[Path, dict[str, Stored]]]) -> dict[str, Stored]:
    """The tensors of all shards; no name may come twice."""
    tensors: dict[str, Stored] = {}
    for path, found in shards:
        for name, stored in found.items():
            if name in tensors:
                what = f"tensor {name} is in {tensors[name].file.name} too"
                raise CompressError(what, str(path), "remove the file that does not belong to the model")
            tensors[name] = stored
    return tensors


def _unpickled(folder: Path, allow: bool, cache: Path | None) -> Iterator[tuple[Path, dict[str, Stored]]]:
    """The tensors of each pytorch_model*.bin, rewritten as safetensors in `cache`; without one, names and shapes."""
    from compress.writer import save_tensors  # which reads through this module

    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise CompressError("no .safetensors file", str(folder), "pass a folder with model weights")
    if not allow:
        raise CompressError(
            f"only pickled weights ({pickles[0].name}): a pickle can run code when it is opened",
            str(folder),
            "pass --allow-pickle to read them through torch's weights-only unpickler",
        )
    for file in pickles:
        state = _unpickle(file, "meta" if cache is None else "cpu")
        if cache is None:
            yield file, {n: Stored(file, 0, t.nbytes, DTYPE_NAMES[t.dtype], tuple(t.shape)) for n, t in state.items()}
            continue
        rewritten = cache / (file.stem + ".safetensors")
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompressError(f"cannot be made ({error.strerror})", str(cache), "choose another -o") from None
        save_tensors(rewritten, state)
        yield rewritten, read_header(rewritten)


def _unpickle(file: Path, device: str) -> dict[str, Tensor]:
    """A pickled state dict. Raises CompressError when it holds anything but dense tensors by name.

    The unpickler lets through whatever a damaged file makes it raise (KeyError, IndexError, struct.error,
    UnpicklingError, RuntimeError: they share no base), so all are caught, here only, and chained.
    """
    try:
        state = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition('. ')[0][:200]}"
        remedy = "the file is damaged or not only weights: pass a safetensors checkpoint"
        raise CompressError(f"the weights-only unpickler refused it ({reason})", str(file), remedy) from error
    if not isinstance(state, dict) or not state:
        what = f"holds a {type(state).__name__} of {len(state) if isinstance(state, dict) else 1}, not tensors by name"
        raise CompressError(what, str(file), "pass a state dict")
    for name, value in state.items():
        dense = isinstance(value, Tensor) and value.layout is torch.strided and value.dtype in DTYPE_NAMES
        if not isinstance(name, str) or not dense:
            raise CompressError(f"holds {type(value).__name__} {name!r}, not a dense tensor", str(file), "remove it")
    return state
