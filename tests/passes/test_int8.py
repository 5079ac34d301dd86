"""LLM.int8(): which features are outliers, the two ends of the threshold, bitsandbytes' product as an oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from compress.errors import CompressError
from compress.packed.outlier_columns import OutlierColumns
from compress.passes.absmax import Absmax
from compress.passes.int8 import Int8
from compress.types import LayerStats, Needs, Solved, Storage, bits_per_weight

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LOUD = [4, 11, 30]


def random_weight(seed: int, rows: int = 8, columns: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g) * 0.05).to(dtype)


def inputs(seed: int, tokens: int = 10, columns: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations in which the features LOUD reach far beyond the threshold."""
    x = torch.randn(2, tokens, columns, generator=torch.Generator().manual_seed(seed)).clamp_(-4, 4)
    x[..., LOUD] *= 20
    x[:, 0, LOUD] = 25.0
    return x.to(dtype)


def stats_of(x: Tensor, threshold: float = 6.0, spread: Tensor | None = None) -> LayerStats:
    rows = x.float().reshape(-1, x.shape[-1])
    above = (rows.abs() >= threshold).float().mean(0)
    return LayerStats(len(rows), absmax=rows.abs().amax(0), above=above, spread=spread)


def packed_of(solved: Solved) -> OutlierColumns:
    assert isinstance(solved.packed, OutlierColumns)
    return solved.packed


@given(
    seed=st.integers(0, 10**6),
    weights=st.sampled_from(["channel", "tensor"]),
    zeropoint=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=40)
def test_outlier_columns_are_the_originals(seed: int, weights: str, zeropoint: bool, dtype: torch.dtype) -> None:
    weight = random_weight(seed, dtype=dtype)
    weight[:, LOUD[0]] *= 100  # must not reach the scales
    weight[1] = 0
    copy = weight.clone()
    method = Int8(weights=weights, zeropoint=zeropoint)  # type: ignore[arg-type]
    solved = method(weight, stats_of(inputs(seed)), dtype)
    packed = packed_of(solved)
    assert torch.equal(weight, copy)
    assert packed.columns.tolist() == LOUD
    assert packed.columns.dtype == torch.int32
    dense = packed.dequantize()
    assert torch.equal(dense[:, LOUD], weight[:, LOUD])
    assert bool((packed.inner.dequantize()[:, LOUD] == 0).all())
    rest = weight.clone()
    rest[:, LOUD] = 0
    plain = Absmax(weights, "token", zeropoint)(rest, LayerStats(0), dtype).packed  # type: ignore[arg-type]
    assert all(torch.equal(t, plain.tensors()[n]) for n, t in packed.inner.tensors().items())
    mode = "token_zeropoint" if zeropoint else "token"
    inner = Storage("uniform", 8, -1, not zeropoint, activations=mode)
    outer = Storage("outlier_columns", 8, -1, not zeropoint, activations=mode, inner=inner)
    assert packed.storage == method.storage == outer
    error = weight.double() - dense.double()
    torch.testing.assert_close(solved.row_loss.double(), error.square().sum(1), rtol=1e-4, atol=0)
    torch.testing.assert_close(solved.row_norm.double(), weight.double().square().sum(1), rtol=1e-5, atol=0)
    figures = {"outlier_features": 3.0, "outlier_share": 3 / 40}
    assert {n: solved.figures[n] for n in figures} == figures
    assert solved.figures["largest_outlier"] == float(inputs(seed)[..., LOUD].abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeropoint", [True, False])
@pytest.mark.parametrize("rule", ["any", "paper"])
def test_threshold_zero_is_the_16_bit_layer(rule: str, zeropoint: bool, dtype: torch.dtype) -> None:
    weight, x = random_weight(1, dtype=dtype), inputs(2, dtype=dtype)
    x[0, 0] = 0
    method = Int8(0.0, rule, zeropoint=zeropoint)  # type: ignore[arg-type]
    packed = packed_of(method(weight, stats_of(x, 0.0, torch.ones(4, 40)), dtype))
    assert torch.equal(packed.dequantize(), weight)
    assert torch.equal(packed.linear(x), F.linear(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["channel", "tensor"])
@pytest.mark.parametrize("zeropoint", [True, False])
def test_threshold_infinity_is_plain_int8(weights: str, zeropoint: bool, dtype: torch.dtype) -> None:
    weight, x = random_weight(3, dtype=dtype), inputs(4, dtype=dtype)
    solved = Int8(INF, weights=weights, zeropoint=zeropoint)(weight, stats_of(x), dtype)  # type: ignore[arg-type]
    plain = Absmax(weights, "token", zeropoint)(weight, LayerStats(0), dtype).packed  # type: ignore[arg-type]
    assert torch.equal(solved.packed.linear(x), plain.linear(x))
    assert torch.equal(solved.packed.dequantize(), plain.dequantize())
    assert bits_per_weight(solved.packed) == bits_per_weight(plain)
    assert dict(solved.figures) == {"outlier_features": 0.0, "outlier_share": 0.0, "largest_outlier": 0.0}


@pytest.mark.parametrize("zeropoint", [True, False])
@pytest.mark.parametrize("weights", ["channel", "tensor"])
def test_decomposition_mends_what_outliers_break(weights: str, zeropoint: bool) -> None:
    weight, x = random_weight(5, 32, 40), inputs(6)
    exact = x.double() @ weight.double().t()
    errors = []
    for threshold in (6.0, INF):
        method = Int8(threshold, weights=weights, zeropoint=zeropoint)  # type: ignore[arg-type]
        y = method(weight, stats_of(x), torch.float32).packed.linear(x)
        errors.append(float((y.double() - exact).norm()))
    assert errors[0] < 0.2 * errors[1]


def test_the_papers_rule_by_counting() -> None:
    g = torch.Generator().manual_seed(0)
    spread = (torch.rand(10, 40, generator=g) * 0.15).round(decimals=2)
    stats = stats_of(inputs(7), spread=spread)
    for layer_share, token_share in ((None, None), (0.3, 0.06), (0.7, 0.04), (1.0, 0.02), (0.1, 0.15)):
        method = Int8(rule="paper", layer_share=layer_share, token_share=token_share)
        layers, tokens = layer_share or 0.25, token_share or 0.06
        wanted = []
        for feature in range(40):
            blocks = sum(round(100 * float(spread[b, feature])) >= round(100 * tokens) for b in range(10))
            wanted.append(blocks >= layers * 10 - 1e-9)
        assert method.outliers(stats).tolist() == wanted
        packed = packed_of(method(random_weight(8), stats, torch.float32))
        assert packed.columns.tolist() == [i for i, chosen in enumerate(wanted) if chosen]
    assert any(wanted) or not all(wanted)


def test_exact_shares_count() -> None:
    """6 of 100 tokens in 1 of 4 blocks is enough, a hair less is not."""
    spread = torch.zeros(4, 3)
    spread[2, 0] = torch.tensor(6.0) / 100
    spread[2, 1] = torch.tensor(59.0) / 1000
    assert Int8(rule="paper").outliers(LayerStats(100, absmax=torch.ones(3), spread=spread)).tolist() == [1, 0, 0]
    any_token = LayerStats(9, absmax=torch.tensor([6.0, 5.99, 7.0]))
    assert Int8().outliers(any_token).tolist() == [True, False, True]


@pytest.mark.parametrize("zeropoint", [True, False])
def test_rows_are_independent(zeropoint: bool) -> None:
    weight, stats = random_weight(9), stats_of(inputs(10))
    method = Int8(zeropoint=zeropoint)
    together = packed_of(method(weight, stats, torch.bfloat16))
    for r in range(len(weight)):
        alone, row = packed_of(method(weight[r : r + 1], stats, torch.bfloat16)), together.rows(r, r + 1)
        assert all(torch.equal(t, row.tensors()[n]) for n, t in alone.tensors().items())
    assert method.row_unit == 1
    assert Int8(weights="tensor").row_unit == 0


def test_a_layer_that_calibration_never_reached() -> None:
    solved = Int8()(random_weight(11), LayerStats(0, absmax=torch.zeros(40)), torch.float32)
    assert len(packed_of(solved).columns) == 0
    assert "no calibration token" in solved.notes[0]
    assert bool(torch.isfinite(solved.packed.linear(inputs(12))).all())


def test_bitsandbytes_product() -> None:
    """bitsandbytes dequantises int8 for the outlier columns; with the same put into our layer, the products agree.

    Its weights' scales see the outlier columns, and its token's those of their values that stay below the threshold;
    ours do not. Here no row's largest weight lies there, and all their values reach the threshold. With the original
    columns our layer is nearer to the exact product.
    """
    bnb = pytest.importorskip("bitsandbytes")
    half = torch.float16
    weight, x = random_weight(13, 48, 64, half), inputs(14, columns=64, dtype=half)
    x[..., LOUD] += 20 * x[..., LOUD].sign()
    weight[:, LOUD] *= 0.3
    weight[:, 0] = weight.abs().amax(1)
    state = bnb.MatmulLtState()
    state.is_training = False
    state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(weight.clone())
    theirs = bnb.matmul(x.clone(), weight, state=state, threshold=6.0).float()
    assert sorted(state.idx.tolist()) == LOUD

    packed = packed_of(Int8()(weight, stats_of(x), torch.float32))
    keep = [i for i in range(64) if i not in LOUD]
    codes = packed.inner.codes.to(torch.int16) - 128
    differ = (codes - state.CB.to(torch.int16))[:, keep]
    assert int(differ.abs().max()) <= 1  # ties, which float32 may break either way
    assert int(differ.abs().sum()) < 5
    torch.testing.assert_close(packed.inner.scales[:, 0], state.SCB / 127)
    as_they = OutlierColumns(packed.inner, packed.columns, state.CB[:, LOUD] * state.SCB[:, None] / 127)
    exact = x.double() @ weight.double().t()
    size = float(exact.abs().max())
    assert float((as_they.linear(x).float() - theirs).abs().max()) < 3e-3 * size
    ours = packed.linear(x).double()
    assert float((ours - exact).norm()) < float((theirs.double() - exact).norm())
    assert float((ours - exact).norm()) < 0.01 * float(exact.norm())


def test_needs() -> None:
    assert Int8().needs == Needs(ranges=True)
    assert Int8(5.0, "paper").needs == Needs(ranges=True, above=5.0, survey=True)
    settled = Int8(rule="paper").settle([64])
    assert (settled.layer_share, settled.token_share) == (0.25, 0.06)
    assert Int8().settle([64]) == Int8()


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"threshold": -1.0}, "--threshold: threshold -1.0 is out of range"),
        ({"threshold": float("nan")}, "--threshold"),
        ({"rule": "most"}, "--rule: no rule 'most'; use any or paper"),
        ({"weights": "row"}, "--weights"),
        ({"layer_share": 0.5}, "--layer-share: .* add --rule paper"),
        ({"rule": "paper", "layer_share": 0.0}, "--layer-share: share 0.0"),
        ({"rule": "paper", "token_share": 6.0}, "--token-share: share 6.0 is out of range"),
    ],
)
def test_bad_settings(bad: dict[str, Any], said: str) -> None:
    with pytest.raises(CompressError, match=said):
        Int8(**bad)


def test_words() -> None:
    def layer(name: str, found: float, largest: float) -> dict[str, Any]:
        figures = {"outlier_features": found, "outlier_share": found / 1000, "largest_outlier": largest}
        return {"name": name, "shape": [10, 1000], "figures": figures}

    lines = Int8().words([layer("model.a", 2, 8.25), layer("model.b", 4, 61.21)])
    assert lines[0] == "int8, vector-wise absmax with mixed-precision decomposition: features that reach 6 in 16 bit"
    found = "outlier features: 3 a layer on average (0.30% of the columns), largest magnitude 61.2 in model.b"
    assert lines[1] == found
    assert Int8().words([layer("model.a", 0, 0)])[1] == "outlier features: 0 a layer on average (0.00% of the columns)"
    assert Int8().words([]) == []
    one = [layer("model.a", 1, 7)]
    assert "0.06 of the tokens of 0.25 of the blocks" in Int8(rule="paper").words(one)[0]
    assert "every feature" in Int8(0.0).words(one)[0]
    assert "row-wise zeropoint" in Int8(INF, weights="tensor", zeropoint=True).words(one)[0]
