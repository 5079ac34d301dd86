"""NF4 against bitsandbytes on a CPU, brute force, and the paper's claims about normally distributed weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import tables
from compress.errors import CompressError
from compress.packed.blockwise import NESTED_BLOCK, Blockwise
from compress.passes.absmax import fit_int8
from compress.passes.fp4 import FP4
from compress.passes.nf4 import BLOCK_SIZES, NF4
from compress.types import LayerStats, Needs, Solved, Storage, tensor_bytes_of

NOTHING = LayerStats(0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    ((8, 64), 64),
    ((3, 256), 32),
    ((6, 40), 32),
    ((5, 50), 128),
    ((3, 33), 64),
    ((2, 2048), 4096),
    ((40, 64), 32),
]


def random_weight(seed: int, rows: int = 6, columns: int = 64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def packed_of(solved: Solved) -> Blockwise:
    assert isinstance(solved.packed, Blockwise)
    return solved.packed


def halves(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """bitsandbytes' bytes -> codes: the even element is in the high half."""
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten()[: shape[0] * shape[1]].reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_codes_and_weights_of_bitsandbytes(shape: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    for seed in range(4):
        weight = random_weight(seed, *shape).to(dtype)
        weight[0, :20] = 0
        wanted, state = theirs.quantize_4bit(weight, blocksize=size, quant_type="nf4")
        ours = packed_of(NF4(size)(weight, NOTHING, dtype))
        assert torch.equal(ours.codes, halves(wanted, shape))
        assert torch.equal(ours.absmax, state.absmax)
        if shape[1] % size == 0:  # else its AVX-512 kernel uses the wrong blocks
            assert torch.equal(ours.dequantize(), theirs.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantisation_of_bitsandbytes(dtype: torch.dtype) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = random_weight(3, 300, 64).to(dtype)
    wanted, state = theirs.quantize_4bit(weight, blocksize=32, quant_type="nf4", compress_statistics=True)
    ours = packed_of(NF4(32, double_quant=True)(weight, NOTHING, dtype))
    assert torch.equal(ours.codes, halves(wanted, weight.shape))
    assert ours.nested_absmax is not None
    assert ours.nested_offset is not None
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.nested_offset, state.offset[None])
    assert float((ours.absmax != state.absmax).float().mean()) < 0.01  # its CPU kernel rounds to 1 / 65535 first
    state.absmax = ours.absmax
    assert torch.equal(ours.dequantize(), theirs.dequantize_4bit(wanted, state))

    # the nearest entries, with that rounding, are the CPU kernel's bytes
    absmax = packed_of(NF4(32)(weight, NOTHING, dtype)).absmax - ours.nested_offset
    scaled = absmax * (1 / ours.nested_absmax).repeat_interleave(NESTED_BLOCK)[: len(absmax)]
    cell = ((scaled + 1) * 0.5 * 65535 + 0.5).floor()
    distance = ((cell / 65535 * 2 - 1)[:, None] - tables.dynamic_map()).abs()
    kernel, _ = theirs.quantize_blockwise(absmax, blocksize=NESTED_BLOCK)
    assert torch.equal(distance.argmin(1).to(torch.uint8), kernel)
    # and without it, ours
    exact = (scaled.clamp(-1, 1).double()[:, None] - tables.dynamic_map().double()).abs()
    chosen = exact.gather(1, ours.absmax.long()[:, None])[:, 0]
    assert bool((chosen <= exact.amin(1) + 1e-7).all())


@given(
    seed=st.integers(0, 10**6),
    columns=st.integers(1, 70),
    size=st.sampled_from([32, 64]),
    method=st.sampled_from([NF4(), FP4(), FP4(variant="e1m2"), FP4(variant="e3m0"), FP4(variant="bnb")]),
)
@settings(deadline=None, max_examples=40)
def test_every_weight_takes_the_nearest_level(seed: int, columns: int, size: int, method: NF4 | FP4) -> None:
    weight = random_weight(seed, 5, columns)
    method = type(method)(**{**vars(method), "block_size": size})
    packed = packed_of(method(weight, NOTHING, torch.float32))
    flat = weight.flatten().double()
    for start in range(0, len(flat), size):
        block = flat[start : start + size]
        assert float(packed.absmax[start // size]) == float(block.abs().max())
        choices = tables.table(packed.table).double() * block.abs().max()
        distance = (block[:, None] - choices).abs()
        chosen = distance.gather(1, packed.codes.flatten()[start : start + size].long()[:, None])[:, 0]
        assert bool((chosen <= distance.amin(1) + 1e-6 * block.abs().max()).all())


def test_ties_take_the_lower_level_and_zeros_code_seven() -> None:
    weight = torch.zeros(1, 64)
    values = tables.table("nf4")
    weight[0, 0] = 1.0
    weight[0, 1:16] = (values[:-1] + values[1:]) / 2
    packed = packed_of(NF4()(weight, NOTHING, torch.float32))
    assert packed.codes[0].tolist() == [15, *range(15)] + [7] * 48
    for dtype in DTYPES:
        for double_quant in (False, True):
            solved = NF4(double_quant=double_quant)(torch.zeros(2, 64), NOTHING, dtype)
            assert torch.equal(solved.packed.dequantize(), torch.zeros(2, 64, dtype=dtype))
            assert bool((solved.row_loss == 0).all())


@pytest.mark.parametrize("hessian", [True, False])
@pytest.mark.parametrize("double_quant", [True, False])
def test_losses_are_those_of_the_stored_layer(hessian: bool, double_quant: bool) -> None:
    weight = random_weight(7, 8, 64).to(torch.bfloat16)
    copy = weight.clone()
    x = random_weight(8, 100, 64).double()
    h = x.T @ x if hessian else torch.eye(64).double()
    stats = LayerStats(100, h.float()) if hessian else NOTHING
    method = NF4(32, double_quant)
    solved = method(weight, stats, torch.bfloat16)
    error = weight.double() - solved.packed.dequantize().double()
    torch.testing.assert_close(solved.row_loss.double(), ((error @ h) * error).sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(solved.row_norm.double(), ((weight.double() @ h) * weight).sum(1), rtol=1e-4, atol=0)
    assert solved.packed.storage == method.storage
    assert torch.equal(weight, copy)


@given(seed=st.integers(0, 10**6), size=st.sampled_from([32, 64]))
@settings(deadline=None, max_examples=25)
def test_rows_are_independent_where_blocks_end_with_them(seed: int, size: int) -> None:
    weight = random_weight(seed, 6, 128)
    method = NF4(size).settle([128])
    assert method.row_unit == 1
    together = packed_of(method(weight, NOTHING, torch.bfloat16))
    for r in range(len(weight)):
        alone, cut = packed_of(method(weight[r : r + 1], NOTHING, torch.bfloat16)), together.rows(r, r + 1)
        for name, tensor in alone.tensors().items():
            assert torch.equal(tensor, cut.tensors()[name])


def test_row_unit() -> None:
    assert NF4().row_unit == 0  # not known yet
    assert NF4(64).settle([128, 576]).row_unit == 1
    assert NF4(128).settle([128, 576]).row_unit == 0
    assert NF4(64, double_quant=True).settle([128]).row_unit == 0
    assert FP4(64, variant="e3m0").settle([128]).row_unit == 1
    assert NF4(64).settle([64]) == NF4(64)
    assert NF4(64).settle([64]).settle([96]).row_unit == 0


def test_order_of_the_paper_for_normal_weights() -> None:
    """QLoRA, table 2 by squared error: NF4 is better than E2M1, E2M1 better than 4-bit integers."""
    weight = random_weight(11, 256, 64)

    def total(solved: Solved) -> float:
        return float(solved.row_loss.sum())

    nf4, double = total(NF4()(weight, NOTHING, torch.float32)), total(NF4(64, True)(weight, NOTHING, torch.float32))
    fp4 = {v: total(FP4(variant=v)(weight, NOTHING, torch.float32)) for v in ("e2m1", "e1m2", "e3m0", "bnb")}
    scale = weight.abs().amax(1, keepdim=True) / 7
    int4 = float((weight - scale * (weight / scale).round()).square().sum())
    assert nf4 < fp4["e2m1"] < int4
    assert fp4["e2m1"] < fp4["bnb"] < fp4["e3m0"]
    assert fp4["e1m2"] == pytest.approx(int4, rel=1e-3)  # E1M2 is the integer grid
    assert nf4 < double < 1.02 * nf4
    int8 = fit_int8(weight, False, False, torch.float32).dequantize()
    assert float((weight - int8).square().sum()) < 0.1 * nf4
    assert total(NF4(32)(weight, NOTHING, torch.float32)) < nf4


def test_settings() -> None:
    assert NF4().needs == Needs()
    assert NF4().storage == Storage("blockwise", 4, 64, details=(("double_quant", False), ("table", "nf4")))
    for size in BLOCK_SIZES:
        assert NF4(size).settle([64]).storage.group_size == size
    for size, near in ((63, 64), (0, 32), (-64, 32), (100, 128), (8192, 4096)):
        with pytest.raises(CompressError, match=f"block size {size} is not a power of two.*use {near}"):
            NF4(size)


def test_words() -> None:
    assert NF4().words([]) == ["NF4, blocks of 64"]
    method = NF4(64, double_quant=True)
    packed = method(random_weight(1, 256, 256), NOTHING, torch.bfloat16).packed
    layer = {"name": "a", "shape": [256, 256], "bytes": tensor_bytes_of(packed), "figures": {}, "relative_error": 0.1}
    assert method.words([layer, layer]) == ["NF4, blocks of 64, double quantisation: 4.127 bits a weight"]
