"""2:4-pruned layers: nothing is lost in their layouts, and products are those of the packed kind.

The kernels themselves run twice: on a GPU, and on a CPU through tests/kernels/emulate.py, which has mma.sp as PTX says.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compress.cuda import cusparselt as cusparselt_module
from compress.cuda import layout, ops, pruned, tuned
from compress.cuda.choice import Library, Narrow
from compress.cuda.cusparselt import PrunedValues
from compress.cuda.pruned import PRUNED, TWO_OF_FOUR, PrunedGrid
from compress.cuda.support import Support
from compress.cuda.tuned import Entry
from compress.packed.dense import Dense
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.solvers.masks import Pattern
from compress.types import moved

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
HALVES = (torch.float16, torch.bfloat16)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)
#: bits, columns a group, zero points
GRIDS = [
    (4, 128, False), (4, 64, True), (4, 32, False), (4, -1, False), (3, 128, True), (2, 256, False), (8, 64, False),
    (8, 1024, True),
]  # fmt: skip
grids = pytest.mark.parametrize(("bits", "size", "zeros"), GRIDS)


def mask_of(rows: int, columns: int) -> Tensor:
    return (torch.rand(rows, columns // 4, 4).argsort(-1) < 2).reshape(rows, columns)


def grid(
    rows: int, columns: int, bits: int, size: int, zeros: bool, dtype: torch.dtype, stored: torch.dtype | None = None
) -> Sparse:
    """`stored`: of the scales."""
    torch.manual_seed(rows + columns + bits)
    groups = 1 if size == -1 else -(-columns // size)
    scales = (torch.rand(rows, groups) / 64 + 1 / 128).to(stored or dtype)
    zero = torch.randint(0, 2**bits, (rows, groups), dtype=torch.uint8) if zeros else None
    codes, mask = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8), mask_of(rows, columns)
    made = UniformGrid(codes, scales, zero, bits, size)
    level = torch.full_like(codes, 2 ** (bits - 1)) if zero is None else zero[:, made.column_groups()]
    return Sparse(mask, UniformGrid(torch.where(mask, codes, level), scales, zero, bits, size), TWO_OF_FOUR)


def values(rows: int, columns: int, dtype: torch.dtype) -> Sparse:
    torch.manual_seed(rows + columns)
    mask = mask_of(rows, columns)
    return Sparse(mask, Dense(torch.where(mask, torch.randn(rows, columns), 0.0).to(dtype)), TWO_OF_FOUR)


def equal(a: object, b: Sparse) -> None:
    assert isinstance(a, Sparse)
    assert a.storage == b.storage
    left, right = a.tensors(), b.tensors()
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def close(got: Tensor, x: Tensor, dense: Tensor) -> None:
    expected = x.float() @ dense.float().t()
    limit = 1e-3 if x.dtype == torch.float16 else 8e-3
    assert (got.float() - expected).norm() <= limit * expected.norm()


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(16, 256), (37, 204), (1030, 300), (1, 4)])
def test_codes_and_places_come_back(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(0)
    codes, mask = torch.randint(0, 2**bits, shape, dtype=torch.uint8), mask_of(*shape)
    packed = pruned.pack(codes, mask, bits)
    bands, chunks = -(-shape[0] // 64), -(-shape[1] // 256)
    assert packed.shape == (bands, chunks, layout.BAND, 64 * bits + 128)
    kept, again = pruned.unpack(packed, bits, *shape)
    assert torch.equal(kept, codes[mask].reshape(shape[0], -1))
    assert torch.equal(again, mask)


def test_places_lie_where_the_kernel_looks() -> None:
    """As the comments of sparsity.cuh and tile.cuh have it; filled up with two positions that are not the same."""
    torch.manual_seed(0)
    mask = mask_of(70, 260)
    packed = pruned.pack(torch.zeros(70, 260, dtype=torch.uint8), mask, 4)
    for tile, chunk, row, step, four in [
        (0, 0, 3, 0, 0),
        (0, 0, 12, 3, 5),
        (4, 0, 1, 7, 7),
        (4, 1, 5, 0, 0),
        (3, 1, 9, 4, 2),
    ]:
        lane = 4 * (row % 8) + 2 * (step % 2) + four // 4
        word = int(packed[tile // 4, chunk, tile % 4, 256 + 4 * lane + step // 2])
        got = word >> (16 * (row // 8) + 4 * (four % 4)) & 15
        column = 256 * chunk + 32 * step + 4 * four
        inside = 16 * tile + row < 70 and column < 260
        first, second = mask[16 * tile + row, column : column + 4].nonzero().flatten().tolist() if inside else (0, 1)
        assert got == first | second << 2


@grids
@halves
def test_a_grid_comes_back_and_its_product_is_the_same(bits: int, size: int, zeros: bool, dtype: torch.dtype) -> None:
    packed = grid(50, 1300, bits, size, zeros, dtype)
    assert PrunedGrid.why_not(packed.storage, packed.shape) is None
    made = PrunedGrid.of(packed)
    equal(made.restore(), packed)
    assert set(made.tensors()) == {"codes", "scales"} | ({"zeros"} if zeros else set())
    x = torch.randn(3, 2, 1300).to(dtype)
    dense = torch.ops.compress.sparse_dequantize(*made.arguments, 1300, torch.float32)
    assert torch.equal(dense.to(dtype), packed.dequantize())
    expected = x.float() @ packed.dequantize().float().t()
    torch.testing.assert_close(made.linear(x).float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(1, 4), (17, 8), (33, 260), (16, 256), (5, 1004)])
def test_odd_shapes(shape: tuple[int, int]) -> None:
    packed = grid(*shape, 4, 128, True, torch.float32)
    made = PrunedGrid.of(packed)
    equal(made.restore(), packed)
    x = torch.randn(2, shape[1])
    torch.testing.assert_close(made.linear(x), x @ packed.dequantize().t())


def test_operators_are_sound() -> None:
    made = PrunedGrid.of(grid(20, 264, 4, 64, True, torch.float16))
    x = torch.randn(2, 3, 264).half()
    torch.library.opcheck(torch.ops.compress.sparse_linear.default, (x, *made.arguments))
    torch.library.opcheck(torch.ops.compress.sparse_dequantize.default, (*made.arguments, 264, torch.float16))
    torch.library.opcheck(torch.ops.compress.pruned_linear.default, (x, torch.randn(20, 264).half(), False, 20))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"group_size": 48}, "groups of 48"),
        ({"group_size": 33}, "groups of 33"),
        ({"group_size": 384}, "groups of 384"),
        ({"bits": 5}, "5 bits"),
        ({"ordered_groups": True}, "activation order"),
        ({"activations": "token"}, "weight-only"),
        ({"kind": "affine"}, "uniform grid"),
    ],
)
def test_what_the_kernel_does_not_take(change: dict[str, Any], why: str) -> None:
    from dataclasses import replace

    storage = grid(16, 256, 4, 64, False, torch.float16).storage
    assert storage.inner is not None
    assert PrunedGrid.why_not(storage, (16, 256)) is None
    assert why in str(PrunedGrid.why_not(replace(storage, inner=replace(storage.inner, **change)), (16, 256)))
    other = replace(storage, details=Pattern(4, 8).details)
    assert PrunedGrid.why_not(other, (16, 256)) is not None
    assert PrunedValues.why_not(other, (16, 256)) is not None
    assert PrunedGrid.why_not(storage.inner, (16, 256)) is not None


def test_launches_fit_into_shared_memory() -> None:
    for shared in (99 << 10, 163 << 10, 227 << 10):
        for tokens in range(1, pruned.MOST_TOKENS + 1):
            for rows, columns in ((16, 256), (4096, 4096), (28672, 8192), (8192, 28672)):
                way = pruned.rule(tokens, rows, columns, 132, shared)
                assert pruned.shared_bytes(way, tokens) <= shared


@pytest.mark.parametrize(
    ("rows", "columns", "ways"),
    [
        (4096, 4096, [Narrow(1, 1, 8, 1), Narrow(1, 1, 4, 3, 2), Narrow(2, 2, 4, 2, 2)]),
        (11008, 4096, [Narrow(1, 2, 8, 1), Narrow(1, 2, 2, 2, 4), Narrow(2, 2, 2, 2, 4)]),
        (8192, 8192, [Narrow(1, 2, 8, 2), Narrow(1, 1, 4, 3, 4), Narrow(2, 2, 4, 2, 2)]),
        (28672, 8192, [Narrow(1, 2, 8, 2), Narrow(1, 2, 2, 2, 4), Narrow(2, 2, 2, 2, 4)]),
        (1024, 4096, [Narrow(1, 1, 8, 1), Narrow(1, 1, 8, 2), Narrow(2, 1, 4, 2)]),  # too few rows to share
    ],
)
def test_the_rule_on_an_h100(rows: int, columns: int, ways: list[Narrow]) -> None:
    """Where it was measured, the fastest way for 1, 8 and 16 tokens or one that took hardly longer."""
    assert [pruned.rule(tokens, rows, columns, 132, 227 << 10) for tokens in (1, 8, 16)] == ways


def chosen(
    monkeypatch: pytest.MonkeyPatch, entry: Entry, tokens: int = 8, capability: tuple[int, int] = (9, 0)
) -> Narrow | Library:
    """For a layer of 4096 x 4096 in 4 bits, with that in the table."""
    card = SimpleNamespace(name="a card", multi_processor_count=132)
    known = Support(True, "", capability=capability, shared=99 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(pruned, "probe", lambda device: known)
    monkeypatch.setattr(tuned, "load", lambda name: (entry,) if name == "a card" else ())
    return pruned.choose.__wrapped__(4, tokens, 4096, 4096, 0)


RULE = pruned.rule(8, 4096, 4096, 132, 99 << 10)


@pytest.mark.parametrize(
    ("way", "capability", "expected"),
    [
        (("narrow", 1, 2, 2, 3, 4, 1), (8, 0), Narrow(1, 2, 2, 3, 4)),
        (("narrow", 1, 2, 2, 3, 4, 2), (9, 0), Narrow(1, 2, 2, 3, 4, 2)),
        (("narrow", 1, 2, 2, 3, 4, 2), (10, 0), RULE),  # clusters are Hopper's
        (("narrow", 1, 2, 16, 4, 1, 1), (9, 0), RULE),  # more shared memory than there is
        (("single", 2, 8, 3), (9, 0), RULE),
        (("library",), (9, 0), RULE),
        (("narrow", 1, 2), (9, 0), RULE),
    ],
)
def test_what_was_measured_goes_before_the_rule(
    way: tuned.Way, capability: tuple[int, int], expected: Narrow, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(monkeypatch, Entry(PRUNED, 4, 8, 4096, 4096, way, 5.0), capability=capability) == expected


def test_other_entries_are_not_for_a_pruned_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PRUNED not in (ops.GRID, ops.TABLE, ops.BOOK, ops.BILEVEL)
    way = ("narrow", 1, 2, 2, 3, 4, 1)
    assert chosen(monkeypatch, Entry(ops.GRID, 4, 8, 4096, 4096, way, 5.0)) == RULE
    assert chosen(monkeypatch, Entry(PRUNED, 3, 8, 4096, 4096, way, 5.0)) == RULE
    many = Entry(PRUNED, 4, 256, 4096, 4096, way, 5.0)
    assert isinstance(chosen(monkeypatch, many, pruned.MOST_TOKENS), Narrow)
    assert chosen(monkeypatch, many, pruned.MOST_TOKENS + 1) == Library()


# --- plain values ----------------------------------------------------------------------------------------------------


def fake_compress(dense: Tensor) -> Tensor:
    """As cuSPARSELt does it: the first two numbers of four that are not 0, or zeros in their place; then 1/16 more."""
    fours = dense.unflatten(-1, (-1, 4))
    order = (fours == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :2].sort(-1).values
    kept = fours.gather(-1, order).flatten(1)
    return torch.cat([kept.flatten(), order.flatten().to(dense.dtype)[: dense.numel() // 16]])


@pytest.fixture
def cusparselt(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """torch's functions on a CPU. `dense`: the weight; `searched`: what was searched for; `run`: algorithms used."""
    seen: dict[str, Any] = {"searched": [], "run": [], "dense": None, "capturing": False}

    def compress(dense: Tensor) -> Tensor:
        seen["dense"] = dense
        return fake_compress(dense)

    def search(weight: Tensor, x: Tensor) -> int:
        seen["searched"].append(tuple(x.shape))
        return 7

    def product(weight: Tensor, x: Tensor, alg_id: int) -> Tensor:
        assert not x.is_contiguous()
        assert x.shape[1] % 8 == 0
        seen["run"].append(alg_id)
        return seen["dense"] @ x

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm_search", search)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: seen["capturing"])
    monkeypatch.setattr(cusparselt_module, "compressible", lambda values: True)
    monkeypatch.setattr(cusparselt_module, "algorithms", {})
    return seen


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_values_without_cusparselt(dtype: torch.dtype) -> None:
    packed = values(24, 64, dtype)
    assert PrunedValues.why_not(packed.storage, packed.shape) is None
    made = PrunedValues.of(packed)
    assert not made.compressed
    equal(made.restore(), packed)
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(made.linear(x.to(dtype)), F.linear(x.to(dtype), packed.dequantize()))
    torch.testing.assert_close(made.linear(x), F.linear(x, packed.dequantize().float()))


@pytest.mark.parametrize(
    ("column", "value", "listed"), [(1, 2.0, True), (1, 0.0, True), (1, -0.0, False), (2, 0.0, False)]
)
def test_kept_values_come_back_from_cusparselt(
    column: int, value: float, listed: bool, cusparselt: dict[str, Any]
) -> None:
    """Also where a kept weight is 0 and cuSPARSELt lists another zero, or lists it elsewhere."""
    packed = values(32, 64, torch.float16)
    dense = packed.inner.dequantize()
    packed.mask[0, :4] = torch.tensor([False, True, True, False])
    dense[0, :4] = torch.tensor([0.0, 3.0, 4.0, 0.0])
    dense[0, column] = value
    made = PrunedValues.of(packed)
    assert made.compressed
    assert (made.kept is None) == listed
    equal(made.restore(), packed)
    assert torch.equal(made.restore().inner.dequantize().view(torch.int16), dense.view(torch.int16))


def test_algorithms_are_searched_for_once(cusparselt: dict[str, Any]) -> None:
    packed = values(32, 64, torch.float32)
    made = PrunedValues.of(packed)
    run = cusparselt_module._pruned_linear_cuda
    cusparselt["capturing"] = True
    for tokens, expected in ((3, 0), (5, 0)):
        run(torch.randn(tokens, 64), made.weight, True, 32)
        assert cusparselt["run"][-1] == expected
    cusparselt["capturing"] = False
    for shape in ((5,), (3,), (2, 4), (9,), (16,), (3, 11)):
        x = torch.randn(*shape, 64)
        got = run(x, made.weight, True, 32)
        torch.testing.assert_close(got, F.linear(x, packed.dequantize()))
        assert cusparselt["run"][-1] == 7
    assert cusparselt["searched"] == [(64, 8), (64, 16), (64, 40)]
    assert run(torch.empty(0, 64), made.weight, True, 32).shape == (0, 32)


# --- narrow.cu on a CPU ----------------------------------------------------------------------------------------------


def emulated(build: Callable[..., Any], made: PrunedGrid, x: Tensor, way: Narrow) -> Tensor:
    """As `pruned.few` launches it."""
    tokens = len(x)
    kernel = made.kernel("narrow", x.dtype, *way.macros, ("KIND", 0), ("SPARSE", 1), hopper=way.split > 1)
    x = F.pad(x, (0, -x.shape[1] % 8)).contiguous()
    out = torch.full((tokens, made.rows), float("nan"), dtype=x.dtype)
    build(kernel.file, dict(kernel.defines)).launch(
        "narrow",
        way.grid(tokens, made.rows),
        32 * way.warps * way.beside,
        [
            *(made.codes, made.scales, made.zeros, *[None] * 5, x, out),
            *(tokens, made.rows, x.shape[1], made.codes.shape[1], made.shift),
        ],
        pruned.shared_bytes(way, tokens),
    )
    return out


CASES = [
    ((50, 1300), (4, 128, False), 1, Narrow(1, 1, 4, 2)),
    ((50, 1300), (4, 64, True), 8, Narrow(1, 2, 2, 3)),
    ((33, 520), (3, 32, True), 3, Narrow(1, 1, 2, 1)),
    ((100, 2052), (2, -1, False), 2, Narrow(1, 4, 2, 2)),
    ((50, 1300), (8, 1024, True), 16, Narrow(2, 2, 2, 1)),
    ((16, 256), (8, 64, False), 11, Narrow(2, 1, 2, 2)),
    ((50, 1300), (4, 64, True), 19, Narrow(4, 1, 2, 1)),
    ((90, 1300), (4, 128, True), 13, Narrow(2, 1, 2, 2, beside=2, split=2)),
    ((150, 1300), (4, 128, False), 16, Narrow(2, 2, 2, 2, beside=4)),
    ((70, 1300), (4, 64, True), 11, Narrow(1, 4, 2, 2)),
    ((1, 4), (4, -1, False), 1, Narrow(1, 2, 4, 2)),
]


@pytest.mark.xdist_group("shim")
@halves
@pytest.mark.parametrize(("shape", "of", "tokens", "way"), CASES)
def test_the_kernel_on_a_cpu(
    shape: tuple[int, int],
    of: tuple[int, int, bool],
    tokens: int,
    way: Narrow,
    dtype: torch.dtype,
    build: Callable[..., Any],
) -> None:
    packed = grid(*shape, *of, dtype)
    x = torch.randn(tokens, shape[1]).to(dtype)
    close(emulated(build, PrunedGrid.of(packed), x, way), x, packed.dequantize())


@pytest.mark.xdist_group("shim")
@pytest.mark.parametrize(("bits", "size", "zeros"), [(4, 128, False), (3, 64, True), (8, -1, True)])
def test_the_dense_weight_on_a_cpu(bits: int, size: int, zeros: bool, build: Callable[..., Any]) -> None:
    packed = grid(39, 1300, bits, size, zeros, torch.float16)
    made = PrunedGrid.of(packed)
    kernel = made.kernel("dequantize_sparse", torch.float16, ("WARPS", 4))
    for columns in (1300, 1304):
        out = torch.full((39, columns), float("nan"), dtype=torch.float16)
        chunks = made.codes.shape[1]
        arguments = [made.codes, made.scales, made.zeros, out, 39, columns, chunks, made.shift]
        build(kernel.file, dict(kernel.defines)).launch(
            "dequantize_sparse", (-(-chunks // 4), 3), 128, arguments, 4 * 16 * pruned._DENSE_PITCH
        )
        assert torch.equal(out[:, :1300], packed.dequantize())
        assert out.isfinite().all()  # what fills up is multiplied by 0


# --- on a GPU --------------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.gpu
@halves
@grids
@pytest.mark.parametrize("shape", [(50, 1300), (1001, 2048), (272, 260)])
def test_products_on_a_gpu(shape: tuple[int, int], bits: int, size: int, zeros: bool, dtype: torch.dtype) -> None:
    packed = moved(grid(*shape, bits, size, zeros, dtype), torch.device("cuda"))
    made, dense = PrunedGrid.of(packed), packed.dequantize()
    equal(made.restore(), packed)
    got = torch.ops.compress.sparse_dequantize(*made.arguments, shape[1], dtype)
    assert torch.equal(got, dense)
    for tokens in (0, 1, 3, 8, 16, 33, 64, 65, 200):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        out = made.linear(x)
        assert out.shape == (tokens, shape[0])
        close(out, x, dense)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@halves
def test_scales_of_another_dtype_on_a_gpu(dtype: torch.dtype, stored: torch.dtype) -> None:
    packed = moved(grid(48, 512, 4, 32, True, dtype, stored), torch.device("cuda"))
    made = PrunedGrid.of(packed)
    for tokens in (1, 16, 100):
        x = torch.randn(tokens, 512, device="cuda").to(dtype)
        got, expected = made.linear(x).float(), x.float() @ packed.dequantize().float().t()
        coarse = torch.bfloat16 in (dtype, stored)  # the kernel rounds no weight to the scales' type, its twin does
        assert (got - expected).norm() <= (8e-3 if coarse else 1e-3) * expected.norm()


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 8, 11, 16, 30, 64])
def test_every_launch_shape_on_a_gpu(tokens: int) -> None:
    packed = moved(grid(400, 1160, 4, 64, True, torch.float16), torch.device("cuda"))
    made, dense = PrunedGrid.of(packed), packed.dequantize()
    x = torch.randn(tokens, 1160, device="cuda").half()
    shapes = [Narrow(n, r, w, d) for n in (1, 2, 4) for r in (1, 2, 4) for w in (2, 4) for d in (1, 2)]
    shapes += [pruned.rule(n, rows, 4096, 132, 227 << 10) for n in (1, 8, 16) for rows in (4096, 8192, 28672)]
    for way in dict.fromkeys(shapes):
        out = torch.full((tokens, 400), float("nan"), device="cuda", dtype=torch.float16)
        pruned.few(x, made, out, way)
        close(out, x, dense)


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 40, 256])
def test_capture_and_repetition_on_a_gpu(tokens: int) -> None:
    packed = moved(grid(384, 1024, 4, 128, False, torch.float16), torch.device("cuda"))
    made, dense = PrunedGrid.of(packed), packed.dequantize()
    wide = torch.randn(tokens, 2 * 1024 + 1, device="cuda").half()
    for x in (wide[:, :1024], wide[:, 1::2], wide[:, 1:1025], torch.randn(1024, tokens, device="cuda").half().t()):
        close(made.linear(x), x, dense)
    x = torch.randn(tokens, 1024, device="cuda").half()
    first = made.linear(x)
    assert all(torch.equal(made.linear(x), first) for _ in range(50))
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = made.linear(x)
    x.copy_(torch.randn_like(x))
    out.fill_(float("nan"))
    captured.replay()
    close(out, x, dense)


@GPU
@pytest.mark.gpu
def test_under_torch_compile_on_a_gpu() -> None:
    made = PrunedGrid.of(moved(grid(256, 512, 4, 128, False, torch.bfloat16), torch.device("cuda")))
    run = torch.compile(lambda x: torch.relu(made.linear(x)) + 1, fullgraph=True)
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(run(x), torch.relu(made.linear(x)) + 1)


@GPU
@pytest.mark.gpu
@halves
@pytest.mark.parametrize("shape", [(256, 512), (4096, 1024), (40, 512), (72, 100)])
def test_plain_values_on_a_gpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = moved(values(*shape, dtype), torch.device("cuda"))
    made = PrunedValues.of(packed)
    fits = all(n % 16 == 0 for n in shape)
    assert made.compressed == (fits and torch.backends.cusparselt.is_available())
    equal(made.restore(), packed)
    for tokens in (0, 1, 3, 16, 100, 1000):
        x = torch.randn(tokens, shape[1], device="cuda").to(dtype)
        out = made.linear(x)
        assert out.shape == (tokens, shape[0])
        close(out, x, packed.dequantize())


@GPU
@pytest.mark.gpu
def test_plain_values_with_zeros_among_the_kept_on_a_gpu() -> None:
    packed = values(256, 512, torch.float16)
    packed.inner.dequantize()[:, ::3] = -0.0
    packed = moved(packed, torch.device("cuda"))
    equal(PrunedValues.of(packed).restore(), packed)


@GPU
@pytest.mark.gpu
@pytest.mark.skipif(not torch.backends.cusparselt.is_available(), reason="torch has no cuSPARSELt")
@pytest.mark.parametrize("searched", [True, False])
def test_plain_values_in_a_graph_on_a_gpu(searched: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cusparselt_module, "algorithms", {})
    packed = moved(values(512, 1024, torch.bfloat16), torch.device("cuda"))
    made, x = PrunedValues.of(packed), torch.randn(24, 1024, device="cuda").bfloat16()
    if searched:
        made.linear(x)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        out = made.linear(x)
    assert bool(cusparselt_module.algorithms) == searched
    x.copy_(torch.randn_like(x))
    captured.replay()
    close(out, x, packed.dequantize())
