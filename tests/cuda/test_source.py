"""source.py: one text out of several files, messages that name them, options that name the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cuda.source import Kernel, options, text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "kernels"
    made.mkdir()
    (made / "a.cuh").write_text("#pragma once\nint a;\n")
    (made / "b.cuh").write_text('#pragma once\n#include "a.cuh"\nint b;\n')
    (made / "k.cu").write_text('// k\n#include "b.cuh"\n  #  include "a.cuh"\nint k;\n')
    return made


def test_each_file_once_where_it_is_first_included(folder: Path) -> None:
    assert text("k.cu", folder).splitlines() == [
        '#line 1 "kernels/k.cu"', "// k",
        '#line 1 "kernels/b.cuh"', "",
        '#line 1 "kernels/a.cuh"', "", "int a;",
        '#line 3 "kernels/b.cuh"', "int b;",
        '#line 3 "kernels/k.cu"', "", "int k;",
    ]  # fmt: skip


def test_line_numbers(folder: Path) -> None:
    """By what #line means, every line that is left says where it stands in its own file."""
    where, number = "", 0
    for line in text("k.cu", folder).splitlines():
        if line.startswith("#line"):
            _, start, name = line.split()
            where, number = name.strip('"'), int(start)
            continue
        if line:
            assert (folder.parent / where).read_text().splitlines()[number - 1] == line
        number += 1


def test_a_file_that_is_not_there(folder: Path) -> None:
    (folder / "k.cu").write_text('#include "none.cuh"\n')
    with pytest.raises(FileNotFoundError):
        text("k.cu", folder)


def test_our_own_need_no_include_path() -> None:
    for path in Path(__file__).parents[2].joinpath("kernels").glob("*.cu"):
        assert '#include "' not in text(path.name)


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COMPRESS_RACECHECK", raising=False)
    kernel = Kernel("narrow", "narrow.cu", (("BITS", 4), ("T", "Half")))
    assert options(kernel, (8, 6)) == ("--std=c++17", "-ftz=true", "-arch=sm_86", "-DBITS=4", "-DT=Half")
    assert "-arch=sm_90a" in options(kernel, (9, 0))
    assert "-arch=sm_100" in options(kernel, (10, 0))
    assert kernel.title == "narrow (narrow.cu, BITS=4 T=Half)"
    assert Kernel("narrow", "narrow.cu").title == "narrow (narrow.cu)"
    with pytest.raises(AssertionError):
        options(Kernel("wide", "wide.cu", hopper=True), (8, 0))
    monkeypatch.setenv("COMPRESS_RACECHECK", "1")
    assert options(kernel, (8, 6))[-1] == "-DARRIVALS=32"
