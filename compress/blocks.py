"""A causal language model whose decoder blocks are loaded, run and freed one at a time.

The model is built by transformers with every parameter on the meta device; parameters become real while their block is
in use. Nothing here knows an architecture: the list of decoder blocks, the arguments each block is called with, the
disk names of parameters and the layout of fused experts are all found from the model and from transformers' own
conversion tables.
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
from torch import Tensor, nn

from compress.checkpoint import read_json
from compress.errors import CompressError
from compress.formats.base import LayerShape
from compress.weights import Weights

#: linear modules that steer experts: far too small to matter, far too sensitive to quantise
ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")


@dataclass(frozen=True)
class Linear:
    """One weight matrix of a decoder block, where the model keeps it and what the disk calls it.

    Attributes:
        name: on disk, without ".weight".
        param: the model's parameter that holds it.
        shape: (out_features, in_features).
        transposed: the parameter is [in, out].
        expert: index into a fused [experts, out, in] parameter, or None.
        first_row: where its rows begin in that parameter's out dimension.
        own_forward: its module computes in its own way (Falcon), so readers cannot keep it packed.
        head: it is the output head, behind the last block.
    """

    name: str
    param: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    first_row: int = 0
    own_forward: bool = False
    head: bool = False

    @property
    def layer_shape(self) -> LayerShape:
        return LayerShape(self.name, *self.shape, self.transposed, self.expert is not None, self.head)


@dataclass(frozen=True)
class _Part:
    """A disk tensor's place in a parameter."""

    name: str
    expert: int | None = None
    order: int = 0  # among the projections that are concatenated along the rows


@dataclass
class Call:
    """How the model calls one block, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    keyword: bool  # hidden_states is passed by name


class BlockModel:
    """See the module's text.

    Args:
        weights: the checkpoint.
        dtype: compute dtype of parameters and hidden states.
        device: where a block runs.
        trust_remote_code: allow model code from the checkpoint's folder.

    Raises:
        CompressError: not a causal language model, shapes that do not fit config.json, tensors missing.
    """

    def __init__(
        self, weights: Weights, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
    ) -> None:
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self.model = _skeleton(weights, trust_remote_code)
        self.model.config.use_cache = False
        self._list_name, self._blocks = _decoder_blocks(self.model, weights.folder)
        self._parts, self.unexpected = _disk_names(self.model, weights)
        buffers = dict(self.model.named_buffers())
        self._buffers = {n: self._parts.pop(n)[0].name for n in list(self._parts) if n in buffers}
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._tuple: bool | None = None
        self._ready = False

    @property
    def block_names(self) -> list[str]:
        """The model's module name of each decoder block."""
        return [f"{self._list_name}.{i}" for i in range(len(self._blocks))]

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return int(self.model.config.get_text_config().hidden_size)

    def head(self) -> Linear | None:
        """The output head, None when it is tied to the embeddings or not on disk."""
        module = self.model.get_output_embeddings()
        name = next((n for n, m in self.model.named_modules() if m is module), None)
        if name is None or f"{name}.weight" not in self._parts:
            return None
        if module.weight is self.model.get_input_embeddings().weight:
            return None
        disk = self._parts[f"{name}.weight"][0].name.removesuffix(".weight")
        rows, columns = module.weight.shape
        return Linear(disk, f"{name}.weight", (rows, columns), head=True)

    def uncovered(self, block: int) -> list[tuple[str, int]]:
        """Matrices of a block that are not linear layers: (parameter, weights), routers and convolutions among them."""
        mine = {linear.param for linear in self.linears(block)}
        inside = self._params(self.block_names[block])
        found = [(p, self.model.get_parameter(p)) for p in inside if p not in mine]
        return [(p, value.numel()) for p, value in found if value.dim() >= 2]

    def linears(self, block: int) -> list[Linear]:
        """The weight matrices of a block: nn.Linear, Conv1D, and each expert of fused 3-D tensors."""
        from transformers.pytorch_utils import Conv1D

        prefix = self.block_names[block]
        found: list[Linear] = []
        for name, module in self._blocks[block].named_modules():
            if isinstance(module, (nn.Linear, Conv1D)):
                param = f"{prefix}.{name}.weight"
                shape = tuple(module.weight.shape)
                transposed = isinstance(module, Conv1D)
                disk = self._parts[param][0].name.removesuffix(".weight")
                own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
                found.append(Linear(disk, param, shape[::-1] if transposed else shape, transposed, own_forward=own))
        for param, parts in self._parts.items():
            if param.startswith(prefix + ".") and parts[0].expert is not None:
                found.extend(self._experts(param, parts))
        return found

    def _experts(self, param: str, parts: list[_Part]) -> Iterator[Linear]:
        shapes = self.weights.shapes_cache()
        for part in parts:
            rows, columns = shapes[part.name]
            before = sum(shapes[p.name][0] for p in parts if p.expert == part.expert and p.order < part.order)
            name = part.name.removesuffix(".weight")
            yield Linear(name, param, (rows, columns), False, part.expert, before)

    def disk_tensors(self, block: int) -> list[str]:
        """Dense names of every disk tensor that belongs to a block."""
        prefix = self.block_names[block] + "."
        return [p.name for param, parts in self._parts.items() if param.startswith(prefix) for p in parts]

    def dense_linears(self) -> list[str]:
        """Module names of the linear layers outside the blocks (lm_head)."""
        prefix = self._list_name + "."
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]

    # -- loading and freeing ------------------------------------------------------------------------------------

    def load(self, block: int) -> nn.Module:
        """Make a block's parameters real on the device, in the compute dtype. The block behind the last is the head."""
        if block == len(self._blocks):
            self.prepare()
            return self.model  # type: ignore[no-any-return]
        for param in self._params(self.block_names[block]):
            self._fill(param)
        loaded: nn.Module = self._blocks[block].to(self.device)
        return loaded

    def free(self, block: int) -> None:
        """Send a block's parameters back to the meta device (the head stays)."""
        if block == len(self._blocks):
            return
        for param in self._params(self.block_names[block]):
            _set(self.model, param, torch.empty_like(self.model.get_parameter(param), device="meta"))

    def weight(self, linear: Linear) -> Tensor:
        """A loaded weight matrix as [out, in] (a view where possible)."""
        data: Tensor = self.model.get_parameter(linear.param).data
        if linear.expert is not None:
            return data[linear.expert, linear.first_row : linear.first_row + linear.shape[0]]
        return data.t() if linear.transposed else data

    def set_weight(self, linear: Linear, weight: Tensor) -> None:
        """Overwrite a loaded weight matrix with [out, in] values."""
        self.weight(linear).copy_(weight)

    def _params(self, prefix: str) -> list[str]:
        return [p for p in self._parts if p.startswith(prefix + ".")]

    def _fill(self, param: str) -> None:
        parts = self._parts[param]
        like = self.model.get_parameter(param)
        if parts[0].expert is None:
            value = self._read(parts[0].name)
            if parts[0].name.removesuffix(".weight") in self.weights.packed and _keeps_transposed(self.model, param):
                value = value.t()  # packed layers come as [out, in]
        else:
            value = torch.empty(like.shape, dtype=self.dtype, device=self.device)
            for linear in self._experts(param, parts):
                rows = slice(linear.first_row, linear.first_row + linear.shape[0])
                value[linear.expert, rows] = self._read(linear.name + ".weight")
        _set(self.model, param, value.contiguous())

    def _read(self, name: str) -> Tensor:
        """A tensor of the checkpoint on the device, in the compute dtype."""
        stored = self.weights.read(name)
        value = stored.to(self.device, self.dtype)
        if not bool(torch.isfinite(value).all()):
            refuse_infinite(stored, name)
            what = f"its {float(stored.abs().max()):.1e} overflows {str(self.dtype).removeprefix('torch.')}"
            raise CompressError(what, name, "use --dtype bfloat16 or float32")
        return value

    # -- running ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load what stands outside the blocks (embeddings, final norm, head) and move buffers to the device."""
        if self._ready:
            return
        inside = self._list_name + "."
        for param in self._parts:
            if not param.startswith(inside):
                self._fill(param)
        self.model.tie_weights()
        for name, buffer in list(self.model.named_buffers()):
            if name in self._buffers:  # small, so those of the blocks are loaded here too, once and for all
                stored = self.weights.read(self._buffers[name])
                refuse_infinite(stored, self._buffers[name])
                buffer.copy_(stored)
            if not name.startswith(inside):
                owner, _, leaf = name.rpartition(".")
                self.model.get_submodule(owner)._buffers[leaf] = buffer.to(self.device)
        self._ready = True

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [rows, seq, hidden] that enter block 0; remembers how each block is called.

        Args:
            tokens: int64 [rows, seq], no padding.
        """
        self.prepare()
        known = len(self.model.get_input_embeddings().weight)
        if int(tokens.max()) >= known:
            what = f"the tokenizer gives id {int(tokens.max())}, the embeddings hold {known} rows"
            raise CompressError(what, str(self.weights.folder), "pass the tokenizer that belongs to this model")
        tokens = tokens.to(self.device)
        if self._tuple is None and len(self._blocks) > 1:
            self._tuple = False
            first = self._record(tokens)
            second_dim = first[1].dim()
            self._tuple = second_dim != first[0].dim()
        hidden = self._record(tokens)[0]
        return hidden

    def _record(self, tokens: Tensor) -> list[Tensor]:
        """Run the model with blocks that hand their input on, noting the arguments of each."""
        seen: list[Tensor] = []
        calls: list[Call] = []

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            keyword = "hidden_states" in kwargs
            hidden = kwargs.pop("hidden_states") if keyword else args[0]
            seen.append(hidden)
            calls.append(Call(args if keyword else args[1:], kwargs, keyword))
            if len(calls) == len(self._blocks):
                raise _Stop
            return (hidden,) if self._tuple else hidden

        with _forwards(self._blocks, [stand_in] * len(self._blocks)), contextlib.suppress(_Stop):
            self.model.base_model(input_ids=tokens, use_cache=False)
        self._calls[tuple(tokens.shape)] = calls  # type: ignore[index]
        return seen

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """One loaded block on hidden states [rows, seq, hidden] of a token batch of `shape` seen by `embed`.

        The block behind the last is the head: it is run for those who watch its input, and returns `hidden`.
        """
        if block == len(self._blocks):
            self.logits(hidden, torch.zeros(shape, dtype=torch.int64))
            return hidden
        call = self._calls[shape][block]
        if call.keyword:
            out = self._blocks[block](*call.args, hidden_states=hidden, **call.kwargs)
        else:
            out = self._blocks[block](hidden, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """float32 logits [rows, seq, vocab] from the hidden states that leave the last block."""
        self.prepare()
        given = (hidden.to(self.device),) if self._tuple else hidden.to(self.device)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return given

        with _forwards(self._blocks, [stand_in] * len(self._blocks)):
            out: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        if bool(torch.isnan(out).any()):
            raise CompressError("its logits hold NaN", str(self.weights.folder), "try --dtype float32")
        return out.float()


def refuse_infinite(value: Tensor, name: str) -> None:
    """Raise CompressError for a weight with NaN or infinity in it."""
    bad = int(value.numel() - torch.isfinite(value).sum())
    if bad:
        what = f"{bad} of its {value.numel()} values are NaN or infinite"
        raise CompressError(what, name, "the checkpoint is damaged: download it again")


class _Stop(Exception):
    """Ends a recording run behind the last block."""


@contextlib.contextmanager
def _forwards(modules: Any, functions: list[Any]) -> Iterator[None]:
    """Replace the forward of each module for a while."""
    try:
        for module, function in zip(modules, functions, strict=True):
            module.forward = function
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by name."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _keeps_transposed(model: Any, param: str) -> bool:
    """Whether a parameter is the weight of a Conv1D, kept as [in, out]."""
    from transformers.pytorch_utils import Conv1D

    owner, _, leaf = param.rpartition(".")
    return leaf == "weight" and isinstance(model.get_submodule(owner), Conv1D)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every new parameter lands on the meta device; buffers (rotary tables, masks) stay real."""
    plain = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        plain(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The model's transformers config without its quantization_config. Raises CompressError."""
    from transformers import AutoConfig

    where = folder / "config.json"
    _refuse_counts(read_json(where), str(where))
    with quiet_transformers("transformers cannot read it", str(where), _REMEDY):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
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


def _skeleton(weights: Weights, trust_remote_code: bool) -> Any:
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
    with torch.device("meta"), quiet_transformers(unbuildable, where, _REMEDY):
        draft = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    _disk_names(draft, weights)
    with _parameters_on_meta(), quiet_transformers(unbuildable, where, _REMEDY):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(ValueError):  # models without experts say so with a ValueError
            model.set_experts_implementation("eager")
    return model.eval()


def _decoder_blocks(model: Any, folder: Path) -> tuple[str, Any]:
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


def _disk_names(model: Any, weights: Weights) -> tuple[dict[str, list[_Part]], list[str]]:
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
    parts: dict[str, list[_Part]] = {}
    unexpected = []
    for name in shapes:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if target not in known:
            unexpected.append(name)
        elif pattern is None:
            parts.setdefault(target, []).append(_Part(name))
        else:
            parts.setdefault(target, []).append(_expert_part(name, by_pattern[pattern], pattern))
    for found in parts.values():
        found.sort(key=lambda p: (p.expert or 0, p.order))
    _check(parts, params, shapes, model, weights)
    for name in parts.keys() - params.keys():
        _same_shape(parts[name][0].name, shapes[parts[name][0].name], tuple(known[name].shape))
    ordered = {n: parts[n] for n in known if n in parts}
    return ordered, unexpected


def _expert_part(name: str, converter: Any, pattern: str) -> _Part:
    """A 2-D expert matrix's place in a fused 3-D parameter, from the converter's operations."""
    operations = [type(op).__name__ for op in converter.operations]
    if operations not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
        raise CompressError(f"tensor is fused by {operations}", name, "this architecture's layout is not supported")
    inside = re.escape(pattern).replace(r"\*", r"(\d+)").replace(re.escape(r"(\d+)"), r"(\d+)")
    match = re.search(inside, name) or re.search(r"experts\.(\d+)\.", name)
    if match is None:
        raise CompressError("no expert number in its name", name, "this architecture's layout is not supported")
    order = list(converter.source_patterns).index(pattern)
    return _Part(name, int(match.group(1)), order)


def _check(
    parts: Mapping[str, list[_Part]],
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
        if found[0].name.removesuffix(".weight") in weights.packed and _keeps_transposed(model, name):
            want = want[::-1]
        _same_shape(found[0].name, have, want)


def _same_shape(name: str, have: tuple[int, ...], want: tuple[int, ...]) -> None:
    if have != want:
        what = f"the file holds {list(have)}, config.json implies {list(want)}"
        raise CompressError(what, name, "config.json does not belong to these weights")


def _check_experts(
    name: str, shape: tuple[int, ...], parts: list[_Part], shapes: Mapping[str, tuple[int, ...]]
) -> None:
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
