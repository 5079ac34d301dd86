"""What the second-order passes share: damped Hessian and factor, the order of the visit, losses, scale refit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from compress import grid
from compress.errors import CompressError
from compress.grid import Grid
from compress.packed.uniform import group_index
from compress.solvers.masks import Choice

#: each failed Cholesky multiplies the damp by this; it ends far above any Hessian's own diagonal
_DAMP_STEP = 10.0
_DAMP_LIMIT = 1e4
_AT_ONCE = 8192  # columns of a product on a GPU: what is made of the matrix for it takes one and a half times its room
_LEAST = 256  # triangular matrices of at most so many rows are inverted at once


@dataclass(frozen=True)
class Prepared:
    """What the second-order passes make of a Hessian before they look at a weight.

    Attributes:
        visit: int64 [in], the columns in the order of the visit.
        dead: how many columns were never active.
        damped, factor: float32 [in, in], see `factorise`, both in that order.
        notes: what the report must say.
    """

    visit: Tensor
    dead: int
    damped: Tensor
    factor: Tensor
    notes: tuple[str, ...]


_Key = tuple[int, float, bool, Choice | None]
#: the last one, for the layers that share its input; it goes when the Hessian does
_last: list[tuple[weakref.ref[Tensor], _Key, Prepared]] = []


def prepare(hessian: Tensor, damp_percent: float, by_size: bool, choice: Choice | None = None) -> Prepared:
    """Order and factors for float32 H [in, in], made once for layers that are given the same tensor one after another.

    Args:
        by_size, choice: see `visiting_order`.

    Raises:
        CompressError: H is not finite.
    """
    key = (hessian._version, damp_percent, by_size, choice)
    if _last and _last[0][0]() is hessian and _last[0][1] == key:
        return _last[0][2]
    _last.clear()
    diagonal = hessian.diagonal()
    visit = visiting_order(diagonal, by_size, choice)
    dead = diagonal <= 0
    damped, factor, notes = factorise(hessian[visit][:, visit], dead[visit], damp_percent)
    found = Prepared(visit, int(dead.sum()), damped, factor, tuple(notes))
    _last.append((weakref.ref(hessian, lambda _: _last.clear()), key, found))
    return found


def factorise(hessian: Tensor, dead: Tensor, damp_percent: float) -> tuple[Tensor, Tensor, list[str]]:
    """Damp H and take the upper factor U of its inverse, H^-1 = U^T U.

    The inverse is never formed: with J the reversal of order and J H J = L L^T, U = J L^-1 J. When Cholesky fails the
    damp is multiplied by ten, and every step is noted. Columns in `dead` hold nothing but the damp.

    Returns:
        damped H [in, in], U [in, in], notes.

    Raises:
        CompressError: H is not finite.
    """
    if not bool(torch.isfinite(hessian).all()):
        raise CompressError(
            "the Hessian holds NaN or infinity", remedy="the activations overflowed: use --dtype float32"
        )
    damped = hessian.clone()
    damped.diagonal()[dead] = 0.0
    mean = float(hessian.diagonal().mean())
    mean = mean if mean > 0 else 1.0
    percent = damp_percent
    notes: list[str] = []
    while True:
        trial = damped.clone()
        trial.diagonal().add_(percent * mean)
        lower, info = torch.linalg.cholesky_ex(trial.flip(0, 1))
        if int(info) == 0:
            inverse = invert_lower(lower)
            if bool(torch.isfinite(inverse).all()):
                return trial, inverse.flip(0, 1).contiguous(), notes
        raised = max(percent * _DAMP_STEP, 1e-6)
        if raised > _DAMP_LIMIT:
            raise CompressError(f"no damp up to {_DAMP_LIMIT:g} makes the Hessian positive definite")
        notes.append(f"Cholesky failed at damp {percent:g}: raised to {raised:g}")
        percent = raised


def invert_lower(lower: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix [n, n]: of its halves on the diagonal, the rest by two products."""
    n = len(lower)
    if n <= _LEAST:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        small: Tensor = torch.linalg.solve_triangular(lower, eye, upper=False)
        return small
    half = n // 2
    first, second = invert_lower(lower[:half, :half]), invert_lower(lower[half:, half:])
    inverse = torch.zeros_like(lower)
    inverse[:half, :half], inverse[half:, half:] = first, second
    inverse[half:, :half] = (second @ (lower[half:, :half] @ first)).neg_()
    return inverse


def visiting_order(diagonal: Tensor, by_size: bool, choice: Choice | None = None) -> Tensor:
    """int64 [in]: the columns in natural order or by falling H_ii; for N:M runs of M stay together, by their sum."""
    if not by_size:
        return torch.arange(len(diagonal), device=diagonal.device)
    run = choice.length if choice is not None and choice.pattern.m else 1
    heads = torch.argsort(diagonal.reshape(-1, run).sum(1), descending=True, stable=True)
    return (heads[:, None] * run + torch.arange(run, device=diagonal.device)).flatten()


def runs(groups: list[int], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Stretches [first, last) of one group within the columns start..stop-1."""
    first = start
    for i in range(start + 1, stop + 1):
        if i == stop or groups[i] != groups[first]:
            yield first, i
            first = i


def unvisit(levels: Tensor, visit: Tensor) -> Tensor:
    """[in, out] in visiting order -> [out, in] in natural order."""
    natural = torch.empty_like(levels)
    natural[visit] = levels
    return natural.t().contiguous()


def segment_sum(x: Tensor, size: int) -> Tensor:
    """Sum over the columns of each group: [..., in] -> [..., groups]; the last group may be ragged."""
    columns = x.shape[-1]
    size = columns if size == -1 else size
    groups = -(-columns // size)
    if groups * size != columns:  # else it would be a copy
        x = torch.nn.functional.pad(x, (0, groups * size - columns))
    return x.reshape(*x.shape[:-1], groups, size).sum(-1)


def refit_scales(k: Tensor, target: Tensor, damped: Tensor, grids: Grid, size: int) -> Grid:
    """The group scales that minimise each row's loss for fixed levels k: a [groups, groups] solve a row.

    With q = sum_g s_g k_g the loss is quadratic in s; from the present scales the best step d solves A d = b,
    A_gh = k_g H k_h^T, b_g = (w - q) H k_g^T. A scale that would leave 0.4 to 2.5 times its old value is kept (its
    group is nearly unused), then all are rounded to storage. A row that this makes no better keeps its old scales.
    """
    columns = k.shape[1]
    size = columns if size == -1 else size
    groups = -(-columns // size)
    error = target - k * grids.scale[:, group_index(columns, size, k.device)]
    b = segment_sum(product(error, damped) * k, size)  # [out, groups]
    a = torch.empty(len(k), groups, groups, device=k.device)
    for g in range(groups):
        mine, rest = slice(g * size, min((g + 1) * size, columns)), slice(g * size, columns)
        moves = product(k[:, mine], damped[mine, rest], whole=True)
        a[:, g, g:] = a[:, g:, g] = segment_sum(moves.mul_(k[:, rest]), size)  # symmetric
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += 1e-5 * diagonal.mean(1, keepdim=True)
    step, info = torch.linalg.solve_ex(a, b)
    ratio = 1 + step / grids.scale
    sane = (ratio > 0.4) & (ratio < 2.5) & (info == 0)[:, None]
    scale = torch.where(sane, grid.round_scale(grids.scale + step, grids.dtype), grids.scale)
    step = scale - grids.scale
    gain = (step * (2 * b - (a @ step[..., None])[..., 0])).sum(1)
    scale = torch.where((gain > 0)[:, None], scale, grids.scale)
    return Grid(scale, grids.zero, grids.bits, grids.dtype)


def refit_kept(values: Tensor, kept: Tensor, target: Tensor, damped: Tensor, steps: int = 24) -> Tensor:
    """The values on a fixed mask that minimise each row's (w - v) H (w - v)^T, from `values` on.

    Conjugate gradients on all rows at once, preconditioned by H's diagonal, which cost a product [out, in] x [in, in] a
    step (Meng et al. 2024, "ALPS", section 3.3). No step makes a row worse.

    Args:
        values: float32 [out, in], 0 off the mask.
        kept: bool [out, in].
        target: float32 [out, in], the weights w.
        damped: float32 [in, in].
    """
    damped = damped / damped.diagonal().mean()  # so that neither products nor their inverses leave float32
    inverse = kept / damped.diagonal()
    v = values.clone()
    r = product(target - v, damped) * kept
    z = r * inverse
    p = z.clone()
    rz = (r * z).sum(1, keepdim=True)
    for _ in range(steps):
        hp = product(p, damped) * kept
        curve = (p * hp).sum(1, keepdim=True)
        a = torch.where(curve > 0, rz / curve, 0.0)
        v += a * p
        r -= a * hp
        z = r * inverse
        new = (r * z).sum(1, keepdim=True)
        p = z + torch.where(rz > 0, new / rz, 0.0) * p
        rz = new
    return v


def row_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """float32 [out]: e H e^T for each row e."""
    return product(error, hessian).mul_(error).sum(1)


def product(x: Tensor, matrix: Tensor, whole: bool = False) -> Tensor:
    """float32 [rows, n] @ [n, columns]; on a GPU by the tensor cores, where a product of two numbers is off by 2^-16.

    Each number is the sum of two bfloat16 but for 2^-17 of it, and of their four products the least is left out (Henry
    et al. 2019, "Leveraging the bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", part 3).
    Errors go either way, so that what is summed over a row is far better than that.

    Args:
        whole: x holds whole numbers up to 256, which are bfloat16 as they are.
    """
    if not x.is_cuda:
        return x @ matrix
    total: Tensor | None = None
    for start in range(0, len(matrix), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found = torch.mm(*halves(x[:, part], matrix[part], whole), out_dtype=torch.float32)
        total = found if total is None else total.add_(found)
    assert total is not None
    return total


def halves(x: Tensor, matrix: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
    """bfloat16 matrices whose one product is the sum of the products that `product` describes."""
    high = matrix.bfloat16()
    low = (matrix - high).bfloat16()
    first = x.bfloat16()
    if whole:
        return torch.cat((first, first), 1), torch.cat((high, low))
    return torch.cat((first, first, (x - first).bfloat16()), 1), torch.cat((high, low, high))
