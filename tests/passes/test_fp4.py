"""FP4 against bitsandbytes on a CPU, and its variants. What it shares with NF4 is tested there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress import tables
from compress.errors import CompressError
from compress.packed.blockwise import Blockwise
from compress.passes.fp4 import FP4
from compress.types import LayerStats, Needs, Storage

NOTHING = LayerStats(0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = ["e2m1", "e1m2", "e3m0", "bnb"]


def halves(packed: Tensor, shape: torch.Size) -> Tensor:
    flat = packed.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten()[: shape[0] * shape[1]].reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_codes_and_weights_of_bitsandbytes(dtype: torch.dtype, double_quant: bool) -> None:
    """Equal but for the code of zeros: its plain torch code gives small positive weights the second zero, 8."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    for seed in range(4):
        weight = (torch.randn(16, 128, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
        weight[0, :20] = 0
        wanted, state = theirs.quantize_4bit(weight, quant_type="fp4", compress_statistics=double_quant)
        packed = FP4(double_quant=double_quant, variant="bnb")(weight, NOTHING, dtype).packed
        assert isinstance(packed, Blockwise)
        codes = halves(wanted, weight.shape)
        assert torch.equal(packed.codes, codes.masked_fill(codes == 8, 0))
        if double_quant:
            state.absmax = packed.absmax  # the CPU kernel's may be a neighbour: see test_nf4
            assert packed.nested_absmax is not None
            assert torch.equal(packed.nested_absmax, state.state2.absmax)
        assert torch.equal(packed.absmax, state.absmax)
        assert torch.equal(packed.dequantize(), theirs.dequantize_4bit(wanted, state))


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_on_the_levels_are_kept(variant: str) -> None:
    method = FP4(32, variant=variant)  # type: ignore[arg-type]
    values = tables.table(f"fp4-{variant}")
    weight = torch.cat([values, values.flip(0)])[None].repeat(3, 1) * torch.tensor([[1.0], [0.25], [4.0]])
    solved = method(weight, NOTHING, torch.float32)
    assert torch.equal(solved.packed.dequantize(), weight)
    assert bool((solved.row_loss == 0).all())
    assert not bool((solved.packed.tensors()["codes"] == 8).any())
    assert solved.packed.storage == method.storage
    assert method.storage == Storage("blockwise", 4, 32, details=(("double_quant", False), ("table", f"fp4-{variant}")))


def test_settings_and_words() -> None:
    assert FP4().needs == Needs()
    assert FP4().words([]) == ["FP4 (E2M1), blocks of 64"]
    layer = {"name": "a", "shape": [4, 64], "bytes": 144, "figures": {}, "relative_error": 0.1}
    assert FP4(variant="bnb").words([layer]) == ["FP4 (bitsandbytes), blocks of 64: 4.5 bits a weight"]
    with pytest.raises(CompressError, match="no FP4 'e4m3'"):
        FP4(variant="e4m3")  # type: ignore[arg-type]
    with pytest.raises(CompressError, match="block size 48"):
        FP4(48)
