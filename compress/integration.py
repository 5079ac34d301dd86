"""Native checkpoints in plain transformers: after `import compress`, from_pretrained reads quant_method "compress".

transformers keeps a table of quantisers; ours goes into it as soon as that table exists, through a finder that watches
for the module that holds it, so that neither import loads the other. The quantiser puts a `PackedLinear` on the meta
device in the place of every packed layer. Its buffers are called as the tensors in the files are, so transformers'
own loader fills them, one by one, wherever its device map says.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_TABLE = "transformers.quantizers.auto"
METHOD = "compress"


class _Watch(importlib.abc.MetaPathFinder):
    """Finds one module as the others would, and registers the quantiser once it is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLE:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """The module's own loader, with a word afterwards."""

    def __init__(self, inner: importlib.abc.Loader) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        _register(module)


def install() -> None:
    """Register with transformers, now or when it is imported."""
    table = sys.modules.get(_TABLE)
    if table is not None and hasattr(table, "register_quantizer"):
        _register(table)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def _register(table: ModuleType) -> None:
    """Add the method to transformers' tables. A transformers that has other tables goes on without it."""
    try:
        if METHOD not in table.AUTO_QUANTIZER_MAPPING:
            config, quantizer = _classes(table)
            for made in (config, quantizer):  # classes of this module, for pickle
                made.__qualname__ = made.__name__
                globals()[made.__name__] = made
            table.register_quantization_config(METHOD)(config)
            table.register_quantizer(METHOD)(quantizer)
    except (AttributeError, ImportError) as error:
        warnings.warn(f"compress: this transformers has another table of quantisers ({error})", stacklevel=2)


def _classes(table: ModuleType) -> tuple[type, type]:
    """The config and the quantiser: classes of transformers' own, so they are made once it is there."""

    class CompressConfig(table.QuantizationConfigMixin):  # type: ignore[misc,name-defined]
        """quantization_config of a native checkpoint, as it is: see compress/formats/native.py."""

        def __init__(self, **given: Any) -> None:
            self.__dict__.update(given)
            self.quant_method = METHOD

    class CompressQuantizer(table.HfQuantizer):  # type: ignore[misc,name-defined]
        """Loads native checkpoints; see the module's text."""

        requires_calibration = True

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            device_map = kwargs.get("device_map")
            if isinstance(device_map, dict) and "disk" in device_map.values():
                raise ValueError("packed layers cannot be offloaded to the disk: leave it out of device_map")

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            files = kwargs.get("checkpoint_files") or []
            if not files or not all(str(f).endswith(".safetensors") for f in files):
                raise ValueError(f"a native checkpoint is made of safetensors files, not of {files}")
            self._replaced = _place(model, self.quantization_config.to_dict(), [Path(f) for f in files])
            self._dtypes = {n: p.dtype for n, p in model.named_parameters()}

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            _finish(model, self._replaced, self._dtypes)

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            from transformers.utils import logging

            logging.get_logger("transformers").warning(
                "A model loaded from compress's native format is not saved by save_pretrained: copy its folder instead."
            )
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    return CompressConfig, CompressQuantizer


def _place(model: Any, quantization: dict[str, Any], files: list[Path]) -> Any:
    """Put empty packed layers into a model on the meta device. Returns `loading.Replaced`."""
    import contextlib

    import torch

    from compress.checkpoint import Checkpoint, read_header
    from compress.errors import CompressError
    from compress.formats import FORMATS
    from compress.linear import PackedLinear
    from compress.loading import replace_linears
    from compress.skeleton import disk_names
    from compress.types import Storage
    from compress.weights import Weights

    tensors = {name: stored for file in files for name, stored in read_header(file).items()}
    weights = Weights(Checkpoint(files[0].parent, {"quantization_config": quantization}, tensors))

    def empty(name: str, bias: Any, transposed: bool) -> PackedLinear:
        index, *shape = quantization["layers"][name]
        storage = Storage.from_json(quantization["storages"][index])
        found = {part: tensors.get(f"{name}.{part}") for part in FORMATS["native"].suffixes}
        meta = {p: torch.empty(t.shape, dtype=t.torch_dtype, device="meta") for p, t in found.items() if t is not None}
        return PackedLinear(meta, storage, (shape[0], shape[1]), weights.dtype(name), bias, transposed)

    with contextlib.suppress(ValueError):  # models without experts say so with a ValueError
        model.set_experts_implementation("eager")
    parts, _ = disk_names(model, weights)
    replaced = replace_linears(model, weights, parts, empty, hold_own=True)
    if replaced.dense_slices:
        raise CompressError(
            "some projections of these experts are packed and others dense, which transformers' loader cannot fill",
            next(iter(replaced.dense_slices.values())),
            "load the folder with compress.load",
        )
    return replaced


def _finish(model: Any, replaced: Any, dtypes: dict[str, Any]) -> None:
    """What is left after the files are read: dense weights for modules that need them, and one dtype for the rest."""
    from compress.loading import fill_own_forward, tell_dense

    fill_own_forward(model, replaced)
    tell_dense(replaced)
    for name, param in model.named_parameters():
        if name in dtypes and param.dtype != dtypes[name]:  # 5.17 reads renamed tensors in their stored dtype
            param.data = param.data.to(dtypes[name])
