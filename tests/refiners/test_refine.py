"""Refining lowers the held-out error of a block's output or changes nothing; the run around it keeps every promise."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import api, flows, pipeline
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.cuda.replay import Replays
from compress.errors import CompressError
from compress.hidden import Activations
from compress.journal import Journal
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.passes.sparsegpt import SparseGPT
from compress.passes.spqr import SpQR
from compress.recipe import Recipe, make_recipe
from compress.refiners import task as refine_task
from compress.refiners.refine import Refine
from compress.refiners.task import BlockTask
from compress.report import words
from compress.types import LayerStats, Packed
from compress.weights import Weights

BITS, SIZE = 3, 16


@dataclass
class Toy:
    """Two layers with a bend between them, whose inputs are off what the original's were."""

    weights: dict[str, Tensor]
    inputs: list[Tensor]
    targets: list[Tensor]
    dtype: torch.dtype = torch.float32
    device: torch.device = torch.device("cpu")
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def piece(self, i: int) -> tuple[Tensor, Tensor]:
        return self.inputs[i], self.targets[i]

    def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        w = {**self.weights, **self.vectors, **weights}
        return torch.nn.functional.silu(inputs * w.get("gain", 1) @ w["a"].t()) @ w["b"].t()

    def repeated(self, work: Callable[..., None]) -> Callable[..., None]:
        return work


def toy(pieces: int = 12, noise: float = 0.05) -> Toy:
    g = torch.Generator().manual_seed(0)
    weights = {"a": torch.randn(48, 32, generator=g) / 6, "b": torch.randn(32, 48, generator=g) / 7}
    mix = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=g)
    clean = [torch.randn(16, 16, 32, generator=g) @ mix for _ in range(pieces)]
    made = Toy(weights, [x + noise * torch.randn(x.shape, generator=g) for x in clean], [])
    made.targets = [made.output({}, x) for x in clean]
    return made


def layers(task: Toy, method: Any = None) -> dict[str, Packed]:
    method = method or RTN(BITS, SIZE)
    return {n: method(w, LayerStats(0), torch.float32).packed for n, w in task.weights.items()}


def error(task: Toy, packed: Mapping[str, Packed], pieces: range) -> float:
    weights = {n: p.dequantize() for n, p in packed.items()}
    offs = [(task.output(weights, task.inputs[i]) - task.targets[i]).square().mean(-1) for i in pieces]
    lengths = [task.targets[i].square().mean(-1) for i in pieces]
    return float(torch.stack([(off / length).mean() for off, length in zip(offs, lengths, strict=True)]).mean())


@pytest.mark.parametrize("method", [RTN(3, 16), RTN(2, 16, symmetric=False), RTN(4, -1)])
def test_the_block_comes_nearer_to_its_output(method: Any) -> None:
    task = toy()
    before = layers(task, method)
    found = Refine(steps=120, rate=0.02).refine(before, task.weights, task, seed=0)
    held = range(11, 12)
    assert found.before == pytest.approx(error(task, before, held), rel=1e-5)
    assert found.after == pytest.approx(error(task, found.packed, held), rel=1e-5)
    assert found.after < 0.9 * found.before
    seen = range(11)
    assert error(task, found.packed, seen) < 0.92 * error(task, before, seen)
    again = Refine(steps=120, rate=0.02).refine(before, task.weights, task, seed=0)
    other = Refine(steps=120, rate=0.02).refine(before, task.weights, task, seed=1)
    tensors = [[t for p in x.packed.values() for t in p.tensors().values()] for x in (found, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(tensors[0], tensors[2], strict=True))


def test_gains_are_tuned_too() -> None:
    task = toy()
    task.vectors["gain"] = (1 + 0.3 * torch.sin(torch.arange(32.0))).bfloat16()  # the targets were made with 1
    before = layers(task)
    plain = Refine(steps=80, rate=0.02).refine(before, task.weights, task, seed=0)
    fine = Refine(steps=80, rate=0.02, norms=True, scale_rate=0.015).refine(before, task.weights, task, seed=0)
    assert plain.vectors == {}
    assert fine.vectors["gain"].dtype == torch.bfloat16
    assert fine.after < 0.9 * plain.after
    task.vectors |= fine.vectors
    assert fine.after == pytest.approx(error(task, fine.packed, range(11, 12)), rel=1e-5)


def test_what_is_worse_on_held_out_rows_is_not_kept() -> None:
    """Targets of the seen rows are nonsense, so tuning to them can only harm."""
    task = toy()
    for i in range(11):
        task.targets[i] = -5 * task.targets[i].roll(1, 0)
    before = layers(task)
    found = Refine(steps=60, rate=0.05).refine(before, task.weights, task, seed=0)
    assert found.after == found.before
    for name, packed in found.packed.items():
        assert all(torch.equal(t, before[name].tensors()[n]) for n, t in packed.tensors().items())


def test_of_one_piece_nothing_can_be_held_out() -> None:
    task = toy(pieces=1)
    before = layers(task)
    found = Refine().refine(before, task.weights, task, seed=0)
    assert found.packed == before
    assert "not refined" in found.notes[0]


def test_layers_that_cannot_be_tuned_stay() -> None:
    from compress.passes.kmeans import KMeans

    task = toy()
    before = layers(task)
    before["b"] = KMeans(bits=3)(task.weights["b"], LayerStats(9, torch.eye(48)), torch.float32).packed
    found = Refine(steps=40).refine(before, task.weights, task, seed=0)
    assert found.packed["b"] is before["b"]
    assert found.after < found.before
    assert found.notes == ("refine: 1 layers (codebook) stay as they were solved",)


@pytest.mark.parametrize("given", [{"steps": 0}, {"rate": 2.0}, {"held_out": 0.9}, {"looks": 0}, {"scale_rate": -1.0}])
def test_settings_out_of_range(given: dict[str, Any]) -> None:
    with pytest.raises(CompressError, match=next(iter(given))):
        Refine(**given)


# --- a block as a function of its weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_block_with_other_weights(
    family: str, tmp_path: Path, tokenizer: Any, make_model: Callable[..., Path]
) -> None:
    """The same output as with those weights in place, and its gradient is that of finite differences."""
    from transformers import GPT2Config, LlamaConfig, Qwen3MoeConfig

    heads = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads |= {"num_key_value_heads": 2, "intermediate_size": 48, "bos_token_id": 0, "eos_token_id": 0}
    config = {
        "llama": lambda: LlamaConfig(**heads),
        "gpt2": lambda: GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **heads, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8
        ),
    }[family]()
    model = BlockModel(
        Weights(Checkpoint.open(make_model(config, tmp_path / family, tokenizer))), torch.float32, torch.device("cpu")
    )
    states = model.embed(torch.randint(0, len(tokenizer), (2, 12)))
    model.load(0)
    linears = model.linears(0)
    g = torch.Generator().manual_seed(0)
    others = [(x, model.weight(x) + 0.01 * torch.randn(x.shape, generator=g)) for x in linears]
    leaves = [(x, w.detach().clone().requires_grad_()) for x, w in others]
    made = model.output(0, states, (2, 12), leaves)
    direction = torch.randn(made.shape, generator=g)
    slopes = torch.autograd.grad((made * direction).sum(), [w for _, w in leaves])
    for linear, weight in others:
        model.set_weight(linear, weight)
    assert torch.allclose(model.run(0, states, (2, 12)), made, atol=1e-5)
    linear, weight = others[-1]
    bump = torch.randn(linear.shape, generator=g) * 1e-3
    model.set_weight(linear, weight + bump)
    rise = ((model.run(0, states, (2, 12)) - made) * direction).sum()
    assert float(rise.detach()) == pytest.approx(float((slopes[-1] * bump).sum()), rel=0.05, abs=1e-3)


# --- runs

RUN: dict[str, Any] = {"samples": 8, "seq_len": 48, "device": "cpu", "no_eval": True, "no_client": True}


QUICK = {"steps": 12, "rate": 0.012}  # of a model of noise on few rows: more would learn the rows


def best(refine: Any = QUICK, **given: Any) -> Recipe:
    return make_recipe(
        {"steps": [{"gptq": {"bits": 3, "group_size": 32, "quality": "best", **given}}, {"refine": refine}]}, "r", "r"
    )


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "batch_rows", lambda *given: 2)


def test_a_run_at_best_quality(toy_run: Callable[..., Any], small_batches: None) -> None:
    """Every layer is refined, read back and verified; the record says by how much; twice the same bytes."""
    plain = toy_run(GPTQ(3, 32), "plain", samples=32)
    fine = toy_run(best(), "fine", samples=32)
    again = toy_run(best(), "again", samples=32)
    assert {r["name"] for r in fine.records} == {r["name"] for r in plain.records}
    shares = [r["figures"]["refined"] for r in fine.records]
    assert all(0 < share <= 1 for share in shares)
    assert min(shares) < 0.99
    assert fine.proof.layers == len(fine.records)
    assert [r["sha256_dense"] for r in fine.records] == [r["sha256_dense"] for r in again.records]
    assert [r["sha256_dense"] for r in fine.records] != [r["sha256_dense"] for r in plain.records]
    assert fine.seconds["refine"] > 0
    (line,) = [x for x in words(fine) if x.startswith("refined")]
    assert f"{sum(shares) / len(shares):.1%}" in line
    assert not any(x.startswith("refined") for x in words(plain))


def test_a_step_takes_no_more_tokens_where_more_go_through_a_block(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches are larger where a model is narrow; a step stays what its rate is for."""
    monkeypatch.setattr(refine_task, "TOKENS", 2 * 24)
    model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 200, (9, 24), generator=torch.Generator().manual_seed(0))
    for size, pieces in ((8, [2, 2, 2, 2, 1]), (1, [1] * 9)):
        inputs, targets = (Activations(model, tokens, size, tmp_path / name) for name in "ab")
        inputs.enter()
        targets.enter()
        task = BlockTask(model, {0: model.linears(0)}, inputs, targets)
        found = [task.piece(i) for i in range(len(task))]
        assert [len(x) for x, _ in found] == pieces
        assert all(torch.equal(x, y) for x, y in found)
        assert torch.equal(torch.cat([x for x, _ in found]), torch.cat(list(inputs.pieces())))


def test_targets_are_the_original_models(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_batches: None
) -> None:
    """What a refiner is given: the compressed model's inputs, the original's outputs, of the same rows."""
    seen: list[tuple[Tensor, Tensor]] = []
    whole = Refine.refine

    def watched(self: Any, layers: Any, weights: Any, task: Any, seed: int) -> Any:
        seen.append(tuple(torch.cat([task.piece(i)[k] for i in range(len(task))]) for k in (0, 1)))
        return whole(self, layers, weights, task, seed)

    monkeypatch.setattr(Refine, "refine", watched)
    result = compress.run(toy, best(), tmp_path / "out", calib=str(text_file), dtype="float32", **RUN)
    model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, torch.device("cpu"))
    rows = result.job.rows.tokens
    flow = Activations(model, rows, 8, tmp_path / "spill")
    flow.enter()
    assert torch.allclose(seen[0][0], flow.states(0), atol=1e-5)
    for block in range(len(model.block_names)):
        model.load(block)
        flow.advance(block)
        assert torch.allclose(seen[block][1], flow.states(0), atol=1e-4)
        assert block == 0 or not torch.allclose(seen[block][0], seen[block - 1][1], atol=1e-4)


@pytest.mark.parametrize(("step", "window"), [(4, 1), (7, 1), (8, 2), (9, 3)])
def test_a_killed_run_goes_on_to_the_same_bytes(
    toy: Path, text_file: Path, tmp_path: Path, step: int, window: int, small_batches: None
) -> None:
    """Also where some of the blocks that were refined together are written, and others not."""

    def go(out: Path) -> Any:
        return compress.run(toy, best(QUICK | {"window": window}), out, calib=str(text_file), **RUN)

    expected = go(tmp_path / "a")
    child = os.fork()
    if child == 0:
        replaced, count = os.replace, [0]

        def counting(source: Any, target: Any) -> None:
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), signal.SIGKILL)
            replaced(source, target)

        os.replace = counting
        try:
            go(tmp_path / "b")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found = go(tmp_path / "b")
    assert 0 < found.resumed < 4
    assert found.resumed % window == 0
    assert [r["sha256_dense"] for r in found.records] == [r["sha256_dense"] for r in expected.records]


def test_blocks_that_are_refined_together(toy: Path, toy_run: Callable[..., Any], small_batches: None) -> None:
    """The first of a pair is tuned to what the second makes of it: both have the pair's share of error, and the second
    was solved on what the first's solved codes let through."""
    seen: list[set[str]] = []
    whole = Refine.refine

    def watched(self: Refine, layers: Any, weights: Any, task: Any, seed: int) -> Any:
        seen.append({name.split(".")[2] for name in layers})
        assert len(task.vectors) == 2 * len(seen[-1])  # two norms a block
        found = whole(self, layers, weights, task, seed)
        assert found.packed.keys() == layers.keys()
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Refine, "refine", watched)
        pairs = toy_run(best(QUICK | {"window": 2}), "pairs")
        threes = toy_run(best(QUICK | {"window": 3}), "threes")
    assert seen == [{"0", "1"}, {"2", "3"}, {"0", "1", "2"}, {"3"}]
    for found, size in ((pairs, 2), (threes, 3)):
        by_window: dict[int, set[float]] = {}
        for r in found.records:
            by_window.setdefault(int(r["name"].split(".")[2]) // size, set()).add(r["figures"]["refined"])
        assert all(len(shares) == 1 for shares in by_window.values())
    alone = toy_run(best(), "alone")
    assert [r["sha256_dense"] for r in pairs.records] != [r["sha256_dense"] for r in alone.records]


def test_a_run_that_tunes_norms(toy: Path, toy_run: Callable[..., Any], small_batches: None, tmp_path: Path) -> None:
    """They are stored as the original's were, read back, verified, and what the next block sees."""
    steps = [{"gptq": {"bits": 2, "group_size": 32, "quality": "best"}}, {"refine": {"steps": 12, "norms": True}}]
    found = toy_run(make_recipe({"steps": steps}, "r", "r"), "norms", samples=32)
    gains = [n for n in found.changed if "norm" in n]
    assert gains
    written, original = Checkpoint.open(tmp_path / "norms"), Checkpoint.open(toy)
    assert all(written.read(n).dtype == original.read(n).dtype for n in gains)
    assert any(not torch.equal(written.read(n), original.read(n)) for n in gains)


def test_tuned_norms_are_written_in_the_models_order(
    toy_run: Callable[..., Any], small_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not in that of a set of strings, which differs from run to run: a large model's files would, too."""
    order: list[list[str]] = []
    store = Journal.store

    def watched(self: Any, block: int, tensors: dict[str, Tensor]) -> str:
        order.append([n for n in tensors if n.endswith("norm.weight")])
        return store(self, block, tensors)

    monkeypatch.setattr(Journal, "store", watched)
    steps = [{"gptq": {"bits": 2, "group_size": 32, "quality": "best"}}, {"refine": {"steps": 12, "norms": True}}]
    toy_run(make_recipe({"steps": steps}, "r", "r"), "norms", samples=32)
    both = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    found = [[n.partition("layers.")[2].partition(".")[2] for n in names] for names in order]
    assert both in found
    assert all(names in ([], both) for names in found)


def test_packed_experts_of_a_window_feed_the_next_block(
    tmp_path: Path,
    tokenizer: Any,
    make_model: Callable[..., Path],
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_batches: None,
) -> None:
    """With their 8-bit inputs, as the file is read: not only those of the window's first block."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, head_dim=8,
    )  # fmt: skip
    source = make_model(config, tmp_path / "moe", tokenizer)
    begun: list[flows.Flows] = []
    seen: dict[int, Tensor] = {}
    start, advance = flows.start_flows, Activations.advance

    def starting(*given: Any) -> flows.Flows:
        begun.append(start(*given))
        return begun[-1]

    def advancing(self: Activations, block: int) -> None:
        advance(self, block)
        if self is begun[-1].compressed:
            seen[block] = self.states(0).clone()

    monkeypatch.setattr(pipeline, "start_flows", starting)
    monkeypatch.setattr(Activations, "advance", advancing)
    eight = {"bits": 8, "group_size": -1, "activations": "token", "layers": ["*experts*"]}
    steps = [{"gptq": eight}, {"gptq": {"bits": 3, "group_size": 16, "quality": "best"}}, {"refine": {"window": 2}}]
    recipe = make_recipe({"steps": steps}, "r", "r")
    result = compress.run(source, recipe, tmp_path / "out", calib=str(text_file), format="native", **RUN)
    model = BlockModel(Weights(Checkpoint.open(tmp_path / "out")), torch.float32, torch.device("cpu"))
    flow = Activations(model, result.job.rows.tokens, 2, tmp_path / "spill")
    flow.enter()
    for block in (0, 1):
        model.load(block)
        advance(flow, block)
        assert torch.equal(flow.states(0), seen[block])
        model.free(block)


def test_an_expert_that_no_token_of_a_piece_reaches() -> None:
    class Half(Toy):
        def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
            return inputs @ weights["a"].t()

    whole = toy()
    task = Half(whole.weights, whole.inputs, [x @ whole.weights["a"].t() for x in whole.inputs])
    before = layers(task)
    found = Refine(steps=40).refine(before, task.weights, task, seed=0)
    assert found.after < found.before
    assert torch.equal(found.packed["b"].tensors()["codes"], before["b"].tensors()["codes"])


def test_what_the_original_had_no_memory_for_is_told(toy: Path, tmp_path: Path) -> None:
    model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, torch.device("cpu"))
    rows = torch.zeros(4, 8, dtype=torch.int64)
    both = flows.Flows(*(Activations(model, rows, 4, tmp_path / name) for name in "ab"), None)
    assert both.original is not None
    tries = iter([torch.OutOfMemoryError("CUDA out of memory."), None])

    def work() -> None:
        error = next(tries)
        if error is not None:
            raise error

    both.original.within(work)
    count, notes = both.told()
    assert count == 4
    assert notes == ["out of device memory with 4 rows at once: 2 from there on"]
    assert both.told()[1] == []


def test_out_of_memory_refines_with_fewer_rows(
    toy: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = BlockModel.output

    def small(self: Any, block: int, hidden: Tensor, *rest: Any) -> Tensor:
        if len(hidden) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return output(self, block, hidden, *rest)

    closed: list[int] = []
    monkeypatch.setattr(BlockModel, "output", small)
    monkeypatch.setattr(Replays, "close", lambda self: closed.append(1))
    result = compress.run(toy, best(), tmp_path / "out", calib=str(text_file), **RUN)
    assert len(closed) >= 1 + 2  # what graphs have is given back before it is tried again; two flows end
    assert any("out of device memory" in note for note in result.notes)
    assert all("refined" in r["figures"] for r in result.records)


def test_blocks_with_quantised_activations_are_not_refined(
    toy: Path, text_file: Path, tmp_path: Path, small_batches: None
) -> None:
    method = GPTQ(8, -1, activations="token", quality="best")
    result = compress.run(toy, method, tmp_path / "out", calib=str(text_file), **RUN)
    assert any("not refined" in note for note in result.notes)


@pytest.fixture
def toy_run(toy: Path, text_file: Path, tmp_path: Path) -> Callable[..., Any]:
    return lambda method, name, **more: compress.run(
        toy, method, tmp_path / name, calib=str(text_file), **{**RUN, **more}
    )


# --- recipes


def test_what_auto_is() -> None:
    """Best where it is worth its time, or where a recipe says how to refine; balanced elsewhere, and where a paper's
    own method is asked for."""

    def quality(recipe: Recipe, room: bool) -> str:
        method: Any = recipe.settled(room).passes[0]
        return str(method.quality)

    for method in (GPTQ(3), SparseGPT(pattern="2:4"), SparseGPT(pattern="2:4", bits=4), SpQR()):
        assert [quality(Recipe.of(method), room) for room in (False, True)] == ["balanced", "best"]
        assert Recipe.of(method).settled(room=True).refiner == Refine()
        assert Recipe.of(method).settled(room=False).refiner is None
    plain = GPTQ(3, refit=False), GPTQ(3, descent=0), GPTQ(3, scale_search=False), GPTQ(3, reference="obq")
    for method in (*plain, GPTQ(8), GPTQ(5), SparseGPT(method="wanda"), SparseGPT(refit=False), SpQR(bits=5)):
        assert quality(Recipe.of(method), room=True) == "balanced"
    for given in ("fast", "balanced", "best"):
        assert quality(Recipe.of(GPTQ(3, quality=given)), room=given != "best") == given
    assert quality(make_recipe({"steps": [{"gptq": {"bits": 3}}, {"refine": QUICK}]}, "r", "r"), room=False) == "best"
    assert Recipe.of(RTN(4)).settled(room=True) == Recipe.of(RTN(4))


def test_what_a_recipe_says_of_refining() -> None:
    assert Recipe.of(GPTQ(3)).refiner is None
    assert Recipe.of(GPTQ(3, quality="best")).refiner == Refine()
    assert best().refiner == Refine(**QUICK)
    assert best().as_json()["steps"][1] == {"name": "refine", **vars(Refine(**QUICK))}
    for steps, says in (
        ([{"gptq": {"quality": "balanced"}}, "refine"], "nothing to tune"),
        ([{"gptq": {"quality": "best"}}, "refine", "refine"], "2 steps tune"),
        ([{"gptq": {"quality": "best"}}, {"refine": {"layers": "x"}}], "whole blocks"),
        (["refine"], "no step rounds"),
        ([{"gptq": {"quality": "better"}}], "quality"),
    ):
        with pytest.raises(CompressError, match=says):
            make_recipe({"steps": steps}, "r", "r")


def test_what_the_command_line_says_of_refining() -> None:
    """`--refine` is the recipe's step, and a wish for best as that is."""
    cpu = torch.device("cpu")

    def made(method: Any, refine: str, **more: Any) -> Recipe:
        return api.settled(Recipe.of(method), cpu, compress.Options(refine=refine, **more))

    once = made(GPTQ(3), "steps=7 norms=true window=2")
    assert once.refiner == Refine(steps=7, norms=True, window=2)
    assert once == make_recipe(
        {"steps": [{"refine": vars(once.refiner)}, {"gptq": {"bits": 3, "quality": "best"}}]}, "gptq", "r"
    )
    assert made(once, "steps=7 norms=true window=2") == once
    given = make_recipe({"steps": [{"gptq": {"bits": 3}}], "options": {"refine": "steps=5"}}, "r", "r")
    assert api.settled(given, cpu, compress.Options()).refiner == Refine(steps=5)
    assert api.settled(given, cpu, compress.Options(refine="steps=6")).refiner == Refine(steps=6)
    for method, refine, says in (
        (GPTQ(8), "steps=7", "nothing of gptq is refined"),
        (GPTQ(3, quality="balanced"), "steps=7", "nothing of gptq is refined"),
        (RTN(4), "steps=7", "nothing of rtn is refined"),
        (once, "steps=8", "has a step refine"),
        (GPTQ(3), "stepz=7", "has no setting 'stepz'"),
        (GPTQ(3), "steps", "'steps' is no setting"),
        (GPTQ(3), "steps=0", "steps"),
    ):
        with pytest.raises(CompressError, match=says):
            made(method, refine)
