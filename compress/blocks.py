"""A causal language model whose decoder blocks are loaded, run and freed one at a time.

The model is built by transformers with every parameter on the meta device; parameters become real while their block is
in use. Nothing here knows an architecture: the list of decoder blocks, the arguments each block is called with, the
disk names of parameters and the layout of fused experts are all found from the model and from transformers' own
conversion tables.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress import linear as computing
from compress.ahead import Reader, Timed, untimed
from compress.errors import CompressError
from compress.formats.base import LayerShape
from compress.lane import Lane
from compress.repeatable import OwnAttention
from compress.skeleton import Part, decoder_blocks, disk_names, keeps_transposed, skeleton
from compress.types import Packed
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
        lean: what stands outside the blocks is on the device only while it is needed (`rest`).

    Raises:
        CompressError: not a causal language model, shapes that do not fit config.json, tensors missing.
    """

    def __init__(
        self,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        trust_remote_code: bool = False,
        lean: bool = False,
    ) -> None:
        self.weights = weights
        self.dtype = dtype
        self.device = device
        self.lean = lean
        self.model = skeleton(weights, trust_remote_code)
        self.model.config.use_cache = False
        self._list_name, self._blocks = decoder_blocks(self.model, weights.folder)
        self.parts, self.unexpected = disk_names(self.model, weights)
        buffers = dict(self.model.named_buffers())
        self._buffers = {n: self.parts.pop(n)[0].name for n in list(self.parts) if n in buffers}
        self._calls: dict[tuple[int, int], list[Call]] = {}
        self._tuple: bool | None = None
        self._ready = False
        self._experts_packed: dict[str, dict[int, list[tuple[int, Packed]]]] = {}

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
        if name is None or f"{name}.weight" not in self.parts:
            return None
        if module.weight is self.model.get_input_embeddings().weight:
            return None
        disk = self.parts[f"{name}.weight"][0].name.removesuffix(".weight")
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
                disk = self.parts[param][0].name.removesuffix(".weight")
                own = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
                found.append(Linear(disk, param, shape[::-1] if transposed else shape, transposed, own_forward=own))
        for param, parts in self.parts.items():
            if param.startswith(prefix + ".") and parts[0].expert is not None:
                found.extend(self._experts(param, parts))
        return found

    def _experts(self, param: str, parts: list[Part]) -> Iterator[Linear]:
        shapes = self.weights.shapes_cache()
        for part in parts:
            rows, columns = shapes[part.name]
            before = sum(shapes[p.name][0] for p in parts if p.expert == part.expert and p.order < part.order)
            name = part.name.removesuffix(".weight")
            yield Linear(name, param, (rows, columns), False, part.expert, before)

    def disk_tensors(self, block: int) -> list[str]:
        """Dense names of every disk tensor that belongs to a block."""
        prefix = self.block_names[block] + "."
        return [p.name for param, parts in self.parts.items() if param.startswith(prefix) for p in parts]

    def dense_linears(self) -> list[str]:
        """Module names of the linear layers outside the blocks (lm_head)."""
        prefix = self._list_name + "."
        return [n for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and not n.startswith(prefix)]

    # -- loading and freeing ------------------------------------------------------------------------------------

    def ahead(self, blocks: Iterable[int], lane: Lane, timed: Timed = untimed) -> Reader:
        """Reads each of `blocks` while the one before it is worked on; what it takes is for `load`."""
        return Reader([(b, self._stored(b)) for b in blocks], self.weights.checkpoint.read, lane, timed)

    def _stored(self, block: int) -> list[str]:
        """Names of the stored tensors that make a block; none for the head, which `prepare` reads."""
        if block == len(self._blocks):
            return []
        return [stored for name in self.disk_tensors(block) for stored in self.weights.stored(name)]

    def load(self, block: int, ready: dict[str, Tensor] | None = None) -> nn.Module:
        """Make a block's parameters real on the device, in the compute dtype. The block behind the last is the head.

        Args:
            ready: its stored tensors, as far as they were read already; emptied on the way.

        Raises:
            CompressError: a tensor that holds NaN or infinity, or does in the compute dtype.
        """
        if block == len(self._blocks):
            self.prepare()
            return self.model  # type: ignore[no-any-return]
        self._fill(self._params(self.block_names[block]), ready)
        loaded: nn.Module = self._blocks[block].to(self.device)
        for linear in self.linears(block):
            self._compute_as_stored(linear)
        return loaded

    def free(self, block: int) -> None:
        """Send a block's parameters back to the meta device (the head stays)."""
        if block == len(self._blocks):
            return
        for param in self._params(self.block_names[block]):
            _set(self.model, param, torch.empty_like(self.model.get_parameter(param), device="meta"))
        for module in self._blocks[block].modules():
            computing.remove(module)
        self._experts_packed.clear()
        self.rest()

    def rest(self) -> None:
        """Of a lean model, give back what stands outside the blocks until `prepare` reads it again."""
        if not self.lean or not self._ready:
            return
        fresh: dict[int, nn.Parameter] = {}  # one for those that are tied
        for name, param in list(self.model.named_parameters(remove_duplicate=False)):
            if not name.startswith(self._list_name + "."):
                empty = fresh.setdefault(id(param), nn.Parameter(torch.empty_like(param, device="meta"), False))
                _put(self.model, name, empty)
        self._ready = False

    def weight(self, linear: Linear) -> Tensor:
        """A loaded weight matrix as [out, in] (a view where possible)."""
        data: Tensor = self.model.get_parameter(linear.param).data
        if linear.expert is not None:
            return data[linear.expert, linear.first_row : linear.first_row + linear.shape[0]]
        return data.t() if linear.transposed else data

    def set_weight(self, linear: Linear, weight: Tensor) -> None:
        """Overwrite a loaded weight matrix with [out, in] values."""
        self.weight(linear).copy_(weight)

    def set_packed(self, linear: Linear, packed: Packed) -> Tensor:
        """Let a loaded layer compute what its packed form will. Returns the dequantised weight [out, in]."""
        dense = packed.dequantize()
        self.set_weight(linear, dense)
        if not packed.storage.activations:
            return dense
        if linear.expert is None:
            computing.install(self.module(linear), packed)
        else:
            slices = self._experts_packed.setdefault(linear.param, {}).setdefault(linear.expert, [])
            slices.append((linear.first_row, packed))
        return dense

    def module(self, linear: Linear) -> nn.Module:
        """The module whose weight it is; of an expert, that which holds all of them."""
        return self.model.get_submodule(linear.param.rpartition(".")[0])  # type: ignore[no-any-return]

    def bias(self, linear: Linear) -> tuple[str, Tensor] | None:
        """A loaded layer's bias and its name on disk, None where it has none (or shares it with other experts)."""
        param = linear.param.rpartition(".")[0] + ".bias"
        if linear.expert is not None or param not in self.parts:
            return None
        return self.parts[param][0].name, self.model.get_parameter(param).data

    def set_stored(self, block: int, name: str, value: Tensor) -> None:
        """Overwrite what the disk tensor `name` fills in a loaded block by a value shaped as on disk."""
        linear = next((x for x in self.linears(block) if f"{x.name}.weight" == name), None)
        if linear is not None:
            self.set_weight(linear, value.t() if linear.transposed else value)
            return
        param = next(p for p, parts in self.parts.items() if any(part.name == name for part in parts))
        self.model.get_parameter(param).data.copy_(value)

    def _compute_as_stored(self, linear: Linear) -> None:
        if self.weights.activations(linear.name):
            self.set_packed(linear, self.weights.read_packed(linear.name, self.device))

    def _params(self, prefix: str) -> list[str]:
        return [p for p in self.parts if p.startswith(prefix + ".")]

    def _fill(self, params: Iterable[str], ready: dict[str, Tensor] | None = None) -> None:
        """Make parameters real; looks at the device once for all of them."""
        read: list[tuple[str, Tensor]] = []  # stored tensors, and whether each is finite
        for param in params:
            self._fill_one(param, ready, read)
        finite = torch.stack([good for _, good in read]).tolist() if read else []
        for (name, _), good in zip(read, finite, strict=True):
            if not good:
                self._refuse(name)

    def _fill_one(self, param: str, ready: dict[str, Tensor] | None, read: list[tuple[str, Tensor]]) -> None:
        parts = self.parts[param]
        like = self.model.get_parameter(param)
        if parts[0].expert is None:
            value = self._read(parts[0].name, ready, read)
            if parts[0].name.removesuffix(".weight") in self.weights.packed and keeps_transposed(self.model, param):
                value = value.t()  # packed layers come as [out, in]
        else:
            value = torch.empty(like.shape, dtype=self.dtype, device=self.device)
            for linear in self._experts(param, parts):
                rows = slice(linear.first_row, linear.first_row + linear.shape[0])
                value[linear.expert, rows] = self._read(linear.name + ".weight", ready, read)
        _set(self.model, param, value.contiguous())

    def _read(self, name: str, ready: dict[str, Tensor] | None, read: list[tuple[str, Tensor]]) -> Tensor:
        """A tensor of the checkpoint on the device, in the compute dtype; noted in `read`."""
        # packed layers are unpacked there, on a GPU far faster
        value = self.weights.read(name, self.device, ready).to(self.dtype)
        read.append((name, all_finite(value)))
        return value

    def _refuse(self, name: str) -> None:
        """Raise CompressError for a tensor that is not finite in the compute dtype."""
        stored = self.weights.read(name, self.device)
        refuse_infinite(stored, name)
        what = f"its {float(stored.abs().max()):.1e} overflows {str(self.dtype).removeprefix('torch.')}"
        raise CompressError(what, name, "use --dtype bfloat16 or float32")

    # -- running ------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Load what stands outside the blocks (embeddings, final norm, head) and move buffers to the device."""
        if self._ready:
            return
        inside = self._list_name + "."
        self._fill(param for param in self.parts if not param.startswith(inside))
        self.model.tie_weights()
        head = self.head()
        if head is not None:
            self._compute_as_stored(head)
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
        rows, seq = tokens.shape
        self._calls.setdefault((rows, seq), calls)  # the first remain: graphs read their tensors
        return seen

    @torch.no_grad()
    def run(self, block: int, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """One loaded block on hidden states [rows, seq, hidden] of a token batch of `shape` seen by `embed`.

        The block behind the last is the head: it is run for those who watch its input, and returns `hidden`.
        """
        if block == len(self._blocks):
            self.logits(hidden, torch.zeros(shape, dtype=torch.int64))
            return hidden
        return self._made(block, hidden, shape)

    def traced(self, block: int, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        """`run` of a block, remembering what whoever watches it asks slopes of, and what depends on that; quantised
        inputs that do are taken as they were before."""
        with torch.enable_grad():
            return self._made(block, hidden.clone(), shape)  # which a block may write into

    def _made(self, block: int, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        fused = [(self.model.get_parameter(p).data, slices) for p, slices in self._experts_packed.items()]
        with computing.Experts(fused) if fused else contextlib.nullcontext():
            return self._called(block, hidden, shape, self._blocks[block])

    def vectors(self, block: int) -> dict[str, str]:
        """Gains of norms and biases of a block: name on disk -> parameter."""
        found = {p: self.parts[p] for p in self._params(self.block_names[block])}
        return {x[0].name: p for p, x in found.items() if len(x) == 1 and self.model.get_parameter(p).dim() == 1}

    def output(
        self,
        block: int,
        hidden: Tensor,
        shape: tuple[int, int],
        weights: Sequence[tuple[Linear, Tensor]],
        others: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """`run` with other weights [out, in] in place of some of the block's own; differentiable in them.

        Args:
            others: further parameters by their names.
        """
        prefix = len(self.block_names[block]) + 1
        given: dict[str, Tensor] = {param[prefix:]: value for param, value in (others or {}).items()}
        for linear, weight in weights:
            if linear.expert is None:
                given[linear.param[prefix:]] = weight.t() if linear.transposed else weight
            else:
                whole = given.get(linear.param[prefix:])
                if whole is None:
                    whole = given[linear.param[prefix:]] = self.model.get_parameter(linear.param).detach().clone()
                whole[linear.expert, linear.first_row : linear.first_row + linear.shape[0]] = weight
        module = self._blocks[block]
        return self._called(
            block, hidden, shape, lambda *args, **kwargs: torch.func.functional_call(module, given, args, kwargs)
        )

    def _called(self, block: int, hidden: Tensor, shape: tuple[int, int], function: Callable[..., Any]) -> Tensor:
        """What the block, or what stands in for it, returns when it is called as the model calls it."""
        if shape not in self._calls:  # how a block is called depends on nothing else
            self.embed(torch.zeros(shape, dtype=torch.int64))
        call = self._calls[shape][block]
        back = torch.is_grad_enabled() and hidden.device.type == "cuda"
        with OwnAttention() if back else contextlib.nullcontext():
            if call.keyword:
                out = function(*call.args, hidden_states=hidden, **call.kwargs)
            else:
                out = function(hidden, *call.args, **call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @torch.no_grad()
    def logits(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """float32 logits [rows, seq, vocab] from the hidden states that leave the last block."""
        out = self.predict(hidden, tokens)
        if out.numel() and bool(torch.isnan(out.amax())):  # which NaN is handed on by
            raise CompressError("its logits hold NaN", str(self.weights.folder), "try --dtype float32")
        return out.float()

    def predict(self, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Logits [rows, seq, vocab] in the compute dtype, differentiable in the hidden states."""
        self.prepare()
        given = (hidden.to(self.device),) if self._tuple else hidden.to(self.device)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return given

        with _forwards(self._blocks, [stand_in] * len(self._blocks)):
            out: Tensor = self.model(input_ids=tokens.to(self.device), use_cache=False).logits
        return out


def all_finite(value: Tensor) -> Tensor:
    """bool []: nothing in it is NaN or infinite. Reads it once: the least and the most are NaN where anything is."""
    if not value.numel():
        return torch.ones((), dtype=torch.bool, device=value.device)
    value = value.detach().float() if value.dtype.itemsize == 1 else value.detach()
    return torch.isfinite(torch.stack(torch.aminmax(value))).all()


def refuse_infinite(value: Tensor, name: str) -> None:
    """Raise CompressError for a weight with NaN or infinity in it."""
    if all_finite(value):
        return
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
    """Give a parameter a value by its name."""
    _put(model, name, nn.Parameter(value, requires_grad=False))


def _put(model: nn.Module, name: str, param: nn.Parameter) -> None:
    """Replace a parameter by its name."""
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = param
