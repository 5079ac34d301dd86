"""What is asked of end-to-end tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from compress.errors import CompressError


@dataclass(frozen=True)
class Tuning:
    """How scales and gains are tuned."""

    steps: int = field(default=100, metadata={"help": "steps of about 16 thousand tokens each, 4 thousand on a CPU"})
    rate: float = field(
        default=0.002, metadata={"help": "share of itself that a usual gradient moves a scale at first; falls to 0"}
    )
    gain_rate: float = field(default=0.001, metadata={"help": "likewise of a norm's gain; 0: gains stay"})
    held_out: float = field(
        default=0.0625, metadata={"help": "share of the calibration rows that decides what is kept"}
    )
    looks: int | None = field(
        default=None,
        metadata={"help": "how often the held-out rows are looked at, evenly over the steps; default: 5, or each step"},
    )
    seed: int = field(default=0, metadata={"help": "seed of the calibration rows and of their order"})

    def __post_init__(self) -> None:
        if self.looks is None:
            object.__setattr__(self, "looks", max(1, min(5, self.steps)))  # frozen from here on
        assert self.looks is not None
        for flag, value, low, high in (
            ("--steps", self.steps, 1, 100_000), ("--rate", self.rate, 0.0, 0.1), ("--seed", self.seed, 0, 2**31 - 1),
            ("--gain-rate", self.gain_rate, 0.0, 0.1), ("--held-out", self.held_out, 1e-4, 0.5),
            ("--looks", self.looks, 1, self.steps),
        ):  # fmt: skip
            if not low <= value <= high:
                raise CompressError(f"{value:g} is out of range", flag, f"use {low:g} to {high:g}")
        if not (self.rate or self.gain_rate):
            raise CompressError("nothing is left to tune", "--rate 0 --gain-rate 0", "leave one of them out")
