"""The two models, each whole on the device: the original, which is only asked, and the packed one, which learns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.tuning.scaled import Scaled, scalable
from compress.weights import Weights


def load(weights: Weights, dtype: torch.dtype, device: torch.device, trust_remote_code: bool) -> BlockModel:
    """A model with all its blocks. Raises CompressError where the device has no room for them."""
    model = BlockModel(weights, dtype, device, trust_remote_code)
    try:
        model.prepare()
        for block in range(len(model.block_names)):
            model.load(block)
    except torch.OutOfMemoryError as error:
        what = "the model does not fit beside the other one: end-to-end tuning needs both whole"
        raise CompressError(what, str(device), "use a device with more memory, or --device cpu") from error
    return model


class Student:
    """The packed model as a function of factors on its scales and on the gains of its norms.

    Attributes:
        scaled: by layer.
        gains: float32 factors by the name of a gain on disk; 1 at first.
    """

    def __init__(self, model: BlockModel) -> None:
        self.model = model
        self.scaled: dict[str, Scaled] = {}
        self.gains: dict[str, Tensor] = {}
        self._linears: list[list[Linear]] = []
        self._vectors: list[dict[str, str]] = []
        for block in range(len(model.block_names)):
            mine = [x for x in model.linears(block) if x.name in model.weights.packed]
            self._linears.append([])
            for linear in mine:
                packed = model.weights.read_packed(linear.name, model.device)
                if scalable(packed) and not packed.storage.activations:
                    self.scaled[linear.name] = Scaled(packed, model.weight(linear))
                    self._linears[-1].append(linear)
            found = {name: param for name, param in model.vectors(block).items() if not name.endswith("bias")}
            self._vectors.append(found)
            for name, param in found.items():
                value = model.model.get_parameter(param)
                self.gains[name] = torch.ones_like(value, dtype=torch.float32).requires_grad_()

    @property
    def factors(self) -> list[Tensor]:
        """All factors, block by block."""
        return [x for block in range(len(self.model.block_names)) for x in self.factors_of(block)]

    def factors_of(self, block: int) -> list[Tensor]:
        """Those of a block's scales, then those of its gains."""
        scales = [self.scaled[linear.name].factor for linear in self._linears[block]]
        return scales + [self.gains[name] for name in self._vectors[block]]

    def block(self, block: int, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """What leaves a block, differentiable in its factors and in what enters it.

        Args:
            shape: rows and tokens a row.
        """
        weights = [(linear, self.scaled[linear.name].weight()) for linear in self._linears[block]]
        others = {param: self.gain(name) for name, param in self._vectors[block].items()}
        return self.model.output(block, hidden, shape, weights, others)

    def gains_of(self, block: int) -> list[str]:
        """The gains of a block by their names on disk; none of the head."""
        return list(self._vectors[block]) if block < len(self._vectors) else []

    def gain(self, name: str) -> Tensor:
        """A gain times its factor, as it would be stored; the rounding counts as if it had slope 1."""
        value = self._stored(name).float()
        grown = value * self.gains[name]
        rounded = grown.detach().to(self.model.weights.dtype(name)).float()
        return (grown + (rounded - grown.detach())).to(self.model.dtype)

    def changed(self, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gains times factors, by name, in the dtype in which they are stored."""
        return {n: (self._stored(n).float() * f).to(self.model.weights.dtype(n)) for n, f in factors.items()}

    def _stored(self, name: str) -> Tensor:
        param = next(mine[name] for mine in self._vectors if name in mine)
        value: Tensor = self.model.model.get_parameter(param).data
        return value
