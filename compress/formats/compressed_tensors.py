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

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress import bits as bitpack
from compress import grid
from compress.errors import CompressError
from compress.formats.base import Held, LayerShape, divisors_hint, marked
from compress.packed.uniform import UniformGrid, group_index
from compress.types import Packed, Storage

NAME = "compressed-tensors"
METHOD = "compressed-tensors"
SUFFIXES = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
PACK, INT = "pack-quantized", "int-quantized"
#: what is read: "naive-quantized" is int-quantized with other bits and groups; older files held zero points unpacked,
#: zero points of symmetric layers, and a g_idx
_READ = (PACK, INT, "naive-quantized")
_EXPERTS = re.compile(r"\.experts\.")
_PLACES = 10_000_000  # that a target's pattern may try in a name
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
            other = "bitsandbytes" if storage.activations else "gptq"
            return f"a Conv1D weight, kept as [in, out], does not fit compressed-tensors: use --format {other}"
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
        weights, activations = group["weights"], _activations(name, group)
        bits, size = int(weights["num_bits"]), _group_size(name, weights)
        if "weight" in tensors:
            codes = _from_signed(name, tensors["weight"], bits)
        else:
            columns = int(tensors["weight_shape"][1])
            words = tensors["weight_packed"].shape[-1]
            if words != bitpack.words(columns, bits):
                what = f"{words} words a row cannot hold {columns} codes of {bits} bits, densely packed"
                raise CompressError(
                    what, name, "compressed-tensors before 0.18 padded 3, 5, 6 and 7 bits: make it again"
                )
            codes = bitpack.unpack(tensors["weight_packed"], bits, columns)
        rows = len(codes)
        scales = _per_row(tensors["weight_scale"], rows, size)
        zeros = None if weights.get("symmetric", True) else _zeros(name, tensors, rows, bits, size)
        if activations and (bits, size) != (8, -1):
            what = f"inputs in 8 bits beside weights of {bits} bits in groups of {size} cannot be read"
            raise CompressError(what, name, "8-bit weights with a scale a row can")
        g_idx = tensors.get("weight_g_idx")
        if g_idx is None and weights.get("actorder") == "group":
            raise CompressError("actorder 'group' without weight_g_idx cannot be read", name)
        if g_idx is not None:
            ordered = (
                size != -1
                and bool((g_idx >= 0).all())
                and not torch.equal(g_idx.long(), group_index(codes.shape[1], size, g_idx.device))
            )
            g_idx = g_idx.to(torch.int32) if ordered else None
        return UniformGrid(codes, scales, zeros, bits, size, g_idx, activations)

    def described(
        self,
        config: Mapping[str, Any],
        layers: Iterable[str],
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
    ) -> Mapping[str, Any]:
        """The config with "shapes": (out, in) by name where the last word of a row may be part empty."""
        found = {}
        for layer in layers:
            if f"{layer}.weight_packed" in shapes and shapes.get(f"{layer}.weight_shape") == (2,):
                weights = _group_of(layer, config)["weights"]
                if _group_size(layer, weights) == -1:
                    found[layer] = tuple(int(n) for n in read(f"{layer}.weight_shape").tolist())
        return {**config, "shapes": found}

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out, in) of a stored layer. Exact where groups fix it, or `described` has read it."""
        if "weight" in shapes:
            return shapes["weight"][0], shapes["weight"][1]
        out, words = shapes["weight_packed"]
        weights = _group_of(name, config)["weights"]
        bits, size = int(weights["num_bits"]), _group_size(name, weights)
        if size != -1:
            return out, shapes["weight_scale"][1] * size
        columns = config.get("shapes", {}).get(name, (out, words * 32 // bits))[1]
        if bitpack.words(columns, bits) != words:
            raise CompressError(f"{words} words a row do not hold {columns} codes of {bits} bits", name)
        return out, columns

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        return marked(names, "weight_scale", NAME)

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return dtypes["weight_scale"]

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        group = _group_of(name, config)
        weights = group["weights"]
        symmetric, ordered = bool(weights.get("symmetric", True)), weights.get("actorder") == "group"
        size, activations = _group_size(name, weights), _activations(name, group)
        return Storage(UniformGrid.kind, int(weights["num_bits"]), size, symmetric, ordered, activations)

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
    """The config group that a layer belongs to: by its exact name, by a pattern, by its class, in this order."""
    status, fmt = config.get("quantization_status"), config.get("format")
    if status != "compressed" or fmt not in (*_READ, "mixed-precision"):
        raise CompressError(
            f"compressed-tensors with format {fmt!r} and status {status!r} cannot be read",
            name,
            "pack-quantized and int-quantized files with status 'compressed' can",
        )
    groups = {target: g for g in config["config_groups"].values() if g.get("weights") for target in g["targets"]}
    for target in sorted(groups, key=lambda t: ("re:" in t, t)):  # the order of compressed-tensors' own match_targets
        if target == name or (target.startswith("re:") and _fits(target[3:], name)):
            return _checked(name, groups[target], config)
    for target in ("Linear", "LinearBase"):
        if target in groups:
            return _checked(name, groups[target], config)
    raise CompressError("no config group of config.json names this layer", name, "the checkpoint is inconsistent")


def _fits(pattern: str, name: str) -> bool:
    """Whether a target's pattern is this layer's. Raises CompressError for one that could take for ever.

    The library backtracks: a repeated group takes time that is exponential in the name's length, and several open ends
    as many places as they can share the name in.
    """
    ends = len(re.findall(r"[*+]|\{\d*,", pattern))
    if re.search(r"\)[*+{]", pattern) or math.comb(len(name) + ends, ends) > _PLACES:
        raise CompressError(f"the target {pattern[:80]!r} may take for ever", name, "name its layers more plainly")
    return re.match(pattern, name) is not None


def _checked(name: str, group: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    weights: Mapping[str, Any] = group["weights"]
    fmt, kind = group.get("format") or config["format"], weights.get("type", "int")
    if fmt not in _READ or kind != "int" or not 1 < int(weights["num_bits"]) < 9:
        what = f"format {fmt!r} with {weights['num_bits']} bits of type {kind!r} cannot be read"
        raise CompressError(what, name, "integers of 2 to 8 bits can")
    return group


def _group_size(name: str, weights: Mapping[str, Any]) -> int:
    """Columns that share a scale; -1 for a row, and for the whole tensor."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:  # compressed-tensors' own rule
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy in ("channel", "tensor"):
        return -1
    if strategy != "group" or not isinstance(size, int) or size < 1:
        raise CompressError(f"strategy {strategy!r} with group size {size!r} cannot be read", name)
    return size


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


def _from_signed(name: str, values: Tensor, bits: int) -> Tensor:
    """int8 numbers around zero -> uint8 codes from 0 up. Raises CompressError for one that the bits do not hold."""
    half = 2 ** (bits - 1)
    if values.dtype != torch.int8 or int(values.min()) < -half or int(values.max()) >= half:
        raise CompressError(f"its {str(values.dtype).removeprefix('torch.')} numbers are not of {bits} bits", name)
    codes: Tensor = (values.to(torch.int16) + half).to(torch.uint8)
    return codes


def _per_row(values: Tensor, rows: int, size: int) -> Tensor:
    """Scales or zero points as [out, groups]; of a whole tensor there is one."""
    if size != -1:
        return values.contiguous()
    return values.reshape(-1, 1).expand(rows, 1).contiguous()


def _zeros(name: str, tensors: Mapping[str, Tensor], rows: int, bits: int, size: int) -> Tensor:
    """uint8 [out, groups]: zero points, packed down the columns or, in older and int-quantized files, as int8."""
    stored = tensors["weight_zero_point"]
    if stored.dtype == torch.int32:
        zeros: Tensor = bitpack.unpack(stored.t().contiguous(), bits, rows).t().contiguous()
        return zeros
    return _per_row(_from_signed(name, stored, bits), rows, size)
