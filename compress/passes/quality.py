"""How much work a pass on a grid does: the same word on every one of them.

fast: the solver alone, with its weighted scale search. balanced: scales are refitted to the codes, codes descend under
the whole Hessian. best: the block is then refined to the original's output (compress/refiners).
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal

from compress.errors import CompressError
from compress.types import Needs

Quality = Literal["fast", "balanced", "best"]
LEVELS = ("fast", "balanced", "best")


def quality_field() -> Any:
    """The field `quality` of a pass."""
    text = "fast: the solver alone; balanced: and refit and descent; best: and whole blocks refined to the original's"
    return field(default="balanced", metadata={"help": f"{text} output"})


def past_field() -> Any:
    """The field `correct_past` of a pass."""
    text = "aim at what a layer would make of the original model's inputs, as far as held-out rows bear it out"
    return field(default=False, metadata={"help": text})


def settle_quality(settings: Any) -> None:
    """Fill `refit` and `descent` of a pass that is being made, where they were not given. Raises CompressError."""
    if settings.quality not in LEVELS:
        raise CompressError(f"no quality {settings.quality!r}", "--quality", f"use {', '.join(LEVELS)}")
    more = settings.quality != "fast"
    for name, value in (("refit", more), ("descent", int(more))):
        if getattr(settings, name, value) is None:
            object.__setattr__(settings, name, value)  # frozen from here on


def sweeps(settings: Any) -> int:
    """The sweeps of descent of a pass that was made, and so settled."""
    count: int | None = settings.descent
    assert count is not None
    return count


def needs(settings: Any) -> Needs:
    """What a pass that has a Hessian needs at its quality."""
    return Needs(hessian=True, outputs=settings.quality == "best", past=settings.correct_past)
