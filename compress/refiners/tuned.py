"""Packed layers whose codes, scales and zeros can be moved a little at a time, by the gradient of their weights.

A weight is where it stands between two levels of its grid, its place; its code is the nearest level. A step moves
every place against its gradient, as if rounding had slope 1, by the share that this gradient is of the place's usual
one: of the root of the mean square so far (as in Adagrad and RMSProp). So a place that is pushed one way in most steps
crosses to the next level and others stay, as with signs alone (SignRound, Cheng et al.: "Optimize Weight Rounding via
Signed Gradient Descent", 2023), but a piece of the rows that hardly depends on a weight hardly moves it. Scales and
zeros, which are sums over many weights, move by signs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from compress import tables
from compress.grid import LOWEST_ZERO
from compress.packed.bilevel import BiLevel
from compress.packed.blockwise import Blockwise
from compress.packed.dense import Dense
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid, group_index
from compress.types import Packed

#: how far from its level a place starts at most: codes that a solver chose though they were not the nearest all start
#: there, and at the very edge of their cells half of them would cross with the first move, together
_START = 0.45
#: how far beyond the last level it may go
_CELL = 0.49
#: a scale stays within these shares of the one that it started from
_LEAST, _MOST = 0.6, 1.4
#: moves are no longer than so many usual ones
_FAR = 10.0


class Tuned(Protocol):
    """A layer on the way."""

    def write(self, into: Tensor) -> None:
        """Fill `into` [out, in] with the weights as they are now, to the last bit what the packed layer has."""
        ...

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        """Move against a gradient [out, in], which may be changed, and fill `into` as `write` does.

        Nothing waits for the device, and each call does the same launches: it can be captured in a CUDA graph.

        Args:
            pace: a row of `paces`.
        """
        ...

    def keep(self) -> None:
        """Remember this state, in place of the one that was remembered."""
        ...

    def packed(self) -> Packed:
        """The layer in the state that was remembered last."""
        ...


def paces(steps: int, rate: float, scale_rate: float, device: torch.device) -> Tensor:
    """float32 [steps, 3]: by how many levels a usual gradient moves a place; by what share of itself a scale moves; one
    over the number of steps so far. The first two fall to 0.

    Args:
        rate, scale_rate: those of the first step.
    """
    step = torch.arange(steps, dtype=torch.float64)
    fall = 1 - step / steps
    return torch.stack([rate * fall, scale_rate * fall, 1 / (step + 1)], 1).float().to(device)


def tunable(packed: Packed) -> bool:
    """Whether `tuned` takes a layer."""
    if isinstance(packed, Outliers):
        return tunable(packed.inner)
    if isinstance(packed, Sparse):
        return not packed.inner.storage.activations
    return isinstance(packed, BiLevel | Blockwise) or (isinstance(packed, UniformGrid) and not packed.activations)


def tuned(packed: Packed, weight: Tensor) -> Tuned:
    """A layer that `tunable` names.

    Args:
        weight: float32 [out, in], what its codes stand for.
    """
    match packed:
        case UniformGrid():
            return _Grid(packed, weight)
        case BiLevel():
            return _two_levels(packed, weight)
        case Blockwise():
            return _Table(packed, weight)
        case Outliers():
            return _Apart(packed, weight)
        case Sparse(inner=UniformGrid() as inner):
            return _Pruned(packed, _Grid(inner, weight * packed.mask, packed.mask))
        case Sparse(inner=Dense() as inner):
            return _Pruned(packed, _Values(inner, packed.mask))
    raise TypeError(f"a {type(packed).__name__} cannot be tuned")


class _Usual:
    """What a gradient usually is, number for number."""

    def __init__(self, like: Tensor) -> None:
        self.squares = torch.zeros_like(like, dtype=torch.float32)  # their sum

    def share(self, slope: Tensor, pace: Tensor) -> Tensor:
        """Gradients as shares of their usual size, themselves among those."""
        self.squares.addcmul_(slope, slope)
        return (slope / (self.squares * pace[2]).sqrt_().clamp_(min=1e-30)).clamp_(-_FAR, _FAR)


class _Grid:
    """A uniform grid.

    Args:
        alive: bool [out, in], weights that are not pruned; the others stay 0.
    """

    def __init__(self, layer: UniformGrid, weight: Tensor, alive: Tensor | None = None) -> None:
        self._layer, self._alive = layer, alive
        rows, columns = layer.shape
        count = layer.scales.shape[1]
        size = columns if layer.group_size == -1 else layer.group_size
        self._whole = layer.g_idx is None and count * size == columns  # groups side by side, none of them ragged
        self._view = (rows, count, size) if self._whole else (rows, columns)
        self._groups = layer.column_groups()
        self._top = float(2**layer.bits - 1)
        self._first = layer.scales.float().contiguous()
        self._factor = torch.ones_like(self._first)
        middle = torch.full_like(self._first, float(2 ** (layer.bits - 1)))
        self._zero = middle if layer.zeros is None else layer.zeros.float().contiguous()
        level = layer.codes.float().view(self._view) - self._columns(self._zero)
        place = weight.view(self._view) / self._columns(self._first)
        place = torch.where(torch.isfinite(place), place, level)  # a scale of 0
        self._place = place.sub_(level).clamp_(-_START, _START).add_(level)
        self._usual = _Usual(self._place)
        self.keep()

    def _columns(self, statistic: Tensor) -> Tensor:
        """A statistic [out, groups] beside each weight of its group."""
        return statistic[..., None] if self._whole else statistic[:, self._groups]

    def _summed(self, values: Tensor) -> Tensor:
        """Values beside the weights -> [out, groups], their sums."""
        if self._whole:
            return values.sum(-1)
        return torch.zeros_like(self._first).index_add_(1, self._groups, values)

    def _levels(self) -> Tensor:
        zero = self._columns(self._zero.round())
        return torch.maximum(torch.minimum(self._place.round(), self._top - zero), -zero)

    def _scales(self) -> Tensor:
        return (self._first * self._factor).to(self._layer.scales.dtype)

    def write(self, into: Tensor) -> None:
        scales = self._scales()
        into.view(self._view).copy_(self._levels().to(scales.dtype).mul_(self._columns(scales)))

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        if self._fused(gradient, into):
            return self._step_by_kernel(gradient, pace, into)
        slope = gradient.view(self._view).float()
        levels, zero = self._levels(), self._columns(self._zero)
        side = torch.sign(self._first)
        self._factor.sub_(pace[1] * torch.sign(self._summed(slope * levels) * self._first)).clamp_(_LEAST, _MOST)
        if self._layer.zeros is not None:  # what is at an end of its grid moves with the grid's zero
            ends = (levels <= -zero.round()) | (levels >= self._top - zero.round())
            up = torch.sign(self._summed(slope * ends) * side)
            self._zero.add_(pace[0] * up).clamp_(LOWEST_ZERO, self._top)
        self._place.sub_(pace[0] * (self._usual.share(slope, pace) * self._columns(side)))
        zero = self._columns(self._zero)
        low, high = -zero - _CELL, self._top - zero + _CELL
        torch.maximum(torch.minimum(self._place, high), low, out=self._place)
        if self._alive is not None:
            self._place.mul_(self._alive.view(self._view))
        self.write(into)

    def _fused(self, gradient: Tensor, into: Tensor) -> bool:
        """Whether one kernel does a step."""
        if not self._whole or not self._place.is_cuda:
            return False
        from compress.cuda import refine

        return refine.takes(gradient, into, self._view[-1], self._layer.scales.dtype)

    def _step_by_kernel(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        from compress.cuda import refine

        state = refine.State(self._place, self._usual.squares, self._first, self._factor, self._zero)
        rules = refine.Rules(self._layer.bits, self._layer.zeros is not None, _CELL, _LEAST, _MOST, _FAR)
        refine.step(gradient, pace, into, state, self._alive, rules, self._layer.scales.dtype)

    def keep(self) -> None:
        codes = (self._levels() + self._columns(self._zero.round())).to(torch.uint8).view(self._layer.shape)
        self._kept = codes, self._scales(), self._zero.round().to(torch.uint8)

    def packed(self) -> UniformGrid:
        codes, scales, zeros = self._kept
        return replace(self._layer, codes=codes, scales=scales, zeros=None if self._layer.zeros is None else zeros)


class _Codes:
    """Codes on a grid that stays as it is.

    Args:
        place: float32 [out, in], where each weight stands among the numbers 0 .. top.
        made: the layer whose weights are at such whole numbers.
    """

    def __init__(self, place: Tensor, top: int, made: Callable[[Tensor], Packed]) -> None:
        self._place, self._top, self._made = place, top, made
        self._usual = _Usual(place)
        self.keep()

    def _now(self) -> Packed:
        return self._made(self._place.round().clamp_(0, self._top))

    def write(self, into: Tensor) -> None:
        into.copy_(self._now().dequantize())

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        self._place.sub_(pace[0] * self._usual.share(gradient.float(), pace)).clamp_(-_CELL, self._top + _CELL)
        self.write(into)

    def keep(self) -> None:
        self._kept = self._now()

    def packed(self) -> Packed:
        return self._kept


def _two_levels(layer: BiLevel, weight: Tensor) -> _Codes:
    """A two-level grid, whose scales are positive; its statistics are codes themselves and stay."""
    groups = group_index(layer.shape[1], layer.group_size, weight.device)
    codes = layer.codes.float()
    place = weight / layer.scale.values()[:, groups] + layer.zero.values()[:, groups]
    place = torch.where(torch.isfinite(place), place, codes)
    place = place.sub_(codes).clamp_(-_START, _START).add_(codes)
    return _Codes(place, 2**layer.bits - 1, lambda numbers: replace(layer, codes=numbers.to(torch.uint8)))


class _Table(_Codes):
    """Blocks of a table; their scales are tuned where they are stored as they are."""

    def __init__(self, layer: Blockwise, weight: Tensor) -> None:
        values, code = tables.levels(layer.table, weight.device)
        numbers = torch.bucketize(tables.table(layer.table, weight.device), (values[:-1] + values[1:]) / 2)
        number = numbers[layer.codes.int()].float()
        self._layer, self._values = layer, values
        self._factor = torch.ones_like(layer.block_scales())
        unit = self._blocks(weight) / layer.block_scales().clamp(min=1e-38)[:, None]
        unit = unit.flatten()[: weight.numel()].view(weight.shape)
        at = number.long()
        above = values[(at + 1).clamp(max=len(values) - 1)] - values[at]
        below = values[at] - values[(at - 1).clamp(min=0)]
        off = unit - values[at]
        share = off / torch.where(off > 0, above, below).clamp(min=1e-6)

        def made(found: Tensor) -> Packed:
            absmax = layer.absmax if layer.nested_absmax is not None else layer.absmax * self._factor
            return replace(layer, codes=code[found.long()], absmax=absmax)

        super().__init__(number + share.clamp(-_START, _START), len(values) - 1, made)

    def _blocks(self, flat: Tensor) -> Tensor:
        """[blocks, size], the weights as they lie in memory."""
        flat = flat.flatten()
        return F.pad(flat, (0, -len(flat) % self._layer.block_size)).view(-1, self._layer.block_size)

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        now = self._values[self._place.round().clamp(0, self._top).long()]
        slope = (self._blocks(gradient.float()) * self._blocks(now)).sum(1)
        self._factor.sub_(pace[1] * torch.sign(slope)).clamp_(_LEAST, _MOST)
        super().step(gradient, pace, into)


class _Apart:
    """A layer with outliers, which stay."""

    def __init__(self, layer: Outliers, weight: Tensor) -> None:
        self._layer, self._places = layer, layer.positions()
        self._inner = tuned(layer.inner, weight)
        self.keep = self._inner.keep

    def write(self, into: Tensor) -> None:
        self._inner.write(into)
        into[self._places] = self._layer.values.to(into.dtype)

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        gradient.index_put_(self._places, gradient.new_zeros(()))
        self._inner.step(gradient, pace, into)
        into[self._places] = self._layer.values.to(into.dtype)

    def packed(self) -> Outliers:
        return replace(self._layer, inner=self._inner.packed())


def tuned_vector(value: Tensor) -> Tuned:
    """A gain or bias as it is stored; `packed` is a `Dense` of it."""
    return _Values(Dense(value), torch.ones_like(value, dtype=torch.bool))


class _Values:
    """Weights that are stored as they are; a usual gradient moves one by a share of what they usually are."""

    def __init__(self, layer: Dense, alive: Tensor) -> None:
        self._layer, self._alive = layer, alive
        self._value = layer.values.float().clone()
        self._unit = (self._value.square().sum() / alive.sum().clamp(min=1)).sqrt()
        self._usual = _Usual(self._value)
        self.keep()

    def write(self, into: Tensor) -> None:
        into.copy_(self._value.to(self._layer.values.dtype))

    def step(self, gradient: Tensor, pace: Tensor, into: Tensor) -> None:
        self._value.sub_(pace[1] * self._unit * self._usual.share(gradient.float() * self._alive, pace))
        self.write(into)

    def keep(self) -> None:
        self._kept = self._value.to(self._layer.values.dtype, copy=True)  # float32 would be what moves on

    def packed(self) -> Dense:
        return replace(self._layer, values=self._kept)


class _Pruned:
    """A pruned layer: its mask stays."""

    def __init__(self, layer: Sparse, inner: _Grid | _Values) -> None:
        self._layer, self._inner = layer, inner
        self.write, self.step, self.keep = inner.write, inner.step, inner.keep

    def packed(self) -> Sparse:
        return replace(self._layer, inner=self._inner.packed())
