"""The output folder: shards from the journal and the source, config, tokenizer, records of the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint, Stored, read_json
from compress.formats.base import Format
from compress.gguf import files as gguf_files
from compress.gguf import writer as gguf_writing
from compress.hashes import hash_files
from compress.skeleton import quiet_transformers
from compress.writer import has_links, write_json, write_shards

SHARD_BYTES = 5_000_000_000
#: from this size on what was written block by block is not written again: each block is a shard
LARGE_BYTES = 1_000_000_000
RECORD = "compress.json"
#: files with clock times: they differ between two runs that write the same checkpoint
TIMED = ("report.json",)
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")
_OWN_FILES = ("config.json", "quantize_config.json", "README.md", "hf_quant_config.json", RECORD, *TIMED)


def assemble(
    folder: Path,
    format: Format,
    quantization: Mapping[str, Any],
    source: Checkpoint,
    owners: Mapping[str, str],
    packed: Mapping[str, Stored],
    written: Sequence[tuple[Path, str]] = (),
) -> dict[str, str]:
    """Write a whole checkpoint folder.

    Args:
        folder: made here.
        quantization: the new quantization_config.
        source: the checkpoint whose other tensors and files are copied.
        owners: tensor of the source -> the layer that is packed anew and that it belongs to.
        packed: the tensors of those layers, and others that take the place of the source's.
        written: the files that these lie in, with their sha256; of a large checkpoint they become shards as they are.

    Returns:
        sha256 of each weight file as it was written, by name.
    """
    folder.mkdir()
    every = list(tensors(format, source, owners, packed))
    if format.container == "gguf":
        hashes = gguf_writing.write(folder / gguf_writing.SINGLE, every, source, quantization)
    else:
        large = sum(stored.nbytes for _, stored in every) >= LARGE_BYTES
        hashes = write_shards(folder, every, SHARD_BYTES, written if large else ())
    carry_over(source.folder, folder)
    write_json(folder / "config.json", config_of(format, quantization, source))
    for name, value in format.files(quantization).items():
        write_json(folder / name, value)
    return hashes


def config_of(format: Format, quantization: Mapping[str, Any], source: Checkpoint) -> dict[str, Any]:
    """The new config.json."""
    plain = {k: v for k, v in source.config.items() if k != "quantization_config"}
    # a GGUF file says itself how its tensors are quantised; told in config.json, transformers would look for a
    # quantiser and not for the file
    named = format.quantised and format.container == "safetensors"
    return {**plain, **({"quantization_config": quantization} if named else {})}


def written_once(out: Path, format: Format, nbytes: int) -> bool:
    """Whether the blocks of a checkpoint of `nbytes` are its shards as they are written."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    return format.container == "safetensors" and nbytes >= LARGE_BYTES and has_links(parent)


def room_needed(out: Path, format: Format, nbytes: int) -> int:
    """Bytes of disk that a checkpoint of `nbytes` takes until it is finished: twice that where it is written twice."""
    return (1 if written_once(out, format, nbytes) else 2) * nbytes


def tensors(
    format: Format, source: Checkpoint, owners: Mapping[str, str], packed: Mapping[str, Stored]
) -> Iterator[tuple[str, Stored]]:
    """Every tensor of the output, in the source's order, a packed layer's in place of the first that it had there."""
    written: set[str] = set()
    for name, stored in source.tensors.items():
        layer = owners.get(name)
        if layer is None:
            yield name, packed.get(name, stored)  # ours where a transform changed it
        elif layer not in written:
            written.add(layer)
            names = [f"{layer}.{suffix}" for suffix in format.suffixes]
            yield from ((n, packed[n]) for n in names if n in packed)


def carry_over(source: Path, folder: Path) -> None:
    """Copy what is not a weight and not written by us: tokenizer, generation config, licence, model code.

    A GGUF file has the tokenizer within; it is written as files.
    """
    place, extra = gguf_files.tokenizer_source(source)
    if extra:
        from transformers import AutoTokenizer

        with quiet_transformers("its tokenizer cannot be loaded", str(source), "put tokenizer.json beside it"):
            AutoTokenizer.from_pretrained(place, local_files_only=True, **extra).save_pretrained(folder)
    for file in sorted(source.iterdir()) if source.is_dir() else ():
        skip = file.name.startswith(".") or file.name in _OWN_FILES or file.name.endswith(WEIGHT_FILES)
        if file.is_file() and not skip:
            shutil.copyfile(file, folder / file.name)


def seal(folder: Path, record: dict[str, Any], hashes: Mapping[str, str]) -> None:
    """Write compress.json with the sha256 of every other file but those with clock times in them.

    Args:
        hashes: of the files that were hashed when they were written.
    """
    names = sorted(f.name for f in folder.iterdir() if f.is_file() and f.name not in (RECORD, *TIMED))
    new = hash_files([folder / name for name in names if name not in hashes])
    write_json(folder / RECORD, {**record, "sha256": {name: hashes.get(name) or new[name] for name in names}})


def read_record(folder: Path) -> dict[str, Any] | None:
    """compress.json of a folder that we wrote, None for another tool's."""
    return read_json(folder / RECORD) if (folder / RECORD).exists() else None
