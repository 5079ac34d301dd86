"""Fused experts that stay packed: what an experts module finds in place of its 3-D parameter.

transformers keeps the experts of a mixture in one parameter [experts, out, in] a projection. Its eager forward takes
one expert's matrix after the other, `F.linear(x, self.gate_up_proj[expert])`, so an object that gives a matrix when it
is indexed can stand for the parameter, and only experts that a token reaches are ever unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.linear import PackedLinear


class DenseSlice(nn.Module):
    """An expert's projection that is not packed. weight: [out, in]."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class FusedExperts:
    """Stands for a parameter [experts, out, in].

    Args:
        slices: for each expert the layers whose rows, one below the other, are its matrix: PackedLinear, or DenseSlice
            for a projection that is stored dense. They are modules of the experts module, which moves them.
        dtype: of a matrix that is asked for as a tensor.
    """

    def __init__(self, slices: Sequence[Sequence[PackedLinear | DenseSlice]], dtype: torch.dtype) -> None:
        self._slices = [list(layers) for layers in slices]
        self.dtype = dtype

    def __getitem__(self, index: int | Tensor) -> ExpertWeight:
        return ExpertWeight(self._slices[int(index)], self.dtype)

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def shape(self) -> torch.Size:
        layers = self._slices[0]
        return torch.Size([len(self), sum(m.out_features for m in layers), layers[0].in_features])

    @property
    def device(self) -> torch.device:
        layer = self._slices[0][0]
        return next(t.device for t in (*layer.buffers(), *layer.parameters()))

    def dim(self) -> int:
        """As of the tensor that it stands for."""
        return 3

    ndim = property(dim)


class ExpertWeight:
    """One expert's matrix [out, in]: F.linear computes with its packed layers, anything else sees a dense tensor."""

    def __init__(self, layers: Sequence[PackedLinear | DenseSlice], dtype: torch.dtype) -> None:
        self._layers = layers
        self._dtype = dtype

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear with this weight: one product where the layers would make dense weights anyway."""
        if any(isinstance(m, PackedLinear) and m.computes_packed(x) for m in self._layers):
            out = torch.cat([layer(x) for layer in self._layers], -1)
            return out if bias is None else out + bias
        return F.linear(x, self.dense(x.dtype), bias)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The dequantised matrix [out, in]."""
        found = self._dtype if dtype is None else dtype
        parts = [layer.dense(found) for layer in self._layers]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func is F.linear and not isinstance(args[0], cls):
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | named
            if isinstance(given["weight"], cls):
                return given["weight"].linear(given["input"], given.get("bias"))
        plain = [a.dense() if isinstance(a, cls) else a for a in args]
        return func(*plain, **{k: v.dense() if isinstance(v, cls) else v for k, v in named.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)
