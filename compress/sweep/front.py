"""Which of several checkpoints to take: those that no other beats in size and quality, and the best under a wish."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import CompressError


@dataclass(frozen=True)
class Point:
    """A checkpoint that was made and measured.

    Attributes:
        name: of its setting.
        bytes: of its weight files.
        average_bits: of a packed weight.
        kl: mean KL divergence from the original in nats a token.
        perplexity: on the same text.
    """

    name: str
    bytes: int
    average_bits: float
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Wish:
    """What the choice must keep to; None: any.

    Attributes:
        max_bytes: of the weight files.
        max_kl: in nats a token.
        avg_bits: of a packed weight.
    """

    max_bytes: int | None = None
    max_kl: float | None = None
    avg_bits: float | None = None

    def __post_init__(self) -> None:
        for value, name in ((self.max_kl, "--max-kl"), (self.avg_bits, "--avg-bits")):
            if value is not None and not value > 0:
                raise CompressError(f"{value:g} is out of range", name, "use more than 0")

    def __bool__(self) -> bool:
        return (self.max_bytes, self.max_kl, self.avg_bits) != (None, None, None)

    def holds(self, point: Point) -> bool:
        """Whether a checkpoint keeps to it."""
        return (
            (self.max_bytes is None or point.bytes <= self.max_bytes)
            and (self.max_kl is None or point.kl <= self.max_kl)
            and (self.avg_bits is None or point.average_bits <= self.avg_bits)
        )

    def words(self) -> str:
        """at most 1.2 GB, KL at most 0.05"""
        said = []
        if self.max_bytes is not None:
            said.append(f"at most {self.max_bytes / 1e9:.4g} GB")
        if self.avg_bits is not None:
            said.append(f"at most {self.avg_bits:g} bits a packed weight")
        if self.max_kl is not None:
            said.append(f"KL at most {self.max_kl:g}")
        return ", ".join(said)


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other is smaller and closer to the original than (one of the two equal, at most), by size."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.bytes, p.kl)):
        if math.isfinite(point.kl) and (not found or point.kl < found[-1].kl):
            found.append(point)
    return found


def choose(points: Sequence[Point], wish: Wish) -> Point | None:
    """The best that keeps to a wish: the closest to the original; where only a KL is asked for, the smallest.

    None where no checkpoint keeps to it.
    """
    fit = [p for p in points if wish.holds(p) and math.isfinite(p.kl)]
    if wish.max_kl is not None and wish.max_bytes is None and wish.avg_bits is None:
        return min(fit, key=lambda p: (p.bytes, p.kl), default=None)
    return min(fit, key=lambda p: (p.kl, p.bytes), default=None)
