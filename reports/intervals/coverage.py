"""How often the 95% intervals of compress/evaluate/intervals.py hold the truth: `python reports/intervals/coverage.py`.

Texts are drawn of whose windows the mean is known; no model is involved.
"""

from __future__ import annotations

import numpy as np
import torch

from compress.evaluate.intervals import Units, ratio

#: how the windows of a text differ: (draws them, the mean of them all)
KINDS = {
    "normal": (lambda r, n: r.normal(3, 0.2, n), 3.0),
    "gamma, shape 4": (lambda r, n: r.gamma(4, 1, n), 4.0),
    "log-normal 0.5": (lambda r, n: r.lognormal(-0.125, 0.5, n), 1.0),
    "exponential": (lambda r, n: r.gamma(1, 1, n), 1.0),
    "tokens in log-normal windows": (
        lambda r, n: r.exponential(1, (n, 128)).mean(1) * r.lognormal(-0.045, 0.3, n),
        1.0,
    ),
}
COUNTS = (8, 12, 20, 60, 160)


def coverage(kind: str, windows: int, texts: int) -> float:
    """The share of texts whose interval holds the mean."""
    draw, mean = KINDS[kind]
    random = np.random.default_rng(windows)
    units, ones = Units.of(torch.ones(windows, 64, dtype=torch.bool)), np.ones(windows)
    found = (ratio(draw(random, windows), ones, units) for _ in range(texts))
    return sum(e.low is not None and e.high is not None and e.low <= mean <= e.high for e in found) / texts


def main() -> None:
    print(f"numpy {np.__version__}, torch {torch.__version__}\n")
    print("| windows differ by |", " | ".join(map(str, COUNTS)), "|\n|---|", "---|" * len(COUNTS), sep="")
    for kind in KINDS:
        row = [f"{coverage(kind, n, 2000 if n < 100 else 1000):.3f}" for n in COUNTS]
        print(f"| {kind} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
