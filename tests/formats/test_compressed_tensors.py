"""compressed-tensors files: to the byte what its own package writes, to the bit what it reads."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.formats import FORMATS, of_config
from compress.formats.base import Held, LayerShape
from compress.formats.compressed_tensors import CompressedTensors
from compress.packed.uniform import UniformGrid
from compress.passes.gptq import GPTQ
from compress.types import LayerStats, Storage

FORMAT = CompressedTensors()
BITS = range(2, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAME = "model.layers.0.mlp.up_proj"


def layer(
    out: int,
    columns: int,
    bits: int,
    size: int,
    symmetric: bool,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> UniformGrid:
    """Random codes, zero points and scales of both signs."""
    g = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else columns // size
    codes = torch.randint(2**bits, (out, columns), generator=g, dtype=torch.uint8)
    scales = (torch.randn(out, groups, generator=g) * 0.1).to(dtype)
    zeros = None if symmetric else torch.randint(1, 2**bits, (out, groups), generator=g, dtype=torch.uint8)
    return UniformGrid(codes, scales, zeros, bits, size)


def same(a: UniformGrid, b: UniformGrid) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    fields = ("codes", "scales", "zeros", "g_idx")
    return a.storage == b.storage and all(equal(getattr(a, f), getattr(b, f)) for f in fields)


def shape_of(packed: UniformGrid, **changes: Any) -> LayerShape:
    return LayerShape(NAME, packed.shape[0], packed.shape[1], **changes)


def held(name: str, packed: UniformGrid) -> Held:
    return Held(name, name, packed.shape, packed.storage, packed.scales.dtype)


def config_of(packed: UniformGrid) -> dict[str, Any]:
    """As a reader gets it: through JSON."""
    value: dict[str, Any] = json.loads(json.dumps(FORMAT.config([held(NAME, packed)], ["lm_head"])))
    return value


def scheme_of(config: dict[str, Any]) -> QuantizationScheme:
    """The scheme that compressed-tensors itself makes of our config."""
    ours = copy.deepcopy(config)
    parsed = QuantizationConfig.model_validate(ours)
    scheme = parsed.config_groups["group_0"]
    assert isinstance(scheme, QuantizationScheme)
    return scheme


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "columns", "size"), [(8, 64, 16), (7, 45, 9), (5, 37, -1), (1, 1, -1), (33, 96, 32)])
def test_bytes_equal_their_packer(out: int, columns: int, size: int, symmetric: bool, bits: int) -> None:
    packed = layer(out, columns, bits, size, symmetric)
    tensors = FORMAT.pack(packed)
    offset = 2 ** (bits - 1)
    signed = (packed.codes.to(torch.int16) - offset).to(torch.int8)
    theirs = pack_to_int32(signed, bits)
    assert tensors["weight_packed"].dtype == torch.int32
    assert torch.equal(tensors["weight_packed"], theirs)
    assert torch.equal(unpack_from_int32(tensors["weight_packed"], bits, torch.Size(packed.shape)), signed)
    assert tensors["weight_shape"].tolist() == [out, columns]
    assert tensors["weight_shape"].dtype == torch.int64
    assert torch.equal(tensors["weight_scale"], packed.scales)
    if packed.zeros is None:
        assert set(tensors) == {"weight_packed", "weight_scale", "weight_shape"}
    else:
        zeros = (packed.zeros.to(torch.int16) - offset).to(torch.int8)
        assert torch.equal(tensors["weight_zero_point"], pack_to_int32(zeros, bits, packed_dim=0))
        assert tensors["weight_zero_point"].is_contiguous()
    assert set(tensors) <= set(FORMAT.suffixes)
    assert FORMAT.layers([f"{NAME}.{s}" for s in tensors], {}) == {NAME}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("out", "columns", "size"), [(8, 64, 16), (7, 45, 9), (5, 37, -1)])
def test_their_dequantisation_is_ours(
    out: int, columns: int, size: int, symmetric: bool, bits: int, dtype: torch.dtype
) -> None:
    packed = layer(out, columns, bits, size, symmetric, dtype)
    assert bool((packed.scales < 0).any())
    dense = PackedQuantizationCompressor.decompress(FORMAT.pack(packed), scheme_of(config_of(packed)))["weight"]
    assert dense.dtype == dtype
    assert torch.equal(dense, packed.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_solved_layer_reads_the_same(symmetric: bool) -> None:
    """From the solver to their dense weight: the scales are negative where the search wanted them so."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=g)
    weight = torch.randn(24, 64, generator=g).to(torch.bfloat16)
    solved = GPTQ(3, 16, symmetric)(weight, LayerStats(200, x.T @ x / 200), torch.bfloat16)
    packed = solved.packed
    assert isinstance(packed, UniformGrid)
    assert bool((packed.scales < 0).any()) == symmetric
    dense = PackedQuantizationCompressor.decompress(FORMAT.pack(packed), scheme_of(config_of(packed)))["weight"]
    assert torch.equal(dense, packed.dequantize())


@st.composite
def layers(draw: st.DrawFn) -> UniformGrid:
    size = draw(st.sampled_from([-1, 1, 2, 3, 5, 8, 16, 24, 32, 64]))
    columns = draw(st.integers(1, 70)) if size == -1 else size * draw(st.integers(1, max(1, 70 // size)))
    out, bits, seed = draw(st.integers(1, 40)), draw(st.integers(2, 8)), draw(st.integers(0, 10**6))
    return layer(out, columns, bits, size, draw(st.booleans()), draw(st.sampled_from(DTYPES)), seed)


@given(layers())
@settings(deadline=None, max_examples=150)
def test_pack_and_back(packed: UniformGrid) -> None:
    assert FORMAT.why_not(packed.storage, shape_of(packed)) is None
    tensors, config = FORMAT.pack(packed), config_of(packed)
    back = FORMAT.unpack(NAME, tensors, config)
    assert same(back, packed)
    assert torch.equal(back.dequantize(), packed.dequantize())
    shapes = {suffix: tuple(t.shape) for suffix, t in tensors.items()}
    out, columns = FORMAT.shape(NAME, shapes, config)
    assert out == packed.shape[0]
    if packed.group_size != -1 or packed.shape[1] * packed.bits % 32 == 0:
        assert columns == packed.shape[1]
    else:  # the words of a whole row bound it from above
        assert packed.shape[1] <= columns < packed.shape[1] + 32 / packed.bits


def test_refuses_activation_ordered_groups() -> None:
    reason = FORMAT.why_not(Storage("uniform", 4, 32, True, ordered_groups=True), LayerShape(NAME, 64, 64))
    assert reason is not None
    assert "g_idx" in reason
    assert "--act-order static" in reason


def test_refuses_conv1d() -> None:
    reason = FORMAT.why_not(Storage("uniform", 4, 32, True), LayerShape(NAME, 64, 64, transposed=True))
    assert reason is not None
    assert "Conv1D" in reason
    assert "--format gptq" in reason


def test_refuses_asymmetric_experts() -> None:
    expert = LayerShape(NAME, 64, 64, expert=True)
    assert FORMAT.why_not(Storage("uniform", 4, 32, True), expert) is None
    reason = FORMAT.why_not(Storage("uniform", 4, 32, False), expert)
    assert reason is not None
    assert "--symmetric" in reason


def test_refuses_other_kinds() -> None:
    reason = FORMAT.why_not(Storage("codebook", 4, 32, True), LayerShape(NAME, 64, 64))
    assert reason is not None
    assert "codebook" in reason


@pytest.mark.parametrize(("columns", "size"), [(576, 128), (11008, 100), (11000, 128), (100, 48), (13, 4), (12, 5)])
def test_refuses_ragged_groups_and_names_sizes_that_fit(columns: int, size: int) -> None:
    reason = FORMAT.why_not(Storage("uniform", 4, size, True), LayerShape(NAME, 64, columns))
    assert reason is not None
    assert f"group size {size} does not divide in_features {columns}" in reason
    hint = reason.split("--group-size")[1].replace("or", ",").split(",")
    sizes = [int(word) for word in hint if word.strip()]
    assert -1 in sizes
    for fitting in sizes:
        assert FORMAT.why_not(Storage("uniform", 4, fitting, True), LayerShape(NAME, 64, columns)) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 32])
def test_config(symmetric: bool, size: int) -> None:
    config = config_of(layer(32, 64, 4, size, symmetric))
    assert config["quant_method"] == "compressed-tensors"
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"
    assert config["sparsity_config"] == {}
    assert config["ignore"] == ["lm_head"]
    assert config.get("dequantize", False) is not symmetric
    assert "actorder" not in json.dumps(config)
    (group,) = config["config_groups"].values()
    assert group["format"] == "pack-quantized"
    assert group["targets"] == ["Linear"]
    weights = group["weights"]
    assert (weights["num_bits"], weights["type"], weights["symmetric"]) == (4, "int", symmetric)
    assert (weights["strategy"], weights["group_size"]) == (("channel", None) if size == -1 else ("group", 32))
    assert FORMAT.files(config) == {}
    found = of_config({"quantization_config": config})
    assert found is not None
    assert found[0] is FORMATS["compressed-tensors"]


def test_their_package_parses_the_config() -> None:
    for bits in BITS:
        for size in (-1, 32):
            for symmetric in (True, False):
                scheme = scheme_of(config_of(layer(32, 64, bits, size, symmetric)))
                assert scheme.weights is not None
                assert (scheme.weights.num_bits, scheme.weights.symmetric) == (bits, symmetric)
                assert scheme.weights.actorder is None
                assert PackedQuantizationCompressor.can_compress(torch.nn.Linear, scheme)


def test_mixed_settings_name_their_layers() -> None:
    few, many = layer(32, 64, 3, 32, True), layer(32, 64, 8, -1, False)
    names = {f"model.layers.{i}.mlp.down_proj": (few if i == 1 else many) for i in range(10)}
    names |= {"model.layers.0.mlp.w1": few, "model.layers.0.mlp.w10": many}  # one name begins with the other
    config = json.loads(json.dumps(FORMAT.config([held(n, p) for n, p in names.items()], [])))
    QuantizationConfig.model_validate(copy.deepcopy(config))
    assert config["dequantize"] is True
    assert sorted(len(group["targets"]) for group in config["config_groups"].values()) == [2, 10]
    for name, packed in names.items():
        assert same(FORMAT.unpack(name, FORMAT.pack(packed), config), packed)
    with pytest.raises(CompressError, match="no config group"):
        FORMAT.unpack("model.layers.12.mlp.down_proj", FORMAT.pack(few), config)


@pytest.mark.parametrize("change", [{"quantization_status": "frozen"}, {"format": "marlin-24"}])
def test_refuses_files_it_cannot_read(change: dict[str, str]) -> None:
    packed = layer(32, 64, 4, 32, True)
    with pytest.raises(CompressError, match="cannot be read"):
        FORMAT.unpack(NAME, FORMAT.pack(packed), {**config_of(packed), **change})


def test_refuses_groups_of_other_types() -> None:
    packed = layer(32, 64, 4, 32, True)
    for key, value in (("type", "float"), ("actorder", "group")):
        config = config_of(packed)
        config["config_groups"]["group_0"]["weights"][key] = value
        with pytest.raises(CompressError, match="cannot be read"):
            FORMAT.unpack(NAME, FORMAT.pack(packed), config)


def test_scales_are_stored_in_the_dtype_of_the_model() -> None:
    for dtype in DTYPES:
        assert FORMAT.scale_dtype(dtype) == dtype


# --- W8A8


def w8a8(out: int = 24, columns: int = 40, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> UniformGrid:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 256, (out, columns), generator=g, dtype=torch.uint8)
    scales = (torch.rand(out, 1, generator=g) * 0.1 + 0.01).to(dtype)
    return UniformGrid(codes, scales, None, 8, -1, None, "token")


@pytest.mark.parametrize("dtype", DTYPES)
def test_w8a8_and_back(dtype: torch.dtype) -> None:
    packed = w8a8(dtype=dtype)
    assert FORMAT.why_not(packed.storage, shape_of(packed)) is None
    tensors, config = FORMAT.pack(packed), config_of(packed)
    assert tensors["weight"].dtype == torch.int8
    assert config["format"] == "int-quantized"
    assert same(FORMAT.unpack(NAME, tensors, config), packed)
    assert FORMAT.activations(NAME, config) == "token"
    assert FORMAT.shape(NAME, {s: tuple(t.shape) for s, t in tensors.items()}, config) == packed.shape


def test_w8a8_reads_as_its_own_package_does() -> None:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor

    packed = w8a8()
    config = config_of(packed)
    scheme = scheme_of(config)
    assert scheme.input_activations is not None
    assert (scheme.input_activations.num_bits, scheme.input_activations.dynamic) == (8, True)
    state = IntQuantizationCompressor.decompress(FORMAT.pack(packed), scheme)
    assert torch.equal(state["weight"].to(torch.bfloat16), packed.dequantize())


@pytest.mark.parametrize("activations", ["token_zeropoint", "tensor", "tensor_zeropoint"])
def test_w8a8_refuses_what_readers_do_not_have(activations: str) -> None:
    packed = dataclasses.replace(w8a8(), activations=activations)
    reason = FORMAT.why_not(packed.storage, shape_of(packed))
    assert reason is not None
    assert "use --format native" in reason


@given(
    out=st.integers(1, 9), columns=st.sampled_from([32, 64]), bits=st.integers(2, 8), size=st.sampled_from([-1, 16]),
    symmetric=st.booleans(), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_nbytes_are_the_bytes(
    out: int, columns: int, bits: int, size: int, symmetric: bool, dtype: torch.dtype
) -> None:
    for packed in (layer(out, columns, bits, size, symmetric, dtype), w8a8(out, columns, dtype)):
        stored = sum(t.numel() * t.element_size() for t in FORMAT.pack(packed).values())
        assert FORMAT.nbytes(packed.storage, packed.shape, dtype) == stored
