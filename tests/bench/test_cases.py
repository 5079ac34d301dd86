"""The layers that are timed: they multiply as they are defined, checks see what is wrong, candidates are what runs."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from compress.bench import ways
from compress.bench.cases import CASES, grid, pruned, spqr
from compress.bench.checks import coarseness, difference, poisoned
from compress.bench.layers import Laid, Setting, short
from compress.bench.tune import small
from compress.cuda import choice, ops
from compress.cuda import pruned as pruned_module
from compress.cuda.choice import Library, Narrow, Wide

CPU = Setting("cpu")


@pytest.mark.parametrize("kind", list(CASES))
def test_it_multiplies_as_defined(kind: str) -> None:
    case = CASES[kind]
    torch.manual_seed(0)
    built = case.build((48, 256), CPU)
    x = CPU.normal(3, 256)
    reference = built.reference()(x)
    assert reference.dtype == torch.float32
    assert difference(copy.deepcopy(built.subject).linear(x), reference) < case.limit
    assert not difference(built.subject.linear(x) * 1.01, reference) < case.limit
    assert 0 < built.size <= sum(t.nbytes for t in built.subject.tensors().values())


def test_bytes_of_a_layer_in_groups() -> None:
    built = grid(4, (64, 256), CPU)
    assert built.size == 64 * 256 // 2 + 64 * 2 * 2


def test_outliers_are_counted_once() -> None:
    with_them, without = spqr((64, 256), CPU), spqr((64, 256), CPU, share=0)
    assert isinstance(with_them.subject, Laid)
    values = with_them.subject.layer.outlier_values
    assert values is not None
    assert with_them.size - without.size == len(values) * (2 + 2) + 65 * 4
    assert 0.003 < len(values) / (64 * 256) < 0.03


def test_settings_of_grids() -> None:
    built = grid(3, (32, 256), Setting("cpu", torch.bfloat16, group=64, asymmetric=True))
    assert isinstance(built.subject, Laid)
    layer = built.subject.layer
    assert layer.scales is not None
    assert layer.offsets is not None
    assert (layer.scales.dtype, layer.offsets.dtype, layer.groups) == (torch.bfloat16, torch.uint8, 2)


@pytest.mark.parametrize("kind", ["w4", "w3", "w2", "w8", "nf4", "spqr"])
def test_weights_are_as_large_as_asked(kind: str) -> None:
    torch.manual_seed(0)
    weight = CASES[kind].build((256, 256), replace(CPU, std=0.02)).reference()(torch.eye(256))
    assert 0.015 < float(weight.std()) < 0.03


def test_two_of_four() -> None:
    mask = pruned(4, (16, 64), CPU).mask
    assert bool((mask.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_what_is_not_written_shows() -> None:
    with poisoned():
        assert bool(torch.empty(100, dtype=torch.float16).isnan().all())
        out = torch.empty(4, 4)
        out[0] = 1.0
    assert not difference(out, torch.ones(4, 4)) < 1e9
    assert not torch.are_deterministic_algorithms_enabled()


def test_coarseness() -> None:
    assert (coarseness(torch.float16), coarseness(torch.bfloat16)) == (1.0, 8.0)


def test_ways_are_written_as_the_table_has_them() -> None:
    assert ways.written(Narrow(1, 2, 8, 3)) == ("narrow", 1, 2, 8, 3, 1, 1)
    assert ways.written(Library()) == ("library",)
    assert short(Narrow(1, 2, 8, 3)) == "narrow 1 2 8 3 1 1"
    wide = Wide(64, 4, 2)
    name, *numbers = ways.written(wide)
    assert (name, Wide(*map(int, numbers))) == ("wide", wide)


@pytest.mark.parametrize("kind", ["w4", "w8", "nf4", "spqr"])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64, 256, 4096])
def test_candidates_fit(kind: str, tokens: int) -> None:
    layer = small(kind, CPU)
    assert layer is not None
    for hopper in (True, False):
        found = ways.candidates(layer, (4096, 4096), tokens, hopper, 132, 99 * 1024)
        assert found
        assert len(found) == len(set(found)) < 200
        for way in found:
            assert hopper or not isinstance(way, Wide)
            assert kind != "spqr" or not isinstance(way, Wide)  # it cannot correct single weights
            if isinstance(way, Narrow):
                assert hopper or way.split == 1
                assert 8 * way.token_tiles * 4 >= tokens
                assert way.warps * way.depth * min(tokens, 8 * way.token_tiles) * 272 <= 99 * 1024


@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("tokens", [1, 8, 16, 64])
def test_candidates_of_a_pruned_layer(tokens: int, hopper: bool) -> None:
    layer = small("sparse-w4", CPU)
    assert layer is not None
    found = ways.candidates(layer, (4096, 4096), tokens, hopper, 132, 99 * 1024)
    assert 0 < len(found) == len(set(found)) < 200
    for way in found:
        assert isinstance(way, Narrow)
        assert hopper or way.split == 1
        assert pruned_module.shared_bytes(way, tokens) <= 99 * 1024
    assert tokens == 64 or pruned_module.rule(tokens, 4096, 4096, 132, 99 * 1024) in found
    assert ways.candidates(layer, (4096, 4096), 65, hopper, 132, 99 * 1024) == [Library()]


def test_kinds_without_ways() -> None:
    assert all(small(kind, CPU) is not None for kind in ("w4", "sparse-w4"))
    assert all(small(kind, CPU) is None for kind in ("int8", "sparse") if kind in CASES)


def test_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    built = grid(4, (32, 256), CPU)
    assert isinstance(built.subject, Laid)
    layer, x = built.subject.layer, CPU.normal(5, 256)
    out = torch.full((5, 32), float("nan"), dtype=torch.float16)
    ways.multiply(x, layer, out, Library())
    assert difference(out, built.reference()(x)) < 1e-3
    called: list[object] = []

    def note(x: Tensor, layer: ops.Layer, out: Tensor, way: choice.Way) -> None:
        called.append(way)

    monkeypatch.setattr(ops, "narrow", note)
    monkeypatch.setattr(ops, "broad", note)
    for way in (Narrow(1, 1, 4, 2), Wide(8, 4, 1)):
        ways.multiply(x, layer, out, way)
    assert called == [Narrow(1, 1, 4, 2), Wide(8, 4, 1)]


def test_multiply_by_a_pruned_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    built = CASES["sparse-w4"].build((32, 256), CPU)
    layer, x = ways.layer_of(built.subject), CPU.normal(5, 256)
    assert layer is built.subject
    out = torch.full((5, 32), float("nan"), dtype=torch.float16)
    ways.multiply(x, layer, out, Library())
    assert difference(out, built.reference()(x)) < 1e-3
    called: list[object] = []
    monkeypatch.setattr(pruned_module, "few", lambda *launch: called.append(launch[-1]))
    ways.multiply(x, layer, out, Narrow(1, 1, 4, 2))
    assert called == [Narrow(1, 1, 4, 2)]


def test_what_the_operators_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "choose", lambda *case: case)
    monkeypatch.setattr(pruned_module, "choose", lambda *case: case)
    for kind, case in (("spqr", (3, 3, 5, 64, 256, 0, True)), ("sparse-w4", (4, 5, 64, 256, 0))):
        layer = small(kind, CPU)
        assert layer is not None
        assert ways.chosen(layer, (64, 256), 5, 0) == case
