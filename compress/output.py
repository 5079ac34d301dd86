"""The output folder: shards from the journal and the source, config, tokenizer, records of the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.checkpoint import Checkpoint, Stored, hash_files, read_json, write_json, write_shards
from compress.journal import Journal
from compress.plan import Plan

if TYPE_CHECKING:
    pass

SHARD_BYTES = 5_000_000_000
RECORD = "compress.json"
#: files with clock times: they differ between two runs that write the same checkpoint
TIMED = ("report.json",)
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".index.json")
_OWN_FILES = ("config.json", "quantize_config.json", "README.md", "hf_quant_config.json", RECORD, *TIMED)


def assemble(plan: Plan, source: Checkpoint, journal: Journal) -> None:
    """Write the whole output folder under journal.final."""
    folder = journal.final
    folder.mkdir()
    write_shards(folder, tensors(plan, source, journal), SHARD_BYTES)
    carry_over(source.folder, folder)
    quantization = plan.quantization_config()
    declared = {"quantization_config": quantization} if plan.format.quantised else {}
    write_json(folder / "config.json", {**source.config, **declared})
    for name, value in plan.format.files(quantization).items():
        write_json(folder / name, value)


def tensors(plan: Plan, source: Checkpoint, journal: Journal) -> Iterator[tuple[str, Stored]]:
    """Every tensor of the output, in the source's order, a packed layer's tensors in place of its weight."""
    packed: dict[str, Stored] = {}
    for block in range(len(plan.blocks)):
        packed |= journal.tensors(block)
    replaced = {linear.name for block in plan.blocks for linear in block}
    for name, stored in source.tensors.items():
        layer = name.removesuffix(".weight")
        if layer not in replaced:
            yield name, packed.get(name, stored)  # ours where a transform changed it
            continue
        for suffix in plan.format.suffixes:
            if f"{layer}.{suffix}" in packed:
                yield f"{layer}.{suffix}", packed[f"{layer}.{suffix}"]


def carry_over(source: Path, folder: Path) -> None:
    """Copy what is not a weight and not written by us: tokenizer, generation config, licence, model code."""
    for file in sorted(source.iterdir()):
        skip = file.name.startswith(".") or file.name in _OWN_FILES or file.name.endswith(WEIGHT_FILES)
        if file.is_file() and not skip:
            shutil.copyfile(file, folder / file.name)


def seal(folder: Path, record: dict[str, Any]) -> None:
    """Write compress.json with the sha256 of every other file but those with clock times in them."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name not in (RECORD, *TIMED))
    write_json(folder / RECORD, {**record, "sha256": hash_files(files)})


def read_record(folder: Path) -> dict[str, Any] | None:
    """compress.json of a folder that we wrote, None for another tool's."""
    return read_json(folder / RECORD) if (folder / RECORD).exists() else None
