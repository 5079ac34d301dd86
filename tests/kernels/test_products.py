"""narrow.cu, wide.cu, dequantize.cu, run as C++ on this CPU by the operators' own launches, against packed kinds."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from compress.cuda import choice, ops


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem + "_shared", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kinds = _load(Path(__file__).parents[1] / "cuda" / "test_kinds.py")

#: one of each kind, width, way to store scales and offsets
NAMES = ["uniform2-64", "uniform3-32", "uniform4-128", "uniform4--1", "uniform8-256", "odd", "float scales", "affine",
         "nf4", "book3", "spqr"]  # fmt: skip


@pytest.fixture
def emulated(monkeypatch, build):
    """Launches go to the emulation; what they say of shared memory and arguments is what a GPU would be told."""

    def launch(kernel, grid, block, args, shared, x):
        build(kernel.file, dict(kernel.defines)).launch(kernel.name, grid, block, list(args), shared)

    monkeypatch.setattr(ops, "function", lambda kernel, device: kernel)
    monkeypatch.setattr(ops, "launch", launch)
    monkeypatch.setattr(ops, "boxes", lambda x, rows: (x, len(x), x.shape[1], rows))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "way"),
    [
        (1, choice.Single(1, 2, 2)),
        (1, choice.Single(2, 3, 3)),
        (7, choice.Narrow(1, 2, 2, 3)),
        (11, choice.Narrow(2, 1, 3, 1, beside=2)),
        (3, choice.Narrow(1, 1, 1, 2, beside=4, split=2)),
    ],
    ids=["one", "one of two tiles", "seven", "eleven", "three"],
)
def test_few(emulated, name, tokens, way):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if tokens == 7 else torch.float16
    packed = kinds.layers(dtype)[name]
    made = kinds.kernel(packed)
    columns = -(-packed.shape[1] // 8) * 8
    x = torch.zeros(tokens, columns, dtype=dtype)
    x[:, : packed.shape[1]] = torch.randn(tokens, packed.shape[1]).to(dtype)
    out = torch.full((tokens, packed.shape[0]), float("nan"), dtype=dtype)
    (ops.single if tokens == 1 else ops.narrow)(x, made.layer, out, way)
    kinds.close(out, x[:, : packed.shape[1]], packed.dequantize())


@pytest.mark.parametrize(
    ("name", "tokens", "way"),
    [
        ("uniform4-128", 20, choice.Wide(32, 3, 1)),
        ("odd", 13, choice.Wide(16, 2, 2, 2)),
        ("uniform3-64", 30, choice.Wide(32, 3, 1, 1, 2)),
        ("uniform8--1", 9, choice.Wide(8, 3, 2, 1, 2)),
        ("affine", 40, choice.Wide(64, 2, 1)),
        ("nf4", 33, choice.Wide(32, 2, 2)),
        ("book3", 20, choice.Wide(32, 3, 1)),
    ],
)
def test_wide(emulated, name, tokens, way):
    torch.manual_seed(0)
    packed = kinds.layers(torch.float16)[name]
    made = kinds.kernel(packed)
    columns = -(-packed.shape[1] // 8) * 8
    x = torch.zeros(tokens, columns, dtype=torch.float16)
    x[:, : packed.shape[1]] = torch.randn(tokens, packed.shape[1]).half()
    out = torch.full((tokens, packed.shape[0]), float("nan"), dtype=torch.float16)
    ops.broad(x, made.layer, out, way)
    kinds.close(out, x[:, : packed.shape[1]], packed.dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_dequantize(emulated, name):
    torch.manual_seed(0)
    packed = kinds.layers(torch.float16)[name]
    made = kinds.kernel(packed)
    got = ops._dequantize(made.layer, packed.shape[1], torch.float16)
    expected = packed.dequantize().half()
    if name in ("spqr", "float scales"):
        assert (got.float() - expected.float()).abs().max() <= 2**-9 * expected.float().abs().max()
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["grid", "nf4", "book", "spqr"])
def test_by_the_library_some_rows_at_a_time(emulated, monkeypatch, name):
    torch.manual_seed(0)
    half = torch.float16
    packed = {
        "grid": lambda: kinds.grid(200, 328, 4, 64, half, True),
        "nf4": lambda: kinds.blocks(130, 192, "nf4", 64, False, half),
        "book": lambda: kinds.book(150, 200, 3, half),
        "spqr": lambda: kinds.spqr(150, 328, 3, half),  # whole: its outliers' places are those of the matrix
    }[name]()
    made = kinds.kernel(packed)
    x = torch.randn(5, packed.shape[1]).half()
    whole = torch.full((5, packed.shape[0]), float("nan"), dtype=half)
    ops._by_library(x, made.layer, whole)
    kinds.close(whole, x, packed.dequantize())
    monkeypatch.setattr(ops, "BUDGET", 1)
    parts = torch.full_like(whole, float("nan"))
    ops._by_library(x, made.layer, parts)
    kinds.close(parts, x, packed.dequantize())


def test_a_layer_has_parts():
    packed = kinds.grid(200, 256, 3, 64, torch.float16, True)
    layer = kinds.kernel(packed).layer
    dense = packed.dequantize()
    for start, stop in ((0, 200), (64, 128), (128, 200), (0, 70)):
        assert torch.equal(ops.plain(layer.part(start, stop), 256, torch.float16), dense[start:stop])
    book = kinds.book(150, 128, 3, torch.float16)
    part = kinds.kernel(book).layer.part(64, 150)
    assert torch.equal(ops.plain(part, 128, torch.float16), book.dequantize()[64:])
