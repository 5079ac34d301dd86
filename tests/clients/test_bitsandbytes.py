"""bitsandbytes checkpoints in plain transformers, which knows nothing of us: same weights, and what it computes.

4 bits: the weights are ours to the last bit, and so are the logits. On a CPU with AVX-512 BF16 bitsandbytes has a
second way, of its own choice: it rounds the block maxima to bfloat16 and computes in it, whatever the model's dtype;
the tests ask for the first way by the attribute that switches it, and say how far the second is from it.

8 bits: codes are ours to the last bit, a row's maximum is 127 times our scale. Its product is ours but for three
roundings: inputs pass through float16; a code is x * (127 / max), not x / (max / 127); the sum is scaled in another
order. So in a few inputs of a thousand a code falls on the other side of a tie.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from compress import CompressError, method
from compress.checkpoint import Checkpoint
from compress.formats import FORMATS
from compress.linear import install
from compress.packed import blockwise
from compress.recipe import make_recipe
from compress.types import Pass
from compress.weights import Weights
from compress.writer import write_json

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

CLIENT = f"transformers {version('transformers')}, bitsandbytes {version('bitsandbytes')}"
TOKENS = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(1))
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LLAMA = LlamaConfig(**SIZES)
BIASED = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)
GPT2 = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=320, n_positions=128, bos_token_id=0, eos_token_id=0)
MOE = Qwen3MoeConfig(
    **SIZES, moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, head_dim=16, mlp_only_layers=[]
)
FOUR = {
    "nf4": method("nf4"),
    "nf4, double quantisation": method("nf4", double_quant=True),
    "nf4, blocks of 32": method("nf4", block_size=32),
    "fp4": method("fp4", variant="bnb"),
    "fp4, double quantisation": method("fp4", variant="bnb", double_quant=True),
}
EIGHT = method("absmax", activations="token")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def name(value: object) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


@pytest.fixture(scope="module")
def source(make_model: Any, tokenizer: Any, tmp_path_factory: Any) -> Callable[[PreTrainedConfig, torch.dtype], Path]:
    """source(config, dtype): a random model with a tokenizer, made once."""
    made: dict[tuple[int, torch.dtype], Path] = {}

    def get(config: PreTrainedConfig, dtype: torch.dtype) -> Path:
        key = (id(config), dtype)
        if key not in made:
            made[key] = make_model(config, tmp_path_factory.mktemp("source") / "model", tokenizer, dtype)
        return made[key]

    return get


def load(folder: Path, dtype: torch.dtype, plain: bool = True) -> nn.Module:
    """A folder that loads without a missing, unexpected or mismatched key. plain: no bfloat16 kernel of the CPU."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} <= {dtype}
    for module in model.modules():
        if plain and isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def disk_name(weights: Weights, module: str) -> str:
    """GPT-2's files leave out the name of the part that the head stands on."""
    return module if module in weights.packed else module.removeprefix("transformer.")


def check_weights(model: nn.Module, folder: Path) -> Weights:
    """Every packed layer, and no other, is bitsandbytes'; it dequantises to our bits."""
    weights = Weights(Checkpoint.open(folder))
    assert weights.format_name == "bitsandbytes"
    found = set()
    for module_name, module in model.named_modules():
        if not isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            continue
        layer = disk_name(weights, module_name)
        found.add(layer)
        ours = weights.read(f"{layer}.weight")
        if isinstance(module, bnb.nn.Linear4bit):
            theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert theirs.dtype == ours.dtype
            assert torch.equal(theirs, ours)
        else:
            packed = weights.read_packed(layer)
            assert module.state.threshold == 0.0
            assert torch.equal(module.weight.data, packed.codes.to(torch.int16).sub(128).to(torch.int8))
            assert torch.equal(module.weight.SCB / 127, packed.scales[:, 0].float())
    assert found == weights.packed
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("label", FOUR)
def test_four_bits(label: str, dtype: torch.dtype, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(LLAMA, dtype), FOUR[label])
    model = load(packed, dtype)
    check_weights(model, packed)
    ours = logits(load(dense_twin(packed, dtype), dtype))
    far, _ = answer(CLIENT, f"llama {name(dtype)}, {label}", ours, logits(model))
    assert far == 0.0
    model = load(packed, dtype, plain=False)
    far, same = answer(CLIENT, f"llama {name(dtype)}, {label}, its CPU kernel in bfloat16", ours, logits(model))
    assert far < 0.1 * float(ours.std())
    assert same > 0.9


@pytest.mark.parametrize("label", ["nf4", "nf4, double quantisation", "int8"])
@pytest.mark.parametrize("config", [GPT2, BIASED], ids=["gpt2", "biased"])
def test_other_layers(
    config: PreTrainedConfig, label: str, source: Any, compressed: Any, dense_twin: Any, answer: Any
) -> None:
    """GPT-2 keeps its weights as [in, out] and has biases: transformers fills its Conv1D as [out, in]."""
    settings = FOUR.get(label, EIGHT)
    packed = compressed(source(config, torch.float32), settings, format="bitsandbytes")
    model = load(packed, torch.float32)
    check_weights(model, packed)
    text = f"{config.model_type}, biases, float32, {label}"
    if label == "int8":
        check_products(model, packed)
        return
    twin = load(dense_twin(packed, torch.float32, conv1d=config is GPT2), torch.float32)
    assert answer(CLIENT, text, logits(twin), logits(model))[0] == 0.0


def check_products(model: nn.Module, folder: Path) -> None:
    """Every 8-bit layer computes what ours does on its own inputs, but for codes that fall on the other side."""
    weights = Weights(Checkpoint.open(folder))
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(layer: str) -> Any:
        return lambda module, args, out: seen.__setitem__(layer, (args[0], out))

    modules = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear8bitLt)}
    hooks = [m.register_forward_hook(note(n)) for n, m in modules.items()]
    logits(model)
    for hook in hooks:
        hook.remove()
    assert seen.keys() == modules.keys()
    for layer, (x, theirs) in seen.items():
        ours = weights.read_packed(disk_name(weights, layer)).linear(x)
        bias = modules[layer].bias
        ours = ours if bias is None else ours + bias.detach()
        assert theirs.dtype == ours.dtype
        far = (theirs.float() - ours.float()).abs() / ours.float().std()
        assert float(far.max()) < 0.05
        assert float(far.mean()) < 0.004


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_eight_bits(dtype: torch.dtype, source: Any, compressed: Any, answer: Any) -> None:
    packed = compressed(source(LLAMA, dtype), EIGHT, format="bitsandbytes")
    model = load(packed, dtype)
    weights = check_weights(model, packed)
    check_products(model, packed)
    ours = load(source(LLAMA, dtype), dtype)
    for layer in weights.packed:
        install(ours.get_submodule(layer), weights.read_packed(layer))
    expected = logits(ours)
    far, same = answer(CLIENT, f"llama {name(dtype)}, int8, inputs by token", expected, logits(model))
    assert far < 0.1 * float(expected.std())  # a code that falls on the other side moves all that follows
    assert same > 0.9


@pytest.mark.parametrize("label", ["nf4", "int8"])
def test_layers_left_dense(label: str, source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    patterns = ("*.0.mlp.down_proj", "*.1.self_attn.*")
    settings = FOUR.get(label, EIGHT)
    packed = compressed(source(LLAMA, torch.bfloat16), settings, exclude=patterns, format="bitsandbytes")
    model = load(packed, torch.bfloat16)
    weights = check_weights(model, packed)
    assert len(weights.packed) == 9
    skipped = weights.checkpoint.config["quantization_config"]["llm_int8_skip_modules"]
    assert len(skipped) == 6
    assert {"lm_head", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"} <= set(skipped)
    if label == "nf4":
        ours = logits(load(dense_twin(packed, torch.bfloat16), torch.bfloat16))
        assert answer(CLIENT, "llama bfloat16, nf4, five layers left dense", ours, logits(model))[0] == 0.0


def test_tied_embeddings(toy: Path, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(toy, FOUR["nf4"])
    assert not any("lm_head" in n for n in load_file(packed / "model.safetensors"))
    model = load(packed, torch.bfloat16)
    check_weights(model, packed)
    assert type(model.lm_head) is nn.Linear
    ours = logits(load(dense_twin(packed, torch.bfloat16), torch.bfloat16))
    assert answer(CLIENT, "llama bfloat16, tied embeddings, nf4", ours, logits(model))[0] == 0.0


def test_several_settings_in_one_file(source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    """Block size and double quantisation stand in each layer's own JSON."""
    steps = [{"nf4": {"block_size": 32, "double_quant": True, "layers": "*.down_proj"}}, "nf4"]
    packed = compressed(source(LLAMA, torch.bfloat16), make_recipe({"steps": steps}, "mixed", "mixed"))
    model = load(packed, torch.bfloat16)
    check_weights(model, packed)
    ours = logits(load(dense_twin(packed, torch.bfloat16), torch.bfloat16))
    assert answer(CLIENT, "llama bfloat16, nf4, two settings in one file", ours, logits(model))[0] == 0.0


@pytest.mark.parametrize("label", ["nf4", "int8"])
def test_generate(label: str, toy: Path, compressed: Any, dense_twin: Any) -> None:
    packed = compressed(toy, FOUR.get(label, EIGHT), format="bitsandbytes")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    theirs = load(packed, torch.bfloat16).generate(TOKENS, **settings)
    assert theirs.shape[1] > TOKENS.shape[1]
    if label == "nf4":
        ours = load(dense_twin(packed, torch.bfloat16), torch.bfloat16).generate(TOKENS, **settings)
        assert torch.equal(ours, theirs)


def test_dense_experts_beside_packed_layers(source: Any, compressed: Any, dense_twin: Any, answer: Any) -> None:
    packed = compressed(source(MOE, torch.bfloat16), FOUR["nf4"], exclude=("*.experts.*",))
    model = load(packed, torch.bfloat16)
    check_weights(model, packed)
    ours = logits(load(dense_twin(packed, torch.bfloat16), torch.bfloat16))
    assert answer(CLIENT, "qwen3_moe bfloat16, nf4, experts left dense", ours, logits(model))[0] == 0.0


@pytest.mark.parametrize(
    ("config", "settings", "options", "message"),
    [
        (MOE, FOUR["nf4"], {"format": "bitsandbytes"}, "fills no fused experts"),
        (MOE, EIGHT, {"format": "bitsandbytes"}, "fills no fused experts"),
        (LLAMA, FOUR["nf4"], {"lm_head": True, "format": "bitsandbytes"}, "leave out --lm-head"),
        (LLAMA, method("absmax"), {"format": "bitsandbytes"}, "--activations token"),
        (LLAMA, method("nf4", block_size=128), {"format": "bitsandbytes"}, "use --block-size 64"),
    ],
    ids=["experts", "8-bit experts", "head", "weight-only int8", "blocks across rows"],
)
def test_refused(
    config: PreTrainedConfig, settings: Pass, options: dict[str, Any], message: str, source: Any, compressed: Any
) -> None:
    with pytest.raises(CompressError, match=message):
        compressed(source(config, torch.bfloat16), settings, **options)


@pytest.mark.parametrize(
    ("config", "settings", "options"),
    [(MOE, FOUR["nf4"], {}), (LLAMA, FOUR["nf4"], {"lm_head": True}), (LLAMA, method("nf4", block_size=128), {})],
    ids=["experts", "head", "blocks across rows"],
)
def test_our_own_format_instead(
    config: PreTrainedConfig, settings: Pass, options: dict[str, Any], source: Any, compressed: Any
) -> None:
    """Where no format was asked for, what bitsandbytes cannot hold goes into ours, and the card says why."""
    out = compressed(source(config, torch.bfloat16), settings, **options)
    assert Weights(Checkpoint.open(out)).format_name == "native"
    assert "the shapes of some layers do not fit bitsandbytes" in (out / "README.md").read_text()


def test_experts_would_stay_random(source: Any, tmp_path: Path) -> None:
    """Why fused experts are refused: transformers takes no packed tensor for them."""
    checkpoint = Checkpoint.open(source(MOE, torch.bfloat16))
    tensors = {}
    for name in checkpoint.tensors:
        value, layer = checkpoint.read(name), name.removesuffix(".weight")
        if layer.endswith("_proj"):
            packed = blockwise.fit(value.float(), "nf4", 64, False, torch.bfloat16)
            tensors |= {f"{layer}.{s}": t for s, t in FORMATS["bitsandbytes"].pack(packed).items()}
        else:
            tensors[name] = value
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    declared = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    declared |= {"llm_int8_skip_modules": ["lm_head"]}
    write_json(tmp_path / "config.json", checkpoint.config | {"quantization_config": declared})
    assert len(Weights(Checkpoint.open(tmp_path)).packed) == 2 * (4 + 3 * 4)  # as a file it is sound
    try:
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    except (RuntimeError, ValueError):
        return  # it says so: as good
    assert any(info.values()), "transformers fills fused experts now: allow them"
