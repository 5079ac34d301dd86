"""How far each layer and each block is from the original's: a walk through all models side by side, block by block.

A layer's error is that of its output on the original's own inputs, ||W x - W' x|| / ||W x|| over all tokens of the
text, so errors of the layers before it are not in it. With H the mean of x x^T it needs no output: the mean of
||W x||^2 is the trace of W H W^T. Biases and what a layer does to its inputs (8-bit ones) are left out.

A block's error is that of the hidden states behind it, ||h - h'|| / ||h||, each model's own, so there errors add up.

The original's blocks run twice, once for the inputs of their layers. The device holds two blocks: the original's and
one model's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.evaluate.states import Step
from compress.hidden import Activations
from compress.stats import collect
from compress.sums import Inputs
from compress.types import Needs


@dataclass(frozen=True)
class LayerError:
    """One layer's. `kind`: how the model stores it, "dense" or a packed kind; error None where no token came."""

    name: str
    block: int
    kind: str
    error: float | None


@dataclass
class Distances:
    """One model's distance from the original, layer by layer and block by block."""

    layers: list[LayerError] = field(default_factory=list)
    blocks: list[float | None] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        blocks = [{"block": i, "error": error} for i, error in enumerate(self.blocks)]
        return {"layers": [vars(layer) for layer in self.layers], "blocks": blocks}


def check_alike(base: BlockModel, model: BlockModel) -> None:
    """Raise CompressError unless the models have the same layers."""

    def shapes(of: BlockModel) -> list[dict[Any, tuple[int, int]]]:
        return [{_place(x): x.shape for x in of.linears(block)} for block in range(len(of.block_names))]

    if shapes(base) != shapes(model):
        what = f"its layers are not those of {base.weights.folder}"
        raise CompressError(what, str(model.weights.folder), "leave out --layers, or compare with its own original")


def walk(
    base: BlockModel, base_flow: Activations, others: Sequence[tuple[BlockModel, Activations]], step: Step
) -> list[Distances]:
    """Bring all flows, which have entered their models, behind the last block.

    Returns:
        of each of `others` its distances from the base.
    """
    found = [Distances() for _ in others]
    total = len(base.block_names)
    for block in range(total):
        base.load(block)
        linears = base.linears(block)
        inputs = {
            _place(x): one for one in collect(base, block, linears, base_flow, Needs(hessian=True)) for x in one.linears
        }
        base_flow.advance(block)
        for done, ((model, flow), distances) in enumerate(zip(others, found, strict=True)):
            model.load(block)
            mine = {_place(x): x for x in model.linears(block)}
            distances.layers += _layer_errors(base, model, block, linears, mine, inputs)
            flow.advance(block)
            model.free(block)
            distances.blocks.append(_apart(base_flow, flow))
            step(block * len(others) + done + 1, total * len(others))
        del inputs
        base.free(block)
    return found


def _place(linear: Linear) -> tuple[str, int | None, int]:
    """Where a layer is in the model, whatever the disk calls it."""
    return linear.param, linear.expert, linear.first_row


def _layer_errors(
    base: BlockModel,
    model: BlockModel,
    block: int,
    linears: Sequence[Linear],
    mine: dict[tuple[str, int | None, int], Linear],
    inputs: dict[tuple[str, int | None, int], Inputs],
) -> list[LayerError]:
    """Of one block, loaded in both."""
    errors = []
    for linear in linears:
        other, stats = mine[_place(linear)], inputs[_place(linear)].stats
        assert stats.hessian is not None
        errors.append(relative_error(base.weight(linear), model.weight(other), stats.hessian))
    known = torch.stack(errors).tolist()
    return [
        LayerError(linear.name, block, _kind(model, mine[_place(linear)]), error if math.isfinite(error) else None)
        for linear, error in zip(linears, known, strict=True)
    ]


def relative_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """sqrt(tr(E H E^T) / tr(W H W^T)), E = W - W': a float64 scalar, NaN where nothing was there to multiply.

    Args:
        weight, other: [out, in].
        hessian: float32 [in, in], the mean of x x^T.
    """
    original = weight.float()
    return (_energy(original - other.float(), hessian) / _energy(original, hessian)).sqrt()


def _energy(weight: Tensor, hessian: Tensor) -> Tensor:
    """tr(W H W^T): the mean squared length of W x."""
    return ((weight @ hessian) * weight).sum(dtype=torch.float64).clamp(min=0)


def _kind(model: BlockModel, linear: Linear) -> str:
    packed = linear.name in model.weights.packed
    return model.weights.storage(linear.name).kind if packed else "dense"


def _apart(base: Activations, flow: Activations) -> float | None:
    """||h - h'|| / ||h|| over all hidden states of two flows."""
    sums = torch.zeros(2, dtype=torch.float64)
    for i in range(len(base)):
        mine, other = base.states(i).float(), flow.states(i).float()
        if mine.shape != other.shape:
            return None
        sums += torch.stack(
            [(mine - other).square().sum(dtype=torch.float64), mine.square().sum(dtype=torch.float64)]
        ).cpu()
    return float((sums[0] / sums[1]).sqrt()) if sums[1] > 0 else None
