"""The whole run on the toy model: what is counted, what is left alone, what the options do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.checkpoint import Checkpoint
from compress.formats import FORMATS
from compress.weights import Weights

SMALL: dict[str, Any] = {"samples": 8, "seq_len": 48, "no_eval": True}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path], tokenizer: Any) -> Path:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return make_model(config, tmp_path_factory.mktemp("untied") / "untied", tokenizer, torch.bfloat16)


def loaded(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits: torch.Tensor = model(torch.arange(40)[None]).logits
    return logits


def test_head_stays_dense_unless_asked(untied: Path, text_file: Path, tmp_path: Path) -> None:
    result = compress.run(untied, compress.GPTQ(group_size=32), tmp_path / "a", calib=str(text_file), **SMALL)
    assert "lm_head" in {s.name for s in result.plan.skipped}
    assert "lm_head.weight" in Checkpoint.open(tmp_path / "a").tensors


def test_head_on_request(untied: Path, text_file: Path, tmp_path: Path) -> None:
    method = compress.GPTQ(bits=8, group_size=32)
    result = compress.run(untied, method, tmp_path / "a", calib=str(text_file), lm_head=True, **SMALL)
    head = next(r for r in result.records if r["name"] == "lm_head")
    assert head["tokens"] == 8 * 48
    assert head["relative_error"] < 1e-3
    assert "lm_head.weight_packed" in Checkpoint.open(tmp_path / "a").tensors
    original = loaded(untied)
    assert float((loaded(tmp_path / "a") - original).abs().max()) < 0.05 * float(original.abs().max())


def test_tied_head_is_never_broken(toy: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(compress.CompressError, match="tied"):
        compress.run(toy, compress.GPTQ(), tmp_path / "a", calib=str(text_file), lm_head=True, **SMALL)
    assert not (tmp_path / "a").exists()


def test_excluded_layers_are_byte_identical(toy: Path, text_file: Path, tmp_path: Path) -> None:
    result = compress.run(
        toy,
        compress.GPTQ(group_size=32),
        tmp_path / "a",
        calib=str(text_file),
        exclude=("*.down_proj", "*.0.*"),
        **SMALL,
    )
    before, after = Checkpoint.open(toy), Checkpoint.open(tmp_path / "a")
    for name in before.tensors:
        if name.endswith("down_proj.weight") or ".layers.0." in name or "norm" in name or "embed" in name:
            assert torch.equal(before.read(name), after.read(name))
        else:
            assert name not in after.tensors
    assert len(result.records) == 3 * 6
    loaded(tmp_path / "a")


def test_counts_add_up(toy: Path, tmp_path: Path) -> None:
    result = compress.run(toy, compress.RTN(bits=4, group_size=32), tmp_path / "a", no_eval=True)
    tensors = Checkpoint.open(tmp_path / "a").tensors
    assert result.plan.bytes_after == sum(t.nbytes for t in tensors.values())
    packed = sum(t.nbytes for n, t in tensors.items() if "weight_" in n)
    assert result.plan.bits_per_weight == pytest.approx(8 * packed / result.plan.packed_weights)
    record = json.loads((tmp_path / "a" / "compress.json").read_text())
    assert record["size"]["packed_parameters"] == sum(r["shape"][0] * r["shape"][1] for r in result.records)
    assert set(record["sha256"]) == {p.name for p in (tmp_path / "a").iterdir()} - {"compress.json", "report.json"}


def test_shards_with_an_index(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress import output

    monkeypatch.setattr(output, "SHARD_BYTES", 60_000)
    compress.run(toy, compress.RTN(bits=4, group_size=32), tmp_path / "a", no_eval=True)
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {s.name for s in shards}
    loaded(tmp_path / "a")


def test_blocks_of_a_large_checkpoint_are_written_once(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress import output

    wanted = compress.run(toy, compress.RTN(bits=4, group_size=32), tmp_path / "a", no_eval=True)
    assert output.room_needed(tmp_path / "x", wanted.plan.format, 100) == 200
    monkeypatch.setattr(output, "LARGE_BYTES", 1)
    assert output.room_needed(tmp_path / "x" / "y", wanted.plan.format, 100) == 100
    assert output.room_needed(tmp_path / "x", FORMATS["gguf"], 100) == 200
    compress.run(toy, compress.RTN(bits=4, group_size=32), tmp_path / "b", no_eval=True)
    a, b = (Checkpoint.open(tmp_path / x) for x in "ab")
    assert len(a.files()) == 1
    assert len(b.files()) == len(wanted.plan.blocks) + 1
    assert {t.file for n, t in b.tensors.items() if ".layers.1." in n and "norm" not in n} == {b.files()[1]}
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.read(n), b.read(n)) for n in a.tensors)
    assert all(f.stat().st_nlink == 1 for f in b.files())
    loaded(tmp_path / "b")


def test_next_block_sees_what_is_stored(toy: Path, text_file: Path, tmp_path: Path) -> None:
    """Recompute the last block's first Hessian from the written file: the recorded error must be its own."""
    from compress.blocks import BlockModel
    from compress.calibration import calibration_rows
    from compress.hidden import Activations
    from compress.solvers.hessian import row_losses
    from compress.stats import collect

    method = compress.GPTQ(bits=3, group_size=32)
    result = compress.run(toy, method, tmp_path / "a", calib=str(text_file), **SMALL)
    source, written = Weights(Checkpoint.open(toy)), Weights(Checkpoint.open(tmp_path / "a"))
    tokenizer = compress.api.load_tokenizer(toy)
    rows = calibration_rows(str(text_file), tokenizer, samples=8, seq_len=48).tokens
    model = BlockModel(written, torch.float32, torch.device("cpu"))
    flow = Activations(model, rows, 8, tmp_path / "spill")
    flow.enter()
    for block in range(3):
        model.load(block)
        flow.advance(block)
        model.free(block)
    model.load(3)
    for linear in model.linears(3):  # of whose output tokens' weights are the slopes
        model.set_weight(linear, source.read(linear.name + ".weight"))
    inputs = collect(model, 3, model.linears(3), flow, method.needs)
    attention = inputs[0]
    assert [x.name.rpartition(".")[2] for x in attention.linears] == ["q_proj", "k_proj", "v_proj"]
    name = attention.linears[0].name
    dense = source.read(name + ".weight").float()
    assert attention.stats.hessian is not None
    loss = row_losses(dense - written.read(name + ".weight").float(), attention.stats.hessian).sum()
    norm = row_losses(dense, attention.stats.hessian).sum()
    recorded = next(r for r in result.records if r["name"] == name)["relative_error"]
    assert float(loss / norm) == pytest.approx(recorded, rel=1e-3)


def test_true_sequential_changes_later_layers_only(toy: Path, text_file: Path, tmp_path: Path) -> None:
    method = compress.GPTQ(bits=2, group_size=32)
    runs = [
        compress.run(toy, method, tmp_path / str(flag), calib=str(text_file), true_sequential=flag, **SMALL)
        for flag in (False, True)
    ]
    plain, sequential = ({r["name"]: r["sha256_dense"] for r in run.records} for run in runs)
    first = "model.layers.0.self_attn."
    assert all(plain[first + n] == sequential[first + n] for n in ("q_proj", "k_proj", "v_proj"))
    assert plain[first + "o_proj"] != sequential[first + "o_proj"]


def test_float32_checkpoint_keeps_its_dtype(make_model: Callable[..., Path], untied: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    folder = make_model(AutoConfig.from_pretrained(untied), tmp_path / "f32", None, torch.float32)
    compress.run(folder, compress.RTN(bits=4, group_size=32), tmp_path / "a", no_eval=True)
    dtypes = {t.torch_dtype for n, t in Checkpoint.open(tmp_path / "a").tensors.items() if n.endswith("weight_scale")}
    assert dtypes == {torch.float32}


def test_own_text_as_calibration(toy: Path, tmp_path: Path) -> None:
    """--calib self: the model writes its own rows, the same for the same seed."""
    first = compress.run(toy, compress.GPTQ(group_size=32), tmp_path / "a", calib="self", **SMALL)
    again = compress.run(toy, compress.GPTQ(group_size=32), tmp_path / "b", calib="self", **SMALL)
    assert first.job.rows is not None
    assert again.job.rows is not None
    assert first.job.rows.tokens.shape == (8, 48)
    assert first.job.rows.sha256 == again.job.rows.sha256
    assert len(first.job.rows.tokens.unique()) > 20


def test_card_names_what_was_done(toy: Path, text_file: Path, tmp_path: Path) -> None:
    options = {"calib": str(text_file), "eval": str(text_file), "samples": 4, "seq_len": 48}
    compress.run(toy, compress.GPTQ(group_size=32), tmp_path / "a", **options)
    card = (tmp_path / "a" / "README.md").read_text()
    for word in ("perplexity", "KL divergence", "4.5", "Calibration: 4 rows of 48 tokens", "windows of 128 tokens"):
        assert word in card
