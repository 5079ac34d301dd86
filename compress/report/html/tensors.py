"""Weights, layer by layer, from the files: histograms before and after, and where outliers lie. One layer at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compress.packed.outlier_columns import OutlierColumns
from compress.packed.outliers import Outliers as OutlierWeights
from compress.packed.outliers import positions
from compress.report.html.facts import Histogram, Layer, Mask, Outliers, Strip
from compress.weights import Weights

#: layers of each model whose weights are shown
WORST = 3
#: of a histogram; odd, so that zero has a bin of its own
BINS = 81
#: of an outlier map: along the input features, and along the rows of the one layer that is shown whole
CELLS = 128
_POINTERS, _WHERE = OutlierWeights.parts[:2]
_COLUMNS = OutlierColumns.parts[-2]


def number(value: Any) -> float | None:
    """A finite number of a JSON file, None for anything else."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if plain and math.isfinite(value) else None


def histogram(weights: Weights, original: Weights, layer: Layer) -> Histogram:
    """One layer's weights before and after, both read from files."""
    before = original.read(f"{layer.name}.weight").float()
    after = weights.read(f"{layer.name}.weight").float()
    if before.shape != after.shape:
        before = before.t()  # kept as [in, out]
    norm = float(before.norm())
    reach = max(min(float(w.abs().max()), 5.0 * float(w.std())) for w in (before, after)) or 1.0
    half = reach * BINS / (BINS - 1)
    shares = [(torch.histc(w, BINS, -half, half) / w.numel()).tolist() for w in (before, after)]
    outside = [max(0.0, 1.0 - sum(s)) for s in shares]
    zeros = [float((w == 0).sum()) / w.numel() for w in (before, after)]
    return Histogram(
        layer=layer.name,
        error=layer.error,
        low=-half,
        high=half,
        before=_short(shares[0]),
        after=_short(shares[1]),
        outside=(round(outside[0], 6), round(outside[1], 6)),
        zeros=(round(zeros[0], 6), round(zeros[1], 6)),
        distance=float((after - before).norm()) / norm if norm else 0.0,
    )


def count(weights: Weights, layer: str) -> int | None:
    """How many outliers a layer has, from the headers; None for one of another kind."""
    stored = weights.checkpoint.tensors
    for part in (_WHERE, _COLUMNS):
        if f"{layer}.{part}" in stored:
            return stored[f"{layer}.{part}"].numel
    return None


def outliers(weights: Weights, layers: Sequence[Layer]) -> Outliers | None:
    """Where the outliers of a model lie; None for a model that keeps none apart."""
    held = [x for x in layers if x.outliers is not None]
    if not held:
        return None
    single = f"{held[0].name}.{_WHERE}" in weights.checkpoint.tensors
    strips: dict[str, list[tuple[Layer, Tensor]]] = {}
    for layer in held:
        where = _features(weights, layer)
        strips.setdefault(layer.kind, []).append((layer, where))
    most = max(held, key=lambda x: (x.outliers or 0) / math.prod(x.shape))
    made = tuple(_strip(kind, found) for kind, found in strips.items())
    return Outliers("weights" if single else "columns", made, _mask(weights, most) if single else None)


def _features(weights: Weights, layer: Layer) -> Tensor:
    """float32 [in]: of each input feature the share of its weights that are outliers."""
    rows, columns = layer.shape
    read = weights.checkpoint.read
    if f"{layer.name}.{_COLUMNS}" in weights.checkpoint.tensors:
        return torch.zeros(columns).index_fill(0, read(f"{layer.name}.{_COLUMNS}").long(), 1.0)
    at = positions(read(f"{layer.name}.{_POINTERS}"), read(f"{layer.name}.{_WHERE}"))[1]
    return torch.bincount(at, minlength=columns).float() / rows


def _strip(kind: str, found: Sequence[tuple[Layer, Tensor]]) -> Strip:
    """The layers of one kind, one row a block; experts of a block are one row."""
    blocks = sorted({-1 if layer.block is None else layer.block for layer, _ in found})
    features = max(len(where) for _, where in found)
    rows = []
    for block in blocks:
        mine = [where for layer, where in found if (-1 if layer.block is None else layer.block) == block]
        rows.append(_short(_binned(torch.stack(mine).mean(0)).tolist()))
    total = sum(float(where.mean()) for _, where in found) / len(found)
    return Strip(kind, features, tuple(blocks), tuple(rows), total)


def _binned(values: Tensor) -> Tensor:
    """[n] -> means over at most CELLS runs of neighbours."""
    cells = min(CELLS, len(values))
    at = torch.arange(len(values)) * cells // len(values)
    sums = torch.zeros(cells).index_add(0, at, values)
    return sums / torch.bincount(at, minlength=cells)


def _mask(weights: Weights, layer: Layer) -> Mask:
    """The outliers within one layer, its rows and columns cut into a grid."""
    rows, columns = layer.shape
    read = weights.checkpoint.read
    down, along = positions(read(f"{layer.name}.{_POINTERS}"), read(f"{layer.name}.{_WHERE}"))
    high, wide = min(CELLS // 2, rows), min(CELLS, columns)
    flat = (down * high // rows) * wide + along * wide // columns
    counts = torch.bincount(flat, minlength=high * wide).reshape(high, wide).float()
    in_rows = torch.bincount(torch.arange(rows) * high // rows, minlength=high).float()
    in_columns = torch.bincount(torch.arange(columns) * wide // columns, minlength=wide).float()
    cells = counts / (in_rows[:, None] * in_columns)
    return Mask(layer.name, (rows, columns), tuple(_short(r) for r in cells.tolist()), len(along) / (rows * columns))


def _short(values: Sequence[float]) -> tuple[float, ...]:
    """Four significant figures: a plot shows no more, and a file has thousands of them."""
    return tuple(float(f"{v:.4g}") for v in values)
