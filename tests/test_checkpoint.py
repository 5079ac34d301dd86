"""checkpoint.py: what is written is read back, byte for byte, by us and by safetensors; half a file is never left."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import compress
from compress import checkpoint, output
from compress import verify as verifying
from compress.checkpoint import Checkpoint, Stored, read_header, read_json, read_tensor, tensor_bytes
from compress.errors import CompressError
from compress.hashes import hash_files
from compress.passes.rtn import RTN
from compress.verify import check_hashes, verify
from compress.writer import has_links, save_tensors, write_json, write_shards, write_text

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
]
shapes = st.lists(st.integers(0, 5), max_size=3)


def random(shape: list[int], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-100, 100, shape, generator=generator).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), max_size=6))
def test_saved_tensors_come_back(tmp_path: Path, wanted: list[tuple[list[int], torch.dtype]]) -> None:
    file = tmp_path / "some.safetensors"
    tensors = {f"t{i}": random(shape, dtype, i) for i, (shape, dtype) in enumerate(wanted)}
    digest = save_tensors(file, tensors)
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    theirs, ours = load_file(file), read_header(file)
    assert theirs.keys() == ours.keys() == tensors.keys()
    for name, value in tensors.items():
        assert same(theirs[name], value)
        assert same(read_tensor(ours[name], name), value)
        assert ours[name].numel == value.numel()


def test_theirs_are_read(tmp_path: Path) -> None:
    tensors = {str(d): random([3, 4], d) for d in DTYPES} | {"bool": torch.tensor([True, False])}
    tensors |= {"f8": torch.ones(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(5.0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    for name, stored in read_header(tmp_path / "a.safetensors").items():
        found = read_tensor(stored, name)
        assert found.dtype == tensors[name].dtype
        assert tensor_bytes(found) == tensor_bytes(tensors[name])


def test_a_transposed_tensor_is_saved_as_it_looks(tmp_path: Path) -> None:
    value = random([4, 6], torch.float32)
    save_tensors(tmp_path / "a.safetensors", {"t": value.t()})
    assert same(load_file(tmp_path / "a.safetensors")["t"], value.t().contiguous())


def test_tensors_are_aligned(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a", {"b": random([3], torch.uint8), "w": random([3], torch.float64)})
    for stored in read_header(tmp_path / "a").values():
        assert stored.start % stored.torch_dtype.itemsize == 0


def test_read_tensor_of_a_file_cut_short_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"t": random([100], torch.float32)})
    stored = read_header(file)["t"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CompressError, match="the file ends inside tensor t"):
        read_tensor(stored, "t")


@pytest.mark.parametrize("limit", [1, 100, 1000, 10**9])
def test_shards(tmp_path: Path, limit: int) -> None:
    tensors = {f"t{i}": random([10 + i, 3], torch.float32, i) for i in range(5)}
    save_tensors(tmp_path / "source", tensors)
    folder = tmp_path / "out"
    folder.mkdir()
    hashes = write_shards(folder, read_header(tmp_path / "source").items(), limit)
    assert hashes == hash_files(sorted(folder.iterdir()))
    (folder / "config.json").write_text("{}")
    found = Checkpoint.open(folder)
    assert found.tensors.keys() == tensors.keys()
    assert all(same(found.read(n), t) for n, t in tensors.items())
    files = found.files()
    assert len(files) == {1: 5, 100: 5, 1000: 1, 10**9: 1}[limit]
    assert (folder / "model.safetensors.index.json").exists() == (len(files) > 1)
    for file in files:
        held = [t.nbytes for t in found.tensors.values() if t.file == file]
        assert len(held) == 1 or sum(held) <= limit
    if len(files) > 1:
        index = read_json(folder / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.tensors.values())
        assert set(index["weight_map"].values()) == {f.name for f in files}


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_is_written_becomes_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """By another name, or copied; one that holds something else too is not taken."""
    if not links:

        def refused(*_: object) -> None:
            raise OSError("no links here")

        monkeypatch.setattr(os, "link", refused)
    blocks = {name: {f"{name}{i}": random([7, 9], torch.int32, i) for i in range(3)} for name in ("a", "b", "c")}
    written = [(tmp_path / name, save_tensors(tmp_path / name, held)) for name, held in blocks.items()]
    save_tensors(tmp_path / "rest", {"r": random([50], torch.bfloat16), "s": random([60], torch.bfloat16)})
    stored = {n: s for name in ("a", "b", "c", "rest") for n, s in read_header(tmp_path / name).items() if n != "b1"}
    (folder := tmp_path / "out").mkdir()
    hashes = write_shards(folder, stored.items(), 10**9, written)
    assert hashes == hash_files(sorted(folder.iterdir()))
    (folder / "config.json").write_text("{}")
    found = Checkpoint.open(folder)
    assert found.tensors.keys() == stored.keys()
    assert all(same(found.read(n), read_tensor(s)) for n, s in stored.items())
    assert [len(read_header(f)) for f in found.files()] == [3, 3, 4]
    assert [f.stat().st_nlink for f in found.files()] == ([2, 2, 1] if links else [1, 1, 1])
    assert found.files()[0].read_bytes() == (tmp_path / "a").read_bytes()
    assert has_links(tmp_path) == links
    assert not has_links(tmp_path / "nowhere")
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", "c", "rest", "out"}


def test_hashes(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    (tmp_path / "empty").write_bytes(b"")
    expected = {"f": hashlib.sha256(b"x" * 100).hexdigest(), "empty": hashlib.sha256().hexdigest()}
    assert hash_files([tmp_path / "f", tmp_path / "empty"]) == expected
    monkeypatch.setattr(checkpoint, "_PIECE_BYTES", 1000)
    raw = (toy / "model.safetensors").read_bytes()
    pieces = [hashlib.sha256(raw[i : i + 1000]).digest() for i in range(0, len(raw), 1000)]
    stop = threading.Event()
    assert Checkpoint.open(toy).fingerprint(stop)["model.safetensors"] == hashlib.sha256(b"".join(pieces)).hexdigest()
    stop.set()
    with pytest.raises(CancelledError):
        Checkpoint.open(toy).fingerprint(stop)


def test_same_tensors_same_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": random([4], torch.bfloat16, i) for i in range(9)}
    assert save_tensors(tmp_path / "a", tensors) == save_tensors(tmp_path / "b", dict(tensors))


def test_fingerprint_sees_every_byte(tmp_path: Path, toy: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy, folder)
    before = Checkpoint.open(folder).fingerprint()
    assert set(before) == {"config.json", "model.safetensors"}
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    after = Checkpoint.open(folder).fingerprint()
    assert after["config.json"] == before["config.json"]
    assert after["model.safetensors"] != before["model.safetensors"]


def test_shards_without_an_index(tmp_path: Path) -> None:
    for i in range(2):
        save_tensors(tmp_path / f"part{i}.safetensors", {f"t{i}": random([2], torch.float32)})
    save_tensors(tmp_path / "adapter_model.safetensors", {"t0": random([2], torch.float32)})
    (tmp_path / "config.json").write_text("{}")
    assert set(Checkpoint.open(tmp_path).tensors) == {"t0", "t1"}


def test_opening_reads_no_weight(tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_tensor", None)
    assert len(Checkpoint.open(toy).tensors) == 38


def test_pickle_shapes_without_a_cache(tmp_path: Path, toy: Path) -> None:
    """A dry run asks for names and shapes alone: nothing is written."""
    state = load_file(toy / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    before = sorted(tmp_path.iterdir())
    found = Checkpoint.open(tmp_path, allow_pickle=True)
    assert {n: (t.shape, t.torch_dtype) for n, t in found.tensors.items()} == {
        n: (tuple(t.shape), t.dtype) for n, t in state.items()
    }
    assert sorted(tmp_path.iterdir()) == before


# --- writing


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_half_a_file_is_never_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    file = tmp_path / "a.safetensors"
    save_tensors(file, {"t": random([10], torch.float32)})
    before = file.read_bytes()

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path if step == "open" else os, step, full)
    with pytest.raises(CompressError, match=r"its \d+ bytes cannot be written \(No space left on device\)") as caught:
        save_tensors(file, {"t": random([10], torch.float32, 1)})
    monkeypatch.undo()
    assert str(file) in caught.value.line()
    assert file.read_bytes() == before


def test_content_that_cannot_be_read_leaves_the_old_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "source", {"t": random([1000], torch.float32)})
    stored = read_header(tmp_path / "source")["t"]
    os.truncate(tmp_path / "source", 500)
    with pytest.raises(CompressError, match="the file ends inside a tensor"):
        write_shards(tmp_path, [("t", stored)], 10**9)
    assert not (tmp_path / "model.safetensors").exists()


def test_json_and_text(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None], "a": {"ü": True}}
    assert write_json(tmp_path / "v.json", value) == hashlib.sha256((tmp_path / "v.json").read_bytes()).hexdigest()
    assert read_json(tmp_path / "v.json") == value
    assert list(json.loads((tmp_path / "v.json").read_text())) == ["a", "b"]
    write_text(tmp_path / "t", "línea\n")
    assert (tmp_path / "t").read_text() == "línea\n"
    assert {p.name for p in tmp_path.iterdir()} == {"v.json", "t"}


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "null", "5", '{"a": ', "\xff\xfe", "[" * 100_000, "9" * 5000],
    ids=["nothing", "a list", "null", "a number", "cut off", "odd letters", "too deep", "too long a number"],
)
def test_read_json_refuses(tmp_path: Path, text: str) -> None:
    (tmp_path / "v.json").write_text(text, encoding="latin1")
    with pytest.raises(CompressError, match=r"v\.json") as caught:
        read_json(tmp_path / "v.json", "the remedy")
    assert caught.value.remedy == "the remedy"


def test_read_json_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="no such file"):
        read_json(tmp_path / "v.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(CompressError, match=r"folder\.json"):
        read_json(tmp_path / "folder.json")


def test_stored_knows_its_dtype(tmp_path: Path) -> None:
    stored = Stored(tmp_path, 0, 8, "BF16", (2, 2))
    assert stored.torch_dtype is torch.bfloat16
    assert stored.numel == 4


# --- any header at all: a tensor or a refusal, nothing else


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_refused_or_read(tmp_path: Path, data: st.DataObject) -> None:
    file = tmp_path / "a.safetensors"
    if not file.exists():
        save_tensors(file, {"a": random([5], torch.float32), "b": random([3, 2], torch.bfloat16)})
    raw = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "b.safetensors"
    damaged.write_bytes(raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw)
    found, said = {}, str(damaged)
    try:
        found = read_header(damaged)
    except CompressError as error:
        said = error.line()
    assert str(damaged) in said
    assert "\n" not in said
    for name, stored in found.items():
        assert read_tensor(stored, name).shape == stored.shape


# --- verify.py: a folder that we wrote, and what may happen to it


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """A compressed toy in several shards."""
    out = tmp_path_factory.mktemp("written") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "SHARD_BYTES", 60_000)
        compress.run(toy, RTN(), out, no_eval=True, device="cpu")
    assert len(list(out.glob("*.safetensors"))) > 2
    return out


@pytest.fixture
def written(tmp_path: Path, written_once: Path) -> Path:
    return shutil.copytree(written_once, tmp_path / "out")


def flip(file: Path, at: int = -1) -> None:
    raw = bytearray(file.read_bytes())
    raw[at] ^= 1
    file.write_bytes(raw)


def test_hashes_of_what_was_written(written: Path) -> None:
    listed = {p.name for p in written.iterdir()} - {"compress.json", "report.json"}
    assert check_hashes(written) == len(listed)
    (written / "report.json").write_text("{}")  # clock times: not listed
    (written / "notes.txt").write_text("the user's own")
    assert check_hashes(written) == len(listed)


def test_one_byte_of_any_file(written: Path) -> None:
    for file in sorted(written.iterdir()):
        if file.name not in ("compress.json", "report.json"):
            flip(file)
            with pytest.raises(CompressError, match="not the one that was written") as caught:
                check_hashes(written)
            assert caught.value.where == str(file)
            flip(file)
    check_hashes(written)


def test_swapped_shards(written: Path) -> None:
    first, second, *_ = sorted(written.glob("*.safetensors"))
    first.rename(written / "x")
    second.rename(first)
    (written / "x").rename(second)
    with pytest.raises(CompressError, match=r"00001-of-.*not the one that was written"):
        check_hashes(written)


def test_missing_file(written: Path) -> None:
    (written / "tokenizer.json").unlink()
    with pytest.raises(CompressError, match=r"tokenizer\.json: the file is missing"):
        check_hashes(written)


def test_added_weights(written: Path) -> None:
    """They would be loaded in place of ours, or opened as a pickle."""
    (written / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CompressError, match=r"pytorch_model\.bin: was not written with the others"):
        check_hashes(written)


@pytest.mark.parametrize("record", [{}, {"sha256": {}}, {"sha256": [1]}, {"sha256": {"../out/config.json": "ab"}}])
def test_damaged_record(written: Path, record: dict[str, Any]) -> None:
    (written / "compress.json").write_text(json.dumps(record))
    with pytest.raises(CompressError, match=r"compress\.json: lists no files of this folder"):
        check_hashes(written)


def test_another_tools_folder(toy: Path) -> None:
    with pytest.raises(CompressError, match=r"no compress\.json"):
        check_hashes(toy)


def verified(written: Path, toy: Path) -> None:
    record = output.read_record(written)
    assert record is not None
    verify(written, record["layers"], Checkpoint.open(toy))


def test_verify_accepts_what_was_written(written: Path, toy: Path) -> None:
    verified(written, toy)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        ("model.layers.2.mlp.up_proj.weight_packed", "up_proj: the file does not dequantise to what the solver"),
        ("model.layers.0.self_attn.q_proj.weight_scale", "q_proj: the file does not dequantise to what the solver"),
        ("model.norm.weight", "model.norm.weight: the copied tensor is not the original's"),
        ("model.embed_tokens.weight", "embed_tokens.weight: the copied tensor is not the original's"),
    ],
)
def test_verify_names_the_tensor(written: Path, toy: Path, tensor: str, says: str) -> None:
    stored = Checkpoint.open(written).tensors[tensor]
    flip(stored.file, stored.start)
    with pytest.raises(CompressError) as caught:
        verified(written, toy)
    assert says in caught.value.line()


@pytest.mark.parametrize("place", [0, 1, 12345, -2, -1])
def test_a_copy_in_pieces(written: Path, toy: Path, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever byte differs, in whichever piece."""
    monkeypatch.setattr(verifying, "_PIECE", 1001)
    verified(written, toy)
    stored = Checkpoint.open(written).tensors["model.embed_tokens.weight"]
    flip(stored.file, stored.start + place % stored.nbytes)
    with pytest.raises(CompressError, match=r"embed_tokens\.weight: the copied tensor is not the original's"):
        verified(written, toy)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64, 67])
def test_bytes_are_compared(count: int) -> None:
    """Not numbers: NaN is itself, 0 is not -0; and a slice lies where it lies."""
    value = torch.randn(count + 3).to(torch.bfloat16)
    value[3 if count else 0] = float("nan")
    assert verifying.equal(value.clone(), value)
    assert verifying.equal(value[3:].clone(), value[3:])
    assert verifying.equal(value[4:].float(), value[4:])
    for place in range(count):
        other = value[3:].clone()
        other.view(torch.int16)[place] ^= -(1 << 15)
        assert not verifying.equal(other, value[3:])
    assert not verifying.equal(value, value[3:])
    assert not verifying.equal(value.to(torch.float16), value)


def test_verify_misses_a_copied_tensor(written: Path, toy: Path, tmp_path: Path) -> None:
    """One that no parameter of the model asks for, but that the original held."""
    source = shutil.copytree(toy, tmp_path / "source")
    save_tensors(source / "model.safetensors", load_file(toy / "model.safetensors") | {"extra": torch.ones(3)})
    with pytest.raises(CompressError, match="extra: the copied tensor is not the original's"):
        verified(written, source)


def test_verify_misses_a_layer(written: Path, toy: Path) -> None:
    record = output.read_record(written)
    assert record is not None
    with pytest.raises(CompressError, match="packed in the files or in the records, not in both"):
        verify(written, record["layers"][1:], Checkpoint.open(toy))
