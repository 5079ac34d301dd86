"""The model on the meta device, and which disk tensors fill it: nothing here holds a weight.

transformers builds the module tree from config.json; its own conversion tables say what each tensor on disk is called
in it, and how experts stored one by one are fused. All is checked against the files' headers before a weight is read.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.checkpoint import read_json
from compress.errors import CompressError
from compress.gguf import files as gguf_files
from compress.weights import Weights


@dataclass(frozen=True)
class Part:
    """A disk tensor's place in a parameter."""

    name: str
    expert: int | None = None
    order: int = 0  # among the projections that are concatenated along the rows


def keeps_transposed(model: Any, param: str) -> bool:
    """Whether a parameter is the weight of a Conv1D, kept as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    owner, _, leaf = param.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), Conv1D)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter lands on the meta device; buffers (rotary tables, masks) stay real.

    None is initialised, which on meta changes nothing and takes longer than all else here: torch's own two are switched
    off, and each parameter is marked as transformers marks what it has loaded, so that it draws no numbers for it.
    """
    plain = nn.Module.register_parameter
    resets = [(kind, kind.reset_parameters) for kind in (nn.Linear, nn.Embedding)]

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            if param.device.type != "meta":
                param = nn.Parameter(param.to("meta"), requires_grad=False)
            param._is_hf_initialized = True  # type: ignore[attr-defined]
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    for kind, _ in resets:
        kind.reset_parameters = lambda self: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]
        for kind, reset in resets:
            kind.reset_parameters = reset  # type: ignore[method-assign]


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's transformers config without its quantization_config, of a GGUF file too. Raises CompressError."""
    from transformers import AutoConfig

    where = folder / "config.json"
    lone = gguf_files.lone_config(folder)
    _refuse_counts(read_json(where) if lone is None else lone, str(where if lone is None else folder))
    with quiet_transformers("transformers cannot read it", str(where), _REMEDY):
        if lone is None:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
        else:
            config = AutoConfig.for_model(**lone)
        text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    declared = config.architectures if isinstance(config.architectures, list) else []
    heads = [a for a in declared if _OTHER_HEADS.search(str(a))]
    both_ways = getattr(text, "is_decoder", None) is False and getattr(text, "add_cross_attention", None) is False
    if heads or both_ways or getattr(text, "is_encoder_decoder", False):
        kind = heads[0] if heads else f"model_type {config.model_type}"
        raise CompressError(f"not a causal language model ({kind})", str(where), _REMEDY)
    return config


_REMEDY = "pass a model that AutoModelForCausalLM can build (model code in the folder needs --trust-remote-code)"
_OTHER_HEADS = re.compile(r"For(MaskedLM|\w*Classification|QuestionAnswering|MultipleChoice|PreTraining)$")
_COUNTS = re.compile(r"(n|num)_(\w+_)?(layers?|experts)|(en|de)coder_layers|attention_types")
_MOST = 10_000


def _refuse_counts(raw: Mapping[str, Any], where: str) -> None:
    """Raise CompressError for a number of layers or experts that transformers would list for hours before it fails."""
    for key, value in raw.items():
        if isinstance(value, Mapping):
            _refuse_counts(value, where)
        elif _COUNTS.fullmatch(key) and (most := max(_whole_numbers(value), default=0)) > _MOST:
            what = f"{key} is {most}, more than {_MOST} are not believed"
            raise CompressError(what, where, "the config is damaged: download it again")


def _whole_numbers(value: Any) -> Iterator[int]:
    """The integers in a JSON value and the lists within it."""
    if isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item)
    elif isinstance(value, int):
        yield value


@contextlib.contextmanager
def quiet_transformers(what: str, where: str, remedy: str) -> Iterator[None]:
    """Calls into transformers with what comes from a model folder, quietly; failures as one line.

    A wrong value there makes it raise nearly anything (ZeroDivisionError, KeyError, AssertionError, a
    StrictDataclassFieldValidationError, whatever code in the folder raises): they share no base, so all are caught,
    here only, and chained.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns about weights that are not initialised; that is the point here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CompressError(f"{what} ({reason})", where, remedy) from error
    finally:
        logger.setLevel(level)


def skeleton(weights: Weights, trust_remote_code: bool) -> Any:
    """The model with parameters on meta and real buffers; shapes are checked against the files first."""
    from transformers import AutoModelForCausalLM

    config = load_config(weights.folder, trust_remote_code)
    where = str(weights.folder / "config.json")
    declared = getattr(config.get_text_config(), "num_hidden_layers", None)
    numbers = {m for n in weights.shapes_cache() for m in re.findall(r"(?<=\.)(\d+)(?=\.)", "." + n)}
    if isinstance(declared, int) and not 0 < declared <= len(numbers):
        raise CompressError(
            f"num_hidden_layers is {declared}, the files hold {len(numbers)} blocks",
            where,
            "the checkpoint is incomplete or the config is not its own",
        )
    unbuildable = "not a causal language model that can be built"
    with torch.device("meta"), _parameters_on_meta(), quiet_transformers(unbuildable, where, _REMEDY):
        draft = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    disk_names(draft, weights)
    with _parameters_on_meta(), quiet_transformers(unbuildable, where, _REMEDY):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # models without experts say so with a ValueError
            model.set_experts_implementation("eager")
    return model.eval()


def decoder_blocks(model: Any, folder: Path) -> tuple[str, Any]:
    """The module list that holds the decoder blocks: as long as num_hidden_layers, most parameters."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    best: tuple[int, str, Any] | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            size = sum(p.numel() for p in module.parameters())
            if best is None or size > best[0]:
                best = (size, name, module)
    if best is None:
        raise CompressError(
            f"no list of {count} decoder blocks in {type(model).__name__}",
            str(folder),
            "this architecture is not supported",
        )
    return best[1], best[2]


def disk_names(model: Any, weights: Weights) -> tuple[dict[str, list[Part]], list[str]]:
    """Which disk tensors make each parameter, through transformers' renamings and converters.

    Returns:
        parameter or saved buffer -> parts; disk tensors that belong to neither.

    Raises:
        CompressError: a parameter without a tensor, a shape that does not fit, a fusion we cannot undo.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [m for m in mapping if isinstance(m, WeightConverter)]
    renamings = [m for m in mapping if not isinstance(m, WeightConverter)]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    params = dict(model.named_parameters(remove_duplicate=False))
    known = {**params, **model.state_dict(keep_vars=True)}  # parameters and the buffers that are saved
    shapes = weights.shapes_cache()
    parts: dict[str, list[Part]] = {}
    unexpected = []
    for name in shapes:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known:
            unexpected.append(name)
        elif pattern is None:
            parts.setdefault(target, []).append(Part(name))
        else:
            parts.setdefault(target, []).append(_expert_part(name, by_pattern[pattern], pattern))
    for found in parts.values():
        found.sort(key=lambda p: (p.expert or 0, p.order))
    _check(parts, params, shapes, model, weights)
    for name in parts.keys() - params.keys():
        _same_shape(parts[name][0].name, shapes[parts[name][0].name], tuple(known[name].shape))
    ordered = {n: parts[n] for n in known if n in parts}
    return ordered, unexpected


def _expert_part(name: str, converter: Any, pattern: str) -> Part:
    """A 2-D expert matrix's place in a fused 3-D parameter, from the converter's operations."""
    operations = [type(op).__name__ for op in converter.operations]
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        raise CompressError(f"tensor is fused by {operations}", name, "this architecture's layout is not supported")
    inside = re.escape(pattern).replace(r"\*", r"(\d+)").replace(re.escape(r"(\d+)"), r"(\d+)")
    match = re.search(inside, name) or re.search(r"experts\.(\d+)\.", name)
    if match is None:
        raise CompressError("no expert number in its name", name, "this architecture's layout is not supported")
    order = list(converter.source_patterns).index(pattern)
    return Part(name, int(match.group(1)), order)


def _check(
    parts: Mapping[str, list[Part]],
    params: Mapping[str, nn.Parameter],
    shapes: Mapping[str, tuple[int, ...]],
    model: Any,
    weights: Weights,
) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    by_id: dict[int, list[str]] = {}
    for name, param in params.items():
        by_id.setdefault(id(param), []).append(name)
    empty = [name for name in params if not parts.get(name) and name not in tied]
    missing = [name for name in empty if not any(parts.get(other) for other in by_id[id(params[name])])]
    if missing:
        what = f"{len(missing)} of {len(params)} parameters have no tensor in the files, first {missing[0]}"
        raise CompressError(what, str(weights.folder), "the checkpoint is incomplete: download it again")
    for name, param in params.items():
        found = parts.get(name, [])
        for part in found:
            dtype = weights.dtype(part.name)
            if param.is_floating_point() and not (dtype.is_floating_point and dtype.itemsize > 1):
                what = f"stored as {str(dtype).removeprefix('torch.')}, not as 16- or 32-bit floats"
                raise CompressError(what, part.name, "pass the original checkpoint (is this one quantised?)")
        if not found:
            continue
        if found[0].expert is not None:
            _check_experts(name, tuple(param.shape), found, shapes)
            continue
        if len(found) > 1:
            what = f"{len(found)} tensors for one parameter: {found[0].name} and {found[1].name}"
            raise CompressError(what, str(weights.folder), "remove the file that does not belong to the model")
        have, want = shapes[found[0].name], tuple(param.shape)
        if found[0].name.removesuffix(".weight") in weights.packed and keeps_transposed(model, name):
            want = want[::-1]
        _same_shape(found[0].name, have, want)


def _same_shape(name: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    if have != want:
        what = f"the file holds {list(have)}, config.json implies {list(want)}"
        raise CompressError(what, name, "config.json does not belong to these weights")


def _check_experts(name: str, shape: tuple[int, ...], parts: list[Part], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every expert's matrices together fill its slice [out, in] of a fused parameter [experts, out, in]."""
    if len(shape) != 3 or any(len(shapes[p.name]) != 2 for p in parts):
        raise CompressError(f"fused from experts to {list(shape)}", name, "this architecture's layout is not supported")
    experts, rows, columns = shape
    for expert in range(experts):
        mine = [p.name for p in parts if p.expert == expert]
        if not mine:
            what = f"expert {expert} of {experts} has no tensor in the files"
            raise CompressError(what, name, "the checkpoint is incomplete: download it again")
        have = (sum(shapes[n][0] for n in mine), *{shapes[n][1] for n in mine})
        _same_shape(" + ".join(mine), have, (rows, columns))
    if len(parts) > experts * len(mine):
        raise CompressError(f"config.json says {experts} experts, the files hold more", name, "config.json is damaged")
