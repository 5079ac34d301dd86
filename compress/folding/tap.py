"""Run a loaded block with factors on what enters its matrices and what leaves them: how folding asks a block questions.

Everything is done from outside, by hooks and at calls of F.linear, so no weight changes and any module's own forward is
what answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress.blocks import BlockModel, Linear


@dataclass(frozen=True, eq=False)
class Node:
    """A parameter that multiplies activations: a linear layer, a router, all experts of one projection.

    Attributes:
        param: the model's parameter.
        linears: its matrices on disk, in the order of experts and rows.
        rows, columns: of one expert's matrix, as the model runs it.
        experts: 0 for a plain matrix.
        module: None for a parameter that the block passes to F.linear itself.
        bias: the parameter that is added to its output.
    """

    param: str
    linears: tuple[Linear, ...]
    rows: int
    columns: int
    experts: int = 0
    module: nn.Module | None = None
    bias: str | None = None

    def slices(self, expert: int | None) -> list[Linear]:
        """The disk matrices of one expert; of all with None."""
        return [x for x in self.linears if expert is None or x.expert == expert]


@dataclass(frozen=True, eq=False)
class Norm:
    """A norm of the block.

    Attributes:
        name: of the module.
        module: with a 1-D parameter "weight".
        offset: the gain is weight + offset; None if it is no such thing.
    """

    name: str
    module: nn.Module
    offset: float | None = None


@dataclass
class Trace:
    """What one run showed: the block's output, the inputs of each node (expert by expert) and the norms' outputs."""

    out: Tensor | None = None
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    address: dict[str, tuple[int, int]] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    made: dict[tuple[int, int], str] = field(default_factory=dict)  # memory -> the norm that returned it
    biased: set[str] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)  # so that no address is used twice

    def read(self, node: Node) -> Tensor:
        """[tokens, columns]: all that the node was given."""
        return torch.cat([x.reshape(-1, x.shape[-1]) for x in self.inputs[node.param]])


class _Tap(TorchFunctionMode):
    """While active, notes what enters nodes and leaves norms, and multiplies inputs and outputs by the given factors.

    Args:
        into, out_of: by parameter; [columns] or [rows], with the experts in front for fused parameters.
        norms: by module name, factors of what the norm returns.
    """

    def __init__(
        self,
        block: Block,
        trace: Trace,
        into: Mapping[str, Tensor],
        out_of: Mapping[str, Tensor],
        norms: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self._block, self._trace, self._into, self._out_of = block, trace, into, out_of
        self._stack = ExitStack()
        for node in block.nodes.values():
            if node.module is not None:
                handle = node.module.register_forward_pre_hook(self._before(node))
                self._stack.callback(handle.remove)
                if node.param in out_of:
                    handle = node.module.register_forward_hook(_multiply(out_of[node.param]))
                    self._stack.callback(handle.remove)
        for norm in block.norms:
            if norm.name in norms:
                self._stack.callback(norm.module.register_forward_hook(_multiply(norms[norm.name])).remove)
            self._stack.callback(norm.module.register_forward_hook(self._after(norm)).remove)

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def _before(self, node: Node) -> Callable[[Any, tuple[Any, ...]], Any]:
        def hook(module: Any, args: tuple[Any, ...]) -> Any:
            return (self._enter(node, args[0], None), *args[1:])

        return hook

    def _after(self, norm: Norm) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, args: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.shape[-1:] == norm.module.weight.shape:
                self._trace.alive.append(out)
                self._trace.norms[norm.name] = out.detach().reshape(-1, out.shape[-1]).clone()
                self._trace.made[out.data_ptr(), out.numel()] = norm.name

        return hook

    def _enter(self, node: Node, x: Tensor, expert: int | None) -> Tensor:
        trace = self._trace
        trace.alive.append(x)
        trace.inputs.setdefault(node.param, []).append(x.detach().clone())
        trace.address.setdefault(node.param, (x.data_ptr(), x.numel()))
        trace.calls[node.param] = trace.calls.get(node.param, 0) + 1
        factor = self._into.get(node.param)
        if factor is None:
            return x
        return x * (factor if expert is None else factor[expert])

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is not F.linear:
            return func(*args, **given)
        weight = args[1] if len(args) > 1 else given["weight"]
        node, expert = self._block.node_at(weight)
        if node is None:
            return func(*args, **given)
        bias = args[2] if len(args) > 2 else given.get("bias")
        if bias is not None:
            self._trace.biased.add(node.param)
        x = args[0] if args else given["input"]
        out = F.linear(self._enter(node, x, expert), weight, bias)
        factor = self._out_of.get(node.param)
        if factor is None:
            return out
        return out * (factor if expert is None else factor[expert])


def _multiply(factor: Tensor) -> Callable[[Any, Any, Any], Any]:
    return lambda module, args, out: out * factor if isinstance(out, Tensor) else out


class Block:
    """A loaded decoder block with its nodes and norms, to be run with factors on them.

    Args:
        hidden: [rows, seq, hidden], few tokens, of a shape that `model.embed` has seen.
    """

    def __init__(self, model: BlockModel, block: int, hidden: Tensor) -> None:
        self.model, self.index, self.hidden = model, block, hidden
        self.prefix = model.block_names[block] + "."
        self.dtype = hidden.dtype
        module = model.model.get_submodule(model.block_names[block])
        self.norms = [
            Norm(self.prefix + name, m)
            for name, m in module.named_modules()
            if isinstance(weight := m._parameters.get("weight"), nn.Parameter) and weight.dim() == 1
        ]
        self.nodes = _nodes(model, block)
        self._bare = [
            (data.data_ptr(), data.numel() * data.element_size() // max(node.experts, 1), max(node.experts, 1), node)
            for node in self.nodes.values()
            if node.module is None
            for data in [model.model.get_parameter(node.param).data]
        ]

    def node_at(self, weight: Tensor) -> tuple[Node | None, int | None]:
        """The node, and its expert, that a weight belongs to; (None, None) for modules of their own."""
        for start, step, count, node in self._bare:
            index, inside = divmod(weight.data_ptr() - start, step)
            if inside == 0 and 0 <= index < count and weight.shape[-1] == node.columns:
                return node, index if node.experts else None
        for *_, node in self._bare:  # a router may run on a float32 copy of its weight
            data = self.model.model.get_parameter(node.param).data
            if weight.shape == data.shape and weight.dtype != data.dtype and torch.equal(weight, data.to(weight.dtype)):
                return node, None
        return None, None

    def run(
        self,
        into: Mapping[str, Tensor] | None = None,
        out_of: Mapping[str, Tensor] | None = None,
        norms: Mapping[str, Tensor] | None = None,
    ) -> Trace:
        """Run the block once; see `_Tap`."""
        trace = Trace()
        with _Tap(self, trace, into or {}, out_of or {}, norms or {}):
            trace.out = self.output()
        return trace

    def output(self) -> Tensor:
        """float32 [rows, seq, hidden]"""
        shape = (self.hidden.shape[0], self.hidden.shape[1])
        return self.model.run(self.index, self.hidden, shape).float()


def parts_of(model: BlockModel, param: str) -> list[str]:
    """The disk tensors that fill a parameter."""
    return [part.name for part in model.parts.get(param, [])]


def _nodes(model: BlockModel, block: int) -> dict[str, Node]:
    by_param: dict[str, list[Linear]] = {}
    for linear in model.linears(block):
        by_param.setdefault(linear.param, []).append(linear)
    nodes = {}
    for param, linears in by_param.items():
        shape = tuple(model.model.get_parameter(param).shape)
        if linears[0].expert is not None:
            ordered = sorted(linears, key=lambda x: (x.expert or 0, x.first_row))
            nodes[param] = Node(param, tuple(ordered), shape[1], shape[2], experts=shape[0])
            continue
        owner = param.rpartition(".")[0]
        module = model.model.get_submodule(owner)
        bias = f"{owner}.bias" if getattr(module, "bias", None) is not None else None
        nodes[param] = Node(param, (linears[0],), *linears[0].shape, module=module, bias=bias)
    for param, _ in model.uncovered(block):
        data, disk = model.model.get_parameter(param), parts_of(model, param)
        if data.dim() == 2 and len(disk) == 1:
            rows, columns = data.shape
            nodes[param] = Node(
                param, (Linear(disk[0].removesuffix(".weight"), param, (rows, columns)),), rows, columns
            )
    return nodes


def for_experts(factor: Tensor, node: Node) -> Tensor:
    """A factor [n] as the run wants it for a node: the same for each of its experts."""
    return factor.expand(node.experts, -1) if node.experts else factor
