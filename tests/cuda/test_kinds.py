"""Layers in fragment order: nothing is lost on the way there and back, and the product is that of the packed kind."""

import re

import pytest
import torch
from torch import Tensor

from compress import fast, tables
from compress.cuda import choice, kinds, layout, ops, source
from compress.linear import PackedLinear
from compress.packed.affine import Affine
from compress.packed.bilevel import BiLevel, Statistic
from compress.packed.blockwise import fit
from compress.packed.codebook import Codebook
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.solvers.masks import Pattern
from compress.types import Packed, moved

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
HALVES = (torch.float16, torch.bfloat16)


def codes(rows: int, columns: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8)


def scales(rows: int, columns: int, size: int, dtype: torch.dtype) -> Tensor:
    return (torch.rand(rows, 1 if size == -1 else -(-columns // size)) / 64 + 1 / 128).to(dtype)


def grid(
    rows: int, columns: int, bits: int, size: int, dtype: torch.dtype, zeros: bool = False, g_idx: Tensor | None = None
) -> UniformGrid:
    s = scales(rows, columns, size, dtype)
    z = torch.randint(0, 2**bits, s.shape, dtype=torch.uint8) if zeros else None
    return UniformGrid(codes(rows, columns, bits), s, z, bits, size, g_idx)


def bilevel(rows: int, columns: int, bits: int, dtype: torch.dtype) -> BiLevel:
    groups, runs = -(-columns // 16), -(-rows // 16)

    def statistic(spread: float, middle: float) -> Statistic:
        grids = torch.rand(2, runs, groups) + 0.5
        return Statistic((grids[0] * spread).to(dtype), 16, 3, codes(rows, groups, 3), (grids[1] * middle).to(dtype))

    return BiLevel.of(codes(rows, columns, bits), statistic(0.01, -4), statistic(1.0, 1.0), bits, 16, dtype)


def spqr(rows: int, columns: int, bits: int, dtype: torch.dtype) -> Outliers:
    return Outliers.of(
        bilevel(rows, columns, bits, dtype), torch.rand(rows, columns) < 0.02, torch.randn(rows, columns).to(dtype)
    )


def ordered(rows: int, columns: int, dtype: torch.dtype) -> UniformGrid:
    index = (torch.randperm(columns) // 32).to(torch.int32)
    return grid(rows, columns, 4, 32, dtype, True, index)


def pruned(rows: int, columns: int, dtype: torch.dtype) -> Sparse:
    mask = torch.zeros(rows, columns // 8, 8, dtype=torch.bool)
    mask[..., :3] = True
    mask = mask.reshape(rows, columns)
    dense = grid(rows, columns, 4, 64, dtype)
    return Sparse(
        mask, UniformGrid(torch.where(mask, dense.codes, 8).to(torch.uint8), dense.scales, None, 4, 64), Pattern(3, 8)
    )


def affine(rows: int, columns: int, dtype: torch.dtype) -> Affine:
    s = scales(rows, columns, 32, dtype)
    return Affine(codes(rows, columns, 4), s, (-s * 7).to(dtype), 4, 32)


def book(rows: int, columns: int, bits: int, dtype: torch.dtype) -> Codebook:
    return Codebook(codes(rows, columns, bits), torch.randn(rows, 1, 2**bits).sort(-1).values.to(dtype), bits, -1)


def blocks(rows: int, columns: int, table: str, size: int, nested: bool, dtype: torch.dtype):
    return fit(torch.randn(rows, columns), table, size, nested, dtype)


def layers(dtype: torch.dtype) -> dict[str, Packed]:
    """One of everything, in shapes that fill no tile."""
    made: dict[str, Packed] = {}
    for bits in (2, 3, 4, 8):
        for size, zeros in ((128, False), (64, True), (32, False), (16, True), (256, True), (-1, False)):
            made[f"uniform{bits}-{size}"] = grid(50, 328, bits, size, dtype, zeros)
    made |= {
        "odd": grid(33, 301, 4, 64, dtype, True),
        "float scales": UniformGrid(codes(16, 128, 4), scales(16, 128, 32, torch.float32), None, 4, 32),
        "order": ordered(40, 256, dtype),
        "pruned": pruned(40, 256, dtype),
        "affine": affine(40, 200, dtype),
        "nf4": blocks(40, 192, "nf4", 64, False, dtype),
        "nf4 nested": blocks(40, 256, "nf4", 64, True, dtype),
        "fp4": blocks(17, 256, "fp4-bnb", 128, False, dtype),
        "spqr": spqr(50, 328, 3, dtype),
        "bilevel": bilevel(64, 256, 2, dtype),
    }
    return made | {f"book{bits}": book(37, 200, bits, dtype) for bits in (2, 3, 4)}


NAMES = list(layers(torch.float16))


def equal(a: Packed, b: Packed) -> None:
    assert type(a) is type(b)
    assert a.storage == b.storage
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def kernel(packed: Packed) -> fast.Kernel:
    kind = next(k for k in kinds.KERNELS if k.why_not(packed.storage, packed.shape) is None)
    made = kind.of(packed)
    assert made is not None
    return made


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(16, 128), (37, 200), (1030, 300), (1, 1)])
def test_codes_come_back(bits, shape):
    c = codes(*shape, bits)
    packed = layout.pack(c, bits)
    assert packed.shape == (-(-layout.tiles(shape[0]) // layout.BAND), layout.chunks(shape[1]), layout.BAND, 64 * bits)
    assert torch.equal(layout.unpack(packed, bits, *shape), c)


def test_bytewise_codes_come_back():
    c = codes(37, 200, 4)
    assert torch.equal(layout.unpack(layout.pack(c, 4, bytewise=True), 4, 37, 200, bytewise=True), c)


@pytest.mark.parametrize("size", [16, 32, 64, 128, 256, 1024, -1])
def test_statistics_come_back(size):
    values = torch.randn(37, 1 if size == -1 else -(-1300 // size))
    packed = layout.pack_statistics(values, 1300, size)
    assert torch.equal(layout.unpack_statistics(packed, *values.shape), values)
    assert layout.group_size(*layout.group_layout(size)) == size


@pytest.mark.parametrize("size", [0, 8, 40, 192, 384, -2])
def test_group_sizes_that_no_kernel_takes(size):
    with pytest.raises(ValueError, match="groups of"):
        layout.group_layout(size)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_lost_and_the_product_is_the_same(name, dtype):
    torch.manual_seed(0)
    packed = layers(dtype)[name]
    made = kernel(packed)
    equal(made.restore(), packed)
    x = torch.randn(3, packed.shape[1]).to(dtype)
    expected = x.float() @ packed.dequantize().float().t()
    got = made.linear(x).float()
    assert (got - expected).norm() <= (1e-3 if dtype == torch.float16 else 8e-3) * expected.norm()


@pytest.mark.parametrize("name", ["uniform4-128", "uniform3-64", "spqr", "nf4", "book3"])
def test_operators_are_sound(name):
    made = kernel(layers(torch.float16)[name])
    x = torch.randn(2, 3, made.columns).half()
    torch.library.opcheck(torch.ops.compress.linear.default, (x, *made.layer.arguments))
    torch.library.opcheck(torch.ops.compress.dequantize.default, (*made.layer.arguments, made.columns, torch.float16))


def test_irregular_activation_orders_are_refused():
    packed = grid(16, 128, 4, 32, torch.float16, g_idx=torch.zeros(128, dtype=torch.int32))
    assert kinds.Grid.of(packed) is None


@pytest.mark.parametrize(
    ("packed", "why"),
    [
        (grid(16, 128, 5, 32, torch.float16), "5 bits"),
        (grid(16, 120, 4, 40, torch.float16), "groups of 40"),
        (blocks(16, 96, "nf4", 64, False, torch.float16), "cross rows"),
    ],
    ids=["bits", "group", "blocks"],
)
def test_what_no_kernel_takes(packed, why):
    reasons = [k.why_not(packed.storage, packed.shape) for k in kinds.KERNELS]
    assert all(reasons)
    assert any(why in reason for reason in reasons)


def test_wide_shapes_fit_into_shared_memory():
    for kind, bits in ((0, 2), (0, 3), (0, 4), (0, 8), (1, 4), (2, 4), (3, 3)):
        for tokens in (1, 17, 33, 65, 200, 4096):
            for rows, columns in ((16, 128), (4096, 4096), (28672, 8192), (8192, 28672)):
                way = choice.wide(kind, bits, tokens, rows, columns, 132)
                assert way.shared(kind, bits) * way.blocks <= choice._SHARED
                assert way.stages >= 2


# --- on a GPU ------------------------------------------------------------------------------------------------------


def close(got: Tensor, x: Tensor, dense: Tensor) -> None:
    expected = x.float() @ dense.float().t()
    limit = 1e-3 if x.dtype == torch.float16 else 8e-3
    assert (got.float() - expected).norm() <= limit * expected.norm()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_kernels_compute_the_product(name, dtype):
    torch.manual_seed(0)
    packed = moved(layers(dtype)[name], torch.device("cuda"))
    made, dense = kernel(packed), packed.dequantize().to(dtype)
    equal(made.restore(), packed)
    for tokens in (0, 1, 2, 7, 16, 33, 70, 300):
        x = torch.randn(tokens, packed.shape[1], device="cuda").to(dtype)
        got = made.linear(x)
        assert got.shape == (tokens, packed.shape[0])
        close(got, x, dense)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_dequantised_weights(name):
    """To the last bit those of the packed kind, but for SpQR's statistics, which are summed in another order."""
    torch.manual_seed(0)
    packed = moved(layers(torch.float16)[name], torch.device("cuda"))
    made = kernel(packed)
    got = torch.ops.compress.dequantize(*made.layer.arguments, made.columns, torch.float16)
    expected = packed.dequantize().half()
    if getattr(made, "order", None) is not None:
        expected = expected[:, made.order]
    if isinstance(made, kinds.TwoLevel) or name == "float scales":
        assert (got.float() - expected.float()).abs().max() <= 2**-9 * expected.float().abs().max()
    else:
        assert torch.equal(got, expected)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 40, 256])
def test_capture_streams_strides_and_repetition(tokens):
    torch.manual_seed(0)
    packed = moved(grid(384, 1024, 4, 128, torch.float16), torch.device("cuda"))
    made, dense = kernel(packed), packed.dequantize()
    wide = torch.randn(tokens, 2 * 1024 + 1, device="cuda").half()
    for x in (wide[:, :1024], wide[:, 1::2], wide[:, 1:1025], torch.randn(1024, tokens, device="cuda").half().t()):
        close(made.linear(x), x, dense)
    x = torch.randn(tokens, 1024, device="cuda").half()
    first = made.linear(x)
    assert all(torch.equal(made.linear(x), first) for _ in range(100))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = made.linear(x)
    x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    captured.replay()
    close(out, x, dense)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        aside = made.linear(x)
    side.synchronize()
    assert torch.equal(aside, out)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["uniform4-128", "order", "pruned", "nf4 nested", "book3", "spqr"])
def test_packed_linear_takes_the_kernel_and_gives_everything_back(name):
    torch.manual_seed(0)
    packed = layers(torch.float16)[name]
    module = PackedLinear.of(packed, bias=torch.randn(packed.shape[0]).half()).cuda()
    stored = {n: t.cpu() for n, t in module.state_dict().items()}
    x = torch.randn(2, 5, packed.shape[1], device="cuda").half()
    got = module(x)
    assert module._kernel is not None
    assert "Grid" in repr(module) or "Table" in repr(module) or "Book" in repr(module) or "TwoLevel" in repr(module)
    close(got - module.bias, x, packed.dequantize().cuda())
    again = module.state_dict()
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[n].cpu(), t) for n, t in stored.items())
    equal(moved(module.packed(), torch.device("cpu")), packed)
    assert torch.equal(module.cpu().dense(torch.float16), packed.dequantize())
    assert module._kernel is None


@GPU
@pytest.mark.gpu
def test_under_torch_compile():
    made = kernel(moved(grid(256, 512, 4, 128, torch.bfloat16), torch.device("cuda")))
    run = torch.compile(lambda x: torch.relu(made.linear(x)) + 1, fullgraph=True)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(run(x), torch.relu(made.linear(x)) + 1)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 16, 30, 64, 100, 513])
def test_every_launch_shape(tokens):
    torch.manual_seed(0)
    packed = moved(grid(400, 1160, 4, 64, torch.float16, True), torch.device("cuda"))
    made, dense = kernel(packed), packed.dequantize()
    x = torch.randn(tokens, 1160, device="cuda").half()
    ways: list[choice.Narrow | choice.Wide] = [
        choice.Narrow(n, r, w, d)
        for n in (1, 2, 4)
        for r in (1, 2)
        for w in (2, 8)
        for d in (1, 3)
        if n == 1 or tokens > 8
    ]
    if torch.cuda.get_device_capability()[0] == 9:
        shapes = [(t, s, b) for t in (8, 16, 32, 64, 128, 256) for s in (1, 2, 8) for b in (1, 2) if b == 1 or t <= 64]
        ways += [choice.fit(0, 4, choice.Wide(t, 4, s, b)) for t, s, b in shapes]
    for way in ways:
        out = torch.full((tokens, 400), float("nan"), device="cuda", dtype=torch.float16)
        (ops.narrow if isinstance(way, choice.Narrow) else ops.broad)(x, made.layer, out, way)
        close(out, x, dense)


def test_kernels_have_the_numbers_of_the_tables():
    """kernels/tables.cuh, in the order of `tables.NAMES`, to the last bit."""
    text = source.text("tables.cuh")
    written = re.findall(r"NUMBERS == (\d+)  // (\S+)\n[^{]*\{([^}]*)\}", text)
    assert [(int(number), name) for number, name, _ in written] == list(enumerate(tables.NAMES))
    for _, name, values in written:
        found = torch.tensor([float.fromhex(v.strip(" \nf")) for v in values.split(",") if v.strip()])
        assert torch.equal(found.view(torch.int32), tables.table(name).view(torch.int32))
