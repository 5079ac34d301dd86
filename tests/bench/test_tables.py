"""Reports as tables, from results that stand here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.bench import kernels, record, tables

HEAD: dict[str, Any] = {
    "schema": 1,
    "command": "compress bench kernels --kinds w4",
    "date": "2026-11-22",
    "machine": {
        "device": "NVIDIA H100 80GB HBM3", "capability": [9, 0], "sms": 132, "memory": 85e9, "l2": 52428800,
        "driver": "580.159.04", "driver_cuda": "13.0", "power_limit": "700.00 W",
    },
    "versions": {"compress": "0.1.0", "torch": "2.11.0+cu130"},
}  # fmt: skip
START = {"kind": "w4", "rows": 4096, "columns": 4096, "failed": ""}
KERNELS: dict[str, Any] = HEAD | {
    "kind": "kernels",
    "setting": {"dtype": "float16", "group": 128, "asymmetric": False},
    "ceilings": {
        "copy_gbps": 2987.0,
        "reads": [{"bytes": 8_650_000, "us": 4.38, "gbps": 1975.0}],
        "tera_per_second": {"fp16": 710.0},
    },
    "cases": {"w4": "4 bits"},
    "rows": [
        START | {
            "tokens": 1, "us": 5.4, "gbps": 1602.0, "bytes": 8_650_000, "floor_us": 4.4, "of_floor": 0.81,
            "way": "narrow 1 1 8 3", "error": 2.1e-4,
            "peers": {"cuBLAS 16-bit": {"us": 15.9, "ratio": 2.944, "error": 2e-4, "timing": "graph replay"}},
            "quoted": {"marlin": {"us": 9.9, "ratio": 1.833}},
        },
        START | {
            "tokens": 2048, "us": 1234.5, "gbps": 30.0, "bytes": 1, "floor_us": 98.0, "of_floor": 0.08,
            "way": "library", "error": 3e-4, "peers": {}, "quoted": {},
        },
        START | {"tokens": 16, "failed": "wrong result: relative error nan", "way": "wide 16 4 1 1 1"},
    ],
    "absent": {"tinygemm (w4)": "RuntimeError: no | such", "bitsandbytes (nf4)": "bitsandbytes is not installed"},
    "tuned": [
        {"kind": "w4", "rows": 4096, "columns": 4096, "tokens": 1, "way": ["narrow", 1, 1, 8, 3], "us": 5.3,
         "before": "narrow 1 1 8 2", "before_us": None, "tried": 18, "failed": {"narrow 1 1 4 4": "nan"}},
    ],
    "failed": 1,
    "missing": 0,
}  # fmt: skip
DECODE: dict[str, Any] = HEAD | {
    "kind": "decode",
    "setting": {"dtype": "float16", "prompt": 16, "steps": 128},
    "model": {"layers": 32, "hidden": 4096, "parameters": 6_738_415_616},
    "rows": [
        {"method": "dense", "batch": 1, "failed": "", "weight_bytes": 13.5e9, "ms": 5.0, "tokens_per_second": 200.0,
         "gbps": 2600.0, "peak_bytes": 14e9},
        {"method": "w4", "batch": 1, "failed": "", "weight_bytes": 4e9, "ms": 2.0, "tokens_per_second": 500.0,
         "gbps": 2000.0, "peak_bytes": 4.5e9},
        {"method": "w4", "batch": 16, "failed": "", "weight_bytes": 4e9, "ms": 4.0, "tokens_per_second": 4000.0,
         "gbps": 1000.0, "peak_bytes": 4.5e9},
        {"method": "nf4", "batch": 1, "failed": "out of memory"},
    ],
    "failed": 1,
    "missing": 0,
}  # fmt: skip


def test_rows_of_kernels() -> None:
    _, kind, tuned = tables.kernels(KERNELS)
    assert kind.headings == (
        "shape", "M", "µs", "GB/s", "of floor", "cuBLAS 16-bit: µs (ratio)", "quoted, not this run: µs (ratio)", "ran",
        "error",
    )  # fmt: skip
    assert kind.rows == (
        ("4096x4096", "1", "5.40", "1602", "0.81", "15.9 (2.94)", "marlin 9.90 (1.83)", "narrow 1 1 8 3", "2.1e-04"),
        ("4096x4096", "2048", "1234", "30", "0.08", "-", "-", "library", "3.0e-04"),
        ("4096x4096", "16", "FAILED", "", "", "", "", "wide 16 4 1 1 1", "wrong result: relative error nan"),
    )
    assert tuned.rows == (("w4", "4096x4096", "1", "narrow 1 1 8 3", "5.30", "narrow 1 1 8 2", "-", "18", "1"),)


def test_ceilings_come_first() -> None:
    assert tables.kernels(KERNELS)[0].rows == (
        ("copy, read + write", "2987 GB/s", ""), ("read 8.65 MB", "1975 GB/s", "4.38 µs"), ("dense fp16", "710 T/s", "")
    )  # fmt: skip


def test_notes_say_what_is_absent_and_quoted() -> None:
    notes = "\n".join(tables.kernels_notes(KERNELS))
    assert "Absent: bitsandbytes (nf4): bitsandbytes is not installed." in notes
    assert "SpQR's kernel at 543d10e" in notes
    assert "1 rows failed, 0 were not reached." in notes
    assert "Quoted" not in "\n".join(tables.kernels_notes(KERNELS | {"rows": [], "failed": 0}))


def test_rows_of_decoding() -> None:
    (table,) = tables.decode(DECODE)
    assert table.rows == (
        ("dense", "1", "200.0", "5.00", "1.00", "13.50", "2600", "14.00", ""),
        ("w4", "1", "500.0", "2.00", "2.50", "4.00", "2000", "4.50", ""),
        ("w4", "16", "4000.0", "4.00", "-", "4.00", "1000", "4.50", ""),
        ("nf4", "1", "FAILED", "", "", "", "", "", "out of memory"),
    )
    assert "6.74 billion" in table.title


@pytest.mark.parametrize("report", [KERNELS, DECODE], ids=["kernels", "decode"])
def test_every_row_has_as_many_cells_as_there_are_headings(report: dict[str, Any]) -> None:
    for table in getattr(tables, report["kind"])(report):
        assert {len(row) for row in table.rows} == {len(table.headings)}


def test_a_page(tmp_path: Path) -> None:
    page = tables.markdown("Kernels", KERNELS, tables.kernels(KERNELS), tables.kernels_notes(KERNELS))
    assert page.startswith("# Kernels\n\n`compress bench kernels --kinds w4`, 2026-11-22.\n")
    assert (
        "NVIDIA H100 80GB HBM3, 132 multiprocessors, 52 MB L2, 85 GB, driver 580.159.04, power limit 700.00 W" in page
    )
    assert "torch 2.11.0+cu130" in page
    assert "| 4096x4096 | 1 | 5.40 | 1602 | 0.81 | 15.9 (2.94) |" in page
    files = record.write(tmp_path / "reports" / "kernels.h100", KERNELS, page)
    assert [f.name for f in files] == ["kernels.h100.json", "kernels.h100.md"]
    assert json.loads(files[0].read_text()) == KERNELS
    assert files[1].read_text() == page


def test_cells_cannot_break_a_table() -> None:
    table = tables.Table("t", ("a|b",), (("c|d",),))
    assert "| a\\|b |" in table.markdown()
    assert "| c\\|d |" in table.markdown()


def test_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(tables.kernels(KERNELS), ["a note [with] brackets"])
    out = capsys.readouterr().out
    assert "a note [with] brackets" in out
    assert "1602" in out


def test_what_is_quoted() -> None:
    found = kernels.quoted()
    assert {p["kind"] for p in found["peers"]} == {"w4", "w8", "nf4", "spqr", "int8"}
    for peer in found["peers"]:
        for shape, times in peer["us"].items():
            assert tuple(map(int, shape.split("x"))) in kernels.SHAPES
            assert all(us > 1 for us in times.values())
    marlin = next(p for p in found["peers"] if (p["name"], p["kind"]) == ("marlin", "w4"))
    assert marlin["us"]["4096x4096"]["1"] == 9.9


def test_quoted_only_on_such_a_card() -> None:
    rows = [dict(START, tokens=1, us=5.0), dict(START, tokens=3, us=5.0), dict(START, tokens=1, failed="x")]
    kernels._quoted(rows, "another card")
    assert all("quoted" not in r for r in rows)
    kernels._quoted(rows, "NVIDIA H100 80GB HBM3")
    assert set(rows[0]["quoted"]) == {"marlin", "machete", "exllamav2", "awq gemv_fast"}
    assert rows[0]["quoted"]["marlin"] == {"us": 9.9, "ratio": 1.98}
    assert rows[1]["quoted"] == rows[2]["quoted"] == {}
