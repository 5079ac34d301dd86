"""compressed-tensors, formats "pack-quantized" and "int-quantized": what transformers, vLLM and SGLang load.

Weight-only layers are pack-quantized. For each linear layer P: P.weight_packed int32 [out, ceil(in * bits / 32)] of
codes, P.weight_scale [out, groups] in the model's dtype, P.weight_shape int64 [2]; asymmetric also P.weight_zero_point
int32 [ceil(out * bits / 32), groups], packed down the columns. Layers whose input is quantised too (W8A8) are
int-quantized: P.weight int8 [out, in] of codes less 128, P.weight_scale [out, 1]. Facts that shape this file:
- quantization_status must be "compressed": with any other value transformers keeps random weights without an error;
- asymmetric files need "dequantize": true (compressed-tensors 0.18 to 0.20 mis-shape the zero point otherwise);
- no act-order keys and no g_idx: current readers refuse them, so groups are stored in natural column order;
- 3, 5, 6 and 7 bits are packed densely, which needs compressed-tensors 0.18 or newer;
- vLLM counts routers among the linear layers, transformers does not: they are ignored by pattern;
- transformers fills fused experts from packed tensors alone: dense ones beside them stay random.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress import bits as bitpack
from compress import grid
from compress.errors import CompressError
from compress.formats.base import Held, LayerShape, divisors_hint, marked
from compress.packed.uniform import UniformGrid
from compress.types import Packed, Storage

NAME = "compressed-tensors"
METHOD = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point")
PACK, INT = "pack-quantized", "int-quantized"
_EXPERTS = re.compile(r"\.experts\.")
_FUSED_EXPERTS = re.compile(r"\.experts\.[^.\d][^.]*$")
_ROUTERS = r".*\.(gate|router|shared_expert_gate)$"


class CompressedTensors:
    """The format as a value; see the module's text."""

    name = NAME
    suffixes = SUFFIXES
    container = "safetensors"
    quantised = True

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Readers cast scales to the model's dtype, so they are stored in it."""
        return model_dtype

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        if storage.kind != UniformGrid.kind:
            return f"compressed-tensors cannot hold the kind {storage.kind!r}: use --format native"
        if storage.activations not in ("", "token") or (storage.activations and not storage.symmetric):
            return (
                f"its readers take 8-bit weights with symmetric scales and a symmetric scale a token, not "
                f"{'affine weights' if not storage.symmetric else storage.activations!r}: use --format native"
            )
        if storage.activations and layer.expert:
            return "quantised activations of fused experts were not tried in any reader: use --format native"
        if storage.ordered_groups:
            return "compressed-tensors holds no g_idx: use --act-order static, or --format gptq"
        if layer.transposed:
            return "a Conv1D weight, kept as [in, out], does not fit compressed-tensors: use --format gptq"
        if layer.expert and not storage.symmetric:
            return "transformers cannot load asymmetric experts from compressed-tensors: use --symmetric"
        if storage.group_size > 0 and layer.in_features % storage.group_size:
            return (
                f"group size {storage.group_size} does not divide in_features {layer.in_features}: "
                f"{divisors_hint(layer.in_features, storage.group_size)}"
            )
        return None

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = grid.group_count(columns, storage.group_size)
        scales = rows * groups * scale_dtype.itemsize
        if storage.activations:
            return rows * columns + scales
        zeros = 0 if storage.symmetric else 4 * bitpack.words(rows, storage.bits) * groups
        return 4 * rows * bitpack.words(columns, storage.bits) + scales + zeros + 16

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        assert isinstance(packed, UniformGrid)  # why_not refused every other kind
        if packed.activations:
            return {"weight": (packed.codes.to(torch.int16) - 128).to(torch.int8), "weight_scale": packed.scales}
        out = {
            "weight_packed": bitpack.pack(packed.codes, packed.bits),
            "weight_scale": packed.scales,
            "weight_shape": torch.tensor(packed.shape, dtype=torch.int64),
        }
        if packed.zeros is not None:
            out["weight_zero_point"] = bitpack.pack(packed.zeros.t().contiguous(), packed.bits).t().contiguous()
        return out

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> UniformGrid:
        """Exact inverse of `pack`. `config` is the checkpoint's quantization_config."""
        group = _group_of(name, config)
        weights = group["weights"]
        bits, size = int(weights["num_bits"]), weights.get("group_size")
        if _kind(group, config) == INT:
            return _read_int(name, tensors, weights, _activations(name, group))
        out, columns = (int(n) for n in tensors["weight_shape"])
        scales = tensors["weight_scale"]
        zeros = None
        if "weight_zero_point" in tensors:
            zeros = bitpack.unpack(tensors["weight_zero_point"].t().contiguous(), bits, out).t().contiguous()
        codes = bitpack.unpack(tensors["weight_packed"], bits, columns)
        return UniformGrid(codes, scales, zeros, bits, -1 if size is None else int(size))

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out, in) of a stored layer from its headers. Exact where groups or the word count fix it."""
        if "weight" in shapes:
            return shapes["weight"][0], shapes["weight"][1]
        out, words = shapes["weight_packed"]
        weights = _group_of(name, config)["weights"]
        size = weights.get("group_size")
        groups = shapes["weight_scale"][1] if len(shapes["weight_scale"]) > 1 else 1
        return out, groups * int(size) if size not in (None, -1) else words * 32 // int(weights["num_bits"])

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        return marked(names, "weight_scale", NAME)

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return dtypes["weight_scale"]

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        return _activations(name, _group_of(name, config))

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        """quantization_config for config.json: one group a distinct storage.

        Raises:
            CompressError: experts that stay dense beside packed layers.
        """
        storages = {h.module: h.storage for h in layers}
        dense = next((n for n in ignored if _FUSED_EXPERTS.search(n)), None)
        if dense is not None:
            raise CompressError(
                "transformers leaves dense experts random when other layers are packed in compressed-tensors",
                f"layer {dense}",
                "compress every expert, or use --format gptq",
            )
        routers = any(_EXPERTS.search(n) for n in storages) and not any(re.match(_ROUTERS, n) for n in storages)
        kinds = sorted(set(storages.values()), key=lambda s: (s.bits, s.group_size, s.symmetric, s.activations))
        groups: dict[str, dict[str, Any]] = {}
        for i, storage in enumerate(kinds):
            targets = ["Linear"] if len(kinds) == 1 else sorted(n for n, s in storages.items() if s == storage)
            groups[f"group_{i}"] = {
                "targets": targets,
                "format": INT if storage.activations else PACK,
                "input_activations": _TOKEN if storage.activations else None,
                "output_activations": None,
                "weights": {
                    "num_bits": storage.bits,
                    "type": "int",
                    "symmetric": storage.symmetric,
                    "strategy": "channel" if storage.group_size == -1 else "group",
                    "group_size": None if storage.group_size == -1 else storage.group_size,
                    "dynamic": False,
                    "observer": "minmax",
                },
            }
        value: dict[str, Any] = {
            "quant_method": METHOD,
            "format": _overall(g["format"] for g in groups.values()),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": sorted(ignored) + ["re:" + _ROUTERS] * routers,
            "kv_cache_scheme": None,
            "sparsity_config": {},
            "transform_config": {},
        }
        if dense_on_load or any(not s.symmetric for s in kinds):
            value["dequantize"] = True
        return value

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files a reader wants: none."""
        return {}


#: 8-bit activations, a symmetric scale for each token found as it comes
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def _overall(formats: Iterable[str]) -> str:
    found = set(formats)
    return found.pop() if len(found) == 1 else "mixed-precision"


def _group_of(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config group that a layer belongs to."""
    status, fmt = config.get("quantization_status"), config.get("format")
    if status != "compressed" or fmt not in (PACK, INT, "mixed-precision"):
        raise CompressError(
            f"compressed-tensors with format {fmt!r} and status {status!r} cannot be read",
            name,
            "pack-quantized and int-quantized files with status 'compressed' can",
        )
    groups = list(config["config_groups"].values())
    for group in groups:
        for target in group["targets"]:
            pattern = target[3:] if target.startswith("re:") else re.escape(target) + "$"
            if re.match(pattern, name):
                return _checked(name, group)
    for group in groups:
        if "Linear" in group["targets"]:
            return _checked(name, group)
    raise CompressError("no config group of config.json names this layer", name, "the checkpoint is inconsistent")


def _kind(group: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    return str(group.get("format") or config["format"])


def _checked(name: str, group: Mapping[str, Any]) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = group["weights"]
    if group.get("format", PACK) not in (PACK, INT, None) or weights.get("type", "int") != "int":
        raise CompressError(f"format {group.get('format')!r} of type {weights.get('type')!r} cannot be read", name)
    if weights.get("actorder") == "group":
        raise CompressError("actorder 'group' cannot be read", name, "current readers refuse it as well")
    return group


def _activations(name: str, group: Mapping[str, Any]) -> str:
    """`Storage.activations` of a config group."""
    given = group.get("input_activations")
    if given is None:
        return ""
    plain = given.get("type", "int") == "int" and given.get("num_bits") == 8 and given.get("dynamic") is True
    if not plain or given.get("strategy") != "token":
        what = f"input_activations with {given.get('num_bits')} bits, strategy {given.get('strategy')!r}, "
        raise CompressError(f"{what}dynamic {given.get('dynamic')!r} cannot be read", name, "8-bit dynamic tokens can")
    return "token" if given.get("symmetric", True) else "token_zeropoint"


def _read_int(name: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Any], activations: str) -> UniformGrid:
    """An int-quantized layer: one signed byte a weight, a scale a row (or one for all rows)."""
    if weights.get("strategy") not in ("channel", "tensor") or int(weights["num_bits"]) != 8:
        what = f"int-quantized with {weights['num_bits']} bits and strategy {weights.get('strategy')!r} cannot be read"
        raise CompressError(what, name, "8 bits by channel or tensor can")
    codes = (tensors["weight"].to(torch.int16) + 128).to(torch.uint8)
    rows = codes.shape[0]
    scales = tensors["weight_scale"].reshape(-1, 1).expand(rows, 1).contiguous()
    zeros = None
    if "weight_zero_point" in tensors:
        zeros = (tensors["weight_zero_point"].to(torch.int16) + 128).to(torch.uint8).reshape(-1, 1).expand(rows, 1)
    return UniformGrid(codes, scales, zeros, 8, -1, None, activations)
