"""Uniform grids: scales, zero points, rounding. Pure functions that passes share.

A grid over the weights of one group is scale * k with k in low .. high: low = -zero, high = 2**bits - 1 - zero. The
symmetric grid has zero = 2**(bits - 1), so one level more on its negative side; a negative scale puts that level on the
positive side of the weights. Scales are rounded to the dtype in which they are stored before anything uses them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import CompressError

#: zero points start at 1: GPTQ v1 files store zero - 1 in an unsigned field, so they cannot hold 0
LOWEST_ZERO = 1

_DEFAULT_GROUPS = (128, 64, 32)
_IN_CACHE = 1 << 18  # numbers: about a megabyte, which stays in a CPU's cache


@dataclass(frozen=True)
class Grid:
    """The grids of a matrix.

    Attributes:
        scale: float32 [out, groups]; every value exactly representable in `dtype`.
        zero: float32 [out, groups], whole numbers in 0 .. 2**bits - 1.
        bits: bits a code.
        dtype: the dtype in which scales are stored and dequantised weights are rounded.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    dtype: torch.dtype

    @property
    def low(self) -> Tensor:
        return self.zero.neg()

    @property
    def high(self) -> Tensor:
        top: Tensor = self.low + (2**self.bits - 1)
        return top


def group_count(columns: int, group_size: int) -> int:
    """Number of groups in a row; the last may be ragged."""
    return 1 if group_size == -1 else -(-columns // group_size)


def settle_group_size(requested: int | None, in_features: Collection[int]) -> int:
    """The group size to use.

    None becomes the largest of 128, 64, 32 that divides every layer's in_features, else -1 (one group a row).
    A given size is kept (formats decide whether they take a ragged last group).

    Raises:
        CompressError: the size is 0, below -1, or larger than every row.
    """
    if requested is None:
        return next((g for g in _DEFAULT_GROUPS if all(n % g == 0 for n in in_features)), -1)
    if requested == 0 or requested < -1:
        raise CompressError(f"group size {requested} is out of range", "--group-size", "use -1 or 1 and more")
    if in_features and requested > max(in_features):
        widest = max(in_features)
        raise CompressError(
            f"group size {requested} is larger than the widest layer's in_features {widest}", "--group-size", "use -1"
        )
    return requested


def bands(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Rows of a matrix, so many at a time that what is made of them stays in a processor's cache; on a GPU, all."""
    step = max(1, _IN_CACHE // columns) if device.type == "cpu" else max(rows, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def nearest(weight: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Round to the nearest level: k = clamp(round(weight / scale), low, high), float32."""
    return torch.round(weight / scale).clamp_(low, high)  # type: ignore[arg-type]


def value(k: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that level k stands for, float32, rounded once to `dtype` as every client does."""
    product = k * scale
    return product if dtype == torch.float32 else product.to(dtype).float()


def least_scale(dtype: torch.dtype) -> float:
    """The smallest magnitude that a stored scale can be trusted with.

    That is the smallest subnormal for float16, whose normal numbers end at 6e-5, within reach of real scales and which
    every reader computes in full; for the others the smallest normal number.
    """
    info = torch.finfo(dtype)
    return info.tiny * info.eps if dtype == torch.float16 else info.tiny


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the stored dtype; magnitudes that would vanish become `least_scale`."""
    tiny = least_scale(dtype)
    rounded = scale.to(dtype).float().clamp_(-torch.finfo(dtype).max, torch.finfo(dtype).max)
    return torch.where(rounded.abs() < tiny, torch.where(rounded < 0, -tiny, tiny), rounded)


def fit(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    dtype: torch.dtype,
    search: bool = False,
    importance: Tensor | None = None,
) -> Grid:
    """Scales and zero points of every group of a matrix.

    Without search: the symmetric scale is absmax / (2**bits - 1) * 2, the asymmetric one spans min..max with zero
    inside. With search: the scale (and zero) that minimises sum importance * (w - q)**2 over a range of shrunk and
    slightly stretched scales, of both signs where the grid is symmetric.

    Args:
        weight: [out, in], float32.
        importance: float32 [in], the weight of each column's squared error (GPTQ passes H's diagonal); None for 1.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    if search and weight.is_cuda:
        from compress.cuda import search as kernel  # the same at once; a CPU needs nothing of it

        if kernel.takes(weight, size, dtype, importance):
            return Grid(*kernel.fit(weight, bits, size, symmetric, dtype, importance), bits, dtype)
    cost = torch.ones(columns, device=weight.device) if importance is None else importance
    cost = grouped(cost[None], size)  # [1, groups, size], zero where padded
    scales, zeros = [], []
    for band in bands(len(weight), columns, weight.device):
        part = grouped(weight[band], size)
        if symmetric:
            scale, zero = _fit_symmetric(part, bits, dtype, search, cost)
        else:
            scale, zero = _fit_asymmetric(part, bits, dtype, search, cost)
        scales.append(scale)
        zeros.append(zero)
    return Grid(torch.cat(scales), torch.cat(zeros), bits, dtype)


def grouped(x: Tensor, size: int) -> Tensor:
    """[rows, columns] -> [rows, groups, size], the ragged end padded with zeros, which every grid has."""
    groups = -(-x.shape[1] // size)
    return F.pad(x, (0, groups * size - x.shape[1])).reshape(-1, groups, size)


#: shrink factors tried by the search: a coarse ladder, then a fine one around its best
COARSE = [1.15 - 0.05 * i for i in range(18)]
FINE = [-0.0375, -0.025, -0.0125, 0.0125, 0.025, 0.0375]


def shifts(bits: int) -> tuple[float, ...]:
    """What the asymmetric search tries to add to each zero point."""
    return (0.0, -1.0, 1.0) if bits <= 4 else (0.0,)


def _fit_symmetric(part: Tensor, bits: int, dtype: torch.dtype, search: bool, cost: Tensor) -> tuple[Tensor, Tensor]:
    half = 2 ** (bits - 1)
    full = part.abs().amax(-1).clamp_(min=1e-10) / (half - 0.5)
    zero = torch.full_like(full, float(half))
    if not search:
        return round_scale(full, dtype), zero
    best = torch.full_like(full, float("inf"))
    scale = round_scale(full, dtype)
    factor = torch.ones_like(full)

    def attempt(f: Tensor | float) -> None:
        nonlocal best, scale, factor
        trial = round_scale(full * f, dtype)
        k = nearest(part, trial[..., None], -half, half - 1)
        error = (k.mul_(trial[..., None]).sub_(part).square_().mul_(cost)).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, trial, scale)
        factor = torch.where(better, f, factor)

    for f in COARSE:
        attempt(f)
        attempt(-f)
    centre = factor
    for step in FINE:
        attempt(centre + step * centre.sign())
    return scale, zero


def _fit_asymmetric(part: Tensor, bits: int, dtype: torch.dtype, search: bool, cost: Tensor) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low = part.amin(-1).clamp_(max=0.0)
    high = part.amax(-1).clamp_(min=0.0)
    flat = (high - low) < 1e-10
    high = torch.where(flat, torch.full_like(high, 1e-10), high)
    low = torch.minimum(low, -high / (2 * top - 1))  # zero is at least 1: without room for it, high is a step too far

    def grid(f: Tensor | float) -> tuple[Tensor, Tensor]:
        trial = round_scale((high - low) * f / top, dtype)
        return trial, torch.round(-low * f / trial).clamp_(LOWEST_ZERO, top)

    scale, zero = grid(1.0)
    if not search:
        return scale, zero
    best = torch.full_like(scale, float("inf"))
    factor = torch.ones_like(scale)

    def attempt(f: Tensor | float) -> None:
        nonlocal best, scale, zero, factor
        s, z = grid(f)
        for shift in shifts(bits):
            zs = (z + shift).clamp_(LOWEST_ZERO, top)
            k = nearest(part, s[..., None], -zs[..., None], top - zs[..., None])
            error = (k.mul_(s[..., None]).sub_(part).square_().mul_(cost)).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, s, scale)
            zero = torch.where(better, zs, zero)
            factor = torch.where(better, f, factor)

    for f in COARSE:
        attempt(f)
    centre = factor
    for step in FINE:
        attempt(centre + step)
    return scale, zero
