"""The demo's GPTQ beside llm-compressor's: same model, same token rows, same threads, same evaluator, one run.

    python reports/demo-speed/bench.py PEER_PYTHON [--runs 3] [--write]

PEER_PYTHON is the python of an environment with llmcompressor, which pins an older transformers than ours.
Each run is a process that loads libraries, then model and rows, compresses and writes the checkpoint; timed is the
part behind the libraries, up to files on disk. Runs alternate, the medians and their ratio are printed. Both
results are scored by our evaluator in float32 on the held-out text.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TINY = HERE.parent.parent / "calib" / "tiny"
BITS, GROUP = 4, 128

PEER = """
import json, sys, time, torch
torch.set_num_threads(2)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
model_dir, rows_file, out, bits, group = sys.argv[1:6]
rows = load_file(rows_file)["rows"]
data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
begun = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto")
scheme = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": int(bits), "type": "int", "symmetric": True,
          "strategy": "group", "group_size": int(group)}}}
oneshot(model=model, dataset=data, processor=AutoTokenizer.from_pretrained(model_dir),
        recipe=GPTQModifier(config_groups=scheme, ignore=["lm_head"]),
        max_seq_length=rows.shape[1], num_calibration_samples=len(rows), shuffle_calibration_samples=False)
model.save_pretrained(out, save_compressed=True)
AutoTokenizer.from_pretrained(model_dir).save_pretrained(out)
print("SECONDS", time.perf_counter() - begun)
"""

OURS = """
import sys, time, torch
torch.set_num_threads(2)
import transformers, compress, compress.api
from compress.calibration import Rows
from compress.job import Job
from compress.pipeline import compress_checkpoint
from compress.recipe import Recipe
from safetensors.torch import load_file
from pathlib import Path
model_dir, rows_file, out, bits, group = sys.argv[1:6]
rows = load_file(rows_file)["rows"]
begun = time.perf_counter()
method = compress.GPTQ(bits=int(bits), group_size=int(group), token_weights=WEIGHTS)
compress_checkpoint(Job(Path(model_dir), Path(out), Recipe.of(method),
                        rows=Rows(rows, "bundled", (), "-"), origin="bundled", client=False))
print("SECONDS", time.perf_counter() - begun)
"""


#: name -> whose python, what it runs; None: this one
PLAIN, DEFAULT, OTHER = "compress --no-token-weights", "compress", "llm-compressor"
RUNS = {
    DEFAULT: (None, OURS.replace("WEIGHTS", "None")),
    PLAIN: (None, OURS.replace("WEIGHTS", "False")),
    OTHER: ("peer", PEER),
}


def one(python: str, code: str, rows: Path, out: Path) -> float:
    """Seconds that one process reports for compressing and writing."""
    command = [python, "-c", code, str(TINY), str(rows), str(out), str(BITS), str(GROUP)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("SECONDS")]
    if done.returncode or not found:
        sys.exit(done.stderr[-3000:])
    return float(found[0].split()[1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", help="python of an environment with llmcompressor")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    from safetensors.torch import save_file

    from compress.api import load_tokenizer
    from compress.calibration import calibration_rows

    times: dict[str, list[float]] = {name: [] for name in RUNS}
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.safetensors"
        tokens = calibration_rows("bundled", load_tokenizer(TINY), samples=128, seq_len=256).tokens
        save_file({"rows": tokens}, rows)
        for run in range(args.runs):
            for name, (peer, code) in RUNS.items():
                out = Path(scratch) / f"{name.replace(' ', '')}-{run}"
                times[name].append(one(args.peer if peer else sys.executable, code, rows, out))
                print(name, f"{times[name][-1]:.2f} s", flush=True)
        scores = {name: score(Path(scratch) / f"{name.replace(' ', '')}-0") for name in times}
    lines = report(args.peer, times, scores)
    print("\n".join(lines))
    if args.write:
        (HERE / "README.md").write_text("\n".join(lines) + "\n")


def score(folder: Path) -> Any:
    """Perplexity and KL of a written checkpoint, by our evaluator in float32."""
    import compress

    found, _, _ = compress.score(folder, "bundled", against="bundled", dtype="float32", device="cpu")
    return found


def report(peer: str, times: dict[str, list[float]], scores: dict[str, Any]) -> list[str]:
    """The table as Markdown lines."""
    import torch
    import transformers

    code = "import llmcompressor, compressed_tensors, transformers, torch, json; print(json.dumps({m.__name__: m.__version__ for m in (llmcompressor, compressed_tensors, transformers, torch)}))"  # noqa: E501
    versions = json.loads(subprocess.run([peer, "-c", code], capture_output=True, text=True).stdout.splitlines()[-1])
    median = {n: statistics.median(t) for n, t in times.items()}
    lines = [
        "# The demo's GPTQ beside llm-compressor's",
        "",
        "`python reports/demo-speed/bench.py PEER_PYTHON --write`: the bundled model, 128 x 256 tokens, 4 bits, group "
        f"{GROUP}, symmetric, 2 threads each, runs alternating; from loaded libraries to files on disk.",
        f"Machine: 2 CPU cores, no GPU. Ours: torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}. Peer: {', '.join(f'{k} {v}' for k, v in versions.items())}. "
        f"Date of run: {time.strftime('%Y-%m-%d')}.",
        "",
        "| | seconds (median) | all runs | perplexity | KL from the original |",
        "|---|---|---|---|---|",
    ]
    for name, values in times.items():
        s = scores[name]
        runs = ", ".join(f"{v:.2f}" for v in values)
        lines.append(f"| {name} | {median[name]:.2f} | {runs} | {s.perplexity:.4f} | {s.kl:.5f} |")
    ratio, plain = (median[name] / median[OTHER] for name in (DEFAULT, PLAIN))
    said = (
        f"Time, ours over theirs: {ratio:.2f}; with `--no-token-weights`, where tokens count alike as they do there, "
    )
    lines += ["", f"{said}{plain:.2f}. Both are run with their defaults otherwise."]
    return lines


if __name__ == "__main__":
    main()
