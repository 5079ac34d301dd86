"""bitsandbytes files against bitsandbytes itself: its tensors byte for byte, its JSON, and what is not such a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import tables
from compress.clients import pick
from compress.errors import CompressError
from compress.formats import FORMATS, holders, of_config
from compress.formats.base import Describing, Format, Held, LayerShape
from compress.formats.bitsandbytes import BitsAndBytes
from compress.packed import blockwise
from compress.packed.blockwise import Blockwise
from compress.packed.uniform import UniformGrid
from compress.passes.absmax import Absmax, fit_int8
from compress.passes.fp4 import FP4
from compress.passes.gptq import GPTQ
from compress.passes.int8 import Int8
from compress.passes.kmeans import KMeans
from compress.passes.nf4 import NF4
from compress.passes.rtn import RTN
from compress.types import Packed, Storage

FORMAT = BitsAndBytes()
NAME = "model.layers.0.mlp.up_proj"
STATE = "weight.quant_state.bitsandbytes__"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
W8A8 = Storage("uniform", 8, -1, activations="token")


def weight(out: int, columns: int, seed: int = 0, scale: float = 0.05) -> Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed)) * scale


def four_bits(out: int, columns: int, table: str, size: int, nested: bool, dtype: torch.dtype) -> Blockwise:
    return blockwise.fit(weight(out, columns), table, size, nested, dtype)


def config_of(packed: Packed, dtype: torch.dtype = torch.bfloat16, ignored: tuple[str, ...] = ()) -> dict[str, Any]:
    """As it comes back from config.json."""
    held = Held(NAME, NAME, packed.shape, packed.storage, dtype)
    value: dict[str, Any] = json.loads(json.dumps(FORMAT.config([held], ignored)))
    return value


def described(tensors: dict[str, Tensor], config: dict[str, Any]) -> Any:
    """The config as Weights hands it on, after a look into the files."""
    stored = {f"{NAME}.{s}": t for s, t in tensors.items()}
    return FORMAT.described(config, [NAME], {n: tuple(t.shape) for n, t in stored.items()}, stored.__getitem__)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and torch.equal(a[k], b[k]) for k in a
    )


def text(blob: Tensor) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(bytes(blob.tolist()))
    return value


def blob(value: Any) -> Tensor:
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(raw), dtype=torch.uint8)


# -- there and back --------------------------------------------------------------------------------------------------


@given(
    out=st.integers(1, 9),
    columns=st.integers(1, 140),
    table=st.sampled_from(["nf4", "fp4-bnb"]),
    size=st.sampled_from([32, 64, 128]),
    nested=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@settings(deadline=None, max_examples=80)
def test_four_bits_there_and_back(
    out: int, columns: int, table: str, size: int, nested: bool, dtype: torch.dtype
) -> None:
    """Odd counts and short last blocks too, which other tools write, though `why_not` lets us write none."""
    packed = four_bits(out, columns, table, size, nested, dtype)
    tensors = FORMAT.pack(packed)
    assert set(tensors) <= set(FORMAT.suffixes)
    config = config_of(packed, dtype)
    found = FORMAT.unpack(NAME, tensors, config)
    assert isinstance(found, Blockwise)
    assert found.storage == packed.storage
    assert same(found.tensors(), packed.tensors())
    assert torch.equal(found.codes, packed.codes)
    assert found.dequantize().dtype == dtype
    assert torch.equal(found.dequantize(), packed.dequantize())
    assert same(FORMAT.pack(found), tensors)
    told = described(tensors, config)
    shapes = {s: tuple(t.shape) for s, t in tensors.items()}
    assert FORMAT.shape(NAME, shapes, told) == (out, columns)
    assert FORMAT.dtype(NAME, {}, told) == dtype
    assert FORMAT.storage(NAME, shapes, told) == packed.storage
    assert FORMAT.activations(NAME, told) == ""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", ["nf4", "fp4-bnb"])
@pytest.mark.parametrize("nested", [False, True])
def test_bytes_are_known_before(nested: bool, table: str, dtype: torch.dtype) -> None:
    """To the byte; with double quantisation but for the digits of its offset."""
    packed = four_bits(64, 320, table, 64, nested, dtype)
    stored = sum(t.numel() * t.element_size() for t in FORMAT.pack(packed).values())
    assert abs(FORMAT.nbytes(packed.storage, packed.shape, dtype) - stored) <= (5 if nested else 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_eight_bits_there_and_back(dtype: torch.dtype) -> None:
    """A scale comes back to the last bit; among many rows, of many magnitudes, none that does not."""
    rows = weight(4096, 8, 1) * torch.logspace(-6, 4, 4096)[:, None]
    packed = fit_int8(rows, False, False, dtype, "token")
    tensors = FORMAT.pack(packed)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == FORMAT.nbytes(W8A8, (4096, 8), dtype)
    config = config_of(packed, dtype)
    found = FORMAT.unpack(NAME, tensors, config)
    assert isinstance(found, UniformGrid)
    assert found.storage == packed.storage == W8A8
    assert same(found.tensors(), packed.tensors())
    assert torch.equal(found.dequantize(), packed.dequantize())
    shapes = {s: tuple(t.shape) for s, t in tensors.items()}
    assert FORMAT.shape(NAME, shapes, config) == (4096, 8)
    assert FORMAT.dtype(NAME, {}, config) == dtype
    assert FORMAT.storage(NAME, shapes, config) == W8A8
    assert FORMAT.activations(NAME, config) == "token"
    assert int(tensors["weight"].min()) == -127  # absmax makes no -128
    assert tuple(tensors["weight_format"].shape) == ()
    assert tensors["weight_format"].item() == 0


def test_rows_of_zeros() -> None:
    packed = fit_int8(torch.zeros(2, 32), False, False, torch.bfloat16, "token")
    assert torch.equal(FORMAT.unpack(NAME, FORMAT.pack(packed), config_of(packed)).dequantize(), torch.zeros(2, 32))
    packed4 = blockwise.fit(torch.zeros(2, 32), "nf4", 32, True, torch.bfloat16)
    assert torch.equal(FORMAT.unpack(NAME, FORMAT.pack(packed4), config_of(packed4)).dequantize(), torch.zeros(2, 32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_sixteen_bit_scale_survives(dtype: torch.dtype) -> None:
    """Every positive number of the dtype whose 127-fold is finite in float32, and its negative."""
    every = torch.arange(2**15, dtype=torch.int16).view(dtype)
    every = every[torch.isfinite(every.float() * 127) & (every != 0)]
    scales = torch.cat([every, -every])[:, None]
    packed = UniformGrid(torch.full((len(scales), 1), 3, dtype=torch.uint8), scales, None, 8, -1, None, "token")
    found = FORMAT.unpack(NAME, FORMAT.pack(packed), config_of(packed, dtype))
    assert isinstance(found, UniformGrid)
    assert torch.equal(found.scales, scales)


def test_a_float32_scale_that_is_no_127th_part() -> None:
    """One in 128 float32 numbers is the 127th part of none: refused, never rounded."""
    scales = torch.rand(4096, 1, generator=torch.Generator().manual_seed(0)) + 1
    packed = UniformGrid(torch.full((4096, 1), 3, dtype=torch.uint8), scales, None, 8, -1, None, "token")
    with pytest.raises(CompressError, match="no row maximum divided by 127"):
        FORMAT.pack(packed)
    survive = sum(_survives(packed.rows(i, i + 1)) for i in range(512))
    assert 0.97 < survive / 512 < 1


def _survives(packed: UniformGrid) -> bool:
    try:
        found = FORMAT.unpack(NAME, FORMAT.pack(packed), config_of(packed, torch.float32))
    except CompressError:
        return False
    assert isinstance(found, UniformGrid)
    assert torch.equal(found.scales, packed.scales)
    return True


# -- bitsandbytes as the oracle --------------------------------------------------------------------------------------


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """bitsandbytes' functions as they are written, which is what they do without a compiler too: torch.compile takes
    seconds for each dtype."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("theirs", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 256), (33, 64), (7, 129), (5, 13)], ids=str)
def test_files_of_bitsandbytes(shape: tuple[int, int], theirs: str, nested: bool, dtype: torch.dtype) -> None:
    """Their tensors are read as they dequantise them, and written again as they were, to the byte."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = weight(*shape).to(dtype)
    codes, state = functional.quantize_4bit(values, blocksize=64, quant_type=theirs, compress_statistics=nested)
    tensors = {"weight": codes} | {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": theirs}
    found = FORMAT.unpack(NAME, tensors, config)
    assert isinstance(found, Blockwise)
    assert found.shape == shape
    dense = functional.dequantize_4bit(codes, state)
    assert dense.dtype == found.dequantize().dtype == dtype
    assert torch.equal(found.dequantize(), dense)
    again = FORMAT.pack(found)
    assert text(again[STATE + theirs]) == text(tensors[STATE + theirs])
    assert same(again, tensors)
    assert FORMAT.shape(NAME, {s: tuple(t.shape) for s, t in tensors.items()}, described(tensors, config)) == shape


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("table", ["nf4", "fp4-bnb"])
def test_our_tensors_in_bitsandbytes(table: str, nested: bool) -> None:
    """QuantState takes ours as they are and dequantises to the same bits."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed = four_bits(96, 256, table, 32, nested, torch.bfloat16)
    tensors = FORMAT.pack(packed)
    data = tensors.pop("weight")
    state = functional.QuantState.from_dict(dict(tensors), torch.device("cpu"))
    assert tuple(state.shape) == (96, 256)
    assert torch.equal(functional.dequantize_4bit(data, state), packed.dequantize())


def test_storage_in_another_dtype() -> None:
    """bnb_4bit_quant_storage: the same bytes under another name, as FSDP needs them."""
    functional = pytest.importorskip("bitsandbytes.functional")
    values = weight(8, 64).to(torch.bfloat16)
    plain, state = functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    stored, _ = functional.quantize_4bit(values, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16)
    assert stored.dtype == torch.bfloat16
    tensors = {f"weight.{k}": v for k, v in state.as_dict(packed=True).items()}
    config = {"load_in_4bit": True}
    a, b = (FORMAT.unpack(NAME, {**tensors, "weight": w}, config) for w in (plain, stored))
    assert torch.equal(a.dequantize(), b.dequantize())


def test_int8_of_bitsandbytes() -> None:
    """Int8Params' codes and row maxima; its files default to a threshold of 6, ours say 0."""
    modules = pytest.importorskip("bitsandbytes").nn
    functional = pytest.importorskip("bitsandbytes.functional")
    values = weight(48, 64).half()
    theirs = modules.Int8Params(values.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    tensors = {"weight": theirs.data, "SCB": theirs.SCB, "weight_format": torch.zeros((), dtype=torch.uint8)}
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    found = FORMAT.unpack(NAME, tensors, config)
    assert isinstance(found, UniformGrid)
    assert found.scales.dtype == torch.float32
    assert found.activations == FORMAT.activations(NAME, config) == ""
    again = FORMAT.pack(found)  # two row maxima may have one 127th part
    assert same({**again, "SCB": found.scales[:, 0]}, {**tensors, "SCB": again["SCB"] / 127})
    torch.testing.assert_close(again["SCB"], theirs.SCB, rtol=2**-23, atol=0)
    dense = functional.int8_vectorwise_dequant(theirs.data, theirs.SCB)
    torch.testing.assert_close(found.dequantize(), dense, rtol=3e-7, atol=0)  # they multiply by float32(1 / 127)
    assert found.codes.min() >= 1
    plain = {**config, "llm_int8_threshold": 0.0}
    assert FORMAT.activations(NAME, plain) == FORMAT.unpack(NAME, tensors, plain).storage.activations == "token"
    ours = fit_int8(values.float(), False, False, torch.float32, "token")
    torch.testing.assert_close(FORMAT.pack(ours)["SCB"], theirs.SCB, rtol=2**-23, atol=0)
    assert float((FORMAT.pack(ours)["weight"] != theirs.data).float().mean()) < 0.01  # ties: w * (127 / max), w / scale


# -- what is not such a file -----------------------------------------------------------------------------------------


def parts(nested: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    packed = four_bits(32, 128, "nf4", 64, nested, torch.bfloat16)
    return FORMAT.pack(packed), config_of(packed)


BAD_STATES = {
    "not JSON": (b"{", "not JSON"),
    "not UTF-8": (b"\xff\xfe\x00", "not JSON"),
    "deep": (b"[" * 4000, "not JSON"),
    "a list": ([1], "not a JSON object"),
    "null": (None, "not a JSON object"),
    "empty": ({}, "quant_type None"),
    "another type": ({"quant_type": "int4", "dtype": "bfloat16"}, "quant_type 'int4'"),
    "another dtype": ({"quant_type": "nf4", "dtype": "float64"}, "dtype 'float64'"),
    "a type of lists": ({"quant_type": ["nf4"], "dtype": {}}, "cannot be read"),
    "blocksize 0": ({"blocksize": 0}, "blocksize is 0"),
    "blocksize -64": ({"blocksize": -64}, "blocksize is -64"),
    "blocksize 48": ({"blocksize": 48}, "blocksize is 48"),
    "blocksize true": ({"blocksize": True}, "blocksize is True"),
    "blocksize 64.0": ({"blocksize": 64.0}, "blocksize is 64.0"),
    "blocksize text": ({"blocksize": "64"}, "blocksize is '64'"),
    "no shape": ({"shape": None}, "shape is None"),
    "one dimension": ({"shape": [4096]}, "not \\[out, in\\]"),
    "negative": ({"shape": [-32, -128]}, "not \\[out, in\\]"),
    "zero": ({"shape": [0, 128]}, "not \\[out, in\\]"),
    "another size": ({"shape": [64, 128]}, "do not belong to the shape"),
    "huge": ({"shape": [10**30, 10**30]}, "do not belong to the shape"),
    "huge text": (b'{"quant_type": "' + b"n" * 5000 + b'"}', "not a short text"),
}


@pytest.mark.parametrize("label", BAD_STATES)
def test_states_that_fit_nothing(label: str) -> None:
    value, message = BAD_STATES[label]
    tensors, config = parts()
    if isinstance(value, dict) and value and "quant_type" not in value:
        value = text(tensors[STATE + "nf4"]) | value
    tensors[STATE + "nf4"] = blob(value)
    with pytest.raises(CompressError, match=message) as caught:
        FORMAT.unpack(NAME, tensors, config)
    assert caught.value.where == NAME
    shapes = {s: tuple(t.shape) for s, t in tensors.items()}
    with pytest.raises(CompressError):
        FORMAT.shape(NAME, shapes, described(tensors, config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nested_offset": float("nan")}, "nested_offset is nan"),
        ({"nested_offset": "1"}, "nested_offset is '1'"),
        ({"nested_offset": None}, "nested_offset is None"),
        ({"nested_blocksize": 128}, "blocks of 128"),
        ({"nested_dtype": "float16"}, "with 'float16'"),
    ],
)
def test_nested_states(change: dict[str, Any], message: str) -> None:
    tensors, config = parts(nested=True)
    tensors[STATE + "nf4"] = blob(text(tensors[STATE + "nf4"]) | change)
    with pytest.raises(CompressError, match=message):
        FORMAT.unpack(NAME, tensors, config)


def test_tensors_that_do_not_fit() -> None:
    tensors, config = parts()
    other = {**tensors, "weight.quant_map": tables.table("fp4-bnb").clone()}
    with pytest.raises(CompressError, match="code table"):
        FORMAT.unpack(NAME, other, config)
    other = {**tensors, "weight.quant_map": tables.table("nf4") * 1.001}
    with pytest.raises(CompressError, match="code table"):
        FORMAT.unpack(NAME, other, config)
    other = {**tensors, "weight.absmax": tensors["weight.absmax"][:-1]}
    with pytest.raises(CompressError, match="do not belong to the shape"):
        FORMAT.unpack(NAME, other, config)
    other = {**tensors, "weight.absmax": tensors["weight.absmax"].to(torch.uint8)}  # double, without its second part
    with pytest.raises(CompressError, match="in uint8"):
        FORMAT.unpack(NAME, other, config)
    other = {k: v for k, v in tensors.items() if "quant_state" not in k}
    with pytest.raises(CompressError, match="no quant_state"):
        FORMAT.unpack(NAME, other, config)
    with pytest.raises(CompressError, match="no quant_state"):
        described(other, config)
    other = {k.replace("nf4", "fp4"): v for k, v in tensors.items()}  # under the other name
    with pytest.raises(CompressError, match="does not say what its name"):
        described(other, config)
    nested, nested_config = parts(nested=True)
    other = {**nested, "weight.nested_quant_map": nested["weight.nested_quant_map"].flip(0)}
    with pytest.raises(CompressError, match="code table"):
        FORMAT.unpack(NAME, other, nested_config)
    other = {**nested, "weight.nested_absmax": torch.ones(7)}
    with pytest.raises(CompressError, match="7 second maxima"):
        FORMAT.unpack(NAME, other, nested_config)


def test_rows_that_do_not_fit() -> None:
    packed = fit_int8(weight(4, 8), False, False, torch.bfloat16, "token")
    tensors, config = FORMAT.pack(packed), config_of(packed)
    with pytest.raises(CompressError, match="weight_format 1"):
        FORMAT.unpack(NAME, {**tensors, "weight_format": torch.ones((), dtype=torch.uint8)}, config)
    with pytest.raises(CompressError, match="3 row maxima"):
        FORMAT.unpack(NAME, {**tensors, "SCB": tensors["SCB"][:3]}, config)
    with pytest.raises(CompressError, match="of uint8"):
        FORMAT.unpack(NAME, {**tensors, "weight": tensors["weight"].view(torch.uint8)}, config)
    assert FORMAT.unpack(NAME, {k: v for k, v in tensors.items() if k != "weight_format"}, config).shape == (4, 8)


# -- what is refused before any work ---------------------------------------------------------------------------------

LAYER = LayerShape(NAME, 64, 256)


@pytest.mark.parametrize("storage", [NF4().storage, NF4(128, True).storage, FP4(variant="bnb").storage, W8A8])
def test_taken(storage: Storage) -> None:
    assert FORMAT.why_not(storage, LAYER) is None
    assert FORMAT.why_not(storage, replace(LAYER, transposed=True)) is None


@pytest.mark.parametrize(
    ("storage", "layer", "message"),
    [
        (FP4().storage, LAYER, "no table 'fp4-e2m1': use --variant bnb"),
        (NF4(512).storage, LAYER, "use --block-size 256"),
        (NF4().storage, LayerShape(NAME, 64, 96), "use --block-size 32, or --format native"),
        (NF4().storage, LayerShape(NAME, 64, 80), ": use --format native"),
        (NF4().storage, LayerShape(NAME, 48, 64), "32 rows at a time"),
        (NF4().storage, replace(LAYER, expert=True), "fused experts"),
        (NF4().storage, replace(LAYER, head=True), "leave out --lm-head"),
        (W8A8, replace(LAYER, expert=True), "fused experts"),
        (W8A8, replace(LAYER, head=True), "leave out --lm-head"),
        (Absmax().storage, LAYER, "use absmax --activations token, or --format compressed-tensors"),
        (Absmax(activations="tensor").storage, LAYER, "a scale for each token"),
        (Absmax(activations="token", zeropoint=True).storage, LAYER, "without --zeropoint"),
        (RTN(bits=8, group_size=64).storage, LAYER, "8 bits in groups of 64: use --format compressed-tensors"),
        (GPTQ(bits=4, group_size=64).storage, LAYER, "not 4 bits in groups of 64"),
        (Int8().storage, LAYER, "use --format native, or absmax --activations token"),
        (KMeans().storage, LAYER, "cannot hold the kind 'codebook': use --format native"),
    ],
)
def test_refused(storage: Storage, layer: LayerShape, message: str) -> None:
    reason = FORMAT.why_not(storage, layer)
    assert reason is not None
    assert message in reason


def test_one_data_type_a_checkpoint() -> None:
    def held(name: str, storage: Storage) -> Held:
        return Held(name, name, (64, 256), storage, torch.bfloat16)

    kinds = [NF4().storage, FP4(variant="bnb").storage, W8A8]
    for i in range(3):
        with pytest.raises(CompressError, match="one data type, not"):
            FORMAT.config([held("a", kinds[i]), held("b", kinds[i - 1])], [])
    value = FORMAT.config([held("a", NF4().storage), held("b", NF4(128, True).storage)], [])
    assert value["bnb_4bit_use_double_quant"]
    with pytest.raises(CompressError, match="class of its own"):
        FORMAT.config([held("a", NF4().storage)], [], dense_on_load=True)


def test_config_is_what_transformers_writes() -> None:
    """The same keys as its own, with the same types."""
    transformers = pytest.importorskip("transformers")
    packed = four_bits(32, 128, "nf4", 64, True, torch.float16)
    config = config_of(packed, torch.float16, ("model.layers.1.mlp.up_proj", "lm_head"))
    parsed = transformers.BitsAndBytesConfig.from_dict(dict(config))
    assert parsed.quantization_method() == "nf4"
    assert parsed.bnb_4bit_compute_dtype == torch.float16
    assert parsed.llm_int8_skip_modules == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert {k: v for k, v in parsed.to_dict().items() if not k.startswith("_")} == config
    eight = config_of(fit_int8(weight(4, 8), False, False, torch.bfloat16, "token"))
    assert transformers.BitsAndBytesConfig.from_dict(eight).quantization_method() == "llm_int8"


def test_found_by_its_config() -> None:
    packed = four_bits(32, 128, "nf4", 64, False, torch.bfloat16)
    config = config_of(packed)
    ours: Format = FORMATS["bitsandbytes"]
    assert isinstance(ours, Describing)
    assert of_config({"quantization_config": config}) == (ours, config)
    for early in ({"load_in_4bit": True}, {"load_in_8bit": True, "llm_int8_threshold": 6.0}):
        assert of_config({"quantization_config": early}) == (ours, early)
    with pytest.raises(CompressError, match="cannot be read"):
        of_config({"quantization_config": {"load_in_4bit": False}})
    names = [f"{NAME}.{s}" for s in FORMAT.pack(packed)] + ["model.norm.weight", "lm_head.weight"]
    assert FORMAT.layers(names, config) == {NAME}
    with pytest.raises(CompressError, match=r"no tensor ends in \.SCB"):
        FORMAT.layers(names, {"load_in_8bit": True})


def test_automatic_choice() -> None:
    assert holders(NF4().storage) == ["bitsandbytes", "native"]
    assert holders(FP4(variant="bnb").storage) == ["bitsandbytes", "native"]
    assert holders(FP4().storage) == ["native"]
    assert "bitsandbytes" in holders(W8A8)
    assert "bitsandbytes" not in holders(Absmax().storage)
    assert pick("auto", [NF4().storage]) == pick("auto", [NF4().storage], "transformers") == "bitsandbytes"
    assert pick("auto", [W8A8]) == pick("auto", [W8A8], "transformers") == "compressed-tensors"
    assert pick("auto", [NF4().storage, RTN().storage]) == "native"
    assert math.isclose(FORMAT.nbytes(NF4().storage, (4096, 4096), torch.bfloat16) * 8 / 4096**2, 4.5, rel_tol=1e-4)
