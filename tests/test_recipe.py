"""Recipes: what a YAML file means, which step takes which layer, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compress
from compress.errors import CompressError
from compress.passes.gptq import GPTQ
from compress.passes.rtn import RTN
from compress.recipe import Recipe, Where, blocks_of, build, chained, make_recipe, parse, read_recipe, read_yaml

NAMES = [f"model.layers.{i}.mlp.{n}_proj" for i in range(4) for n in ("gate", "up", "down")]


def chosen(steps: list[Any]) -> dict[str, str]:
    """By layer, what takes it."""
    recipe = make_recipe({"steps": steps}, "test", "test.yaml")
    out = {}
    for name in NAMES:
        passes = recipe.choose(name, int(name.split(".")[2]), 4)
        out[name] = "dense" if passes is None else "+".join(f"{p.name}{p.storage.bits}" for p in passes)
    return out


def test_first_step_that_matches_takes_a_layer() -> None:
    found = chosen([{"gptq": {"bits": 8, "layers": ["*.down_proj"]}}, {"gptq": {"bits": 4}}])
    assert {v for k, v in found.items() if "down" in k} == {"gptq8"}
    assert {v for k, v in found.items() if "down" not in k} == {"gptq4"}


def test_keep_takes_layers_away() -> None:
    found = chosen([{"keep": {"blocks": "0,-1"}}, "rtn bits=3"])
    assert {v for k, v in found.items() if ".0." in k or ".3." in k} == {"dense"}
    assert {v for k, v in found.items() if ".1." in k or ".2." in k} == {"rtn3"}


def test_layers_that_no_step_names_stay_dense() -> None:
    found = chosen([{"rtn": {"layers": "*.up_proj", "exclude": ["*.2.*"], "blocks": "1-3"}}])
    assert sorted(k for k, v in found.items() if v != "dense") == [NAMES[4], NAMES[10]]


def test_prune_then_quantise() -> None:
    found = chosen([{"sparsegpt": {"pattern": "2:4", "blocks": "0-1"}}, "gptq bits=4"])
    assert {v for k, v in found.items() if ".0." in k or ".1." in k} == {"sparsegpt16+gptq4"}
    assert {v for k, v in found.items() if ".2." in k or ".3." in k} == {"gptq4"}
    recipe = make_recipe({"steps": ["sparsegpt pattern=2:4", "gptq bits=4"]}, "x", "x")
    storage = chained(tuple(recipe.passes))
    assert storage.kind == "sparse"
    assert storage.inner is not None
    assert (storage.inner.kind, storage.inner.bits) == ("uniform", 4)


@pytest.mark.parametrize(
    ("text", "want"),
    [("0", {0}), ("1-3", {1, 2, 3}), ("-1", {7}), ("0,-1", {0, 7}), ("-3--1", {5, 6, 7}), (" 2 - 2 , 4 ", {2, 4})],
)
def test_blocks(text: str, want: set[int]) -> None:
    assert blocks_of(text, 8) == want


@pytest.mark.parametrize("text", ["8", "-9", "3-1", "a", "1-", "1,,2", "0-8"])
def test_blocks_that_are_not_there(text: str) -> None:
    with pytest.raises(CompressError):
        blocks_of(text, 8)


def test_where() -> None:
    where = Where(("*.up_proj",), ("*.2.*",), "0-2")
    assert where.holds("model.layers.1.mlp.up_proj", 1, 4)
    assert not where.holds("model.layers.2.mlp.up_proj", 2, 4)
    assert not where.holds("model.layers.1.mlp.down_proj", 1, 4)
    assert not where.holds("model.layers.3.mlp.up_proj", 3, 4)


def test_one_line_recipes() -> None:
    assert parse("rtn bits=3 symmetric=false group_size=-1") == RTN(bits=3, symmetric=False, group_size=-1)
    assert build("gptq", {"bits": 2, "damp-percent": 1}) == GPTQ(bits=2, damp_percent=1.0)
    assert compress.method("rtn", bits=5) == RTN(bits=5)
    recipe = Recipe.of(GPTQ(bits=3))
    assert (recipe.label, recipe.as_json()["name"], recipe.as_json()["bits"]) == ("gptq-3bit", "gptq", 3)


def test_transform_brings_the_pass_that_follows() -> None:
    recipe = Recipe.of(build("smoothquant", {"alpha": 0.6}))
    assert [s.name for s in recipe.steps] == ["smoothquant", "absmax"]
    assert recipe.passes[0].storage.activations == "token"
    assert recipe.needs.ranges


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "holds no list of steps"),
        ({"steps": []}, "holds no list of steps"),
        ({"steps": ["rtn"], "when": 1}, "'when' means nothing"),
        ({"steps": ["rtm"]}, "no method 'rtm'"),
        ({"steps": [{"rtn": {"bit": 4}}]}, "rtn has no setting 'bit'"),
        ({"steps": [{"rtn": {"bits": "four"}}]}, "'four' is not a value for it; it takes int"),
        ({"steps": [{"rtn": {"bits": True}}]}, "True is not a value"),
        ({"steps": [{"rtn": {"bits": 11}}]}, "bits 11 is out of range"),
        ({"steps": [{"gptq": {"act_order": "desc"}}]}, "it takes static or groups or none"),
        ({"steps": [{"rtn": 4}]}, "are no mapping"),
        ({"steps": [{"rtn": {}, "gptq": {}}]}, "is not one method"),
        ({"steps": [{"keep": {"bits": 4}}, "rtn"]}, "keep has no setting 'bits'"),
        ({"steps": [{"keep": {}}]}, "no step rounds"),
        ({"steps": ["smoothquant then='rtn'", "rtn"]}, "then is for a transform alone"),
        ({"steps": [{"smoothquant": {"layers": "*.up_proj"}}, "rtn"]}, "rescales whole blocks"),
        ({"steps": ["rtn"], "options": {"sample": 4}}, "no option 'sample'"),
        ({"steps": ["rtn"], "options": {"samples": "many"}}, "'many' is not a value"),
        ({"steps": ["rtn"], "options": [1]}, "options is no mapping"),
    ],
)
def test_refusals(given: Any, says: str) -> None:
    with pytest.raises(CompressError, match=says) as caught:
        make_recipe(given, "name", "r.yaml")
    assert caught.value.where


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mixed.yaml"
    path.write_text("steps:\n  - gptq: {bits: 4}\noptions: {samples: 8, seq-len: 32}\n")
    recipe = read_recipe(path)
    assert recipe.name == "mixed"
    assert recipe.options == {"samples": 8, "seq_len": 32}
    for text in ("steps: [", "\x00"):
        path.write_text(text)
        with pytest.raises(CompressError, match="is no YAML"):
            read_recipe(path)
    with pytest.raises(CompressError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_options_of_the_recipe_give_way(toy: Path, text_file: Path) -> None:
    from compress.api import make_job
    from compress.options import Options

    recipe = make_recipe({"steps": ["rtn"], "options": {"seed": 3, "device": "cpu", "no_eval": True}}, "r", "r")
    job = make_job(str(toy), recipe, Options(seed=5, out=Path("nowhere")))
    assert (job.seed, job.text) == (5, None)
    assert make_job(str(toy), recipe, Options(out=Path("nowhere"))).seed == 3


def test_mixed_bits_end_to_end(toy: Path, text_file: Path, tmp_path: Path) -> None:
    """Bits by layer, first block kept: loads in transformers from config groups."""
    from transformers import AutoModelForCausalLM

    from compress.checkpoint import Checkpoint
    from compress.weights import Weights

    steps = [{"keep": {"blocks": "0"}}, {"gptq": {"bits": 8, "layers": ["*.down_proj"]}}, {"rtn": {"bits": 4}}]
    recipe = make_recipe({"name": "mixed", "steps": steps}, "mixed", "mixed")
    out = tmp_path / "out"
    result = compress.run(toy, recipe, out, calib=str(text_file), samples=4, seq_len=32, no_eval=True)
    assert {r["method"] for r in result.records} == {"gptq", "rtn"}
    assert result.plan.taken() == [0, 3, 18]
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(g["weights"]["num_bits"] for g in config["config_groups"].values()) == [4, 8]
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = Weights(Checkpoint.open(out))
    dense = weights.read("model.layers.2.mlp.down_proj.weight")
    model(compress_tokens())
    assert dense.equal(model.model.layers[2].mlp.down_proj.weight.data)
    assert "model.layers.0.mlp.down_proj.weight" in weights.checkpoint.tensors


def compress_tokens() -> Any:
    import torch

    return torch.arange(16)[None]


def test_a_step_that_takes_nothing_is_refused(toy: Path, tmp_path: Path) -> None:
    recipe = make_recipe({"steps": ["rtn bits=4", "gptq bits=8"]}, "twice", "twice")
    with pytest.raises(CompressError, match=r"step 2 \(gptq\) takes none of 28 layers"):
        compress.run(toy, recipe, tmp_path / "out", calib="bundled", no_eval=True)


def test_yaml_numbers() -> None:
    text = "[2:4, 4, -1, 0.5, 1e-3, .5, -.inf, 1., 4e1, 0x10, yes, null, a4, '4', 1_000]"
    want = ["2:4", 4, -1, 0.5, 1e-3, 0.5, -float("inf"), 1.0, 40.0, "0x10", True, None, "a4", "4", "1_000"]
    assert read_yaml(text) == want


def test_a_transform_alone_brings_its_pass() -> None:
    recipe = make_recipe({"steps": ["smoothquant then='rtn bits=8 group_size=-1'"]}, "x", "x")
    assert [s.name for s in recipe.steps] == ["smoothquant", "rtn"]
    recipe = make_recipe({"steps": ["smoothquant alpha=0.8", "gptq bits=8"]}, "x", "x")
    assert [s.name for s in recipe.steps] == ["smoothquant", "gptq"]


def test_optional_choices_take_their_values() -> None:
    assert parse("sparsegpt pattern=2:4 act_order=none") == build("sparsegpt", {"pattern": "2:4", "act_order": "none"})


def test_what_cannot_follow_pruning() -> None:
    recipe = make_recipe({"steps": ["sparsegpt pattern=2:4", "nf4"]}, "x", "x")
    with pytest.raises(CompressError, match=r"sparsegpt, then nf4.*follow it with gptq"):
        chained(tuple(recipe.passes))


def test_one_threshold_a_survey() -> None:
    steps = ["int8 rule=paper threshold=6", {"int8": {"rule": "paper", "threshold": 3.0, "layers": "*.down_proj"}}]
    with pytest.raises(CompressError, match="thresholds 6 and 3"):
        make_recipe({"steps": steps}, "x", "x").needs  # noqa: B018
