"""What a format is: the protocol, and the little that formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage


@dataclass(frozen=True)
class LayerShape:
    """What a format may know of a layer before it is compressed.

    Attributes:
        name: as on disk, without ".weight".
        transposed: the model keeps it as [in, out] (GPT-2's Conv1D).
        expert: it is a slice of a fused 3-D experts tensor.
        head: it is the output head.
    """

    name: str
    out_features: int
    in_features: int
    transposed: bool = False
    expert: bool = False
    head: bool = False


class Format(Protocol):
    """An on-disk format of the ecosystem: two verbs, a refusal and a config. Never sees a model.

    Attributes:
        main: the suffix that marks a packed layer among tensor names.
        suffixes: all suffixes of a packed layer.
    """

    @property
    def name(self) -> str: ...
    @property
    def main(self) -> str: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...
    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which scales are stored beside a model of this dtype."""
        ...

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        """Why this layer cannot be held, with what would work; None if it can. Asked before any work starts."""
        ...

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        """Suffix -> tensor."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> UniformGrid:
        """Exact inverse of `pack`; `config` is quantization_config."""
        ...

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out_features, in_features) of a packed layer from the shapes of its tensors."""
        ...

    def config(
        self, storages: Mapping[str, Storage], ignored: Sequence[str], dense_on_load: bool = False
    ) -> dict[str, Any]:
        """quantization_config.

        Args:
            storages: by module name.
            ignored: module names of linear layers that stay dense.
            dense_on_load: some module computes with its weight in its own way, so a reader must not keep it packed.
        """
        ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files to write beside config.json."""
        ...


def divisors_hint(columns: int, asked: int) -> str:
    """Group sizes near `asked` that divide `columns`, as a remedy."""
    fits = [g for g in range(8, columns) if columns % g == 0]
    near = sorted(sorted(fits, key=lambda g: abs(g - asked))[:3])
    return "use --group-size " + ", ".join(map(str, near)) + (" or -1" if near else "-1")
