"""The native format: every kind that a pass makes comes back to the byte; a config that does not fit is told."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.clients import pick
from compress.errors import CompressError
from compress.formats import FORMATS, holders, of_config
from compress.formats.base import Held, LayerShape
from compress.formats.native import Native
from compress.packed import KINDS
from compress.packed.sparse import Sparse
from compress.passes.gptq import GPTQ
from compress.recipe import Recipe, parse
from compress.types import LayerStats, Packed, Pass, Storage

FORMAT = Native()
NAME = "model.layers.0.mlp.up_proj"
LINES = [
    "rtn bits=3 group_size=16",
    "rtn bits=5 symmetric=false group_size=-1",
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
    "nf4 block_size=32 double_quant=true",
    "fp4 variant=e3m0",
    "kmeans bits=3",
    "kmeans bits=2 group_size=16 weighted=false",
]


def solved(line: str, dtype: torch.dtype) -> Packed:
    """A 32 x 64 layer by one pass, on correlated inputs."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(200, 64, generator=g) @ torch.randn(64, 64, generator=g) * 0.3
    weight = (torch.randn(32, 64, generator=g) * 0.05).to(dtype)
    stats = LayerStats(200, x.T @ x / 200, x.abs().amax(0), x.abs().mean(0), x.mean(0), (x.abs() >= 2).float().mean(0))
    method = parse(line)
    (settled,) = (p.settle([64]) for p in Recipe.of(method).passes)
    packed = settled(weight, stats, dtype).packed
    assert packed.storage == settled.storage
    return packed


def config_of(packed: Packed, dtype: torch.dtype) -> dict[str, Any]:
    held = Held(NAME, NAME, packed.shape, packed.storage, dtype)
    value: dict[str, Any] = json.loads(json.dumps(FORMAT.config([held], [])))
    return value


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("line", LINES)
def test_there_and_back(line: str, dtype: torch.dtype) -> None:
    packed = solved(line, dtype)
    config = config_of(packed, dtype)
    tensors = FORMAT.pack(packed)
    assert set(tensors) <= set(FORMAT.suffixes)
    found = FORMAT.unpack(NAME, tensors, config)
    assert type(found) is type(packed)
    assert found.storage == packed.storage
    assert found.shape == packed.shape == FORMAT.shape(NAME, {}, config)
    assert same(found.tensors(), tensors)
    dense = found.dequantize()
    assert dense.dtype == FORMAT.dtype(NAME, {}, config) == dtype
    assert torch.equal(dense, packed.dequantize())
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(found.linear(x), packed.linear(x))
    assert FORMAT.activations(NAME, config) == packed.storage.activations


@pytest.mark.parametrize("line", LINES)
def test_bytes_are_known_before(line: str) -> None:
    """To the byte where they do not depend on the weights."""
    packed = solved(line, torch.bfloat16)
    stored = sum(t.numel() * t.element_size() for t in packed.tensors().values())
    expected = FORMAT.nbytes(packed.storage, packed.shape, torch.bfloat16)
    if packed.kind in ("outliers", "outlier_columns"):
        assert 0.5 * stored < expected < 1.5 * stored
    else:
        assert expected == stored


def test_prune_then_quantise_is_a_kind_too() -> None:
    from compress.solve import run_passes

    g = torch.Generator().manual_seed(6)
    x = torch.randn(200, 64, generator=g)
    weight = torch.randn(32, 64, generator=g)
    passes: list[Pass] = [p.settle([64]) for line in ("sparsegpt pattern=2:4", "gptq bits=4") for p in [_pass(line)]]
    found = run_passes((passes[0], passes[1]), weight, LayerStats(200, x.T @ x / 200), torch.bfloat16)
    assert isinstance(found.packed, Sparse)
    dense = found.packed.dequantize()
    assert int((dense.reshape(32, 16, 4) != 0).sum(-1).max()) <= 2
    config = config_of(found.packed, torch.bfloat16)
    again = FORMAT.unpack(NAME, FORMAT.pack(found.packed), config)
    assert torch.equal(again.dequantize(), dense)
    bits = 8 * sum(t.numel() * t.element_size() for t in found.packed.tensors().values()) / dense.numel()
    assert bits <= 3 + 16 / 32  # 2 code bits and 1 position bit a weight, and the scales (one group of 64 a row)


def _pass(line: str) -> Pass:
    (method,) = Recipe.of(parse(line)).passes
    return method


def test_names_of_nested_kinds_never_clash() -> None:
    outer = [KINDS[k] for k in ("sparse", "outliers", "outlier_columns")]
    own = {"sparse": KINDS["sparse"].parts, "outliers": KINDS["outliers"].parts}
    for kind in outer[:2]:
        for inner in ("uniform", "dense", "bilevel"):
            assert not set(own[kind.kind]) & set(KINDS[inner].parts)


def test_layers_come_from_the_config() -> None:
    packed = solved("nf4", torch.bfloat16)
    config = config_of(packed, torch.bfloat16)
    names = [f"{NAME}.{s}" for s in FORMAT.pack(packed)] + ["model.norm.weight"]
    assert FORMAT.layers(names, config) == {NAME}
    assert of_config({"quantization_config": config}) == (FORMATS["native"], config)
    with pytest.raises(CompressError, match="the files do not hold it"):
        FORMAT.layers(["model.norm.weight"], config)
    with pytest.raises(CompressError, match="version 2"):
        FORMAT.layers(names, {**config, "version": 2})
    broken = copy.deepcopy(config)
    broken["storages"][0]["bitz"] = 1
    with pytest.raises(TypeError):
        FORMAT.unpack(NAME, FORMAT.pack(packed), broken)


def test_unknown_kind_is_refused() -> None:
    reason = FORMAT.why_not(Storage("mystery", 4), LayerShape(NAME, 8, 8))
    assert reason is not None
    assert "mystery" in reason


def test_automatic_choice() -> None:
    def auto(line: str) -> str:
        return pick("auto", [p.storage for p in Recipe.of(parse(line)).passes])

    assert auto("gptq") == auto("absmax activations=token") == auto("smoothquant") == "compressed-tensors"
    assert auto("nf4") == auto("fp4 variant=bnb") == "bitsandbytes"
    assert auto("fp4") == auto("sparsegpt") == auto("int8") == auto("spqr") == auto("kmeans") == "native"
    assert auto("gptq act_order=groups group_size=32") == "gptq"
    both = [p.storage for line in ("nf4", "gptq") for p in Recipe.of(parse(line)).passes]
    assert pick("auto", both) == "native"  # each has a client's format, together they have none
    assert holders(GPTQ(act_order="groups", group_size=32).storage) == ["gptq", "gptq_v2", "native"]
    assert pick("gptq", []) == "gptq"
