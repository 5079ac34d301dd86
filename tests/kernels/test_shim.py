"""The CPU emulation of the kernels' machine instructions is itself right, and sees what it is there to see."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
TYPES = {"Half": (torch.float16, 10, 15), "BFloat": (torch.bfloat16, 7, 127)}
typed = pytest.mark.parametrize("name", list(TYPES))
pytestmark = pytest.mark.xdist_group("shim")  # else each worker would build the same
NAN = float("nan")

ARITHMETIC = """
#include "device.cuh"
extern "C" __global__ void arithmetic(const u32* a, const u32* b, const u32* c, u32* fma, u32* product, int n) {
    const int i = blockIdx.x * 64 + threadIdx.x;
    if (i >= n) return;
    fma[i] = T::fma(a[i], b[i], c[i]);
    product[i] = mul2<T>(a[i], b[i]);
}
extern "C" __global__ void convert(const u32* pairs, float* low, float* high, const float* numbers, u32* packed) {
    const int i = blockIdx.x * 1024 + threadIdx.x;
    low[i] = T::low(pairs[i]), high[i] = T::high(pairs[i]);
    packed[i] = T::pack(numbers[2 * i], numbers[2 * i + 1]);
}
extern "C" __global__ void multiply(const u32* a, const u32* b, float* d) {
    const int lane = threadIdx.x;
    T::mma(d + 4 * lane, a + 4 * lane, b[2 * lane], b[2 * lane + 1]);
}
extern "C" __global__ void wholes(u32* out) { out[threadIdx.x] = whole<T::MANTISSA, T::BIAS>(threadIdx.x + 1); }
"""

MACHINE = """
#include "device.cuh"
extern "C" __global__ void matrices(const uint4* rows, u32* out, int sync) {
    extern __shared__ __align__(128) u8 shared[];
    const int lane = threadIdx.x;
    copy16(shared_address(shared) + lane * 48, rows + lane, true);
    copies_commit();
    copies_wait<0>();
    if (sync) __syncwarp();
    load_matrices(out + lane * 4, shared_address(shared) + (31 - lane) * 48);
}
extern "C" __global__ void copies(const u32* in, u32* out) {
    extern __shared__ __align__(128) u8 shared[];
    u32* const mine = (u32*)(shared + threadIdx.x * 32);
    out += threadIdx.x * 7;
    *out++ = mine[0];
    for (int i = 0; i < 2; i++) {
        copy16(shared_address(mine + 4 * i), in + threadIdx.x * 8 + 4 * i, threadIdx.x != 5);
        copies_commit();
    }
    out[0] = mine[0], out[1] = mine[7];
    copies_wait<1>();
    out[2] = mine[0], out[3] = mine[7];
    copies_wait<0>();
    out[4] = mine[0], out[5] = mine[7];
}
extern "C" __global__ void neighbour(const uint4* in, u32* out, int sync, int with) {
    __shared__ uint4 place[32];
    copy16(shared_address(place + threadIdx.x), in + threadIdx.x, true);
    copies_commit();
    copies_wait<0>();
    if (sync) __syncwarp();
    out[threadIdx.x] = place[threadIdx.x ^ with].x;
}
extern "C" __global__ void __launch_bounds__(32 * 8, 1) add_up(const float* in, float* out, int before, int after) {
    __shared__ float part[8];
    for (int round = 0; round < 2; round++) {
        float sum = in[(round * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x];
        for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
        if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
        if (before) __syncthreads();
        float all = 0;
        for (int i = 0; i < 8; i++) all += part[i];
        out[(round * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x] = all;
        if (after) __syncthreads();
    }
}
extern "C" __global__ void lanes(u32* out) {
    const u32 me = threadIdx.x;
    out[me] = __shfl_sync(~0u, me, 7);
    out[32 + me] = __shfl_sync(~0u, me, 1, 4);
    out[64 + me] = __shfl_xor_sync(~0u, me, 8);
    out[96 + me] = __shfl_down_sync(~0u, me, 3, 8);
    if (me < 10) out[128 + me] = __shfl_xor_sync(0x3ffu, (float)me, 1) + 100;
    else if (me < 16) __syncwarp(0xfc00u);
    __syncwarp();
}
extern "C" __global__ void built_in(float* f, u32* u, const float* in, u32* counter) {
    f[0] = min(__uint_as_float(~0u), 2.0f), f[1] = max(1.0f, in[0]), f[2] = fmaf(3.0f, 4.0f, 5.0f), f[3] = roundf(2.5f);
    f[4] = rintf(2.5f), f[5] = fabsf(-1.0f), f[6] = __uint_as_float(0x40490fdbu), f[7] = __ldg(in);
    u[0] = min(-1, 5) + 2, u[1] = max(3u, 7), u[2] = __float_as_uint(1.0f), u[3] = and_or(0xf0f0u, 0xff00u, 3);
    u[4] = stream16<16>(in).y, u[5] = stream8(in + 2).x, u[6] = atomicAdd(counter, 3), u[7] = gridDim.y * blockDim.x;
    if (threadIdx.x == 0) atomicAdd(f + 8, 1.0f);
}
"""

FAULTS = """
#include "device.cuh"
extern "C" __global__ void touch(u32* p, int at, int write) {
    if (write) p[at] = 7; else p[0] = p[at];
}
extern "C" __global__ void touch_shared(u32* p, int at, int write) {
    extern __shared__ __align__(128) u8 shared[];
    if (write) shared[at] = 7; else p[0] = shared[at];
}
extern "C" __global__ void wrong(u32* p, int what, int n) {
    u32 numbers[4] = {1, 2, 3, 4}, unset[4];
    const u32 lane = threadIdx.x;
    extern __shared__ __align__(128) u8 shared[];
    if (what == 0 && lane < 16) __syncthreads();
    if (what == 1 && lane < 16) p[0] = __shfl_xor_sync(~0u, lane, 1);
    if (what == 2 && lane < 16) p[0] = __shfl_xor_sync(0xffffu, lane, 16);
    if (what == 3) p[0] = (p + n)[0] + *(u32*)((u8*)p + n);
    if (what == 4) p[0] = numbers[n];
    if (what == 5) p[0] = 1u << n;
    if (what == 6) p[0] = 100 / (n - 32);
    if (what == 7) stream16((u8*)p + 8);
    if (what == 8) copy16(shared_address(shared) + 8, p, true);
    if (what == 9) copy16(shared_address(p), p, true);
    if (what == 10 && lane == 3) return;
    if (what == 10) Half::mma((float*)p + lane * 4, numbers, 0, 0);
    if (what == 11) p[lane] = unset[lane % 4];
    if (what == 12) p[0] = lane;
    if (what == 13) shim::await("a door", [&] { return p[0] == 123456; });
    __syncwarp();
}
struct Words {
    u64 words[4];
};
extern "C" __global__ void structure(const __grid_constant__ Words given, u64* out) {
    const Words* const p = &given;
    out[0] = ((const u64*)p->words[1])[1] + p->words[0], out[1] = p->words[3];
}
extern "C" __global__ void large(u32* p) {
    volatile u32 numbers[30000];
    p[0] = numbers[p[1]] = 1;
}
extern "C" __global__ void __cluster_dims__(1, 1, 2) meet(u32* out) {
    extern __shared__ __align__(128) u8 shared[];
    __shared__ u32 mine;
    if (threadIdx.x >= 32) {  // a warp that waits for what the other makes, then tells it
        shim::await("mine", [&] { return mine == 5 + blockIdx.z; });
        shim::arrive(1, 64);
    } else {
        if (threadIdx.x == 9) mine = 5 + blockIdx.z, *(u32*)shared = blockIdx.z;
        shim::wait(1, 64);
    }
    shim::cluster_wait();
    const u32 other = shim::block->rank ^ 1;
    out[blockIdx.z * 64 + threadIdx.x] = *(u32*)shim::peer(&mine, other) * 10 + *(u32*)shim::peer(shared, other);
    shim::cluster_wait();
}
"""

DECODE = '#include "codes.cuh"\n' + "\n".join(
    f"""
extern "C" __global__ void decode_{bits}_{name}(const u32* words, u32* values, u32* codes) {{
    Words<{bits}> held;
    for (int i = 0; i < {2 * bits}; i++) held.w[i] = words[threadIdx.x * {2 * bits} + i];
    for (int p = 0; p < 32; p++) {{
        values[threadIdx.x * 32 + p] = centred<{name}, {bits}>(held, p);
        codes[threadIdx.x * 32 + p] = held.codes(p);
    }}
}}"""
    for bits in (2, 3, 4, 8)
    for name in TYPES
)


@pytest.fixture(scope="module")
def made(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """made(text, macros): a source of this file, compiled."""
    folder = tmp_path_factory.mktemp("sources")

    def make(text: str, **macros: object) -> Any:
        path = folder / "test.cu"
        path.write_text(text)
        return build(path, macros)

    return make


def numbers(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Of 16-bit patterns."""
    return bits.to(torch.int16).view(dtype).double()


def rounded(value: Fraction, mantissa: int, bias: int) -> int:
    """The pattern of the nearest 16-bit float, ties to even."""
    size = abs(value)
    if not size:
        return 0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    exponent = max(exponent, 1 - bias)
    digits = round(size / Fraction(2) ** (exponent - mantissa))  # Python rounds ties to even
    pattern = ((exponent + bias - 1) << mantissa) + digits
    return min(pattern, (2 * bias + 1) << mantissa) | (0x8000 if value < 0 else 0)


def patterns(count: int, mantissa: int, bias: int) -> Tensor:
    """int32 [count, 3]: factors and addend of every size, many of which nearly cancel or tie."""
    g = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 1 << 16, (count, 3), generator=g, dtype=torch.int32)
    one = bias << mantissa
    near = torch.randint(-40, 41, (count, 3), generator=g, dtype=torch.int32) + one  # around 1: ties and cancellation
    chosen[: count // 2] = near[: count // 2]
    chosen[: count // 4, 2] |= 0x8000
    infinity = (2 * bias + 1) << mantissa
    edges = [0, 0x8000, 1, 0x8001, (1 << mantissa) - 1, 1 << mantissa, one, one + 1, one - 1, infinity - 1, infinity]
    at = torch.randint(0, len(edges), (count // 4, 3), generator=g)
    chosen[-count // 4 :] = torch.tensor(edges, dtype=torch.int32)[at]
    return chosen


@typed
def test_arithmetic_rounds_once(name: str, made: Callable[..., Any]) -> None:
    dtype, mantissa, bias = TYPES[name]
    abc = patterns(4000, mantissa, bias)
    if name == "BFloat":  # 17 * 19 = 323 is a tie, which an addend decides that double cannot hold beside it
        tie = torch.tensor([17.0, 19.0, -(2.0**-100)]).bfloat16().view(torch.int16).int() & 0xFFFF
        abc = torch.cat([abc, tie[None], (tie ^ torch.tensor([0, 0, 0x8000]))[None].int()])
    pairs = (abc | abc.flip(0) << 16).int()  # each number in both halves of a register
    a, b, c = (pairs[:, i].contiguous() for i in range(3))
    fma, product = torch.empty_like(a), torch.empty_like(a)
    made(ARITHMETIC, T=name).launch("arithmetic", -(-len(a) // 64), 64, [a, b, c, fma, product, len(a)])
    assert torch.equal(fma >> 16 & 0xFFFF, (fma & 0xFFFF).flip(0))
    exact = numbers(abc, dtype).tolist()
    for (x, y, z), got, times in zip(exact, (fma & 0xFFFF).tolist(), (product & 0xFFFF).tolist(), strict=True):
        if not all(abs(v) < float("inf") for v in (x, y, z)):
            want = float(torch.tensor(x) * torch.tensor(y) + torch.tensor(z))
            assert numbers(torch.tensor([got]), dtype).item() == want or (want != want and got == 0x7FFF)
            continue
        want, plain = Fraction(x) * Fraction(y) + Fraction(z), Fraction(x) * Fraction(y)
        assert got == rounded(want, mantissa, bias) or (not want and got & 0x7FFF == 0), (x, y, z)
        assert times & 0x7FFF == rounded(plain, mantissa, bias) & 0x7FFF, (x, y)
        assert (times >= 0x8000) == (torch.tensor(x).signbit() ^ torch.tensor(y).signbit()).item(), (x, y)


@typed
def test_conversions(name: str, made: Callable[..., Any]) -> None:
    dtype = TYPES[name][0]
    bits = torch.arange(1 << 16, dtype=torch.int32)
    every = numbers(bits, dtype).float()
    steps = every.view(torch.int32)[:, None] + torch.tensor([0, 1, -1, 1 << 12, 1 << 15, (1 << 12) - 1, (1 << 15) + 1])
    floats = steps.flatten().int().view(torch.float32)
    floats = torch.cat([floats, torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 1e-6])
    floats = floats[: len(floats) // 2048 * 2048]
    pairs = (bits | bits.flip(0) << 16).int().repeat(len(floats) // 2 // len(bits) + 1)[: len(floats) // 2]
    low, high, packed = torch.empty(len(pairs)), torch.empty(len(pairs)), torch.empty(len(floats), dtype=dtype)
    made(ARITHMETIC, T=name).launch("convert", len(pairs) // 1024, 1024, [pairs, low, high, floats, packed])
    torch.testing.assert_close(low[: 1 << 16], every, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(high[: 1 << 16], every.flip(0), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(packed, floats.to(dtype), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(packed.signbit() | packed.isnan(), floats.signbit() | floats.isnan())

    wholes = torch.empty(255, dtype=torch.int32)  # as far as bfloat16 counts
    made(ARITHMETIC, T=name).launch("wholes", 1, 255, [wholes])
    assert numbers(wholes, dtype).tolist() == list(range(1, 256))


@typed
@pytest.mark.parametrize("exact", [True, False])
def test_mma(name: str, exact: bool, made: Callable[..., Any]) -> None:
    dtype = TYPES[name][0]
    g = torch.Generator().manual_seed(0)
    a, b, d = (torch.randn(shape, generator=g) for shape in ((16, 16), (16, 8), (16, 8)))
    if exact:
        a, b, d = ((t * 8).round() for t in (a, b, d))
    a, b = a.to(dtype), b.to(dtype)
    lane = torch.arange(32)
    row, column = lane // 4, lane % 4 * 2
    of_a = torch.stack(
        [torch.stack([a[row + r % 2 * 8, column + r // 2 * 8 + e] for e in (0, 1)], -1) for r in range(4)], 1
    )
    of_b = torch.stack([torch.stack([b[column + r * 8 + e, row] for e in (0, 1)], -1) for r in range(2)], 1)
    of_d = torch.stack([d[row + r // 2 * 8, column + r % 2] for r in range(4)], 1)
    made(ARITHMETIC, T=name).launch("multiply", 1, 32, [of_a, of_b, of_d])
    got = torch.empty_like(d)
    for r in range(4):
        got[row + r // 2 * 8, column + r % 2] = of_d[:, r]
    want = d.double() + a.double() @ b.double()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0 if exact else 1e-5)


def test_load_matrices(made: Callable[..., Any], emulate: ModuleType) -> None:
    machine = made(MACHINE)
    rows = torch.arange(32 * 8, dtype=torch.int16).reshape(32, 8)
    out = torch.zeros(32, 4, 2, dtype=torch.int16)
    machine.launch("matrices", 1, 32, [rows, out, 1], 32 * 48)
    lane = torch.arange(32)
    given = rows.flip(0)  # lane l gives the address of row 31 - l
    for i in range(4):
        for e in range(2):
            assert torch.equal(out[:, i, e], given[i * 8 + lane // 4, lane % 4 * 2 + e])
    with pytest.raises(emulate.Fault, match="no __syncwarp since lane"):
        machine.launch("matrices", 1, 32, [rows, out, 0], 32 * 48)


def test_copies_come_when_waited_for(made: Callable[..., Any], emulate: ModuleType) -> None:
    machine = made(MACHINE)
    words = torch.arange(1, 257, dtype=torch.int32).reshape(32, 8)
    out = torch.zeros(32, 7, dtype=torch.int32)
    machine.launch("copies", 1, 32, [words, out], 1024)
    expected = words.clone()
    expected[5] = 0  # zeros come, and as late
    poison = torch.full((32,), -1, dtype=torch.int32)
    first, second = expected[:, 0], expected[:, 7]
    assert torch.equal(out, torch.stack([poison, poison, poison, first, poison, first, second], 1))

    got = torch.zeros(32, dtype=torch.int32)
    quads = words[:, :4].contiguous()
    machine.launch("neighbour", 1, 32, [quads, got, 1, 1])
    assert torch.equal(got, quads[torch.arange(32) ^ 1, 0])
    with pytest.raises(emulate.Fault, match=r"argument 1: .* depend on the order"):
        machine.launch("neighbour", 1, 32, [quads, got, 0, 1])
    machine.launch("neighbour", 1, 32, [quads, got, 0, 0])  # its own copy needs no one else
    assert torch.equal(got, quads[:, 0])


def test_a_missing_barrier_is_seen(made: Callable[..., Any], emulate: ModuleType) -> None:
    machine = made(MACHINE)
    x = torch.randint(-9, 9, (2, 3, 256), generator=torch.Generator().manual_seed(0)).float()
    out = torch.full_like(x, NAN)
    machine.launch("add_up", 3, 256, [x, out, 1, 1])
    assert torch.equal(out, x.sum(-1, keepdim=True).expand_as(x))
    for before, after in ((0, 1), (1, 0), (0, 0)):
        untouched = torch.full_like(x, 3.0)
        with pytest.raises(emulate.Fault, match=r"test.cu, add_up: argument 1: \d+ bytes, .* a barrier is missing"):
            machine.launch("add_up", 3, 256, [x, untouched, before, after])
        assert (untouched == 3.0).all()
        machine.launch("add_up", 3, 256, [x, untouched, before, after], orders=["rising"])  # right by luck, or not
    with pytest.raises(emulate.Fault, match="512 threads: __launch_bounds__ says 256"):
        machine.launch("add_up", 1, 512, [x, out, 1, 1])


def test_lanes(made: Callable[..., Any]) -> None:
    out = torch.zeros(138, dtype=torch.int32)
    made(MACHINE).launch("lanes", 1, 32, [out])
    lane = torch.arange(32)
    expected = [torch.full((32,), 7), lane // 4 * 4 + 1, lane ^ 8, torch.where(lane % 8 < 5, lane + 3, lane)]
    assert out[:128].tolist() == torch.cat(expected).tolist()
    assert out[128:].tolist() == [(i ^ 1) + 100 for i in range(10)]


def test_built_in(made: Callable[..., Any]) -> None:
    f, u = torch.zeros(9), torch.zeros(8, dtype=torch.int32)
    x, counter = torch.arange(8).float() + 0.5, torch.tensor([39], dtype=torch.int32)
    made(MACHINE).launch("built_in", (1, 2), (1, 1, 1), [f, u, x, counter], orders=["rising"])
    assert f.tolist() == [2, 1, 17, 3, 2, 1, torch.tensor(torch.pi).item(), 0.5, 2]
    bits = x.view(torch.int32).tolist()
    assert u.tolist() == [1, 7, 0x3F800000, 0xF003, bits[5], bits[2], 42, 2]
    assert counter.item() == 45


@pytest.mark.parametrize(
    ("at", "write", "message"),
    [
        (1024, 0, "argument 0: access 0 bytes past its end; block .0, 0, 0., thread .0, 0, 0."),
        (1024, 1, "argument 0: access 0 bytes past its end"),
        (200_000, 0, "argument 0: access 795904 bytes past its end"),
        (-1, 1, "argument 0: access 4 bytes before it"),
    ],
)
def test_out_of_bounds(at: int, write: int, message: str, made: Callable[..., Any], emulate: ModuleType) -> None:
    faults = made(FAULTS)
    p = torch.arange(1024, dtype=torch.int32)
    with pytest.raises(emulate.Fault, match=message):
        faults.launch("touch", 1, 1, [p, at, write])
    assert torch.equal(p, torch.arange(1024, dtype=torch.int32))
    faults.launch("touch", 1, 1, [p, 1023, 0])  # nothing is left behind
    assert p[0] == 1023


def test_beside_the_end(made: Callable[..., Any], emulate: ModuleType) -> None:
    """The end of a tensor is at a page's only to 16 bytes: what is between them is watched."""
    faults = made(FAULTS)
    p = torch.arange(3, dtype=torch.int32)
    faults.launch("touch", 1, 1, [p, 3, 0])
    assert p[0] == -1
    with pytest.raises(emulate.Fault, match="argument 0: something was written 0 bytes past its end"):
        faults.launch("touch", 1, 1, [p, 3, 1])
    with pytest.raises(emulate.Fault, match="argument 0: something was written 4 bytes before it"):
        faults.launch("touch", 1, 1, [p, -1, 1])
    with pytest.raises(emulate.Fault, match=r"access to address .nil., which belongs to no argument"):
        faults.launch("touch", 1, 1, [None, 0, 1])
    with pytest.raises(emulate.Fault, match="a thread uses more than 65536 bytes of stack"):
        faults.launch("large", 1, 1, [p])


def test_shared_memory(made: Callable[..., Any], emulate: ModuleType) -> None:
    faults = made(FAULTS)
    p = torch.zeros(1, dtype=torch.int32)
    faults.launch("touch_shared", 1, 1, [p, 99, 0], 100)
    assert p.item() == 255
    with pytest.raises(emulate.Fault, match="written 1 bytes past the 100 bytes of dynamic shared memory"):
        faults.launch("touch_shared", 1, 1, [p, 101, 1], 100)
    with pytest.raises(emulate.Fault, match="access 3996 bytes past the 100 bytes of dynamic shared memory"):
        faults.launch("touch_shared", 1, 1, [p, 4096, 0], 100)
    with pytest.raises(emulate.Fault, match="240000 bytes of dynamic shared memory: 232448 can be had"):
        faults.launch("touch_shared", 1, 1, [p, 0, 0], 240000)


@pytest.mark.parametrize(
    ("what", "n", "message"),
    [
        (0, 0, "deadlock: of 32 threads 16 wait at a barrier, 16 for lanes of their warp.*one waits at: __syncwarp"),
        (1, 0, "lanes 0 and 16 of a warp stand at different instructions: __shfl_xor_sync and __syncwarp"),
        (2, 0, "__shfl_xor_sync: lane 0 asks lane 16, which takes no part"),
        (3, 2, r"test.cu:\d+: access to address 0x\w+, which is not aligned"),
        (4, 4, r"test.cu:\d+: index 4 is out of bounds"),
        (5, 32, r"test.cu:\d+: shift by 32 bits"),
        (6, 32, "a whole number is divided by zero"),
        (7, 0, "stream16: address 0x[0-9a-f]+ is not aligned to 16 bytes"),
        (8, 0, r"copy16: shared address \d+ is not aligned to 16 bytes"),
        (9, 0, "is not in shared memory"),
        (10, 0, "lane 3 left before an instruction that takes its whole warp"),
        (12, 0, "argument 0: .* depend on the order in which threads run"),
        (13, 0, "deadlock: of 32 threads .* 32 for a condition.*one waits at: a door"),
    ],
)
def test_faults(what: int, n: int, message: str, made: Callable[..., Any], emulate: ModuleType) -> None:
    p = torch.zeros(128, dtype=torch.int32)
    with pytest.raises(emulate.Fault, match=message):
        made(FAULTS).launch("wrong", 1, 32, [p, what, n], 128)


def test_what_nobody_set_is_not_zero(made: Callable[..., Any]) -> None:
    p = torch.zeros(32, dtype=torch.int32)
    made(FAULTS).launch("wrong", 1, 32, [p, 11, 0], 128)
    assert (p == 0xFEFEFEFE - (1 << 32)).all()


def test_clusters_conditions_and_counted_barriers(made: Callable[..., Any], emulate: ModuleType) -> None:
    faults = made(FAULTS)
    out = torch.zeros(2, 2, 64, dtype=torch.int32)
    with pytest.raises(emulate.Fault, match="1 x 1 x 3 blocks in clusters of 1 x 1 x 2"):
        faults.launch("meet", (1, 1, 3), 64, [out], 64)
    faults.launch("meet", (1, 1, 4), 64, [out.view(-1)], 64)
    expected = [(5 + other) * 10 + other for other in (1, 0, 3, 2)]
    assert out.view(4, 64).tolist() == [[e] * 64 for e in expected]


def test_arguments(made: Callable[..., Any], emulate: ModuleType) -> None:
    faults = made(FAULTS)
    p = torch.zeros(8, dtype=torch.int32)
    assert faults.kernels == ("touch", "touch_shared", "wrong", "structure", "large", "meet")
    for name, args, message in (
        ("other", [p], "test.cu has no kernel other: touch, "),
        ("touch", [p, 1], "touch takes 3 arguments, not 2"),
        ("touch", [p, p, 1], "argument 1 of touch: a number is wanted .i, 4 bytes."),
        ("touch", [p, 1.5, 1], "argument 1 of touch: a number is wanted .i, 4 bytes., not 1.5"),
        ("touch", [p.view(2, 4).t(), 1, 1], "argument 0 of touch: a contiguous CPU tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            faults.launch(name, 1, 1, args)
    with pytest.raises(OverflowError):
        faults.launch("touch", 1, 1, [p, 2**31, 1])
    out = torch.tensor([30, 40])
    faults.launch("structure", 1, 1, [(5, out), out])  # the same tensor twice
    assert out.tolist() == [45, 0]
    with pytest.raises(ValueError, match="a tuple of 4 words is wanted"):
        faults.launch("structure", 1, 1, [(1, 2, 3, 4, 5), out])
    again = made(FAULTS)
    assert again.library is faults.library, "built once"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@typed
def test_codes_are_decoded(name: str, bits: int, made: Callable[..., Any]) -> None:
    dtype = TYPES[name][0]
    words = torch.randint(-(2**31), 2**31, (64, 2 * bits), generator=torch.Generator().manual_seed(bits))
    given, values = words.int(), torch.empty(64, 32, 2, dtype=dtype)
    codes = torch.empty(64, 32, 2, dtype=torch.int16)
    made(DECODE).launch(f"decode_{bits}_{name}", 2, 32, [given[:32].contiguous(), values[:32], codes[:32]])
    for lane, word in enumerate(words[:32].tolist()):
        for p in range(32):
            expected = [code_of(word, bits, p, half) for half in (0, 1)]
            assert codes[lane, p].tolist() == expected, (lane, p)
            assert values[lane, p].tolist() == [code - 2 ** (bits - 1) for code in expected], (lane, p)


def code_of(words: list[int], bits: int, pair: int, half: int) -> int:
    """As the comments of codes.cuh have it."""
    if bits == 3 and pair >= 30:
        return sum((words[(pair - 30) * 3 + i] >> (15 + 16 * half) & 1) << i for i in range(3))
    each = 5 if bits == 3 else 16 // bits
    return words[pair // each] >> (pair % each * bits + 16 * half) & (2**bits - 1)


def test_the_shim_has_all_names() -> None:
    """What kernels/device.cuh offers, with the same types: no kernel learns of a difference on a GPU only."""
    found = []
    for path in (ROOT / "kernels" / "device.cuh", Path(__file__).parent / "shim" / "device.cuh"):
        text = re.sub(r"//.*", "", path.read_text())
        functions = re.findall(r"DEVICE (\w+ \w+)\(([^)]*)\)", text)
        names = re.findall(r"(?:struct|typedef [\w ]+|constexpr u32) (\w+)", text)
        types = [re.sub(r"\w+(,|$)", r"\1", parameters).replace(" ", "") for _, parameters in functions]
        found.append({f"{function}({t})" for (function, _), t in zip(functions, types, strict=True)} | set(names))
    missing = found[0] - found[1]
    assert not missing
    assert {"u32 fma(u32,u32,u32)", "void mma(float*,constu32*,u32,u32)", "Half", "u64", "whole"} <= found[0]
