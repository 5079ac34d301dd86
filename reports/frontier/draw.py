"""What run.py found, as tables and as a picture.

    python reports/frontier/draw.py tables RESULTS.json ...           Markdown: a row a setting, seeds put together
    python reports/frontier/draw.py picture OUT.png RESULTS.json ...  divergence against stored bits and seconds

Of several files that hold the same setting and seed the first counts. Seconds from files named beside... are left out:
other work was on the card.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: name of a curve -> the settings on it, by a pattern of their names
CURVES = {
    "fast": r"\d bits fast",
    "balanced": r"\d bits balanced",
    "best": r"\d bits best",
    "best, 200 steps": r"\d bits best, 200 steps",
    "best, 200 steps, tuned in 40": r"\d bits best, 200 steps, tuned in 40 steps",
    "AutoRound": r"\d bits autoround",
}
COLOURS = "#9aa5b1", "#5b8def", "#1f5fbf", "#123a7a", "#0b7a4b", "#d9822b"


def rows(files: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """What files hold, as `by_name`."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        alone = not Path(file).name.startswith("beside")
        for key, row in json.loads(Path(file).read_text(encoding="utf-8"))["rows"].items():
            if "failed" not in row:
                found.setdefault(key, row | {"alone": alone})
    return by_name(found)


def by_name(found: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Settings that did not fail, by name, and of each what was found with one seed after the other."""
    out: dict[str, list[dict[str, Any]]] = {}
    for key, row in found.items():
        if "failed" not in row:
            out.setdefault(key.rpartition("/")[0], []).append(row)
    return out


def kl(row: dict[str, Any], text: int = 0) -> float:
    """Nats a token, on one of the texts."""
    return float(list(row["texts"].values())[text]["kl"]["mean"]["value"])


def _spread(values: Sequence[float], form: str) -> str:
    """Their mean; of several the least and the most, too."""
    mean = format(sum(values) / len(values), form)
    return mean if len(values) == 1 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


def tables(found: dict[str, list[dict[str, Any]]]) -> str:
    texts = max((list(r[0]["texts"]) for r in found.values()), key=len)
    names = [t.rpartition("/")[2].removesuffix(".txt") for t in texts]
    lines = [
        "| setting | seeds | perplexity | KL | top-1 | "
        + "".join(f"KL, {name} | " for name in names[1:])
        + "bits | block error | seconds | refining | GiB |",
        "|---" * (9 + len(names)) + "|",
    ]
    for name, seeds in found.items():
        first = seeds[0]
        text = next(iter(first["texts"].values()))
        if len(seeds) == 1:
            mean = text["kl"]["mean"]
            near = f"{mean['value']:.4f} [{mean['low']:.4f} to {mean['high']:.4f}]"
        else:
            near = _spread([kl(r) for r in seeds], ".4f")
        perplexity = _spread([next(iter(r["texts"].values()))["perplexity"]["value"] for r in seeds], ".2f")
        top1 = _spread([next(iter(r["texts"].values()))["top1"]["value"] for r in seeds], ".2%")
        others = [
            _spread([kl(r, i) for r in seeds], ".4f") if len(first["texts"]) > i else "" for i in range(1, len(names))
        ]
        seconds = first["seconds"], first.get("phases", {}).get("refine", 0.0)
        cells = [
            name, str(len(seeds)), perplexity, near, top1, *others,
            f"{first['bits']:.3f}" if "bits" in first else "",
            f"{first['refined']:.3f}" if first.get("refined") else "",
            *(f"{x:.1f}" if first.get("alone", True) else "" for x in seconds), f"{first['device_bytes'] / 2**30:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(found: dict[str, list[dict[str, Any]]], out: str) -> None:
    """Two panels: every width's curves over stored bits, and each width's settings over seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for (label, pattern), colour in zip(CURVES.items(), COLOURS, strict=True):
        mine = sorted((n for n in found if re.fullmatch(pattern, n)), reverse=True)
        if not mine:
            continue
        near = [sum(map(kl, found[n])) / len(found[n]) for n in mine]
        dash = "--" if label == "AutoRound" else "-"
        left.plot([int(n[0]) + 0.25 for n in mine], near, dash, marker="o", color=colour, label=label)
        timed = [
            (found[n][0]["seconds"], value, n[0]) for n, value in zip(mine, near, strict=True) if found[n][0]["alone"]
        ]
        right.plot([x for x, *_ in timed], [y for _, y, _ in timed], "o", color=colour, label=label)
        for x, y, digit in timed:
            right.annotate(digit, (x, y), (5, 3), textcoords="offset points", fontsize=8)
    for axis, what in ((left, "bits a weight, scales included"), (right, "seconds (the digit: bits)")):
        axis.set(yscale="log", xlabel=what, ylabel="KL from the original, nats a token")
        axis.grid(True, which="both", alpha=0.2)
    right.set_xscale("log")
    left.legend(frameon=False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "tables":
        print(tables(rows(sys.argv[2:])))
    else:
        picture(rows(sys.argv[3:]), sys.argv[2])
