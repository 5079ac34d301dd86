"""GGUF's blocks against gguf-py's own packer and unpacker; there and back; what is refused; damaged files."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.checkpoint import Checkpoint, halves_apart, read_tensor, side_by_side
from compress.errors import CompressError
from compress.formats import FORMATS, of_config
from compress.formats.base import Held, LayerShape
from compress.formats.gguf import GGUF, TYPES
from compress.gguf import header as header_of
from compress.packed.affine import Affine
from compress.packed.dense import Dense
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

FORMAT = GGUF()
NAME = "model.layers.0.mlp.up_proj"


def uniform(rows: int, columns: int, bits: int, group_size: int, seed: int = 0) -> UniformGrid:
    g = torch.Generator().manual_seed(seed)
    groups = 1 if group_size == -1 else columns // group_size
    codes = torch.randint(2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    scales = (torch.randn(rows, groups, generator=g) * 0.01).half()  # negative ones too
    return UniformGrid(codes, scales, None, bits, group_size)


def affine(rows: int, columns: int, bits: int, group_size: int, seed: int = 0) -> Affine:
    grid = uniform(rows, columns, bits, group_size, seed)
    minima = (torch.randn(grid.scales.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.05).half()
    return Affine(grid.codes, grid.scales, minima, bits, group_size)


def config_of(packed: Packed) -> dict[str, Any]:
    held = Held(NAME, NAME, packed.shape, packed.storage, torch.float16)
    found: dict[str, Any] = json.loads(json.dumps(FORMAT.config([held], [])))
    return found


def same(a: Packed, b: Packed) -> bool:
    x, y = a.tensors(), b.tensors()
    return (
        type(a) is type(b)
        and a.storage == b.storage
        and x.keys() == y.keys()
        and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)
    )


SIZES = st.sampled_from([(32, 32), (64, 32), (64, 64), (64, -1), (96, 32), (96, 96), (192, 64), (128, -1)])


@settings(deadline=None)
@given(rows=st.integers(1, 6), size=SIZES, bits=st.integers(2, 8), seed=st.integers(0, 999), kind=st.booleans())
def test_there_and_back_and_as_gguf_py_reads_it(
    rows: int, size: tuple[int, int], bits: int, seed: int, kind: bool
) -> None:
    packed: Packed = (
        affine(rows, size[0], min(bits, 4), size[1], seed) if kind else uniform(rows, *size[:1], bits, size[1], seed)
    )
    config = config_of(packed)
    tensors = FORMAT.pack(packed)
    ((suffix, raw),) = tensors.items()
    assert suffix == ("q4_1" if kind else "q4_0" if bits <= 4 else "q8_0")
    assert raw.dtype == torch.uint8
    shapes = {suffix: tuple(raw.shape)}
    assert FORMAT.shape(NAME, shapes, config) == packed.shape
    assert FORMAT.storage(NAME, shapes, config) == packed.storage
    assert FORMAT.nbytes(packed.storage, packed.shape, torch.float16) == raw.numel()
    assert FORMAT.dtype(NAME, {suffix: torch.uint8}, config) == torch.float16
    assert same(FORMAT.unpack(NAME, tensors, config), packed)
    theirs = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[suffix.upper()]))
    assert torch.equal(theirs.half(), packed.dequantize())


@pytest.mark.parametrize("suffix", ["q4_0", "q4_1", "q8_0"])
def test_bytes_of_gguf_pys_own_packer(suffix: str) -> None:
    """Its files unpack here, and pack to the same bytes."""
    weight = torch.randn(24, 160, generator=torch.Generator().manual_seed(2)).numpy() * 0.05
    raw = torch.from_numpy(quantize(weight, GGMLQuantizationType[suffix.upper()]))
    found = FORMAT.unpack(NAME, {suffix: raw}, {"quant_method": "gguf"})
    assert found.storage == FORMAT.storage(NAME, {suffix: tuple(raw.shape)}, {})
    assert found.storage.group_size == 32
    assert torch.equal(FORMAT.pack(found)[suffix], raw)
    theirs = torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[suffix.upper()]))
    assert torch.equal(found.dequantize(), theirs.half())


@pytest.mark.parametrize("kind", ["q5_0", "q5_1", "q6_k", "q4_k", "q2_k", "iq4_nl"])
def test_other_block_types_are_read_as_weights(kind: str) -> None:
    block = TYPES[kind]
    raw = torch.randint(0, 60, (3, 2 * block.nbytes), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    found = FORMAT.unpack(NAME, {kind: raw}, {"quant_method": "gguf"})
    assert isinstance(found, Dense)
    assert found.shape == FORMAT.shape(NAME, {kind: tuple(raw.shape)}, {}) == (3, 2 * block.weights)
    assert torch.equal(found.values, torch.from_numpy(dequantize(raw.numpy(), GGMLQuantizationType[kind.upper()])))
    assert FORMAT.dtype(NAME, {kind: torch.uint8}, {}) == torch.float32


def test_sizes_are_gguf_pys() -> None:
    for suffix, block in TYPES.items():
        number = GGMLQuantizationType[suffix.upper()]
        assert (block.number, block.weights, block.nbytes) == (int(number), *GGML_QUANT_SIZES[number])


REFUSED = [
    (Storage("uniform", 4, 32, symmetric=False), 64, "use --symmetric"),
    (Storage("uniform", 4, 32, ordered_groups=True), 64, "--act-order static"),
    (Storage("uniform", 8, -1, activations="token"), 64, "native"),
    (Storage("uniform", 4, 16), 64, "use --group-size 32 or -1"),
    (Storage("uniform", 4, 128), 576, "use --group-size 96 or -1"),
    (Storage("uniform", 4, 48), 576, "use --group-size 32 or -1"),
    (Storage("uniform", 4, -1), 100, "--exclude"),
    (Storage("affine", 5, 32), 64, "2 to 4 bits"),
    (Storage("dense", 16), 64, "'dense'"),
    (Storage("blockwise", 4, 64), 64, "'blockwise'"),
]


@pytest.mark.parametrize(("storage", "columns", "remedy"), REFUSED)
def test_why_not(storage: Storage, columns: int, remedy: str) -> None:
    reason = FORMAT.why_not(storage, LayerShape(NAME, 64, columns))
    assert reason is not None
    assert remedy in reason
    assert reason.count(": ") == 1


def test_what_is_held() -> None:
    for bits in range(2, 9):
        for group in (-1, 32, 96, 192):
            assert FORMAT.why_not(Storage("uniform", bits, group), LayerShape(NAME, 7, 192, head=True)) is None
    assert "experts" in str(FORMAT.why_not(Storage("uniform", 4, 32), LayerShape(NAME, 64, 64, expert=True)))
    assert "[in, out]" in str(FORMAT.why_not(Storage("uniform", 4, 32), LayerShape(NAME, 64, 64, transposed=True)))


def test_config() -> None:
    grids = {"a": uniform(2, 64, 4, 32), "b": uniform(2, 64, 3, 32), "c": uniform(2, 64, 8, -1)}
    config = FORMAT.config([Held(n, n, g.shape, g.storage, torch.float16) for n, g in grids.items()], [])
    assert config == {"quant_method": "gguf", "layers": {"b": [3, 32], "c": [8, -1]}}
    assert of_config({"quantization_config": config}) == (FORMATS["gguf"], config)
    assert FORMAT.layers(["x.q4_0", "y.q6_k", "z.weight"], config) == {"x", "y"}
    with pytest.raises(CompressError, match="no quantised tensor"):
        FORMAT.layers(["z.weight"], config)


@pytest.mark.parametrize("facts", [[3, 32], [4, 64], [9, 32], [4, 48], [4, 0], [4], ["x", 32], None])
def test_facts_that_do_not_fit(facts: Any) -> None:
    tensors = FORMAT.pack(uniform(4, 64, 4, 32))
    with pytest.raises((ValueError, TypeError)):
        FORMAT.unpack(NAME, tensors, {"layers": {NAME: facts}})


@settings(deadline=None)
@given(heads=st.integers(1, 4), half=st.integers(1, 5), columns=st.integers(0, 3))
def test_rows_for_rotary_embeddings(heads: int, half: int, columns: int) -> None:
    """As llama.cpp's converter writes them, and back."""
    rows = heads * 2 * half
    value = torch.randn(rows, columns) if columns else torch.randn(rows)
    theirs = value.numpy().reshape(heads, 2, half, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    assert np.array_equal(side_by_side(value, heads).numpy(), theirs)
    assert torch.equal(halves_apart(side_by_side(value, heads), heads), value)


# -- the file ---------------------------------------------------------------------------------------------------

SMALL = {
    "token_embd.weight": ("F16", (40, 64)),
    "output_norm.weight": ("F32", (64,)),
    "blk.0.attn_norm.weight": ("F32", (64,)),
    "blk.0.attn_q.weight": ("Q4_0", (64, 64)),
    "blk.0.attn_k.weight": ("Q8_0", (32, 64)),
    "blk.0.attn_v.weight": ("Q4_1", (32, 64)),
    "blk.0.attn_output.weight": ("BF16", (64, 64)),
}
METADATA = {
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 1,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
}


def peer_file(
    path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]] = SMALL, arch: str = "llama", **more: Any
) -> dict[str, np.ndarray[Any, Any]]:
    """A file by gguf-py's own writer and packer. Returns the values [..] in float32 as written."""
    writer = GGUFWriter(path, arch)
    for key, value in METADATA.items():
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(40)])
    writer.add_array("general.tags", ["a", "b"])
    writer.add_token_scores([0.0] * 40)
    for key, value in more.items():
        writer.add_string(key.replace("__", "."), value)
    rng = np.random.default_rng(0)
    values = {}
    for name, (kind, shape) in tensors.items():
        number = GGMLQuantizationType[kind]
        raw = quantize((rng.standard_normal(shape) * 0.05).astype(np.float32), number)
        values[name] = dequantize(raw, number).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_header_is_what_gguf_py_reads(tmp_path: Path) -> None:
    path = tmp_path / "peer.gguf"
    peer_file(path)
    header, theirs = header_of.read_header(path), GGUFReader(path)
    assert {t.name for t in theirs.tensors} == set(header.tensors)
    for tensor in theirs.tensors:
        info = header.tensors[tensor.name]
        assert (info.start, info.nbytes, info.type) == (tensor.data_offset, tensor.n_bytes, tensor.tensor_type)
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
    assert header.metadata["llama.attention.head_count"] == 4
    assert header.metadata["tokenizer.ggml.tokens"] == header_of.Array(8, 40)
    assert header.real("attention.layer_norm_rms_epsilon") == 1e-5


def build(
    *keys: tuple[str, int, bytes], tensors: list[bytes] | None = None, data: bytes = b"", version: int = 3
) -> bytes:
    """A file by hand."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    tensors = tensors or []
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys))
    out += b"".join(text(k) + struct.pack("<I", kind) + value for k, kind, value in keys) + b"".join(tensors)
    return out + b"\0" * (-len(out) % 32) + data


def entry(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


BAD = {
    "empty": b"",
    "magic": b"GGML" + bytes(40),
    "version 1": build(version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(20),
    "2^60 tensors": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0) + bytes(99),
    "2^60 keys": b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60) + bytes(99),
    "string of 2^62 bytes": build(("a", 8, struct.pack("<Q", 2**62))),
    "array of 2^62 numbers": build(("a", 9, struct.pack("<IQ", 4, 2**62))),
    "array of 2^62 strings": build(("a", 9, struct.pack("<IQ", 8, 2**62))),
    "array of 2^62 arrays": build(("a", 9, struct.pack("<IQ", 9, 2**62))),
    "arrays in arrays in ...": build(("a", 9, struct.pack("<IQ", 9, 1) * 40 + struct.pack("<IQ", 4, 0))),
    "unknown value type": build(("a", 13, b"")),
    "array of unknown type": build(("a", 9, struct.pack("<IQ", 77, 1))),
    "key twice": build(("a", 4, bytes(4)), ("a", 4, bytes(4))),
    "key not UTF-8": b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40),
    "alignment 0": build(("general.alignment", 4, struct.pack("<I", 0))),
    "alignment 33": build(("general.alignment", 4, struct.pack("<I", 33))),
    "alignment 2^31": build(("general.alignment", 4, struct.pack("<I", 2**31))),
    "alignment a string": build(("general.alignment", 8, struct.pack("<Q", 1) + b"x")),
    "0 dimensions": build(tensors=[entry("t", (), 0, 0)], data=bytes(64)),
    "5 dimensions": build(tensors=[entry("t", (1,) * 5, 0, 0)], data=bytes(64)),
    "dimension 0": build(tensors=[entry("t", (0,), 0, 0)], data=bytes(64)),
    "2^63 rows of 2^63": build(tensors=[entry("t", (2**63, 2**63), 0, 0)], data=bytes(64)),
    "beyond the end": build(tensors=[entry("t", (17,), 0, 0)], data=bytes(64)),
    "offset 2^64 - 32": build(tensors=[entry("t", (8,), 0, 2**64 - 32)], data=bytes(64)),
    "offset 1": build(tensors=[entry("t", (8,), 0, 1)], data=bytes(64)),
    "unknown tensor type": build(tensors=[entry("t", (8,), 4, 0)], data=bytes(64)),
    "integers": build(tensors=[entry("t", (8,), 26, 0)], data=bytes(64)),
    "half a block": build(tensors=[entry("t", (48, 2), 2, 0)], data=bytes(640)),
    "name twice": build(tensors=[entry("t", (8,), 0, 0)] * 2, data=bytes(64)),
    "one on top of another": build(tensors=[entry("t", (16,), 0, 0), entry("u", (8,), 0, 32)], data=bytes(64)),
    "name of 2000 bytes": build(tensors=[entry("t" * 2000, (8,), 0, 0)], data=bytes(64)),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_headers(case: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(BAD[case])
    with pytest.raises(CompressError) as raised:
        header_of.read_header(path)
    assert raised.value.remedy


def test_a_good_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    nested = struct.pack("<IQ", 9, 2) + (struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2) + b"hi") * 2
    keys = [("a", 9, nested), ("general.alignment", 4, struct.pack("<I", 64)), ("b", 7, b"\1")]
    for version in (2, 3):
        raw = build(*keys, tensors=[entry("t", (8,), 0, 64), entry("u", (16,), 0, 0)], version=version)
        path.write_bytes(raw + bytes(-len(raw) % 64) + bytes(96))
        header = header_of.read_header(path)
        assert header.tensors["t"].start - header.tensors["u"].start == 64
        assert header.tensors["u"].start % 64 == 0
        assert header.metadata["b"] is True


MISFITS = {
    "not llama": ({}, {"arch": "gptj"}, "architecture"),
    "a tensor too many": ({"blk.0.ssm_a.weight": ("F32", (4, 32))}, {}, "belongs to no llama"),
    "rows for half a head": ({"blk.0.attn_q.weight": ("F32", (12, 64))}, {}, "rows for 4 heads"),
    "layers that are no JSON": ({}, {"compress__layers": "{"}, "JSON"),
    "layers that are a list": ({}, {"compress__layers": "[]"}, "JSON"),
    "quantised norm": ({"output_norm.weight": ("Q8_0", (64,))}, {}, "only matrices"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_are_no_model(case: str, tmp_path: Path) -> None:
    tensors, more, expected = MISFITS[case]
    peer_file(tmp_path / "a.gguf", SMALL | tensors, **more)
    with pytest.raises(CompressError, match=expected):
        Checkpoint.open(tmp_path)


def read_all(path: Path) -> None:
    """Everything that reading may do with a file of a few kilobytes."""
    from compress.weights import Weights

    weights = Weights(Checkpoint.open(path))
    for name in weights.shapes():
        weights.read(name)


def test_mutated_files(tmp_path: Path) -> None:
    """700 damaged files: an error of ours or a good read, and memory in proportion to the file."""
    path = tmp_path / "a.gguf"
    peer_file(path)
    good = path.read_bytes()
    start = header_of.read_header(path)
    header_bytes = min(t.start for t in start.tensors.values())
    rng = random.Random(7)
    told = read = 0
    read_all(path)
    tracemalloc.start()
    for _ in range(700):
        raw = bytearray(good)
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            at = rng.randrange(header_bytes)
            how = rng.randrange(5)
            if how == 0:
                raw[at] = rng.randrange(256)
            elif how == 1:
                raw[at] ^= 1 << rng.randrange(8)
            elif how == 2:
                raw[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
            elif how == 3:
                del raw[at : at + rng.randrange(1, 40)]
            else:
                raw = raw[: rng.randrange(len(raw))]
                break
        path.write_bytes(raw)
        try:
            read_all(path)
            read += 1
        except CompressError:
            told += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert told + read == 700
    assert told > 200
    assert peak < 40 * len(good)


def test_a_file_that_is_cut_while_open(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    peer_file(path)
    stored = Checkpoint.open(path).tensors["model.embed_tokens.weight"]
    path.write_bytes(path.read_bytes()[: stored.start + 5])
    with pytest.raises(CompressError, match="ends inside"):
        read_tensor(stored, "x")
