"""PackedLinear: every kind computes what `Packed.linear` says, in its stored bytes, wherever and however it is cut."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress import linear
from compress.experts import DenseSlice, FusedExperts
from compress.linear import PackedLinear, reader
from compress.packed import KINDS
from compress.packed.affine import Affine
from compress.packed.dense import Dense
from compress.packed.uniform import UniformGrid
from compress.recipe import Recipe, parse
from compress.types import LayerStats, Packed, moved, tensor_bytes_of

LINES = [
    "rtn bits=3 group_size=16",
    "rtn bits=4 group_size=32 symmetric=false",
    "rtn bits=5 symmetric=false group_size=-1",
    "rtn bits=8 group_size=-1",
    "absmax activations=token",
    "absmax weights=tensor activations=tensor zeropoint=true",
    "int8 threshold=8",
    "gptq bits=4 group_size=16 act_order=groups",
    "sparsegpt sparsity=0.4",
    "sparsegpt pattern=2:4",
    "sparsegpt pattern=4:8 bits=3 group_size=16",
    "sparsegpt sparsity=0.7 bits=4 group_size=16 symmetric=false",
    "spqr",
    "spqr bits=2 group_size=8 outlier_threshold=.inf",
    "nf4",
    "nf4 block_size=128",
    "nf4 block_size=32 double_quant=true",
    "fp4 variant=e3m0",
    "kmeans bits=3",
    "kmeans bits=2 group_size=16 weighted=false",
    "affine",
    "dense",
]
#: whose rows are unpacked some at a time; the others are unpacked whole
WHOLE = ("sparsegpt sparsity=0.4", "sparsegpt sparsity=0.7 bits=4 group_size=16 symmetric=false")


def solved(line: str, dtype: torch.dtype = torch.bfloat16, rows: int = 48, columns: int = 64) -> Packed:
    """A layer by one pass, on correlated inputs."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(200, columns, generator=g) @ torch.randn(columns, columns, generator=g) * 0.3
    weight = (torch.randn(rows, columns, generator=g) * 0.05).to(dtype)
    if line == "dense":
        return Dense(weight)
    if line == "affine":
        codes = torch.randint(0, 16, (rows, columns), generator=g, dtype=torch.uint8)
        scales, minima = (torch.randn(rows, columns // 32, generator=g).to(dtype) for _ in range(2))
        return Affine(codes, scales, minima, 4, 32)
    stats = LayerStats(200, x.T @ x / 200, x.abs().amax(0), x.abs().mean(0), x.mean(0), (x.abs() >= 2).float().mean(0))
    (settled,) = (p.settle([columns]) for p in Recipe.of(parse(line)).passes)
    return settled(weight, stats, dtype).packed


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def small_runs() -> Iterator[None]:
    """A few rows at a time, as in a layer that is far larger."""
    before = dict(linear._AT_ONCE)
    linear._AT_ONCE["cpu"] = 64 * 5
    yield
    linear._AT_ONCE.update(before)


def test_every_kind_is_here() -> None:
    assert {solved(line).kind for line in LINES} == set(KINDS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("line", LINES)
def test_computes_what_the_kind_says(line: str, dtype: torch.dtype) -> None:
    packed = solved(line, dtype)
    bias = inputs(48, dtype=dtype)
    layer = PackedLinear.of(packed, bias=bias, kernels=False)
    assert layer.dtype == dtype
    for shape in ((64,), (3, 64), (2, 5, 64), (0, 64)):
        for kind in (torch.float32, torch.bfloat16, dtype):
            if line.startswith(("absmax", "int8")) and shape[0] == 0:
                continue
            x = inputs(*shape, dtype=kind)
            out = layer(x)
            assert out.dtype == kind
            assert torch.equal(out, packed.linear(x) + bias.to(kind))


@pytest.mark.parametrize("line", LINES)
def test_a_few_rows_at_a_time(line: str, small_runs: None) -> None:
    packed = solved(line)
    layer = PackedLinear.of(packed, kernels=False)
    read = reader(packed.tensors(), packed.storage, packed.shape, layer.dtype)
    assert (read is None) == (line in WHOLE)
    if read is not None:
        steps = [*range(0, 48, read.unit), 48]
        assert len(steps) > 2
        parts = [read.read(a, b).dequantize() for a, b in pairwise(steps)]
        assert torch.equal(torch.cat(parts), packed.dequantize())
    assert torch.equal(layer.dense(torch.float32), packed.dequantize().float())
    x = inputs(7, 64)
    assert torch.equal(layer(x), packed.linear(x))


@pytest.mark.parametrize("line", LINES)
def test_a_layer_above_the_budget(line: str, small_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its product is made of runs of rows; the dense weight is never whole."""
    packed = solved(line)
    layer = PackedLinear.of(packed, kernels=False)
    monkeypatch.setattr(linear, "BUDGET", 64 * 4 * 16)
    seen = []
    monkeypatch.setattr(F, "linear", lambda x, w, plain=F.linear: seen.append(len(w)) or plain(x, w))
    x = inputs(7, 64)
    out = layer(x)
    monkeypatch.undo()
    assert torch.allclose(out, packed.linear(x), rtol=1e-5, atol=1e-6)
    if line not in WHOLE and not packed.storage.activations:
        assert max(seen) <= max(16, reader(packed.tensors(), packed.storage, packed.shape, layer.dtype).unit)


def test_rows_of_a_block_that_cross_rows() -> None:
    """24 columns in blocks of 64: runs begin at every 8th row, and at every row where a block is no longer than one."""
    packed = solved("nf4", columns=24)
    read = reader(packed.tensors(), packed.storage, packed.shape, torch.bfloat16)
    assert read is not None
    assert read.unit == 8
    assert torch.equal(read.read(8, 32).dequantize(), packed.dequantize()[8:32])
    assert reader(solved("nf4", rows=8, columns=24).tensors(), packed.storage, (8, 24), torch.bfloat16) is None


@pytest.mark.parametrize("line", LINES)
def test_state_dict_there_and_back(line: str) -> None:
    packed = solved(line)
    layer = PackedLinear.of(packed, bias=inputs(48))
    layer(inputs(2, 64, dtype=torch.bfloat16))  # perhaps in a kernel's layout now
    state = layer.state_dict()
    assert same({k: v for k, v in state.items() if k != "bias"}, packed.tensors())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    empty = {k: torch.zeros_like(v) for k, v in packed.tensors().items()}
    other = PackedLinear(empty, packed.storage, packed.shape, torch.bfloat16, torch.zeros(48))
    other.load_state_dict(torch.load(buffer))
    found = other.packed()
    assert type(found) is type(packed)
    assert found.storage == packed.storage
    assert same(found.tensors(), packed.tensors())
    x = inputs(3, 64)
    assert torch.equal(other(x), packed.linear(x) + inputs(48))


@pytest.mark.parametrize("line", LINES)
def test_holds_the_stored_bytes(line: str) -> None:
    packed = solved(line)
    layer = PackedLinear.of(packed, kernels=False)
    layer(inputs(2, 64))
    assert layer.weight_bytes == sum(b.numel() * b.element_size() for b in layer.buffers()) == tensor_bytes_of(packed)
    assert not list(layer.parameters())
    text = repr(layer)
    assert packed.kind in text
    assert f"bits={packed.storage.bits}" in text
    assert f"{tensor_bytes_of(packed)} bytes" in text


@pytest.mark.parametrize("line", LINES)
def test_a_change_of_dtype_leaves_the_weight(line: str) -> None:
    packed = solved(line, torch.float32)
    layer = nn.Sequential(PackedLinear.of(packed, bias=inputs(48), kernels=False))
    layer.to(torch.bfloat16).half().double()
    assert same(layer[0].packed().tensors(), packed.tensors())
    assert layer[0].bias.dtype == torch.float64
    again = copy.deepcopy(layer)
    assert same(again[0].packed().tensors(), packed.tensors())


@pytest.mark.parametrize("line", ["rtn bits=4 group_size=32", "spqr", "nf4"])
def test_to_meta_and_filled_again(line: str) -> None:
    packed = solved(line)
    layer = PackedLinear.of(packed)
    layer(inputs(2, 64, dtype=torch.bfloat16))
    layer.to("meta")
    assert all(b.is_meta for b in layer.buffers())
    layer.load_state_dict(packed.tensors(), assign=True)
    assert torch.equal(layer(inputs(2, 64)), packed.linear(inputs(2, 64)))


def test_weight_is_what_the_replaced_module_held() -> None:
    packed = solved("nf4")
    assert torch.equal(PackedLinear.of(packed).weight, packed.dequantize())
    assert torch.equal(PackedLinear.of(packed, transposed=True).weight, packed.dequantize().t())


def test_moved_equals_packed() -> None:
    packed = solved("spqr")
    assert torch.equal(moved(packed, torch.device("cpu")).dequantize(), PackedLinear.of(packed).dense(torch.bfloat16))


class _Eager(nn.Module):
    """The part of an experts module that matters: an indexed parameter in F.linear."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.gate_up_proj = weight

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        gate, up = F.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return gate * up


@pytest.mark.parametrize("lines", [("nf4", "nf4"), ("nf4", "absmax activations=token"), ("nf4", "dense")])
def test_fused_experts(lines: tuple[str, str]) -> None:
    experts = [[solved(line, rows=16 + 32 * e) for line in lines] for e in range(2)]
    experts[1] = [p.rows(0, 16) if p.kind != "blockwise" else solved("nf4", rows=16) for p in experts[1]]
    slices = [
        [DenseSlice(p.values) if isinstance(p, Dense) else PackedLinear.of(p, kernels=False) for p in pair]
        for pair in experts
    ]
    fused = FusedExperts(slices, torch.float32)
    assert tuple(fused.shape) == (2, 32, 64)
    assert (fused.dim(), fused.ndim, len(fused), fused.device.type) == (3, 3, 2, "cpu")
    x, bias = inputs(5, 64), inputs(32)
    for e in range(2):
        dense = torch.cat([p.dequantize().float() for p in experts[e]])
        want = torch.cat([p.linear(x) for p in experts[e]], -1)
        assert torch.allclose(F.linear(x, fused[e]), want, atol=1e-5)
        assert torch.allclose(F.linear(x, fused[e], bias), want + bias, atol=1e-5)
        assert torch.allclose(_Eager(fused)(x, torch.tensor(e)), want[:, :16] * want[:, 16:], atol=1e-5)
        # anything but F.linear sees a dense tensor
        assert torch.equal(fused[e].t(), dense.t())
        assert torch.equal(torch.matmul(x, fused[e].T), x @ dense.T)
        assert fused[e].shape == dense.shape
        with pytest.raises(AttributeError):
            fused[e].__nothing__  # noqa: B018


def test_unknown_kinds_are_unpacked_whole() -> None:
    packed = solved("rtn bits=3 group_size=16")
    assert isinstance(packed, UniformGrid)
    from dataclasses import replace

    assert reader(packed.tensors(), replace(packed.storage, kind="mystery"), packed.shape, torch.float32) is None
