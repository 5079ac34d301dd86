"""GGUF files of whole models: written by a run, read back, loaded by transformers; files of gguf-py's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import compress
from compress import GPTQ, RTN
from compress.api import find_model, load_tokenizer
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.gguf import config as gguf_config
from compress.gguf import tokenizer as gguf_tokenizer
from compress.gguf import writer
from compress.skeleton import load_config
from compress.verify import digest
from compress.weights import Weights
from compress.writer import write_shards

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
MODELS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama biased": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama, wide heads": LlamaConfig(**SIZES, head_dim=32),
    "llama, rope of llama 3": LlamaConfig(**SIZES, head_dim=64, rope_parameters=LLAMA3),
    "llama, linear rope": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
}
TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, make_model: Any, tokenizer: Any) -> Any:
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = make_model(MODELS[name], tmp_path_factory.mktemp("source") / "model", tokenizer, torch.float16)
        return made[name]

    return get


def packed(source: Path, out: Path, method: Any = None, **options: Any) -> Path:
    compress.run(
        source, method or RTN(bits=4, group_size=32), out, format="gguf", no_eval=True, no_verify=True, **options
    )
    return out


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(TOKENS).logits
    return found


def ours(folder: Path, dtype: torch.dtype) -> Any:
    """A transformers model filled with our reading."""
    weights = Weights(Checkpoint.open(folder))
    model = AutoModelForCausalLM.from_config(load_config(folder), dtype=dtype)
    missing = model.load_state_dict({n: weights.read(n).to(dtype) for n in weights.shapes()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name: str, source: Any, tmp_path: Path) -> None:
    """Layers dequantise to what the solver returned, the rest is the source's; transformers computes the same."""
    out = packed(source(name), tmp_path / "out")
    assert sorted(f.name for f in out.iterdir() if f.suffix in (".gguf", ".safetensors")) == ["model.gguf"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    original, written = Weights(Checkpoint.open(source(name))), Weights(Checkpoint.open(out))
    assert written.format_name == "gguf"
    records = {r["name"]: r for r in json.loads((out / "compress.json").read_text())["layers"]}
    assert written.packed == set(records)
    assert len(records) == 14
    assert written.shapes() == original.shapes()
    for n in original.shapes():
        layer = n.removesuffix(".weight")
        if layer in records:
            assert digest(written.read(n)) == records[layer]["sha256_dense"], n
        else:
            assert torch.equal(written.read(n).to(original.dtype(n)), original.read(n)), n

    # transformers builds a config from GGUF without rope scaling and qwen3's head_dim, so it is given the folder's (not
    # mistral's: it knows no GGUF of that name). In float16 its weights are rounded once, as ours are.
    config = None if name == "mistral" else AutoConfig.from_pretrained(out)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, gguf_file="model.gguf", config=config, dtype=torch.float16, output_loading_info=True
    )
    assert not any(info.values())
    assert torch.equal(logits(model), logits(ours(out, torch.float16)))


@pytest.mark.parametrize("name", ["llama", "llama tied", "mistral", "qwen2"])
def test_plain_transformers(name: str, source: Any, tmp_path: Path) -> None:
    """Without a config in hand; in float32 our rounding to float16 shows, less than 2^-11 of each weight."""
    out = packed(source(name), tmp_path / "out", GPTQ(bits=8, group_size=32), calib="bundled", samples=4, seq_len=64)
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    for n, value in ours(out, torch.float32).state_dict().items():
        assert torch.allclose(theirs[n], value, rtol=2**-11, atol=2**-25), n
    assert float((logits(model) - logits(ours(out, torch.float32))).abs().max()) < 0.02
    again = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    plain = AutoTokenizer.from_pretrained(out)
    for text in ("the river runs", "under an old  stone bridge.", "caf\u00e9 <|end|> 12345"):
        assert again(text)["input_ids"] == plain(text)["input_ids"]


@pytest.mark.parametrize(
    ("bits", "group_size"), [(2, 32), (3, 32), (3, -1), (4, -1), (5, 32), (6, -1), (7, 32), (8, 32)]
)
def test_every_width(bits: int, group_size: int, source: Any, tmp_path: Path) -> None:
    out = packed(source("llama tied"), tmp_path / "out", RTN(bits=bits, group_size=group_size))
    weights = Weights(Checkpoint.open(out))
    for record in json.loads((out / "compress.json").read_text())["layers"]:
        storage = weights.storage(record["name"])
        assert (storage.bits, storage.group_size) == (bits, group_size)
        assert weights.read_packed(record["name"]).storage == storage
        assert digest(weights.read(record["name"] + ".weight")) == record["sha256_dense"]


def test_layers_left_dense_and_a_packed_head(source: Any, tmp_path: Path) -> None:
    out = packed(source("llama"), tmp_path / "out", exclude=("*.q_proj", "*.1.mlp.*"), lm_head=True)
    tensors = {t.name: t.tensor_type.name for t in GGUFReader(out / "model.gguf").tensors}
    assert tensors["output.weight"] == "Q4_0"
    assert tensors["blk.0.attn_q.weight"] == tensors["blk.1.ffn_up.weight"] == "F16"
    assert tensors["blk.0.attn_norm.weight"] == "F32"
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float16)
    assert torch.equal(logits(model), logits(ours(out, torch.float16)))


def test_a_run_that_went_on_writes_the_same(source: Any, tmp_path: Path) -> None:
    first, second = (packed(source("qwen2"), tmp_path / n) for n in ("a", "b"))
    assert (first / "model.gguf").read_bytes() == (second / "model.gguf").read_bytes()


# -- files that stand alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_lone_file(name: str, source: Any, tmp_path: Path) -> None:
    """No config.json, no tokenizer beside it: both come out of the file."""
    out = packed(source(name), tmp_path / "out")
    lone = tmp_path / "lone" / "some.gguf"
    lone.parent.mkdir()
    (out / "model.gguf").rename(lone)
    for place in (lone, lone.parent):
        assert find_model(str(place)) == place
        config, plain = load_config(place), AutoConfig.from_pretrained(out)
        assert config.model_type == ("llama" if name == "mistral" else plain.model_type)
        for key in (*SIZES, "rms_norm_eps", "tie_word_embeddings"):
            assert getattr(config, key) == getattr(plain, key), key
        if name != "qwen2, yarn":
            assert config.rope_parameters == plain.rope_parameters
        tokenizer = load_tokenizer(place)
        assert tokenizer("a red fox")["input_ids"] == load_tokenizer(out)("a red fox")["input_ids"]
        assert len(Checkpoint.open(place).fingerprint()) == 1
    weights = Weights(Checkpoint.open(lone))
    assert digest(weights.read("model.layers.0.self_attn.q_proj.weight"))
    if name in ("llama", "qwen3"):
        (text := tmp_path / "text.txt").write_text("the river runs under an old stone bridge " * 60)
        alone, _, _ = compress.score(lone, str(text), window=64)
        (out / "model.gguf").write_bytes(lone.read_bytes())
        beside, _, _ = compress.score(out, str(text), window=64)
        assert alone.perplexity == beside.perplexity
        assert find_model(str(out / "model.gguf")) == out


def test_several_files(source: Any, tmp_path: Path) -> None:
    out = packed(source("llama"), tmp_path / "out")
    raw = (out / "model.gguf").read_bytes()
    (out / "other.gguf").write_bytes(raw)
    with pytest.raises(CompressError, match=r"2 \.gguf files"):
        Checkpoint.open(out)
    assert find_model(str(out / "other.gguf")) == out / "other.gguf"
    assert len(Weights(Checkpoint.open(out / "other.gguf")).packed) == 14


def peers(path: Path, folder: Path, kinds: dict[str, str], part: str = "") -> None:
    """A model folder as another tool would write it: gguf-py's writer and quantiser, llama.cpp's order of rows."""
    config = AutoConfig.from_pretrained(folder)
    weights = Weights(Checkpoint.open(folder))
    arch = config.model_type
    writer = GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if part:
        writer.add_uint16("split.count", 2)
    tokenizer = gguf_tokenizer.describe(folder, config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer["tokenizer.ggml.tokens"])
    writer.add_token_merges(tokenizer["tokenizer.ggml.merges"])
    writer.add_token_types(tokenizer["tokenizer.ggml.token_type"])
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.": "attn_"}
    names |= {"mlp.": "ffn_", "o_proj": "output", "_proj": "", "model.layers.": "blk.", "model.norm": "output_norm"}
    names |= {"model.embed_tokens": "token_embd", "lm_head": "output"}
    for name in weights.shapes():
        value = weights.read(name).float().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        heads_here = heads.get(name.split(".")[-2], 0) if arch == "llama" else 0
        if heads_here:
            value = value.reshape(heads_here, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
        target = name
        for a, b in names.items():
            target = target.replace(a, b)
        kind = "F32" if value.ndim == 1 else next((k for p, k in kinds.items() if p in name), "F16")
        number = GGMLQuantizationType[kind]
        writer.add_tensor(target, quantize(np.ascontiguousarray(value), number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2"])
def test_peers_files(name: str, source: Any, tmp_path: Path) -> None:
    """Mixed types, quantised embeddings and head; every weight as transformers reads it."""
    kinds = {"embed": "Q8_0", "lm_head": "Q5_1", "q_proj": "Q4_0", "k_proj": "Q5_0", "v_proj": "Q4_1", "mlp": "Q8_0"}
    path = tmp_path / "peer.gguf"
    peers(path, source(name), kinds)
    weights = Weights(Checkpoint.open(path))
    assert "model.embed_tokens" in weights.packed
    assert weights.checkpoint.config["tie_word_embeddings"] == (name == "llama tied")
    config = load_config(path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="peer.gguf", config=config, dtype=torch.float32)
    state = theirs.state_dict()
    for n in weights.shapes():
        found = weights.read(n)
        assert found.dtype == weights.dtype(n)
        assert torch.equal(found, state[n].to(found.dtype)), n
    assert weights.storage("model.layers.0.self_attn.k_proj").kind == "dense"
    assert weights.storage("model.layers.0.mlp.up_proj").bits == 8
    from compress.blocks import BlockModel

    BlockModel(weights, torch.float32, torch.device("cpu")).embed(TOKENS)


def test_a_float_file_is_a_source(source: Any, tmp_path: Path) -> None:
    """Compressed from GGUF as from safetensors: the same codes; copied tensors in transformers' order of rows."""
    path = tmp_path / "peer.gguf"
    peers(path, source("llama"), {})
    options: dict[str, Any] = {"no_eval": True, "no_verify": True, "exclude": ("*.0.self_attn.k_proj",)}
    a, b = tmp_path / "a", tmp_path / "b"
    compress.run(source("llama"), RTN(bits=4, group_size=32), a, format="native", **options)
    compress.run(path, RTN(bits=4, group_size=32), b, format="native", **options)
    x, y = Weights(Checkpoint.open(a)), Weights(Checkpoint.open(b))
    for n in x.shapes():
        assert torch.equal(x.read(n).float(), y.read(n).float()), n


def test_rows_are_mended_in_copies(source: Any, tmp_path: Path) -> None:
    out = packed(source("llama biased"), tmp_path / "out", exclude=("*.q_proj",))
    checkpoint = Checkpoint.open(out)
    turned = [(n, t) for n, t in checkpoint.tensors.items() if t.rope_heads]
    assert {t.rope_heads for _, t in turned} == {2, 4}
    assert any(n.endswith(".bias") for n, _ in turned)
    (tmp_path / "copy").mkdir()
    write_shards(tmp_path / "copy", turned, 1 << 30)
    (tmp_path / "copy" / "config.json").write_text("{}")
    copy = Checkpoint.open(tmp_path / "copy")
    for n, _ in turned:
        assert torch.equal(copy.read(n), checkpoint.read(n))


def test_a_split_file(source: Any, tmp_path: Path) -> None:
    peers(tmp_path / "a.gguf", source("llama"), {}, part="1 of 2")
    with pytest.raises(CompressError, match="one of 2 parts"):
        Checkpoint.open(tmp_path)


def test_config_that_is_not_its_own(source: Any, tmp_path: Path) -> None:
    out = packed(source("llama"), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    from compress.blocks import BlockModel

    with pytest.raises(CompressError, match=r"config\.json implies"):
        BlockModel(Weights(Checkpoint.open(out)), torch.float32, torch.device("cpu"))


# -- what is written of the model ---------------------------------------------------------------------------------


def test_metadata(source: Any, tmp_path: Path) -> None:
    out = packed(source("qwen3"), tmp_path / "out", RTN(bits=3, group_size=-1))
    fields = {k: f.contents() for k, f in GGUFReader(out / "model.gguf").fields.items()}
    expected = {
        "general.architecture": "qwen3",
        "general.file_type": 2,
        "qwen3.block_count": 2,
        "qwen3.context_length": 128,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {k: fields[k] for k in expected} == expected
    assert json.loads(fields["compress.layers"])["model.layers.0.mlp.up_proj"] == [3, -1]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 320
    assert (tokens[0], kinds[0], tokens[319], kinds[319], kinds[5]) == ("<|end|>", 3, "[PAD319]", 5, 1)


def test_rope_frequencies_of_llama3(source: Any, tmp_path: Path) -> None:
    """llama.cpp divides its frequencies by these: what is left are transformers' own."""
    out = packed(source("llama, rope of llama 3"), tmp_path / "out")
    (factors,) = (t.data for t in GGUFReader(out / "model.gguf").tensors if t.name == "rope_freqs.weight")
    config = load_config(out)
    model = AutoModelForCausalLM.from_config(config)
    plain = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    assert len(set(factors.tolist())) > 3
    assert torch.allclose(plain / torch.from_numpy(factors.copy()), model.model.rotary_emb.inv_freq, rtol=1e-6)
    real = LLAMA3 | {"rope_theta": 500000.0, "original_max_position_embeddings": 8192}
    assert gguf_config.rope_factors(real, 128)[-1] == 8.0


REFUSED: dict[str, tuple[Any, str]] = {
    "gpt2": (GPT2Config(vocab_size=320, n_embd=64, n_layer=1, n_head=4), "model_type 'gpt2' is not written"),
    "gelu": (LlamaConfig(**SIZES, hidden_act="gelu"), "not silu"),
    "dynamic rope": (
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "rope of type dynamic",
    ),
    "yarn of its own": (Qwen2Config(**SIZES, rope_parameters=YARN | {"beta_fast": 4.0}), "with beta_fast 4.0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_any_work(case: str, make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    config, expected = REFUSED[case]
    folder = make_model(config, tmp_path / "model", tokenizer)
    if case == "gpt2":  # whose layers the format refuses first
        with pytest.raises(CompressError, match=expected):
            writer.refuse(Checkpoint.open(folder))
        return
    with pytest.raises(CompressError, match=expected):
        packed(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_shortens_the_context(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    folder = make_model(MistralConfig(**SIZES, sliding_window=32), tmp_path / "model", tokenizer)
    assert writer.describe(Checkpoint.open(folder))[1]["llama.context_length"] == 32


def test_tensors_without_a_place(source: Any) -> None:
    checkpoint = Checkpoint.open(source("llama"))
    some = checkpoint.tensors["model.norm.weight"]
    odd = Checkpoint(checkpoint.folder, checkpoint.config, {**checkpoint.tensors, "model.mtp.weight": some})
    with pytest.raises(CompressError, match="no place in a GGUF file"):
        writer.refuse(odd)
    writer.refuse(
        Checkpoint(checkpoint.folder, checkpoint.config, {"model.layers.0.self_attn.rotary_emb.inv_freq": some})
    )


def test_no_tokenizer(make_model: Any, tmp_path: Path) -> None:
    folder = make_model(MODELS["llama"], tmp_path / "model")
    with pytest.raises(CompressError, match=r"put tokenizer\.json"):
        writer.refuse(Checkpoint.open(folder))


def test_disk_that_is_full(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    checkpoint = Checkpoint.open(source("llama"))
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", full)
    with pytest.raises(CompressError, match="cannot be written"):
        writer.write(tmp_path / "model.gguf", checkpoint.tensors.items(), checkpoint, {})
    assert not (tmp_path / "model.gguf").exists()


# -- tokenizers ---------------------------------------------------------------------------------------------------


def steps(*kinds: Any) -> dict[str, Any]:
    return {"pre_tokenizer": kinds[0] if len(kinds) == 1 else {"type": "Sequence", "pretokenizers": list(kinds)}}


def split(regex: str, **more: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **more}


WHOLE, RAW = {"type": "ByteLevel", "use_regex": True}, {"type": "ByteLevel", "use_regex": False}
LLAMA3_RULE = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
RULES = {
    "gpt-2": steps(WHOLE),
    "smollm": steps({"type": "Digits", "individual_digits": True}, WHOLE),
    "llama-bpe": steps(split(LLAMA3_RULE), RAW),
    "qwen2": steps(split(LLAMA3_RULE.replace("{1,3}", "")), RAW) | {"normalizer": {"type": "NFC"}},
}


@pytest.mark.parametrize("name", RULES)
def test_rules_have_llama_cpps_names(name: str) -> None:
    assert gguf_tokenizer._rule(RULES[name], "here") == name


def test_rules_are_transformers_too() -> None:
    """transformers reads the names back: its table of rules is the same."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as theirs

    for rule, name in gguf_tokenizer._RULES.items():
        assert theirs[name] == rule


@pytest.mark.parametrize(
    "plain",
    [
        steps({"type": "Whitespace"}),
        steps(split("x+"), RAW),
        steps(split(LLAMA3_RULE, invert=True), RAW),
        steps(split(LLAMA3_RULE, behavior="Removed"), RAW),
        steps({**WHOLE, "add_prefix_space": True}),
        {"pre_tokenizer": None},
        steps(WHOLE) | {"normalizer": {"type": "Lowercase"}},
    ],
)
def test_rules_without_a_name(plain: dict[str, Any]) -> None:
    with pytest.raises(CompressError):
        gguf_tokenizer._rule(plain, "here")


def test_pieces_with_bytes_to_fall_back_on(tmp_path: Path) -> None:
    """Llama 2's kind: scores in the order of the merges; transformers cuts text from the file as from the folder."""
    from transformers import LlamaTokenizer

    words = ["\u2581the", "\u2581red", "\u2581fox", "fox", "re", "ed", "\u2581t", "he", "\u2581r", "fo"]
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "r"), ("e", "d"), ("\u2581r", "ed")]
    merges += [("r", "e"), ("f", "o"), ("fo", "x"), ("\u2581", "fox")]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *sorted(set("".join(words))), *words]
    made = LlamaTokenizer(vocab={t: i for i, t in enumerate(dict.fromkeys(tokens))}, merges=merges)
    made.save_pretrained(tmp_path)
    found = gguf_tokenizer.describe(tmp_path, 300)
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    assert [kinds[t] for t in ("<unk>", "<s>", "<0x41>", "fox", "[PAD299]")] == [2, 3, 6, 1, 5]
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    assert scores["\u2581t"] == 0 > scores["he"] > scores["\u2581the"] > scores["\u2581fox"]


def test_unigram_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0), ("b", -1.0)], 0))).save_pretrained(
        tmp_path
    )
    with pytest.raises(CompressError, match="Unigram"):
        gguf_tokenizer.describe(tmp_path, 10)


def test_more_tokens_than_rows(source: Any) -> None:
    with pytest.raises(CompressError, match="the embeddings hold 100 rows"):
        gguf_tokenizer.describe(source("llama"), 100)


def test_zero_points_as_minima(source: Any, tmp_path: Path) -> None:
    """An asymmetric grid, exported: Q4_1, whose minimum is the rounded product of scale and zero point."""
    from compress.export import export

    first = tmp_path / "first"
    options: dict[str, Any] = {"format": "native", "no_eval": True, "no_verify": True}
    compress.run(source("qwen2"), RTN(bits=3, group_size=32, symmetric=False), first, **options)
    export(first, tmp_path / "out", "gguf", lossy=True, check=False)
    weights, before = (Weights(Checkpoint.open(f)) for f in (tmp_path / "out", first))
    name = "model.layers.1.mlp.down_proj"
    assert weights.storage(name).kind == "affine"
    assert weights.storage(name).bits == 3
    far = (weights.read(name + ".weight").float() - before.read(name + ".weight").float()).abs().max()
    assert 0 < float(far) < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float16)
    assert torch.equal(logits(model), logits(ours(tmp_path / "out", torch.float16)))
