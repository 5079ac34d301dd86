"""Every bad input: exit code 2, one line that says what, where and what to do, nothing under the output's name."""

from __future__ import annotations

import builtins
import errno
import json
import os
import shlex
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress import checkpoint, cli, pipeline

LAYER = "model.layers.1.mlp.up_proj.weight"
EMBED = "model.embed_tokens.weight"


class Bench:
    """A copy of the toy model to damage, and the command line to run on it."""

    def __init__(self, root: Path, toy: Path, text: Path, monkeypatch: Any, capsys: Any) -> None:
        self.root, self.text, self.monkeypatch, self.capsys = root, text, monkeypatch, capsys
        self.model, self.out = root / "model", root / "work" / "out"
        shutil.copytree(toy, self.model)

    @property
    def shard(self) -> Path:
        return self.model / "model.safetensors"

    def call(self, *args: Any) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["compress", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        seen = self.capsys.readouterr()
        return int(stop.value.code or 0), seen.out, seen.err

    def rtn(self, *args: Any) -> tuple[int, str, str]:
        return self.call("rtn", self.model, "-o", self.out, "--no-eval", "--device", "cpu", *args)

    def gptq(self, *args: Any) -> tuple[int, str, str]:
        given = ["--calib", self.text, "--samples", 32, "--seq-len", 64, "--no-eval", "--device", "cpu"]
        return self.call("gptq", self.model, "-o", self.out, *given, *args)

    def refused(self, result: tuple[int, str, str], *parts: str) -> str:
        """Assert the form of a refusal; return its line."""
        code, out, err = result
        assert code == 2, (out, err)
        assert not out
        assert err.startswith("error: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1, err
        assert "; " in err, f"no remedy: {err}"
        assert "Traceback" not in err
        for part in parts:
            assert part in err, (part, err)
        assert not os.path.lexists(self.out)
        left = {p.name for p in self.out.parent.iterdir()} if self.out.parent.exists() else set()
        assert left <= {"out.partial", "out.unpickled"}, left
        return err

    def config(self, **changes: Any) -> None:
        config = json.loads((self.model / "config.json").read_text())
        for key, value in changes.items():
            config.pop(key, None) if value is ... else config.update({key: value})
        (self.model / "config.json").write_text(json.dumps(config))

    def tensors(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        found = load_file(self.shard)
        change(found)
        save_file(found, self.shard, metadata={"format": "pt"})

    def header(self, change: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrite the shard's header; the data stay."""
        raw = self.shard.read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        self.shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])

    def shards(self) -> dict[str, str]:
        """Split the checkpoint in two; return a weight_map, not yet written."""
        found = load_file(self.shard)
        self.shard.unlink()
        names = sorted(found)
        weight_map = {}
        for i, part in enumerate((names[:20], names[20:])):
            file = f"model-{i + 1:05d}-of-00002.safetensors"
            save_file({n: found[n] for n in part}, self.model / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        return weight_map

    def index(self, weight_map: Any) -> None:
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def pickle(self, value: Any) -> None:
        self.shard.unlink(missing_ok=True)
        torch.save(value, self.model / "pytorch_model.bin")


@pytest.fixture
def bench(tmp_path: Path, toy: Path, text_file: Path, monkeypatch: Any, capsys: Any) -> Bench:
    monkeypatch.chdir(tmp_path)
    return Bench(tmp_path, toy, text_file, monkeypatch, capsys)


# --- the folder


@pytest.mark.parametrize("name", ["./nope", "/nope/model", "a/b/c", "~no-such-user/x"])
def test_missing_folder(bench: Bench, name: str) -> None:
    bench.refused(bench.call("rtn", name, "-o", bench.out, "--no-eval"), name, "no such folder", "hub id")


def test_unknown_hub_id(bench: Bench) -> None:
    bench.refused(bench.call("rtn", "org/nope", "-o", bench.out, "--no-eval"), "org/nope", "no such folder", "hub")


def test_a_file_instead_of_a_folder(bench: Bench) -> None:
    bench.refused(bench.call("rtn", bench.shard, "-o", bench.out, "--no-eval"), "is a file")


def test_no_weights(bench: Bench) -> None:
    bench.shard.unlink()
    bench.refused(bench.rtn(), str(bench.model), "no .safetensors file")


# --- config.json

CONFIG_TEXT = {
    "broken": ('{"a":', "not readable JSON"),
    "list": ("[1]", "holds a list"),
    "null": ("null", "holds null"),
    "nothing": ("", "not readable JSON"),
    "no model_type": ("{}", "model_type"),
    "unknown model_type": ('{"model_type": "nonesuch"}', "nonesuch"),
    "not UTF-8": ("\xff", "not readable JSON"),
    "nested too deep": ("[" * 100_000, "recursion"),
    "number of 5000 digits": ('{"vocab_size": ' + "1" * 5000 + "}", "digits"),
    "bert": ('{"model_type": "bert", "num_hidden_layers": 4}', "not a causal language model"),
    "t5": ('{"model_type": "t5"}', "not a causal language model"),
    "vit": ('{"model_type": "vit", "num_hidden_layers": 4}', "not a causal language model"),
}


@pytest.mark.parametrize("case", CONFIG_TEXT)
def test_config_text(bench: Bench, case: str) -> None:
    text, says = CONFIG_TEXT[case]
    (bench.model / "config.json").write_text(text, encoding="latin1")
    bench.refused(bench.gptq(), "config.json", says)


def test_config_absent(bench: Bench) -> None:
    (bench.model / "config.json").unlink()
    bench.refused(bench.gptq(), "config.json", "no such file")


CONFIG = [
    ({"vocab_size": 10**12}, EMBED, "[320, 64]", "1000000000000"),
    ({"vocab_size": 10**18}, "config.json", "overflow"),
    ({"vocab_size": 10**30}, "config.json", "verflow"),
    ({"vocab_size": -1}, "config.json", "negative dimension -1"),
    ({"vocab_size": 0}, EMBED, "[0, 64]"),
    ({"vocab_size": "320"}, "config.json", "'vocab_size' expected int"),
    ({"hidden_size": 10**9}, EMBED, "[320, 64]", "1000000000"),
    ({"hidden_size": -4}, "config.json", "negative dimension -4"),
    ({"hidden_size": "64"}, "config.json", "'hidden_size' expected int"),
    ({"hidden_size": [64]}, "config.json", "'hidden_size' expected int"),
    ({"hidden_size": 63}, "config.json", "63", "multiple"),
    ({"intermediate_size": 10**15}, "mlp.", "1000000000000000"),
    ({"num_attention_heads": 0}, "config.json", "ZeroDivisionError"),
    ({"num_attention_heads": 3}, "config.json", "heads (3)"),
    ({"num_key_value_heads": 0}, "config.json", "ZeroDivisionError"),
    ({"num_key_value_heads": 3}, "self_attn.k_proj.weight", "[32, 64]", "[48, 64]"),
    ({"num_hidden_layers": 10**7}, "num_hidden_layers is 10000000"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    ({"num_hidden_layers": 9000}, "num_hidden_layers is 9000", "4 blocks"),
    ({"num_hidden_layers": 5}, "num_hidden_layers is 5", "4 blocks"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_hidden_layers": ...}, "num_hidden_layers is 32"),  # the config class's own default
    ({"model_type": "qwen2", "num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),  # it would list them
    ({"model_type": "gpt_neo", "attention_types": [[["global", "local"], 10**9]]}, "attention_types is 1000000000"),
    ({"model_type": "mixtral", "num_local_experts": 10**9}, "num_local_experts is 1000000000"),
    ({"hidden_act": "nope"}, "config.json", "nope"),
    ({"pad_token_id": 10**9}, "config.json", "adding_idx"),
    ({"dtype": "float99"}, "config.json", "float99"),
    ({"text_config": 5}, "config.json", "to_dict"),
    ({"tie_word_embeddings": False}, "lm_head.weight", "1 of 39 parameters"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "not a causal language model", "SequenceClassification"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "already quantised", "gptq"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already quantised", "compressed-tensors"),
    ({"quantization_config": {"quant_method": "nope"}}, "already quantised", "nope"),
    ({"quantization_config": {"bits": 4}}, "already quantised"),
    ({"quantization_config": []}, "already quantised", "list"),
    ({"quantization_config": "x"}, "already quantised", "str"),
]


@pytest.mark.parametrize("case", CONFIG, ids=lambda case: json.dumps(case[0], default=str)[:60])
def test_config_value(bench: Bench, case: tuple[Any, ...]) -> None:
    bench.config(**case[0])
    bench.refused(bench.rtn(), *case[1:])


def test_model_code_needs_consent(bench: Bench) -> None:
    """auto_map with an unknown type: nothing is asked on stdin, nothing is run."""
    bench.config(model_type="mystery", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (bench.model / "code.py").write_text(f"open({str(bench.root / 'ran')!r}, 'w')\nclass C: pass\n")

    def asked(*args: Any) -> str:
        raise AssertionError("it asked")

    bench.monkeypatch.setattr(builtins, "input", asked)
    bench.refused(bench.gptq(), "custom code", "--trust-remote-code")
    assert not (bench.root / "ran").exists()
    assert not any(p.name == "ran" for p in bench.root.iterdir())


def test_broken_model_code(bench: Bench) -> None:
    """Code that was allowed to run and fails is the user's to mend as well."""
    bench.config(model_type="mystery", auto_map={"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"})
    (bench.model / "code.py").write_text("raise LookupError('who am I')\n")
    bench.refused(bench.rtn("--trust-remote-code"), "config.json", "who am I")


def test_already_quantised_by_us(bench: Bench) -> None:
    assert bench.rtn()[0] == 0
    again = bench.root / "again"
    code, _, err = bench.call("rtn", bench.out, "-o", again, "--no-eval", "--device", "cpu")
    assert code == 2
    assert "already quantised" in err
    assert not again.exists()


# --- one safetensors file


def entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda header: header[LAYER].update(changes)


def shift(header: dict[str, Any]) -> None:
    header[LAYER]["data_offsets"] = [at - 2 for at in header[LAYER]["data_offsets"]]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "dtype lies": (entry(dtype="F32"), "invalid shape, data type, or offset"),
    "unknown dtype": (entry(dtype="F13"), "F13"),
    "unsupported dtype": (entry(dtype="C64", shape=[32, 64]), "C64, which is not supported"),
    "shape overflow": (entry(shape=[2**62, 2**62]), "overflow"),
    "negative shape": (entry(shape=[-1, 64]), "-1"),
    "overlapping offsets": (shift, "invalid offset"),
    "dtype missing": (lambda header: header[LAYER].pop("dtype"), "dtype"),
    "tensor missing": (lambda header: header.pop(LAYER), "not a safetensors file"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_header(bench: Bench, case: str) -> None:
    change, says = HEADERS[case]
    bench.header(change)
    bench.refused(bench.rtn(), "model.safetensors", says)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda raw: raw[:-1000], "not fully covered"),
    "empty": (lambda raw: b"", "these 0 bytes"),
    "four bytes": (lambda raw: b"abcd", "these 4 bytes"),
    "trailing bytes": (lambda raw: raw + b"xx", "not fully covered"),
    "header length 2^62": (lambda raw: struct.pack("<Q", 2**62) + raw[8:], "header too large"),
    "header length beyond the file": (lambda raw: struct.pack("<Q", 99_000_000) + raw[8:], "invalid header length"),
    "header not JSON": (lambda raw: struct.pack("<Q", 5) + b"{nope" + raw, "invalid JSON"),
    "header a list": (lambda raw: struct.pack("<Q", 3) + b"[1]" + raw, "invalid JSON"),
    "corrupt": (lambda raw: raw[:200] + b"\xff" * 50 + raw[250:], "invalid"),
}


@pytest.mark.parametrize("case", BYTES)
def test_shard_bytes(bench: Bench, case: str) -> None:
    change, says = BYTES[case]
    bench.shard.write_bytes(change(bench.shard.read_bytes()))
    bench.refused(bench.gptq(), "model.safetensors", says, "download it again")


def test_shard_is_a_pipe(bench: Bench) -> None:
    """It would be waited on for ever."""
    bench.shard.unlink()
    os.mkfifo(bench.shard)
    bench.refused(bench.rtn(), "the shard is missing")


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda found: found.update({name: make(found[name])})


def with_value(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[3, 5] = value
        return weight

    return change


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = {
    "int32": (put(LAYER, lambda w: w.int()), (LAYER, "int32")),
    "int32 norm": (put("model.norm.weight", lambda w: w.int()), ("model.norm.weight", "int32")),
    "float8": (put(LAYER, lambda w: w.to(torch.float8_e4m3fn)), (LAYER, "float8_e4m3fn")),
    "narrower": (put(LAYER, lambda w: w[:, :32].contiguous()), (LAYER, "[128, 32]", "[128, 64]")),
    "transposed": (put(LAYER, lambda w: w.t().contiguous()), (LAYER, "[64, 128]")),
    "three dimensions": (put(LAYER, lambda w: w[None]), (LAYER, "[1, 128, 64]")),
    "missing": (lambda found: found.pop(LAYER), (LAYER, "1 of 39 parameters")),
    "embedding missing": (lambda found: found.pop(EMBED), (EMBED, "1 of 39 parameters")),
    "a block missing": (
        lambda found: [found.pop(n) for n in list(found) if ".layers.2." in n],
        ("4, the files hold 3",),
    ),
    "NaN": (put(LAYER, with_value(float("nan"))), (LAYER, "1 of its 8192 values")),
    "infinity": (put(LAYER, with_value(float("-inf"))), (LAYER, "1 of its 8192 values")),
    "NaN in the embedding": (put(EMBED, with_value(float("nan"))), (EMBED, "1 of its 20480 values")),
    "squares overflow": (put(LAYER, lambda w: (w.float() * 1e30).bfloat16()), ("up_proj", "overflows float32")),
    "under two names": (
        lambda found: found.update({LAYER.removeprefix("model."): found[LAYER].clone()}),
        ("2 tensors for one parameter",),
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensor(bench: Bench, case: str) -> None:
    change, parts = TENSORS[case]
    bench.tensors(change)
    bench.refused(bench.rtn(), *parts)


def test_nan_stops_calibration(bench: Bench) -> None:
    bench.tensors(put(LAYER, with_value(float("nan"))))
    bench.refused(bench.gptq(), LAYER, "1 of its 8192 values are NaN or infinite")


def test_activation_overflow_names_the_layer(bench: Bench) -> None:
    bench.tensors(put(LAYER, lambda w: (w.float() * 1e30).bfloat16()))
    bench.refused(bench.gptq(), "model.layers.1.mlp.down_proj", "its input holds NaN or infinity")


def test_activation_overflow_in_float16(bench: Bench) -> None:
    bench.tensors(put(LAYER, lambda w: (w.float() * 2e5).bfloat16()))  # the weights themselves fit
    line = bench.refused(bench.gptq("--dtype", "float16"), "model.layers.1", "NaN or infinity", "--dtype float32")
    assert "overflows float16" not in line


def test_weight_overflows_the_dtype(bench: Bench) -> None:
    bench.tensors(put(LAYER, lambda w: (w.float() * 1e6).bfloat16()))
    bench.refused(bench.gptq("--dtype", "float16"), LAYER, "overflows float16", "--dtype bfloat16")


# --- experts


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> Path:
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        vocab_size=320,
    )
    return make_model(config, tmp_path_factory.mktemp("moe") / "model")


def expert(found: dict[str, Any], number: int) -> str:
    return next(n for n in sorted(found) if f".experts.{number}." in n)


EXPERTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "all of one": (lambda f: [f.pop(n) for n in list(f) if ".experts.1." in n], "expert 1 of 3 has no tensor"),
    "one projection": (lambda f: f.pop(expert(f, 1)), "config.json implies [64, 64]"),
    "one too many": (
        lambda f: f.update({n.replace(".2.", ".3."): t.clone() for n, t in list(f.items()) if ".experts.2." in n}),
        "3 experts, the files hold more",
    ),
    "a shape": (lambda f: f.update({expert(f, 1): torch.ones(16, 64)}), "config.json implies [64, 64]"),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts(bench: Bench, moe: Path, case: str) -> None:
    """A hole in a fused parameter would be filled with whatever the memory held."""
    shutil.rmtree(bench.model)
    shutil.copytree(moe, bench.model)
    change, says = EXPERTS[case]
    bench.tensors(change)
    bench.refused(bench.rtn(), "experts", says)


# --- shards and their index


def test_shard_missing_from_the_index(bench: Bench) -> None:
    weight_map = bench.shards()
    bench.index({n: f for n, f in weight_map.items() if "00001" in f})
    bench.refused(bench.rtn(), "the files hold 3 blocks")


def test_shard_missing_from_the_disk(bench: Bench) -> None:
    bench.index(bench.shards())
    (bench.model / "model-00002-of-00002.safetensors").unlink()
    bench.refused(bench.rtn(), "model-00002-of-00002.safetensors", "the shard is missing")


def test_tensor_that_no_shard_holds(bench: Bench) -> None:
    bench.index(bench.shards() | {"model.extra.weight": "model-00001-of-00002.safetensors"})
    bench.refused(bench.rtn(), "index.json", "1 tensors", "model.extra.weight")


def test_tensor_in_two_shards(bench: Bench, toy: Path) -> None:
    bench.index(bench.shards())
    shutil.copy(toy / "model.safetensors", bench.model / "model-00001-of-00002.safetensors")
    bench.refused(bench.rtn(), "is in model-00001-of-00002.safetensors too")


@pytest.mark.parametrize("weight_map", [[1], {}, None, {"a": 5}, "x"], ids=str)
def test_weight_map(bench: Bench, weight_map: Any) -> None:
    bench.shards()
    bench.index(weight_map)
    bench.refused(bench.rtn(), "model.safetensors.index.json", "weight_map")


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_index_text(bench: Bench, text: str) -> None:
    bench.shards()
    (bench.model / "model.safetensors.index.json").write_text(text)
    bench.refused(bench.rtn(), "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["../outside/x.safetensors", "/ABSOLUTE", "sub/x.safetensors", "", "..", ".", "a\0b"])
def test_index_leads_out(bench: Bench, name: str) -> None:
    weight_map = bench.shards()
    outside = bench.root / "outside" / "x.safetensors"
    outside.parent.mkdir()
    shutil.copy(bench.model / "model-00002-of-00002.safetensors", outside)
    name = str(outside) if name == "/ABSOLUTE" else name
    bench.index({n: name if "00002" in f else f for n, f in weight_map.items()})
    bench.refused(bench.rtn(), "index.json", "leads out of the folder", "do not trust")


def test_index_name_too_long(bench: Bench) -> None:
    bench.index(bench.shards() | {"model.extra.weight": "x" * 5000})
    bench.refused(bench.rtn(), "the shard is missing")


def test_symlinked_shard_is_fine(bench: Bench) -> None:
    """As in the hub's cache."""
    bench.index(bench.shards())
    shard, blob = bench.model / "model-00002-of-00002.safetensors", bench.root / "blob"
    shutil.move(shard, blob)
    shard.symlink_to(blob)
    assert bench.rtn()[0] == 0
    assert bench.out.is_dir()


# --- pickles


def test_pickle_needs_consent(bench: Bench) -> None:
    bench.pickle(load_file(bench.shard))
    bench.refused(bench.rtn(), "pytorch_model.bin", "--allow-pickle")


def test_pickle_gives_the_same_layers(bench: Bench, toy: Path) -> None:
    bench.pickle(load_file(bench.shard))
    assert bench.rtn("--allow-pickle")[0] == 0
    assert {p.name for p in bench.out.parent.iterdir()} == {"out"}
    from_pickle = load_file(bench.out / "model.safetensors")
    shutil.rmtree(bench.out)
    shutil.rmtree(bench.model)
    shutil.copytree(toy, bench.model)
    assert bench.rtn()[0] == 0
    expected = load_file(bench.out / "model.safetensors")
    assert from_pickle.keys() == expected.keys()
    assert all(torch.equal(from_pickle[n], expected[n]) for n in expected)


def test_malicious_pickle_does_not_run(bench: Bench) -> None:
    ran = bench.root / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(ran),)

    bench.pickle({EMBED: Evil()})
    bench.refused(bench.rtn("--allow-pickle"), "pytorch_model.bin", "weights-only")
    bench.refused(bench.rtn("--allow-pickle", "--dry-run"), "pytorch_model.bin", "weights-only")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1], "list"),
        ({}, "dict of 0"),
        ({"a": 1}, "int 'a'"),
        ({"model": {"a": torch.ones(2)}}, "dict 'model'"),
        ({1: torch.ones(2)}, "Tensor 1"),
        ({"a": torch.eye(3).to_sparse()}, "Tensor 'a'"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "Tensor 'a'"),
    ],
    ids=["list", "empty", "int", "nested", "numbered", "sparse", "complex"],
)
def test_pickle_of_something_else(bench: Bench, value: Any, says: str) -> None:
    bench.pickle(value)
    bench.refused(bench.rtn("--allow-pickle"), "pytorch_model.bin", says)


@pytest.mark.parametrize("raw", [b"", b"junk" * 100, b"PK\x03\x04" + b"j" * 400, b"\x80\x02}q\x00."], ids=str)
def test_damaged_pickle(bench: Bench, raw: bytes) -> None:
    bench.shard.unlink()
    (bench.model / "pytorch_model.bin").write_bytes(raw)
    bench.refused(bench.rtn("--allow-pickle"), "pytorch_model.bin", "weights-only unpickler refused it")


# --- settings

SETTINGS = [
    (["--bits", "1"], "--bits", "1 is out of range", "2 to 8"),
    (["--bits", "9"], "--bits", "9 is out of range"),
    (["--bits", "x"], "--bits", "integer"),
    (["--group-size", "0"], "--group-size", "0 is out of range"),
    (["--group-size", "-2"], "--group-size", "-2 is out of range"),
    (["--group-size", "x"], "--group-size", "integer"),
    (["--group-size", "24"], "q_proj", "24 does not divide in_features 64", "8, 16, 32 or -1"),
    (["--group-size", "256"], "--group-size", "256", "in_features 128", "-1"),
    (["--act-order", "nope"], "--act-order", "nope", "static"),
    (["--act-order", "groups"], "--format gptq"),
    (["--damp-percent", "-1"], "--damp-percent", "-1"),
    (["--damp-percent", "nan"], "--damp-percent", "nan"),
    (["--block-size", "0"], "--block-size", "0 is out of range"),
    (["--descent", "-1"], "--descent", "-1"),
    (["--format", "nope"], "--format", "nope", "compressed-tensors"),
    (["--format", "gptq", "--bits", "5"], "q_proj", "not 5", "--format compressed-tensors"),
    (["--device", "nope"], "--device", "nope", "cpu"),
    (["--device", "meta"], "--device", "meta", "cpu"),
    (["--device", "cuda:99"], "--device cuda:99", "CUDA devices", "--device cpu"),
    (["--dtype", "nope"], "--dtype", "nope", "float32"),
    (["--include", "nope*"], "--include", "'nope*' matches none of 28 layers", "q_proj"),
    (["--exclude", "nope*"], "--exclude", "'nope*' matches none of 28 layers"),
    (["--exclude", "*"], "--include/--exclude", "0 of 28 layers"),
    (["--calib", "nope"], "nope", "recipes are"),
    (["--calib", "nope.txt"], "nope.txt", "no such file"),
    (["--calib", "org/nope"], "org/nope", "no hub access?"),
    (["--chat-template"], "--chat-template"),
    (["--samples", "0"], "--samples", "0 is too small"),
    (["--samples", "100000"], "100000 rows of 64 need 6400000", "--samples"),
    (["--seq-len", "0"], "--seq-len", "0 is too small"),
    (["--seq-len", "129"], "--seq-len", "129", "128 or less"),
    (["--seed", "-1"], "--seed", "-1"),
    (["--seed", str(2**70)], "--seed", str(2**70)),
    (["--nonesuch"], "--nonesuch", "--help"),
    (["surplus"], "surplus", "--help"),
    (["--bits"], "--bits", "--help"),
]


@pytest.mark.parametrize("case", SETTINGS, ids=lambda case: " ".join(case[0])[:40])
def test_setting(bench: Bench, case: tuple[Any, ...]) -> None:
    bench.refused(bench.gptq(*case[0]), *case[1:])
    assert not bench.out.with_name("out.partial").exists(), "it had begun to work"


@pytest.mark.parametrize("args", [["nope"], ["rtn"], ["--nope"], ["gptq", "--calib", "bundled"]], ids=" ".join)
def test_command(bench: Bench, args: list[str]) -> None:
    bench.refused(bench.call(*args), "compress", "--help")


def test_eval_text_too_short(bench: Bench) -> None:
    """Said before the work, not after it."""
    short = bench.root / "short.txt"
    short.write_text("the river")
    args = ["rtn", bench.model, "-o", bench.out, "--device", "cpu", "--eval", short]
    bench.refused(bench.call(*args), "--eval", "128", "--no-eval")
    assert not bench.out.with_name("out.partial").exists()


# --- tokenizer


TOKENIZER: dict[str, str | None] = {"missing": None, "empty object": "{}", "broken": "{", "other": '{"model": 5}'}


@pytest.mark.parametrize("case", TOKENIZER)
def test_tokenizer(bench: Bench, case: str) -> None:
    text = TOKENIZER[case]
    file = bench.model / "tokenizer.json"
    file.unlink() if text is None else file.write_text(text)
    bench.refused(bench.gptq(), str(bench.model), "its tokenizer cannot be loaded", "tokenizer.json")


def test_tokenizer_of_unknown_model_type(bench: Bench) -> None:
    """The tokenizers library raises a bare Exception for it."""
    file = bench.model / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["type"] = "Nonesuch"
    file.write_text(json.dumps(value))
    bench.refused(bench.gptq(), str(bench.model), "its tokenizer cannot be loaded")


@pytest.mark.parametrize("text", ["[]", "{"])
def test_tokenizer_config(bench: Bench, text: str) -> None:
    (bench.model / "tokenizer_config.json").write_text(text)
    bench.refused(bench.gptq(), str(bench.model), "its tokenizer cannot be loaded")


def test_tokenizer_that_fails_in_use(bench: Bench) -> None:
    file = bench.model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": "x"}))
    bench.refused(bench.gptq(), str(bench.model), "its tokenizer cannot be loaded")


def test_tokenizer_of_another_model(bench: Bench) -> None:
    file = bench.model / "tokenizer.json"
    value = json.loads(file.read_text())
    value["model"]["vocab"] = {k: v + 1000 if v > 5 else v for k, v in value["model"]["vocab"].items()}
    file.write_text(json.dumps(value))
    bench.refused(bench.gptq(), str(bench.model), "the embeddings hold 320 rows")


# --- the output folder


@pytest.mark.parametrize("name", [".", "..", "/", ""])
def test_output_without_a_name(bench: Bench, name: str) -> None:
    bench.refused(bench.rtn("-o", name), "-o", "not the name of a new folder")


@pytest.mark.parametrize("below", ["", "/sub", "/sub/out"])
def test_output_under_a_file(bench: Bench, below: str) -> None:
    bench.refused(bench.rtn("-o", f"{bench.text}{below}", "--overwrite"), str(bench.text))
    assert bench.text.is_file()


def test_output_name_too_long(bench: Bench) -> None:
    bench.refused(bench.rtn("-o", "x" * 300), "File name too long")


def test_output_folder_read_only(bench: Bench) -> None:
    def denied(self: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    bench.monkeypatch.setattr(Path, "touch", denied)
    line = bench.refused(bench.gptq(), str(bench.root), "Permission denied", "-o")
    assert "probe" not in line


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a block is compressed or a weight read."""

    def worked(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work had begun")

    monkeypatch.setattr(pipeline, "compress_block", worked)
    monkeypatch.setattr(checkpoint, "read_tensor", worked)


def test_disk_too_small(bench: Bench, no_work: None) -> None:
    small = shutil.disk_usage("/")._replace(free=1000)
    bench.monkeypatch.setattr(shutil, "disk_usage", lambda path: small)
    bench.refused(bench.gptq(), str(bench.root), "0.00 GB free", "GB needed")
    assert not bench.out.parent.exists()


def test_output_exists(bench: Bench, no_work: None) -> None:
    bench.out.mkdir(parents=True)
    (bench.out / "config.json").write_text("{}")
    code, _, err = bench.gptq()
    assert code == 2
    assert err == f"error: {bench.out}: the output exists; pass --overwrite to replace it, or another -o\n"
    assert {p.name for p in bench.out.parent.rglob("*")} == {"out", "config.json"}


def test_output_is_not_a_model(bench: Bench, no_work: None) -> None:
    bench.out.mkdir(parents=True)
    (bench.out / "diary.txt").write_text("mine")
    code, _, err = bench.gptq("--overwrite")
    assert code == 2
    assert "not a model folder" in err
    assert (bench.out / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "model/", "model/../model", "."], ids=str)
def test_output_is_the_input(bench: Bench, no_work: None, name: str) -> None:
    before = {p: p.read_bytes() for p in bench.model.iterdir()}
    if name == ".":
        (bench.root / "config.json").write_text("{}")  # the input's parent is a model folder too
        name = str(bench.root)
    code, _, err = bench.call("rtn", bench.model, "-o", name, "--overwrite", "--no-eval", "--device", "cpu")
    assert code == 2
    assert "the input is there" in err
    assert {p: p.read_bytes() for p in bench.model.iterdir()} == before


def test_output_is_a_dangling_link(bench: Bench) -> None:
    bench.out.parent.mkdir()
    bench.out.symlink_to(bench.root / "gone")
    code, _, err = bench.rtn("--overwrite")
    assert code == 2
    assert "is a link to nothing" in err


# --- compress eval


@pytest.mark.parametrize("window", [0, 1, -5, 129])
def test_eval_window(bench: Bench, window: int) -> None:
    args = ["eval", bench.model, "--text", bench.text, "--device", "cpu", "--window", window]
    bench.refused(bench.call(*args), "--window", f"{window} tokens", "2 to 128")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["./nope"], "./nope"),
        (["model", "--against", "./nope"], "./nope"),
        (["model", "--text", "nope"], "nope"),
        (["model", "--dtype", "nope"], "--dtype"),
        (["model", "--device", "nope"], "--device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_eval(bench: Bench, args: list[str], says: str) -> None:
    bench.refused(bench.call("eval", *args), says)


def test_eval_names_the_block(bench: Bench) -> None:
    for name in (LAYER, LAYER.replace("up_proj", "down_proj")):
        bench.tensors(put(name, lambda w: (w.float() * 1e30).bfloat16()))
    args = ["eval", bench.model, "--text", bench.text, "--device", "cpu"]
    bench.refused(bench.call(*args), "model.layers.1:", "NaN or infinity")


def test_eval_of_logits_that_overflow(bench: Bench) -> None:
    bench.tensors(put("model.norm.weight", lambda w: (w.float() * 1e38).bfloat16()))
    args = ["eval", bench.model, "--text", bench.text, "--device", "cpu"]
    bench.refused(bench.call(*args), str(bench.model), "logits")


def drop(*names: str) -> Callable[[dict[str, Any]], Any]:
    return lambda config: [config["quantization_config"].pop(n) for n in names]


def told(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["quantization_config"].update(changes)


@pytest.mark.parametrize(
    ("form", "change", "says"),
    [
        ("compressed-tensors", drop("config_groups"), "config_groups"),
        ("compressed-tensors", told(config_groups={}), "no config group"),
        ("compressed-tensors", told(quantization_status="frozen"), "'frozen' cannot be read"),
        ("compressed-tensors", told(quant_method="nope"), "'nope' cannot be read"),
        ("compressed-tensors", told(quant_method="gptq", format="gptq"), "no tensor ends in .qweight"),
        ("gptq", told(bits=3), "[64, 85]"),
        ("gptq", told(bits="x"), "invalid literal"),
        ("gptq", told(bits=0), "ZeroDivisionError"),
        ("gptq", drop("bits"), "bits"),
        ("gptq", told(checkpoint_format=["a"]), "unhashable"),
        ("gptq", told(checkpoint_format="gptq_v3"), "gptq_v3"),
    ],
)
def test_eval_of_a_config_that_does_not_fit(bench: Bench, form: str, change: Any, says: str) -> None:
    assert bench.rtn("--format", form)[0] == 0
    packed = bench.root / "packed"
    shutil.move(bench.out, packed)
    config = json.loads((packed / "config.json").read_text())
    change(config)
    (packed / "config.json").write_text(json.dumps(config))
    bench.refused(bench.call("eval", packed, "--text", bench.text, "--device", "cpu"), says)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_shape"])
@pytest.mark.parametrize("how", ["gone", "short"])
def test_eval_of_packed_tensors_that_do_not_fit(bench: Bench, suffix: str, how: str) -> None:
    assert bench.rtn()[0] == 0
    packed = bench.root / "packed"
    shutil.move(bench.out, packed)
    found = load_file(packed / "model.safetensors")
    name = f"{LAYER.removesuffix('.weight')}.{suffix}"
    value = found.pop(name)
    if how == "short":
        found[name] = value[:1].clone()
    save_file(found, packed / "model.safetensors", metadata={"format": "pt"})
    bench.refused(bench.call("eval", packed, "--text", bench.text, "--device", "cpu"), "model.layers.1.mlp.up_proj")


@pytest.mark.parametrize(
    ("command", "says", "remedy"),
    [
        ("sparsegpt --pattern 3:5", "3:5", "use"),
        ("sparsegpt --pattern 2:3:4", "2:3:4", "write N:M"),
        ("sparsegpt --sparsity 0.99", "sparsity 0.99 is out of range", "use 0 to 0.95"),
        ("sparsegpt --group-size 64", "a group size without bits", "add --bits 4"),
        ("sparsegpt --format gptq", "cannot hold the kind 'sparse'", "use --format native"),
        ("sparsegpt --blocks 2-9", "outside of the model's 4 blocks", "use 0 to 3"),
        ("nf4 --format compressed-tensors", "cannot hold the kind 'blockwise'", "use --format native"),
        ("nf4 --block-size 48", "48", "use"),
        ("gptq --bits 5 --format gptq", "holds 2, 3, 4 and 8 bits, not 5", "use --format compressed-tensors"),
        ("absmax --activations token --format gptq", "weight-only", "use --format compressed-tensors"),
        ("absmax --activations tensor --format compressed-tensors", "a symmetric scale a token", "use --format native"),
        ("gptq --activations token", "not 4 bits", "use --bits 8 --group-size -1"),
        ("gptq --bits 8 --activations token --group-size 32", "in groups of 32", "use --bits 8 --group-size -1"),
        ("gptq --reference obq --act-order groups", "OBQ has an order of its own", "leave --act-order out"),
        ("gptq --bits 3 --target vllm", "kernels for 4 and 8 bits, not 3", "use --bits 4"),
        ("spqr --target transformers", "does not read the native format", "compress methods"),
        ("int8 --threshold -1", "-1", "use"),
        ("int8 --layer-share 0.5", "--layer-share", "--rule paper"),
        ("kmeans --bits 9", "bits 9 is out of range", "use 2 to 8"),
        ("spqr --average-bits 2", "2", "use"),
        ("smoothquant --alpha 1.5", "alpha 1.5 is out of range", "use 0 to 1"),
        ("smoothquant --then nothing", "no method 'nothing'", "there are gptq"),
        ("awq --then 'rtn bits=11'", "bits 11 is out of range", "use 2 to 8"),
        ("equalize --then 'rtn bit=4'", "rtn has no setting 'bit'", "it has bits"),
    ],
)
def test_what_a_method_cannot_do(bench: Bench, command: str, says: str, remedy: str) -> None:
    """Said before any work, with what would do."""
    name, *options = shlex.split(command)
    given = ["--calib", bench.text, "--samples", 4, "--seq-len", 32, "--no-eval", "--device", "cpu"]
    line = bench.refused(bench.call(name, bench.model, "-o", bench.out, *given, *options), says)
    assert remedy in line.partition("; ")[2], line
    assert not bench.out.parent.exists() or not list(bench.out.parent.iterdir())


def test_recipe_that_is_not_there(bench: Bench) -> None:
    bench.refused(bench.call("run", bench.root / "no.yaml", bench.model, "--device", "cpu"), "cannot be read")
