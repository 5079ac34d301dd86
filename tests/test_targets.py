"""--target: what a client cannot load is refused before any work, with the nearest setting that would do."""

from __future__ import annotations

from pathlib import Path

import pytest

import compress
from compress.clients import CLIENTS, why_not
from compress.errors import CompressError
from compress.recipe import make_recipe, parse
from compress.types import Storage, Transform


def storage(line: str) -> Storage:
    method = parse(line)
    assert not isinstance(method, Transform)
    return method.settle([512]).storage


@pytest.mark.parametrize(
    ("client", "format", "line", "remedy"),
    [
        ("vllm", "compressed-tensors", "gptq bits=3", "use --bits 4"),
        ("vllm", "compressed-tensors", "gptq bits=7", "use --bits 8"),
        ("vllm", "compressed-tensors", "gptq bits=4 group_size=16", "use --group-size 32"),
        ("vllm", "compressed-tensors", "gptq bits=8 symmetric=false", "use --symmetric"),
        ("vllm", "gptq", "gptq bits=4 symmetric=false", "use --symmetric"),
        ("vllm", "gptq", "gptq act_order=groups group_size=64", "use --act-order static"),
        ("vllm", "native", "nf4", "compress methods"),
        ("sglang", "compressed-tensors", "rtn bits=2", "use --bits 4"),
        ("gptqmodel", "compressed-tensors", "gptq", "use --format gptq"),
        ("vllm", "bitsandbytes", "nf4", "compress methods"),
        ("sglang", "bitsandbytes", "nf4", "compress methods"),
        ("gptqmodel", "bitsandbytes", "nf4", "use --format gptq"),
        ("transformers", "native", "spqr", "compress methods"),
    ],
)
def test_refused(client: str, format: str, line: str, remedy: str) -> None:
    reason = why_not(client, format, storage(line))
    assert reason is not None
    assert remedy in reason


@pytest.mark.parametrize(
    ("client", "format", "line"),
    [
        ("vllm", "compressed-tensors", "gptq"),
        ("vllm", "compressed-tensors", "gptq symmetric=false"),
        ("vllm", "compressed-tensors", "absmax activations=token"),
        ("vllm", "compressed-tensors", "absmax"),
        ("vllm", "gptq", "gptq bits=8 group_size=-1"),
        ("sglang", "gptq", "gptq act_order=groups group_size=64"),
        ("gptqmodel", "gptq", "gptq bits=3"),
        ("transformers", "compressed-tensors", "gptq bits=5"),
        ("transformers", "bitsandbytes", "nf4"),
        ("transformers", "bitsandbytes", "absmax activations=token"),
    ],
)
def test_taken(client: str, format: str, line: str) -> None:
    assert why_not(client, format, storage(line)) is None


def test_before_any_work(toy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CompressError, match=r"4 and 8 bits, not 3; use --bits 4") as caught:
        compress.run(toy, compress.RTN(bits=3), out, target="vllm", no_eval=True)
    assert caught.value.where.startswith("--target vllm, layer model.layers.0")
    assert not list(tmp_path.iterdir())
    with pytest.raises(CompressError, match="no client 'ollama'"):
        compress.run(toy, compress.RTN(), out, target="ollama", no_eval=True)
    compress.run(toy, compress.RTN(group_size=32), out, target="vllm", no_eval=True)
    assert out.exists()


@pytest.mark.parametrize("client", CLIENTS)
def test_parts_of_a_fused_layer(client: str, toy: Path, tmp_path: Path) -> None:
    steps = ["rtn bits=8 group_size=32", "rtn bits=4 group_size=32"]
    mixed = make_recipe({"steps": [{"rtn": {"bits": 8, "layers": "*.v_proj"}}, steps[1]]}, "m", "m")
    apart = make_recipe({"steps": [{"rtn": {"bits": 8, "layers": "*.down_proj"}}, steps[1]]}, "m", "m")
    if client in ("vllm", "sglang"):
        with pytest.raises(CompressError, match=r"q_proj, k_proj, v_proj as one layer, but \w+ and \w+ are stored"):
            compress.run(toy, mixed, tmp_path / "a", target=client, no_eval=True)
        compress.run(toy, apart, tmp_path / "b", target=client, no_eval=True)
    elif client in ("transformers", "llama.cpp"):
        compress.run(toy, mixed, tmp_path / "a", target=client, no_eval=True)
    else:
        with pytest.raises(CompressError, match="the GPTQ format holds one setting for all layers"):
            compress.run(toy, mixed, tmp_path / "a", target=client, no_eval=True)
