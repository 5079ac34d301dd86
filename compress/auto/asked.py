"""What `compress auto` is asked, beside the options that every run has. The command line is derived from it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import CompressError
from compress.sizes import parse_counts, parse_size


@dataclass(frozen=True)
class Ask:
    """A budget, the settings that layers may get, and how what they cost is measured."""

    avg_bits: float | None = field(
        default=None, metadata={"help": "bits a compressed weight, its scales counted, on average: never exceeded"}
    )
    max_size: str | None = field(
        default=None, metadata={"help": "size of all weight files of the output: 2GiB, 1.5GB, 700MiB: never exceeded"}
    )
    method: str = field(
        default="gptq", metadata={"help": 'the method: gptq or rtn, with settings as in a recipe ("gptq descent=2")'}
    )
    bits: str = field(default="2,3,4,5,6,8", metadata={"help": "bits that a layer may get"})
    group_size: str = field(
        default="32,64,128", metadata={"help": "columns that share a scale, which a layer may get; -1: whole row"}
    )
    sensitivity: str = field(
        default="kl",
        metadata={
            "help": "kl: how much each layer alone, rounded, moves the model's predictions; loss: count relative "
            "errors of layers' outputs alike (quicker, but can be worse than one setting for all)"
        },
    )
    probes: int = field(default=8, metadata={"help": "calibration rows on which the predictions are compared"})
    probe_len: int = field(default=512, metadata={"help": "tokens of each of them"})
    measured: Path | None = field(
        default=None, metadata={"help": "folder in which measurements are kept for other budgets; default: OUT.auto"}
    )

    def __post_init__(self) -> None:
        if (self.avg_bits is None) == (self.max_size is None):
            raise CompressError("one budget is wanted", "--avg-bits / --max-size", "give one: --avg-bits 3.5")
        if self.avg_bits is not None and not 0 < self.avg_bits < math.inf:
            raise CompressError(f"{self.avg_bits} bits are no budget", "--avg-bits", "try 3.5")
        if self.sensitivity not in ("kl", "loss"):
            raise CompressError(f"no sensitivity {self.sensitivity!r}", "--sensitivity", "use kl or loss")
        for option, value, least in (("--probes", self.probes, 1), ("--probe-len", self.probe_len, 2)):
            if value < least:
                raise CompressError(f"{value} is too small", option, f"use {least} or more")
        if self.max_size is not None:
            self.bytes()

    @property
    def label(self) -> str:
        """For the name of the output folder: 3.5bit, 2GiB."""
        return f"{self.avg_bits:g}bit" if self.max_size is None else self.max_size.replace(" ", "")

    def bytes(self) -> int:
        """`max_size` in bytes. Raises CompressError for what is no size."""
        assert self.max_size is not None
        return parse_size(self.max_size, "--max-size")

    def counts(self, option: str) -> list[int]:
        """The numbers of `--bits` or `--group-size`, each once, rising. Raises CompressError."""
        return sorted(parse_counts(getattr(self, option), "--" + option.replace("_", "-")))
