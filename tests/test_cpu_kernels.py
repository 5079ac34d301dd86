"""torch's CPU kernels on packed layers: which layers take them, what they compute, the way back to stored tensors."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import cpu
from compress.linear import PackedLinear
from compress.packed.uniform import UniformGrid
from compress.types import Storage

needs_kernels = pytest.mark.skipif(not cpu.enabled(), reason="this CPU has no such kernels")


def grid(
    rows: int, columns: int, bits: int, group: int, symmetric: bool, dtype: torch.dtype, activations: str = ""
) -> UniformGrid:
    g = torch.Generator().manual_seed(rows + columns)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = ((torch.rand(rows, groups, generator=g) + 0.1) * torch.randn(rows, 1, generator=g).sign()).to(dtype)
    zeros = None if symmetric else torch.randint(0, 2**bits, (rows, groups), generator=g, dtype=torch.uint8)
    return UniformGrid(codes, scales, zeros, bits, group, None, activations)


def exact(packed: UniformGrid, x: Tensor) -> tuple[Tensor, Tensor]:
    """In float64: the product with the stored weight, and that of magnitudes, which bounds what rounding can do."""
    scales, zeros = packed.scales.double(), 2 ** (packed.bits - 1)
    zero = zeros if packed.zeros is None else packed.zeros[:, packed.column_groups()].double()
    offset = packed.codes.double() - zero
    weight = offset * scales[:, packed.column_groups()]
    return x.double() @ weight.t(), x.double().abs() @ weight.abs().t()


def same(a: UniformGrid, b: UniformGrid) -> bool:
    one, two = a.tensors(), b.tensors()
    return a.storage == b.storage and one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


INT4 = [
    (16, 32, 32), (32, 64, 32), (48, 128, 64), (64, 128, 128), (80, 256, 256), (96, 192, 64), (112, 256, -1),
    (144, 576, 64), (1040, 64, 32), (64, 512, 512), (64, 96, 96), (2064, 32, -1),
]  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", INT4)
def test_int4_against_its_twin(shape: tuple[int, int, int], symmetric: bool, dtype: torch.dtype) -> None:
    rows, columns, group = shape
    packed = grid(rows, columns, 4, group, symmetric, dtype)
    assert cpu.find(packed.storage, packed.shape) is cpu.Int4
    kernel = cpu.Int4.of(packed)
    back = kernel.restore()
    assert same(back, packed)
    assert back.scales.dtype == dtype
    for count in (1, 3, 40):
        x = torch.randn(count, columns, generator=torch.Generator().manual_seed(2)).bfloat16()
        out = kernel.linear(x)
        want, size = exact(packed, x)
        # 8 significant bits: rounding moves a number by at most 2^-8 of itself: the output, a scale, an offset
        rounded = 0.0 if dtype == torch.bfloat16 else 2.0**-8
        offsets = 0.0
        if not symmetric:  # |zero - 8| is at most 8 where |code - zero| may be nothing
            steps = 8 * packed.scales.double().abs()[:, packed.column_groups()]
            offsets = 2.0**-8 * x.double().abs() @ steps.t()
        bound = want.abs() * 2.0**-8 + size * (rounded + 1e-5) + offsets + 1e-6
        assert bool(((out.double() - want).abs() <= bound).all())
        twin = packed.linear(x)
        assert torch.allclose(out.float(), twin.float(), rtol=0.02, atol=0.02 * float(twin.abs().max()))


@needs_kernels
def test_int4_is_nearer_to_the_stored_weight_than_its_twin() -> None:
    """The twin rounds every weight to bfloat16, the kernel the output alone."""
    packed = grid(64, 256, 4, 64, True, torch.bfloat16)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    want, _ = exact(packed, x)
    far = [float((y.double() - want).norm()) for y in (cpu.Int4.of(packed).linear(x), packed.linear(x))]
    assert far[0] < far[1]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (3, 32), (17, 48), (33, 576), (64, 1600)])
def test_int8_against_its_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    packed = grid(*shape, 8, -1, True, dtype)
    assert cpu.find(packed.storage, packed.shape) is cpu.Int8
    kernel = cpu.Int8.of(packed)
    assert same(kernel.restore(), packed)
    for count in (1, 3, 40):
        x = torch.randn(count, shape[1], generator=torch.Generator().manual_seed(2)).bfloat16()
        want, size = exact(packed, x)
        bound = want.abs() * 2.0**-7 + size * 1e-5 + 1e-6
        assert bool(((kernel.linear(x).double() - want).abs() <= bound).all())


@needs_kernels
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mode", ["token", "tensor", "token_zeropoint", "tensor_zeropoint"])
def test_product8_is_its_twin(mode: str, symmetric: bool) -> None:
    packed = grid(24, 40, 8, -1, symmetric, torch.float16, mode)
    assert cpu.find(packed.storage, packed.shape) is cpu.Product8
    kernel = cpu.Product8.of(packed)
    assert same(kernel.restore(), packed)
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((40,), (3, 40), (2, 5, 40)):
            x = torch.randn(*shape, generator=torch.Generator().manual_seed(2)).to(dtype)
            assert torch.equal(kernel.linear(x), packed.linear(x))


@pytest.mark.parametrize(
    ("storage", "shape", "kernel"),
    [
        (Storage("uniform", 4, 64), (24, 128), cpu.Int4),  # 24 rows
        (Storage("uniform", 4, 48), (32, 96), cpu.Int4),  # groups of 48
        (Storage("uniform", 4, 16), (32, 96), cpu.Int4),
        (Storage("uniform", 4, 64), (32, 96), cpu.Int4),  # a short last group
        (Storage("uniform", 4, -1), (32, 40), cpu.Int4),
        (Storage("uniform", 4, 64, ordered_groups=True), (32, 128), cpu.Int4),
        (Storage("uniform", 3, 64), (32, 128), cpu.Int4),
        (Storage("blockwise", 4, 64), (32, 128), cpu.Int4),
        (Storage("uniform", 8, -1), (32, 40), cpu.Int8),  # it would read past the end
        (Storage("uniform", 8, -1, symmetric=False), (32, 64), cpu.Int8),
        (Storage("uniform", 8, 64), (32, 64), cpu.Int8),
        (Storage("uniform", 8, -1, activations="token"), (32, 64), cpu.Int8),
        (Storage("uniform", 8, -1), (32, 64), cpu.Product8),
    ],
)
def test_what_is_left_to_the_plain_product(storage: Storage, shape: tuple[int, int], kernel: Any) -> None:
    assert kernel.why_not(storage, shape)


@needs_kernels
def test_other_dtypes_take_the_plain_product() -> None:
    packed = grid(32, 64, 4, 32, False, torch.float16)
    layer = PackedLinear.of(packed, torch.float16)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    assert torch.equal(layer(x), packed.linear(x))
    assert layer._kernel is None
    stored = layer.weight_bytes
    assert not torch.equal(layer(x.bfloat16()), packed.linear(x.bfloat16()))
    assert isinstance(layer._kernel, cpu.Int4)
    names = {name for name, _ in layer.named_buffers()}
    assert all(name.startswith("kernel_") for name in names), "the stored tensors are gone"
    assert layer.weight_bytes < 1.5 * stored
    assert "Int4" in repr(layer)
    assert torch.equal(copy.deepcopy(layer)(x.bfloat16()), layer(x.bfloat16()))
    layer.to("cpu").to(torch.float32)
    assert isinstance(layer._kernel, cpu.Int4), "nothing moved"
    assert torch.equal(layer(x), packed.linear(x))
    assert layer._kernel is None
    assert layer.weight_bytes == stored


@needs_kernels
def test_rows_do_not_depend_on_the_batch() -> None:
    layer = PackedLinear.of(grid(64, 128, 4, 64, True, torch.bfloat16), torch.bfloat16)
    x = torch.randn(9, 128, generator=torch.Generator().manual_seed(2)).bfloat16()
    together = layer(x)
    assert all(torch.equal(layer(x[i : i + 1])[0], together[i]) for i in range(9))


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = grid(32, 64, 4, 32, True, torch.bfloat16)
    x = torch.randn(3, 64).bfloat16()
    off = PackedLinear.of(packed, torch.bfloat16, kernels=False)
    assert torch.equal(off(x), packed.linear(x))
    monkeypatch.setenv("COMPRESS_KERNELS", "0")
    assert not cpu.enabled()
    assert torch.equal(PackedLinear.of(packed, torch.bfloat16)(x), packed.linear(x))


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_on_older_cpus(capability: str) -> None:
    """The same layers on fewer instructions: the kernel's order differs, the way back does not."""
    code = (
        "import torch, sys; sys.path.insert(0, sys.argv[1]); import test_cpu_kernels as t\n"
        "from compress import cpu\n"
        "for rows, columns, group in t.INT4[:8]:\n"
        "    packed = t.grid(rows, columns, 4, group, False, torch.float16)\n"
        "    kernel = cpu.Int4.of(packed); assert t.same(kernel.restore(), packed)\n"
        "    x = torch.randn(5, columns).bfloat16(); twin = packed.linear(x)\n"
        "    assert float((kernel.linear(x) - twin).abs().max()) < 0.02 * float(twin.abs().max())\n"
        "print(cpu.enabled())"
    )
    there = os.path.dirname(__file__)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, there], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert capability == "avx2" or done.stdout.strip() == "False"
