"""How fast is the bit packer? Pack and unpack at every width, beside a plain copy of the same codes in the same run.

    python reports/packing/bench.py [--write]

One layer of 4096 x 11008 codes (a 7B Llama's mlp), a byte each in memory; GB/s count those bytes for packing, unpacking
and copying alike. Runs alternate and the median counts, so a busy moment of the machine strikes all three. Then the
formats' whole `pack` of such a layer (they transpose as well), and layer after layer for a billion codes and more.
--write puts the tables into reports/packing/README.md.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from compress import bits as bitpack
from compress.formats.compressed_tensors import CompressedTensors
from compress.formats.gptq import GPTQFormat
from compress.packed.uniform import UniformGrid

HERE = Path(__file__).resolve().parent
SHAPE = (4096, 11008)
COUNT = SHAPE[0] * SHAPE[1]
WIDTHS = (2, 3, 4, 5, 8)
MODEL = 6_500_000_000  # codes of a 7B model's decoder blocks
GOAL = 20.0
RUNS = 7


def medians(calls: dict[str, Callable[[], Any]], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of each call; they take turns, after one run each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(runs + 1):
        for name, call in calls.items():
            begun = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(s) for name, s in seconds.items()}


def codes_of(width: int) -> torch.Tensor:
    return torch.randint(2**width, SHAPE, dtype=torch.uint8, generator=torch.Generator().manual_seed(width))


def widths(threads: int) -> list[str]:
    """A row of the table for each width."""
    torch.set_num_threads(threads)
    rows = []
    for width in WIDTHS:
        codes = codes_of(width)
        target = torch.empty_like(codes)
        packed = bitpack.pack(codes, width)
        assert torch.equal(bitpack.unpack(packed, width, SHAPE[1]), codes)
        found = medians(
            {
                "copy": lambda target=target, codes=codes: target.copy_(codes),
                "pack": lambda codes=codes, width=width: bitpack.pack(codes, width),
                "unpack": lambda packed=packed, width=width: bitpack.unpack(packed, width, SHAPE[1]),
            }
        )
        speed = {name: COUNT / s / 1e9 for name, s in found.items()}
        model = [MODEL / COUNT * found[name] for name in ("pack", "unpack")]
        cells = [f"{speed[n]:.2f}" for n in ("copy", "pack", "unpack")] + [f"{s:.1f}" for s in model]
        rows.append(f"| {threads} | {width} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def formats(threads: int) -> list[str]:
    """A row of the table for each format: the whole `pack` and `unpack` of a 4-bit layer in groups of 128."""
    torch.set_num_threads(threads)
    codes = codes_of(4)
    scales = torch.rand(SHAPE[0], SHAPE[1] // 128, generator=torch.Generator().manual_seed(0)).half()
    layer = UniformGrid(codes, scales, None, 4, 128)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "format": "pack-quantized", "weights": weights}
    told = {"quantization_status": "compressed", "format": "pack-quantized", "config_groups": {"group_0": group}}
    rows = []
    cases: list[tuple[str, Any, dict[str, Any]]] = [
        ("compressed-tensors", CompressedTensors(), told),
        ("gptq", GPTQFormat(1), {"bits": 4, "group_size": 128, "sym": True}),
    ]
    for name, format, config in cases:
        stored = format.pack(layer)
        back = format.unpack("layer", stored, config)
        assert torch.equal(back.codes, codes)
        found = medians(
            {
                "pack": lambda format=format: format.pack(layer),
                "unpack": lambda format=format, stored=stored, config=config: format.unpack("layer", stored, config),
            },
            runs=5,
        )
        cells = [f"{found[n]:.3f}" for n in ("pack", "unpack")]
        cells += [f"{MODEL / COUNT * found[n]:.1f}" for n in ("pack", "unpack")]
        rows.append(f"| {threads} | {name} | " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


def long_run(threads: int, least: int = 1_000_000_000) -> str:
    """Layer after layer at 4 bits, none twice in a row, for `least` codes and more: a sentence."""
    torch.set_num_threads(threads)
    layers = [codes_of(4), codes_of(4).flip(1).contiguous()]
    count = -(-least // COUNT)
    begun = time.perf_counter()
    for i in range(count):
        bitpack.pack(layers[i % 2], 4)
    seconds = time.perf_counter() - begun
    total = seconds * MODEL / (count * COUNT)
    verdict = "met" if total < GOAL else "MISSED"
    line = (
        f"{threads} threads: {count} layers ({count * COUNT / 1e9:.2f}e9 codes) packed at 4 bits in {seconds:.2f} s, "
        f"which is {total:.1f} s for {MODEL / 1e9:.1f}e9 (goal: under {GOAL:.0f} s on 2 cores, {verdict})."
    )
    print(line, flush=True)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into README.md beside this file")
    given = parser.parse_args()
    by_width = [row for threads in (1, 2) for row in widths(threads)]
    by_format = [row for threads in (1, 2) for row in formats(threads)]
    real = [long_run(threads) for threads in (1, 2)]
    text = f"""# The bit packer beside a plain copy

`python reports/packing/bench.py --write`: one layer of {SHAPE[0]} x {SHAPE[1]} codes, median of {RUNS} runs that take
turns, in GB of codes (a byte each in memory) a second; "7B" is {MODEL / 1e9:.1f}e9 codes, {MODEL / COUNT:.0f} such
layers, extrapolated from the median.
Machine: {cores()} CPU cores ({platform.machine()}), shared with other work while this ran.
torch {torch.__version__}, Python {platform.python_version()}. Date of run: {date.today().isoformat()}.

| threads | bits | copy, GB/s | pack, GB/s | unpack, GB/s | pack 7B, s | unpack 7B, s |
|---|---|---|---|---|---|---|
{chr(10).join(by_width)}

The formats' whole `pack` and `unpack` of such a layer at 4 bits in groups of 128, transposes included:

| threads | format | pack, s | unpack, s | pack 7B, s | unpack 7B, s |
|---|---|---|---|---|---|
{chr(10).join(by_format)}

A real run of more than a billion codes:

{chr(10).join("- " + line for line in real)}

The packer works on one thread whatever torch is given: its pieces are kept in the cache and too small to be shared out.
What differs between the rows of 1 and 2 threads is the copy, and what else the machine was doing.
"""
    if given.write:
        (HERE / "README.md").write_text(text)


def cores() -> int:
    import os

    return len(os.sched_getaffinity(0))


if __name__ == "__main__":
    main()
