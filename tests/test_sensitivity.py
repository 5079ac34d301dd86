"""What tokens count, against every derivative of a block taken one at a time in float64, and what comes of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import sensitivity, stats, sums
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.hidden import Activations
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.repeatable import OwnAttention
from compress.sensitivity import Shares, Slopes
from compress.types import Needs
from compress.weights import Weights

WEIGHTED = Needs(hessian=True, weighted=True)


class Block(nn.Module):
    """Attention without a softmax, a gated layer, a layer that only chooses, and one that sees no hidden state."""

    def __init__(self) -> None:
        super().__init__()
        make = torch.Generator().manual_seed(0)
        for name, shape in {"mix": (6, 6), "up": (12, 6), "down": (6, 12), "choice": (6, 6), "apart": (6, 4)}.items():
            layer = nn.Linear(shape[1], shape[0], bias=False)
            layer.weight = nn.Parameter(torch.randn(shape, generator=make) / shape[1] ** 0.5, requires_grad=False)
            self.add_module(name, layer)
        self.late = torch.tril(torch.rand(5, 5, generator=make))
        self.steady = torch.randn(5, 4, generator=make)

    def forward(self, x: Tensor) -> Tensor:
        late, steady = self.late.to(x.dtype), self.steady.to(x.dtype)
        x = x + late @ self.mix(x) + self.apart(steady)
        x = x * (self.choice(x).argmax(-1, keepdim=True) % 2 + 1)
        return x + self.down(torch.tanh(self.up(x)))


def faked(block: Block) -> tuple[Any, list[Any]]:
    """What `Slopes` asks of a model, and of its layers."""

    def traced(number: int, states: Tensor, shape: tuple[int, int]) -> Tensor:
        with torch.enable_grad():
            return block(states.clone())

    linears = [SimpleNamespace(name=n, param=f"{n}.weight") for n, _ in block.named_children()]
    return SimpleNamespace(traced=traced, module=lambda linear: block.get_submodule(linear.name)), linears


def told(block: Block, states: Tensor, first: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    model, linears = faked(block)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with Slopes(model, linears, lambda name, x, weights: found.__setitem__(name, (x, weights))) as slopes:
        slopes.run(0, states, states.shape[1], first)
    return found


def test_the_mean_of_many_is_the_trace() -> None:
    """Of the squares of all derivatives of the output, in units of each token's root mean square."""
    block = Block().double()
    states = torch.randn(1, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    seen: dict[str, Tensor] = {}
    for name in ("mix", "up", "down"):
        getattr(block, name).register_forward_hook(lambda m, a, out, name=name: seen.__setitem__(name, out))
    output = block(states.clone().requires_grad_())
    unit = output.detach().square().mean(-1).rsqrt()[0]
    outputs = dict(seen)
    exact = {name: torch.zeros(5, dtype=torch.float64) for name in outputs}
    for t in range(5):
        for c in range(6):
            slopes = torch.autograd.grad(output[0, t, c] * unit[t], list(outputs.values()), retain_graph=True)
            for name, slope in zip(outputs, slopes, strict=True):
                exact[name] += slope[0].square().mean(-1)
    drawn = [told(block, states, first) for first in range(600)]
    for name, trace in exact.items():
        mean = torch.stack([found[name][1][0].double() ** (1 / sensitivity._POWER) for found in drawn]).mean(0)
        assert torch.allclose(mean / mean.sum(), trace / trace.sum(), rtol=0.15, atol=0.002), name
        assert float(trace.max() / trace.min()) > 3, "or there is nothing to tell apart"


def test_what_has_no_slope_counts_alike() -> None:
    """A layer that only chooses: no slope comes back. One that sees no hidden state has slopes like any other."""
    found = told(Block(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2)))
    assert set(found) == {"mix", "up", "down", "choice", "apart"}
    assert torch.equal(found["choice"][1], torch.ones(2, 5))
    assert found["choice"][0].shape == (2, 5, 6)
    assert found["apart"][1].std() > 0
    assert all(bool((weights >= 0).all()) for _, weights in found.values())


def test_the_way_back_ends_at_the_first_layers() -> None:
    """What comes before them is not differentiated; what they make may be written into, as by a model that clips it."""

    class Before(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x + 1

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Tensor:
            raise AssertionError("for nothing")

    class Clipped(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = Before.apply(x)  # type: ignore[no-untyped-call]
            made = self.mix(x).clamp_(-1, 1)
            return x + self.down(torch.tanh(self.up(x + made)))

    found = told(Clipped(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2)))
    assert set(found) == {"mix", "up", "down"}
    assert found["mix"][1].std() > 0
    assert float(found["mix"][1].min()) >= 0


def test_nothing_was_reached() -> None:
    """As of experts in a batch whose tokens go elsewhere."""

    class Elsewhere(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert told(Elsewhere(), torch.randn(2, 5, 6)) == {}


def test_nothing_is_watched_outside_of_a_run() -> None:
    block = Block()
    model, linears = faked(block)
    found: list[str] = []
    with Slopes(model, linears, lambda name, x, weights: found.append(name)):
        block(torch.randn(2, 5, 6))  # weights ask for no gradients, but grad mode is on
    with torch.no_grad():
        block(torch.randn(2, 5, 6))
    assert not found
    assert not any(layer._forward_hooks for layer in block.children())


def test_attention_of_our_own(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is torch's, there and back; every way of giving its settings."""
    make = torch.Generator().manual_seed(3)
    inputs = [torch.randn(2, 4, 7, 8, generator=make).requires_grad_() for _ in range(3)]
    mask, slope = torch.rand(2, 1, 7, 7, generator=make) > 0.3, torch.randn(2, 4, 7, 8, generator=make)
    attend = nn.functional.scaled_dot_product_attention
    calls: list[Callable[[], Tensor]] = [
        lambda: attend(*inputs, is_causal=True, scale=0.2),
        lambda: attend(*inputs, mask, 0.0, False),
        lambda: attend(*inputs, attn_mask=mask),
    ]
    for call in calls:
        plain = call()
        expected = torch.autograd.grad(plain, inputs, slope)
        with OwnAttention():
            ours = call()
        assert torch.equal(ours, plain)
        assert all(map(torch.equal, torch.autograd.grad(ours, inputs, slope), expected))
    model, flow = flow_of(toy, tmp_path)
    found = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    whole, taken = BlockModel.traced, []

    def traced(*given: Any) -> Tensor:
        with OwnAttention():
            out = whole(*given)
        assert "AttentionBackward" in str(graph(out)), "transformers calls it as it is looked for"
        taken.append(out.shape)
        return out

    monkeypatch.setattr(BlockModel, "traced", traced)
    again = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    assert len(taken) == 3
    assert all(torch.allclose(a.stats.hessian, b.stats.hessian, rtol=1e-4) for a, b in zip(found, again, strict=True))


def graph(out: Tensor) -> set[str]:
    """Names of the steps that autograd would go back through."""
    todo, names, done = [out.grad_fn], set(), set()
    while todo:
        step = todo.pop()
        if step is not None and step not in done:
            done.add(step)
            names.add(type(step).__name__)
            todo += [before for before, _ in step.next_functions]
    return names


def test_shares_of_a_row() -> None:
    """The mean of what tokens are among each other in a row: neither a layer nor a row outweighs another."""
    shares = Shares()
    one, other = torch.tensor([[1.0, 3.0], [20.0, 60.0]]), torch.tensor([[5.0, 5.0], [0.0, 0.0]])  # none
    assert shares.add("a", 2, one) is None
    assert torch.equal(shares.add("b", 1, torch.tensor([2.0, 6.0])), torch.tensor([2.0, 6.0]))
    assert torch.allclose(shares.add("a", 2, other), torch.tensor([[0.75, 1.25], [0.75, 1.25]]))
    assert shares.add("a", 2, one) is None, "the next rows begin anew"


def flow_of(folder: Path, tmp_path: Path, size: int = 3) -> tuple[BlockModel, Activations]:
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    flow = Activations(model, tokens, size, tmp_path / "spill")
    flow.enter()
    model.load(0)
    return model, flow


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """What every layer is told from here on."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    whole = Slopes._reached

    def watched(self: Slopes, number: int, slope: Tensor) -> None:
        name, x = self._waiting[number]
        seen.setdefault(name, []).append((x.double(), slope.double().square().mean(-1) ** sensitivity._POWER))
        whole(self, number, slope)

    monkeypatch.setattr(Slopes, "_reached", watched)
    return seen


def test_the_weighted_mean(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every group of layers in float64, from the slopes that autograd gave."""
    model, flow = flow_of(toy, tmp_path)
    seen = recorded(monkeypatch)
    groups = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    plain = stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True))
    assert [len(g.linears) for g in groups] == [3, 1, 2, 1]
    for group, other in zip(groups, plain, strict=True):
        x = torch.cat([x for x, _ in seen[group.linears[0].name]]).flatten(0, 1)
        each = [torch.cat([w for _, w in seen[linear.name]]) for linear in group.linears]
        w = torch.stack([w / w.mean(1, keepdim=True) for w in each]).mean(0).flatten()
        assert group.weighted
        assert group.stats.tokens == 8 * 24
        assert group.stats.hessian is not None
        assert other.stats.hessian is not None
        assert torch.allclose(group.stats.hessian.double(), (x.t() * w) @ x / w.sum(), rtol=1e-4, atol=1e-6)
        assert not torch.allclose(group.stats.hessian, other.stats.hessian, rtol=1e-2)


def test_rows_that_go_together_change_rounding_only(toy: Path, tmp_path: Path) -> None:
    """And the ranges are those of all tokens alike."""
    needs = Needs(hessian=True, ranges=True, weighted=True)
    found = []
    for size in (1, 3, 8):
        model, flow = flow_of(toy, tmp_path, size)
        found.append(stats.collect(model, 0, model.linears(0), flow, needs))
    plain = stats.collect(model, 0, model.linears(0), flow, Needs(ranges=True))
    for one, two, three, ranges in zip(*found, plain, strict=True):
        for other in (two, three):
            assert torch.allclose(one.stats.hessian, other.stats.hessian, rtol=1e-4, atol=1e-6)
        assert torch.allclose(one.stats.mean_abs, ranges.stats.mean_abs, rtol=1e-4)
        assert not one.stats.mean_abs.requires_grad


def test_experts(tmp_path: Path, four_experts: Path) -> None:
    """Each has the tokens that its router sent, and they count by their own slopes."""
    model, flow = flow_of(four_experts, tmp_path)
    weighted = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    plain = stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True))
    assert [[x.name for x in g.linears] for g in weighted] == [[x.name for x in g.linears] for g in plain]
    experts = [(a, b) for a, b in zip(weighted, plain, strict=True) if a.linears[0].expert is not None]
    assert len(experts) == 8
    for a, b in experts:
        assert a.stats.tokens == b.stats.tokens
        assert a.weighted
        assert a.stats.hessian is not None
        assert not torch.allclose(a.stats.hessian, b.stats.hessian, rtol=1e-2)
        ratio = a.stats.hessian.trace() / b.stats.hessian.trace()
        assert 0.2 < float(ratio) < 5, "means, both of them"


def test_a_block_that_cannot_be_differentiated(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, flow = flow_of(toy, tmp_path)
    plain = stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True))

    def broken(*given: Any) -> Tensor:
        raise RuntimeError("derivative for scan is not implemented\nand more")

    monkeypatch.setattr(BlockModel, "traced", broken)
    found = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    assert [torch.equal(a.stats.hessian, b.stats.hessian) for a, b in zip(found, plain, strict=True)] == [True] * 4
    assert not any(group.weighted for group in found)
    told = flow.told()
    assert told == ["a block cannot be differentiated (derivative for scan is not implemented): its tokens count alike"]
    monkeypatch.setattr(BlockModel, "traced", lambda *given: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        stats.collect(model, 0, model.linears(0), flow, WEIGHTED)


@pytest.mark.parametrize("whole", [False, True])
def test_a_block_that_computes_without_gradients(
    whole: bool, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, or a part: its tokens count alike, and the report says so."""
    model, flow = flow_of(toy, tmp_path)
    plain = stats.collect(model, 0, model.linears(0), flow, Needs(hessian=True))
    part: Any = model.model.get_submodule(model.block_names[0] + ("" if whole else ".self_attn"))
    monkeypatch.setattr(part, "forward", torch.no_grad()(part.forward))
    found = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    assert [torch.equal(a.stats.hessian, b.stats.hessian) for a, b in zip(found, plain, strict=True)] == [True] * 4
    assert not any(group.weighted for group in found)
    (note,) = flow.told()
    assert note.startswith("a block cannot be differentiated (")
    assert note.endswith("q_proj computes without gradients): its tokens count alike")


def test_a_block_whose_output_is_cut_off(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, flow = flow_of(toy, tmp_path)
    whole = BlockModel.traced
    monkeypatch.setattr(BlockModel, "traced", lambda *given: whole(*given).detach())
    found = stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    assert not any(group.weighted for group in found)
    (note,) = flow.told()
    assert note.startswith("a block cannot be differentiated (")


def test_a_way_back_that_had_no_room_leaves_nothing_behind(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was kept for it must be gone before fewer rows are tried: a circle through a graph is one that no
    collector sees."""
    model, flow = flow_of(toy, tmp_path, 4)
    kept: list[weakref.ref[Kept]] = []
    left: list[int] = []
    whole, accumulate = BlockModel.traced, sums.accumulate

    def traced(*given: Any) -> Tensor:
        left.append(sum(ref() is not None for ref in kept))
        with torch.autograd.graph.saved_tensors_hooks(lambda t: Kept.of(t, kept), lambda box: box.tensor):
            return whole(*given)

    def short(*given: Any) -> None:
        monkeypatch.setattr(sums, "accumulate", accumulate)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(BlockModel, "traced", traced)
    monkeypatch.setattr(sums, "accumulate", short)
    stats.collect(model, 0, model.linears(0), flow, WEIGHTED)
    assert flow.rows == 2
    assert len(kept) > 20
    assert left == [0] * 5


@dataclass(eq=False)
class Kept:
    """What a graph keeps of one tensor."""

    tensor: Tensor

    @classmethod
    def of(cls, tensor: Tensor, all_of_them: list[weakref.ref[Kept]]) -> Kept:
        box = cls(tensor.detach())
        all_of_them.append(weakref.ref(box))
        return box


def test_the_past_by_the_same_weights(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, from the slopes that autograd gave: every fourth row is held out, and is in the Hessian too."""
    model, ours = flow_of(toy, tmp_path, 3)
    theirs = Activations(model, ours.tokens, 3, tmp_path / "theirs")
    theirs.enter()
    for i in range(len(ours)):
        noise = torch.randn(ours.states(i).shape, generator=torch.Generator().manual_seed(i))
        ours._states.put(i, ours.states(i) + 0.1 * noise)
    seen = recorded(monkeypatch)
    first = stats.collect(model, 0, model.linears(0), ours, WEIGHTED, originals=theirs)[0]
    x = torch.cat([x for x, _ in seen[first.linears[0].name]])
    each = [torch.cat([w for _, w in seen[linear.name]]) for linear in first.linears]
    w = torch.stack([w / w.mean(1, keepdim=True) for w in each]).mean(0)
    inputs: list[Tensor] = []
    model.module(first.linears[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0].double()))
    for piece in theirs.pieces():
        theirs.run(0, piece)
    off = torch.cat(inputs) - x
    past = first.stats.past
    assert past is not None
    for cross, rows in ((past.cross, slice(None)), (past.held_cross, slice(3, None, 4))):
        a, b, c = off[rows].flatten(0, 1), x[rows].flatten(0, 1), w[rows].flatten()
        assert torch.allclose(cross.double(), (a.t() * c) @ b / c.sum(), rtol=1e-3, atol=1e-5)
    assert past.share == pytest.approx(float(w[3::4].sum() / w.sum()), rel=1e-5)


RUN: dict[str, Any] = {"samples": 8, "seq_len": 48, "device": "cpu", "no_eval": True, "no_client": True}


@pytest.mark.parametrize(
    ("method", "given"),
    [
        (compress.GPTQ(3, 32), {}),
        (compress.GPTQ(8, -1, activations="token"), {"true_sequential": True}),
        (SpQR(group_size=16), {}),
        (SparseGPT(pattern="2:4"), {}),
        (compress.RTN(3, 32, quality="balanced"), {}),
    ],
)
def test_a_run(method: Any, given: dict[str, Any], toy: Path, text_file: Path, tmp_path: Path) -> None:
    """Is the same twice, and another than where tokens count alike; with quantised inputs, too."""

    def digests(name: str, method: Any) -> list[str]:
        found = compress.run(toy, method, tmp_path / name, calib=str(text_file), **RUN | given)
        assert not any("differentiated" in note for note in found.notes)
        return [r["sha256_dense"] for r in found.records]

    first = digests("a", method)
    assert first == digests("b", method)
    if any(f.name == "token_weights" for f in fields(method)):
        assert first != digests("c", replace(method, token_weights=False))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_gpu(toy: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """As on a CPU in float32 but for rounding (signs are drawn anew), and bit for bit the same a second time."""
    found = []
    for device in ("cpu", "cuda", "cuda"):
        model = BlockModel(
            Weights(Checkpoint.open(toy)), torch.float32 if device == "cpu" else dtype, torch.device(device)
        )
        tokens = torch.randint(0, 300, (64, 24), generator=torch.Generator().manual_seed(0))
        flow = Activations(model, tokens, 16, tmp_path / "spill")
        flow.enter()
        model.load(0)
        found.append(stats.collect(model, 0, model.linears(0), flow, WEIGHTED))
    for host, one, two in zip(*found, strict=True):
        assert torch.equal(one.stats.hessian, two.stats.hessian)
        apart = (one.stats.hessian.cpu() - host.stats.hessian).norm() / host.stats.hessian.norm()
        assert float(apart) < 0.1
