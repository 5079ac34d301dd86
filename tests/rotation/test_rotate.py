"""Rotated checkpoints: the same function, flatter weights, refusals, one block at a time. A family is its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.examine import examine
from compress.recipe import parse
from compress.rotation import blocks as rotating
from compress.rotation.asked import Rotation
from compress.rotation.matrices import rotation
from compress.rotation.roles import Roles
from compress.rotation.rotate import rotate

SMALL = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
HEADS = {**LLAMA, "head_dim": 16}
MOE = {**HEADS, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    **SMALL, "intermediate_size": 48, "moe_intermediate_size": 16, "num_key_value_heads": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16,
    "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip

# transformers' config class, its settings, readers, writers and value heads that are rotated
TABLE: dict[str, tuple[str, dict[str, Any], int, int, int]] = {
    "llama": ("LlamaConfig", LLAMA, 10, 4, 4),
    "llama_tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, 10, 4, 4),
    "llama_biases": ("LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}, 10, 4, 4),
    "llama_52": ("LlamaConfig", {**LLAMA, "hidden_size": 52, "head_dim": 12}, 10, 4, 4),  # no Hadamard of order 52
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 16}, 10, 4, 4),
    "qwen2": ("Qwen2Config", LLAMA, 10, 4, 4),
    "qwen3": ("Qwen3Config", HEADS, 10, 4, 4),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0}, 4, 4, 4),
    "gemma": ("GemmaConfig", HEADS, 10, 4, 4),  # gains of 1 + weight, scaled embeddings
    "granite": ("GraniteConfig", {**LLAMA, "residual_multiplier": 0.3, "embedding_multiplier": 3.0}, 10, 4, 4),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, 24, 10, 4),
    "qwen2_moe": ("Qwen2MoeConfig", {**MOE, "shared_expert_intermediate_size": 24}, 30, 12, 4),
    "deepseek_v3": ("DeepseekV3Config", MLA, 17, 8, 8),  # norms inside, values behind a fused matrix
}


def make(name: str, folder: Path, make_model: Callable[..., Path], **more: Any) -> Path:
    import transformers

    kind, settings = TABLE[name][:2] if name in TABLE else REFUSED[name][:2]
    config = getattr(transformers, kind)(**settings | more, bos_token_id=0, eos_token_id=0)
    return make_model(config, folder)


def logits(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    rows = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(1))
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        found: Tensor = model.eval()(rows).logits
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", TABLE)
def test_same_function(name: str, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make(name, tmp_path / "model", make_model)
    done = rotate(source, tmp_path / "out", client=False)
    assert apart(logits(tmp_path / "out"), logits(source)) < 1e-5
    assert (done.readers, done.writers, done.heads, done.gains) == (*TABLE[name][2:], 5)
    assert done.largest_error < 1e-4
    assert done.logits_change is not None
    assert done.logits_change < 1e-5
    assert done.rounding_error is None
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    same = {n for n in old if torch.equal(old[n], new[n])}
    allowed = ("q_norm.weight", "k_norm.weight", "q_a_layernorm.weight", "kv_a_layernorm.weight", "q_proj.bias",
               "k_proj.bias", "q_b_proj.weight", "gate_proj.bias", "up_proj.bias", "correction_bias")  # fmt: skip
    assert all(n.endswith(allowed) for n in same), same
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    tied = "lm_head.weight" not in old
    assert done.added_bytes == (96 * 32 * 4 if tied else 0)
    assert any("no longer tied" in note for note in done.notes) == tied
    assert not (tied and config["tie_word_embeddings"])
    assert not list(tmp_path.glob("out.*"))


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_weights_are_what_the_papers_say(kind: Any, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """Against dense matrices in float64, bit by bit: rounded once to the stored bfloat16."""
    from transformers import Qwen2Config

    source = make_model(Qwen2Config(**LLAMA, tie_word_embeddings=False), tmp_path / "model", None, torch.bfloat16)
    done = rotate(source, tmp_path / "out", Rotation(kind=kind, seed=7), client=False)
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert old.keys() == new.keys()
    r1 = rotation(32, kind, 7).dense()
    want = {"model.embed_tokens.weight": old["model.embed_tokens.weight"].double() @ r1}
    want["lm_head.weight"] = old["lm_head.weight"].double() * old["model.norm.weight"].double() @ r1
    for i in range(2):
        r2 = torch.block_diag(*[rotation(8, kind, 8 * 1_000_003 + i).dense()] * 4)
        block, shared = f"model.layers.{i}.", r2[:16, :16]
        gains = [old[f"{block}{n}.weight"].double() for n in ("input_layernorm", "post_attention_layernorm")]
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
            want[f"{block}{n}.weight"] = old[f"{block}{n}.weight"].double() * gains["mlp" in n] @ r1
        want[f"{block}self_attn.v_proj.weight"] = shared.t() @ want[f"{block}self_attn.v_proj.weight"]
        want[f"{block}self_attn.v_proj.bias"] = old[f"{block}self_attn.v_proj.bias"].double() @ shared
        want[f"{block}self_attn.o_proj.weight"] = r1.t() @ old[f"{block}self_attn.o_proj.weight"].double() @ r2
        want[f"{block}mlp.down_proj.weight"] = r1.t() @ old[f"{block}mlp.down_proj.weight"].double()
    for n, value in new.items():
        assert value.dtype == torch.bfloat16
        if "norm" in n:
            assert bool((value == 1).all())
        elif n.endswith(("q_proj.bias", "k_proj.bias")):
            assert torch.equal(value, old[n])
        else:
            assert float((value != want[n].bfloat16()).float().mean()) < 1e-3, n  # sums in another order, on a tie
    assert done.largest_error < 1e-4
    assert done.rounding_error is not None
    assert 1e-4 < done.rounding_error < 2e-2
    assert done.logits_change is not None
    assert done.logits_change < 2e-2
    assert any("rounded to 16 bits" in note for note in done.notes)


def test_value_heads_alone(toy: Path, tmp_path: Path) -> None:
    """Without R1 a tied head stays tied, and only v_proj and o_proj change."""
    done = rotate(toy, tmp_path / "out", Rotation(residual=False), client=False)
    old, new = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path / "out"))
    changed = {n for n in old if not torch.equal(old[n], new[n])}
    assert changed == {f"model.layers.{i}.self_attn.{n}_proj.weight" for i in range(4) for n in "vo"}
    assert old.keys() == new.keys()
    assert (done.heads, done.readers, done.added_bytes, done.residual) == (8, 0, 0, "")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == json.loads((toy / "config.json").read_text())


def test_stream_alone(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make("qwen2", tmp_path / "model", make_model)
    done = rotate(source, tmp_path / "out", Rotation(heads=False), client=False)
    assert (done.heads, done.readers) == (0, 10)
    assert apart(logits(tmp_path / "out"), logits(source)) < 1e-5
    name = "model.layers.0.self_attn.v_proj.bias"
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert torch.equal(old[name], new[name])


def test_an_ordinary_model(toy: Path, tmp_path: Path) -> None:
    """With its tokenizer and its record; checked, loaded and quantised like any other."""
    out = tmp_path / "out"
    done = rotate(toy, out)
    assert done.proof is not None
    assert "loads it" in done.proof.clients[0]
    assert done.proof.layers == 0
    assert (out / "tokenizer.json").read_bytes() == (toy / "tokenizer.json").read_bytes()
    assert (
        "rotated the residual stream by a randomised Hadamard of order 64 and 8 value heads"
        in (out / "README.md").read_text()
    )
    record = json.loads((out / "compress.json").read_text())
    assert record["rotation"]["settings"] == {"residual": True, "heads": True, "kind": "hadamard", "seed": 0}
    assert len(record["blocks"]) == 5
    json.dumps(done.as_json())
    lines = examine(out, toy, client=False)
    assert any("0 equal the original's" in line for line in lines)
    compress.run(out, parse("rtn bits=4 group_size=32"), tmp_path / "q", no_eval=True, device="cpu")
    with pytest.raises(CompressError, match=r"already quantised"):
        rotate(tmp_path / "q", tmp_path / "no")


def test_outliers(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """A few huge columns: after rotation no column is, and round-to-nearest at 4 bits loses less."""
    source = make("llama", tmp_path / "model", make_model, hidden_size=64)
    file = source / "model.safetensors"
    tensors = load_file(file)
    hit = [n for n in tensors if n.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "up_proj.weight"))]
    for n in hit:
        tensors[n][:, [5, 40]] *= 25
    save_file(tensors, file, metadata={"format": "pt"})
    rotate(source, tmp_path / "rotated", client=False)
    rotated = load_file(tmp_path / "rotated" / "model.safetensors")
    for n in hit:
        before, after = (float(t[n].abs().max() / t[n].square().mean().sqrt()) for t in (tensors, rotated))
        assert after < 0.6 * before
        assert float(kurtosis(rotated[n])) < 0.3 * float(kurtosis(tensors[n]))
    plain, errors = logits(source), []
    method = parse("rtn bits=4 group_size=-1")
    for folder in (source, tmp_path / "rotated"):
        out = tmp_path / f"{folder.name}-q"
        compress.run(folder, method, out, format="dense", no_eval=True, no_verify=True, device="cpu")
        errors.append(apart(logits(out), plain))
    assert errors[1] < 0.7 * errors[0]


def kurtosis(x: Tensor) -> Tensor:
    return (x - x.mean()).pow(4).mean() / x.var().square()


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 96, "n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64},
        "transformer.ln_f: a LayerNorm with a bias",
    ),
    "opt": (
        "OPTConfig",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "final_layer_norm: a LayerNorm with a bias",
    ),
    "cohere": ("CohereConfig", LLAMA, "model.norm: it does not turn with its input, as RMSNorm does"),
    "olmo": ("OlmoConfig", LLAMA, "0 tensors stand outside"),  # norms without gains
    "gemma2": ("Gemma2Config", HEADS, r"layers\.0\.post_attention_layernorm: .*a post-norm"),
    "olmo2": ("Olmo2Config", LLAMA, r"layers\.0\.post_attention_layernorm: .*a post-norm"),
    "gpt_oss": (  # biases and 3-D experts that are nobody's layer
        "GptOssConfig",
        {**HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}},
        "gain cannot be folded",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """What a rotation would change is refused with its name, and nothing is written; value heads can be turned."""
    source = make(name, tmp_path / "model", make_model)
    with pytest.raises(CompressError, match=REFUSED[name][2]) as caught:
        rotate(source, tmp_path / "out")
    assert "--no-residual" in caught.value.remedy
    assert not list(tmp_path.glob("out*"))
    if name not in ("gpt2", "gemma2"):  # one with values inside a fused matrix, one without, are enough
        return
    done = rotate(source, tmp_path / "out", Rotation(residual=False), check=False)
    assert done.heads > 0
    assert apart(logits(tmp_path / "out"), logits(source)) < 1e-5


@pytest.mark.parametrize("lost", ["writers", "readers", "heads"])
def test_every_block_is_proved(
    lost: str, tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Had a role not been found, nothing would be written."""
    source = make("qwen2", tmp_path / "model", make_model)
    found = rotating.find_roles

    def forget(*given: Any) -> Roles:
        roles = found(*given)
        readers = dict(list(roles.readers.items())[1:]) if lost == "readers" else roles.readers
        writers = frozenset(list(roles.writers)[1:]) if lost == "writers" else roles.writers
        heads = roles.heads
        if lost == "heads":
            heads = tuple(type(h)(h.maker, h.reader, h.rows.flip(1)[:1]) for h in heads)
        return Roles(roles.gains, readers, writers, heads)

    monkeypatch.setattr(rotating, "find_roles", forget)
    with pytest.raises(CompressError, match=r"model.layers.0: rotated, its output moves by .* 1e-03 is allowed"):
        rotate(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_stands_outside_is_proved(
    tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make("llama", tmp_path / "model", make_model)
    plain = BlockModel.embed
    monkeypatch.setattr(BlockModel, "embed", lambda self, tokens: plain(self, tokens) + 1.0)
    with pytest.raises(CompressError, match=r"what enters block 0 moves by"):
        rotate(source, tmp_path / "out")


def test_a_stopped_run_goes_on(toy: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        assert total == 5
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(toy, tmp_path / "out", step=stop)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == 3
    with pytest.raises(CompressError, match=r"an unfinished run differs in rotate.seed"):
        rotate(toy, tmp_path / "out", Rotation(seed=1))
    rotate(toy, tmp_path / "out", check=False)
    rotate(toy, tmp_path / "whole", check=False)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert (tmp_path / "out" / "compress.json").read_bytes() == (tmp_path / "whole" / "compress.json").read_bytes()
    with pytest.raises(CompressError, match="--overwrite"):
        rotate(toy, tmp_path / "out")


@pytest.mark.parametrize("residual", [True, False])
def test_one_block_at_a_time(
    residual: bool, tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in memory does not grow with depth, and a block's tensors are read once (block 0's once more)."""
    load, read = BlockModel.load, Checkpoint.read
    peaks: list[int] = []
    reads: dict[str, int] = {}

    def real(model: BlockModel) -> int:
        return sum(p.nbytes for p in model.model.parameters() if p.device.type != "meta")

    def watched(self: BlockModel, block: int, ready: Any = None) -> Any:
        others = [p for i, b in enumerate(self._blocks) if i != block for p in b.parameters()]
        assert all(p.device.type == "meta" for p in others)
        assert real(self) == 0, "embeddings and head are gone while blocks are worked on"
        loaded = load(self, block, ready)
        peaks.append(real(self))
        return loaded

    def counted(self: Checkpoint, name: str, empty: Any = None) -> Tensor:
        reads[name] = reads.get(name, 0) + 1
        return read(self, name, empty)

    monkeypatch.setattr(BlockModel, "load", watched)
    monkeypatch.setattr(Checkpoint, "read", counted)
    most = []
    for depth in (2, 5):
        source = make("llama", tmp_path / str(depth), make_model, num_hidden_layers=depth)
        peaks.clear()
        reads.clear()
        rotate(source, tmp_path / f"out{depth}", Rotation(residual=residual), check=False)
        most.append(max(peaks))
        assert all(n <= (2 if "layers.0." in name or "layers" not in name else 1) for name, n in reads.items())
    assert most[0] == most[1]


def test_roles_are_found_once(tmp_path: Path, make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one kind are tried with what was found in the first; a block of another kind is looked at anew."""
    found, calls = rotating.find_roles, []
    monkeypatch.setattr(rotating, "find_roles", lambda *given: calls.append(given[0].index) or found(*given))
    rotate(make("llama", tmp_path / "a", make_model, num_hidden_layers=3), tmp_path / "out", check=False)
    assert calls == [0]
    calls.clear()
    rotate(make("deepseek_v3", tmp_path / "b", make_model, num_hidden_layers=3), tmp_path / "moe", check=False)
    assert calls == [0, 1]


def test_float16_that_overflows(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    """A gain that float16 holds beside weights that it holds, and a product that it does not."""
    from transformers import LlamaConfig

    source = make_model(LlamaConfig(**LLAMA), tmp_path / "model", None, torch.float16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"].fill_(1000.0)
    tensors["lm_head.weight"][3] = 500.0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CompressError, match=r"lm_head.weight: .*overflows float16; store the model in bfloat16"):
        rotate(source, tmp_path / "out")


def test_pruned_weights_are_mentioned(tmp_path: Path, make_model: Callable[..., Path]) -> None:
    source = make("llama", tmp_path / "model", make_model)
    tensors = load_file(source / "model.safetensors")
    for n, value in tensors.items():
        if "_proj" in n:
            value[:, ::2] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    assert any("undoes pruning" in n for n in rotate(source, tmp_path / "out", check=False).notes)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "givens"}, "no kind 'givens'"),
        ({"residual": False, "heads": False}, "nothing is left to rotate"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(CompressError, match=words) as caught:
        Rotation(**settings)
    assert caught.value.where.startswith("--")
    assert caught.value.remedy
