"""What a format is: the protocol, and the little that formats share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.errors import CompressError
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


@dataclass(frozen=True)
class Held:
    """A layer that will be stored packed.

    Attributes:
        name: as on disk, without ".weight".
        module: the model's module (or fused experts parameter) that it belongs to.
        shape: (out_features, in_features).
        dtype: of the dequantised weight.
    """

    name: str
    module: str
    shape: tuple[int, int]
    storage: Storage
    dtype: torch.dtype


class Format(Protocol):
    """An on-disk format of the ecosystem: two verbs, a refusal and a config. Never sees a model.

    `config` is always the checkpoint's quantization_config, `name` a layer's name on disk without ".weight".

    Attributes:
        suffixes: all suffixes that the tensors of a packed layer may have; one may hold dots ("weight.absmax").
        container: what the tensors lie in: "safetensors", or "gguf".
        quantised: False for ordinary weights, of which config.json says nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def suffixes(self) -> tuple[str, ...]: ...
    @property
    def container(self) -> str: ...
    @property
    def quantised(self) -> bool: ...
    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """The dtype in which scales are stored beside a model of this dtype."""
        ...

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        """Why this layer cannot be held, with what would work; None if it can. Asked before any work starts."""
        ...

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        """Bytes on disk of a layer, before it exists."""
        ...

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        """Suffix -> tensor."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Packed:
        """Exact inverse of `pack`."""
        ...

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        """The packed layers of a checkpoint with tensors of these names. Raises CompressError when there are none."""
        ...

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out_features, in_features) of a packed layer from the shapes of its tensors."""
        ...

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        """The dtype in which a packed layer dequantises."""
        ...

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        """How a packed layer is stored, from the shapes of its tensors and the config alone."""
        ...

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        """How a packed layer's input is quantised, see `Storage.activations`."""
        ...

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        """quantization_config.

        Args:
            ignored: module names of linear layers that stay dense.
            dense_on_load: some module computes with its weight in its own way, so a reader must not keep it packed.

        Raises:
            CompressError: a mix of layers that the format cannot tell apart.
        """
        ...

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files to write beside config.json."""
        ...


@runtime_checkable
class Describing(Protocol):
    """A format some of whose tensors say what no header does: the shape of a layer, its block size."""

    def described(
        self,
        config: Mapping[str, Any],
        layers: Iterable[str],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> Mapping[str, Any]:
        """The quantization_config as `shape`, `dtype` and `storage` of this format want it.

        Args:
            layers: the packed ones.
            shapes: of every stored tensor.
            read: a stored tensor by its name.
        """
        ...


def marked(names: Iterable[str], mark: str, format: str) -> set[str]:
    """The layers that have a tensor with the suffix `mark`. Raises CompressError when there are none."""
    end = "." + mark
    found = {n[: -len(end)] for n in names if n.endswith(end)}
    if not found:
        what = f"config.json declares {format} but no tensor ends in {end}"
        raise CompressError(what, "", "its quantization_config does not belong to its tensors: download it again")
    return found


def divisors_hint(columns: int, asked: int) -> str:
    """Group sizes near `asked` that divide `columns`, as a remedy."""
    fits = [g for g in range(8, columns) if columns % g == 0]
    near = sorted(sorted(fits, key=lambda g: abs(g - asked))[:3])
    return "use --group-size " + ", ".join(map(str, near)) + (" or -1" if near else "-1")
