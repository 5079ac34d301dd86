"""compress.load: a transformers model whose linear layers stay packed, from any checkpoint that `Weights` reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.experts import DenseSlice, FusedExperts
from compress.linear import PackedLinear
from compress.skeleton import Part, quiet_transformers
from compress.types import moved
from compress.weights import Weights

#: makes the layer of a name on disk: (name, bias, transposed) -> PackedLinear
Make = Callable[[str, nn.Parameter | None, bool], PackedLinear]


@dataclass
class Replaced:
    """What `replace_linears` did.

    Attributes:
        params: the model's parameters that packed layers stand for now.
        modules: module name in the model -> layer name on disk, of every PackedLinear.
        dense_slices: names of modules that hold the dense projections of partly packed experts, and their
            tensors on disk.
        own_forward: module name -> module, of packed layers whose module computes in its own way (as Falcon's do):
            it is to be filled with a dense weight.
    """

    params: set[str] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)
    dense_slices: dict[str, str] = field(default_factory=dict)
    own_forward: dict[str, nn.Module] = field(default_factory=dict)


def load(
    model: str | Path,
    device: str | None = None,
    dtype: str = "auto",
    kernels: bool = True,
    trust_remote_code: bool = False,
) -> Any:
    """A causal language model in evaluation mode whose linear layers stay packed: `compress.load("OUT").generate(...)`.

    Packed nn.Linear and Conv1D layers become `PackedLinear`, packed experts stay packed as well; everything else is
    filled from the files. Memory never holds more than the packed model and one dense layer.

    Args:
        model: a folder that compress, compressed-tensors or a GPTQ tool wrote, or a dense one; a hub id.
        device: "cpu", "cuda" or "cuda:1"; None for a GPU if there is one.
        dtype: of everything that is not packed, and so of the computation: "auto" for that of config.json, "float32",
            "bfloat16" or "float16".
        kernels: take torch's CPU kernels for 4- and 8-bit layers (see `compress.cpu`); without them, and on a GPU,
            layers compute with weights that are unpacked as they are used.
        trust_remote_code: allow model code from the folder.

    Raises:
        CompressError: anything a user can mend.
    """
    from compress.api import find_device, find_dtype, find_model

    place, precision = find_device(device), find_dtype(dtype)
    folder = find_model(str(model))
    weights = Weights(Checkpoint.open(folder))
    streamed = BlockModel(weights, precision or _declared(weights), place, trust_remote_code)
    streamed.model.config.use_cache = weights.checkpoint.config.get("use_cache", True)

    def make(name: str, bias: nn.Parameter | None, transposed: bool) -> PackedLinear:
        packed = moved(weights.read_packed(name), place)
        layer = PackedLinear.of(packed, weights.dtype(name + ".weight"), bias, transposed, kernels)
        layer.prepare(streamed.dtype)
        return layer

    replaced = replace_linears(streamed.model, weights, streamed.parts, make)
    for name, disk in replaced.dense_slices.items():
        value = weights.read(disk).to(place, streamed.dtype)
        streamed.model.get_submodule(name).weight = nn.Parameter(value, requires_grad=False)
    for param in replaced.params:
        del streamed.parts[param]
    tell_dense(replaced)
    for block in range(len(streamed.block_names) + 1):
        streamed.load(block)
    _read_generation_config(streamed.model, folder)
    built = streamed.model.to(place).eval()
    built.config._name_or_path = str(folder)
    left = [n for n, t in (*built.named_parameters(), *built.named_buffers()) if t.is_meta]
    if left:
        raise CompressError(f"{len(left)} tensors were not filled", left[0], "this architecture is not supported")
    return built


def replace_linears(
    model: Any, weights: Weights, parts: Mapping[str, list[Part]], make: Make, hold_own: bool = False
) -> Replaced:
    """Put a PackedLinear in the place of every layer that is stored packed.

    Args:
        model: on the meta device.
        parts: the model's parameters and the tensors on disk that fill them (`skeleton.disk_names`).
        make: of the layers, in the order of the model.
        hold_own: let a PackedLinear hold the tensors of modules with a forward of their own, until `fill_own_forward`.
    """
    from transformers.pytorch_utils import Conv1D

    done = Replaced()
    embeddings = model.get_input_embeddings().weight
    for name, module in list(model.named_modules()):
        param = f"{name}.weight"
        disk = parts[param][0].name.removesuffix(".weight") if param in parts else ""
        if not isinstance(module, (nn.Linear, Conv1D)) or disk not in weights.packed or module.weight is embeddings:
            continue
        own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if own and not weights.activations(disk):
            done.own_forward[name] = module
            if not hold_own:
                continue
        _put(model, name, make(disk, module.bias, isinstance(module, Conv1D)))
        done.modules[name] = disk
        done.params.add(param)
    for param, found in parts.items():
        if any(p.expert is not None and p.name.removesuffix(".weight") in weights.packed for p in found):
            _replace_experts(model, weights, param, found, make, done)
            done.params.add(param)
    return done


def _replace_experts(model: Any, weights: Weights, param: str, parts: list[Part], make: Make, done: Replaced) -> None:
    """Let a FusedExperts stand for a fused parameter; its layers become modules of the experts module."""
    owner, _, leaf = param.rpartition(".")
    experts = model.get_submodule(owner)
    like = getattr(experts, leaf)
    names = _module_names(model, [p.name for p in parts], owner)
    slices: dict[int, list[PackedLinear | DenseSlice]] = {}
    for part, name in zip(parts, names, strict=True):
        disk = part.name.removesuffix(".weight")
        layer: PackedLinear | DenseSlice
        if disk in weights.packed:
            layer = make(disk, None, False)
            done.modules[name] = disk
        else:
            rows, columns = weights.shapes_cache()[part.name]
            layer = DenseSlice(torch.empty(rows, columns, device="meta", dtype=like.dtype))
            done.dense_slices[name] = part.name
        _put(model, name, layer)
        assert part.expert is not None
        slices.setdefault(part.expert, []).append(layer)
    delattr(experts, leaf)
    experts._is_hf_initialized = True  # else transformers draws random numbers for what it takes to be parameters
    setattr(experts, leaf, FusedExperts([slices[e] for e in sorted(slices)], like.dtype))


def _module_names(model: Any, disk: list[str], owner: str) -> list[str]:
    """Where in the model an expert's tensors would lie by transformers' renamings: "<experts>.3.gate_proj"."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    renamings = [m for m in get_model_conversion_mapping(model) if not isinstance(m, WeightConverter)]
    prefix = model.base_model_prefix
    found = []
    for name in disk:
        renamed = rename_source_key(name.removesuffix(".weight") + ".codes", renamings, [])[0].rpartition(".")[0]
        candidates = (renamed, f"{prefix}.{renamed}", renamed.removeprefix(prefix + "."))
        inside = next((c for c in candidates if c.startswith(owner + ".")), None)
        if inside is None:
            what = f"its experts are called {renamed} on disk, which is not inside {owner}"
            raise CompressError(what, name, "this architecture's layout is not supported")
        found.append(inside)
    return found


def _put(model: Any, name: str, module: nn.Module) -> None:
    """Set a submodule by its name, with empty modules where its path has none yet."""
    *path, leaf = name.split(".")
    owner = model
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner._modules[step]
    owner._modules[leaf] = module


def fill_own_forward(model: Any, replaced: Replaced) -> None:
    """Give modules with a forward of their own the dense weights of the packed layers that held their place."""
    for name, module in replaced.own_forward.items():
        packed = model.get_submodule(name)
        dtype = module.weight.dtype
        module.weight = nn.Parameter(packed.dense(dtype), requires_grad=False)
        module.bias = packed.bias
        _put(model, name, module)


def tell_dense(replaced: Replaced) -> None:
    """Warn of packed layers that are held dense."""
    if replaced.own_forward:
        names = sorted(replaced.own_forward)
        what = f"{len(names)} packed layers are held dense, first {names[0]}: their module computes in its own way"
        warnings.warn(what, stacklevel=3)


def _declared(weights: Weights) -> torch.dtype:
    """The dtype that config.json names, else that of the first dense tensor."""
    config = weights.checkpoint.config
    for place in (config, config.get("text_config") or {}):
        named = place.get("dtype") or place.get("torch_dtype")
        found = getattr(torch, named, None) if isinstance(named, str) else None
        if isinstance(found, torch.dtype) and found.is_floating_point:
            return found
    return next((d for d in map(weights.dtype, weights.shapes_cache()) if d.is_floating_point), torch.float32)


def _read_generation_config(model: Any, folder: Path) -> None:
    """generation_config.json, where the folder has one."""
    from transformers import GenerationConfig

    path = folder / "generation_config.json"
    if path.is_file():
        with quiet_transformers("transformers cannot read it", str(path), "remove the file, or download it again"):
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
