"""`compress export`: codes and scales move unchanged between formats; what would be lost is refused unless allowed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compress
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.export import export, widened
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.recipe import make_recipe, parse
from compress.weights import Weights

pytestmark = pytest.mark.xdist_group("export")  # else each worker would make the sources


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toy: Path, text_file: Path) -> Any:
    """made(line, format): the toy model compressed by a step, once."""
    cache: dict[tuple[str, str], Path] = {}

    def make(line: str, format: str = "auto") -> Path:
        if (line, format) not in cache:
            out = tmp_path_factory.mktemp("made") / "source"
            recipe = make_recipe({"steps": [line]}, "m", "m")
            given = {"calib": str(text_file), "samples": 8, "seq_len": 64, "no_eval": True, "no_verify": True}
            compress.run(toy, recipe, out, format=format, device="cpu", **given)
            cache[line, format] = out
        return cache[line, format]

    return make


def read(folder: Path) -> Weights:
    return Weights(Checkpoint.open(folder))


def equal(a: UniformGrid, b: UniformGrid) -> bool:
    zeros = a.zeros is None if b.zeros is None else a.zeros is not None and torch.equal(a.zeros, b.zeros)
    return torch.equal(a.codes, b.codes) and torch.equal(a.scales.double(), b.scales.double()) and zeros


@pytest.mark.parametrize("symmetric", ["true", "false"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_and_back(made: Any, tmp_path: Path, bits: int, symmetric: str) -> None:
    """bfloat16 scales of ordinary size are float16 numbers too: nothing is lost there, nor on the way back."""
    source = made(f"rtn bits={bits} group_size=32 symmetric={symmetric}")
    there = export(source, tmp_path / "gptq", "gptq_v2", client=False)
    back = export(tmp_path / "gptq", tmp_path / "ct", "compressed-tensors", client=bits == 3)
    assert (there.losses, back.losses, there.largest_change) == ({}, {}, there.largest_change)
    before, between, after = read(source), read(tmp_path / "gptq"), read(tmp_path / "ct")
    assert before.packed == between.packed == after.packed
    for name in before.packed:
        assert equal(before.read_packed(name), between.read_packed(name))
        assert equal(before.read_packed(name), after.read_packed(name))
    old, new = load_file(source / "model.safetensors"), load_file(tmp_path / "ct" / "model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[n], new[n]) for n in old)
    for file in ("tokenizer.json", "quantize_config.json"):
        assert (tmp_path / "gptq" / file).exists()
    assert not (tmp_path / "ct" / "quantize_config.json").exists()


def test_zero_points_of_zero_do_not_fit_gptq_v1(made: Any, tmp_path: Path) -> None:
    source = made("rtn bits=4 group_size=32 symmetric=false")
    weights = read(source)
    lowest = min(int(weights.read_packed(n).zeros.min()) for n in weights.packed)  # type: ignore[attr-defined]
    assert lowest >= 1, "our own grids start at 1, so that they fit"
    export(source, tmp_path / "v1", "gptq", client=False)
    assert all(equal(weights.read_packed(n), read(tmp_path / "v1").read_packed(n)) for n in weights.packed)
    from compress.formats.gptq import GPTQFormat

    grid = weights.read_packed(next(iter(weights.packed)))
    grid.zeros[0, 0] = 0  # type: ignore[attr-defined]
    with pytest.raises(CompressError, match="gptq_v2"):
        GPTQFormat(1).pack(grid)


def test_scales_that_do_not_fit(made: Any, tmp_path: Path) -> None:
    """float16 scales lose bits as bfloat16: refused with the count, then done when allowed, and said."""
    source = made("gptq bits=4 group_size=32", "gptq")
    with pytest.raises(CompressError, match=r"scales, which are float16 and are stored as bfloat16 .*--lossy"):
        export(source, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
    done = export(source, tmp_path / "out", "compressed-tensors", lossy=True)
    assert done.losses == {"scales, which are float16 and are stored as bfloat16": done.layers}
    assert 0 < done.largest_change < 2**-8
    before, after = read(source), read(tmp_path / "out")
    name = sorted(before.packed)[0]
    a, b = before.read_packed(name), after.read_packed(name)
    assert torch.equal(a.codes, b.codes)  # type: ignore[attr-defined]
    assert torch.equal(a.scales.bfloat16(), b.scales)  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "out" / "compress.json").read_text())
    assert record["export"]["losses"] == done.losses
    assert record["method"] == json.loads((source / "compress.json").read_text())["method"]


def test_a_stopped_export_goes_on(made: Any, tmp_path: Path) -> None:
    source = made("gptq bits=4 group_size=32", "gptq")
    seen: list[int] = []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(source, tmp_path / "out", "native", step=stop)
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == 2
    export(source, tmp_path / "out", "native", check=False)
    whole = export(source, tmp_path / "whole", "native", check=False)
    assert whole.losses == {}
    one, other = tmp_path / "out" / "model.safetensors", tmp_path / "whole" / "model.safetensors"
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("line", ["spqr", "nf4", "kmeans bits=3", "sparsegpt pattern=2:4", "gptq bits=3 group_size=32"])
def test_dense(made: Any, tmp_path: Path, line: str) -> None:
    """Every weight-only result as ordinary weights, to the bit, which transformers then loads."""
    done = export(made(line, "native"), tmp_path / "out", "dense")
    assert done.losses == {}
    assert done.largest_change == 0
    assert done.proof is not None
    assert "loads it" in done.proof.clients[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    before, after = read(made(line, "native")), read(tmp_path / "out")
    assert not after.packed
    for name in before.shapes():
        assert torch.equal(before.read(name), after.read(name))


def test_sparse_codes_leave_their_mask(made: Any, tmp_path: Path) -> None:
    """A pruned and quantised layer is a quantised one whose zeros are codes: compressed-tensors holds it, larger."""
    source = made("sparsegpt pattern=2:4 bits=4 group_size=32")
    done = export(source, tmp_path / "out", "compressed-tensors")
    assert (done.losses, done.largest_change) == ({}, 0)
    before, after = read(source), read(tmp_path / "out")
    for name in before.packed:
        sparse = before.read_packed(name)
        assert isinstance(sparse, Sparse)
        assert equal(sparse.inner, after.read_packed(name))  # type: ignore[arg-type]


def test_wider_codes(made: Any, tmp_path: Path) -> None:
    """GPTQ has no 5 bits: the same grid in codes of 8."""
    source = made("rtn bits=5 group_size=32")
    done = export(source, tmp_path / "out", "gptq")
    assert done.losses == {}
    before, after = read(source), read(tmp_path / "out")
    for name in before.packed:
        a, b = before.read_packed(name), after.read_packed(name)
        assert b.storage.bits == 8
        assert torch.equal(a.codes.int() - 16, b.codes.int() - 128)  # type: ignore[attr-defined]


def test_widened_is_the_same_grid() -> None:
    grid = UniformGrid(torch.arange(8, dtype=torch.uint8).repeat(2, 4), torch.rand(2, 1), None, 3, -1)
    assert torch.equal(widened(grid, 4).dequantize(), grid.dequantize())
    assert torch.equal(widened(grid, 8).dequantize(), grid.dequantize())


def test_to_gguf_and_back(made: Any, tmp_path: Path) -> None:
    """Symmetric codes, whatever their width and group, go into Q4_0 and Q8_0 as they are."""
    for line in ("rtn bits=4 group_size=32", "rtn bits=3 group_size=64", "rtn bits=8 group_size=-1"):
        source, there = made(line), tmp_path / line / "gguf"
        done = export(source, there, "gguf")
        assert (done.losses, done.proof is not None) == ({}, True)
        assert "loads it" in done.proof.clients[0]  # type: ignore[union-attr]
        back = export(there, tmp_path / line / "ct", "compressed-tensors", client=False)
        assert back.losses == {}
        before, after = read(source), read(tmp_path / line / "ct")
        assert all(equal(before.read_packed(n), after.read_packed(n)) for n in before.packed)  # type: ignore[arg-type]


def test_zero_points_to_gguf(made: Any, tmp_path: Path) -> None:
    """Q4_1 has a minimum where a grid has a zero point: float16 rounds it, and that has to be allowed."""
    source = made("rtn bits=4 group_size=32 symmetric=false")
    with pytest.raises(CompressError, match=r"zero points, which become a minimum a group, rounded to float16 \(28"):
        export(source, tmp_path / "out", "gguf")
    done = export(source, tmp_path / "out", "gguf", lossy=True)
    assert 0 < done.largest_change < 2e-3
    export(tmp_path / "out", tmp_path / "native", "native")
    assert {read(tmp_path / "native").storage(n).kind for n in read(source).packed} == {"affine"}


def test_a_dense_model_to_gguf(toy: Path, tmp_path: Path) -> None:
    done = export(toy, tmp_path / "out", "gguf")
    assert done.layers == 0
    before, after = read(toy), read(tmp_path / "out")
    assert all(torch.equal(before.read(n).float(), after.read(n).float()) for n in before.shapes())


def test_activations_are_lost_only_when_allowed(made: Any, tmp_path: Path) -> None:
    source = made("absmax activations=token")
    with pytest.raises(CompressError, match=r"the 8-bit activations.*\(28 layers\).*--lossy"):
        export(source, tmp_path / "out", "gptq")
    done = export(source, tmp_path / "out", "gptq", lossy=True)
    assert list(done.losses) == ["the 8-bit activations: only the weights stay quantised"]


@pytest.mark.parametrize(
    ("line", "format", "words"),
    [
        ("spqr", "compressed-tensors", "cannot hold the kind 'outliers'"),
        ("nf4", "gptq", "cannot hold the kind 'blockwise'"),
        ("gptq group_size=32 act_order=groups", "compressed-tensors", "holds no g_idx"),
    ],
)
def test_refused(made: Any, tmp_path: Path, line: str, format: str, words: str) -> None:
    source = made(line, "gptq" if "act_order" in line else "native")
    with pytest.raises(CompressError, match=words):
        export(source, tmp_path / "out", format, lossy=True)
    assert not list(tmp_path.glob("out*"))


def test_nothing_to_move(toy: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="nothing in it is packed"):
        export(toy, tmp_path / "out", "gptq")
    with pytest.raises(CompressError, match="no format 'exl2'"):
        export(toy, tmp_path / "out", "exl2")


def test_target(made: Any, tmp_path: Path) -> None:
    with pytest.raises(CompressError, match="gptqmodel does not read the native format"):
        export(made("rtn bits=4 group_size=32"), tmp_path / "out", "native", target="gptqmodel")
    assert not list(tmp_path.iterdir())


def test_head_and_layers_left_dense(tmp_path: Path, make_model: Any, tokenizer: Any) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=320,
        max_position_embeddings=64,
    )  # fmt: skip
    source = make_model(config, tmp_path / "model", tokenizer, torch.float16)
    method = parse("rtn bits=4 group_size=32")
    compress.run(source, method, tmp_path / "ct", no_eval=True, lm_head=True, exclude=("*.down_proj",), device="cpu")
    export(tmp_path / "ct", tmp_path / "native", "native")
    assert "lm_head" in read(tmp_path / "native").packed
    with pytest.raises(CompressError, match="fills no packed head"):
        export(tmp_path / "ct", tmp_path / "gptq", "gptq")
