"""Blocks read back while later ones are worked on: nothing is read twice, and nothing wrong is taken for right."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import output, pipeline
from compress.checkpoint import Checkpoint
from compress.early import Early
from compress.errors import CompressError
from compress.passes.absmax import Absmax
from compress.passes.nf4 import NF4
from compress.verify import Seen, state_of, verify
from compress.weights import Weights

CPU = torch.device("cpu")
FORMATS: list[tuple[Any, dict[str, Any]]] = [
    (compress.RTN(bits=4, group_size=32), {}),
    (compress.RTN(bits=4, group_size=32), {"format": "gptq"}),
    (compress.RTN(bits=3, group_size=32), {"format": "dense"}),
    (compress.RTN(bits=3, group_size=32), {"format": "native"}),
    (NF4(), {}),
    (Absmax(), {}),
]


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU with plenty of room, and as if the toy were large."""
    monkeypatch.setattr(output, "LARGE_BYTES", 1)
    monkeypatch.setattr(pipeline, "reads_early", lambda *given: True)


def run(toy: Path, out: Path, method: Any = None, **more: Any) -> compress.Result:
    return compress.run(toy, method or compress.RTN(bits=4, group_size=32), out, no_eval=True, no_client=True, **more)


@pytest.mark.parametrize(("method", "more"), FORMATS, ids=lambda x: getattr(x, "name", None) or str(x))
def test_every_layer_is_read_once(
    method: Any, more: dict[str, Any], toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[str, str]] = []
    reading = Weights.read

    def counted(self: Weights, name: str, *rest: Any) -> Tensor:
        if "out" in str(self.folder):
            read.append((self.folder.name, name))
        return reading(self, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "read", counted)
        result = run(toy, tmp_path / "out", method, **more)
    layers = {f"{r['name']}.weight" for r in result.records}
    assert len(layers) == 28
    assert sorted(read) == sorted(("out.partial", name) for name in layers)
    assert result.beside["read back"] > 0
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "reads_early", lambda *given: False)
        late = run(toy, tmp_path / "late" / "out", method, **more)
    assert "read back" not in late.beside
    assert late.proof == result.proof
    assert output.read_record(tmp_path / "late" / "out") == output.read_record(tmp_path / "out")


def damage(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def test_a_block_that_is_wrong_on_disk_ends_the_run(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the next block, not after the last."""
    solved: list[int] = []
    counting, solving, checking = pipeline.count, pipeline.compress_block, Early.check

    def bad(journal: Any, made: Any, reader: Any, sha256: str) -> None:
        def damaged(file: Path, sha256: str, records: Any) -> None:
            damage(file)
            Early.add(reader, file, sha256, records)

        with monkeypatch.context() as patch:
            patch.setattr(reader, "add", damaged, raising=False)
            counting(journal, made, reader, sha256)

    def noted(model: Any, plan: Any, block: int, *rest: Any) -> Any:
        solved.append(block)
        return solving(model, plan, block, *rest)

    def patient(self: Early) -> None:
        for asked in tuple(self._asked):
            for work in asked.work:
                work.exception()
        checking(self)

    monkeypatch.setattr(pipeline, "count", bad)
    monkeypatch.setattr(pipeline, "compress_block", noted)
    monkeypatch.setattr(Early, "check", patient)
    with pytest.raises(CompressError, match=r"not the one that was written \(sha256\)"):
        run(toy, tmp_path / "out")
    assert solved[-1] < 3
    assert not (tmp_path / "out").exists()


def test_what_changes_afterwards_is_read_again(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembling = output.assemble

    def damaged(folder: Path, *rest: Any) -> Any:
        found = assembling(folder, *rest)
        damage(folder / "model-00002-of-00005.safetensors")
        return found

    monkeypatch.setattr(pipeline, "assemble", damaged)
    with pytest.raises(CompressError, match=r"model-00002-of-00005\.safetensors: .*|not the one that was written"):
        run(toy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_copies_are_read_again(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system has no hard links a copy lies in the folder, and nobody has looked at it."""

    def no_links(*given: Any) -> None:
        raise OSError("no links here")

    known: list[int] = []
    of = Seen.of

    def noted(self: Seen, *given: Any) -> Any:
        found = of(self, *given)
        known.append(len(found[1]))
        return found

    monkeypatch.setattr(Seen, "of", noted)
    monkeypatch.setattr(os, "link", no_links)
    assert run(toy, tmp_path / "out").proof is not None
    assert known == [0]


def test_only_what_was_read_so_counts(toy: Path, tmp_path: Path) -> None:
    result = run(toy, tmp_path / "out")
    folder, source = tmp_path / "out", Checkpoint.open(toy)
    record = output.read_record(folder)
    assert record is not None
    hashes = {name: sha for name, sha in record["sha256"].items() if name.endswith(".safetensors")}
    written = Weights(Checkpoint.open(folder))
    first = folder / "model-00001-of-00005.safetensors"
    names = frozenset(r["name"] for r in result.records if ".layers.0." in r["name"])
    seen = Seen(written.checkpoint.config, {state_of(first): names})
    assert seen.of(written, hashes) == ({first.name}, names)
    assert seen.of(written, {}) == (set(), set())
    other = Seen({**written.checkpoint.config, "x": 1}, seen.layers)  # layers would be unpacked in another way
    assert other.of(written, hashes) == (set(), set())
    elsewhere = Seen(seen.config, {state_of(first): frozenset({*names, result.records[-1]["name"]})})
    assert elsewhere.of(written, hashes) == ({first.name}, names)
    assert verify(folder, result.records, source, hashes=hashes, seen=seen).layers == 28
    damage(folder / "model-00002-of-00005.safetensors")  # one that nobody has looked at
    with pytest.raises(CompressError, match="not the one that was written"):
        verify(folder, result.records, source, hashes=hashes, seen=seen)


def test_the_device_needs_room(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(output, "LARGE_BYTES", 1)
    result = run(toy, tmp_path / "out")
    job, plan = result.job, result.plan

    class Roomy:
        device = torch.device("cuda", 0)

    class Tight:
        device = CPU

    lanes: list[Any] = [Roomy(), Tight()]
    assert [pipeline.reads_early(job, plan, lane) for lane in lanes] == [True, False]
    monkeypatch.setattr(output, "LARGE_BYTES", 1 << 40)  # written twice: what was read is not what is kept
    assert not pipeline.reads_early(job, plan, lanes[0])


def test_what_is_not_begun_when_the_run_ends_is_not_done(toy: Path, tmp_path: Path) -> None:
    run(toy, tmp_path / "out")
    file = shutil.copy(tmp_path / "out" / "model-00001-of-00005.safetensors", tmp_path / "block.safetensors")
    with Early({}, CPU) as reader:
        for _ in range(200):
            reader.add(Path(file), "", [])
    assert any(work.cancelled() for asked in reader._asked for work in asked.work)
