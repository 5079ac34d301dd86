"""Where a loaded block allows a rescaling of channels, found by running it. No architecture is known here by name.

A rescaling divides channels where they are made (a norm's gain, rows of a linear layer) by s and multiplies the columns
of every layer that reads them by s. Nothing is taken on trust from names or shapes:

- readers: the linear layers whose input is the very memory that a norm returned, or rows gathered from it (experts);
- rows: which row of an earlier layer makes which column of a later one is read off the block (rowmaps.py);
- proof: with random powers of two on both sides at once the block's output must stay, while one side alone moves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.folding.rowmaps import maps
from compress.folding.tap import Block, Node, Norm, Trace, for_experts

#: of the motion that one side of an edge alone causes, how much may be left when both sides are scaled (powers of two
#: leave nothing; experts may be summed in another order)
_LEFT = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 5e-3}


@dataclass(frozen=True, eq=False)
class Site:
    """Layers that read one tensor.

    Attributes:
        readers: they have the same number of columns.
        norm: what made the tensor, if a norm did.
        order: of the first reader in the block's run.
    """

    readers: tuple[Node, ...]
    norm: Norm | None
    order: int

    @property
    def columns(self) -> int:
        return self.readers[0].columns


@dataclass(frozen=True, eq=False)
class Channels:
    """A proved edge.

    Attributes:
        site: who reads.
        maker: the linear layer that makes the channels; None where the site's norm does.
        rows: int64 [columns], the maker's row behind each column, -1 for none that was found.
    """

    site: Site
    maker: Node | None = None
    rows: Tensor | None = None


@dataclass
class Found:
    """The proved edges of a block, all sites, and for sites without an edge of a kind why there is none."""

    edges: list[Channels]
    sites: list[Site]
    reasons: dict[int, str]  # by id of the site


@torch.no_grad()
def find(block: Block, makers: Sequence[str]) -> Found:
    """All proved edges of a block, norms before linear layers, in the order in which the block runs.

    Args:
        makers: "norm", "linear" or both: what is looked for.
    """
    plain = block.run()
    sites, twice = _sites(block, plain)
    reasons = {id(s): f"{s.readers[0].param} is run more than once" for s in sites if s.readers[0].param in twice}
    edges: list[Channels] = []
    for site in sites:
        if id(site) in reasons:
            continue
        if site.norm is None:
            reasons[id(site)] = "no norm feeds it"
        elif "norm" not in makers:
            reasons[id(site)] = "a norm feeds it"
        else:
            reason = _refusal(block, site, plain)
            if reason is None:
                edges.append(Channels(site))
            else:
                reasons[id(site)] = reason
    if "linear" in makers:
        open_sites = [s for s in sites if s.norm is None and s.readers[0].param not in twice]
        for site in open_sites:
            reasons[id(site)] = "no layer before it makes its channels one for one"
        edges += _linear_edges(block, plain, open_sites, reasons)
    for edge in edges:
        reasons.pop(id(edge.site), None)
    return Found(edges, sites, reasons)


def _sites(block: Block, plain: Trace) -> tuple[list[Site], set[str]]:
    """Group the nodes that ran by what they read; also the parameters of modules that ran more than once."""
    order = {param: i for i, param in enumerate(plain.inputs)}
    twice = {p for p, n in plain.calls.items() if n > 1 and not block.nodes[p].experts}
    norms = {norm.name: norm for norm in block.norms}
    groups: dict[Any, list[Node]] = {}
    for param in order:
        node = block.nodes[param]
        made = plain.made.get(plain.address[param])
        if made is None:
            made = next((n for n, y in plain.norms.items() if _rows_of(plain.read(node), y)), None)
        if made is not None and param not in twice:
            key: Any = made
        else:
            key = param if node.experts or param in twice else plain.address[param]
        groups.setdefault(key, []).append(node)
    sites = []
    for key, nodes in groups.items():
        norm = norms.get(key) if isinstance(key, str) else None
        if norm is not None:
            norm = replace(norm, offset=gain_offset(norm.module))
        sites.append(Site(tuple(nodes), norm, min(order[n.param] for n in nodes)))
    return sites, twice


def _rows_of(x: Tensor, y: Tensor) -> bool:
    """Whether every row of x [n, width] is a row of y [tokens, width]."""
    if x.shape[-1] != y.shape[-1] or not len(x):
        return False
    return all(bool((row == y).all(1).any()) for row in x)


@torch.no_grad()
def gain_offset(norm: nn.Module) -> float | None:
    """The o of a norm that multiplies by weight + o (0 or 1), by running it; None if it does something else."""
    weight, bias = norm._parameters["weight"], norm._parameters.get("bias")
    assert weight is not None
    kept = [(p, p.data) for p in (weight, bias) if p is not None]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator).to(weight.device, weight.dtype)
    outs = []
    try:
        for value in (0.0, 1.0, 2.0):
            weight.data = torch.full_like(kept[0][1], value)
            if bias is not None:
                bias.data = torch.zeros_like(bias.data)
            out = norm(x)
            if not isinstance(out, Tensor) or out.shape != x.shape:
                return None
            outs.append(out.double())
    except (TypeError, RuntimeError):  # it wants other arguments: no norm of one tensor
        return None
    finally:
        for param, data in kept:
            param.data = data
    zero, one, two = outs
    slope = one - zero
    top = float(slope.abs().max())
    if not top > 0:
        return None
    offset = float(round(float((zero * slope).sum() / slope.square().sum())))
    wrong = max(float((zero - offset * slope).abs().max()), float((two - (2 + offset) * slope).abs().max()))
    return offset if offset in (0.0, 1.0) and wrong < 0.03 * top else None


def _refusal(block: Block, site: Site, plain: Trace) -> str | None:
    """Why the channels that a norm feeds to a site cannot be rescaled; None if they can."""
    norm = site.norm
    assert norm is not None
    if norm.offset is None:
        return f"the gain of {norm.name} is neither its weight nor 1 + its weight"
    unseen = [n.param for n in block.nodes.values() if n.param not in plain.inputs and n.columns == site.columns]
    if unseen:
        return f"{unseen[0]} was not reached by the sample, so it may read the same norm"
    size = _random_powers((site.columns,), block)
    into = {n.param: for_experts(size, n) for n in site.readers}
    return _disproof(block, plain, into, {}, {norm.name: 1 / size})


def _disproof(
    block: Block, plain: Trace, into: dict[str, Tensor], out_of: dict[str, Tensor], norms: dict[str, Tensor]
) -> str | None:
    """Scale both sides of an edge, then the maker's alone: why this is no edge, None if it is one."""
    assert plain.out is not None
    both, one = block.run(into, out_of, norms).out, block.run({}, out_of, norms).out
    assert both is not None
    assert one is not None
    left, moved = (float(apart(x, plain.out, block.dtype).max()) for x in (both, one))
    if not moved > 0 or not math.isfinite(moved):
        return "the block's output does not depend on it"
    if not left <= _LEFT[block.dtype] * moved:
        return f"the probe moved the block's output by {left / moved:.0e} of what half of the rescaling does"
    return None


def apart(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """[tokens]: each token's largest difference of two block outputs, beyond what rounding to `dtype` explains."""
    rounding = 4 * torch.finfo(dtype).eps * y.abs().flatten(0, -2).amax(0)
    return ((x - y).abs() - rounding).amax(-1).clamp(min=0.0).flatten()


def _random_powers(shape: tuple[int, ...], block: Block) -> Tensor:
    """1/4, 1/2, 2 or 4, in the block's dtype."""
    generator = torch.Generator().manual_seed(shape[-1])
    pick = torch.randint(4, shape, generator=generator)
    return torch.tensor([0.25, 0.5, 2.0, 4.0])[pick].to(block.hidden.device, block.dtype)


def _linear_edges(block: Block, plain: Trace, sites: list[Site], reasons: dict[int, str]) -> list[Channels]:
    order = {param: i for i, param in enumerate(plain.inputs)}
    found: dict[int, Channels] = {}
    for maker in (block.nodes[param] for param in order):
        later = [
            site
            for site in sites
            if id(site) not in found
            and site.order > order[maker.param]
            and all(reader.experts == maker.experts for reader in site.readers)
        ]
        if not later or maker.param in plain.biased or plain.calls[maker.param] > max(maker.experts, 1):
            continue
        for i, rows in maps(block, plain, maker, [site.readers[0] for site in later]):
            site = later[i]
            reason = _row_refusal(block, plain, maker, site, rows)
            if reason is None:
                found[id(site)] = Channels(site, maker, rows)
            else:
                reasons[id(site)] = reason
    return sorted(found.values(), key=lambda e: e.site.order)


def _row_refusal(block: Block, plain: Trace, maker: Node, site: Site, rows: Tensor) -> str | None:
    shape = (maker.experts, maker.rows) if maker.experts else (maker.rows,)
    size = _random_powers(shape, block)
    used = torch.zeros(maker.rows, dtype=torch.bool, device=rows.device)
    used[rows[rows >= 0]] = True
    size = torch.where(used, size, 1.0)
    into = torch.where(rows >= 0, size[..., rows.clamp(min=0)], 1.0)
    return _disproof(block, plain, {n.param: into for n in site.readers}, {maker.param: 1 / size}, {})
