"""Apply a transform to a loaded block: rescale channels on the edges that edges.py proves.

What is divided is divided as it will be stored. A norm's gain is rounded to its dtype on disk first; what it really
became, not what was asked for, is what the readers' columns are multiplied by, in float32, so the block's function does
not move with that rounding. Biases are rounded after (half a unit in the last place, noted). Where a matrix on an edge
stays dense in 16 bits (a router, an excluded layer) all scales of the edge are powers of two, which leave it exact.

Where attention heads share a value head, several columns of the reader come from one row. The transform sees the
largest `absmax` and the mean `mean_abs` of such columns, and of the scales that it returns for them the smallest
counts: for SmoothQuant and equalisation that is the paper's formula for the row with all its readers, for AWQ all of
them are equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.folding.edges import Channels, Found, Site, apart, find
from compress.folding.tap import Block
from compress.folding.work import Work, joined
from compress.sums import Inputs
from compress.types import Edge, LayerStats, Transform

#: tokens of the sample that edges are proved on
_ROWS, _TOKENS = 2, 32

#: how far a rescaled edge may move the block's output, as a share of the largest change that the block makes
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}

#: a sweep in which no scale leaves this distance from 1 is the last
_SETTLED = 1e-3


@dataclass
class Folded:
    """What a transform did to a block, which is changed in place.

    Attributes:
        inputs: the groups that were given, with statistics of the rescaled channels. `above` and `spread` cannot be
            rescaled: they are None where the channels moved.
        weights: float32 [out, in], the rescaled weights of layers about to be compressed, by name, where the block
            holds them only rounded to its 16-bit dtype. Give them to the next fold and to the pass.
        changed: dense tensors that changed, by name on disk, in their stored dtype, on the CPU.
        means: float32 [in] by layer: what the bias of the LayerNorm before it says of the mean of its input.
        edges: how many edges were rescaled (each expert counts).
        notes: what the report must say.
    """

    inputs: list[Inputs]
    weights: dict[str, Tensor] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    means: dict[str, Tensor] = field(default_factory=dict)
    edges: int = 0
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def fold(
    model: BlockModel,
    block: int,
    groups: Sequence[Inputs],
    transform: Transform,
    sample: Tensor | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Folded:
    """Rescale the channels of a loaded block (not the head's).

    Args:
        model: with float weights of the block on the device; they are changed in place.
        groups: the layers about to be compressed with their statistics, as `stats.collect` returns them.
        transform: what decides the scales.
        sample: [rows, seq, hidden], hidden states that enter the block; the first few tokens are used. None: random.
        weights: `Folded.weights` of an earlier transform of this block.
    """
    hidden = _sample(model, sample)
    room = Block(model, block, hidden)
    found = find(room, transform.makers)
    work = Work(model, groups, dict(weights or {}))
    seen = room.output()
    done: set[int] = set()  # ids of edges
    for _ in range(transform.sweeps):
        moved = 0.0
        for edge in found.edges:
            if id(edge.site) in found.reasons:
                continue
            work.begin()
            most = _rescale(work, edge, transform)
            if not most:
                continue
            now = room.output()
            wrong = _moved(now, seen, hidden)
            if not wrong <= _TOLERANCE[model.dtype]:
                work.undo()
                found.reasons[id(edge.site)] = f"rescaled, it moved the block's output by {wrong:.0e}: undone"
                continue
            work.accept()
            seen = now
            done.add(id(edge))
            moved = max(moved, most)
        if moved < _SETTLED:
            break
    edges = sum(max(e.maker.experts, 1) if e.maker else 1 for e in found.edges if id(e) in done)
    notes = _notes(found, done, work, transform)
    return Folded(work.inputs(), work.weights, work.dense(), _means(found, work), edges, notes)


def _moved(now: Tensor, before: Tensor, hidden: Tensor) -> float:
    """How far a block's output moved, as a share of the largest change that the block makes to `hidden`.

    In 16 bits, where rounding may send a token to another expert, the quarter of the tokens that moved most is left
    out: an edge that was wrong would move them all.
    """
    share = 1.0 if hidden.dtype == torch.float32 else 0.75
    return float(apart(now, before, hidden.dtype).quantile(share)) / max(
        float((before - hidden.float()).abs().max()), 1e-30
    )


def _sample(model: BlockModel, given: Tensor | None) -> Tensor:
    """A few tokens' hidden states, of a shape for which the model knows how its blocks are called."""
    if given is None:
        generator = torch.Generator().manual_seed(0)
        given = torch.randn(_ROWS, _TOKENS, model.hidden_size, generator=generator)
    hidden = given[:_ROWS, :_TOKENS].to(model.device, model.dtype).contiguous()
    shape = (hidden.shape[0], hidden.shape[1])
    if shape not in model._calls:
        model.embed(torch.zeros(shape, dtype=torch.int64))
    return hidden


# -- one edge -----------------------------------------------------------------------------------------------------


def _rescale(work: Work, edge: Channels, transform: Transform) -> float:
    """Ask for an edge's scales (an expert's each) and apply them. Returns the largest |log s|, 0 if nothing changed."""
    if edge.maker is None:
        return _rescale_norm(work, edge.site, transform)
    experts: Sequence[int | None] = range(edge.maker.experts) if edge.maker.experts else [None]
    return max(_rescale_rows(work, edge, expert, transform) for expert in experts)


def _readers(work: Work, site: Site, expert: int | None) -> tuple[list[Linear], list[Linear]]:
    """All matrices that read a site (one expert's), and of these the ones about to be compressed."""
    every = [x for node in site.readers for x in node.slices(expert)]
    return every, [x for x in every if x.name in work.chosen]


def _stats(work: Work, linears: Sequence[Linear]) -> LayerStats:
    return joined([work.stats[i] for i in sorted({work.groups[x.name] for x in linears})])


def _sane(s: Tensor, powers: bool) -> Tensor:
    """float32 scales, 1 for what is no scale; the nearest powers of two where asked for."""
    s = s.float()
    s = torch.where(s.isfinite() & (s > 0), s, 1.0)
    return torch.exp2(s.log2().round()) if powers else s


def _far(s: Tensor) -> float:
    return float(s.log().abs().max())


def _rescale_norm(work: Work, site: Site, transform: Transform) -> float:
    norm = site.norm
    assert norm is not None
    assert norm.offset is not None
    every, chosen = _readers(work, site, None)
    if not chosen:
        return 0.0
    readers = tuple(work.get(x) for x in chosen)
    s = transform.scale(Edge("norm", readers, _stats(work, chosen), names=tuple(x.name for x in chosen)))
    if s is None:
        return 0.0
    s = _sane(s, work.dense16(every))
    gain = f"{norm.name}.weight"
    plain = work.vector(gain)
    old = plain + norm.offset
    new = work.rounded(gain, old / s - norm.offset)
    real = old / (new + norm.offset)
    usable = real.isfinite() & (real > 0) & (real / s < 2) & (real / s > 0.5)  # the gain's dtype may not reach it
    real = torch.where(usable, real, 1.0)
    if bool((real == 1).all()):
        return 0.0
    work.put_vector(gain, torch.where(usable, new, plain))
    if norm.module._parameters.get("bias") is not None:
        work.put_bias(f"{norm.name}.bias", work.vector(f"{norm.name}.bias") / real)
    for linear in every:
        work.put(linear, work.get(linear) * real)
    work.rescale_stats(chosen, real)
    return _far(real)


def _rescale_rows(work: Work, edge: Channels, expert: int | None, transform: Transform) -> float:
    maker, rows = edge.maker, edge.rows
    assert maker is not None
    assert rows is not None
    every, chosen = _readers(work, edge.site, expert)
    if not chosen:
        return 0.0
    made = maker.slices(expert)
    matrix = torch.cat([work.get(x) for x in made])
    bias = torch.zeros(maker.rows, device=matrix.device) if maker.bias is None else work.vector(maker.bias)
    known = rows >= 0
    place = rows.clamp(min=0)
    seen = torch.where(known[:, None], torch.cat([matrix, bias[:, None]], 1)[place], 0.0)
    readers = tuple(work.get(x) for x in chosen)
    stats = _shared(_stats(work, chosen), rows, maker.rows)
    s = transform.scale(Edge("linear", readers, stats, seen, tuple(x.name for x in chosen)))
    if s is None:
        return 0.0
    s = _sane(s, work.dense16([*every, *made]))
    by_row = torch.full((maker.rows,), float("inf"), device=s.device)
    by_row = by_row.scatter_reduce(0, place[known], s[known], "amin")
    by_row = torch.where(by_row.isinf(), 1.0, by_row)
    s = torch.where(known, by_row[place], 1.0)
    if bool((s == 1).all()):
        return 0.0
    start = 0
    for linear in made:
        mine = by_row[start : start + linear.shape[0]]
        start += linear.shape[0]
        if bool((mine != 1).any()):
            work.put(linear, work.get(linear) / mine[:, None])
    if maker.bias is not None:
        work.put_bias(maker.bias, bias / by_row)
    for linear in every:
        work.put(linear, work.get(linear) * s)
    work.rescale_stats(chosen, s)
    return _far(s)


def _shared(stats: LayerStats, rows: Tensor, count: int) -> LayerStats:
    """Columns that one row makes get the largest absmax and the mean mean_abs of them all."""
    known = rows >= 0
    place = rows[known]

    def over(x: Tensor | None, how: str) -> Tensor | None:
        if x is None:
            return None
        together = torch.zeros(count, device=x.device).scatter_reduce(0, place, x[known], how, include_self=False)
        return torch.where(known, together[rows.clamp(min=0)], x)

    return replace(stats, absmax=over(stats.absmax, "amax"), mean_abs=over(stats.mean_abs, "mean"))


# -- what is said of it -------------------------------------------------------------------------------------------


def _means(found: Found, work: Work) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for site in found.sites:
        if site.norm is not None and site.norm.module._parameters.get("bias") is not None:
            mean = work.vector(f"{site.norm.name}.bias")
            out |= {x.name: mean for x in _readers(work, site, None)[1]}
    return out


def _notes(found: Found, done: set[int], work: Work, transform: Transform) -> list[str]:
    notes = []
    reasons = {id(e.site): f"{transform.name} asked for no other scale" for e in found.edges if id(e) not in done}
    reasons |= found.reasons
    for site in found.sites:
        names = [x.name for x in _readers(work, site, None)[1]]
        if id(site) in reasons and names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            notes.append(f"{', '.join(names[:4])}{more}: not rescaled: {reasons[id(site)]}")
    reached = {x.name for site in found.sites for node in site.readers for x in node.linears}
    notes += [f"{name}: not rescaled: the sample never reached it" for name in sorted(work.chosen - reached)]
    partly = [e for e in found.edges if id(e) in done and e.rows is not None and bool((e.rows < 0).any())]
    for edge in partly:
        assert edge.rows is not None
        what = f"{int((edge.rows < 0).sum())} of {len(edge.rows)} columns were not rescaled: their rows were not found"
        notes.append(f"{edge.site.readers[0].linears[0].name}: {what}")
    if work.residue > 0:
        notes.append(
            f"rescaled biases were rounded to their stored dtype, by at most {work.residue:.1e} of the largest"
        )
    return notes
