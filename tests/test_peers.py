"""Checkpoints that other tools wrote: opened, dequantised to the bits that those tools dequantise to, scored.

tests/data/peers holds small ones of gptqmodel and llm-compressor with the scripts that made them; compressed-tensors
and bitsandbytes write theirs here, where they are installed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress.checkpoint import Checkpoint, tensor_bytes
from compress.errors import CompressError
from compress.examine import examine
from compress.export import export
from compress.inventory import inventory
from compress.linear import PackedLinear
from compress.types import Storage
from compress.weights import Weights
from compress.writer import write_json

DATA = Path(__file__).resolve().parent / "data" / "peers"


def grid(bits: int, size: int, symmetric: bool = True, ordered: bool = False, activations: str = "") -> Storage:
    return Storage("uniform", bits, size, symmetric, ordered, activations)


#: by folder: how layers are stored, by the end of their names; "" for all others
KEPT: dict[str, dict[str, Storage]] = {
    "gptqmodel-4bit-g32": {"": grid(4, 32)},
    "gptqmodel-4bit-g32-act-order": {"": grid(4, 32, ordered=True)},
    "gptqmodel-4bit-g32-asymmetric": {"": grid(4, 32, False)},
    "gptqmodel-3bit-g32": {"": grid(3, 32)},
    "gptqmodel-2bit-g32-v2": {"": grid(2, 32, False)},
    "gptqmodel-8bit-row": {"": grid(8, -1)},
    "gptqmodel-mixed": {"down_proj": grid(8, 64), "": grid(4, 32)},
    "llmcompressor-w4a16": {"": grid(4, 32)},
    "llmcompressor-w4a16-asymmetric": {"": grid(4, 32, False)},
    "llmcompressor-w3a16-float32": {"": grid(3, 32)},
    "llmcompressor-w8a8": {"": grid(8, -1, activations="token")},
    "llmcompressor-w8a8-asymmetric-inputs": {"": grid(8, -1, activations="token_zeropoint")},
    "llmcompressor-w8a8-tensor": {"": grid(8, -1, activations="token")},
    "llmcompressor-w8a16-tensor": {"": grid(8, -1)},
    "llmcompressor-mixed": {
        "down_proj": grid(8, -1, activations="token"),
        "gate_proj": grid(8, -1),
        "up_proj": grid(8, -1),
        "": grid(4, 32),
    },
    "llmcompressor-head": {"": grid(4, 32, False)},
}
DENSE = {"gptqmodel-mixed": 1, "llmcompressor-mixed": 1}


def sha(weight: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(weight)).hexdigest()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(folder: Path, expected: dict[str, Tensor] | dict[str, list[str]], kinds: dict[str, Storage]) -> Weights:
    """A folder against dense weights (or their dtypes and hashes) by layer, and how each layer is stored."""
    weights = Weights(Checkpoint.open(folder))
    assert weights.packed == set(expected)
    shapes = weights.shapes()
    for layer, value in expected.items():
        found, packed = weights.read(f"{layer}.weight"), weights.read_packed(layer)
        kind = next(k for end, k in kinds.items() if layer.endswith(end))
        assert packed.storage == weights.storage(layer) == kind
        assert tuple(found.shape) == packed.shape == shapes[f"{layer}.weight"]
        assert weights.dtype(f"{layer}.weight") == found.dtype
        assert weights.activations(layer) == kind.activations
        if isinstance(value, Tensor):
            assert value.dtype == found.dtype
            assert torch.equal(value, found)
        else:
            assert [name(found.dtype), sha(found)] == value
    return weights


@pytest.fixture
def scored(tokenizer: Any, text_file: Path, tmp_path: Path) -> Callable[[Path], float]:
    """scored(folder): its perplexity on a few windows, with the tests' own tokenizer."""
    text = tmp_path / "short.txt"
    text.write_text(text_file.read_text()[:2000])

    def run(folder: Path) -> float:
        copied = tmp_path / "scored"
        shutil.copytree(folder, copied)
        tokenizer.save_pretrained(copied)
        found, _, _ = compress.score(copied, str(text), window=64, device="cpu")
        return found.perplexity

    return run


@pytest.mark.parametrize("label", KEPT)
def test_kept(label: str, scored: Callable[[Path], float]) -> None:
    folder = DATA / label
    expected = json.loads((folder / "expected.json").read_text())
    weights = check(folder, expected["weights"], KEPT[label])
    assert len(weights.packed) == 14 - DENSE.get(label, 0) + (label == "llmcompressor-head")
    assert 50 < scored(folder) < 5000  # random weights: 320 for guessing
    assert sum(f.stat().st_size for f in folder.iterdir()) < 300_000


@pytest.mark.parametrize("label", KEPT)
def test_every_command_takes_them(label: str, tmp_path: Path) -> None:
    """Listed, checked, loaded packed, and moved to our own format with every value as it was."""
    folder = DATA / label
    weights = Weights(Checkpoint.open(folder))
    listed = {x.name: x for x in inventory(folder).layers}
    assert set(listed) == weights.packed
    assert all(x.storage.bits <= x.bits_per_weight < x.storage.bits + 3 for x in listed.values())
    assert "packed ones dequantise, all values are finite" in examine(folder, client=False)[1]
    model = compress.load(folder, device="cpu", dtype="float32", kernels=False)
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == len(weights.packed)
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.arange(20)[None]).logits).all())
    done = export(folder, tmp_path / "native", "native", client=False)
    assert (done.losses, done.largest_change) == ({}, 0)
    moved = Weights(Checkpoint.open(tmp_path / "native"))
    assert all(torch.equal(weights.read(n), moved.read(n)) for n in weights.shapes())


def test_no_folder_without_a_test() -> None:
    assert {f.name for f in DATA.iterdir() if f.is_dir() and not f.name.startswith("__")} == set(KEPT)


def test_dynamic_settings_of_gptqmodel() -> None:
    """The first pattern that fits a layer's name counts; one that excludes is no setting."""
    from compress.formats.gptq import _settings

    config = {"bits": 4, "group_size": 32, "dynamic": {"-:.*k_proj": {}, "+:.*1.*proj": {"bits": 8}, ".*": {"bits": 2}}}
    assert _settings("layers.1.q_proj", config)["bits"] == 8
    assert _settings("layers.0.q_proj", config)["bits"] == 2
    with pytest.raises(CompressError, match="pack_dtype 'int64'"):
        _settings("a", {**config, "pack_dtype": "int64"})


# -- compressed-tensors' own compressor ------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[list[dict[str, Any]], dict[str, Storage]]] = {
    "4 bits, groups": (
        [{"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}],
        {"": grid(4, 32)},
    ),
    "5 bits, rows, asymmetric": (
        [{"targets": ["Linear"], "weights": {"num_bits": 5, "strategy": "channel", "symmetric": False}}],
        {"": grid(5, -1, False)},
    ),
    "4 bits, whole tensor": (
        [{"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "tensor"}}],
        {"": grid(4, -1)},
    ),
    "8 bits, whole tensor, asymmetric": (
        [{"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "tensor", "symmetric": False}}],
        {"": grid(8, -1, False)},
    ),
    "int-quantized weights alone": (
        [{"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}, "format": "int-quantized"}],
        {"": grid(8, -1)},
    ),
    "naive-quantized, 4 bits in groups, asymmetric": (
        [
            {
                "targets": ["Linear"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
                "format": "naive-quantized",
            }
        ],
        {"": grid(4, 32, False)},
    ),
    "actorder, observer, 32-bit scales": (
        [
            {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 4,
                    "strategy": "group",
                    "group_size": 32,
                    "actorder": "static",
                    "observer": "mse",
                    "observer_kwargs": {"maxshrink": 0.2},
                },
            }
        ],
        {"": grid(4, 32)},
    ),
    # an exact name before a pattern, a pattern before a class, in whatever order the groups stand
    "names before patterns before classes": (
        [
            {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}},
            {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 64}},
            {"targets": ["re:.*down_proj"], "weights": {"num_bits": 3, "strategy": "channel"}},
            {
                "targets": ["model.layers.0.mlp.down_proj"],
                "weights": {"num_bits": 4, "strategy": "group", "group_size": 32},
            },
        ],
        {
            "layers.0.mlp.down_proj": grid(4, 32),
            "down_proj": grid(3, -1),
            "up_proj": grid(4, 64),
            "gate_proj": grid(4, 64),
            "": grid(8, -1),
        },
    ),
}


@pytest.mark.parametrize("label", WRITTEN)
def test_compressed_tensors(label: str, toy: Path, tmp_path: Path, scored: Callable[[Path], float]) -> None:
    """A model that compressed-tensors quantises, compresses and saves; decompressed by itself, and by us."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor, decompress_module
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams
    from transformers import AutoModelForCausalLM

    groups, kinds = WRITTEN[label]
    groups = copy.deepcopy(groups)
    config = QuantizationConfig(config_groups={f"group_{i}": g for i, g in enumerate(groups)}, ignore=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(toy)
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            args, weight = module.quantization_scheme.weights, module.weight.data
            rows = weight if args.strategy != "group" else weight.reshape(len(weight), -1, args.group_size)
            rows = rows.reshape(1, -1) if args.strategy == "tensor" else rows
            low, high = rows.amin(-1), rows.amax(-1)
            scale, zero = calculate_qparams(low, high, args)
            module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale.dtype)
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data = zero.reshape(module.weight_zero_point.shape)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    compressor.update_config(folder)
    expected = {}
    for layer, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            decompress_module(module)
            expected[layer] = module.weight.data
    assert len(expected) == 28
    check(folder, expected, kinds)
    assert 50 < scored(folder) < 5000


def test_old_files_of_compressed_tensors(toy: Path, tmp_path: Path) -> None:
    """Zero points unpacked, as before 0.9; of symmetric layers; a g_idx; 3 bits with 10 codes a word, refused."""
    made = tmp_path / "made"
    compress.run(toy, compress.RTN(bits=4, group_size=32, symmetric=False), made, no_eval=True, format="native")
    ours = Weights(Checkpoint.open(made))
    layer = "model.layers.1.mlp.up_proj"
    packed: Any = ours.read_packed(layer)
    from compress.formats.compressed_tensors import CompressedTensors

    tensors = CompressedTensors().pack(packed)
    weights: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }
    older = {**tensors, "weight_zero_point": (packed.zeros.to(torch.int16) - 8).to(torch.int8)}
    reader = CompressedTensors()
    assert torch.equal(reader.unpack(layer, older, config).dequantize(), packed.dequantize())

    symmetric = copy.deepcopy(config)
    symmetric["config_groups"]["group_0"]["weights"]["symmetric"] = True  # type: ignore[index]
    found = reader.unpack(layer, {**tensors, "weight_zero_point": torch.zeros(128, 2, dtype=torch.int8)}, symmetric)
    assert found.zeros is None

    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    g_idx = (torch.arange(64) // 32)[order]
    found = reader.unpack(layer, {**tensors, "weight_g_idx": g_idx}, config)
    wanted = (packed.codes.to(torch.int16) - packed.zeros[:, g_idx].to(torch.int16)).to(torch.bfloat16)
    assert torch.equal(found.dequantize(), wanted * packed.scales[:, g_idx])
    for trivial in (torch.arange(64) // 32, torch.full((64,), -1)):
        assert reader.unpack(layer, {**tensors, "weight_g_idx": trivial}, config).g_idx is None

    three = copy.deepcopy(symmetric)
    three["config_groups"]["group_0"]["weights"]["num_bits"] = 3  # type: ignore[index]
    padded = {"weight_packed": torch.zeros(128, 7, dtype=torch.int32), "weight_scale": tensors["weight_scale"]}
    with pytest.raises(CompressError, match="7 words a row cannot hold 64 codes of 3 bits"):
        reader.unpack(layer, {**padded, "weight_shape": tensors["weight_shape"]}, three)


def test_rows_that_end_inside_a_word(make_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """100 columns of 3 bits are 10 words, and so are 101 to 106: the width stands in weight_shape alone."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4, vocab_size=320,
        max_position_embeddings=128,
    )  # fmt: skip
    source = make_model(config, tmp_path / "source", tokenizer)
    compress.run(source, compress.RTN(bits=3, group_size=-1), tmp_path / "out", no_eval=True)
    weights = Weights(Checkpoint.open(tmp_path / "out"))
    assert weights.read("model.layers.0.mlp.down_proj.weight").shape == (64, 100)


def test_static_inputs_are_refused(tmp_path: Path) -> None:
    """Scales of inputs that were measured beforehand are not what any of our layers computes."""
    folder = tmp_path / "static"
    shutil.copytree(DATA / "llmcompressor-w8a8", folder)
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    write_json(folder / "config.json", config)
    weights = Weights(Checkpoint.open(folder))
    with pytest.raises(CompressError, match="dynamic False cannot be read"):
        weights.read_packed("model.layers.0.mlp.up_proj")


# -- bitsandbytes through transformers -------------------------------------------------------------------------------

BNB: dict[str, tuple[dict[str, Any], Storage]] = {
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, Storage("blockwise", 4, 64)),
    "nf4, double": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        Storage("blockwise", 4, 64),
    ),
    "fp4": ({"load_in_4bit": True}, Storage("blockwise", 4, 64)),
    "int8": ({"load_in_8bit": True}, grid(8, -1)),
    "int8, vector-wise": ({"load_in_8bit": True, "llm_int8_threshold": 0.0}, grid(8, -1, activations="token")),
}


@pytest.mark.parametrize("label", BNB)
def test_bitsandbytes(label: str, toy: Path, tmp_path: Path, scored: Callable[[Path], float]) -> None:
    """transformers quantises on loading and saves; what it dequantises, and what we do."""
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings, kind = BNB[label]
    if kind.kind == "blockwise":
        table = "nf4" if "nf4" in label else "fp4-bnb"
        kind = Storage("blockwise", 4, 64, details=(("double_quant", "double" in label), ("table", table)))
    model = AutoModelForCausalLM.from_pretrained(toy, quantization_config=BitsAndBytesConfig(**settings))
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    expected: dict[str, Tensor] = {}
    for layer, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            expected[layer] = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            expected[layer] = module.weight.data * (module.weight.SCB / 127)[:, None]
            theirs = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
            torch.testing.assert_close(expected[layer], theirs, rtol=3e-7, atol=0)  # times float32(1 / 127)
    assert len(expected) == 28
    check(folder, expected, {"": kind})
    assert 50 < scored(folder) < 5000


def test_early_config_of_bitsandbytes(toy: Path, tmp_path: Path) -> None:
    """Without quant_method and weight_format, as the first releases wrote them."""
    bnb = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    chosen = BitsAndBytesConfig(load_in_8bit=True)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(toy, quantization_config=chosen)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"load_in_8bit": True, "llm_int8_threshold": 6.0}
    write_json(tmp_path / "config.json", config)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.endswith("weight_format")}
    assert len(kept) < len(tensors)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    expected = {
        n: m.weight.data * (m.weight.SCB / 127)[:, None]
        for n, m in model.named_modules()
        if isinstance(m, bnb.nn.Linear8bitLt)
    }
    check(tmp_path, expected, {"": grid(8, -1)})
