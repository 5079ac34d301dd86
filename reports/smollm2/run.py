"""SmolLM2-135M on one GPU: dense, RTN and GPTQ at 4 and 3 bits, each switch of GPTQ alone, and where the time goes.

    python reports/smollm2/run.py MODEL CALIB.txt EVAL.txt OUT [--no-ablation] [--quick]

MODEL is a bf16 folder of SmolLM2-135M-Instruct. OUT receives report.md and report.json. Perplexity, KL and agreement
are computed in float32 from the files as written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import compress
from compress.api import evaluation, load_tokenizer
from compress.checkpoint import Checkpoint
from compress.evaluate.perplexity import evaluate
from compress.weights import Weights

MAIN: list[tuple[str, Any, dict[str, Any]]] = [
    (f"{name} {bits} bits", cls(bits=bits, group_size=64, quality=quality), {})
    for bits in (4, 3)
    for name, cls, quality in (("RTN", compress.RTN, "fast"), ("GPTQ", compress.GPTQ, "balanced"))
]
PLAIN = {"scale_search": False, "refit": False, "descent": 0, "act_order": "none", "token_weights": False}
ABLATION: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("as published (no act order, no search)", PLAIN, {}),
    ("+ static act order", {**PLAIN, "act_order": "static"}, {}),
    ("+ scale search", {"refit": False, "descent": 0}, {}),
    ("+ refit", {"descent": 0}, {}),
    ("+ 1 sweep of descent (default)", {}, {}),
    ("+ 3 sweeps", {"descent": 3}, {}),
    ("default, true sequential", {}, {"true_sequential": True}),
    ("default, no act order", {"act_order": "none"}, {}),
    ("default, asymmetric", {"symmetric": False}, {}),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calib", type=Path)
    parser.add_argument("eval", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="few rows and one bit width, to try the script")
    parser.add_argument("--no-ablation", action="store_true", help="dense, RTN and GPTQ only")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = ["--samples", "4", "--seq-len", "128"] if args.quick else []
    share = time_command(args, rows)
    lines = [*heading(), "", *share, ""]
    options = {"samples": 4, "seq_len": 128} if args.quick else {}
    tokens = evaluation(load_tokenizer(args.model), str(args.eval)).tokens[: 1024 if args.quick else None]
    window = 256 if args.quick else None
    records = []
    lines += ["| model | perplexity | KL from the original, nats a token | same top token | bits a weight | seconds |"]
    lines += ["|---|---|---|---|---|---|"]
    cases = [(n, m, o) for n, m, o in MAIN]
    for bits in () if args.no_ablation else (4,) if args.quick else (4, 3):
        plain = {"bits": bits, "group_size": 64, "quality": "balanced"}
        cases += [(f"{bits} bits: {n}", compress.GPTQ(**plain, **s), o) for n, s, o in ABLATION]
    for name, method, extra in cases:
        record = one(args, name, method, {**options, **extra}, tokens, window)
        records.append(record)
        if len(lines) and not any(line.startswith("| dense") for line in lines):
            lines.append(f"| dense | {record['dense']['perplexity']:.4f} | 0 | 100% | 16 | |")
        lines.append(
            f"| {name} | {record['perplexity']:.4f} | {record['kl']:.5f} | {100 * record['top1']:.2f}% | "
            f"{record['bits_per_weight']:.3f} | {record['seconds']:.1f} |"
        )
        print(lines[-1], flush=True)
        (args.out / "report.md").write_text("\n".join(lines) + "\n")
        (args.out / "report.json").write_text(json.dumps(records, indent=2) + "\n")


def heading() -> list[str]:
    import platform

    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return [
        f"Machine: one {device}. Versions: compress {compress.__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}. "
        f"Date of run: {time.strftime('%Y-%m-%d')}."
    ]


def time_command(args: argparse.Namespace, rows: list[str]) -> list[str]:
    """Wall seconds of the whole command, imports included, start to verified checkpoint."""
    lines = []
    for note in ("first run of the process on this machine", "second run"):
        with tempfile.TemporaryDirectory() as scratch:
            command = [
                "gptq", str(args.model), "--bits", "4", "--group-size", "64", "--quality", "balanced",
                "--calib", str(args.calib), "--no-eval", "--json", "-o", f"{scratch}/out", *rows,
            ]  # fmt: skip
            begun = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", "from compress.cli import main; main()", *command],
                capture_output=True,
                text=True,
            )
            wall = time.perf_counter() - begun
        if done.returncode:
            sys.exit(done.stderr)
        report = json.loads(done.stdout)
        parts = report["seconds"]
        inside = parts.pop("total")
        lines.append(
            f"{note}: {wall:.1f} s wall; imports, plan and tokenising {wall - inside:.1f} s, then "
            + ", ".join(f"{k} {v:.1f} s" for k, v in parts.items())
            + f"; peak device memory {report['peak_device_bytes'] / 1e9:.2f} GB, "
            f"peak host memory {report['peak_host_bytes'] / 1e9:.2f} GB."
        )
        print(lines[-1], flush=True)
    return lines


def one(
    args: argparse.Namespace, name: str, method: Any, options: dict[str, Any], tokens: torch.Tensor, window: int | None
) -> dict[str, Any]:
    """Compress, then score the written file against the original in float32."""
    out = args.out / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    begun = time.perf_counter()
    result = compress.run(args.model, method, out, calib=str(args.calib), no_eval=True, **options)
    seconds = time.perf_counter() - begun
    device = result.job.device
    score, dense = evaluate(
        Weights(Checkpoint.open(out)), tokens, device, torch.float32, Weights(Checkpoint.open(args.model)), window
    )
    shutil.rmtree(out)
    assert dense is not None
    return {
        "name": name,
        "method": asdict(method),
        "options": options,
        **asdict(score),
        "dense": asdict(dense),
        "bits_per_weight": result.plan.bits_per_weight,
        "seconds": seconds,
        "parts": result.seconds,
        "notes": sorted({n for r in result.records for n in r["notes"]}),
    }


if __name__ == "__main__":
    main()
