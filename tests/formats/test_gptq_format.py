"""GPTQ files, v1 and v2: constants, layout and an independent reader."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CompressError
from compress.formats import FORMATS, of_config
from compress.formats.base import Held, LayerShape
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.gptq import GPTQFormat
from compress.packed.uniform import UniformGrid, group_index
from compress.types import Storage

V1, V2 = GPTQFormat(1), GPTQFormat(2)
BITS = [2, 3, 4, 8]
NAME = "model.layers.0.mlp.up_proj"


def layer(
    out: int, columns: int, bits: int, size: int, symmetric: bool, ordered: bool = False, seed: int = 0
) -> UniformGrid:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if size == -1 else -(-columns // size)
    codes = torch.randint(2**bits, (out, columns), generator=g, dtype=torch.uint8)
    scales = (torch.randn(out, groups, generator=g) * 0.1).half()
    zeros = None if symmetric else torch.randint(1, 2**bits, (out, groups), generator=g, dtype=torch.uint8)
    index = group_index(columns, size)[torch.randperm(columns, generator=g)].to(torch.int32) if ordered else None
    return UniformGrid(codes, scales, zeros, bits, size, index)


def same(a: UniformGrid, b: UniformGrid) -> bool:
    def equal(x: Tensor | None, y: Tensor | None) -> bool:
        if x is None or y is None:
            return x is y
        return x.dtype == y.dtype and torch.equal(x, y)

    fields = ("codes", "scales", "zeros", "g_idx")
    return a.storage == b.storage and all(equal(getattr(a, f), getattr(b, f)) for f in fields)


def held(name: str, packed: UniformGrid) -> Held:
    return Held(name, name, packed.shape, packed.storage, packed.scales.dtype)


def config_of(fmt: GPTQFormat, packed: UniformGrid) -> dict[str, Any]:
    """As a reader gets it: through JSON."""
    value: dict[str, Any] = json.loads(json.dumps(fmt.config([held(NAME, packed)], ["lm_head"])))
    return value


def field(words: np.ndarray, index: int, bits: int) -> np.ndarray:
    """Field `index` along the first axis of uint32 words that are one little-endian bit string."""
    word, shift = divmod(index * bits, 32)
    value = words[word].astype(np.uint64) >> np.uint64(shift)
    if shift + bits > 32:
        value = value | (words[word + 1].astype(np.uint64) << np.uint64(32 - shift))
    return (value & np.uint64(2**bits - 1)).astype(np.int64)


def reference_decode(tensors: dict[str, Tensor], bits: int, version: int) -> np.ndarray:
    """float16 [out, in] from the four tensors alone, in numpy integers, one input row at a time."""
    qweight = tensors["qweight"].numpy().view(np.uint32)  # [in * bits / 32, out]
    qzeros = np.ascontiguousarray(tensors["qzeros"].numpy().view(np.uint32).T)  # [out * bits / 32, groups]
    scales, g_idx = tensors["scales"].numpy(), tensors["g_idx"].numpy()
    out = qweight.shape[1]
    zeros = np.stack([field(qzeros, o, bits) for o in range(out)], axis=1)  # [groups, out]
    if version == 1:
        zeros = zeros + 1
    dense = np.empty((out, len(g_idx)), dtype=np.float16)
    for i, g in enumerate(g_idx):
        k = field(qweight, i, bits) - zeros[g]
        dense[:, i] = (scales[g].astype(np.float64) * k).astype(np.float16)
    return dense


layers = st.builds(
    layer,
    out=st.sampled_from([32, 64, 96]),
    columns=st.sampled_from([32, 64, 160]),
    bits=st.sampled_from(BITS),
    size=st.sampled_from([-1, 8, 32, 48]),  # 48 leaves a ragged last group
    symmetric=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 10**6),
).filter(  # ordered groups that came out in natural order read back as natural: no file can tell them apart
    lambda packed: packed.g_idx is None or not torch.equal(packed.g_idx, packed.g_idx.sort().values)
)


@given(layers, st.sampled_from([V1, V2]))
@settings(deadline=None, max_examples=150)
def test_pack_and_back(packed: UniformGrid, fmt: GPTQFormat) -> None:
    assert fmt.why_not(packed.storage, LayerShape(NAME, *packed.shape)) is None
    tensors, config = fmt.pack(packed), config_of(fmt, packed)
    out, columns = packed.shape
    groups = packed.scales.shape[1]
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in tensors.items()} == {
        "qweight": (torch.int32, (columns * packed.bits // 32, out)),
        "qzeros": (torch.int32, (groups, out * packed.bits // 32)),
        "scales": (torch.float16, (groups, out)),
        "g_idx": (torch.int32, (columns,)),
    }
    assert all(t.is_contiguous() for t in tensors.values())
    assert same(fmt.unpack(NAME, tensors, config), packed)
    shapes = {suffix: tuple(t.shape) for suffix, t in tensors.items()}
    assert fmt.shape(NAME, shapes, config) == packed.shape


@given(layers, st.sampled_from([V1, V2]))
@settings(deadline=None, max_examples=60)
def test_independent_reader(packed: UniformGrid, fmt: GPTQFormat) -> None:
    dense = reference_decode(fmt.pack(packed), packed.bits, fmt.version)
    assert np.array_equal(dense, packed.dequantize().numpy())


@pytest.mark.parametrize(
    ("bits", "first", "second"),
    [
        (2, 0x55555555, 0xAAAAAAAA),
        (4, 0x77777777, 0x88888888),
        (8, 0x7F7F7F7F, 0x80808080),
    ],
)
def test_symmetric_zero_words(bits: int, first: int, second: int) -> None:
    packed = layer(64, 64, bits, 32, True)
    for fmt, word in ((V1, first), (V2, second)):
        assert bool((fmt.pack(packed)["qzeros"].numpy().view(np.uint32) == word).all())


@pytest.mark.parametrize(("fmt", "value"), [(V1, 3), (V2, 4)])
def test_symmetric_zero_words_of_three_bits(fmt: GPTQFormat, value: int) -> None:
    words = fmt.pack(layer(64, 64, 3, 32, True))["qzeros"].numpy().view(np.uint32)
    number = sum(value << (3 * i) for i in range(32))
    assert words[0, :3].tolist() == [(number >> (32 * i)) & 0xFFFFFFFF for i in range(3)]


@pytest.mark.parametrize("bits", BITS)
def test_v1_stores_one_less(bits: int) -> None:
    """Word by word: v2 less the constant of the width, as converters subtract it. No field borrows: zeros are >= 1."""
    packed = layer(32, 64, bits, 16, False)
    one = sum(1 << (bits * i) for i in range(32)).to_bytes(4 * bits, "little")
    constant = np.frombuffer(one, dtype=np.uint32)
    v1, v2 = (fmt.pack(packed)["qzeros"].numpy().view(np.uint32) for fmt in (V1, V2))
    wide1, wide2 = ([int.from_bytes(row.tobytes(), "little") for row in words.reshape(-1, bits)] for words in (v1, v2))
    assert [w + int.from_bytes(constant.tobytes(), "little") for w in wide1] == wide2


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("fmt", [V1, V2])
def test_extreme_zero_points(bits: int, fmt: GPTQFormat) -> None:
    packed = layer(32, 32, bits, 16, False)
    assert packed.zeros is not None
    packed.zeros[:, 0], packed.zeros[:, 1] = 1, 2**bits - 1
    assert same(fmt.unpack(NAME, fmt.pack(packed), config_of(fmt, packed)), packed)


@pytest.mark.parametrize("fmt", [V1, V2])
def test_asymmetric_layer_with_symmetric_zero_points(fmt: GPTQFormat) -> None:
    packed = layer(32, 32, 4, 16, False)
    assert packed.zeros is not None
    packed.zeros[:] = 8
    assert same(fmt.unpack(NAME, fmt.pack(packed), config_of(fmt, packed)), packed)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [-1, 32])
def test_qweight_is_compressed_tensors_transposed(bits: int, size: int) -> None:
    packed = layer(32, 96, bits, size, False)
    theirs = CompressedTensors().pack(packed)
    assert torch.equal(V1.pack(packed)["qweight"], theirs["weight_packed"].t())
    assert torch.equal(V2.pack(packed)["qzeros"], theirs["weight_zero_point"].t())


def test_three_bits_straddle_words() -> None:
    """The classic layout: codes 10 and 21 of 32 are cut by a word's end."""
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    codes[0, 10], codes[1, 21] = 7, 7
    packed = UniformGrid(codes, torch.ones(32, 1, dtype=torch.float16), None, 3, -1)
    words = V1.pack(packed)["qweight"].numpy().view(np.uint32)
    assert words[:, 0].tolist() == [0xC0000000, 0x1, 0]
    assert words[:, 1].tolist() == [0, 0x80000000, 0x3]


@pytest.mark.parametrize("bits", BITS)
def test_v2_under_a_v1_label(bits: int) -> None:
    packed = layer(32, 64, bits, 32, True)
    with pytest.raises(CompressError, match="labelled v1") as caught:
        V1.unpack(NAME, V2.pack(packed), config_of(V1, packed))
    assert caught.value.where == NAME
    assert "gptq_v2" in caught.value.remedy


@pytest.mark.parametrize("bits", BITS)
def test_identity_g_idx_is_natural_order(bits: int) -> None:
    packed = layer(32, 96, bits, 40, True)
    tensors = V1.pack(packed)
    assert torch.equal(tensors["g_idx"].long(), group_index(packed.shape[1], packed.group_size))
    assert V1.unpack(NAME, tensors, config_of(V1, packed)).g_idx is None


def test_ordered_g_idx_is_stored() -> None:
    packed = layer(32, 64, 4, 16, True, ordered=True)
    assert packed.g_idx is not None
    assert torch.equal(V1.pack(packed)["g_idx"], packed.g_idx)
    assert config_of(V1, packed)["desc_act"] is True


@pytest.mark.parametrize("fmt", [V1, V2])
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_refuses_widths(fmt: GPTQFormat, bits: int) -> None:
    reason = fmt.why_not(Storage("uniform", bits, 32, True), LayerShape(NAME, 64, 64))
    assert reason is not None
    assert f"not {bits}" in reason
    assert "compressed-tensors" in reason


@pytest.mark.parametrize("fmt", [V1, V2])
def test_refuses_experts_and_odd_sizes(fmt: GPTQFormat) -> None:
    storage = Storage("uniform", 4, 32, True)
    assert fmt.why_not(storage, LayerShape(NAME, 64, 64)) is None
    assert fmt.why_not(storage, LayerShape(NAME, 64, 64, transposed=True)) is None
    reason = fmt.why_not(storage, LayerShape(NAME, 64, 64, expert=True))
    assert reason is not None
    assert "experts" in reason
    for out, columns in ((48, 64), (64, 48), (64, 100), (1, 32)):
        reason = fmt.why_not(storage, LayerShape(NAME, out, columns))
        assert reason is not None
        assert f"in_features {columns} and out_features {out}" in reason
    reason = fmt.why_not(Storage("codebook", 4, 32, True), LayerShape(NAME, 64, 64))
    assert reason is not None
    assert "codebook" in reason


@pytest.mark.parametrize(("fmt", "label"), [(V1, "gptq"), (V2, "gptq_v2")])
@pytest.mark.parametrize("symmetric", [True, False])
def test_config(fmt: GPTQFormat, label: str, symmetric: bool) -> None:
    config = config_of(fmt, layer(32, 64, 4, 32, symmetric))
    assert (config["bits"], config["group_size"], config["sym"], config["desc_act"]) == (4, 32, symmetric, False)
    assert config["quant_method"] == config["method"] == "gptq"
    assert config["checkpoint_format"] == config["format"] == label
    assert config["pack_dtype"] == "int32"
    assert config["lm_head"] is False
    assert fmt.files(config) == {"quantize_config.json": config}
    found = of_config({"quantization_config": config})
    assert found is not None
    assert found[0] is FORMATS[label]


def test_config_holds_one_setting() -> None:
    storages = [
        Held(f"model.layers.{i}.mlp.up_proj", f"model.layers.{i}.mlp.up_proj", (64, 64), s, torch.float16)
        for i, s in enumerate([Storage("uniform", 4, 32, True), Storage("uniform", 8, 32, True)])
    ]
    with pytest.raises(CompressError, match="one setting"):
        V1.config(storages, [])


def test_config_of_layers_left_dense() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    storages = [Held(n, n, (64, 64), Storage("uniform", 4, 32, True), torch.float16) for n in names]
    config = V1.config(storages, [*(n.replace("up", "gate") for n in names), "lm_head"])
    assert config["modules_in_block_to_quantize"] == [["mlp.up_proj"]]
    assert list(config["dynamic"]) == [r"-:.*\.mlp\.gate_proj$"]
    with pytest.raises(CompressError, match=r"mlp\.up_proj is quantised in some blocks"):
        V1.config(storages, ["model.layers.2.mlp.up_proj"])


def test_scales_are_stored_in_float16() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert V1.scale_dtype(dtype) == V2.scale_dtype(dtype) == torch.float16


@pytest.mark.parametrize("fmt", [V1, V2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [-1, 32])
def test_nbytes_are_the_bytes(fmt: GPTQFormat, bits: int, size: int) -> None:
    packed = layer(64, 96, bits, size, False)
    stored = sum(t.numel() * t.element_size() for t in fmt.pack(packed).values())
    assert fmt.nbytes(packed.storage, packed.shape, torch.float16) == stored
