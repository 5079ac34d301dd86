"""journal.py: finished blocks survive, strangers' files do, and only one run at a time writes an output."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.checkpoint import read_tensor
from compress.errors import CompressError
from compress.journal import Journal, check_output, compare

PRINT = {"method": {"name": "gptq", "bits": 4}, "seed": 0, "checkpoint": {"model.safetensors": "ab" * 32}}


def block(i: int) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return {f"layer{i}.codes": torch.full((3, 4), i, dtype=torch.int32)}, [{"name": f"layer{i}"}]


def begin(out: Path, blocks: int, finish: bool = False) -> None:
    """A run that was stopped after so many blocks, or that finished."""
    with Journal(out, overwrite=True) as journal:
        journal.start(lambda: PRINT, fresh=False)
        for i in range(blocks):
            journal.add(i, *block(i))
        if finish:
            assemble(journal, "new")
            journal.publish()


def assemble(journal: Journal, content: str) -> None:
    journal.final.mkdir()
    (journal.final / "config.json").write_text(content)


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def test_blocks_come_back(out: Path) -> None:
    begin(out, 2)
    with Journal(out, overwrite=False) as journal:
        assert journal.earlier() == PRINT
        assert journal.start(lambda: PRINT, fresh=False) == 2
        for i in range(2):
            tensors, records = block(i)
            assert journal.records(i) == records
            stored = journal.tensors(i)
            assert stored.keys() == tensors.keys()
            assert all(torch.equal(read_tensor(stored[n]), t) for n, t in tensors.items())


def test_nothing_but_json_and_safetensors(out: Path) -> None:
    begin(out, 2)
    partial = out.with_name("out.partial")
    assert names(partial) == {"fingerprint.json"} | {
        f"block-0000{i}.{e}" for i in (0, 1) for e in ("json", "safetensors")
    }
    for file in partial.glob("*.json"):
        json.loads(file.read_text())


def test_records_make_a_block_count(out: Path) -> None:
    begin(out, 2)
    out.with_name("out.partial").joinpath("block-00001.json").unlink()
    with Journal(out, overwrite=False) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 1


def test_a_block_that_is_stored_does_not_count_yet(out: Path) -> None:
    """So that the one after it may be stored before it counts: blocks count from the first on."""
    with Journal(out, overwrite=True) as journal:
        journal.start(lambda: PRINT, fresh=False)
        digests = [journal.store(i, block(i)[0]) for i in (1, 0)]
        assert names(journal.folder) == {"block-00000.safetensors", "block-00001.safetensors"}
    with Journal(out, overwrite=True) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 0
        for i in (0, 1):
            journal.add(i, *block(i))
            assert journal.written(i)[1] == digests[1 - i]
            assert journal.tensors(i).keys() == block(i)[0].keys()


def test_a_half_written_block_does_not_count(out: Path) -> None:
    begin(out, 1)
    partial = out.with_name("out.partial")
    (partial / "block-00001.safetensors").write_bytes(b"half")
    (partial / "block-00001.json.tmp").write_bytes(b"{")
    with Journal(out, overwrite=False) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 1
        journal.add(1, *block(1))
        assert journal.records(1) == block(1)[1]


def test_fresh_forgets(out: Path) -> None:
    begin(out, 2)
    with Journal(out, overwrite=False) as journal:
        assert journal.start(lambda: {"other": 1}, fresh=True) == 0
        assert names(journal.folder) == set()
        journal.add(0, *block(0))
        assert journal.earlier() == {"other": 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": {"name": "gptq", "bits": 3}}, "method.bits (was 4, is 3)"),
        ({"method": {"name": "gptq", "bits": 4, "new": 1}}, "method.new (was None, is 1)"),
        ({"method": "gptq"}, "method (was"),
        ({"seed": 1}, "seed (was 0, is 1)"),
        ({"checkpoint": {"model.safetensors": "cd" * 32}}, "checkpoint.model.safetensors (was abababababab..., is cd"),
        ({"checkpoint": {}}, "checkpoint.model.safetensors"),
    ],
)
def test_a_different_run_is_refused(out: Path, change: dict[str, Any], says: str) -> None:
    begin(out, 1)
    before = {p: p.read_bytes() for p in out.with_name("out.partial").iterdir()}
    with Journal(out, overwrite=False) as journal, pytest.raises(CompressError) as caught:
        journal.start(lambda: PRINT | change, fresh=False)
    assert says in caught.value.what
    assert "--fresh" in caught.value.remedy
    assert {p: p.read_bytes() for p in out.with_name("out.partial").iterdir()} == before


def test_compare() -> None:
    assert compare(PRINT, dict(PRINT)) == []
    assert compare({"a": 1}, {"b": 2}) == ["a (was 1, is None)", "b (was None, is 2)"]


# --- damage


def damage(file: Path, how: str) -> None:
    if how == "gone":
        file.unlink()
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif how == "list":
        file.write_text("[]")
    elif how == "other":
        file.write_text("{}")
    else:
        raw = bytearray(file.read_bytes())
        raw[-1] ^= 1
        file.write_bytes(raw)


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "flip"])
def test_damaged_block(out: Path, how: str) -> None:
    begin(out, 2)
    with Journal(out, overwrite=False) as journal:
        journal.start(lambda: PRINT, fresh=False)
        damage(journal.folder / "block-00001.safetensors", how)
        journal.tensors(0)
        with pytest.raises(CompressError, match=r"block-00001\.safetensors.*--fresh"):
            journal.tensors(1)


@pytest.mark.parametrize("how", ["empty", "cut", "list", "other"])
def test_damaged_records(out: Path, how: str) -> None:
    begin(out, 1)
    with Journal(out, overwrite=False) as journal:
        journal.start(lambda: PRINT, fresh=False)
        damage(journal.folder / "block-00000.json", "cut" if how == "cut" else how)
        if how == "cut":
            damage(journal.folder / "block-00000.json", "cut")  # the last byte was the newline
        for call in (journal.tensors, journal.records):
            with pytest.raises(CompressError, match=r"block-00000\.json.*--fresh"):
                call(0)


@pytest.mark.parametrize("how", ["empty", "list"])
def test_damaged_fingerprint(out: Path, how: str) -> None:
    begin(out, 1)
    damage(out.with_name("out.partial") / "fingerprint.json", how)
    with Journal(out, overwrite=False) as journal:
        with pytest.raises(CompressError, match=r"fingerprint\.json.*--fresh"):
            journal.start(lambda: PRINT, fresh=False)
        assert journal.start(lambda: PRINT, fresh=True) == 0


# --- what the run is


def test_blocks_are_written_before_it_is_known_what_the_run_is(out: Path) -> None:
    """They count from when it is."""
    known = False

    def fingerprint() -> dict[str, Any]:
        nonlocal known
        known = True
        return PRINT

    partial = out.with_name("out.partial")
    with Journal(out, overwrite=False) as journal:
        journal.start(fingerprint, False, lambda: known)
        journal.settle()
        assert not known, "no block is finished: nothing to be kept"
        for i in range(2):
            journal.add(i, *block(i))
        assert not (partial / "fingerprint.json").exists()
    with Journal(out, overwrite=False) as journal:
        assert journal.start(fingerprint, False, lambda: known) == 0, "blocks of an unknown run"
        journal.add(0, *block(0))
        journal.settle()
        journal.add(1, *block(1))
    with Journal(out, overwrite=False) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 2


# --- what is not ours


@pytest.mark.parametrize("fresh", [False, True])
def test_a_strangers_folder_is_not_deleted(out: Path, fresh: bool) -> None:
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "thesis.tex").write_text("years of work")
    with Journal(out, overwrite=False) as journal, pytest.raises(CompressError, match=r"thesis\.tex"):
        journal.start(lambda: PRINT, fresh)
    assert (partial / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way(out: Path) -> None:
    out.with_name("out.partial").write_text("mine")
    with Journal(out, overwrite=False) as journal, pytest.raises(CompressError, match="in the way"):
        journal.start(lambda: PRINT, fresh=False)
    assert out.with_name("out.partial").read_text() == "mine"


def test_what_a_stopped_run_leaves_is_cleared(out: Path) -> None:
    """Killed before the fingerprint was in place, with spilled activations: started over without a question."""
    partial = out.with_name("out.partial")
    partial.mkdir()
    (partial / "fingerprint.json.tmp").write_text("{")
    (partial / "hidden.bin").write_text("x")
    with Journal(out, overwrite=False) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 0
        assert names(partial) == set()


def test_nothing_is_left_of_a_run_without_a_block(out: Path) -> None:
    with Journal(out, overwrite=False) as journal:
        journal.start(lambda: PRINT, fresh=False)
        assert out.with_name("out.partial").is_dir()
    assert not list(out.parent.iterdir())
    begin(out, 1)
    assert out.with_name("out.partial").is_dir()


# --- the lock


def test_one_run_at_a_time(out: Path) -> None:
    with Journal(out, overwrite=True) as journal:
        journal.start(lambda: PRINT, fresh=False)
        with pytest.raises(CompressError, match="another run is writing this output"), Journal(out, overwrite=True):
            pass
        assert journal.folder.is_dir()
    with Journal(out, overwrite=True):
        pass
    assert names(out.parent) == set()


def test_a_dead_runs_lock_file_is_no_lock(out: Path) -> None:
    out.with_name("out.lock").write_text("")
    with Journal(out, overwrite=False) as journal:
        journal.start(lambda: PRINT, fresh=False)
    assert names(out.parent) == set()


def test_a_folder_where_the_lock_belongs(out: Path) -> None:
    out.with_name("out.lock").mkdir()
    with pytest.raises(CompressError, match=r"out\.lock.*cannot be locked"), Journal(out, overwrite=False):
        pass


def test_an_output_that_appears_before_the_lock(out: Path) -> None:
    """Two runs began together; the other one finished first."""
    journal = Journal(out, overwrite=False)
    begin(out, 0, finish=True)
    with pytest.raises(CompressError, match="the output exists"), journal:
        pass
    assert names(out.parent) == {"out"}


def test_an_output_that_appears_during_the_run(out: Path) -> None:
    with Journal(out, overwrite=False) as journal:
        journal.start(lambda: PRINT, fresh=False)
        assemble(journal, "new")
        out.mkdir()
        (out / "config.json").write_text("old")
        with pytest.raises(CompressError, match="the output exists"):
            journal.publish()
    assert (out / "config.json").read_text() == "old"
    assert (journal.final / "config.json").read_text() == "new"


# --- the final name


def test_publish(out: Path) -> None:
    begin(out, 2, finish=True)
    assert names(out.parent) == {"out"}
    assert (out / "config.json").read_text() == "new"


def old_output(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "only-in-the-old.txt").write_text("x")


def test_publish_replaces_whole(out: Path) -> None:
    old_output(out)
    begin(out, 1, finish=True)
    assert names(out) == {"config.json"}
    assert (out / "config.json").read_text() == "new"
    assert names(out.parent) == {"out"}


@pytest.mark.parametrize("failing", [1, 2])
def test_a_failed_replacement_leaves_the_old(out: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    old_output(out)
    replace, calls = os.replace, []

    def some(a: Any, b: Any) -> None:
        calls.append(b)
        if len(calls) == failing:
            raise OSError("no")
        replace(a, b)

    with Journal(out, overwrite=True) as journal:
        journal.start(lambda: PRINT, fresh=False)
        assemble(journal, "new")
        monkeypatch.setattr(os, "replace", some)
        with pytest.raises(OSError, match="no"):
            journal.publish()
    monkeypatch.undo()
    assert names(out) == {"config.json", "only-in-the-old.txt"}
    assert (out / "config.json").read_text() == "old"
    begin(out, 0, finish=True)
    assert names(out) == {"config.json"}
    assert names(out.parent) == {"out"}


def test_a_kill_between_the_renames_is_undone(out: Path) -> None:
    old_output(out)
    begin(out, 1)
    partial = out.with_name("out.partial")
    os.replace(out, partial / "replaced")
    with pytest.raises(CompressError, match="the output exists"), Journal(out, overwrite=False):
        pass  # even a run that is refused puts the old output back
    assert (out / "config.json").read_text() == "old"
    with Journal(out, overwrite=True) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 1
        assert names(partial) == {"fingerprint.json", "block-00000.json", "block-00000.safetensors"}


def test_leftovers_of_a_kill_behind_the_renames(out: Path) -> None:
    old_output(out)
    begin(out, 1)
    partial = out.with_name("out.partial")
    shutil.copytree(out, partial / "replaced")
    (partial / "final").mkdir()
    with Journal(out, overwrite=True) as journal:
        assert journal.start(lambda: PRINT, fresh=False) == 1
        assemble(journal, "new")
        journal.publish()
    assert names(out) == {"config.json"}
    assert names(out.parent) == {"out"}


def test_check_output(out: Path) -> None:
    check_output(out, overwrite=False)
    out.mkdir()
    check_output(out, overwrite=True)  # an empty folder
    with pytest.raises(CompressError, match="--overwrite"):
        check_output(out, overwrite=False)
    (out / "notes.txt").write_text("x")
    with pytest.raises(CompressError, match="not a model folder"):
        check_output(out, overwrite=True)
    (out / "config.json").write_text("{}")
    check_output(out, overwrite=True)
    link = out.with_name("link")
    link.symlink_to(out)
    for place in (out, link, out.parent):
        with pytest.raises(CompressError, match="the input is there"):
            check_output(place, overwrite=True, source=out)
    check_output(out / "below", overwrite=False, source=out)
