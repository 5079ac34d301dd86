"""A checkpoint as dense weights, packed layers dequantised on the way: what a model is loaded from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from compress.checkpoint import Checkpoint, Stored
from compress.errors import CompressError
from compress.formats import of_config
from compress.formats.base import Describing, Format
from compress.types import Packed, Storage

_REMEDY = "its quantization_config does not belong to its tensors: download it again"
_UNFIT = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, AssertionError,
          re.error)  # fmt: skip


@contextmanager
def _fitting(where: object) -> Iterator[None]:
    """Packed tensors read as a quantization_config says; what does not fit it, as one line.

    A format that is told nonsense looks up keys that are not there and reshapes what has another size; a kind that
    asserts what its passes keep to finds that these tensors do not.
    """
    try:
        yield
    except torch.OutOfMemoryError:  # a RuntimeError too, and no fault of the files
        raise
    except _UNFIT as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CompressError(f"cannot be unpacked ({reason})", str(where), _REMEDY) from error
    except CompressError as error:
        raise CompressError(error.what, error.where or str(where), error.remedy) from None


class Weights:
    """Names, shapes and dense values of a checkpoint, whatever its format.

    Args:
        part: of a checkpoint that is not whole, the packed layers that are there.

    Attributes:
        checkpoint: the folder.
        packed: names (without ".weight") of the layers that are stored packed.
    """

    def __init__(self, checkpoint: Checkpoint, part: Iterable[str] | None = None) -> None:
        self.checkpoint = checkpoint
        self.packed: set[str] = set()
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._format: Format | None = None
        with _fitting(checkpoint.folder / "config.json"):
            found = of_config(checkpoint.config)
        if found is not None:
            self._format, self._config = found
            with _fitting(checkpoint.folder / "config.json"):
                self.packed = self._format.layers(checkpoint.tensors, self._config) if part is None else set(part)
                if isinstance(self._format, Describing):
                    stored = {n: t.shape for n, t in checkpoint.tensors.items()}
                    self._config = self._format.described(self._config, sorted(self.packed), stored, checkpoint.read)

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def format_name(self) -> str | None:
        """The quantisation format, None for a dense checkpoint."""
        return None if self._format is None else self._format.name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Dense tensor name -> shape, from headers alone. Packed layers appear as "<name>.weight", [out, in]."""
        owned = self.owners()
        out = {n: t.shape for n, t in self.checkpoint.tensors.items() if n not in owned}
        for name in sorted(self.packed):
            assert self._format is not None
            shapes = {s: t.shape for s, t in self._parts(name).items()}
            with _fitting(name):
                out[name + ".weight"] = self._format.shape(name, shapes, self._config)
        return out

    def shapes_cache(self) -> dict[str, tuple[int, ...]]:
        """`shapes`, computed once."""
        if self._shapes is None:
            self._shapes = self.shapes()
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a dense tensor is stored (of the scales, for a packed layer)."""
        layer = name.removesuffix(".weight")
        if layer in self.packed:
            assert self._format is not None
            dtypes = {s: t.torch_dtype for s, t in self._parts(layer).items()}
            with _fitting(layer):
                return self._format.dtype(layer, dtypes, self._config)
        return self.checkpoint.tensors[name].torch_dtype

    def read(self, name: str, device: torch.device | str = "cpu", ready: dict[str, Tensor] | None = None) -> Tensor:
        """A dense tensor; packed layers come dequantised as [out, in], unpacked on `device`.

        Args:
            ready: stored tensors that were read already, by name; what is used is taken out of it.
        """
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in self.packed:
            packed = self.read_packed(layer, device, ready)
            with _fitting(layer):
                return packed.dequantize()
        return self._stored(name, device, ready)

    def _stored(self, name: str, device: torch.device | str, ready: dict[str, Tensor] | None) -> Tensor:
        found = None if ready is None else ready.pop(name, None)
        return (self.checkpoint.read(name) if found is None else found).to(device)

    def stored(self, name: str) -> list[str]:
        """Names of the stored tensors that a dense one is read from."""
        layer = name.removesuffix(".weight")
        packed = name.endswith(".weight") and layer in self.packed
        return [f"{layer}.{s}" for s in self._parts(layer)] if packed else [name]

    def read_packed(
        self, layer: str, device: torch.device | str = "cpu", ready: dict[str, Tensor] | None = None
    ) -> Packed:
        """A packed layer by its name without ".weight", its tensors on `device`; `ready`: see `read`."""
        assert self._format is not None
        parts = {s: self._stored(f"{layer}.{s}", device, ready) for s in self._parts(layer)}
        with _fitting(layer):
            packed = self._format.unpack(layer, parts, self._config)
        shape = self.shapes_cache()[layer + ".weight"]
        if packed.shape != shape:
            raise CompressError(f"its codes are {list(packed.shape)}, not {list(shape)}", layer, _REMEDY)
        return packed

    def storage(self, layer: str) -> Storage:
        """How a packed layer is stored, from headers alone."""
        assert self._format is not None
        shapes = {s: t.shape for s, t in self._parts(layer).items()}
        with _fitting(layer):
            return self._format.storage(layer, shapes, self._config)

    def stored_bytes(self, layer: str) -> int:
        """Bytes on disk of a packed layer's tensors."""
        return sum(t.nbytes for t in self._parts(layer).values())

    def owners(self) -> dict[str, str]:
        """Stored tensor -> the packed layer that it is a part of."""
        if self._format is None:
            return {}
        return {f"{layer}.{s}": layer for layer in sorted(self.packed) for s in self._parts(layer)}

    def activations(self, layer: str) -> str:
        """How a layer's input is quantised when it runs, "" where it is not (see `Storage.activations`)."""
        if layer not in self.packed:
            return ""
        assert self._format is not None
        with _fitting(layer):
            return self._format.activations(layer, self._config)

    def _parts(self, layer: str) -> dict[str, Stored]:
        """Suffix -> where the tensor is, of those that a packed layer has."""
        assert self._format is not None
        names = {s: f"{layer}.{s}" for s in self._format.suffixes}
        return {s: self.checkpoint.tensors[n] for s, n in names.items() if n in self.checkpoint.tensors}
