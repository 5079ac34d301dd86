"""What `compress sweep` is asked, beside the options that every run has. The command line is derived from it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.options import Options
from compress.sizes import parse_counts, parse_size
from compress.sweep.front import Wish
from compress.sweep.run import Sweep
from compress.sweep.settings import settings


def _asked(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Ask:
    """What to try, and what the choice must keep to."""

    methods: str = _asked("gptq", "methods, by their commands' names: gptq,spqr,rtn")
    bits: str = _asked("2,3,4", "bits to try, of methods that have them")
    group_size: str = _asked("32,64,128", "columns that share a scale, of methods that have groups; -1: the whole row")
    recipe: tuple[str, ...] = _asked((), "a recipe's YAML file as one more setting (repeatable)")
    max_size: str | None = _asked(None, "choose within so much: 2GiB, 1.5GB, 700MiB of weight files")
    max_kl: float | None = _asked(None, "choose within so many nats of KL divergence a token from the original")
    avg_bits: float | None = _asked(None, "choose within so many bits a packed weight, its scales counted")
    discard: bool = _asked(False, "delete each checkpoint as soon as it is measured")

    def sweep(self, model: str, options: Options) -> Sweep:
        """The sweep of a model. Raises CompressError for what cannot be tried at all."""
        if options.no_eval:
            raise CompressError("a sweep chooses by what it measures", "--no-eval", "leave it out")
        if options.push_to is not None:
            raise CompressError("a sweep has many results", "--push-to", "push the chosen one by its own command")
        wish = Wish(
            None if self.max_size is None else parse_size(self.max_size, "--max-size"), self.max_kl, self.avg_bits
        )
        names = [name.strip() for name in self.methods.split(",") if name.strip()]
        tried = settings(
            names, parse_counts(self.bits, "--bits"), parse_counts(self.group_size, "--group-size"),
            [Path(file) for file in self.recipe],
        )  # fmt: skip
        name = os.path.basename(os.path.abspath(os.path.expanduser(model)))
        return Sweep(
            model, tuple(tried), options.out or Path(f"{name}-sweep"), replace(options, out=None), wish, self.discard
        )
