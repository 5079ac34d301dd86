"""The table of measured launch shapes: written, read, asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from compress import assets
from compress.cuda import tuned
from compress.cuda.tuned import Entry, nearest
from compress.errors import CompressError

CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's cache folder, and no files of the package's own."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "kernels").mkdir()
    monkeypatch.setattr(assets, "folder", lambda name: tmp_path / name)
    tuned.forget()
    yield tmp_path
    tuned.forget()


def entry(tokens: int = 1, rows: int = 4096, columns: int = 4096, bits: int = 4, kind: int = 0, n: int = 1) -> Entry:
    return Entry(kind, bits, tokens, rows, columns, ("narrow", n, 2, 8, 3), 5.25)


def save(*entries: Entry) -> Path:
    return tuned.save(CARD, (9, 0), 132, "2026-11-22", entries)


def test_saved_and_loaded(cache: Path) -> None:
    assert tuned.load(CARD) == ()
    file = save(entry(), entry(8))
    assert file == cache / "cache" / "tuned-NVIDIA-H100-80GB-HBM3.json"
    assert tuned.load(CARD) == (entry(), entry(8))
    found = json.loads(file.read_text())
    assert (found["schema"], found["device"], found["capability"], found["sms"]) == (1, CARD, [9, 0], 132)
    assert found["entries"][0]["way"] == ["narrow", 1, 2, 8, 3]
    assert tuned.load("another card") == ()


def test_a_newer_measurement_takes_the_place_of_an_older() -> None:
    save(entry(), entry(8))
    save(entry(n=2), entry(16))
    assert [e.way[1] for e in tuned.load(CARD)] == [2, 1, 1]


def test_no_entries_make_a_file_that_is_read() -> None:
    save()
    assert tuned.load(CARD) == ()


def test_the_users_own_come_first(cache: Path) -> None:
    (cache / "kernels" / "tuned.json").write_text(save(entry(n=9)).read_text())
    save(entry(n=1))
    assert [e.way[1] for e in tuned.load(CARD)] == [1, 9]
    assert nearest(tuned.load(CARD), 0, 4, 1, 4096, 4096) == ("narrow", 1, 2, 8, 3)


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"schema": 1}',
        '{"schema": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [{"way": ["narrow"]}]}',
        '{"schema": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [{"way": []}]}',
        json.dumps({"schema": 1, "device": CARD, "entries": [{**vars(entry(0)), "way": ["narrow", 1]}]}),
    ],
)
def test_a_damaged_file_is_told_and_left_out(cache: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    save().write_text(text)
    (cache / "kernels" / "tuned.json").write_text(json.dumps({"schema": 2, "device": CARD}))  # of another time: quietly
    tuned.forget()
    assert tuned.load(CARD) == ()
    assert len(caplog.records) == 1
    assert "tuned-NVIDIA" in caplog.text


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    (cache / "cache").write_text("a file")
    with pytest.raises(CompressError, match="COMPRESS_CACHE"):
        save(entry())


def test_next_larger_number_of_tokens() -> None:
    table = [entry(1, n=1), entry(16, n=2), entry(64, n=3)]
    found = {n: (way := nearest(table, 0, 4, n, 4096, 4096)) and way[1] for n in (1, 2, 5, 16, 17, 64, 65)}
    # 2 tokens: 16 is more than four times as many
    assert found == {1: 1, 2: None, 5: 2, 16: 2, 17: 3, 64: 3, 65: None}
    assert nearest(table, 0, 4, 0, 4096, 4096) is None


def test_a_shape_that_is_near_counts_before_a_number_of_tokens() -> None:
    table = [entry(8, rows=28672, n=1), entry(16, n=2)]
    assert nearest(table, 0, 4, 8, 4096, 4096) == ("narrow", 2, 2, 8, 3)


def test_nearest_shape() -> None:
    table = [
        entry(rows=4096, columns=4096, n=1),
        entry(rows=11008, columns=4096, n=2),
        entry(rows=4096, columns=11008, n=3),
    ]

    def asked(rows: int, columns: int) -> object:
        way = nearest(table, 0, 4, 1, rows, columns)
        return way and way[1]

    assert asked(4096, 4096) == 1
    assert asked(5120, 5120) == 1
    assert asked(14336, 4096) == 2
    assert asked(4096, 14336) == 3
    assert asked(2048, 2048) == 1  # a factor of 2 both ways
    assert asked(2047, 4096) is None
    assert asked(28672, 8192) is None


def test_other_kinds_and_bits_are_not_asked() -> None:
    table = [entry(bits=3), entry(kind=1)]
    assert nearest(table, 0, 4, 1, 4096, 4096) is None
    assert nearest([], 0, 4, 1, 4096, 4096) is None


def test_what_comes_with_the_package_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (Path(__file__).resolve().parents[2] / "kernels").glob("tuned*.json"):
        device = json.loads(file.read_text())["device"]
        assert tuned._entries(file, device), file.name
