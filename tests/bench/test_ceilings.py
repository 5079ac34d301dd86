"""Floors between the sizes that were measured, and beyond them."""

from __future__ import annotations

import pytest

from compress.bench.ceilings import Ceilings

FOUND = Ceilings(2987.0, ((1_000_000, 2.0), (10_000_000, 5.0), (100_000_000, 35.0)), {"fp16": 700.0, "int8": 1000.0})


@pytest.mark.parametrize(
    ("size", "us"),
    [(1e6, 2.0), (5.5e6, 3.5), (1e7, 5.0), (4e7, 15.0), (1e8, 35.0), (1.9e8, 65.0), (4e5, 1.8), (0, 5 / 3)],
)
def test_reading(size: float, us: float) -> None:
    assert FOUND.read(size) == pytest.approx(us)


def test_reading_takes_no_negative_time() -> None:
    steep = Ceilings(1.0, ((1_000_000, 1.0), (2_000_000, 10.0)), {"fp16": 1.0})
    assert steep.read(100) == 0.0


def test_the_longer_of_the_two() -> None:
    assert FOUND.floor(1e7, 1e6) == pytest.approx(5.0)
    assert FOUND.floor(1e7, 7e12) == pytest.approx(1e4)
    assert FOUND.floor(1e7, 7e12, "int8") == pytest.approx(7e3)
    assert FOUND.floor(1e7, 7e12, "fp8") == pytest.approx(1e4)  # a rate that was not measured


def test_as_json() -> None:
    found = FOUND.as_json()
    assert found["reads"][1] == {"bytes": 10_000_000, "us": 5.0, "gbps": 2000.0}
    assert found["tera_per_second"] == {"fp16": 700.0, "int8": 1000.0}
