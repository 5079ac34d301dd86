"""The settings of a sweep: every combination of methods, bits and group sizes that there is, and recipes."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import CompressError
from compress.options import Options
from compress.passes import known, load
from compress.recipe import Recipe, build, parse, read_recipe
from compress.types import Transform

_DECIDING = (
    "format", "target", "calib", "calib_column", "chat_template", "samples", "seq_len", "seed", "include", "exclude",
    "blocks", "lm_head", "true_sequential", "dtype", "trust_remote_code", "allow_pickle", "refine",
)  # fmt: skip
#: settings of a method that a sweep goes through, and how they stand in a name
_SWEPT = {"bits": "{}bit", "group_size": "g{}"}


@dataclass(frozen=True)
class Setting:
    """One run of a sweep.

    Attributes:
        name: of its folder: gptq-4bit-g128.
        recipe: what it does.
        words: of the command that does it alone, without the model: ("gptq", "--bits", "4").
    """

    name: str
    recipe: Recipe
    words: tuple[str, ...]

    def command(self, model: str, out: str, options: Options) -> str:
        """The command that makes this checkpoint."""
        first, *rest = self.words
        given = [first, *rest, model] if first == "run" else [first, model, *rest]
        return shlex.join(["compress", *given, *_flags(options), "-o", out])


def _flags(options: Options) -> list[str]:
    """Of a command line, the options that decide what comes out and are not at their defaults."""
    found: list[str] = []
    for key in _DECIDING:
        value, flag = getattr(options, key), "--" + key.replace("_", "-")
        if value == getattr(Options(), key):
            continue
        if isinstance(value, tuple):
            found += [word for one in value for word in (flag, str(one))]
        else:
            found += [flag] if value is True else [flag, str(value)]
    return found


def settings(
    methods: Sequence[str], bits: Sequence[int], group_sizes: Sequence[int], recipes: Sequence[Path] = ()
) -> list[Setting]:
    """Every combination, in the order given; a method without bits or groups has fewer.

    Raises:
        CompressError: no such method, a value that a method refuses, nothing at all, the same recipe's name twice.
    """
    found: list[Setting] = []
    for name in dict.fromkeys(methods):
        if name not in known():
            raise CompressError(f"no method {name!r}", "--methods", f"there are {', '.join(known())}")
        found += _of_method(name, bits, group_sizes)
    for path in recipes:
        found.append(Setting(path.stem, read_recipe(path), ("run", str(path))))
    names = [setting.name for setting in found]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise CompressError(f"two settings would be written to {twice}", "--recipe", "give the files other names")
    if not found:
        raise CompressError("no setting to try", "--methods", "name methods, or recipes by --recipe FILE")
    return found


def _of_method(name: str, bits: Sequence[int], group_sizes: Sequence[int]) -> list[Setting]:
    cls: Any = load(name)
    method = cls()
    rounding = str(method.then).split()[0] if isinstance(method, Transform) else ""  # the pass that follows it
    rounds: Any = load(rounding) if rounding else cls
    fields = {f.name for f in dataclasses.fields(rounds)}
    axes = {key: list(dict.fromkeys(values)) for key, values in (("bits", bits), ("group_size", group_sizes))}
    axes = {key: values for key, values in axes.items() if key in fields and values}
    found = []
    for values in itertools.product(*axes.values()):
        given: dict[str, Any] = dict(zip(axes, values, strict=True))
        label = "-".join([name, *(_SWEPT[key].format(_size(value)) for key, value in given.items())])
        if rounding:
            given = {"then": " ".join([rounding, *(f"{key}={value}" for key, value in given.items())])}
            parse(given["then"])  # says what is wrong with it
        words = [word for key, value in given.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        found.append(Setting(label, Recipe.of(build(name, given)), (name, *words)))
    return found


def _size(value: int) -> str:
    return "row" if value == -1 else str(value)
