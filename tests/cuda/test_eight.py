"""The 8-bit product: its layout loses nothing, its kernels and the operator give what compress.int8 gives.

The kernels run twice: on a GPU, and as C++ on a CPU (tests/kernels/emulate.py) through the module's own launches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress import int8
from compress.cuda import eight, layout
from compress.cuda.choice import Library, Narrow
from compress.cuda.eight import EightBit, Inputs, Wide
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.uniform import UniformGrid
from compress.types import Packed

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
HALVES = (torch.float16, torch.bfloat16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
NAN = float("nan")
SHAPES = [(1, 1), (16, 128), (100, 300), (257, 130), (63, 1000)]  # rows, columns


def layer(rows: int, columns: int, outliers: int, dtype: torch.dtype, stored: torch.dtype | None = None) -> Packed:
    """`outliers` columns in full, -1 for a grid alone; `stored`: of scales and those columns."""
    torch.manual_seed(rows + columns + outliers)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    scales = (torch.rand(rows, 1) * 0.01 + 0.001).to(stored or dtype)
    if outliers < 0:
        return UniformGrid(codes, scales, None, 8, -1, activations="token")
    chosen = torch.randperm(columns)[:outliers].sort().values.to(torch.int32)
    codes[:, chosen.long()] = 128
    grid = UniformGrid(codes, scales, None, 8, -1, activations="token")
    return OutlierColumns(grid, chosen, torch.randn(rows, outliers).to(stored or dtype))


def inputs(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A few large features; a row of zeros where there are several."""
    torch.manual_seed(tokens + columns)
    x = torch.randn(tokens, columns) * torch.exp(torch.randn(columns))
    x[1:2] = 0
    return x.to(dtype)


def as_defined(out: Tensor, x: Inputs, made: EightBit, dtype: torch.dtype) -> None:
    """Whether it is the product of what was quantised: without outliers bit for bit, else but for what float32 rounds
    before the last rounding."""
    wide, packed = made.chunks * 128, made.outliers_in(dtype)
    weight = (eight.unpack(made.codes, made.rows, wide) ^ 128).view(torch.int8).double()
    total = x.rows[:, :wide].view(torch.int8).double() @ weight.t()
    assert out.dtype == dtype
    if packed is None or not made.outlier_chunks:
        assert torch.equal(out, (total.float() * x.scales[:, None] * made.scales).to(dtype))
        return
    dense = eight.unpack_outliers(packed, made.rows, made.outlier_chunks * 64).double()
    outer = x.rows[:, wide:].contiguous().view(dtype).double()
    scaled = total * x.scales[:, None].double() * made.scales.double()
    exact, size = scaled + outer @ dense.t(), scaled.abs() + outer.abs() @ dense.abs().t()
    assert out.shape == exact.shape
    error = (out.double() - exact).abs()
    assert (error <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 2e-6 * size + 1e-7).all(), error.max()


# --- layout, values --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_layouts_lose_nothing(rows: int, columns: int) -> None:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    packed = eight.pack(codes)
    assert packed.shape == (-(-rows // 64), -(-columns // 128), layout.BAND, 512)
    assert torch.equal(eight.unpack(packed, rows, columns), codes)
    for dtype in (*HALVES, torch.float32):
        for count in (0, columns):
            weight = torch.randn(rows, count).to(dtype)
            packed = eight.pack_outliers(weight)
            assert packed.shape == (-(-rows // 64), -(-count // 64), layout.BAND, 1024)
            assert torch.equal(eight.unpack_outliers(packed, rows, count), weight)


def test_words_lie_as_the_kernels_say() -> None:
    """kernels/codes8.cuh; and what fills up stands for zero."""
    codes = torch.randint(0, 256, (70, 200), dtype=torch.uint8)
    weight = torch.randn(70, 100).half()
    padded = F.pad(codes ^ 128, (0, 56, 0, 58))
    lanes = eight.pack(codes).view(torch.uint8).reshape(2, 2, 4, 4, 32, 4, 4)
    halved = eight.pack_outliers(weight).reshape(2, 2, 4, 4, 32, 4, 2)
    for band, chunk, tile, step, lane, word in [(0, 0, 0, 0, 0, 0), (0, 1, 3, 2, 17, 1), (1, 1, 0, 3, 31, 3)]:
        row = 64 * band + 16 * tile + lane // 4 + word % 2 * 8
        column = 128 * chunk + 32 * step + 16 * (word // 2) + 4 * (lane % 4)
        assert torch.equal(lanes[band, chunk, tile, step, lane, word], padded[row, column : column + 4])
        expected = F.pad(weight, (0, 28, 0, 58))[row, column // 2 : column // 2 + 2]
        assert torch.equal(halved[band, chunk, tile, step, lane, word], expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("outliers", [-1, 0, 5, 130])
def test_a_layer_is_restored(outliers: int, stored: torch.dtype) -> None:
    packed = layer(57, 130, outliers, stored)
    assert EightBit.why_not(packed.storage, packed.shape) is None
    restored = EightBit.of(packed).restore()
    assert restored.storage == packed.storage
    for name, tensor in packed.tensors().items():
        assert torch.equal(restored.tensors()[name], tensor)
        assert restored.tensors()[name].dtype == tensor.dtype


def test_what_has_no_such_kernel() -> None:
    codes, scales = torch.zeros(4, 256, dtype=torch.uint8), torch.ones(4, 1)
    for grid, reason in [
        (UniformGrid(codes, scales, None, 8, -1), "quantised inputs"),
        (UniformGrid(codes, scales, None, 8, -1, activations="tensor"), "by tensor"),
        (UniformGrid(codes, scales, codes[:, :1], 8, -1, activations="token"), "symmetric"),
        (UniformGrid(codes, torch.ones(4, 2), None, 8, 128, activations="token"), "a scale a row"),
        (UniformGrid(codes, scales, None, 4, -1, activations="token"), "8 bits"),
    ]:
        assert reason in (EightBit.why_not(grid.storage, (4, 256)) or "")
    whole_row = UniformGrid(codes, scales, None, 8, 256, activations="token")
    assert EightBit.why_not(whole_row.storage, (4, 256)) is None
    assert EightBit.of(whole_row).restore().storage == whole_row.storage
    unlimited = UniformGrid(codes, scales, None, 8, -1, activations="token")
    assert "131072 columns" in (EightBit.why_not(unlimited.storage, (4, 131072)) or "")


# --- the operator ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_operator_without_outliers_is_int8_linear(rows: int, columns: int, dtype: torch.dtype) -> None:
    packed = layer(rows, columns, -1, torch.float16)
    made = EightBit.of(packed)
    for tokens in ((0,), (1,), (7,), (2, 0), (2, 3), ()):
        x = inputs(max(1, *tokens, 6), columns, dtype)[: 0 if 0 in tokens else None]
        x = x[0] if tokens == () else x[: torch.Size(tokens).numel()].reshape(*tokens, columns)
        assert torch.equal(made.linear(x), packed.linear(x))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("outliers", [0, 1, 9, 200, 300])
def test_the_operator_with_outliers(outliers: int, dtype: torch.dtype) -> None:
    packed = layer(41, 300, outliers, dtype)
    x = inputs(6, 300, dtype)
    out, expected = EightBit.of(packed).linear(x), packed.linear(x)
    assert out.dtype == expected.dtype
    eps = torch.finfo(dtype).eps  # the packed kind rounds both parts before it adds them
    size = packed.dequantize().double().abs() @ x.double().abs().t()
    assert ((out.double() - expected.double()).abs() <= 2 * eps * size.t() + 1e-6).all()


@pytest.mark.parametrize("outliers", [-1, 9])
def test_opcheck(outliers: int) -> None:
    made = EightBit.of(layer(41, 130, outliers, torch.bfloat16))
    for shape in ((3, 130), (2, 2, 130)):
        x = inputs(4, 130, torch.bfloat16)[: torch.Size(shape[:-1]).numel()].reshape(shape)
        torch.library.opcheck(torch.ops.compress.linear8.default, (x, *made.arguments))


@pytest.mark.parametrize("outliers", [-1, 9])
@halves
def test_by_library(outliers: int, dtype: torch.dtype) -> None:
    made = EightBit.of(layer(41, 130, outliers, dtype))
    x = inputs(30, 130, dtype)
    quantised = torch_quantise(x, made)
    out = eight.by_library(quantised, made, dtype)
    as_defined(out, quantised, made, dtype)
    assert torch.equal(out, made.linear(x))


def torch_quantise(x: Tensor, made: EightBit) -> Inputs:
    """What quantise.cu is to write, by compress.int8."""
    inner, outer = x, x[:, :0]
    if made.outlier_columns is not None:
        inner = x.index_fill(1, made.outlier_columns.long(), 0)
        outer = x.index_select(1, made.outlier_columns.long())
    codes, scales, _ = int8.quantise(inner, "token")
    codes = F.pad(codes, (0, made.chunks * 128 - codes.shape[1]))
    outer = F.pad(outer, (0, made.outlier_chunks * 64 - outer.shape[1])).contiguous()
    return Inputs(torch.cat([codes.view(torch.uint8), outer.view(torch.uint8)], 1), scales[:, 0])


# --- which kernel ----------------------------------------------------------------------------------------------------


def test_chosen_shapes_are_possible() -> None:
    for rows in (8, 100, 576, 4096, 11008, 28672, 128256):
        for columns in (8, 576, 4096, 28672, 131071):
            chunks = layout.chunks(columns)
            for tokens in (1, 8, 9, 17, 33, 64, 65, 129, 256, 2048, 100000):
                if tokens <= 64:
                    narrow = eight.choose_narrow(tokens, rows, columns, 132)
                    assert 8 * narrow.token_tiles >= tokens
                    assert max(8 * narrow.token_tiles, 16 * narrow.row_tiles) <= 32 * narrow.warps
                    assert eight.narrow_shared(narrow, tokens) <= 98 * 1024
                wide = eight.choose_wide(tokens, rows, columns, 132)
                assert wide.tokens in (32, 64, 128, 256)
                assert wide.split in (1, 2, 4, 8)
                assert wide.stages >= 3
                assert wide.shared <= 225 * 1024
                assert -(-rows // 128) * -(-tokens // wide.tokens) * wide.split < 2**31
                vectors, threads = eight.spread(tokens, chunks)
                assert threads % 32 == 0
                assert 0 < threads <= 1024
                assert threads * vectors * 8 >= chunks * 128


def test_the_kernel_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        multi_processor_count, major, minor = 132, 9, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Device)
    kinds = {t: type(eight.choose(t, 4096, 4096, 990)) for t in (1, 16, 17, 64, 65)}
    assert kinds == {1: Narrow, 16: Narrow, 17: Wide, 64: Wide, 65: Wide}
    Device.major = 8
    kinds = {t: type(eight.choose(t, 4096, 4096, 991)) for t in (1, 16, 17, 64, 65)}
    assert kinds == {1: Narrow, 16: Narrow, 17: Narrow, 64: Narrow, 65: Library}


# --- the kernels on a CPU --------------------------------------------------------------------------------------------


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch, build: Callable[..., Any]) -> None:
    """Launches go to the emulation; what they say of shared memory and arguments is what a GPU would be told."""

    def launch(kernel: Any, grid: Any, block: Any, args: Any, shared: int, x: Tensor) -> None:
        build(kernel.file, dict(kernel.defines)).launch(kernel.name, grid, block, list(args), shared)

    def empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.full(size, 0x5A if dtype == torch.uint8 else NAN, dtype=dtype, device=device)

    monkeypatch.setattr(eight, "function", lambda kernel, device: kernel)
    monkeypatch.setattr(eight, "launch", launch)
    monkeypatch.setattr(eight, "boxes", lambda x, rows: (x, *x.shape, rows))
    monkeypatch.setattr(eight.torch, "empty", empty)


emulation = pytest.mark.xdist_group("shim")


def same_inputs(got: Inputs, expected: Inputs) -> None:
    assert torch.equal(got.rows.cpu(), expected.rows)
    assert torch.equal(got.scales.cpu(), expected.scales)


@emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("tokens", "columns", "outliers"),
    [(3, 128, -1), (2, 136, -1), (5, 1000, 3), (4, 1000, 70), (2, 1000, 1000), (3, 5000, 9), (2, 520, 0)],
)
@halves
def test_quantise(tokens: int, columns: int, outliers: int, dtype: torch.dtype) -> None:
    made = EightBit.of(layer(1, columns, outliers, dtype))
    x = inputs(tokens, columns, dtype)
    same_inputs(eight.quantise(x, made), torch_quantise(x, made))


@emulation
@pytest.mark.usefixtures("emulated")
@halves
def test_quantise_many_tokens(dtype: torch.dtype) -> None:
    """Each with a maximum of its own, and inputs that fall near the middle between two codes."""
    made = EightBit.of(layer(1, 512, -1, dtype))
    torch.manual_seed(0)
    top = torch.exp(torch.randn(150, 1) * 3).to(dtype).float()
    x = ((torch.arange(512) / 2 - 127).clamp(max=127) / 127 * top).to(dtype)
    x[:, -1] = top[:, 0].to(dtype)
    same_inputs(eight.quantise(x, made), torch_quantise(x, made))


@emulation
@pytest.mark.usefixtures("emulated")
@halves
def test_quantise_what_is_not_finite(dtype: torch.dtype) -> None:
    made = EightBit.of(layer(1, 256, 2, dtype))
    x = inputs(5, 256, dtype)
    free = [c for c in range(256) if c not in made.outlier_columns.tolist()]
    x[0, free[9]], x[2, free[200]], x[3, free[3]] = NAN, float("inf"), -float("inf")
    x[3, free[4]] = NAN
    x[4, int(made.outlier_columns[1])] = NAN  # which no scale sees
    got, expected = eight.quantise(x, made), torch_quantise(x, made)
    assert torch.equal(got.scales.nan_to_num(), expected.scales.nan_to_num())
    assert torch.equal(got.scales.isfinite(), torch.tensor([False, True, False, False, True]))
    assert not got.rows[[0, 2, 3], :256].any()
    assert torch.equal(got.rows[[1, 4]], expected.rows[[1, 4]])
    out = torch.full((5, 1), 0.0, dtype=dtype)
    eight.narrow(got, made, out, Narrow(1, 1, 2, 2))
    assert out[[0, 2, 3, 4]].isnan().all()
    assert out[1].isfinite().all()


@emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "outliers", "way"),
    [
        (1, 40, 296, -1, Narrow(1, 1, 4, 2)), (3, 100, 1160, 5, Narrow(1, 2, 4, 2)),
        (8, 64, 512, 70, Narrow(1, 1, 8, 1)), (9, 33, 200, -1, Narrow(2, 2, 2, 3)),
        (16, 80, 1000, 8, Narrow(2, 1, 4, 2)), (20, 50, 264, 130, Narrow(1, 1, 4, 2)),
        (40, 24, 400, 12, Narrow(8, 1, 4, 1)), (2, 17, 128, 128, Narrow(1, 1, 2, 2)),
    ],
)  # fmt: skip
@halves
def test_narrow(tokens: int, rows: int, columns: int, outliers: int, way: Narrow, dtype: torch.dtype) -> None:
    made = EightBit.of(layer(rows, columns, outliers, dtype, torch.float32 if tokens == 3 else None))
    x = torch_quantise(inputs(tokens, columns, dtype), made)
    out = torch.full((tokens, rows), NAN, dtype=dtype)
    eight.narrow(x, made, out, way)
    as_defined(out, x, made, dtype)


WAYS = [
    (20, 200, 1024, -1, Wide(16, 3)), (70, 300, 512, 70, Wide(32, 4)), (40, 200, 1160, 9, Wide(32, 3, 4)),
    (33, 130, 1160, 200, Wide(16, 3, 8)), (100, 130, 304, 3, Wide(64, 3)), (40, 132, 256, 256, Wide(32, 3, 2)),
    (260, 160, 304, 9, Wide(256, 3, 1)),
]  # fmt: skip


@emulation
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("tokens", "rows", "columns", "outliers", "way"), WAYS)
def test_wide(tokens: int, rows: int, columns: int, outliers: int, way: Wide) -> None:
    dtype = HALVES[way.stages % 2]
    made = EightBit.of(layer(rows, columns, outliers, dtype))
    x = torch_quantise(inputs(tokens, columns, dtype), made)
    out = torch.full((tokens, rows), NAN, dtype=dtype)
    eight.wide(x, made, out, way)
    as_defined(out, x, made, dtype)


# --- on a GPU --------------------------------------------------------------------------------------------------------


def moved(made: EightBit) -> EightBit:
    values = [t.cuda() if isinstance(t, Tensor) else t for t in vars(made).values()]
    return EightBit(*values)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize(
    ("tokens", "columns", "outliers"), [(1, 28672, 8), (3, 4096, -1), (300, 1160, 70), (200, 11008, 5)]
)
@halves
def test_quantise_on_a_gpu(tokens: int, columns: int, outliers: int, dtype: torch.dtype) -> None:
    made = EightBit.of(layer(1, columns, outliers, dtype))
    x = inputs(tokens, columns, dtype)
    same_inputs(eight.quantise(x.cuda(), moved(made)), torch_quantise(x, made))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("outliers", [-1, 8, 200])
@halves
def test_narrow_on_a_gpu(outliers: int, dtype: torch.dtype) -> None:
    made = moved(EightBit.of(layer(1000, 1160, outliers, dtype)))
    for tokens, way in [
        (1, Narrow(1, 1, 8, 2)), (2, Narrow(1, 1, 16, 4)), (8, Narrow(1, 2, 4, 3)), (16, Narrow(2, 1, 8, 2)),
        (13, Narrow(2, 2, 4, 2)), (64, Narrow(8, 1, 8, 1)), (30, Narrow(4, 2, 8, 1)),
    ]:  # fmt: skip
        x = eight.quantise(inputs(tokens, 1160, dtype).cuda(), made)
        out = torch.full((tokens, 1000), NAN, dtype=dtype, device="cuda")
        eight.narrow(x, made, out, way)
        as_defined(out, x, made, dtype)


HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper here"
)


@pytest.mark.gpu
@HOPPER
@pytest.mark.parametrize("outliers", [-1, 8, 200])
@halves
def test_wide_on_a_gpu(outliers: int, dtype: torch.dtype) -> None:
    for rows in (1000, 1001):
        made = moved(EightBit.of(layer(rows, 1160, outliers, dtype)))
        for tokens in (17, 100, 300):
            x = eight.quantise(inputs(tokens, 1160, dtype).cuda(), made)
            for way in [
                Wide(16, 4, 8), Wide(32, 4, 2, 2), Wide(64, 4, 4, 2), Wide(64, 8, 1), Wide(128, 6),
                Wide(128, 3, 2), Wide(256, 4), Wide(256, 4, 1), Wide(256, 3, 4),
            ]:  # fmt: skip
                out = torch.full((tokens, rows), NAN, dtype=dtype, device="cuda")
                eight.wide(x, made, out, way)
                as_defined(out, x, made, dtype)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("outliers", [-1, 8])
@halves
def test_the_operator_on_a_gpu(outliers: int, dtype: torch.dtype) -> None:
    """Odd shapes, views, and a CUDA graph that is replayed on other inputs."""
    for rows, columns in ((1000, 1160), (1001, 1003), (64, 128)):
        made = moved(EightBit.of(layer(rows, columns, outliers, dtype)))
        for tokens in (0, 1, 9, 17, 64, 100, 300):
            x = inputs(2 * tokens, columns, dtype).cuda()[::2]
            out = made.linear(x)
            padded = F.pad(x, (0, -columns % 8)).contiguous()
            if tokens:
                as_defined(out, eight.quantise(padded, made), made, dtype)
    for tokens in (1, 16, 200):
        x = inputs(tokens, columns, dtype).cuda()
        made.linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = made.linear(x)
            again = made.linear(x * 2)
        x.copy_(inputs(tokens + 1, columns, dtype)[:-1])
        out.fill_(NAN)
        again.fill_(NAN)
        graph.replay()
        as_defined(out, eight.quantise(x, made), made, dtype)
        as_defined(again, eight.quantise(x * 2, made), made, dtype)
    x = inputs(4, columns, torch.float32).cuda()  # no kernel takes it
    expected = EightBit(*(t.cpu() if isinstance(t, Tensor) else t for t in vars(made).values())).linear(x.cpu())
    assert torch.allclose(made.linear(x).cpu(), expected, rtol=1e-2, atol=1e-2)
