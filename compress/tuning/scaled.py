"""Packed layers with a factor on each of their scales, by which their weights can be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.packed.blockwise import Blockwise
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.types import Packed


def scalable(packed: Packed) -> bool:
    """Whether `Scaled` takes a layer: one whose weights are its scales times something that stays."""
    if isinstance(packed, Outliers | Sparse):
        return scalable(packed.inner)
    if isinstance(packed, Blockwise):
        return packed.nested_absmax is None
    return isinstance(packed, UniformGrid)


class Scaled:
    """A layer that `scalable` names.

    Args:
        base: [out, in], its weights in the compute dtype; kept, not changed.

    Attributes:
        factor: float32, shaped as the layer's scales; 1 at first.
    """

    def __init__(self, packed: Packed, base: Tensor) -> None:
        self._base = base
        self._scales = _scales(packed)
        self._spread = _spread(packed)
        self._fixed = None
        if isinstance(packed, Outliers):
            self._fixed = torch.zeros_like(self._base, dtype=torch.bool)
            self._fixed[packed.positions()] = True
        self.factor = torch.ones_like(self._scales, dtype=torch.float32).requires_grad_()

    def weight(self) -> Tensor:
        """[out, in]: the weights as they would be stored now; the rounding of scales counts as if it had slope 1."""
        scales = self._scales.float()
        with torch.no_grad():
            rounded = (scales * self.factor).to(self._scales.dtype).float() / scales
            rounded = torch.where(torch.isfinite(rounded), rounded, 1.0)
            step = rounded - self.factor
        grown = self._spread(self.factor + step)  # in float32: bfloat16 would take away most of a move
        weight = (self._base.float() * grown).to(self._base.dtype)
        return weight if self._fixed is None else torch.where(self._fixed, self._base, weight)


def with_factor(packed: Packed, factor: Tensor) -> Packed:
    """A layer with its scales times a factor, each rounded to the dtype in which it is stored."""
    if isinstance(packed, Outliers | Sparse):
        whole: Any = packed
        return cast(Packed, replace(whole, inner=with_factor(packed.inner, factor)))
    scales = _scales(packed)
    grown = (scales.float() * factor.to(scales.device)).to(scales.dtype)
    if isinstance(packed, Blockwise):
        return replace(packed, absmax=grown)
    assert isinstance(packed, UniformGrid)
    return replace(packed, scales=grown)


def _scales(packed: Packed) -> Tensor:
    if isinstance(packed, Outliers | Sparse):
        return _scales(packed.inner)
    if isinstance(packed, Blockwise):
        return packed.absmax
    assert isinstance(packed, UniformGrid)
    return packed.scales


def _spread(packed: Packed) -> Callable[[Tensor], Tensor]:
    """From a number a scale to one a weight, [out, in]."""
    if isinstance(packed, Outliers | Sparse):
        return _spread(packed.inner)
    rows, columns = packed.shape
    if isinstance(packed, Blockwise):
        size = packed.block_size
        return lambda x: x.flatten().repeat_interleave(size)[: rows * columns].view(rows, columns)
    assert isinstance(packed, UniformGrid)
    groups, count, size = packed.column_groups(), packed.scales.shape[1], packed.group_size
    if packed.g_idx is None and size != -1 and count * size == columns:  # a gather's gradient is slow, and in no order
        return lambda x: x[..., None].expand(rows, count, size).reshape(rows, columns)
    if count == 1:
        return lambda x: x.expand(rows, columns)
    if packed.g_idx is None:
        return lambda x: F.pad(x[..., None].expand(rows, count, size).reshape(rows, -1), (0, columns - count * size))
    chosen = F.one_hot(groups.long(), count).t().float()
    return lambda x: x @ chosen
