"""Values as they are, in the dtype of the run: what a pass stores that only prunes or moves weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress.types import Storage, dense_linear


@dataclass(frozen=True)
class Dense:
    """A linear layer whose weights are not quantised.

    Attributes:
        values: [out, in] in the dtype that is stored.
    """

    kind: ClassVar[str] = "dense"
    parts: ClassVar[tuple[str, ...]] = ("values",)

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def storage(self) -> Storage:
        """Bits 16 stand for "as they are": a run in float32 stores 32."""
        return Storage(self.kind, 16)

    def dequantize(self) -> Tensor:
        return self.values

    def rows(self, start: int, stop: int) -> Self:
        return replace(self, values=self.values[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        return cls(tensors["values"])

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        return shape[0] * shape[1] * dtype.itemsize

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)
