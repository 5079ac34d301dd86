"""Statistics of what enters each linear layer of a block, by hooks (as have sensitivity.py, folding/tap.py).

Layers that are fed the same tensor (q, k, v; gate, up) share one set. Experts of a fused 3-D tensor are seen at
their calls of `torch.nn.functional.linear`, which the eager experts implementation makes once an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.ahead import Timed, untimed
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.hidden import Activations, out_of_memory
from compress.sensitivity import Shares, Slopes
from compress.sums import Inputs, Sum
from compress.types import Needs


def collect(
    model: BlockModel,
    block: int,
    linears: Collection[Linear],
    activations: Activations,
    needs: Needs,
    clock: Timed = untimed,
    originals: Activations | None = None,
) -> list[Inputs]:
    """Run a loaded block over all batches and return what `needs` names of the given layers' inputs.

    Where the device runs out of memory, all batches are run anew with fewer rows at once: what was added up until then
    is dropped, so no token counts twice and the sums of a block come from batches of one size.

    Args:
        clock: what is spent on the sums counts as "hessian".
        originals: the hidden states that enter the block in the original model, of the same rows in equal batches.
            With them the past is known of the layers that no other of these feeds.

    Raises:
        CompressError: an activation is NaN or infinite (names the layer); a layer that no input ever reached.
    """
    if block == len(model.block_names) or not needs.hessian:
        needs = replace(needs, weighted=False)

    def added_up() -> list[Sum]:
        return _added_up(model, block, linears, activations, originals, needs, clock)

    try:
        sums = activations.within(added_up)
    except RuntimeError as error:
        if not needs.weighted or out_of_memory(error):
            raise
        activations.note(
            f"a block cannot be differentiated ({str(error).splitlines()[0][:120]}): its tokens count alike"
        )
        needs = replace(needs, weighted=False)
        sums = activations.within(added_up)
    reached = {linear.name for s in sums for linear in s.linears}
    missed = [linear for linear in linears if linear.name not in reached]
    sums += [Sum([linear], needs) for linear in missed]
    means = [s.finish(s.linears[0].shape[1], model.device) for s in sums]
    finite = torch.stack([good for _, good in means]).tolist() if means else []
    for (found, _), good in zip(means, finite, strict=True):
        if not good:
            raise CompressError(
                "its input holds NaN or infinity (or overflows float32 when squared)",
                found.linears[0].name,
                "the checkpoint is damaged, or its activations overflow: try --dtype float32",
            )
    for linear in missed:
        if linear.expert is None:
            remedy = f"--exclude '{linear.name}' leaves it dense"
            raise CompressError("calibration never reached this layer", linear.name, remedy)
    return [found for found, _ in means]


def _unfed(model: BlockModel, block: int, linears: Collection[Linear], activations: Activations) -> set[str]:
    """The layers whose inputs depend on no other of them; no experts, which other tokens reach in the original model.

    What corrects one layer changes what later ones get, and their statistics are of a block where nothing is corrected:
    the same error would be taken back again in each. In SmolLM2, 30 blocks of four groups, that ruins the model.
    """
    row = next(activations.pieces())[:1]
    alone = [linear for linear in linears if linear.expert is None]

    def inputs(factor: float) -> dict[str, Tensor]:
        """What enters each layer where the outputs of all are multiplied by a factor."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for linear in alone:
                module = model.module(linear)
                before = module.register_forward_pre_hook(
                    lambda _, args, name=linear.name: seen.__setitem__(name, args[0].clone())
                )
                stack.callback(before.remove)
                stack.callback(module.register_forward_hook(lambda _, args, out: factor * out).remove)
            activations.run(block, row)
        return seen

    plain, other = inputs(1), inputs(2)
    return {name for name in plain if torch.equal(plain[name], other[name])}


class Shared:
    """Statistics that runs on the same rows and the same model would all find alike: those of the first block's inputs,
    before anything is compressed. The first run fills it, the others are given what it found."""

    def __init__(self) -> None:
        self._found: dict[tuple[Needs, tuple[str, ...]], list[Inputs]] = {}

    def get(self, needs: Needs, linears: Collection[Linear], make: Callable[[], list[Inputs]]) -> list[Inputs]:
        """What was found for these layers and needs, or what `make` finds now."""
        key = needs, tuple(linear.name for linear in linears)
        if key not in self._found:
            self._found[key] = make()
        mine = {linear.name: linear for linear in linears}
        return [
            Inputs([mine[x.name] for x in group.linears], group.stats, group.weighted) for group in self._found[key]
        ]


def _added_up(
    model: BlockModel,
    block: int,
    linears: Collection[Linear],
    activations: Activations,
    originals: Activations | None,
    needs: Needs,
    clock: Timed,
) -> list[Sum]:
    """The sums of one run over all batches."""
    sums: dict[str, Sum] = {}
    unfed = set() if originals is None else _unfed(model, block, linears, activations)
    theirs = repeat(None) if originals is None else originals.pieces(activations.rows)
    with _Watch(model, linears, sums, needs, clock) as watch:
        for ours, original in zip(activations.pieces(), theirs, strict=False):
            if originals is not None and original is not None:
                with watch.originals(unfed):
                    originals.run(block, original)
            if watch.slopes is None:
                activations.run(block, ours)
            else:
                watch.slopes.run(block, ours, activations.tokens.shape[1], watch.rows)
            watch.rows += len(ours)
            for s in sums.values():
                s.seen.clear()
    return list(sums.values())


class _Watch(TorchFunctionMode):
    """Feeds the inputs of watched layers to their sums while a block runs.

    Attributes:
        rows: how many have gone through the block.
    """

    def __init__(
        self, model: BlockModel, linears: Collection[Linear], sums: dict[str, Sum], needs: Needs, clock: Timed
    ) -> None:
        super().__init__()
        self.rows = 0
        self._clock = clock
        self._needs = needs
        self._sums = sums
        self._by_address: dict[tuple[int, tuple[int, ...], int], str] = {}
        self._owner: dict[str, str] = {}  # whose sum a layer's inputs are in
        self._asked: Collection[str] | None = None  # the layers whose inputs the original model is running for
        self._original: dict[str, Tensor] = {}
        self._stack = ExitStack()
        self._experts: list[tuple[int, int, int, dict[int, list[Linear]]]] = []
        fused: dict[str, dict[int, list[Linear]]] = {}
        for linear in linears:
            if linear.expert is None:
                handle = model.module(linear).register_forward_pre_hook(self._hook(linear))
                self._stack.callback(handle.remove)
            else:
                fused.setdefault(linear.param, {}).setdefault(linear.expert, []).append(linear)
        for param, experts in fused.items():
            data = model.model.get_parameter(param)
            step = data[0].numel() * data.element_size()
            self._experts.append((data.data_ptr(), step, len(data), experts))
        self._shares = Shares()
        self.slopes: Slopes | None = None
        if needs.weighted:
            modules = [linear for linear in linears if linear.expert is None]
            self.slopes = self._stack.enter_context(Slopes(model, modules, self._counts))

    def __exit__(self, *exc: Any) -> None:
        self._stack.close()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def _hook(self, linear: Linear) -> Callable[[Any, tuple[Any, ...]], None]:
        def before(module: Any, args: tuple[Any, ...]) -> None:
            self._see(linear, args[0])

        return before

    @contextmanager
    def originals(self, names: Collection[str]) -> Iterator[None]:
        """While the original's hidden states go through the block: of these layers, their inputs are kept."""
        self._asked, self._original = names, {}
        try:
            yield
        finally:
            self._asked = None

    def _see(self, linear: Linear, x: Tensor) -> None:
        """First batch: layers fed the very same memory join one sum. Later: only the sum's first layer adds."""
        if self._asked is not None:
            if linear.name in self._asked:
                self._original[linear.name] = x
            return
        if not self.rows:
            address = (x.data_ptr(), tuple(x.shape), x._version)
            owner = self._owner[linear.name] = self._by_address.setdefault(address, linear.name)
            if owner != linear.name:
                self._sums[owner].linears.append(linear)
                return
            # detached: x knows its graph, whose hooks know this sum, a circle that no collector sees
            self._sums[linear.name] = Sum([linear], self._needs, seen=[x.detach()])
        if linear.name in self._sums:
            self._add(linear.name, x)

    def _add(self, name: str, x: Tensor) -> None:
        with self._clock("hessian"), torch.no_grad():
            self._sums[name].add(x, self.rows, self._beside(name, x))

    def _counts(self, name: str, x: Tensor, weights: Tensor) -> None:
        with self._clock("hessian"):
            owner = self._owner.get(name, name)
            members = len(self._sums[owner].linears) if name in self._owner else 1  # an expert's share one call
            mean = self._shares.add(owner, members, weights)
            if mean is not None:
                self._sums[owner].add_weighted(x, mean, self.rows, self._beside(owner, x))

    def _beside(self, name: str, x: Tensor) -> Tensor | None:
        """What the original model gives a layer in place of x, token by token."""
        original = self._original.get(name)
        return original if original is not None and original.shape == x.shape else None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and self._experts and self._asked is None:
            return self._expert(args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"], out)
        return out

    def _expert(self, x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        for start, step, count, experts in self._experts:
            index, inside = divmod(weight.data_ptr() - start, step)
            if inside == 0 and 0 <= index < count and index in experts:
                mine = experts[index]
                if mine[0].name not in self._sums:
                    self._sums[mine[0].name] = Sum(list(mine), self._needs)
                self._add(mine[0].name, x)
                if self.slopes is not None and len(x):
                    return self.slopes.watch(mine[0].name, x, out)
                return out
        return out
