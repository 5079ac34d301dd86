"""The GPTQ format, v1 ("gptq") and v2 ("gptq_v2"): what gptqmodel, optimum and vLLM load.

For each linear layer P: P.qweight int32 [in * bits / 32, out], codes packed down the input rows; P.qzeros int32
[groups, out * bits / 32], zero points packed along the outputs; P.scales float16 [groups, out]; P.g_idx int32 [in].
v1 stores zero - 1 (so a zero of 0 cannot be written: our grids start at 1), v2 the zero itself. A v2 file under a v1
label loads as garbage, so the label is tested against the words of symmetric layers on reading.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress import bits as bitpack
from compress import grid
from compress.errors import CompressError
from compress.formats.base import Held, LayerShape, marked
from compress.packed.uniform import UniformGrid, group_index
from compress.types import Packed, Storage

METHOD = "gptq"
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)
_OTHERS = "use --format compressed-tensors, or native"


@dataclass(frozen=True)
class GPTQFormat:
    """The format as a value. version: 1 or 2."""

    version: int = 1
    suffixes = SUFFIXES
    container = "safetensors"
    quantised = True

    @property
    def name(self) -> str:
        return "gptq" if self.version == 1 else "gptq_v2"

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def why_not(self, storage: Storage, layer: LayerShape) -> str | None:
        if storage.kind != UniformGrid.kind:
            return f"the GPTQ format cannot hold the kind {storage.kind!r}: use --format native"
        if storage.activations:
            return f"the GPTQ format is weight-only, it cannot quantise activations: {_OTHERS}"
        if storage.bits not in _BITS:
            return f"the GPTQ format holds 2, 3, 4 and 8 bits, not {storage.bits}: use --format compressed-tensors"
        if layer.head:
            return "transformers fills no packed head from the GPTQ format: use --format compressed-tensors"
        if layer.expert:
            return f"experts kept as one 3-D tensor are filled by no GPTQ reader: {_OTHERS}"
        if layer.in_features % 32 or layer.out_features % 32:
            return (
                f"GPTQ readers need in_features {layer.in_features} and out_features {layer.out_features} to be "
                "multiples of 32: use --format compressed-tensors, or --exclude this layer"
            )
        return None

    def nbytes(self, storage: Storage, shape: tuple[int, int], scale_dtype: torch.dtype) -> int:
        out, columns = shape
        groups = grid.group_count(columns, storage.group_size)
        codes, zeros = bitpack.words(columns, storage.bits) * out, groups * bitpack.words(out, storage.bits)
        return 4 * codes + 4 * zeros + 2 * groups * out + 4 * columns

    def pack(self, packed: Packed) -> dict[str, Tensor]:
        assert isinstance(packed, UniformGrid)  # why_not refused every other kind
        out = packed.shape[0]
        groups = packed.scales.shape[1]
        if packed.zeros is None:
            zeros = torch.full((out, groups), 2 ** (packed.bits - 1), dtype=torch.uint8, device=packed.codes.device)
        else:
            zeros = packed.zeros
        if self.version == 1 and not bool((zeros > 0).all()):
            what = f"{int((zeros == 0).sum())} of its zero points are 0, which version 1 of the format cannot hold"
            raise CompressError(what, "", "use --format gptq_v2, or compressed-tensors")
        stored = zeros - 1 if self.version == 1 else zeros
        g_idx = packed.column_groups().to(torch.int32)
        return {
            "qweight": bitpack.pack(packed.codes, packed.bits).t().contiguous(),
            "qzeros": bitpack.pack(stored.t().contiguous(), packed.bits),
            "scales": packed.scales.to(torch.float16).t().contiguous(),
            "g_idx": g_idx,
        }

    def unpack(self, name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> UniformGrid:
        """Exact inverse of `pack`. `config` is the checkpoint's quantization_config."""
        given = _settings(name, config)
        bits, symmetric, size = int(given["bits"]), bool(given.get("sym", True)), int(given["group_size"])
        columns, out = tensors["g_idx"].numel(), tensors["scales"].shape[1]
        codes = bitpack.unpack(tensors["qweight"].t().contiguous(), bits, columns)
        zeros = bitpack.unpack(tensors["qzeros"], bits, out).t().contiguous()
        middle = 2 ** (bits - 1)
        if self.version == 1:
            if symmetric and bool((zeros == middle).all()):
                raise CompressError(
                    f"its symmetric zero points read {middle}, which is v2, but the file is labelled v1 (gptq)",
                    name,
                    'set "checkpoint_format": "gptq_v2" in config.json',
                )
            zeros = (zeros + 1) & (2**bits - 1)
        elif symmetric and bool((zeros == middle - 1).all()):
            raise CompressError(
                f"its symmetric zero points read {middle - 1}, which is v1, but the file is labelled v2 (gptq_v2)",
                name,
                'set "checkpoint_format": "gptq" in config.json',
            )
        g_idx = tensors["g_idx"].to(torch.int32)
        natural = torch.equal(g_idx.long(), group_index(columns, size, g_idx.device))
        if symmetric and bool((zeros == middle).all()):
            stored_zeros = None
        else:
            stored_zeros = zeros
        scales = tensors["scales"].t().contiguous()
        return UniformGrid(codes, scales, stored_zeros, bits, size, None if natural else g_idx)

    def layers(self, names: Iterable[str], config: Mapping[str, Any]) -> set[str]:
        return marked(names, "qweight", self.name)

    def dtype(self, name: str, dtypes: Mapping[str, torch.dtype], config: Mapping[str, Any]) -> torch.dtype:
        return dtypes["scales"]

    def storage(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Storage:
        given = _settings(name, config)
        symmetric, ordered = bool(given.get("sym", True)), bool(given.get("desc_act", False))
        return Storage(UniformGrid.kind, int(given["bits"]), int(given["group_size"]), symmetric, ordered)

    def activations(self, name: str, config: Mapping[str, Any]) -> str:
        return ""

    def shape(self, name: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> tuple[int, int]:
        """(out, in) of a stored layer from its headers."""
        return shapes["qweight"][1], shapes["qweight"][0] * 32 // int(_settings(name, config)["bits"])

    def config(self, layers: Sequence[Held], ignored: Sequence[str], dense_on_load: bool = False) -> dict[str, Any]:
        """quantization_config for config.json and quantize_config.json."""
        kinds = {h.storage for h in layers}
        if len(kinds) != 1:
            raise CompressError(
                "the GPTQ format holds one setting for all layers", "--format", "use compressed-tensors"
            )
        storage = kinds.pop()
        label = self.name
        value: dict[str, Any] = {
            "quant_method": METHOD,
            "method": METHOD,
            "format": label,
            "checkpoint_format": label,
            "bits": storage.bits,
            "group_size": storage.group_size,
            "desc_act": storage.ordered_groups,
            "sym": storage.symmetric,
            "lm_head": False,
            "pack_dtype": "int32",
            "dynamic": None,
            "meta": {"quantizer": ["compress"]},
        }
        kept = _suffixes([h.module for h in layers])
        left = _suffixes([n for n in ignored if n.count(".") > 1])
        if left & kept:
            clash = sorted(left & kept)[0]
            raise CompressError(
                f"{clash} is quantised in some blocks and not in others, which GPTQ readers cannot tell apart",
                "--exclude",
                "use --format compressed-tensors",
            )
        if left:
            value["modules_in_block_to_quantize"] = [sorted(kept)]
            value["dynamic"] = {rf"-:.*\.{re.escape(suffix)}$": {} for suffix in sorted(left)}
            if any("experts." in suffix for suffix in left):  # readers have them as one module, or one an expert
                value["dynamic"][r"-:.*\.experts(\..*)?$"] = {}
        return value

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, Any]:
        """gptqmodel reads the same JSON from quantize_config.json."""
        return {"quantize_config.json": dict(quantization_config)}


def _settings(name: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a layer: gptqmodel's `dynamic` holds others by pattern, of which the first that fits counts."""
    words = config.get("pack_dtype") or "int32"
    if words != "int32":
        raise CompressError(f"pack_dtype {words!r} cannot be read", name, "int32 can")
    for pattern, own in (config.get("dynamic") or {}).items():
        if not pattern.startswith("-:") and re.match(pattern.removeprefix("+:"), name):
            return {**config, **own}
    return config


def _suffixes(names: Any) -> set[str]:
    """The part of each layer name behind its block number: model.layers.3.mlp.up_proj -> mlp.up_proj."""
    out = set()
    for name in names:
        parts = name.split(".")
        last = max((i for i, p in enumerate(parts) if p.isdigit()), default=-1)
        if last >= 0:
            out.add(".".join(parts[last + 1 :]))
    return out
