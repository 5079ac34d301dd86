"""What a checkpoint holds, from its headers and config alone: any tool's, as long as a format here reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import Checkpoint
from compress.packed.sparse import Sparse
from compress.solvers.masks import Pattern
from compress.types import Storage
from compress.weights import Weights


@dataclass(frozen=True)
class Layer:
    """A packed layer.

    Attributes:
        name: on disk, without ".weight".
        shape: (out_features, in_features).
        bytes: of its tensors on disk.
    """

    name: str
    storage: Storage
    shape: tuple[int, int]
    bytes: int

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.bytes / self.weights

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "stored": describe(self.storage),
            "kind": self.storage.kind,
            "bits": self.storage.bits,
            "group_size": self.storage.group_size,
            "shape": list(self.shape),
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
        }


@dataclass(frozen=True)
class Inventory:
    """A checkpoint's contents.

    Attributes:
        format: name in the FORMATS table, "dense" for one that nothing has packed.
        layers: the packed layers.
        dense: dtype -> (tensors, parameters, bytes) of the rest.
    """

    folder: Path
    format: str
    layers: list[Layer]
    dense: dict[str, tuple[int, int, int]]

    @property
    def parameters(self) -> int:
        return sum(x.weights for x in self.layers) + sum(n for _, n, _ in self.dense.values())

    @property
    def bytes(self) -> int:
        return sum(x.bytes for x in self.layers) + sum(b for _, _, b in self.dense.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        packed = sum(x.weights for x in self.layers)
        return {
            "format": self.format,
            "parameters": self.parameters,
            "bytes": self.bytes,
            "packed_parameters": packed,
            "packed_bits_per_weight": 8.0 * sum(x.bytes for x in self.layers) / packed if packed else None,
            "dense": {k: {"tensors": t, "parameters": n, "bytes": b} for k, (t, n, b) in self.dense.items()},
            "layers": [x.as_json() for x in self.layers],
        }


def inventory(folder: Path) -> Inventory:
    """Read a checkpoint's headers. Raises CompressError for one that cannot be read."""
    weights = Weights(Checkpoint.open(folder))
    shapes = weights.shapes_cache()
    layers = []
    for name in sorted(weights.packed, key=_natural):
        out, columns = shapes[name + ".weight"]
        layers.append(Layer(name, weights.storage(name), (out, columns), weights.stored_bytes(name)))
    dense: dict[str, tuple[int, int, int]] = {}
    owners = weights.owners()
    for name, stored in weights.checkpoint.tensors.items():
        if name not in owners:
            tensors, parameters, size = dense.get(stored.dtype, (0, 0, 0))
            dense[stored.dtype] = (tensors + 1, parameters + stored.numel, size + stored.nbytes)
    return Inventory(folder, weights.format_name or "dense", layers, dense)


def describe(storage: Storage) -> str:
    """A storage in words: "uniform 4 bits, groups of 64, symmetric"."""
    if storage.inner is not None:
        return f"{storage.kind}{_pattern(storage)} of {describe(storage.inner)}"
    if storage.kind == "dense":
        return "values as they are"
    words = [f"{storage.kind} {storage.bits} bits"]
    words.append("whole rows" if storage.group_size == -1 else f"groups of {storage.group_size}")
    if storage.kind == "uniform":
        words.append("symmetric" if storage.symmetric else "asymmetric")
    words += [f"{k} {v}" for k, v in storage.details]
    words += ["groups by activation order"] * storage.ordered_groups
    words += [f"inputs in 8 bits a {storage.activations.replace('_', ' with ')}"] if storage.activations else []
    return ", ".join(words)


def _pattern(storage: Storage) -> str:
    return f" {Pattern.from_details(storage.details)}" if storage.kind == Sparse.kind else ""


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Block 10 behind block 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]
