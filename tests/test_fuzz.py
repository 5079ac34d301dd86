"""Thousands of damaged checkpoints: each is read or refused with a CompressError, at once, in little memory.

The files are small checkpoints of every format, written by the formats themselves, with one to three things wrong in
them. What is measured: the exception, the time (a timer that interrupts the reader), the peak of Python's own memory
(tracemalloc), the largest tensor that is made, and the address space (a limit that a large allocation runs into).
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import json
import re
import resource
import shutil
import signal
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.formats import FORMATS
from compress.formats.base import Held
from compress.hashes import hash_files
from compress.recipe import Recipe, parse
from compress.types import LayerStats
from compress.verify import check_hashes
from compress.weights import Weights
from compress.writer import save_tensors, write_shards

EXAMPLES = 2400
SECONDS = 5.0  # no reader takes a tenth of it; a loaded machine might
MEMORY = (64, 2_000_000)  # bytes allowed: so many times the files' size, and so many more

SHAPES = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (32, 32),
    "self_attn.v_proj": (32, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
DENSE = {
    "model.embed_tokens.weight": (16, 32),
    "model.norm.weight": (32,),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.0.post_attention_layernorm.weight": (32,),
}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
#: name -> (format, one step a layer in turn)
BASES = {
    "dense": ("dense", ["rtn group_size=16"]),
    "compressed-tensors": ("compressed-tensors", ["rtn group_size=16"]),
    "compressed-tensors, 3 bits with zeros": ("compressed-tensors", ["rtn bits=3 group_size=16 symmetric=false"]),
    "compressed-tensors, W8A8": ("compressed-tensors", ["absmax activations=token"]),
    "compressed-tensors, mixed": ("compressed-tensors", ["rtn group_size=16", "rtn bits=8 group_size=-1"]),
    "gptq": ("gptq", ["rtn group_size=16"]),
    "gptq_v2": ("gptq_v2", ["gptq bits=3 group_size=16 act_order=groups symmetric=false"]),
    "native": (
        "native",
        [
            "rtn bits=5 symmetric=false group_size=-1",
            "spqr",
            "nf4 double_quant=true",
            "kmeans bits=3",
            "sparsegpt pattern=2:4",
            "int8 threshold=8",
            "sparsegpt sparsity=0.7 bits=4 group_size=16 symmetric=false",
        ],
    ),
    "native, more": (
        "native",
        [
            "sparsegpt pattern=4:8 bits=3 group_size=16",
            "spqr bits=2 group_size=8 outlier_threshold=.inf",
            "fp4 variant=e3m0",
            "kmeans bits=2 group_size=16 weighted=false",
            "sparsegpt sparsity=0.4",
            "gptq bits=4 group_size=16 act_order=groups",
            "absmax weights=tensor activations=tensor zeropoint=true",
        ],
    ),
}


def layers_of(steps: list[str]) -> dict[str, Any]:
    """A packed layer of every shape, by the steps in turn."""
    g = torch.Generator().manual_seed(3)
    out = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        x = torch.randn(100, shape[1], generator=g)
        weight = (torch.randn(shape, generator=g) * 0.05).bfloat16()
        stats = LayerStats(
            100, x.T @ x / 100, x.abs().amax(0), x.abs().mean(0), x.mean(0), (x.abs() > 2).float().mean(0)
        )
        (settled,) = (p.settle([shape[1]]) for p in Recipe.of(parse(steps[i % len(steps)])).passes)
        out[f"model.layers.0.{name}"] = settled(weight, stats, torch.bfloat16).packed
    return out


def write(folder: Path, form: str, steps: list[str]) -> None:
    """A small checkpoint with compress.json, dense ones in two shards."""
    format, layers = FORMATS[form], layers_of(steps)
    tensors: dict[str, Tensor] = {}
    for name, packed in layers.items():
        tensors |= {f"{name}.{part}": t.contiguous() for part, t in format.pack(packed).items()}
    g = torch.Generator().manual_seed(4)
    tensors |= {name: torch.randn(shape, generator=g).bfloat16() for name, shape in DENSE.items()}
    folder.mkdir(parents=True)
    held = [Held(n, n, p.shape, p.storage, torch.bfloat16) for n, p in layers.items()]
    declared = {"quantization_config": format.config(held, [])} if format.quantised else {}
    (folder / "config.json").write_text(json.dumps(CONFIG | declared))
    save_tensors(folder / "model.safetensors", tensors)
    if not format.quantised:
        whole = Checkpoint.open(folder)
        parts = folder / "parts"
        parts.mkdir()
        write_shards(parts, whole.tensors.items(), sum(t.nbytes for t in whole.tensors.values()) // 2 + 1)
        (folder / "model.safetensors").unlink()
        for file in parts.iterdir():
            file.rename(folder / file.name)
        parts.rmdir()
    (folder / "compress.json").write_text(json.dumps({"sha256": hash_files(sorted(folder.iterdir()))}))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """Base -> file name -> content."""
    root = tmp_path_factory.mktemp("fuzz")
    out = {}
    for i, (base, (form, steps)) in enumerate(BASES.items()):
        write(root / str(i), form, steps)
        out[base] = {p.name: p.read_bytes() for p in sorted((root / str(i)).iterdir())}
    return out


# --- what is called, and what it may take


class TooSlow(BaseException):
    """The timer rang; no handler in the package catches it."""


class TooLarge(BaseException):
    """A tensor far larger than the files."""


class Largest(TorchDispatchMode):
    """Refuses tensors above a number of bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            real = isinstance(tensor, Tensor) and tensor.device.type != "meta"
            if real and tensor.untyped_storage().nbytes() > self.limit:
                raise TooLarge(f"{func}: {list(tensor.shape)}")
        return out


@contextlib.contextmanager
def watched(files: dict[str, bytes], traced: bool = True) -> Iterator[None]:
    """A timer, and limits on memory that follow the size of the files.

    Args:
        traced: count Python's own memory too, which takes three times as long.
    """
    limit = MEMORY[0] * sum(map(len, files.values())) + MEMORY[1]

    def ring(*args: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    faulthandler.dump_traceback_later(10 * SECONDS, exit=True)  # where C code does not come back to Python
    if traced:
        tracemalloc.start()
    try:
        with Largest(limit):
            yield
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < limit, f"{peak} bytes of Python objects"
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()


def read_all(folder: Path, skeleton: bool) -> str:
    """Everything that a reader of a checkpoint calls. Returns "read", or the refusal."""
    try:
        weights = Weights(Checkpoint.open(folder))
        shapes = weights.shapes()
        for layer in sorted(weights.packed):
            weights.activations(layer)
            dense = weights.read(layer + ".weight")
            assert tuple(dense.shape) == shapes[layer + ".weight"]
        for name in shapes:
            weights.dtype(name)
            if name.removesuffix(".weight") not in weights.packed:
                weights.read(name)
        if skeleton:
            BlockModel(weights, torch.float32, torch.device("cpu"), False)
    except CompressError as error:
        line = error.line()
        assert "allocate memory" not in line, line  # the address space ran out: that was no small number of bytes
        return line
    return "read"


def hashes(folder: Path) -> str:
    try:
        check_hashes(folder)
    except CompressError as error:
        return error.line()
    return "same"


@pytest.fixture
def small_space() -> Iterator[None]:
    """At most 2 GB more address space than now."""
    with Largest(1_000_000):  # the first use imports torch's compiler
        torch.zeros(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 2_000_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def put(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)


# --- what is wrong with them

NUMBERS = [0, -1, 1, 2, 3, 7, 8, 16, 31, 33, 64, 127, 10**4, 2**31, 2**32 + 1, 2**62, 2**63, 10**18, 10**30, 0.5, -0.0]
ODD = [
    None,
    True,
    False,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "re:(",
    "re:(a|a)*b",
    "Linear",
    "\0",
    "../up",
    "/x",
]
ODD += ["4", "é" * 50, [], {}, [[]], [None], [2**62] * 3, {"a": {}}, [0, 2**40, 2**40], [0, 0, 0], "a" * 3000]
TEXT = [*map(str, NUMBERS[:8]), "model-00002-of-00002.safetensors", "../evil.safetensors", "..", ".", "", "/etc/passwd"]
TEXT += ["a\0b", "a/b.safetensors", "config.json", "~", "nul\n", "model.safetensors\\", "x" * 300]
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "C64",
    "f32",
]

values = st.sampled_from([*NUMBERS, *ODD, *DTYPES, *TEXT]) | st.integers(-(2**70), 2**70) | st.text(max_size=8)


def split(raw: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def paths_of(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON tree but its root."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inside:
        yield (*at, key)
        yield from paths_of(value, (*at, key))


def change_tree(draw: Callable[[Any], Any], tree: Any) -> Any:
    """One place in a JSON tree: another value, gone, or under another name."""
    tree = copy.deepcopy(tree)
    places = list(paths_of(tree))
    deep = [p for p in places if p[0] == "quantization_config"]
    if deep and draw(st.integers(0, 3)):
        # a place of the first levels as often as one of the many below them
        level = draw(st.integers(2, max(map(len, deep))))
        places = [p for p in deep if len(p) == level]
    *way, last = draw(st.sampled_from(places))
    parent = tree
    for key in way:
        parent = parent[key]
    how = draw(st.sampled_from(["value", "value", "value", "gone", "name", "elsewhere", "near"]))
    if how == "gone":
        del parent[last]
    elif how == "name" and isinstance(parent, dict):
        parent[str(draw(values))] = parent.pop(last)
    elif how == "near" and isinstance(parent[last], int):
        parent[last] = parent[last] + draw(st.sampled_from([-1, 1, 8, -8, 2**40]))
    elif how == "elsewhere":
        other: Any = tree
        for key in draw(st.sampled_from(places)):
            other = other[key]
            if other is parent or draw(st.booleans()):
                break
        parent[last] = copy.deepcopy(other)
    else:
        parent[last] = draw(values)
    return tree


def damage_bytes(draw: Callable[[Any], Any], raw: bytes) -> bytes:
    """Cut, extended, or with some bits flipped: in the header as often as in the data."""
    how = draw(st.sampled_from(["cut", "more", "flip", "flip", "flip", "noise"]))
    if how == "cut":
        return raw[: draw(st.integers(0, len(raw)))]
    if how == "more":
        return raw + draw(st.binary(min_size=1, max_size=40))
    front = 8 + min(int.from_bytes(raw[:8], "little"), len(raw)) if len(raw) > 8 else len(raw)
    end = draw(st.sampled_from([8, front, len(raw), len(raw)])) or 1
    out = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, min(end, len(raw)) - 1)))
        if how == "flip" and out:
            out[place] ^= 1 << draw(st.integers(0, 7))
        else:
            out[place : place + 8] = draw(st.binary(min_size=8, max_size=8))
    return bytes(out)


def damage_header(draw: Callable[[Any], Any], raw: bytes) -> bytes:
    """The header says something else than the data are."""
    header, data = split(raw)
    how = draw(st.sampled_from(["length", "tree", "shape", "dtype", "offsets", "twice", "names", *["fits"] * 7]))
    names = [n for n in header if n != "__metadata__"]
    name = draw(st.sampled_from(names))
    entry = header[name]
    if how == "length":
        false = draw(st.sampled_from([0, 1, 7, len(raw), len(raw) - 8, 10**8, 2**31, 2**62, 2**63, 2**64 - 1]))
        return struct.pack("<Q", false) + raw[8:]
    if how == "tree":
        return joined(change_tree(draw, header), data)
    if how == "shape":
        sizes = st.sampled_from([0, 1, 2, 31, 33, 2**20, 2**31, 2**40, 2**62, -1])
        entry["shape"] = draw(st.lists(sizes, max_size=4))
    elif how == "dtype":
        entry["dtype"] = draw(st.sampled_from(DTYPES))
    elif how == "offsets":
        other = header[draw(st.sampled_from(names))]["data_offsets"]
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = draw(
            st.sampled_from([other, [end, begin], [begin - 1, end - 1], [begin, end + 2**40], [0, len(data)], [-8, 0]])
        )
    elif how == "twice":
        text = json.dumps(header)
        text = text[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}"
        return struct.pack("<Q", len(text)) + text.encode() + data
    elif how == "names":
        other = draw(st.sampled_from(names))
        header[name], header[other] = header[other], header[name]
    else:
        return fitting(draw, header, data, name)
    return joined(header, data)


def fitting(draw: Callable[[Any], Any], header: dict[str, Any], data: bytes, name: str) -> bytes:
    """A valid file whose tensor is another one: other shape, other dtype, other values, gone, or without elements."""
    parts = {n: (e, data[slice(*e["data_offsets"])]) for n, e in header.items() if n != "__metadata__"}
    entry, raw = parts[name]
    how = draw(
        st.sampled_from(["flat", "turned", "dtype", "half", "empty", "gone", "renamed", "zeros", "ones", "noise"])
    )
    size = max(1, len(raw))
    if how == "flat":
        entry["shape"] = [int(torch.tensor(entry["shape"]).prod())]
    elif how == "turned":
        entry["shape"] = entry["shape"][::-1]
    elif how == "dtype":
        entry["dtype"], entry["shape"] = draw(st.sampled_from([("U8", [size]), ("I8", [1, size]), ("BOOL", [size, 1])]))
        raw = raw.ljust(size, b"\1")
    elif how == "half" and entry["shape"] and entry["shape"][0] % 2 == 0:
        entry["shape"][0] //= 2
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        entry["shape"], raw = draw(st.sampled_from([[0], [0, 2**40], [2**40, 0], [32, 0], [0, 32], [0, 0, 0]])), b""
    elif how == "gone":
        del parts[name]
    elif how == "renamed":
        parts[f"{name}{draw(st.sampled_from(['x', '.weight', '_scale']))}"] = parts.pop(name)
    elif how in ("zeros", "ones"):
        raw = (b"\0" if how == "zeros" else b"\xff") * len(raw)
    elif how == "noise":
        raw = draw(st.binary(min_size=8, max_size=8)) * (len(raw) // 8 + 1)
        raw = raw[: parts[name][0]["data_offsets"][1] - parts[name][0]["data_offsets"][0]]
    if name in parts:
        parts[name] = (entry, raw)
    out: dict[str, Any] = {}
    blob = b""
    for n, (e, piece) in parts.items():
        out[n] = {**e, "data_offsets": [len(blob), len(blob) + len(piece)]}
        blob += piece
    return joined(out, blob)


@dataclass(frozen=True)
class Case:
    """Files of a checkpoint with something wrong in them, and which file was changed last."""

    base: str
    files: dict[str, bytes] = field(repr=False)
    target: str


@st.composite
def damaged(draw: st.DrawFn, bases: dict[str, dict[str, bytes]]) -> Case:
    """One to three things wrong."""
    base = draw(st.sampled_from(sorted(bases)))
    files = dict(bases[base])
    target = ""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        kinds = {"config": "config.json", "record": "compress.json", "shard": ".safetensors", "index": ".index.json"}
        there = [k for k, end in kinds.items() if any(n.endswith(end) for n in files)]
        kind = draw(
            st.sampled_from([k for k in ("shard", "shard", "config", "config", "index", "record") if k in there])
        )
        target = draw(st.sampled_from([n for n in sorted(files) if n.endswith(kinds[kind])]))
        raw = files[target]
        plain = draw(st.integers(0, 6)) == 0
        with contextlib.suppress(
            ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError, OverflowError
        ):
            # a second change may meet a file that is no longer one
            if plain:
                files[target] = damage_bytes(draw, raw)
            elif kind == "shard":
                files[target] = damage_header(draw, raw)
            else:
                files[target] = json.dumps(change_tree(draw, json.loads(raw))).encode()
    return Case(base, files, target)


def examined(case: Case, folder: Path) -> str:
    """What a reader says of the files, within its limits."""
    put(folder, case.files)
    with watched(case.files, traced=sum(case.files[case.target]) % 6 == 0):
        return hashes(folder) if case.target == "compress.json" else read_all(folder, False)


def test_damaged_checkpoints(bases: dict[str, dict[str, bytes]], tmp_path: Path, small_space: None) -> None:
    seen: dict[str, int] = {"read": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(bases))
    def one(case: Case) -> None:
        found = examined(case, tmp_path / "model")
        seen["read" if found in ("read", "same") else "refused"] += 1

    one()
    assert sum(seen.values()) >= 2000, seen
    assert min(seen.values()) > 100, seen  # neither all harmless nor all caught at the first look


def test_damaged_checkpoints_and_their_models(bases: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    """The same with the model that config.json describes, which takes longer."""

    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(damaged(bases))
    def one(case: Case) -> None:
        if case.target != "compress.json":
            put(tmp_path / "model", case.files)
            read_all(tmp_path / "model", True)

    one()


def test_the_undamaged_are_read(bases: dict[str, dict[str, bytes]], tmp_path: Path, small_space: None) -> None:
    for files in bases.values():
        put(tmp_path / "model", files)
        with watched(files):
            assert read_all(tmp_path / "model", False) == "read"
            assert hashes(tmp_path / "model") == "same"
        assert read_all(tmp_path / "model", True) == "read"


@pytest.mark.parametrize("base", BASES)
def test_a_name_that_comes_twice(bases: dict[str, dict[str, bytes]], tmp_path: Path, base: str) -> None:
    """JSON keeps the last; what another reader keeps is its own affair."""
    files = dict(bases[base])
    shard = next(n for n in files if n.endswith(".safetensors"))
    header, data = split(files[shard])
    name = next(n for n in header if n != "__metadata__")
    text = json.dumps(header)
    text = f"{text[:-1]}, {json.dumps(name)}: {json.dumps(header[name])}}}"
    files[shard] = struct.pack("<Q", len(text)) + text.encode() + data
    put(tmp_path / "model", files)
    assert "twice" in read_all(tmp_path / "model", False)


def changed(files: dict[str, bytes], *way: Any, value: Any) -> dict[str, bytes]:
    """config.json with another value somewhere in its quantization_config."""
    config = json.loads(files["config.json"])
    parent = config["quantization_config"]
    for key in way[:-1]:
        parent = parent[key]
    parent[way[-1]] = value
    return {**files, "config.json": json.dumps(config).encode()}


GROUP = ("config_groups", "group_0")
LAYER = "model.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    ("base", "way", "value", "says"),
    [
        ("native, more", ("storages", 1, "details", "qq_groupsize"), 2**40, "is stored as"),
        ("native", ("storages", 4, "inner", "bits"), 10**9, "do not hold|is stored as|cannot be unpacked"),
        ("native", ("layers", LAYER), [1, 2**40, 2**40], "bytes do not hold a weight"),
        ("native", ("layers", LAYER), [1, 10**30, 1], "bytes do not hold a weight"),
        ("native", ("layers", LAYER), [1, -32, -32], "bytes do not hold a weight"),
        ("native", ("layers", LAYER), [99, 32, 32], "IndexError"),
        ("compressed-tensors", (*GROUP, "targets"), ["re:("], "missing \\)"),
        ("compressed-tensors", (*GROUP, "targets"), ["re:(.+)+x"], "may take for ever"),
        ("compressed-tensors", (*GROUP, "targets"), ["re:" + ".*" * 30 + "x"], "may take for ever"),
        ("compressed-tensors", (*GROUP, "targets"), ["re:.*\\.(q|k|v)_proj$"], "names this layer"),
        ("compressed-tensors", (*GROUP, "weights", "num_bits"), 10**12, "cannot be read"),
        ("gptq", ("bits",), 10**12, "."),
        ("gptq", ("group_size",), 2**62, "."),
    ],
)
def test_what_it_found(
    bases: dict[str, dict[str, bytes]],
    tmp_path: Path,
    small_space: None,
    base: str,
    way: tuple[Any, ...],
    value: Any,
    says: str,
) -> None:
    files = changed(bases[base], *way, value=value)
    put(tmp_path / "model", files)
    with watched(files):
        found = read_all(tmp_path / "model", False)
    assert found != "read"
    assert re.search(says, found), found
