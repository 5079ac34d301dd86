"""`compress auto` beside one setting for all layers, at the same stored bits: the table of README.md for any model.

    python reports/auto/run.py MODEL CALIB EVAL OUT [--samples 128] [--seq-len 2048] [--settings 3g128,4g128,...]

For each uniform setting: a run with it, then `compress auto` with exactly its stored bits a weight as the budget. OUT
keeps the measurement (made once for all budgets), results.json (a run that was stopped goes on) and table.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import compress
from compress.auto.asked import Ask
from compress.auto.run import Outcome, auto
from compress.job import Result
from compress.options import Options

#: the default: what people use, and what lies between
SETTINGS = "2g32,3g128,3g32,4g128,4g32,5g128"


def arguments() -> argparse.Namespace:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model")
    found.add_argument("calib")
    found.add_argument("eval")
    found.add_argument("out", type=Path)
    found.add_argument("--samples", type=int, default=128)
    found.add_argument("--seq-len", type=int, default=None)
    found.add_argument("--settings", default=SETTINGS, help="bits and group size of the uniform runs")
    found.add_argument("--bits", default=Ask(avg_bits=4.0).bits)
    found.add_argument("--group-size", default=Ask(avg_bits=4.0).group_size)
    found.add_argument("--sensitivity", default="kl")
    found.add_argument("--target", default=None)
    found.add_argument("--method", default="gptq")
    found.add_argument("--probes", type=int, default=Ask(avg_bits=4.0).probes)
    found.add_argument("--probe-len", type=int, default=Ask(avg_bits=4.0).probe_len)
    return found.parse_args()


def figures(result: Result, seconds: float) -> dict[str, Any]:
    """What the table shows of one run; its folder is deleted."""
    assert result.score is not None
    assert result.original is not None
    stored = sum(record["bytes"] for record in result.records)
    shutil.rmtree(result.job.out)
    return {
        "bytes": stored,
        "bits": 8 * stored / result.plan.packed_weights,
        "kl": result.score.kl,
        "kl_low": result.score.kl_low,
        "kl_high": result.score.kl_high,
        "top1": result.score.top1,
        "perplexity": result.score.perplexity,
        "original": result.original.perplexity,
        "seconds": seconds,
    }


def pair(given: argparse.Namespace, setting: str) -> dict[str, Any]:
    """The uniform run, and the chosen one of its size."""
    bits, _, size = setting.partition("g")
    options = Options(
        calib=given.calib, eval=given.eval, samples=given.samples, seq_len=given.seq_len, no_client=True, fresh=False
    )
    method = compress.method(given.method, bits=int(bits), group_size=int(size))
    begun = time.perf_counter()
    result = compress.run(given.model, method, given.out / "uniform", **_fields(options))
    uniform = figures(result, time.perf_counter() - begun)
    # a hair more than the uniform bits, which are a fraction of bytes: the budget is those bytes, not one less
    ask = Ask(
        avg_bits=8 * (uniform["bytes"] + 0.5) / result.plan.packed_weights,
        method=given.method, bits=given.bits, group_size=given.group_size, sensitivity=given.sensitivity,
        probes=given.probes, probe_len=given.probe_len, measured=given.out / "measured",
    )  # fmt: skip
    begun = time.perf_counter()
    outcome: Outcome = auto(given.model, ask, replace(options, out=given.out / "auto", target=given.target))
    assert outcome.result is not None
    chosen = figures(outcome.result, time.perf_counter() - begun)
    chosen["predicted"] = outcome.allocation.cost
    assert chosen["bytes"] <= uniform["bytes"]
    return {"setting": setting, "uniform": uniform, "auto": chosen}


def _fields(options: Options) -> dict[str, Any]:
    return {k: v for k, v in vars(options).items() if k != "out"}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    out = [
        "| bits a weight | uniform | KL uniform | KL auto | less by | predicted | top-1 uniform | auto | perplexity uniform | auto |",  # noqa: E501
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        a, u = row["auto"], row["uniform"]
        out.append(
            f"| {a['bits']:.4f} | {row['setting']}, {u['bits']:.4f} "
            f"| {u['kl']:.5f} ({u['kl_low']:.5f} to {u['kl_high']:.5f}) "
            f"| {a['kl']:.5f} ({a['kl_low']:.5f} to {a['kl_high']:.5f}) | {100 * (1 - a['kl'] / u['kl']):.0f}% "
            f"| {a['predicted']:.4g} | {100 * u['top1']:.2f}% | {100 * a['top1']:.2f}% "
            f"| {u['perplexity']:.3f} | {a['perplexity']:.3f} |"
        )
    return "\n".join(out) + "\n"


def main() -> None:
    given = arguments()
    given.out.mkdir(parents=True, exist_ok=True)
    record = given.out / "results.json"
    rows = json.loads(record.read_text()) if record.exists() else []
    for setting in given.settings.split(","):
        if setting in {row["setting"] for row in rows}:
            continue
        rows.append(pair(given, setting))
        record.write_text(json.dumps(rows, indent=2) + "\n")
        (given.out / "table.md").write_text(table(rows))
        print(table(rows[-1:]).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
