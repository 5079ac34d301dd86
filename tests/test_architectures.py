"""Every architecture of the table: compress, reload, compare logits. No test knows more of a family than its config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.recipe import parse
from compress.weights import Weights

SMALL = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
LLAMA = {**SMALL, "intermediate_size": 96, "num_key_value_heads": 2, "max_position_embeddings": 128}
HEADS = {**LLAMA, "head_dim": 16}
WINDOW = {"sliding_window": 16}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}

# transformers' config class, its settings, the format that can hold it, compressed matrices a block
TABLE: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "llama": ("LlamaConfig", LLAMA, "compressed-tensors", 7),
    "mistral": ("MistralConfig", {**LLAMA, **WINDOW}, "compressed-tensors", 7),
    "qwen2": ("Qwen2Config", LLAMA, "compressed-tensors", 7),
    "qwen3": ("Qwen3Config", HEADS, "compressed-tensors", 7),
    "gemma2": ("Gemma2Config", {**HEADS, **WINDOW, **MIXED}, "compressed-tensors", 7),
    "gemma3": ("Gemma3TextConfig", {**HEADS, **WINDOW, **MIXED}, "compressed-tensors", 7),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, "compressed-tensors", 4),
    "opt": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
        "compressed-tensors",
        6,
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 320, "n_layer": 2, "n_head": 4, "hidden_size": 64},
        "compressed-tensors",
        4,
    ),
    "gpt2": ("GPT2Config", {"vocab_size": 320, "n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 128}, "gptq", 4),
    "gpt_neox": ("GPTNeoXConfig", {**SMALL, "intermediate_size": 96, "max_position_embeddings": 128}, "gptq_v2", 4),
    "falcon": ("FalconConfig", {**SMALL, "alibi": False}, "compressed-tensors", 4),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, "compressed-tensors", 16),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**HEADS, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
        "compressed-tensors",
        16,
    ),
}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=TABLE, scope="module")
def case(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Path],
    tokenizer: Any,
) -> tuple[str, Path]:
    import transformers

    name: str = request.param
    kind, settings, _, _ = TABLE[name]
    config = getattr(transformers, kind)(**settings, bos_token_id=0, eos_token_id=0)
    return name, make_model(config, tmp_path_factory.mktemp(name) / name, tokenizer)


def dense_logits(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(rows).logits.float()
    return logits


def streamed_logits(folder: Path, rows: torch.Tensor) -> torch.Tensor:
    model = BlockModel(Weights(Checkpoint.open(folder)), torch.float32, torch.device("cpu"))
    hidden = model.embed(rows)
    for block in range(len(model.block_names)):
        model.load(block)
        hidden = model.run(block, hidden, tuple(rows.shape))
        model.free(block)
    return model.logits(hidden, rows)


def test_streamed_equals_whole(case: tuple[str, Path], rows: torch.Tensor) -> None:
    """Block by block, with masks, positions and windows found from the model, the logits are transformers' own."""
    _, folder = case
    whole = dense_logits(folder, rows)
    assert torch.allclose(streamed_logits(folder, rows), whole, atol=1e-5 * float(whole.abs().max()))


def test_compress_reload_compare(case: tuple[str, Path], rows: torch.Tensor, text_file: Path, tmp_path: Path) -> None:
    """What plain transformers computes from the file is what our own dequantised weights compute."""
    name, folder = case
    _, _, format, per_block = TABLE[name]
    out = tmp_path / "out"
    result = compress.run(
        folder, compress.GPTQ(bits=4, group_size=32), out, format=format, calib=str(text_file), samples=16, seq_len=48,
        no_eval=True,
    )  # fmt: skip
    assert result.plan.layers == 2 * per_block
    in_blocks = sum(r["shape"][0] * r["shape"][1] for r in result.records)
    assert result.plan.packed_weights == in_blocks
    ours = streamed_logits(out, rows)
    original = dense_logits(folder, rows)
    assert 0 < float((ours - original).abs().max()) < 0.5 * float(original.abs().max())
    if format == "compressed-tensors":  # the GPTQ formats are proved in their own client's environment
        theirs = dense_logits(out, rows)
        assert torch.allclose(ours, theirs, atol=1e-5 * float(original.abs().max()))
    assert all(r["relative_error"] < 0.1 for r in result.records if r["tokens"] > 0)


def test_every_expert_is_compressed(
    tmp_path: Path, make_model: Callable[..., Path], tokenizer: Any, text_file: Path
) -> None:
    """Fused experts: each gets its own codes from its own tokens; one that saw too few is named."""
    from transformers import Qwen3MoeConfig

    settings = {**TABLE["qwen3_moe"][1], "num_experts": 8, "num_hidden_layers": 1}
    folder = make_model(Qwen3MoeConfig(**settings, bos_token_id=0, eos_token_id=0), tmp_path / "moe", tokenizer)
    result = compress.run(
        folder, compress.GPTQ(bits=4, group_size=32), tmp_path / "out", calib=str(text_file), samples=2, seq_len=16,
        no_eval=True,
    )  # fmt: skip
    experts = [r for r in result.records if ".experts." in r["name"]]
    assert len(experts) == 8 * 3
    down = [r for r in experts if r["name"].endswith("down_proj")]
    assert sum(r["tokens"] for r in down) == 2 * 2 * 16, "every token goes to two experts"
    assert len({r["tokens"] for r in down}) > 1
    few = [r for r in down if r["tokens"] < 32]
    assert few
    assert all(any("calibration tokens reached this expert" in note for note in r["notes"]) for r in few)
    assert not any(".gate." in r["name"] + "." for r in result.records), "the router stays dense"


@pytest.mark.parametrize(
    ("name", "format", "word"), [("gpt2", "compressed-tensors", "Conv1D"), ("mixtral", "gptq", "experts")]
)
def test_what_a_format_cannot_hold_is_refused(
    name: str, format: str, word: str, tmp_path: Path, make_model: Callable[..., Path], tokenizer: Any, text_file: Path
) -> None:
    import transformers

    kind, settings, _, _ = TABLE[name]
    folder = make_model(
        getattr(transformers, kind)(**settings, bos_token_id=0, eos_token_id=0), tmp_path / name, tokenizer
    )
    with pytest.raises(compress.CompressError, match=word) as caught:
        compress.run(folder, compress.GPTQ(), tmp_path / "out", format=format, calib=str(text_file), no_eval=True,
                     samples=4, seq_len=32)  # fmt: skip
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()


def test_saved_buffers_are_loaded(tmp_path: Path, make_model: Callable[..., Path], rows: torch.Tensor) -> None:
    """A buffer that is saved with the weights (DeepSeek's expert bias) carries its value into the streamed model."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=320, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    folder = make_model(config, tmp_path / "deepseek")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    biases = [n for n in tensors if "e_score_correction_bias" in n]
    assert biases
    save_file({**tensors, **{n: torch.tensor([0.0, 3.0, 1.0, -2.0]) for n in biases}}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    whole = dense_logits(folder, rows)
    assert torch.allclose(streamed_logits(folder, rows), whole, atol=1e-5 * float(whole.abs().max()))


#: one method for each way in which a layer may be stored or computed
WAYS = [
    "int8 threshold=3",
    "sparsegpt pattern=2:4 bits=4 group_size=32",
    "spqr",
    "nf4 block_size=32",
    "awq group_size=32",
]


def test_other_methods(case: tuple[str, Path], rows: torch.Tensor, text_file: Path, tmp_path: Path) -> None:
    """Quantised inputs, sparse, outliers, code books, rescaled norms: written, verified, and read as they were."""
    name, folder = case
    original = streamed_logits(folder, rows)
    for i, line in enumerate(WAYS):
        held = TABLE[name][2] if line.startswith("awq") else "auto"
        if line.startswith("awq") and ("gptq" in held or "moe" in name or name == "mixtral"):
            held = "native"  # asymmetric experts and [in, out] weights have no other home
        out = tmp_path / str(i)
        result = compress.run(
            folder, parse(line), out, format=held, calib=str(text_file), samples=8, seq_len=48, no_eval=True
        )
        assert result.proof.layers == 2 * TABLE[name][3]
        ours = streamed_logits(out, rows)
        moved = float((ours - original).norm() / original.norm())
        assert 0 < moved < (1.2 if "2:4" in line else 0.5), line  # random weights have nothing to spare
