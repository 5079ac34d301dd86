"""What each matrix of a decoder block is to a rotation, found by running the block. No architecture is known by name.

The residual stream enters the block, norms read it, linear layers read what the norms made of it, others add to it:

- a norm reads the stream if, with all norms silenced, what enters it is the block's input plus a constant;
- it lets a rotation pass if, with a gain of 1, norm(x R) = norm(x) R: RMSNorm does, LayerNorm does not;
- its readers are those that folding proves (folding/edges.py: only they read what it returns, channel by channel);
- a layer writes to the stream if, with what comes after it silenced, doubling some of its outputs moves the block's
  output in those channels and in no other. A norm that writes in this sense stands between a layer and the stream: its
  gain is tied to channels, so the stream cannot be rotated.

Value heads are the layers of which folding finds that one's rows make the other's columns one for one, and that
allow what attention allows and a gated product does not: rotating the rows of each head and back its columns.

All names are relative to the block, so that what was found in one block can be tried in the next of its kind; rotate.py
proves every block as a whole, whatever was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compress.errors import CompressError
from compress.folding.edges import apart, find, gain_offset
from compress.folding.tap import Block, Node, Norm, for_experts
from compress.rotation.matrices import Orthogonal, heads_in, heads_out, rotation

#: of what a probe moves on purpose, how much it may move elsewhere
_ELSEWHERE = 1e-3
_NOT = "--no-residual rotates the value heads alone"


@dataclass(frozen=True, eq=False)
class Heads:
    """Value heads.

    Attributes:
        maker, reader: parameters, relative to the block, of the layer whose rows make the values and of the one that
            reads what attention made of them.
        rows: int64 [heads, width], the maker's rows of each key-value head. The reader's columns are heads of `width`
            that lie one after the other.
    """

    maker: str
    reader: str
    rows: Tensor

    @property
    def width(self) -> int:
        return self.rows.shape[1]


@dataclass(frozen=True, eq=False)
class Roles:
    """The matrices of a block that a rotation changes, by parameter relative to the block.

    Attributes:
        gains: norm -> the o of its gain, weight + o, for those that read the stream.
        readers: parameter -> the norm whose output it reads.
        writers: parameters of what is added to the stream.
        heads: value heads.
    """

    gains: Mapping[str, float] = field(default_factory=dict)
    readers: Mapping[str, str] = field(default_factory=dict)
    writers: frozenset[str] = frozenset()
    heads: tuple[Heads, ...] = ()


def kind_of(block: Block) -> tuple[object, ...]:
    """Equal for blocks that are built alike, as far as names and shapes tell."""
    cut = len(block.prefix)
    nodes = tuple((p[cut:], n.rows, n.columns, n.experts) for p, n in block.nodes.items())
    return nodes, tuple((n.name[cut:], len(_gain(n.module))) for n in block.norms)


@torch.no_grad()
def find_roles(block: Block, residual: bool, heads: bool) -> Roles:
    """What may be rotated in a loaded float32 block.

    Args:
        residual: the residual stream is to be rotated.
        heads: value heads are.

    Raises:
        CompressError: the stream is to be rotated and cannot be: what stands in the way.
    """
    cut = len(block.prefix)
    found = find(block, [name for name, wanted in (("norm", residual), ("linear", heads)) if wanted])
    pairs = [(e.maker, e.site.readers[0], e.rows) for e in found.edges if e.maker is not None and e.rows is not None]
    pairs = [(maker, reader, rows) for maker, reader, rows in pairs if not maker.experts and not reader.experts]
    values = tuple(h for maker, reader, rows in pairs if (h := _heads(block, maker, reader, rows)) is not None)
    if not residual:
        return Roles(heads=values)
    streams = _stream_norms(block)
    for norm in block.norms:
        if norm not in streams and len(_gain(norm.module)) == block.model.hidden_size and _writes(block, norm=norm):
            what = (
                "this norm stands between a layer and the residual stream (a post-norm), so its gain cannot be folded"
            )
            raise CompressError(what, norm.name, _NOT)
    gains: dict[str, float] = {}
    readers: dict[str, str] = {}
    sites = {s.norm.name: s for s in found.sites if s.norm is not None}
    proved = {id(e.site) for e in found.edges if e.maker is None}
    for norm in streams:
        offset = gain_offset(norm.module)
        refuse_norm(norm.name, norm.module, offset)
        assert offset is not None
        site = sites.get(norm.name)
        if site is None:
            raise CompressError("it reads the residual stream, and no linear layer reads it", norm.name, _NOT)
        if id(site) not in proved:
            raise CompressError(f"its gain cannot be folded: {found.reasons[id(site)]}", norm.name, _NOT)
        gains[norm.name[cut:]] = offset
        readers |= {node.param[cut:]: norm.name[cut:] for node in site.readers}
    width = block.model.hidden_size
    wide = [n for n in block.nodes.values() if all(x.shape[0] == n.rows == width for x in n.linears)]
    writers = frozenset(n.param[cut:] for n in wide if _writes(block, node=n))
    if not gains or not writers:
        what = f"{len(gains)} norms with a gain read its residual stream and {len(writers)} linear layers write to it"
        raise CompressError(what, block.prefix.rstrip("."), f"this architecture is not supported; {_NOT}")
    return Roles(gains, readers, writers, values)


def refuse_norm(name: str, norm: nn.Module, offset: float | None) -> None:
    """Raise CompressError unless a rotation passes a norm once its gain is 1.

    Args:
        offset: what `gain_offset` found.
    """
    if norm._parameters.get("bias") is not None:
        what = "a LayerNorm with a bias: a rotation of the residual stream does not pass it"
    elif offset is None:
        what = "its gain is neither its weight nor 1 + its weight, so it cannot be folded"
    elif not _passes(norm, offset):
        what = "it does not turn with its input, as RMSNorm does (LayerNorm subtracts the mean)"
    else:
        return
    raise CompressError(what, name, _NOT)


def _passes(norm: nn.Module, offset: float) -> bool:
    """Whether norm(x R) = norm(x) R where the gain is 1."""
    weight = _gain(norm)
    kept = weight.data
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(8, len(weight), generator=generator) + 1).to(weight.device)  # a mean that would be subtracted
    matrix = rotation(len(weight), seed=1)
    try:
        weight.data = torch.full_like(kept, 1 - offset)
        plain, turned = norm(x), norm(matrix.times(x).float())
    finally:
        weight.data = kept
    want = matrix.times(plain)
    return bool((turned - want).abs().max() <= 1e-4 * want.abs().max())


def _gain(norm: nn.Module) -> nn.Parameter:
    weight = norm._parameters["weight"]
    assert weight is not None
    return weight


def _silent(block: Block, names: set[str]) -> dict[str, Tensor]:
    """Factors that make norms return zeros."""
    return {n.name: torch.zeros_like(_gain(n.module).data) for n in block.norms if n.name in names}


def _stream_norms(block: Block) -> list[Norm]:
    """The norms that read the residual stream itself, in the order in which the block lists them."""
    width = block.model.hidden_size
    entered: dict[str, Tensor] = {}

    def note(name: str, args: tuple[object, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].shape == block.hidden.shape:
            entered.setdefault(name, args[0].detach().reshape(-1, width).clone())

    handles = [
        n.module.register_forward_pre_hook(lambda module, args, name=n.name: note(name, args)) for n in block.norms
    ]
    try:
        block.run(norms=_silent(block, {n.name for n in block.norms}))
    finally:
        for handle in handles:
            handle.remove()
    hidden = block.hidden.reshape(-1, width)
    out = []
    for norm in block.norms:
        if norm.name in entered:
            added = entered[norm.name] - hidden
            if bool((added - added[0]).abs().max() <= _ELSEWHERE * hidden.abs().max()):
                out.append(norm)
    return out


def _writes(block: Block, node: Node | None = None, norm: Norm | None = None) -> bool:
    """Whether what a layer or a norm returns is added to the stream channel by channel."""
    width = block.model.hidden_size
    some = torch.arange(width, device=block.hidden.device) % 3 == 0
    factor = torch.where(some, 2.0, 1.0)
    out_of = {} if node is None else {node.param: for_experts(factor, node)}
    norms = {} if norm is None else {norm.name: factor}
    plain, moved = block.run(), block.run(out_of=out_of, norms=norms)
    after = {n for n, y in plain.norms.items() if n not in norms and _differ(y, moved.norms.get(n))}
    silent = _silent(block, after)
    before, now = block.run(norms=silent).out, block.run(out_of=out_of, norms=silent | norms).out
    assert before is not None
    assert now is not None
    change = (now - before).abs().flatten(0, -2).amax(0)
    here, there = float(change[some].max()), float(change[~some].max())
    return here > 0 and there <= _ELSEWHERE * here


def _differ(a: Tensor, b: Tensor | None) -> bool:
    return b is None or a.shape != b.shape or bool((a - b).abs().max() > 1e-5 * a.abs().max())


# -- value heads --------------------------------------------------------------------------------------------------


def _heads(block: Block, maker: Node, reader: Node, rows: Tensor) -> Heads | None:
    """The value heads behind an edge, None where rotating them is not what the block allows.

    Args:
        rows: int64 [columns], the maker's row behind each column of the reader, -1 for none.
    """
    if bool((rows < 0).any()):
        return None
    for width in _widths(block):
        if len(rows) % width:
            continue
        heads = torch.unique(rows.reshape(-1, width), dim=0)
        if heads.numel() == len(torch.unique(heads)) and _allowed(block, maker, reader, heads):
            cut = len(block.prefix)
            return Heads(maker.param[cut:], reader.param[cut:], heads)
    return None


def _widths(block: Block) -> list[int]:
    """Widths that value heads may have, by the config: DeepSeek's own, that of all heads, an even share."""
    config = block.model.model.config.get_text_config()
    count = getattr(config, "num_attention_heads", None) or 1
    named = [getattr(config, name, None) for name in ("v_head_dim", "head_dim")]
    found = [int(w) for w in (*named, block.model.hidden_size // count) if isinstance(w, int) and w > 1]
    return list(dict.fromkeys(found))


def _allowed(block: Block, maker: Node, reader: Node, heads: Tensor) -> bool:
    """Rotate the maker's rows alone, then the reader's columns too: the first moves the output, both do not."""
    model, matrix = block.model, rotation(heads.shape[1], seed=1)
    rows, columns = maker.linears[0], reader.linears[0]
    kept = [(x, model.weight(x).clone()) for x in (rows, columns)]
    bias = None if maker.bias is None else model.model.get_parameter(maker.bias).data
    kept_bias = None if bias is None else bias.clone()
    plain = block.output()
    try:
        model.set_weight(rows, heads_out(kept[0][1], heads, matrix).float())
        if bias is not None and kept_bias is not None:
            bias.copy_(heads_out(kept_bias, heads, matrix))
        one = block.output()
        model.set_weight(columns, heads_in(kept[1][1], matrix).float())
        both = block.output()
    finally:
        for linear, value in kept:
            model.set_weight(linear, value)
        if bias is not None and kept_bias is not None:
            bias.copy_(kept_bias)
    left, moved = (float(apart(x, plain, block.dtype).max()) for x in (both, one))
    return moved > 0 and left <= _ELSEWHERE * moved


def turned(weight: Tensor, heads: Heads, matrix: Orthogonal, makes: bool) -> Tensor:
    """float64: a maker's (`makes`) or a reader's matrix, or a maker's bias, with its value heads rotated."""
    return heads_out(weight, heads.rows.to(weight.device), matrix) if makes else heads_in(weight, matrix)
