"""`compress verify`, `inspect` and the client check: every fault that can be made in a folder is found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import asking as client
from compress import cli
from compress.errors import CompressError
from compress.examine import examine
from compress.inventory import describe, inventory
from compress.recipe import make_recipe
from compress.types import Storage

#: in one worker, else each would write the checkpoints
pytestmark = [pytest.mark.usefixtures("asking"), pytest.mark.xdist_group("examine")]


@pytest.fixture(scope="module")
def written(asking: None, tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    out = tmp_path_factory.mktemp("written") / "ct"
    compress.run(toy, compress.RTN(group_size=32), out, no_eval=True, device="cpu")
    return out


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    out = tmp_path_factory.mktemp("written") / "gptq"
    compress.run(toy, compress.RTN(group_size=32), out, no_eval=True, device="cpu", format="gptq", no_verify=True)
    return out


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


def edit(folder: Path, change: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def test_sound(folder: Path, toy: Path) -> None:
    lines = examine(folder, toy)
    assert [line.partition(":")[0] for line in lines] == [
        "files", "layers", "model", "weights", "other tensors", "client",
    ]  # fmt: skip
    assert "28 dequantise to the last bit" in lines[1]
    assert "KL from our reading 0.0e+00, top-1 100%" in lines[-1]


def test_the_proof_is_in_the_record(written: Path) -> None:
    proof = json.loads((written / "compress.json").read_text())["verified"]
    assert proof["layers"] == 28
    assert proof["files"] == 1
    assert "loads it, no key missing or unknown" in proof["clients"][0]


def test_not_verified(toy: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    argv = ["rtn", toy, "--group-size", 32, "-o", tmp_path / "out", "--no-eval", "--no-verify", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["compress", *map(str, argv)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    assert "not verified (--no-verify)" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "compress.json").read_text())["verified"] is None


@pytest.mark.parametrize("at", [9, 0.2, 0.5, -1])
def test_a_flipped_bit(folder: Path, at: float) -> None:
    file = folder / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[int(at if isinstance(at, int) else at * len(raw))] ^= 4
    file.write_bytes(raw)
    with pytest.raises(CompressError, match=r"not the one that was written \(sha256\)"):
        examine(folder)
    (folder / "compress.json").unlink()
    if isinstance(at, float):  # nothing else can know: the values are as good as others
        assert "no list of sha256" in examine(folder, client=False)[0]


def test_records_know_without_the_list(folder: Path) -> None:
    """A file and its sha256 replaced together still has to dequantise to what was recorded."""
    stored = load_file(folder / "model.safetensors")
    name = next(n for n in stored if n.endswith("weight_packed"))
    stored[name][0, 0] ^= 1
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "compress.json").read_text())
    from compress.hashes import hash_files

    record["sha256"] |= hash_files([folder / "model.safetensors"])
    (folder / "compress.json").write_text(json.dumps(record))
    with pytest.raises(CompressError, match="does not dequantise to what the solver returned"):
        examine(folder, client=False)


def test_a_swapped_shard(folder: Path, toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    compress.run(toy, compress.RTN(group_size=64), other, no_eval=True, device="cpu", no_verify=True)
    shutil.copyfile(other / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(CompressError, match="sha256"):
        examine(folder)
    (folder / "compress.json").unlink()
    with pytest.raises(CompressError, match="scales are"):
        examine(folder)


@pytest.mark.parametrize("status", ["frozen", "calibration", None])
def test_a_status_other_than_compressed(folder: Path, status: str | None) -> None:
    (folder / "compress.json").unlink()
    edit(folder, lambda c: c.update(quantization_status=status))
    with pytest.raises(CompressError, match="'compressed'"):
        examine(folder)


@pytest.mark.parametrize(("label", "zeros"), [("gptq", 0x88888888), ("gptq_v2", 0x77777777)])
def test_zeros_of_the_other_version(gptq: Path, tmp_path: Path, label: str, zeros: int) -> None:
    folder = Path(shutil.copytree(gptq, tmp_path / "copy"))
    (folder / "compress.json").unlink()
    stored = load_file(folder / "model.safetensors")
    word = zeros - 2**32 if zeros >= 2**31 else zeros
    for name in stored:
        if name.endswith("qzeros"):
            stored[name].fill_(word)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder, lambda c: c.update(checkpoint_format=label, format=label))
    with pytest.raises(CompressError, match="but the file is labelled"):
        examine(folder)


def test_beside_another_original(folder: Path, toy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(toy, tmp_path / "other"))
    stored = load_file(other / "model.safetensors")
    stored["model.norm.weight"][0] += 1
    save_file(stored, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(CompressError, match=r"model\.norm\.weight: is not the original's"):
        examine(folder, other, client=False)


def test_transformed_tensors_are_known(toy: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = make_recipe({"steps": ["smoothquant"]}, "m", "m")
    given = {"calib": str(text_file), "samples": 8, "seq_len": 64, "no_eval": True, "device": "cpu"}
    compress.run(toy, recipe, tmp_path / "out", **given)
    lines = examine(tmp_path / "out", toy)
    assert "8 were changed by a transform" in lines[4]


# --- the client


class Wrong:
    """transformers' from_pretrained, with a fault put in."""

    def __init__(self, monkeypatch: Any, fault: str) -> None:
        from transformers import AutoModelForCausalLM

        self.real, self.fault = AutoModelForCausalLM.from_pretrained, fault
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fault == "error":
            raise ZeroDivisionError("integer modulo by zero")
        model, info = self.real(*args, **kwargs)
        if self.fault == "random":
            torch.nn.init.normal_(model.get_input_embeddings().weight)
        else:
            info[self.fault] = {"model.layers.0.self_attn.q_proj.weight"}
        return model, info


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("error", "transformers does not load it.*integer modulo by zero"),
        ("missing_keys", "missing_keys model.layers.0.self_attn.q_proj.weight"),
        ("unexpected_keys", "unexpected_keys"),
        ("random", "computes something else than the files hold: KL"),
    ],
)
def test_a_client_that_fails(toy: Path, tmp_path: Path, monkeypatch: Any, fault: str, words: str) -> None:
    Wrong(monkeypatch, fault)
    with pytest.raises(CompressError, match=words):
        compress.run(toy, compress.RTN(group_size=32), tmp_path / "out", no_eval=True, device="cpu")
    assert not (tmp_path / "out").exists()
    compress.run(toy, compress.RTN(group_size=32), tmp_path / "out", no_eval=True, device="cpu", no_verify=True)


@pytest.mark.parametrize("format", ["compressed-tensors", "bitsandbytes"])
def test_inputs_in_8_bits(toy: Path, tmp_path: Path, monkeypatch: Any, format: str) -> None:
    """Clients round inputs in their own ways: as far from ours as rounding is, and no further."""
    recipe = make_recipe({"steps": ["absmax activations=token"]}, "m", "m")
    given: dict[str, Any] = {"no_eval": True, "device": "cpu", "format": format}
    result = compress.run(toy, recipe, tmp_path / "out", **given)
    assert result.proof is not None
    assert "loads it" in result.proof.clients[0]
    Wrong(monkeypatch, "random")
    with pytest.raises(CompressError, match="computes something else"):
        compress.run(toy, recipe, tmp_path / "wrong", **given)


def test_a_client_that_is_not_there(written: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(client._PACKAGES, "compressed-tensors", ("no_such_package_here",))
    answer = client.ask(written, None, torch.device("cpu"))
    assert answer.line().endswith("was not asked: it needs no_such_package_here, not installed here")


def test_a_model_that_does_not_fit(written: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(client, "_FULL", 0.0)
    assert "are free" in client.ask(written, None, torch.device("cpu")).line()


# --- contents


def test_inventory(written: Path, toy: Path) -> None:
    found = inventory(written)
    assert found.format == "compressed-tensors"
    assert len(found.layers) == 28
    assert found.layers[0].name.startswith("model.layers.0.")
    size = sum(f.stat().st_size for f in written.glob("*.safetensors"))
    assert found.bytes <= size < found.bytes + 20_000  # the header
    assert found.parameters == inventory(toy).parameters
    plain = found.as_json()
    assert plain["packed_bits_per_weight"] == pytest.approx(4.5, abs=0.1)
    assert plain["layers"][0]["stored"] == "uniform 4 bits, groups of 32, symmetric"
    assert inventory(toy).as_json()["packed_bits_per_weight"] is None


def test_blocks_in_their_order(tmp_path: Path, written: Path) -> None:
    from compress.inventory import _natural

    names = ["model.layers.10.a", "model.layers.9.b", "lm_head", "model.layers.9.a"]
    assert sorted(names, key=_natural) == ["lm_head", "model.layers.9.a", "model.layers.9.b", "model.layers.10.a"]


def test_words() -> None:
    dense = Storage("dense", 16)
    grid = Storage("uniform", 4, 64, symmetric=False)
    assert describe(grid) == "uniform 4 bits, groups of 64, asymmetric"
    assert describe(Storage("uniform", 8, activations="token")) == (
        "uniform 8 bits, whole rows, symmetric, inputs in 8 bits a token"
    )
    assert (
        describe(Storage("sparse", 16, details=(("m", 4), ("n", 2)), inner=dense)) == "sparse 2:4 of values as they are"
    )
    assert describe(Storage("outliers", 4, 64, inner=grid)) == "outliers of uniform 4 bits, groups of 64, asymmetric"


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_commands(written: Path, monkeypatch: Any, capsys: Any, extra: list[str], tmp_path: Path) -> None:
    for args in (["inspect", written], ["verify", written, "--device", "cpu"],
                 ["export", written, "--format", "dense", "-o", tmp_path / "d", "--device", "cpu"]):  # fmt: skip
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, args), *extra])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert not stop.value.code, out
        if extra:
            json.loads(out)


def test_square_matrices_that_the_original_keeps_transposed(tmp_path: Path, tokenizer: Any, make_model: Any) -> None:
    """GPT-2's c_proj of attention: its shape does not tell."""
    from transformers import GPT2Config

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    source = make_model(GPT2Config(vocab_size=len(tokenizer), **sizes), tmp_path / "gpt2", tokenizer)
    told = {"device": "cpu", "no_eval": True, "no_client": True, "format": "gptq"}
    compress.run(source, compress.RTN(8, 32), tmp_path / "out", **told)
    (line,) = [x for x in examine(tmp_path / "out", source, client=False) if x.startswith("weights:")]
    assert float(line.split("at most ")[1].split("%")[0]) < 1
