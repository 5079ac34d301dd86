"""Which row of one linear layer makes which column of another one's input, read off a running block.

Every row's output is multiplied by a power of two that spells a digit of the row's number; the later layer's input
shows the digits. That works only where the path between is linear in the rows, and powers of two pass through it
without rounding in any dtype. Identity, heads that grouped queries repeat, fused and interleaved matrices all come out
of the same reading. Of a fused matrix only some rows act linearly (not those of queries, keys or gates): which ones is
guessed, an end of the matrix or of every head's part, and the guess is tested.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from compress.blocks import BlockModel
from compress.folding.tap import Block, Node, Trace, for_experts

#: what a row's output is multiplied by to spell a digit, as exponents of two; 0 is not among them: it says "not mine"
_DIGITS = (-4, -3, -2, -1, 1, 2, 3, 4)

#: which rows of a fused matrix fed which layer in an earlier block of the same model
_REMEMBERED: WeakKeyDictionary[BlockModel, dict[tuple[str, str], Tensor]] = WeakKeyDictionary()


def maps(block: Block, plain: Trace, maker: Node, readers: Sequence[Node]) -> Iterator[tuple[int, Tensor]]:
    """The readers whose columns rows of `maker` make one for one.

    Yields:
        a reader's place in `readers`; int64 [columns], the maker's row behind each column, -1 for none that was found.
    """
    everything = torch.arange(maker.rows, device=block.hidden.device)
    first = _spell(block, maker, everything, 0)
    for i, reader in enumerate(readers):
        seen = _exponents(plain, first, reader)
        rows = None
        if seen is None and maker.rows > reader.columns:
            rows = _fused(block, plain, maker, reader)
        elif seen is not None and bool((seen != 0).any()):
            rows = _decode(block, plain, maker, everything, reader)
        if rows is not None:
            yield i, rows


def _fused(block: Block, plain: Trace, maker: Node, reader: Node) -> Tensor | None:
    """Of a matrix that makes several things, the rows that make the reader's columns."""
    memory = _REMEMBERED.setdefault(block.model, {})
    key = (maker.param.removeprefix(block.prefix), reader.param.removeprefix(block.prefix))
    candidates = _row_sets(maker.rows, reader.columns, _head_width(block))
    if key in memory and int(memory[key].max()) < maker.rows:
        candidates = chain([memory[key]], candidates)
    for chosen in candidates:
        chosen = chosen.to(block.hidden.device)
        factor = torch.ones(maker.rows, device=block.hidden.device, dtype=block.dtype)
        factor[chosen] = 2.0
        seen = _exponents(plain, block.run(out_of={maker.param: for_experts(factor, maker)}), reader)
        if seen is None or bool((seen != 1).logical_and(seen.isfinite()).any()):
            continue
        rows = _decode(block, plain, maker, chosen, reader)
        if rows is not None:
            memory[key] = chosen.cpu()
            return rows
    return None


def _row_sets(rows: int, columns: int, head: int) -> Iterator[Tensor]:
    """Which rows of a fused matrix may make `columns` channels: an end of it, or the end of every head's part.

    Args:
        head: the width of heads tried first.
    """
    yield torch.arange(rows - columns, rows)
    yield torch.arange(columns)
    divisors = [n for n in range(1, columns + 1) if columns % n == 0]
    parts = [
        (count, width)
        for count in divisors
        for width in divisors
        if count > 1 and columns % (count * width) == 0 and rows % count == 0 and rows // count > width
    ]
    parts.sort(key=lambda part: (part[1] != head, -part[0] * part[1], -part[1]))
    hinted = sum(width == head for _, width in parts)
    for count, width in parts[:hinted]:
        yield _ends(rows, count, width)
    for repeats in divisors[1:]:  # grouped queries behind a fused projection
        yield torch.arange(rows - columns // repeats, rows)
    for count, width in parts[hinted:]:
        yield _ends(rows, count, width)


def _ends(rows: int, count: int, width: int) -> Tensor:
    """The last `width` rows of each of `count` parts."""
    return torch.arange(rows).reshape(count, -1)[:, -width:].flatten()


def _head_width(block: Block) -> int:
    config = block.model.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    return int(getattr(config, "head_dim", None) or block.model.hidden_size // heads)


def _spell(block: Block, maker: Node, rows: Tensor, digit: int) -> Trace:
    """Run with each of `rows` multiplied by the power of two for one digit of its place among them."""
    place = torch.arange(len(rows), device=rows.device) // len(_DIGITS) ** digit % len(_DIGITS)
    powers = torch.tensor([2.0**e for e in _DIGITS], device=rows.device, dtype=block.dtype)
    factor = torch.ones(maker.rows, device=rows.device, dtype=block.dtype)
    factor[rows] = powers[place]
    return block.run(out_of={maker.param: for_experts(factor, maker)})


def _exponents(plain: Trace, trace: Trace, reader: Node) -> Tensor | None:
    """float32 [columns]: the power of two by which each column of a reader's input grew, NaN where it is zero all over.

    None if a column did anything else.
    """
    before, after = (t.read(reader) for t in (plain, trace))
    if before.shape != after.shape:
        return None
    tolerance = 1e-5 if before.dtype == torch.float32 else 2 * torch.finfo(before.dtype).eps
    before, after = before.float(), after.float()
    size, top = before.abs().max(0)
    dead = size == 0
    if bool((after[:, dead] != 0).any()):
        return None
    ratio = after.gather(0, top[None])[0] / before.gather(0, top[None])[0]
    exponents = torch.where(dead, 0.0, ratio.log2().round())
    grown = torch.exp2(exponents)
    wrong = (after - before * grown).abs().amax(0) > tolerance * size * grown
    if not bool(exponents.isfinite().all()) or bool(wrong.any()):
        return None
    return torch.where(dead, float("nan"), exponents)


def _decode(block: Block, plain: Trace, maker: Node, rows: Tensor, reader: Node) -> Tensor | None:
    """int64 [columns]: which of the maker's `rows` makes each column, -1 for none."""
    base = len(_DIGITS)
    place = torch.zeros(reader.columns, dtype=torch.int64, device=rows.device)
    mine = torch.ones(reader.columns, dtype=torch.bool, device=rows.device)
    dead = torch.zeros_like(mine)
    for digit in range(max(1, math.ceil(math.log(len(rows), base)))):
        seen = _exponents(plain, _spell(block, maker, rows, digit), reader)
        if seen is None:
            return None
        dead = seen.isnan()
        mine &= (seen != 0) & ~dead
        if bool((seen.abs() > max(_DIGITS)).any()):
            return None
        value = torch.where(seen < 0, seen + base // 2, seen + base // 2 - 1)
        place += torch.where(mine, value, 0.0).long() * base**digit
    if bool((place >= len(rows)).any()) or not bool(mine.any()):
        return None
    found = torch.where(mine, rows[place], -1)
    return _filled(found, dead, maker.rows)


def _filled(found: Tensor, dead: Tensor, rows: int) -> Tensor:
    """Columns that were zero for all tokens (ReLU) follow their neighbours where the others are one shifted run."""
    columns = torch.arange(len(found), device=found.device)
    shift = (found - columns)[found >= 0]
    guess = columns + shift[0]
    if bool((shift == shift[0]).all()) and bool((guess >= 0).all()) and bool((guess < rows).all()):
        return torch.where(dead, guess, found)
    return found
