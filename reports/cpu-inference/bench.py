"""Tokens a second and memory of packed models on a CPU, beside dense ones: all in one run, interleaved.

    python reports/cpu-inference/bench.py [MODEL] [--threads 2] [--rounds 7]

MODEL is "bundled" (the default), a folder or a hub id. Each round takes every variant once: a prompt of 128 tokens,
then 32 tokens one by one at batch 1, greedily, with a key-value cache. Medians over the rounds are printed as a
Markdown table. "weights" are the bytes of all parameters and buffers; "resident" and "peak" are what loading the model
and running it once add to a fresh process that has imported everything (its allocator hands freed memory back at once).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import compress
from compress.api import find_model
from compress.checkpoint import Checkpoint
from compress.skeleton import skeleton
from compress.weights import Weights

PROMPT, DECODE = 128, 32
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
#: label -> (method or None for the original, dtype, kernels)
VARIANTS: dict[str, tuple[str | None, str, bool]] = {
    "dense float32": (None, "float32", False),
    "dense bfloat16": (None, "bfloat16", False),
    "4-bit g64, kernels": ("rtn bits=4 group_size=64", "bfloat16", True),
    "4-bit g64, no kernels": ("rtn bits=4 group_size=64", "bfloat16", False),
    "8-bit a row, kernels": ("rtn bits=8 group_size=-1", "bfloat16", True),
    "8-bit a row, no kernels": ("rtn bits=8 group_size=-1", "bfloat16", False),
    "W8A8, kernels": ("absmax activations=token", "bfloat16", True),
    "NF4, no kernels": ("nf4", "bfloat16", True),
}


def written(source: Path, folder: Path) -> dict[str, Path]:
    """The checkpoints, by method."""
    from compress.recipe import parse

    found = {}
    for number, line in enumerate(dict.fromkeys(m for m, _, _ in VARIANTS.values() if m is not None)):
        found[line] = folder / f"model{number}"
        compress.run(source, parse(line), found[line], no_eval=True, no_verify=True, device="cpu")
    return found


def load(folder: Path, dtype: str, kernels: bool) -> Any:
    return compress.load(folder, device="cpu", dtype=dtype, kernels=kernels)


@torch.no_grad()
def run(model: Any, tokens: torch.Tensor) -> tuple[float, float]:
    """Tokens a second: of the prompt, and one by one."""
    begun = time.perf_counter()
    out = model(tokens, use_cache=True, logits_to_keep=1)
    prompt = time.perf_counter() - begun
    begun = time.perf_counter()
    for _ in range(DECODE):
        best = out.logits[:, -1:].argmax(-1)
        out = model(best, past_key_values=out.past_key_values, use_cache=True)
    return tokens.shape[1] / prompt, DECODE / (time.perf_counter() - begun)


def weight_bytes(model: Any) -> int:
    seen = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(seen.values())


def memory(folder: Path, dtype: str, kernels: bool, tokens: torch.Tensor) -> dict[str, int]:
    """In a fresh process: what the model adds."""
    skeleton(Weights(Checkpoint.open(folder)), False)  # imports the architecture
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    model = load(folder, dtype, kernels)
    run(model, tokens)
    after = psutil.Process().memory_info().rss
    status = Path("/proc/self/status").read_text().split()
    peak = int(status[status.index("VmHWM:") + 1]) * 1024
    return {"weights": weight_bytes(model), "resident": after - before, "peak": peak - before}


def measured(folder: Path, dtype: str, kernels: bool, threads: int) -> dict[str, int]:
    command = [sys.executable, __file__, str(folder), "--threads", str(threads), "--memory", dtype, str(int(kernels))]
    environment = {**os.environ, **RETURNS_MEMORY}
    lines = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()
    found: dict[str, int] = json.loads(lines[-1])
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="bundled")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory", nargs=2, metavar=("DTYPE", "KERNELS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = find_model(args.model)
    tokens = torch.randint(0, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    if args.memory:
        print(json.dumps(memory(source, args.memory[0], args.memory[1] == "1", tokens)))
        return
    with tempfile.TemporaryDirectory() as name:
        folders = written(source, Path(name))
        places = {k: (source if m is None else folders[m], d, on) for k, (m, d, on) in VARIANTS.items()}
        bytes_ = {label: measured(*place, args.threads) for label, place in places.items()}
        models = {label: load(*place) for label, place in places.items()}
        for model in models.values():
            run(model, tokens)
        speeds: dict[str, list[tuple[float, float]]] = {label: [] for label in models}
        for _ in range(args.rounds):
            for label, model in models.items():
                speeds[label].append(run(model, tokens))
    print(f"\n`{args.model}`, {args.threads} threads, {args.rounds} rounds, {date.today()}, {cpu_name()}, ", end="")
    print(
        f"{torch.backends.cpu.get_cpu_capability()}, Python {platform.python_version()}, torch {torch.__version__}, ",
        end="",
    )
    print(f"transformers {transformers.__version__}\n")
    print("| variant | prompt, tokens/s | decode, tokens/s | weights, MB | resident, MB | peak, MB |")
    print("|---|---|---|---|---|---|")
    for label, found in speeds.items():
        prompt, decode = (statistics.median(x) for x in zip(*found, strict=True))
        sizes = " | ".join(f"{bytes_[label][k] / 1e6:.1f}" for k in ("weights", "resident", "peak"))
        print(f"| {label} | {prompt:.0f} | {decode:.1f} | {sizes} |")


if __name__ == "__main__":
    main()
