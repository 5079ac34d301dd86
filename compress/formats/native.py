"""Our own format, for what no other can hold: every kind of packed weight, as its `tensors` are.

For each layer P the tensors P.<part>, by the names in the kind's `parts`. config.json says the rest, so that nothing is
guessed from names: quantization_config = {"quant_method": "compress", "version": 1, "dtype": of dequantised weights,
"storages": [each distinct Storage], "layers": {P: [index into storages, out_features, in_features]}}.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.formats.base import Held, LayerShape
from compress.packed import KINDS
from compress.types import Packed, Storage

METHOD = "compress"
VERSION = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Native:
    """The format as a value; see the module's text."""

    name = "native"
    container = "safetensors"
    quantised = True

    @property
    def suffixes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for kind in KINDS.values() for part in kind.parts))

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return model_dtype

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        inner: Storage | None = storage
        while inner is not None:
            if inner.kind not in KINDS:
                return f"no kind {inner.kind!r}: the package that brings it must add it to KINDS"
            inner = inner.inner
        return None

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        return KINDS[storage.kind].stored_bytes(storage, shape, scale_dtype)

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        return packed.tensors()

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Packed:
        storage, shape = _entry(name, config)
        _refuse_sizes(storage, shape, sum(t.numel() * t.element_size() for t in tensors.values()))
        return KINDS[storage.kind].from_tensors(tensors, storage, shape, _DTYPES[config["dtype"]])

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        if config.get("version") != VERSION:
            what = f"native format of version {config.get('version')!r}, this release reads {VERSION}"
            raise CompressError(what, "", "install the release of compress-llm that wrote it")
        owners = {n.rpartition(".")[0] for n in names}
        found = set(config["layers"])
        if not found or found - owners:
            missing = sorted(found - owners)[:1] or ["any layer"]
            raise CompressError(f"config.json lists {missing[0]}, the files do not hold it", "", "download it again")
        return found

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        return _entry(name, config)[1]

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return _DTYPES[config["dtype"]]

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        return _entry(name, config)[0]

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        return _entry(name, config)[0].activations

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        """quantization_config for config.json."""
        storages = list(dict.fromkeys(h.storage for h in layers))
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "dtype": str(layers[0].dtype).removeprefix("torch."),
            "storages": [s.as_json() for s in storages],
            "layers": {h.name: [storages.index(h.storage), *h.shape] for h in layers},
        }

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        return {}


def _entry(name: str, config: Mapping[str, Any]) -> tuple[Storage, tuple[int, int]]:
    """Storage and (out, in) of a layer."""
    index, out, columns = config["layers"][name]
    return Storage.from_json(config["storages"][index]), (int(out), int(columns))


def _refuse_sizes(storage: Storage, shape: tuple[int, int], stored: int) -> None:
    """Raise ValueError for numbers of config.json that call for more memory than the tensors justify.

    Args:
        stored: bytes of the layer's tensors; no kind takes less than an eighth of a bit a weight.
    """
    if min(shape) < 1 or shape[0] * shape[1] > 64 * stored:
        raise ValueError(f"{stored} bytes do not hold a weight of {list(shape)}")
    layer: Storage | None = storage
    while layer is not None:
        numbers = [layer.bits, layer.group_size, *(v for _, v in layer.details if isinstance(v, int))]
        if layer.bits < 1 or layer.bits > 32 or max(numbers) > max(4096, *shape):
            raise ValueError(f"no layer of {list(shape)} is stored as {layer.as_json()}")
        layer = layer.inner
