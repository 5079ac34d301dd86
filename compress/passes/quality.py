"""How much work a pass on a grid does: the same word on every one of them.

fast: the solver alone, with its weighted scale search. balanced: tokens count by what they do to the block's output
(compress/sensitivity.py), scales are refitted to the codes, codes descend under the whole Hessian. best: the block is
then refined to the original's output (compress/refiners). auto: best where it is worth its time, which takes a GPU and
4 bits or fewer; else balanced.
"""

from __future__ import annotations

from dataclasses import field, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from compress.errors import CompressError
from compress.types import Needs

Quality = Literal["auto", "fast", "balanced", "best"]
LEVELS = ("auto", "fast", "balanced", "best")
#: bits up to which refining is what `auto` does: above, what rounding costs is small (reports/frontier)
_FEW = 4

T = TypeVar("T")


@runtime_checkable
class Graded(Protocol):
    """A pass whose default quality is `auto`."""

    quality: Quality

    @property
    def refinable(self) -> bool:
        """Whether what it makes is worth refining: its bits are few, and none of its parts was switched off, as where a
        paper's own method is asked for."""
        ...


def settled(method: T, room: bool) -> T:
    """A pass with `auto` made out; anything else as it is.

    Args:
        room: whether there is a device on which refining takes seconds a block, with memory to spare.
    """
    if not isinstance(method, Graded) or method.quality != "auto":
        return method
    given: Any = method
    made: T = replace(given, quality="best" if room and method.refinable else "balanced")
    return made


def few(bits: int | None) -> bool:
    """Whether so many bits lose enough for refining; None: weights that are only pruned, which do."""
    return bits is None or bits <= _FEW


def quality_field() -> Any:
    """The field `quality` of a pass."""
    text = (
        "fast: the solver alone; balanced: and refit and descent; best: and whole blocks refined to the original's "
        "output; auto: best for 4 bits and fewer on a GPU without --low-memory, else balanced"
    )
    return field(default="auto", metadata={"help": text})


def past_field() -> Any:
    """The field `correct_past` of a pass."""
    text = (
        "aim at what the first layers of a block would make of the original model's inputs, as far as held-out rows "
        "bear it out"
    )
    return field(default=False, metadata={"help": text})


def weights_field() -> Any:
    """The field `token_weights` of a pass."""
    text = "let calibration tokens count by what an error there does to the block's output; default: by --quality"
    return field(default=None, metadata={"help": text, "off": "no-token-weights"})


def settle_quality(settings: Any) -> None:
    """Fill what goes by the quality of a pass that is being made, where it was not given. Raises CompressError."""
    if settings.quality not in LEVELS:
        raise CompressError(f"no quality {settings.quality!r}", "--quality", f"use {', '.join(LEVELS)}")
    more = settings.quality != "fast"
    for name, value in (("refit", more), ("descent", int(more)), ("token_weights", more)):
        if getattr(settings, name, value) is None:
            object.__setattr__(settings, name, value)  # frozen from here on


def sweeps(settings: Any) -> int:
    """The sweeps of descent of a pass that was made, and so settled."""
    count: int | None = settings.descent
    assert count is not None
    return count


def needs(settings: Any) -> Needs:
    """What a pass that has a Hessian needs at its quality."""
    return Needs(
        hessian=True,
        outputs=settings.quality == "best",
        past=settings.correct_past,
        weighted=bool(settings.token_weights),
    )
