"""Statistics of what enters each linear layer of a block, by hooks (as have sensitivity.py, folding/tap.py).

Layers that are fed the same tensor (q, k, v; gate, up) share one set. Experts of a fused 3-D tensor are seen at
their calls of `torch.nn.functional.linear`, which the eager experts implementation makes once an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.ahead import Timed, untimed
from compress.blocks import BlockModel, Linear
from compress.errors import CompressError
from compress.hidden import Activations, out_of_memory
from compress.sensitivity import Shares, Slopes
from compress.types import LayerStats, Needs, Past


@dataclass
class Inputs:
    """Layers with one common input, in the order in which the block runs them.

    Attributes:
        linears: they share in_features and the statistics.
        stats: of their input.
        weighted: tokens count by what an error there does.
    """

    linears: list[Linear]
    stats: LayerStats
    weighted: bool = False

    @property
    def stage(self) -> str:
        """Layers of one stage run side by side: all experts' first projections are one stage."""
        return self.linears[0].param


@dataclass
class _Sum:
    linears: list[Linear]
    needs: Needs
    tokens: int = 0
    seen: list[Tensor] = field(default_factory=list)  # inputs of the first batch, kept so that addresses stay unique
    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    mean: Tensor | None = None
    above: Tensor | None = None
    mass: Tensor | None = None  # of the tokens' weights

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        self.tokens += len(x)
        if self.needs.hessian and not self.needs.weighted:
            if self.hessian is None:
                self.hessian = torch.zeros(x.shape[1], x.shape[1], device=x.device)
            accumulate(self.hessian, x)
        if self.needs.ranges:
            size = x.abs()
            self.absmax = _joined(torch.maximum, self.absmax, size.amax(0).float())
            self.mean_abs = _joined(torch.add, self.mean_abs, size.sum(0, dtype=torch.float32))
            self.mean = _joined(torch.add, self.mean, x.sum(0, dtype=torch.float32))
        if self.needs.above is not None:
            self.above = _joined(torch.add, self.above, (x.abs() >= self.needs.above).sum(0, dtype=torch.float32))

    def add_weighted(self, x: Tensor, weights: Tensor) -> None:
        """To the Hessian alone."""
        if self.hessian is None or self.mass is None:
            self.hessian = torch.zeros(x.shape[-1], x.shape[-1], device=x.device)
            self.mass = torch.zeros((), dtype=torch.float64, device=x.device)
        accumulate(self.hessian, x.reshape(-1, x.shape[-1]), None, weights.flatten())
        self.mass += weights.sum(dtype=torch.float64)

    def finish(self, width: int, device: torch.device) -> tuple[Inputs, Tensor]:
        """The sums as means, in their place, and whether they are finite (bool, on the device).

        Statistics that no input ever reached are zeros.
        """
        count = max(self.tokens, 1)
        none = torch.zeros(width, device=device)

        def mean(total: Tensor | None, wanted: bool) -> Tensor | None:
            if not wanted:
                return None
            return none if total is None else total.div_(float(count))

        hessian: Tensor | None = None
        if self.needs.hessian:
            hessian = torch.zeros(width, width, device=device) if self.hessian is None else self.hessian
            hessian.div_(float(count) if self.mass is None else self.mass.float().clamp(min=1e-38))
        absmax = (none if self.absmax is None else self.absmax) if self.needs.ranges else None
        found = LayerStats(
            self.tokens,
            hessian,
            absmax,
            mean(self.mean_abs, self.needs.ranges),
            mean(self.mean, self.needs.ranges),
            mean(self.above, self.needs.above is not None),
        )
        looked = [hessian.diagonal() if hessian is not None else none, none if absmax is None else absmax]
        finite = torch.stack([torch.isfinite(x).all() for x in looked]).all()
        return Inputs(self.linears, found, self.mass is not None), finite


def _joined(how: Callable[[Tensor, Tensor], Tensor], old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else how(old, new)


def accumulate(total: Tensor, x: Tensor, other: Tensor | None = None, weights: Tensor | None = None) -> None:
    """total += y^T x in float32, y = x unless another is given. total: float32 [in, in], x, y: [tokens, in].

    weights: float32 [tokens], what each token counts.

    On a GPU 16-bit activations are multiplied as they are: their products are exact in float32, and the sum runs in
    float32. On a CPU they are widened first, since its 16-bit product would round the sum.
    """
    if weights is not None:
        return _accumulate_weighted(total, x, other, weights)
    y = x if other is None else other
    if x.device.type == "cuda" and x.dtype != torch.float32:
        total += torch.mm(y.t(), x, out_dtype=torch.float32)
    else:
        total.addmm_(y.float().t(), x.float())


def _accumulate_weighted(total: Tensor, x: Tensor, other: Tensor | None, weights: Tensor) -> None:
    root = weights.sqrt()
    top = root.amax().clamp_(min=1e-30)
    share = (root / top)[:, None]  # at most 1, so that 16 bits hold what they multiply
    if x.device.type == "cuda" and x.dtype != torch.float32:
        share = share.to(x.dtype)  # both sides by the same number: the sum is of squares, whatever it was rounded to
        scaled = x * share
        product = torch.mm((scaled if other is None else other * share).t(), scaled, out_dtype=torch.float32)
    else:
        scaled = x.float() * share
        product = (scaled if other is None else other.float() * share).t() @ scaled
    total.addcmul_(product, top.square())


def collect(
    model: BlockModel,
    block: int,
    linears: Collection[Linear],
    activations: Activations,
    needs: Needs,
    clock: Timed = untimed,
) -> list[Inputs]:
    """Run a loaded block over all batches and return what `needs` names of the given layers' inputs.

    Where the device runs out of memory, all batches are run anew with fewer rows at once: what was added up until then
    is dropped, so no token counts twice and the sums of a block come from batches of one size.

    Args:
        clock: what is spent on the sums counts as "hessian".

    Raises:
        CompressError: an activation is NaN or infinite (names the layer); a layer that no input ever reached.
    """
    if block == len(model.block_names) or not needs.hessian:
        needs = replace(needs, weighted=False)
    try:
        sums = activations.within(lambda: _added_up(model, block, linears, activations, needs, clock))
    except RuntimeError as error:
        if not needs.weighted or out_of_memory(error):
            raise
        activations.note(
            f"a block cannot be differentiated ({str(error).splitlines()[0][:120]}): its tokens count alike"
        )
        needs = replace(needs, weighted=False)
        sums = activations.within(lambda: _added_up(model, block, linears, activations, needs, clock))
    reached = {linear.name for s in sums for linear in s.linears}
    missed = [linear for linear in linears if linear.name not in reached]
    sums += [_Sum([linear], needs) for linear in missed]
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


#: of so many pieces of the rows the last is held out
_HELD = 4


def collect_past(
    model: BlockModel, block: int, groups: list[Inputs], activations: Activations, originals: Activations
) -> list[Inputs]:
    """The groups with `LayerStats.past`, those that no other of them feeds. Runs a loaded block over all batches twice:
    as it is reached in the compressed model and in the original. Groups of experts are left as they are: other tokens
    reach them.

    Args:
        groups: of `collect`, with Hessians.
        originals: the hidden states that enter the block in the original model, of the same rows in equal batches.
    """
    mine = [group for group in groups if group.linears[0].expert is None and group.stats.tokens]
    mine = _unfed(model, block, mine, activations)
    sums = activations.within(lambda: _compared(model, block, mine, activations, originals))
    out = []
    for group in groups:
        found = sums.get(group.linears[0].name)
        past = None if found is None else found.past()
        out.append(Inputs(group.linears, replace(group.stats, past=past), group.weighted))
    return out


def _unfed(model: BlockModel, block: int, groups: list[Inputs], activations: Activations) -> list[Inputs]:
    """The groups whose inputs depend on none of those before them that are chosen.

    What corrects one layer changes what later ones get, and their statistics are of a block where nothing is corrected:
    the same error would be taken back again in each. In SmolLM2, 30 blocks of four groups, that ruins the model.
    """
    row = next(activations.pieces())[:1]
    chosen: list[Inputs] = []

    def inputs() -> dict[str, Tensor]:
        """What enters each group with the outputs of all layers of the chosen doubled."""
        seen: dict[str, Tensor] = {}
        with ExitStack() as stack:
            for group in groups:
                name, module = group.linears[0].name, model.module(group.linears[0])
                hook = module.register_forward_pre_hook(lambda _, args, n=name: seen.__setitem__(n, args[0].clone()))
                stack.callback(hook.remove)
            for linear in [x for group in chosen for x in group.linears]:
                hook = model.module(linear).register_forward_hook(lambda _, args, out: 2 * out)
                stack.callback(hook.remove)
            activations.run(block, row)
        return seen

    plain = now = inputs() if groups else {}
    for group in groups:
        name = group.linears[0].name
        if torch.equal(now[name], plain[name]):
            chosen.append(group)
            now = inputs()
    return chosen


@dataclass
class _Both:
    """Sums over seen and held rows, in this order."""

    tokens: list[int] = field(default_factory=lambda: [0, 0])
    mass: list[float | Tensor] = field(default_factory=lambda: [0.0, 0.0])  # of the tokens' weights
    cross: list[Tensor] = field(default_factory=list)
    own: list[Tensor] = field(default_factory=list)

    def add(self, part: int, original: Tensor, x: Tensor, weights: Tensor | None = None) -> None:
        original, x = (t.reshape(-1, t.shape[-1]) for t in (original, x))
        if not self.cross:
            self.cross, self.own = (
                [x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float32) for _ in "12"] for _ in "12"
            )
        weights = None if weights is None else weights.flatten()
        self.tokens[part] += len(x)
        self.mass[part] += len(x) if weights is None else weights.sum(dtype=torch.float64)
        accumulate(self.cross[part], x, original, weights)
        accumulate(self.own[part], x, None, weights)

    def past(self) -> Past | None:
        """None where one of the parts is empty."""
        mass = [float(m) for m in self.mass]
        if not all(self.tokens) or not all(mass):
            return None
        cross, own = ([t / m for t, m in zip(sums, mass, strict=True)] for sums in (self.cross, self.own))
        share = mass[1] / sum(mass)
        return Past(cross[0] - own[0], cross[1] - own[1], own[1], share)


def _compared(
    model: BlockModel, block: int, groups: list[Inputs], activations: Activations, originals: Activations
) -> dict[str, _Both]:
    sums = {group.linears[0].name: _Both() for group in groups}
    of = {linear.name: group for group in groups for linear in group.linears}
    seen: dict[str, Tensor] = {}  # what entered in the last run
    part, shares = 0, Shares()

    def tell(name: str, x: Tensor, weights: Tensor) -> None:
        first = of[name].linears[0].name
        mean = shares.add(first, len(of[name].linears), weights)
        if mean is not None:
            sums[first].add(part, before[first], x, mean)

    pieces = sum(-(-len(activations.batch(i)) // activations.rows) for i in range(len(activations)))
    with ExitStack() as stack:
        for group in groups:
            linear = group.linears[0]
            module = model.module(linear)
            handle = module.register_forward_pre_hook(lambda _, args, name=linear.name: seen.__setitem__(name, args[0]))
            stack.callback(handle.remove)
        weighed = [linear for group in groups if group.weighted for linear in group.linears]
        slopes = stack.enter_context(Slopes(model, weighed, tell))
        both = zip(activations.pieces(), originals.pieces(activations.rows), strict=True)
        first = 0
        for i, (ours, theirs) in enumerate(both):
            part = int(i % _HELD == _HELD - 1 or (pieces < _HELD and i == pieces - 1))
            originals.run(block, theirs)
            before = dict(seen)
            if weighed:
                slopes.run(block, ours, activations.tokens.shape[1], first)
            else:
                activations.run(block, ours)
            first += len(ours)
            for group in groups:
                name = group.linears[0].name
                if not group.weighted:
                    sums[name].add(part, before[name], seen[name].detach())
    return sums


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
    model: BlockModel, block: int, linears: Collection[Linear], activations: Activations, needs: Needs, clock: Timed
) -> list[_Sum]:
    """The sums of one run over all batches."""
    sums: dict[str, _Sum] = {}
    with _Watch(model, linears, sums, needs, clock) as watch:
        first = 0
        for states in activations.pieces():
            if watch.slopes is None:
                activations.run(block, states)
            else:
                watch.slopes.run(block, states, activations.tokens.shape[1], first)
            first += len(states)
            watch.first = False
            for s in sums.values():
                s.seen.clear()
    return list(sums.values())


class _Watch(TorchFunctionMode):
    """Feeds the inputs of watched layers to their sums while a block runs."""

    def __init__(
        self, model: BlockModel, linears: Collection[Linear], sums: dict[str, _Sum], needs: Needs, clock: Timed
    ) -> None:
        super().__init__()
        self.first = True
        self._clock = clock
        self._needs = needs
        self._sums = sums
        self._by_address: dict[tuple[int, tuple[int, ...], int], str] = {}
        self._owner: dict[str, str] = {}  # whose sum a layer's inputs are in
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

    def _see(self, linear: Linear, x: Tensor) -> None:
        """First batch: layers fed the very same memory join one sum. Later: only the sum's first layer adds."""
        if self.first:
            address = (x.data_ptr(), tuple(x.shape), x._version)
            owner = self._owner[linear.name] = self._by_address.setdefault(address, linear.name)
            if owner != linear.name:
                self._sums[owner].linears.append(linear)
                return
            # detached: x knows its graph, whose hooks know this sum, a circle that no collector sees
            self._sums[linear.name] = _Sum([linear], self._needs, seen=[x.detach()])
        if linear.name in self._sums:
            self._add(linear.name, x)

    def _add(self, name: str, x: Tensor) -> None:
        with self._clock("hessian"), torch.no_grad():
            self._sums[name].add(x)

    def _counts(self, name: str, x: Tensor, weights: Tensor) -> None:
        with self._clock("hessian"):
            owner = self._owner.get(name, name)
            members = len(self._sums[owner].linears) if name in self._owner else 1  # an expert's share one call
            mean = self._shares.add(owner, members, weights)
            if mean is not None:
                self._sums[owner].add_weighted(x, mean)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and self._experts:
            self._expert(args[0], args[1] if len(args) > 1 else (kwargs or {})["weight"], out)
        return out

    def _expert(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        for start, step, count, experts in self._experts:
            index, inside = divmod(weight.data_ptr() - start, step)
            if inside == 0 and 0 <= index < count and index in experts:
                mine = experts[index]
                if mine[0].name not in self._sums:
                    self._sums[mine[0].name] = _Sum(list(mine), self._needs)
                self._add(mine[0].name, x)
                if self.slopes is not None and len(x):
                    self.slopes.watch(mine[0].name, x, out)
                return
