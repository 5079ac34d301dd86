"""Sums over the inputs of a layer, or of layers that share them, as they come, and what they are in the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.blocks import Linear
from compress.types import LayerStats, Needs, Past

#: of so many rows the last is held out of a correction of the past
_HELD = 4


@dataclass
class Inputs:
    """Layers with one common input, in the order in which the block runs them.

    Attributes:
        linears: they share in_features and the statistics.
        stats: of their input.
        weighted: tokens count by what an error there does.
    """

    linears: list[Linear]
    stats: LayerStats
    weighted: bool = False

    @property
    def stage(self) -> str:
        """Layers of one stage run side by side: all experts' first projections are one stage."""
        return self.linears[0].param


@dataclass
class Beside:
    """Sums over inputs of the compressed model and of the original one, where both are fed the same rows."""

    cross: Tensor
    held_cross: Tensor
    held: Tensor
    held_mass: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device) -> Beside:
        cross, held_cross, held = (torch.zeros(width, width, device=device) for _ in range(3))
        return cls(cross, held_cross, held, torch.zeros((), dtype=torch.float64, device=device))

    def add(self, first: int, original: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """x, original: [rows, seq, in]; weights: float32 [rows, seq]; first: number of the first row among all."""
        accumulate(self.cross, x, original, weights)
        held = slice((-1 - first) % _HELD, None, _HELD)
        if held.start >= len(x):
            return
        part = None if weights is None else weights[held]
        accumulate(self.held_cross, x[held], original[held], part)
        accumulate(self.held, x[held], None, part)
        self.held_mass += x[held].numel() // x.shape[-1] if part is None else part.sum(dtype=torch.float64)

    def past(self, hessian: Tensor, mass: float) -> Past | None:
        """None where no row that counts was held out, or every one that does.

        Args:
            hessian: the mean of x x^T.
            mass: what all tokens count.
        """
        held_mass = float(self.held_mass)
        if not 0 < held_mass < mass:
            return None
        held = self.held / held_mass
        return Past(self.cross / mass - hessian, self.held_cross / held_mass - held, held, held_mass / mass)


@dataclass
class Sum:
    """Of the inputs of layers that share them.

    Attributes:
        seen: inputs of the first batch, kept so that addresses stay unique.
        mass: of the tokens' weights.
        beside: what the original model makes of the same rows, where a layer's past is to be corrected.
    """

    linears: list[Linear]
    needs: Needs
    tokens: int = 0
    seen: list[Tensor] = field(default_factory=list)
    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    mean: Tensor | None = None
    above: Tensor | None = None
    mass: Tensor | None = None
    beside: Beside | None = None

    def add(self, x: Tensor, first: int = 0, original: Tensor | None = None) -> None:
        """Inputs [..., in]; first, original: as of `Beside.add`, for a Hessian in which tokens count alike."""
        flat = x.reshape(-1, x.shape[-1])
        if not len(flat):
            return
        self.tokens += len(flat)
        if self.needs.hessian and not self.needs.weighted:
            self._add_squares(x, None, first, original)
        if self.needs.ranges:
            size = flat.abs()
            self.absmax = _joined(torch.maximum, self.absmax, size.amax(0).float())
            self.mean_abs = _joined(torch.add, self.mean_abs, size.sum(0, dtype=torch.float32))
            self.mean = _joined(torch.add, self.mean, flat.sum(0, dtype=torch.float32))
        if self.needs.above is not None:
            self.above = _joined(torch.add, self.above, (flat.abs() >= self.needs.above).sum(0, dtype=torch.float32))

    def add_weighted(self, x: Tensor, weights: Tensor, first: int = 0, original: Tensor | None = None) -> None:
        """To the Hessian alone; weights: float32 [...]."""
        if self.mass is None:
            self.mass = torch.zeros((), dtype=torch.float64, device=x.device)
        self.mass += weights.sum(dtype=torch.float64)
        self._add_squares(x, weights, first, original)

    def _add_squares(self, x: Tensor, weights: Tensor | None, first: int, original: Tensor | None) -> None:
        if self.hessian is None:
            self.hessian = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
        accumulate(self.hessian, x, None, weights)
        if original is not None:
            if self.beside is None:
                self.beside = Beside.empty(x.shape[-1], x.device)
            self.beside.add(first, original, x, weights)

    def finish(self, width: int, device: torch.device) -> tuple[Inputs, Tensor]:
        """The sums as means, in their place, and whether they are finite (bool, on the device).

        Statistics that no input ever reached are zeros.
        """
        count = max(self.tokens, 1)
        none = torch.zeros(width, device=device)

        def mean(total: Tensor | None, wanted: bool) -> Tensor | None:
            if not wanted:
                return None
            return none if total is None else total.div_(float(count))

        hessian: Tensor | None = None
        past: Past | None = None
        if self.needs.hessian:
            hessian = torch.zeros(width, width, device=device) if self.hessian is None else self.hessian
            hessian.div_(float(count) if self.mass is None else self.mass.float().clamp(min=1e-38))
            if self.beside is not None:
                past = self.beside.past(hessian, count if self.mass is None else float(self.mass))
        absmax = (none if self.absmax is None else self.absmax) if self.needs.ranges else None
        found = LayerStats(
            self.tokens,
            hessian,
            absmax,
            mean(self.mean_abs, self.needs.ranges),
            mean(self.mean, self.needs.ranges),
            mean(self.above, self.needs.above is not None),
            past=past,
        )
        looked = [hessian.diagonal() if hessian is not None else none, none if absmax is None else absmax]
        finite = torch.stack([torch.isfinite(x).all() for x in looked]).all()
        return Inputs(self.linears, found, self.mass is not None), finite


def _joined(how: Callable[[Tensor, Tensor], Tensor], old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else how(old, new)


def accumulate(total: Tensor, x: Tensor, other: Tensor | None = None, weights: Tensor | None = None) -> None:
    """total += y^T x in float32, y = x unless another is given. total: float32 [in, in], x, y: [..., in].

    weights: float32 [...], what each token counts.

    On a GPU 16-bit activations are multiplied as they are: their products are exact in float32, and the sum runs in
    float32. On a CPU they are widened first, since its 16-bit product would round the sum.
    """
    x = x.reshape(-1, x.shape[-1])
    other = None if other is None else other.reshape(-1, other.shape[-1])
    if weights is not None:
        return _accumulate_weighted(total, x, other, weights.flatten())
    y = x if other is None else other
    if x.device.type == "cuda" and x.dtype != torch.float32:
        total += torch.mm(y.t(), x, out_dtype=torch.float32)
    else:
        total.addmm_(y.float().t(), x.float())


def _accumulate_weighted(total: Tensor, x: Tensor, other: Tensor | None, weights: Tensor) -> None:
    root = weights.sqrt()
    top = root.amax().clamp_(min=1e-30)
    share = (root / top)[:, None]  # at most 1, so that 16 bits hold what they multiply
    if x.device.type == "cuda" and x.dtype != torch.float32:
        share = share.to(x.dtype)  # both sides by the same number: the sum is of squares, whatever it was rounded to
        scaled = x * share
        product = torch.mm((scaled if other is None else other * share).t(), scaled, out_dtype=torch.float32)
    else:
        scaled = x.float() * share
        product = (scaled if other is None else other.float() * share).t() @ scaled
    total.addcmul_(product, top.square())
