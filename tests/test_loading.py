"""compress.load: whole models on packed layers compute what our own evaluation of the same files does, and generate."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.experts import FusedExperts
from compress.hidden import Activations
from compress.linear import PackedLinear
from compress.recipe import parse
from compress.types import tensor_bytes_of
from compress.weights import Weights

CPU = torch.device("cpu")
COMMON: dict[str, Any] = {"vocab_size": 320, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = ("llama", "gpt2", "qwen3_moe", "mixtral", "falcon")
METHODS = {
    "nf4": ("nf4 double_quant=true", "native"),
    "spqr": ("spqr group_size=16", "native"),
    "llm.int8": ("int8 threshold=4", "native"),
    "2:4": ("sparsegpt pattern=2:4", "native"),
    "w4": ("rtn bits=4 group_size=32", "compressed-tensors"),
    "w4 asymmetric": ("rtn bits=4 group_size=32 symmetric=false", "compressed-tensors"),
    "w8": ("rtn bits=8 group_size=-1", "compressed-tensors"),
    "w8a8": ("absmax activations=token", "compressed-tensors"),
    "gptq": ("gptq bits=4 group_size=32", "gptq"),
    "gptq_v2 act-order": ("gptq bits=4 group_size=32 act_order=groups", "gptq_v2"),
}
#: of the logits' mean magnitude. In bfloat16 one rounding more or less moves a logit by some of its 8 bits, and now and
#: then sends a token to another expert
NEAR = {"float32": 1e-5, "bfloat16": 0.04}


def config_of(family: str) -> Any:
    from transformers import FalconConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    return {
        "llama": lambda: LlamaConfig(
            hidden_size=64, intermediate_size=128, max_position_embeddings=128, tie_word_embeddings=True,
            attention_bias=True, **heads, **COMMON,
        ),
        "gpt2": lambda: GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=128, **COMMON),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            hidden_size=64, intermediate_size=64, moe_intermediate_size=32, head_dim=16, num_experts=4,
            num_experts_per_tok=2, max_position_embeddings=128, tie_word_embeddings=False, **heads, **COMMON,
        ),
        "mixtral": lambda: MixtralConfig(
            hidden_size=64, intermediate_size=64, num_local_experts=4, num_experts_per_tok=2,
            max_position_embeddings=128, **heads, **COMMON,
        ),
        "falcon": lambda: FalconConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=2, bias=False, alibi=False, **COMMON
        ),
    }[family]()  # fmt: skip


@pytest.fixture(scope="module")
def packed_folder(
    make_model: Callable[..., Path], tokenizer: Any, text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path | None]:
    """packed_folder(family, method): such a model, compressed; None where its format cannot hold it."""
    base = tmp_path_factory.mktemp("models")

    def make(family: str, method: str) -> Path | None:
        source, out = base / family, base / f"{family}-{method}".replace(" ", "-").replace(":", "")
        if not source.exists():
            make_model(config_of(family), source, tokenizer, torch.bfloat16)
        if not out.exists():
            line, format = METHODS[method]
            try:
                compress.run(
                    source, parse(line), out, format=format, calib=str(text_file), samples=4, seq_len=64, no_eval=True,
                    no_verify=True,
                )  # fmt: skip
            except compress.CompressError as error:
                if "use --" not in error.line():
                    raise
                return None
        return out

    return make


def tokens_of(folder: Path) -> Tensor:
    return torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))


def streamed_logits(folder: Path, tokens: Tensor, dtype: torch.dtype, tmp: Path) -> Tensor:
    """As `compress eval` computes them: dense dequantised weights, block after block."""
    model = BlockModel(Weights(Checkpoint.open(folder)), dtype, CPU)
    flow = Activations(model, tokens, len(tokens), tmp / "spill")
    flow.enter()
    for block in range(len(model.block_names)):
        model.load(block)
        flow.advance(block)
        model.free(block)
    return model.logits(flow.states(0), tokens)


def quietly(folder: Path, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*packed layers are held dense")
        return compress.load(folder, device="cpu", **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_evaluation_does(
    family: str, method: str, packed_folder: Callable[[str, str], Path | None], tmp_path: Path
) -> None:
    folder = packed_folder(family, method)
    if folder is None:
        pytest.skip(f"{METHODS[method][1]} does not hold it")
    tokens = tokens_of(folder)
    for dtype, near in NEAR.items():
        want = streamed_logits(folder, tokens, getattr(torch, dtype), tmp_path / dtype)
        for kernels in (False, True):
            model = quietly(folder, dtype=dtype, kernels=kernels)
            with torch.no_grad():
                found = model(tokens).logits.float()
            assert float((found - want).abs().mean()) <= near * float(want.abs().mean())
            if dtype == "float32" and family == "llama" and method == "nf4":
                assert {p.dtype for p in model.parameters()} == {torch.float32}
    made = model.generate(tokens[:1], max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 28)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_packed_stays_packed(family: str, packed_folder: Callable[[str, str], Path | None]) -> None:
    folder = packed_folder(family, "nf4")
    assert folder is not None
    weights = Weights(Checkpoint.open(folder))
    if family == "falcon":
        with pytest.warns(UserWarning, match="8 packed layers are held dense, first transformer.h.0"):
            model = compress.load(folder, device="cpu")
    else:
        model = compress.load(folder, device="cpu")
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == (0 if family == "falcon" else len(weights.packed))
    if layers:
        stored = sum(tensor_bytes_of(weights.read_packed(name)) for name in weights.packed)
        assert sum(layer.weight_bytes for layer in layers) == stored
    assert not model.training
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert getattr(model.config, "quantization_config", None) is None
    assert model.config.use_cache
    fused = [v for m in model.modules() for v in m.__dict__.values() if isinstance(v, FusedExperts)]
    assert len(fused) == (4 if family in ("qwen3_moe", "mixtral") else 0)
    again = model.to("cpu").state_dict()
    assert not any(isinstance(v, nn.Module) for v in again.values())


def test_tied_and_dense(toy: Path) -> None:
    """A dense checkpoint loads too, with the head tied to the embeddings."""
    from transformers import AutoModelForCausalLM

    model = compress.load(toy, device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(toy).eval()
    tokens = tokens_of(toy)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert compress.load(toy, device="cpu", dtype="float32").dtype == torch.float32


def test_generation_config_is_read(packed_folder: Callable[[str, str], Path | None], tmp_path: Path) -> None:
    import shutil

    folder = packed_folder("llama", "nf4")
    assert folder is not None
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    (copied / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": 7}))
    model = compress.load(copied, device="cpu")
    assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (3, 7)
    (copied / "generation_config.json").write_text("[")
    with pytest.raises(compress.CompressError, match="generation_config"):
        compress.load(copied, device="cpu")


def test_partly_packed_experts(
    make_model: Callable[..., Path], tokenizer: Any, text_file: Path, tmp_path: Path
) -> None:
    """A projection left dense beside packed ones in the same fused parameter."""
    source = make_model(config_of("qwen3_moe"), tmp_path / "moe", tokenizer, torch.bfloat16)
    out = tmp_path / "out"
    options: dict[str, Any] = {"format": "native", "no_eval": True, "no_verify": True}
    compress.run(source, parse("nf4"), out, exclude=("*.up_proj",), **options)
    names = Weights(Checkpoint.open(out)).packed
    assert any("gate_proj" in n for n in names)
    assert not any("up_proj" in n for n in names)
    tokens = tokens_of(out)
    model = compress.load(out, device="cpu", dtype="float32")
    with torch.no_grad():
        found = model(tokens).logits
    want = streamed_logits(out, tokens, torch.float32, tmp_path)
    assert torch.allclose(found, want, atol=1e-5 * float(want.abs().max()))


def test_packed_head(toy: Path, make_model: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(toy, tie_word_embeddings=False)
    source = make_model(config, tmp_path / "untied", tokenizer, torch.bfloat16)
    compress.run(source, parse("nf4"), tmp_path / "out", format="native", lm_head=True, no_eval=True, no_verify=True)
    model = compress.load(tmp_path / "out", device="cpu", dtype="float32")
    assert isinstance(model.lm_head, PackedLinear)
    tokens = tokens_of(source)
    want = streamed_logits(tmp_path / "out", tokens, torch.float32, tmp_path)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, want, atol=1e-5 * float(want.abs().max()))


def test_errors_say_what_to_do(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(compress.CompressError, match="no such folder"):
        compress.load(tmp_path / "nothing")
    with pytest.raises(compress.CompressError, match="no dtype"):
        compress.load(toy, dtype="int4")
    with pytest.raises(compress.CompressError, match="--device"):
        compress.load(toy, device="tpu")
