"""What the tests against real clients share: our checkpoints, their dense twins, other environments, the table."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import compress
from compress.checkpoint import Checkpoint
from compress.weights import Weights
from compress.writer import write_json

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = Path(os.environ.get("COMPRESS_CLIENTS", HERE.parent.parent / ".clients")).resolve()


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Callable[..., Path]:
    """compressed(source, method, **options): an output folder of ours, calibrated on 8 rows of 64 tokens."""

    def run(source: Path, method: Any, **options: Any) -> Path:
        out = tmp_path_factory.mktemp("out") / "packed"
        compress.run(source, method, out, calib=str(text_file), samples=8, seq_len=64, no_eval=True, **options)
        return out

    return run


@pytest.fixture(scope="session")
def dense_twin() -> Callable[..., Path]:
    """dense_twin(packed, dtype): a plain checkpoint that holds our own dequantised weights, beside the packed one.

    conv1d: packed layers keep their weights as [in, out]. bias_dtype, scale_dtype: to which a reader rounds theirs.
    """

    def write(
        packed: Path,
        dtype: torch.dtype,
        conv1d: bool = False,
        bias_dtype: torch.dtype | None = None,
        scale_dtype: torch.dtype | None = None,
    ) -> Path:
        weights = Weights(Checkpoint.open(packed))
        out = packed.with_name(f"dense-{str(dtype).removeprefix('torch.')}")
        out.mkdir()
        tensors = {}
        for name in weights.shapes():
            value = weights.read(name)
            layer = name.removesuffix(".weight")
            if scale_dtype is not None and layer in weights.packed:
                grid = weights.read_packed(layer)
                value = replace(grid, scales=grid.scales.to(scale_dtype)).dequantize()
            if conv1d and layer in weights.packed:
                value = value.t()
            if bias_dtype is not None and name.removesuffix(".bias") in weights.packed:
                value = value.to(bias_dtype)
            tensors[name] = value.to(dtype).contiguous()
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        config = {k: v for k, v in weights.checkpoint.config.items() if k != "quantization_config"}
        write_json(out / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
        for file in packed.glob("tokenizer*"):
            shutil.copyfile(file, out / file.name)
        return out

    return write


@pytest.fixture(scope="session")
def client() -> Callable[[str], Callable[..., None]]:
    """client(environment)(script, *arguments): run a script of this folder in a client's own environment."""

    def find(environment: str) -> Callable[..., None]:
        folder = ENVIRONMENTS / environment
        if not (folder / "complete").exists():
            pytest.skip(f"no environment {environment}: run `make clients`")

        def run(script: str, *arguments: object, **variables: str) -> None:
            command = [str(folder / "bin" / "python"), str(HERE / script), *map(str, arguments)]
            where = arguments[0]  # gptqmodel writes its logs into the folder that it is called from
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | variables, cwd=str(where), check=False
            )
            if done.returncode:
                pytest.fail(f"{environment}: {done.stderr[-3000:]}", pytrace=False)

        return run

    return find


@pytest.fixture
def answer(record_property: Callable[[str, object], None]) -> Callable[..., tuple[float, float]]:
    """answer(client, checkpoint, ours, theirs): max |difference| and the share of equal best tokens, for the table
    (there with the text that the client went on with)."""

    def note(client: str, checkpoint: str, ours: Tensor, theirs: Tensor, text: str = "") -> tuple[float, float]:
        far = float((ours.float() - theirs.float()).abs().max())
        same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        words = f" {' '.join(text.split())} |" if text else ""
        record_property("answer", f"| {client} | {checkpoint} | {far:.2g} | {same:.1%} |{words}")
        return far, same

    return note


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[[str, str, str, str], None]:
    """refused(client, checkpoint, error, expected): the error's line with what is expected, for the table."""

    def note(client: str, checkpoint: str, error: str, expected: str) -> None:
        assert expected in error, f"another answer than {expected!r}: {error or 'it loads'}"
        line = next(x for x in error.splitlines() if expected in x).strip()
        record_property("answer", f"| {client} | {checkpoint} | {line[:200]} | |")

    return note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table, when these tests were asked for by name or by mark."""
    if not any("clients" in str(argument) for argument in config.invocation_params.args):
        return
    rows = [v for r in terminalreporter.getreports("passed") for k, v in r.user_properties if k == "answer"]
    if rows:
        terminalreporter.section("what the clients answered")
        terminalreporter.write_line("| client | checkpoint | max abs. difference | top-1 |\n|---|---|---|---|")
        for row in rows:
            terminalreporter.write_line(row)
