"""Fast layouts of packed layers: what a kernel is to a layer, and which one a layer gets on a device."""

from __future__ import annotations

import os
from typing import ClassVar, Protocol, Self

import torch
from torch import Tensor

from compress.types import Packed, Storage


class Kernel(Protocol):
    """A layer in a layout that a kernel wants, instead of `Packed.tensors`: a frozen dataclass of tensors.

    Attributes:
        dtypes: of inputs that it takes; empty for any.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]]

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        """Why a layer cannot have it; None if it can, as far as that can be told before its tensors are seen."""
        ...

    @classmethod
    def of(cls, packed: Packed) -> Self | None:
        """The layer in this layout; None if its tensors turn out not to fit."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, without bias."""
        ...

    def restore(self) -> Packed:
        """Exact inverse of `of`."""
        ...

    def tensors(self) -> dict[str, Tensor]: ...


def switched_off() -> bool:
    """Whether COMPRESS_KERNELS=0 (off, false, no) stands in the environment."""
    return os.environ.get("COMPRESS_KERNELS", "") in ("0", "off", "false", "no")


def find(storage: Storage, shape: tuple[int, int], device: torch.device) -> type[Kernel] | None:
    """The kernel for a layer on a device, if there is one."""
    if device.type == "cpu":
        from compress import cpu

        return cpu.find(storage, shape)
    if device.type == "cuda":
        from compress.cuda import kinds

        return kinds.find(storage, shape, device)
    return None
