"""Hessians against a plain float64 sum of what a hook on each layer saw."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.hidden import Activations
from compress.stats import collect
from compress.types import Needs
from compress.weights import Weights


def flow_of(folder: Path, tmp_path: Path, size: int = 3) -> tuple[BlockModel, Activations]:
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 300, (8, 24), generator=torch.Generator().manual_seed(0))
    flow = Activations(model, tokens, size, tmp_path / "spill")
    flow.enter()
    model.load(0)
    return model, flow


def test_every_hessian_is_the_mean_outer_product(toy: Path, tmp_path: Path) -> None:
    model, flow = flow_of(toy, tmp_path)
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for linear in model.linears(0):
        module = model.model.get_submodule(linear.param.removesuffix(".weight"))
        store = seen.setdefault(linear.name, [])
        handles.append(
            module.register_forward_pre_hook(lambda m, a, store=store: store.append(a[0].flatten(0, 1).double()))
        )
    for states in flow.pieces():
        flow.run(0, states)
    for handle in handles:
        handle.remove()
    groups = collect(model, 0, model.linears(0), flow, Needs(hessian=True))
    assert [len(g.linears) for g in groups] == [3, 1, 2, 1], "q k v share, gate and up share"
    for group in groups:
        assert group.stats.tokens == 8 * 24
        assert group.stats.hessian is not None
        for linear in group.linears:
            x = torch.cat(seen[linear.name])
            assert torch.allclose(group.stats.hessian.double(), x.t() @ x / len(x), rtol=1e-4, atol=1e-6)


def test_batch_size_changes_rounding_only(toy: Path, tmp_path: Path) -> None:
    results = []
    for size in (1, 8):
        model, flow = flow_of(toy, tmp_path, size)
        results.append(collect(model, 0, model.linears(0), flow, Needs(hessian=True)))
    for a, b in zip(*results, strict=True):
        assert a.stats.hessian is not None
        assert b.stats.hessian is not None
        assert torch.allclose(a.stats.hessian, b.stats.hessian, rtol=1e-4, atol=1e-6)


def test_experts_see_their_own_tokens(tmp_path: Path, four_experts: Path) -> None:
    """The Hessian of each expert is that of the tokens its router sent, found here by hand."""
    model, flow = flow_of(four_experts, tmp_path)
    block = model.model.get_submodule(model.block_names[0])
    inputs: list[torch.Tensor] = []
    handle = block.mlp.register_forward_pre_hook(lambda m, a: inputs.append(a[0].flatten(0, 1)))
    groups = collect(model, 0, model.linears(0), flow, Needs(hessian=True))
    handle.remove()
    x = torch.cat(inputs)
    chosen = (x @ block.mlp.gate.weight.t()).softmax(-1).topk(2).indices
    for group in groups:
        expert = group.linears[0].expert
        if expert is None:
            continue
        mine = x[(chosen == expert).any(1)]
        assert group.stats.tokens == len(mine)
        if group.linears[0].shape[1] == 32:
            assert [n.name.rpartition(".")[2] for n in group.linears] == ["gate_proj", "up_proj"]
            assert group.stats.hessian is not None
            assert torch.allclose(group.stats.hessian, mine.t() @ mine / len(mine), rtol=1e-3, atol=1e-6)


def test_overflowing_activation_names_the_layer(toy: Path, tmp_path: Path) -> None:
    model, flow = flow_of(toy, tmp_path)
    norm = model.model.get_parameter("model.layers.0.post_attention_layernorm.weight")
    norm.data.fill_(1e25)
    with pytest.raises(CompressError, match=r"gate_proj.*NaN or infinity"):
        collect(model, 0, model.linears(0), flow, Needs(hessian=True))


def seen_by_transformers(toy: Path, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What enters every linear layer of the whole model, by module name."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toy, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, args, n=name: seen.__setitem__(n, args[0].flatten(0, 1)))
    with torch.no_grad():
        model(rows)
    return seen


def test_ranges_and_shares(toy: Path, tmp_path: Path) -> None:
    """Largest and mean magnitude, mean, and the share of tokens above a threshold, over batches of unequal size."""
    rows = torch.randint(0, 300, (5, 24), generator=torch.Generator().manual_seed(2))
    model = BlockModel(Weights(Checkpoint.open(toy)), torch.float32, torch.device("cpu"))
    flow = Activations(model, rows, 2, tmp_path / "spill")
    flow.enter()
    model.load(0)
    groups = collect(model, 0, model.linears(0), flow, Needs(ranges=True, above=1.5))
    seen = seen_by_transformers(toy, rows)
    assert sum(len(g.linears) for g in groups) == 7
    for group in groups:
        x = seen[group.linears[0].param.removesuffix(".weight")]
        s = group.stats
        assert s.hessian is None
        assert s.tokens == len(x) == 120
        for found, wanted in (
            (s.absmax, x.abs().amax(0)),
            (s.mean_abs, x.abs().mean(0)),
            (s.mean, x.mean(0)),
            (s.above, (x.abs() >= 1.5).float().mean(0)),
        ):
            assert found is not None
            assert torch.allclose(found, wanted, atol=1e-5)


def test_survey_looks_at_every_block_before_the_first_is_compressed(toy: Path, text_file: Path, tmp_path: Path) -> None:
    from compress.api import make_job
    from compress.formats import FORMATS
    from compress.job import Clock
    from compress.options import Options
    from compress.passes.int8 import Int8
    from compress.pipeline import open_model
    from compress.plan import make_plan
    from compress.recipe import Recipe
    from compress.solve import survey_model

    options = Options(out=tmp_path / "out", calib=str(text_file), samples=3, seq_len=24, no_eval=True, device="cpu")
    job = make_job(str(toy), Int8(threshold=1.5, rule="paper"), options)
    _, model = open_model(job)
    plan = make_plan(model, Recipe.of(Int8(threshold=1.5, rule="paper")), FORMATS["native"])
    assert job.rows is not None
    rows = job.rows.tokens
    flow = Activations(model, rows, 2, tmp_path / "spill")
    flow.enter()
    first = flow.states(0).clone()
    survey = survey_model(model, plan, flow, Clock())
    assert torch.equal(flow.states(0), first), "the run starts from the embeddings again"
    seen = seen_by_transformers(toy, rows)
    assert len(survey) == 28
    for name, spread in survey.items():
        role = name.split(".", 3)[3]
        wanted = [(seen[f"model.layers.{i}.{role}"].abs() >= 1.5).float().mean(0) for i in range(4)]
        assert torch.allclose(spread, torch.stack(wanted), atol=1e-5)


def test_needs_add_up() -> None:
    both = Needs(hessian=True) | Needs(above=6.0, survey=True)
    assert both == Needs(hessian=True, above=6.0, survey=True)
    assert both
    assert not Needs()
    with pytest.raises(ValueError, match="one threshold"):
        Needs(above=6.0) | Needs(above=3.0)
