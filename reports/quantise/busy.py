"""What the device does while blocks are quantised, and how much of the time it does something.

    python busy.py record OUT.json [--model llama-2-7b --blocks 4 --method gptq --warm]    on a machine with a GPU
    python busy.py draw OUT.json OUT.png                                                   needs matplotlib

The weights are random, in a published shape; the run is that of `compress bench quantise`, under torch's profiler.
Busy: a kernel runs (copies do not count). The loop: from the first product of matrices to the last.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

#: what a kernel is for, by what its name holds; the first that fits
KINDS = (
    ("copies", ("memcpy", "memset")),
    ("loop, search", ("columns", "search", "single", "narrow")),
    ("attention", ("flash", "fmha", "attention")),
    ("Cholesky, solves", ("potrf", "trsm", "getrf", "trsv", "syrk", "larf", "cholesky", "laswp")),
    ("products", ("gemm", "nvjet", "cutlass", "xmma", "gemv", "splitk")),
    ("the rest", ("",)),
)


def record(args: argparse.Namespace) -> dict[str, Any]:
    """Run it under the profiler."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    from compress.bench import models, once
    from compress.bench.models import MODELS
    from compress.bench.record import head

    sizes = MODELS[args.model].cut(args.blocks)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        source, out = Path(folder) / "model", Path(folder) / "out"
        models.write(source, sizes, torch.device("cuda:0"))
        torch.cuda.empty_cache()
        request = once.Request(
            str(source), str(out), args.method, 4, 128, args.samples, 2048, sizes.vocabulary, "cuda:0", args.low_memory
        )
        if args.warm:  # kernels are compiled once a machine
            once.run(once.Request(**{**vars(request), "out": str(out) + "-warm", "samples": 2}))
        with profile(activities=[ProfilerActivity.CUDA]) as watch:
            found = once.run(request)
    events = [
        (e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in watch.profiler.kineto_results.events()
        if e.device_type() == DeviceType.CUDA and e.duration_ns() > 0
    ]
    return {
        **head(0), "model": args.model, "blocks": args.blocks, "method": args.method, "samples": args.samples,
        "low_memory": args.low_memory, "run": found, **shares(events, found),
    }  # fmt: skip


def shares(events: list[tuple[str, int, int]], found: dict[str, Any]) -> dict[str, Any]:
    """Busy shares a millisecond by kind, and of the loop."""
    import numpy as np

    first, last = min(e[1] for e in events), max(e[2] for e in events)
    bins = (last - first) // 1_000_000 + 1
    names = [name for name, _ in KINDS]
    busy = np.zeros((len(KINDS), bins))
    every = sorted((begin, end) for name, begin, end in events if not any(w in name.lower() for w in KINDS[0][1]))
    for name, begin, end in events:
        low = name.lower()
        kind = next(i for i, (_, words) in enumerate(KINDS) if any(w in low for w in words))
        _fill(busy[kind], begin - first, end - first)
    union = np.zeros(bins)
    until = first
    for begin, end in every:
        if end > until:
            _fill(union, max(begin, until) - first, end - first)
            until = end
    return {
        "kinds": names,
        "busy_by_kind": [[round(float(x), 3) for x in row] for row in busy],
        "busy": [round(float(x), 3) for x in union],
        "seconds_by_kind": {n: round(float(row.sum()) / 1e3, 3) for n, row in zip(names, busy, strict=True)},
        "span_seconds": round((last - first) / 1e9, 3),
        "busy_seconds": round(float(union.sum()) / 1e3, 3),
    }


def _fill(row: Any, begin: int, end: int) -> None:
    """Add the span [begin, end) in nanoseconds to bins of a millisecond."""
    while begin < end:
        at = begin // 1_000_000
        stop = min(end, (at + 1) * 1_000_000)
        row[at] += (stop - begin) / 1e6
        begin = stop


def loop(data: dict[str, Any]) -> tuple[int, int]:
    """The milliseconds of the loop: what comes after it, reading back, has no products."""
    products = data["busy_by_kind"][data["kinds"].index("products")]
    live = [i for i, x in enumerate(products) if x > 0.1]
    return live[0], live[-1] + 1


def draw(data: dict[str, Any], out: Path) -> None:
    """Shares of 20 ms, stacked."""
    import matplotlib as mpl
    import numpy as np

    mpl.use("svg" if out.suffix == ".svg" else "agg")
    import matplotlib.pyplot as plt

    begin, end = loop(data)
    rows = np.array(data["busy_by_kind"])[:, begin:end]
    step = max(1, (end - begin) // 300)
    width = rows.shape[1] // step * step
    rows = rows[:, :width].reshape(len(rows), -1, step).mean(-1)
    busy = np.array(data["busy"][begin : begin + width]).reshape(-1, step).mean(-1)
    x = np.arange(rows.shape[1]) * step / 1e3
    figure, axes = plt.subplots(figsize=(10, 3.2), layout="constrained")
    axes.stackplot(x, rows, labels=data["kinds"], step="post")
    axes.plot(x, busy, color="black", linewidth=0.8, label="busy at all", drawstyle="steps-post")
    share = float(np.mean(data["busy"][begin:end]))
    what = f"{data['method']} of {data['blocks']} blocks, {data['model']}, {data['samples']} x 2048 tokens"
    axes.set_title(
        f"{what}: the device is busy {100 * share:.0f}% of {(end - begin) / 1e3:.1f} s", loc="left", fontsize=10
    )
    axes.set_xlabel("seconds")
    axes.set_ylim(0, max(1.05, float(rows.sum(0).max())))
    axes.set_xlim(0, float(x[-1]) if len(x) else 1)
    axes.legend(ncols=4, fontsize=8, loc="lower right")
    figure.savefig(out, dpi=130)
    print(f"busy {share:.3f} of {(end - begin) / 1e3:.2f} s; by kind: {data['seconds_by_kind']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "draw"))
    parser.add_argument("file", type=Path)
    parser.add_argument("picture", type=Path, nargs="?")
    parser.add_argument("--model", default="llama-2-7b")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--low-memory", action="store_true")
    parser.add_argument("--warm", action="store_true")
    parser.add_argument("--work")
    args = parser.parse_args()
    if args.what == "record":
        args.file.write_text(json.dumps(record(args)))
    else:
        draw(json.loads(args.file.read_text()), args.picture or args.file.with_suffix(".png"))


if __name__ == "__main__":
    main()
