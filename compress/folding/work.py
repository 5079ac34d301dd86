"""The weights of a loaded block while folding rescales them: float32 values, stored roundings, statistics, undo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.folding.tap import parts_of
from compress.sums import Inputs
from compress.types import LayerStats


class Work:
    """The block's weights while they are rescaled: values in float32, what changed, how to undo the last edge."""

    def __init__(self, model: BlockModel, groups: Sequence[Inputs], weights: dict[str, Tensor]) -> None:
        self.model = model
        self.weights = weights
        self.chosen = {x.name for g in groups for x in g.linears}
        self.groups = {x.name: i for i, g in enumerate(groups) for x in g.linears}
        self.stats = [g.stats for g in groups]
        self.residue = 0.0
        self._given = list(groups)
        self._touched: dict[str, Linear | str] = {}  # disk name -> dense matrix, or parameter
        self._undo: list[Callable[[], object]] = []

    def begin(self) -> None:
        """What is put from here on is what `undo` takes back."""
        touched, stats, residue, weights = dict(self._touched), list(self.stats), self.residue, dict(self.weights)

        def restore() -> None:
            self._touched, self.stats, self.residue, self.weights = touched, stats, residue, weights

        self._undo = [restore]

    def undo(self) -> None:
        for step in reversed(self._undo):
            step()
        self.accept()

    def accept(self) -> None:
        """Keep what was put since `begin`; the old values are let go."""
        self._undo = []

    def get(self, linear: Linear) -> Tensor:
        """float32 [out, in]; not to be modified."""
        found = self.weights.get(linear.name)
        return self.model.weight(linear).float() if found is None else found

    def put(self, linear: Linear, value: Tensor) -> None:
        """Replace a matrix by float32 [out, in]."""
        old = self.model.weight(linear).clone()
        self._undo.append(lambda: self.model.set_weight(linear, old))
        if linear.name not in self.chosen:
            value = self._stored(linear.name + ".weight", value)
            self._touched[linear.name + ".weight"] = linear
        elif self.model.dtype != torch.float32:
            self.weights[linear.name] = value
        self.model.set_weight(linear, value)

    def vector(self, param: str) -> Tensor:
        """float32, a norm's gain or a bias."""
        value: Tensor = self.model.model.get_parameter(param).data
        return value.float()

    def rounded(self, param: str, value: Tensor) -> Tensor:
        """float32: a parameter's value as the file will hold it."""
        return self._stored(parts_of(self.model, param)[0], value)

    def put_vector(self, param: str, value: Tensor) -> None:
        """Replace a gain or a bias."""
        data = self.model.model.get_parameter(param).data
        old = data.clone()
        self._undo.append(lambda: data.copy_(old))
        data.copy_(self.rounded(param, value))
        self._touched[parts_of(self.model, param)[0]] = param

    def put_bias(self, param: str, value: Tensor) -> None:
        """Replace a bias, and remember how far rounding took it."""
        self.put_vector(param, value)
        top = float(value.abs().max())
        if top > 0:
            self.residue = max(self.residue, float((self.vector(param) - value).abs().max()) / top)

    def _stored(self, disk: str, value: Tensor) -> Tensor:
        """Rounded to the dtype of the block, then to that of the file: what both hold."""
        return value.to(self.model.dtype).to(self.model.weights.dtype(disk)).float()

    def dense16(self, linears: Sequence[Linear]) -> bool:
        """Whether one of the matrices stays as it is, in 16 bits."""
        return any(
            x.name not in self.chosen
            and min(self.model.dtype.itemsize, self.model.weights.dtype(x.name + ".weight").itemsize) < 4
            for x in linears
        )

    def rescale_stats(self, linears: Sequence[Linear], s: Tensor) -> None:
        for i in {self.groups[x.name] for x in linears if x.name in self.chosen}:
            self.stats[i] = rescaled(self.stats[i], s)

    def inputs(self) -> list[Inputs]:
        return [Inputs(g.linears, s) for g, s in zip(self._given, self.stats, strict=True)]

    def dense(self) -> dict[str, Tensor]:
        """Every dense tensor that changed, as it is to be stored."""
        out = {}
        for disk, what in self._touched.items():
            if isinstance(what, str):
                value = self.model.model.get_parameter(what).data
            else:
                value = self.model.weight(what)
                value = value.t() if what.transposed else value
            out[disk] = value.to(self.model.weights.dtype(disk)).contiguous().cpu()
        return out


def rescaled(stats: LayerStats, s: Tensor) -> LayerStats:
    """Statistics of the channels divided by s [in]; `above` and `spread` do not follow."""
    return replace(
        stats,
        hessian=None if stats.hessian is None else stats.hessian / s / s[:, None],
        absmax=None if stats.absmax is None else stats.absmax / s,
        mean_abs=None if stats.mean_abs is None else stats.mean_abs / s,
        mean=None if stats.mean is None else stats.mean / s,
        above=None,
        spread=None,
    )


def joined(stats: Sequence[LayerStats]) -> LayerStats:
    """The statistics of all tokens of several groups that read one tensor, each some of its tokens (experts).

    A token that went to several experts counts as often.
    """
    if len(stats) == 1:
        return stats[0]
    tokens = sum(s.tokens for s in stats)

    def mean(parts: list[Tensor | None]) -> Tensor | None:
        known = [(x, s.tokens / max(tokens, 1)) for x, s in zip(parts, stats, strict=True) if x is not None]
        if len(known) < len(stats):
            return None
        total = torch.zeros_like(known[0][0])
        for x, share in known:
            total.add_(x, alpha=share)
        return total

    tops = [s.absmax for s in stats if s.absmax is not None]
    return LayerStats(
        tokens,
        mean([s.hessian for s in stats]),
        torch.stack(tops).amax(0) if len(tops) == len(stats) else None,
        mean([s.mean_abs for s in stats]),
        mean([s.mean for s in stats]),
    )
