"""The vocabulary that passes, packed kinds, formats and the pipeline share. Imports torch alone."""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor


class Needs(enum.Flag):
    """Which statistics of a layer's inputs a pass wants."""

    NOTHING = 0
    HESSIAN = enum.auto()


@dataclass(frozen=True)
class LayerStats:
    """What calibration learned about the inputs of one linear layer.

    Attributes:
        tokens: how many input vectors were seen.
        hessian: float32 [in, in], the mean of x x^T over those vectors (GPTQ's H up to its factor 2), or None.
    """

    tokens: int
    hessian: Tensor | None = None


@dataclass(frozen=True)
class Storage:
    """How a pass will store a layer, known before it runs: what formats are asked `why_not` about.

    Attributes:
        kind: name in the KINDS table.
        bits: bits a code.
        group_size: input columns that share a scale; -1 for the whole row.
        symmetric: no zero points are stored.
        ordered_groups: groups follow an activation order, so a g_idx tensor must be stored.
    """

    kind: str
    bits: int
    group_size: int
    symmetric: bool
    ordered_groups: bool = False


@runtime_checkable
class Packed(Protocol):
    """One linear layer as it will be stored. `dequantize` in plain torch defines the kind."""

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        ...

    @property
    def storage(self) -> Storage: ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored, bit-packed."""
        ...

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int]) -> Self:
        """Exact inverse of `tensors`."""
        ...

    def dequantize(self) -> Tensor:
        """Dense weight [out, in] in the dtype of the stored scales, to the last bit what a client computes."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """The layer made of output rows start..stop-1."""
        ...


def bits_per_weight(packed: Packed) -> float:
    """Stored bits for each weight, counted from the bytes of the tensors that are stored."""
    stored = sum(t.numel() * t.element_size() for t in packed.tensors().values())
    return 8.0 * stored / (packed.shape[0] * packed.shape[1])


@dataclass(frozen=True)
class Solved:
    """A pass's answer for one weight matrix.

    Attributes:
        packed: the stored form.
        row_loss: float32 [out], for each output row (w - q) H (w - q)^T, or the plain squared error without H.
        row_norm: float32 [out], the same with q = 0, so that row_loss / row_norm is a relative error.
        notes: what the report must say: a raised damp, rows that fell back, dead columns.
    """

    packed: Packed
    row_loss: Tensor
    row_norm: Tensor
    notes: tuple[str, ...] = ()


class Pass(Protocol):
    """A compression method: a frozen dataclass whose fields are its settings (and the command's options)."""

    name: ClassVar[str]
    needs: ClassVar[Needs]

    def settle(self, in_features: Collection[int]) -> Self:
        """Fill settings that depend on the layers' shapes. Raises CompressError when none fits."""
        ...

    @property
    def storage(self) -> Storage: ...

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Compress one weight matrix.

        Args:
            weight: [out, in], any float dtype; not modified. Rows are independent of each other.
            stats: statistics of the layer's inputs, holding at least what `needs` names.
            scale_dtype: the dtype in which scales will be stored.
        """
        ...


def settings(value: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as plain JSON values."""
    import dataclasses

    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
