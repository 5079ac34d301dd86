"""`compress auto`: what layers may get, what is measured, what is kept, and what is written."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import api, cli
from compress.auto import measure as measuring
from compress.auto import run
from compress.auto.asked import Ask
from compress.auto.candidates import Field, _ties, survey
from compress.auto.forks import Variants
from compress.auto.measure import forks_of, solved
from compress.auto.run import Outcome, auto
from compress.auto.store import Store
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.flows import start_flows
from compress.options import Options
from compress.passes.gptq import GPTQ
from compress.pipeline import open_model
from compress.recipe import read_recipe
from compress.stats import collect
from compress.verify import check_hashes

pytestmark = pytest.mark.xdist_group("auto")  # else each worker would measure

BITS, GROUPS = "2,3,4", "32,64"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    short = tmp_path_factory.mktemp("text") / "short.txt"
    short.write_text(text_file.read_text()[:20000])
    return short


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measurements that the tests of this module share."""
    return tmp_path_factory.mktemp("kept") / "measured"


def options(text: Path, out: Path, **more: Any) -> Options:
    return Options(out=out, calib=str(text), eval=str(text), samples=8, seq_len=64, no_eval=True, **more)


def ask(kept: Path | None = None, **more: Any) -> Ask:
    given = {"bits": BITS, "group_size": GROUPS, "probes": 2, "probe_len": 32, "measured": kept}
    return Ask(**{"avg_bits": 3.5, **given, **more})


@pytest.fixture(scope="module")
def outcome(toy: Path, text: Path, kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return auto(str(toy), ask(kept), options(text, tmp_path_factory.mktemp("out") / "out"))


def field_of(model: Path, asked: Ask, **more: Any) -> Field:
    job = api.make_job(str(model), GPTQ(), Options(no_eval=True, **more), dry=True)
    return survey(open_model(job)[1], job, asked, more.get("format", "auto"))


# --- what is written


def test_written_bits_are_those_promised(outcome: Outcome) -> None:
    assert outcome.result is not None
    stored = sum(record["bytes"] for record in outcome.result.records)
    weights = sum(r["shape"][0] * r["shape"][1] for r in outcome.result.records)
    assert stored == outcome.allocation.size
    assert 3.3 < 8 * stored / weights == outcome.bits <= 3.5
    settings = {(r["method"], r["bits_per_weight"]) for r in outcome.result.records}
    assert len(settings) > 1


def test_folder_is_an_ordinary_checkpoint_with_its_recipe(
    outcome: Outcome, toy: Path, text: Path, tmp_path: Path
) -> None:
    out = outcome.job.out
    assert check_hashes(out) > 0, "recipe.yaml is among the files that are checked"
    recipe = compress.read_recipe(out / "recipe.yaml")
    assert recipe.steps == outcome.recipe.steps
    assert "auto: at most 3.5 bits a weight" in (out / "README.md").read_text()
    assert recipe.options["calib"] == text.name, "no folder names in what may be published"
    again = compress.run(toy, recipe, tmp_path / "again", calib=str(text), no_eval=True)
    first, second = Checkpoint.open(out), Checkpoint.open(again.job.out)
    assert list(first.tensors) == list(second.tensors)
    assert all(torch.equal(first.read(name), second.read(name)) for name in first.tensors)


def test_prediction_is_no_worse_than_any_uniform_setting_that_fits(outcome: Outcome) -> None:
    for c in range(len(outcome.field.candidates)):
        size = sum(group.sizes[c] or 0 for group in outcome.field.groups)
        if size <= outcome.budget:
            assert outcome.allocation.cost <= math.fsum(row[c] for row in outcome.costs) * (1 + 1e-9)


def test_size_of_the_files_is_never_exceeded(toy: Path, text: Path, kept: Path, tmp_path: Path) -> None:
    size = sum(f.stat().st_size for f in toy.glob("*.safetensors"))
    asked = ask(kept, avg_bits=None, max_size=f"{int(size * 0.42)}B")
    found = auto(str(toy), asked, options(text, tmp_path / "out"))
    written = sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))
    assert 0.85 * asked.bytes() < written <= asked.bytes()
    assert found.result is not None


def test_what_is_chosen_is_refined(toy: Path, text: Path, kept: Path, tmp_path: Path) -> None:
    """With --refine, and again by the recipe that it leaves."""
    found = auto(str(toy), ask(kept), options(text, tmp_path / "out", refine="steps=2"))
    assert found.result is not None
    assert any("refined" in record["figures"] for record in found.result.records)
    recipe = read_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe.options["refine"] == "steps=2"
    job = api.make_job(str(toy), recipe, Options(no_eval=True), dry=True)
    assert job.recipe.refiner == found.result.job.recipe.refiner
    assert job.recipe.refiner is not None


def test_dry_run_writes_no_checkpoint(toy: Path, text: Path, kept: Path, tmp_path: Path) -> None:
    found = auto(str(toy), ask(kept, avg_bits=4.0), options(text, tmp_path / "out"), dry=True)
    assert found.result is None
    assert list(tmp_path.iterdir()) == []


# --- what is measured


def test_losses_are_the_pass_own(outcome: Outcome, toy: Path) -> None:
    """Of every layer and candidate, in a block whose inputs no rounding has reached."""
    job = replace(outcome.job, rows=outcome.job.rows)
    model = open_model(job)[1]
    flow = start_flows(model, run.make_plan(job, model), job, Path("unused"), None).compressed
    assert flow is not None
    flow.enter()
    model.load(0)
    known = Store(outcome.measured).losses(0)
    for group in collect(model, 0, model.linears(0), flow, GPTQ().needs):
        for candidate in outcome.field.candidates:
            for linear in group.linears:
                alone = candidate.method(model.weight(linear), group.stats, torch.bfloat16)
                found = known[linear.name][candidate.key]
                assert found["loss"] / found["norm"] == pytest.approx(
                    float(alone.row_loss.sum() / alone.row_norm.sum()), rel=1e-4
                )
                ((_, packed, *_),) = solved(model, candidate.method, [linear], group.stats, torch.bfloat16)
                assert torch.equal(packed.dequantize(), alone.packed.dequantize())


def test_divergence_is_that_of_the_whole_model_with_one_group_rounded(
    outcome: Outcome, toy: Path, tmp_path: Path
) -> None:
    """The fork's shortcut against two runs from the embeddings to the logits; 0 for what is not changed."""
    assert outcome.job.rows is not None
    tokens = outcome.job.rows.tokens[:2, :32]
    model = open_model(outcome.job)[1]
    linear = model.linears(1)[4]
    with torch.no_grad():
        model.embed(tokens)
        for block in range(4):
            model.load(block)
        rounded = (model.weight(linear) * 4).round() / 4
        variants = Variants(model, tokens, 3, tmp_path / "spill")
        variants.enter()
        for block in range(4):
            forks = {1: [[(linear, model.weight(linear).clone())], [(linear, rounded)]], 3: [[]]}
            variants.advance(block, forks.get(block, []))
        same, changed, none = variants.divergences()
        variants.close()
        logits = []
        for weight in (model.weight(linear).clone(), rounded):
            model.set_weight(linear, weight)
            states = model.embed(tokens)
            for block in range(4):
                states = model.run(block, states, (2, 32))
            logits.append(torch.log_softmax(model.logits(states, tokens), -1))
    assert same == 0 == none
    assert changed > 1e-6
    expected = ((logits[0] - logits[1]) * logits[0].exp()).sum(-1).double().mean()
    assert changed == pytest.approx(float(expected), rel=1e-4)


def test_head_alone(toy: Path, text: Path, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = make_model(config, tmp_path / "model", tokenizer)
    found = auto(
        str(model), ask(bits="3,8", group_size="64", avg_bits=5.0), options(text, tmp_path / "out", lm_head=True)
    )
    head = next(g for g in found.field.groups if g.linears[0].head)
    assert head.block == 1
    assert Store(found.measured).divergences()[head.key]["3g64"] > 1e-5
    assert found.result is not None
    assert any(r["name"] == "lm_head" for r in found.result.records)
    with pytest.raises(CompressError, match="tied"):
        auto(str(toy), ask(), options(text, tmp_path / "tied", lm_head=True))


def test_another_budget_measures_nothing(
    outcome: Outcome, toy: Path, text: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "solved", lambda *given: pytest.fail("solved again"))
    monkeypatch.setattr(measuring, "Variants", lambda *given: pytest.fail("walked again"))
    low, high = (
        auto(str(toy), ask(kept, avg_bits=bits), options(text, tmp_path / "out"), dry=True) for bits in (3.0, 4.3)
    )
    assert low.allocation.cost > outcome.allocation.cost > high.allocation.cost


def test_a_stopped_measurement_goes_on(
    outcome: Outcome, toy: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in block 2: blocks 0 and 1 are not solved again, and the figures are those of one go."""
    calls: list[int] = []
    stop = [True]
    real, folder = measuring._solved_block, tmp_path / "measured"

    def stopping(work: Any, block: int, wanted: Any, forks: Any) -> Any:
        if block == 2 and stop:
            stop.clear()
            raise KeyboardInterrupt
        if wanted:
            calls.append(block)
        return real(work, block, wanted, forks)

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_solved_block", stopping)
        with pytest.raises(KeyboardInterrupt):
            auto(str(toy), ask(folder), options(text, tmp_path / "out"), dry=True)
    assert calls == [0, 1]
    assert (folder / "block-00001.json").exists()
    assert (folder / "block-00001.safetensors").exists()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_solved_block", stopping)
        found = auto(str(toy), ask(folder), options(text, tmp_path / "out"), dry=True)
    assert calls == [0, 1, 2, 3]
    for mine, whole in zip(found.costs, outcome.costs, strict=True):
        assert mine == pytest.approx(whole, rel=1e-9)
    assert not list(folder.glob("*.safetensors")), "what only the divergences needed is gone"
    with pytest.raises(CompressError, match="measured with other calibration"):
        auto(str(toy), ask(folder), replace(options(text, tmp_path / "out"), samples=7), dry=True)


def test_sensitivity_loss_needs_no_forks(
    toy: Path, text: Path, kept: Path, outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "Variants", lambda *given: pytest.fail("walked again"))
    found = auto(str(toy), ask(kept, sensitivity="loss"), options(text, tmp_path / "out"), dry=True)
    known = Store(kept).losses(0)["model.layers.0.mlp.up_proj"]["3g64"]
    row = next(i for i, g in enumerate(found.field.groups) if g.key == "model.layers.0.mlp.up_proj")
    column = [c.key for c in found.field.candidates].index("3g64")
    assert found.costs[row][column] == pytest.approx(known["loss"] / known["norm"])


def test_rtn_needs_rows_for_divergences_alone(toy: Path, text: Path, tmp_path: Path) -> None:
    found = auto(
        str(toy), ask(method="rtn", bits="3,4", group_size="64", avg_bits=3.7), options(text, tmp_path / "out")
    )
    assert found.result is not None
    assert found.job.rows is None
    assert {r["method"] for r in found.result.records} == {"rtn"}


# --- what may be chosen


def test_servers_get_tied_layers(toy: Path, text: Path, tmp_path: Path) -> None:
    asked = ask(bits="3,4,8", group_size="32,64", avg_bits=5.0)
    field = field_of(toy, asked, target="vllm")
    assert {c.key for c in field.candidates} == {"4g64", "4g32", "8g64", "8g32"}
    assert any("kernels for 4 and 8 bits, not 3" in note for note in field.notes)
    assert [g.kind for g in field.groups[:4]] == [
        "self_attn.q_proj + self_attn.k_proj + self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj + mlp.up_proj", "mlp.down_proj",
    ]  # fmt: skip
    assert len(field_of(toy, asked).groups) == 4 * 7
    found = auto(str(toy), asked, options(text, tmp_path / "out", target="vllm"))
    assert found.result is not None
    bits = {r["name"]: r["bits_per_weight"] for r in found.result.records}
    for block in range(4):
        mlp = f"model.layers.{block}.mlp."
        assert bits[mlp + "gate_proj"] == bits[mlp + "up_proj"]
    counted = [len(group.linears) for group in found.field.groups]
    assert sum(counted) == 4 * 7
    assert counted[:4] == [3, 1, 2, 1]


def test_experts_of_a_projection_are_one(make_model: Any, tokenizer: Any, text: Path, tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32, vocab_size=320, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = make_model(config, tmp_path / "moe", tokenizer)
    asked = ask(bits="3,4", group_size="32", avg_bits=4.5)
    sizes = [len(group.linears) for group in field_of(model, asked, format="native").groups]
    assert sorted(sizes) == [1, 1, 1, 1, 4, 8], "gate and up lie in one parameter, down in another"
    job = api.make_job(str(model), GPTQ(), Options(no_eval=True), dry=True)
    assert sorted(map(len, _ties(open_model(job)[1].linears(0), "vllm"))) == [1, 3, 12], "a server runs them as one"
    with pytest.raises(CompressError, match="compressed-tensors cannot say which of several settings the experts have"):
        field_of(model, asked)
    found = auto(str(model), asked, options(text, tmp_path / "out", format="native"))
    assert found.result is not None
    assert {p for step in found.recipe.steps for p in step.where.layers if "experts" in p} == {
        f"model.layers.0.mlp.experts.*.{part}_proj" for part in ("gate", "up", "down")
    }
    assert len(found.result.records) == 4 + 12


def test_layers_left_out_stay_dense(toy: Path, text: Path, tmp_path: Path) -> None:
    asked = ask(bits="3,4", group_size="64")
    field = field_of(toy, asked, exclude=("*.down_proj",), blocks="1-2")
    assert len(field.groups) == 2 * 6
    with pytest.raises(CompressError, match="matches none"):
        field_of(toy, asked, include=("nothing",))
    given = options(text, tmp_path / "out", exclude=("*.down_proj",), blocks="1-2", low_memory=True)
    found = auto(str(toy), asked, given)
    assert found.result is not None
    assert {r["name"].split(".")[2] for r in found.result.records} == {"1", "2"}
    assert len(found.result.records) == 2 * 6
    assert {s.reason for s in found.result.plan.skipped} >= {"--exclude", "not in --blocks"}


def test_group_sizes_that_do_not_fit_a_layer(toy: Path) -> None:
    field = field_of(toy, ask(bits="4", group_size="32,128"))
    kinds = {group.kind: group.sizes for group in field.groups}
    assert None in kinds["mlp.up_proj"], "64 inputs hold no group of 128"
    assert None not in kinds["mlp.down_proj"]
    with pytest.raises(CompressError, match="no candidate fits: group size 128 is larger than in_features 64"):
        field_of(toy, ask(bits="4", group_size="128"))


def test_forks_are_the_coarsest_of_the_lowest_bits(outcome: Outcome) -> None:
    keys = [outcome.field.candidates[c].key for c in forks_of(outcome.field.groups[0], outcome.field.candidates, 2)]
    assert keys == ["2g64", "3g64"]


# --- the command line


class Command:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *args: object, code: int = 0) -> tuple[str, str]:
        self._monkeypatch.setattr(sys, "argv", ["compress", "auto", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = self._capsys.readouterr()
        assert (stop.value.code or 0) == code, seen
        return seen.out, seen.err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return Command(monkeypatch, capsys)


def test_command(command: Command, outcome: Outcome, toy: Path, text: Path, kept: Path) -> None:
    given = [toy, "--avg-bits", 3.5, "--bits", BITS, "--group-size", GROUPS, "--probes", 2, "--probe-len", 32]
    given += ["--measured", kept, "--calib", text, "--samples", 8, "--seq-len", 64, "--no-eval", "--dry-run"]
    out, _ = command(*given)
    for word in ("q_proj", "this choice", "3 bits, groups of 64", "measurements are kept in"):
        assert word in out
    found = json.loads(command(*given, "--json")[0])
    assert found["run"] is None
    assert found["bytes"] == outcome.allocation.size
    assert found["predicted"] == pytest.approx(outcome.allocation.cost)
    assert [g["setting"] for g in found["groups"]] == [
        outcome.field.candidates[c].key for c in outcome.allocation.choice
    ]


def test_stopped(command: Command, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "survey", stop)
    assert "are kept; give the same command again" in command(toy, "--avg-bits", 4, code=130)[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((), "one budget is wanted"),
        (("--avg-bits", 4, "--max-size", "1GiB"), "one budget is wanted"),
        (("--avg-bits", 1.5), "1.5 bits a weight, the smallest choice takes 2."),
        (("--avg-bits", 12), "12 bits a weight, the largest choice takes 8."),
        (("--max-size", "1kB"), "1,000 bytes for all weight files, the smallest choice takes"),
        (("--max-size", "big"), "'big' is no size"),
        (("--avg-bits", 4, "--bits", "two"), "no list of numbers"),
        (("--avg-bits", 4, "--bits", "9"), "bits 9 is out of range"),
        (("--avg-bits", 4, "--group-size", "0"), "group size 0 is out of range"),
        (("--avg-bits", 4, "--method", "awq"), "use gptq or rtn"),
        (("--avg-bits", 4, "--sensitivity", "none"), "use kl or loss"),
        (("--avg-bits", 4, "--bits", "2,3", "--target", "vllm"), "no candidate is left"),
        (("--avg-bits", 4, "--target", "nobody"), "no client 'nobody'"),
        (
            ("--avg-bits", 4, "--format", "gptq", "--target", "transformers"),
            "the GPTQ format holds one setting for all layers",
        ),
    ],
)
def test_refused_before_any_work(command: Command, toy: Path, given: tuple[object, ...], words: str) -> None:
    out, error = (
        command(toy, *given, "--group-size", "64,32", code=2)
        if "--group-size" not in given
        else command(toy, *given, code=2)
    )
    assert words in error
    assert out == ""
    assert error.count("\n") == 1
    assert list(Path().iterdir()) == []
