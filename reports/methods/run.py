"""Every method beside its neighbours: the tables of reports/methods.md, by one command.

    python reports/methods/run.py MODEL CALIB EVAL OUT [--samples 128] [--seq-len 2048] [--window 2048] [--only TEXT]

MODEL is a folder or "bundled"; CALIB and EVAL are named as for `compress gptq` (a file, a recipe, "bundled"). OUT
receives results.json and tables.md. Perplexity, KL and agreement are computed in float32 from the files as written. A
row whose run fails is written down with its error. Results that are in results.json already are not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from cases import TABLES, Table

import compress
from compress.api import evaluation, find_model, load_tokenizer
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import evaluate
from compress.recipe import make_recipe
from compress.weights import Weights


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calib")
    parser.add_argument("eval")
    parser.add_argument("out", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--window", type=int)
    parser.add_argument("--tokens", type=int, help="evaluate on the first tokens of EVAL only")
    parser.add_argument("--only", default="", help="tables whose title holds this text")
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes at once; the seconds of rows are then no measure"
    )
    parser.add_argument("--share", default="0/1", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        together(args)
        return
    work(args)


def together(args: argparse.Namespace) -> None:
    """Share the rows among processes, then join what they found."""
    given = [a for a in sys.argv[1:] if a not in ("--jobs", str(args.jobs))]
    commands = []
    for i in range(args.jobs):
        mine = args.out / f"share-{i}"
        mine.mkdir(exist_ok=True)
        if (args.out / "results.json").exists():
            shutil.copyfile(args.out / "results.json", mine / "results.json")
        commands.append([str(mine) if a == str(args.out) else a for a in given] + ["--share", f"{i}/{args.jobs}"])
    threads = str(max(1, (os.cpu_count() or 1) // (2 * args.jobs)))  # their idle threads would spin against each other
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    running = [subprocess.Popen([sys.executable, __file__, *c], env=env) for c in commands]
    codes = [p.wait() for p in running]
    results = {}
    for i in range(args.jobs):
        file = args.out / f"share-{i}" / "results.json"
        results |= json.loads(file.read_text()) if file.exists() else {}
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.out / "tables.md").write_text("\n".join(report(args, results)) + "\n")
    sys.exit(max(codes))


def work(args: argparse.Namespace) -> None:
    """Make the rows of one share, one after the other."""
    share, shares = map(int, args.share.split("/"))
    source = find_model(args.model)
    tokens = evaluation(load_tokenizer(source), args.eval).tokens[: args.tokens]
    file = args.out / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    keys = list(dict.fromkeys(" | ".join(steps) for table in TABLES for steps in table.rows.values()))
    for table in TABLES:
        if args.only not in table.title:
            continue
        for name, steps in table.rows.items():
            key = " | ".join(steps)
            if key not in results and keys.index(key) % shares != share:
                continue
            if key not in results:
                results[key] = one(args, source, name, steps, tokens)
                file.write_text(json.dumps(results, indent=2) + "\n")
            print(f"{table.title}: {line(name, results[key])}", flush=True)
    (args.out / "tables.md").write_text("\n".join(report(args, results)) + "\n")


def one(args: argparse.Namespace, source: Path, name: str, steps: list[str], tokens: torch.Tensor) -> dict[str, Any]:
    """Compress by a recipe, then score the written file against the original in float32."""
    out = args.out / "checkpoint"
    shutil.rmtree(out, ignore_errors=True)
    options: dict[str, Any] = {"calib": args.calib, "samples": args.samples, "seq_len": args.seq_len, "fresh": True}
    options["no_client"] = True  # the result is scored below
    begun = time.perf_counter()
    try:
        recipe = make_recipe({"steps": steps}, "methods", name).settled(room=False)  # solvers, without refining
        result = compress.run(source, recipe, out, no_eval=True, **options)
        seconds = time.perf_counter() - begun
        score, dense = evaluate(
            Weights(Checkpoint.open(out)), tokens, result.job.device, torch.float32, Weights(Checkpoint.open(source)),
            args.window,
        )  # fmt: skip
    except (CompressError, RuntimeError, ValueError, AssertionError) as error:
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return {"error": f"{type(error).__name__}: {error}"}
    assert dense is not None
    from compress.report import stored_bits, words

    shutil.rmtree(out)
    return {
        "perplexity": score.perplexity,
        "kl": score.kl,
        "top1": score.top1,
        "dense": dense.perplexity,
        "windows": score.windows,
        "window": score.window,
        "bits": stored_bits(result),
        "format": result.plan.format.name,
        "seconds": seconds,
        "words": words(result),
        "notes": sorted({n for r in result.records for n in r["notes"]} | set(result.notes)),
    }


def line(name: str, r: dict[str, Any]) -> str:
    if "error" in r:
        what = r["error"] if r["error"] == "not run" else f"failed: {r['error'][:120]}"
        return f"| {name} | {what} | | | | |"
    top1 = f"{100 * r['top1']:.2f}%"
    return f"| {name} | {r['perplexity']:.3f} | {r['kl']:.5f} | {top1} | {r['bits']:.3f} | {r['seconds']:.1f} |"


def report(args: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Markdown: a table each, with the paper's orderings and whether they hold here."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    good = next((r for r in results.values() if "error" not in r), None)
    lines = [
        f"One {device}; compress {compress.__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}."
        + (f" {args.jobs} rows were made at once, so their seconds are no measure of speed." if args.jobs > 1 else ""),
    ]
    if good is not None:
        lines[0] += f" Dense perplexity {good['dense']:.4f} ({good['windows']} windows of {good['window']} tokens)."
    for table in TABLES:
        if any(" | ".join(steps) in results for steps in table.rows.values()):
            lines += ["", *section(table, results)]
    return lines


def section(table: Table, results: dict[str, Any]) -> list[str]:
    found = {name: results.get(" | ".join(steps), {"error": "not run"}) for name, steps in table.rows.items()}
    out = [f"### {table.title}", "", f"The papers: {table.claim}", ""]
    out += ["| | perplexity | KL, nats a token | same top token | bits a weight | seconds | steps |"]
    out += ["|---|---|---|---|---|---|---|"]
    out += [line(name, r) + f" `{'; '.join(table.rows[name])}` |" for name, r in found.items()]
    out += [""]
    for better, worse in table.orders:
        a, b = found[better].get("kl"), found[worse].get("kl")
        if a is None or b is None:
            continue
        holds = "holds" if a < b else "DOES NOT HOLD"
        out.append(f"- {better} before {worse}: {holds} ({a:.5f} and {b:.5f}, ratio {a / max(b, 1e-12):.2f})")
    return out


if __name__ == "__main__":
    main()
