"""Ours beside the peers': same model, same token rows, same evaluator, one device, one run.

    python reports/methods/peers.py MODEL CALIB.txt EVAL.txt OUT [--samples 128] [--seq-len 2048] [--only TEXT]

MODEL is a folder or "bundled". Needs llmcompressor and bitsandbytes in the environment. OUT receives results.json,
after every run, and tables.md. What a peer writes is scored by our evaluator, in float32 from the files; LLM.int8()
writes no such file and goes through its own forward. Runs are made in a child process; one that fails, or that takes
the child with it, is written down and the rest goes on. Results that are in results.json already are not made again
(failed runs are), so an OUT belongs to one set of the other arguments.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "LLM_COMPRESSOR_LOG_DISABLED": "true",
    "PYTHONWARNINGS": "ignore",
}
PACKAGES = "torch transformers llmcompressor compressed-tensors bitsandbytes datasets accelerate safetensors".split()
HEAD = ["re:.*lm_head"]
Modifiers = list[tuple[str, dict[str, Any]]]
NO_START = 2  # the child's status where the inputs themselves are at fault


@dataclass(frozen=True)
class Row:
    """A peer's run and ours beside it.

    Attributes:
        name: of the row.
        peer: function of peer_runs.py and its arguments.
        ours: a step as in a recipe, "" for none.
    """

    name: str
    peer: tuple[str, list[Any]]
    ours: str = ""


def oneshot(name: str, ours: str, modifiers: Modifiers, calibrated: bool = True) -> Row:
    return Row(name, ("llm_compressor", [modifiers, calibrated]), ours)


def sparse(structure: str) -> Modifiers:
    return [("SparseGPTModifier", {"sparsity": 0.5, "mask_structure": structure, "ignore": HEAD})]


def grouped(symmetric: bool) -> Modifiers:
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 64}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return [("GPTQModifier", {"config_groups": groups, "ignore": HEAD})]


W8A8 = {"targets": "Linear", "scheme": "W8A8", "ignore": HEAD}
RTN8, GPTQ8 = ("QuantizationModifier", W8A8), ("GPTQModifier", W8A8)
TABLES = {
    "SparseGPT (llm-compressor)": [
        oneshot("2:4", "sparsegpt pattern=2:4", sparse("2:4")),
        oneshot("50% unstructured", "sparsegpt sparsity=0.5", sparse("0:0")),
    ],
    "W8A8, a scale a token (llm-compressor)": [
        oneshot("round to nearest", "absmax activations=token", [RTN8], calibrated=False),
        oneshot("GPTQ", "gptq bits=8 activations=token", [GPTQ8]),
        oneshot("SmoothQuant 0.5", "smoothquant", [("SmoothQuantModifier", {"smoothing_strength": 0.5}), RTN8]),
        oneshot(
            "SmoothQuant 0.8 + GPTQ, their documented recipe",
            "smoothquant alpha=0.8 then='gptq bits=8 activations=token'",
            [("SmoothQuantModifier", {"smoothing_strength": 0.8}), GPTQ8],
        ),
    ],
    "GPTQ 4 bits, groups of 64 (llm-compressor)": [
        oneshot("symmetric", "gptq bits=4 group_size=64", grouped(True)),
        oneshot("asymmetric", "gptq bits=4 group_size=64 symmetric=false", grouped(False)),
    ],
    "4-bit data types, blocks of 64 (bitsandbytes)": [
        Row("NF4", ("bnb_4bit", ["nf4", False]), "nf4"),
        Row("NF4, double quantisation", ("bnb_4bit", ["nf4", True]), "nf4 double_quant=true"),
        Row("FP4", ("bnb_4bit", ["fp4", False]), "fp4 variant=bnb"),
    ],
    "LLM.int8() (bitsandbytes, its own forward)": [
        Row("float16 compute", ("own_forward", ["float16", True]), "int8"),
        Row("bfloat16 compute", ("own_forward", ["bfloat16", True]), "int8"),
        Row("dense model in float16: what the dtype alone costs", ("own_forward", ["float16", False])),
        Row("dense model in bfloat16: what the dtype alone costs", ("own_forward", ["bfloat16", False])),
    ],
}
ABSENT = (
    "GPTQModel could not be run beside the others: it needs torch 2.14.1 or newer, llm-compressor at most 2.14.0. "
    "NOT FROM THIS RUN: 0.200 nats a token is its figure measured elsewhere, on other rows; no ratio to ours follows."
)


def jobs(args: argparse.Namespace) -> dict[str, tuple[str, list[Any]]]:
    """Key in results.json -> function and arguments, in order."""
    found: dict[str, tuple[str, list[Any]]] = {}
    for title, rows in TABLES.items():
        for row in rows if args.only.lower() in title.lower() else []:
            found[f"{title} | {row.name}"] = row.peer
            if row.ours:
                found[f"ours | {row.ours}"] = ("ours", [row.ours])
    return found


def child(args: argparse.Namespace, file: Path) -> None:
    """Make what is missing. A failure of the GPU itself ends the process: the parent starts another."""
    try:
        import peer_runs

        bench = peer_runs.Bench(args)
    except Exception:
        traceback.print_exc()
        sys.exit(NO_START)
    for key, (function, given) in jobs(args).items():
        results = read(file)
        if key in results:
            continue
        try:
            results[key] = getattr(peer_runs, function)(bench, *given)
        except Exception as error:  # whatever a peer raises is a row of the table
            traceback.print_exc(limit=-4)
            results[key] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        file.write_text(json.dumps(results, indent=2) + "\n")
        print(f"{key}: {cells(results[key])}", flush=True)
        if "CUDA" in results[key].get("error", ""):
            return
    bench.clear()


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def cells(r: dict[str, Any]) -> str:
    if "error" in r:
        return f"failed: {r['error'][:160]} | | | | "
    zeros = f", {100 * r['zeros']:.1f}% zeros" if r.get("zeros", 0) > 0.2 else ""
    top1 = f"{100 * r['top1']:.2f}%"
    kl = f"{r['kl']:.5f}" if r["kl"] >= 1e-4 else f"{r['kl']:.1e}"
    return f"{kl} | {r['perplexity']:.4f} | {top1} | {r['bits']:.3f}{zeros} | {r['seconds']:.1f}"


def report(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Markdown: a table each, ours below the peer's, with the ratio of the two KL divergences."""
    import torch

    import compress

    versions = [f"compress {compress.__version__}", *(f"{p} {installed(p)}" for p in PACKAGES)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    dense = sorted({f"{r['dense']:.4f} ({r['windows']} x {r['window']})" for r in results.values() if "dense" in r})
    lines = [
        f"`python reports/methods/peers.py {' '.join(sys.argv[1:])}`",
        f"One {device}; {', '.join(versions)}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}.",
        f"Calibration: the same {args.samples} rows of {args.seq_len} tokens for all, llm-compressor in batches of "
        f"{args.peer_batch}. Dense perplexity (windows x tokens): {', '.join(dense)}. KL from the dense model in "
        "float32. Seconds: from loaded libraries to files on disk (own forward: to a loaded model), after a warm-up.",
    ]
    for title, rows in TABLES.items():
        if not any(f"{title} | {row.name}" in results for row in rows):
            continue
        lines += ["", f"### {title}", "", "| | | KL, nats a token | perplexity | same top token | bits a weight "]
        lines[-1] += "| seconds | KL, ours/peer |"
        lines += ["|---" * 8 + "|"]
        for row in rows:
            pair = [results.get(k) for k in (f"{title} | {row.name}", f"ours | {row.ours}")]
            peer, own = (r or {"error": "not run"} for r in pair)
            lines.append(f"| {row.name} | peer | {cells(peer)} | |")
            if row.ours:
                ratio = f"{own['kl'] / peer['kl']:.3f}" if peer.get("kl") and "kl" in own else ""
                lines.append(f"| | ours: `{row.ours}` | {cells(own)} | {ratio} |")
    return [*lines, "", "### GPTQModel", "", ABSENT]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--window", type=int, help="tokens a window of EVAL; default 2048 or the model's context")
    parser.add_argument("--tokens", type=int, help="evaluate on the first tokens of EVAL only")
    parser.add_argument("--only", default="", help="tables whose title holds this text")
    parser.add_argument("--peer-batch", type=int, default=8, help="rows that llm-compressor runs at once")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "results.json"
    if args.child:
        child(args, file)
        return
    done = {key: r for key, r in read(file).items() if "error" not in r}
    file.write_text(json.dumps(done, indent=2) + "\n")
    while missing := [k for k in jobs(args) if k not in read(file)]:
        code = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--child"], env={**os.environ, **QUIET})
        if code.returncode == NO_START:
            sys.exit(NO_START)
        left = [k for k in jobs(args) if k not in read(file)]
        if left and (code.returncode or left == missing):
            died = {left[0]: {"error": f"its process ended with status {code.returncode}"}}
            file.write_text(json.dumps({**read(file), **died}, indent=2) + "\n")
    (args.out / "tables.md").write_text("\n".join(report(args, read(file))) + "\n")


if __name__ == "__main__":
    main()
