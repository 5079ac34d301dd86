"""A recipe: which steps, in which order, on which layers. A sub-command is a recipe of one line.

    name: mixed
    steps:
      - keep: {blocks: "0"}                                  # the first block stays as it is
      - smoothquant: {alpha: 0.5}                            # rescale, function unchanged
      - sparsegpt: {pattern: "2:4"}                          # prune first ...
      - gptq: {bits: 8, layers: ["*.down_proj"]}             # ... then quantise: 8 bits here
      - gptq: {bits: 4}                                      # 4 bits everywhere else
    options: {format: native, samples: 128}

Every step has `layers` and `exclude` (shell patterns on names on disk) and `blocks` ("0-3,-1"; negative counts from the
end). Of the steps that quantise, the first whose patterns hold takes a layer; the same goes for those that prune; a
layer that has both is pruned, then quantised with its zeros kept. `keep` takes a layer away from every step below it.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from compress.errors import CompressError
from compress.passes import REFINERS, known, load, load_refiner
from compress.passes.quality import settled
from compress.types import Needs, Pass, Refiner, Storage, Transform, settings

KEEP = "keep"


@dataclass(frozen=True)
class Where:
    """The layers that a step is for.

    Attributes:
        layers: shell patterns on names on disk; () for all.
        exclude: patterns of layers that it is not for.
        blocks: "a", "a-b", "-1" and lists of them; "" for all.
    """

    layers: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    blocks: str = ""

    def holds(self, name: str, block: int, count: int) -> bool:
        """Whether the layer `name` of `block` (of `count` decoder blocks; the head has the number `count`) is meant."""
        if any(fnmatch.fnmatch(name, p) for p in self.exclude):
            return False
        if self.layers and not any(fnmatch.fnmatch(name, p) for p in self.layers):
            return False
        return not self.blocks or block in blocks_of(self.blocks, count)


def blocks_of(text: str, count: int) -> set[int]:
    """The block numbers that "0-3,-1" names in a model of `count` blocks. Raises CompressError."""
    found: set[int] = set()
    for part in str(text).replace(" ", "").split(","):
        first, dash, last = part[1:].partition("-")
        first = part[:1] + first
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise CompressError(f"{text!r} names no blocks", "blocks", 'write "0-3", "5" or "0,-1"') from None
        low, high = (n + count if n < 0 else n for n in (low, high))
        if not 0 <= low <= high < count:
            raise CompressError(f"{part!r} is outside of the model's {count} blocks", "blocks", f"use 0 to {count - 1}")
        found.update(range(low, high + 1))
    return found


@dataclass(frozen=True)
class Step:
    """One line of a recipe. method: None keeps the layers as they are."""

    method: Pass | Transform | Refiner | None
    where: Where = Where()

    @property
    def name(self) -> str:
        return KEEP if self.method is None else self.method.name

    def as_json(self) -> dict[str, Any]:
        """Plain values; patterns only where there are any."""
        mine = {} if self.method is None else settings(self.method)
        where = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self.where).items() if v}
        return {"name": self.name, **mine, **where}


@dataclass(frozen=True)
class Recipe:
    """Steps in order.

    Attributes:
        name: for folders and records.
        options: fields of `Options` that the recipe sets; what the caller gives goes before them.
    """

    steps: tuple[Step, ...]
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, method: Pass | Transform | Recipe) -> Recipe:
        """A recipe of one line; a transform brings the pass that follows it."""
        if isinstance(method, Recipe):
            return method
        steps = [Step(method)]
        if isinstance(method, Transform):
            steps += [Step(parse(line)) for line in [method.then]]
        return cls(tuple(steps), method.name)

    @property
    def passes(self) -> list[Pass]:
        return [s.method for s in self.steps if s.method is not None and not isinstance(s.method, Transform | Refiner)]

    @property
    def transforms(self) -> list[Step]:
        return [s for s in self.steps if isinstance(s.method, Transform)]

    @property
    def refiner(self) -> Refiner | None:
        """What tunes the layers whose passes ask for it: a step of its own, else the first of REFINERS as it is."""
        if not any(p.needs.outputs for p in self.passes):
            return None
        given = [s.method for s in self.steps if isinstance(s.method, Refiner)]
        return given[0] if given else load_refiner(next(iter(REFINERS)))()

    def settled(self, room: bool) -> Recipe:
        """With quality `auto` made out. A refiner among the steps is a wish for best, wherever it runs.

        Args:
            room: whether there is a device on which refining takes seconds a block, with memory to spare.
        """
        room = room or any(isinstance(s.method, Refiner) for s in self.steps)
        return replace(self, steps=tuple(replace(s, method=settled(s.method, room)) for s in self.steps))

    def refined(self, settings: str, where: str) -> Recipe:
        """With a refiner of these settings ("steps=200 norms=true") before the other steps.

        Raises:
            CompressError: there is one already, it has nothing to tune, or no such setting.
        """
        name = next(iter(REFINERS))
        made = _built(load_refiner(name), name, _words_of(f"{name} {settings}")[1], where)
        there = [s.method for s in self.steps if isinstance(s.method, Refiner)]
        if there == [made]:
            return self
        if there:
            raise CompressError(f"the recipe has a step {name}", where, "leave one of them out")
        recipe = replace(self, steps=(Step(made), *self.steps))
        if recipe.settled(room=True).refiner is None:
            raise CompressError(f"nothing of {self.name} is refined", where, "add --quality best, or leave it out")
        return recipe

    @property
    def needs(self) -> Needs:
        """What all steps need together. Raises CompressError for two thresholds of the same statistic."""
        total = Needs()
        for step in self.steps:
            if step.method is None or isinstance(step.method, Refiner):
                continue
            mine = step.method.needs
            if None not in (total.above, mine.above) and total.above != mine.above:
                what = f"steps with the thresholds {total.above:g} and {mine.above:g}, a survey of the model has one"
                raise CompressError(what, self.name, "give them the same, or use --rule any")
            total = total | mine
        return total

    @property
    def label(self) -> str:
        """For the name of the output folder: gptq-4bit, sparsegpt, mixed."""
        if len(self.passes) != 1:
            return self.name
        storage = self.passes[0].storage
        return self.name if storage.bits > 8 else f"{self.name}-{storage.bits}bit"

    def choose(self, name: str, block: int, count: int) -> tuple[Pass, ...] | None:
        """The passes that take a layer, in order: one, or one that prunes and one that quantises. None: dense."""
        prunes: Pass | None = None
        rounds: Pass | None = None
        for step in self.steps:
            if isinstance(step.method, Transform | Refiner) or not step.where.holds(name, block, count):
                continue
            if step.method is None:
                break
            if sparsifies(step.method.storage):
                prunes = prunes or (step.method if rounds is None else None)
            else:
                rounds = rounds or step.method
        found = tuple(p for p in (prunes, rounds) if p is not None)
        return found or None

    def as_json(self) -> dict[str, Any]:
        """Plain values: one pass as {"name": ..., settings}, more as {"name": ..., "steps": [...]}."""
        if len(self.steps) == 1:
            return self.steps[0].as_json()
        return {"name": self.name, "steps": [s.as_json() for s in self.steps]}

    def lines(self) -> list[str]:
        """One line a step, as a person reads it."""
        out = []
        for step in self.steps:
            mine = step.as_json()
            name = mine.pop("name")
            out.append(f"{name}: " + " ".join(f"{k}={v}" for k, v in mine.items()))
        return out


def sparsifies(storage: Storage) -> bool:
    """Whether a pass prunes and leaves the values that it keeps as they are, so that another may quantise them."""
    return storage.kind == "sparse" and storage.inner is not None and storage.inner.kind == "dense"


def chained(passes: tuple[Pass, ...]) -> Storage:
    """How a layer is stored that `passes` take one after the other. Raises CompressError for a kind that cannot be."""
    last = passes[-1].storage
    if len(passes) == 1:
        return last
    first = passes[0].storage
    if last.kind != "uniform":
        what = f"what {passes[0].name} leaves is stored as it is or on a uniform grid, not as the kind {last.kind!r}"
        raise CompressError(what, f"{passes[0].name}, then {passes[1].name}", "follow it with gptq, rtn or absmax")
    return replace(last, kind=first.kind, details=first.details, inner=last)


def parse(line: str) -> Pass | Transform:
    """A method from "rtn bits=4 symmetric=false". Raises CompressError."""
    name, given = _words_of(line)
    return build(name, given, line)


def _words_of(line: str) -> tuple[str, dict[str, Any]]:
    """A line such as "rtn bits=4" as "rtn", {"bits": 4}; values with spaces are quoted as in a shell.

    Raises:
        CompressError: it cannot be taken apart.
    """
    try:
        name, *rest = shlex.split(line)
    except ValueError as error:
        raise CompressError(f"cannot be read ({error})", line, "write: name setting=value setting='a b'") from None
    given = {}
    for item in rest:
        key, equals, value = item.partition("=")
        if not equals:
            raise CompressError(f"{item!r} is no setting", line, "write name=value")
        given[key] = read_yaml(value)
    return name, given


def method(name: str, **given: Any) -> Pass | Transform:
    """A method by its sub-command's name: `compress.method("nf4", block_size=64)`. Raises CompressError."""
    return build(name, given)


def read_yaml(text: str) -> Any:
    """Plain values. 2:4 is text here: YAML 1.1 would read it as the number 124, to base 60. Raises yaml.YAMLError."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        yaml_implicit_resolvers: typing.ClassVar[dict[str, Any]] = {
            first: [(tag, pattern) for tag, pattern in rules if not tag.endswith((":int", ":float"))]
            for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

    digits = list("-+.0123456789")
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), digits)
    real = r"[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(rf"(?!\d+$)({real})$"), digits)
    return yaml.load(text, Loader)


def build(name: str, given: Mapping[str, Any], where: str = "") -> Pass | Transform:
    """A pass or transform by its sub-command's name with some of its settings.

    Raises:
        CompressError: no such method, no such setting, a value of the wrong type or out of range.
    """
    where = where or name
    if name not in known():
        raise CompressError(f"no method {name!r}", where, f"there are {', '.join(known())}")
    made: Pass | Transform = _built(load(name), name, given, where)
    return made


def _built(cls: type[Any], name: str, given: Mapping[str, Any], where: str) -> Any:
    """A settings dataclass with some of its fields. Raises CompressError for another field, or another value."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in given.items():
        plain = str(key).replace("-", "_")
        if plain not in fields:
            raise CompressError(f"{name} has no setting {key!r}", where, f"it has {', '.join(fields)}")
        values[plain] = fitting(value, hints[plain], f"{where}: {key}")
    return cls(**values)


def fitting(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. Raises CompressError when it is not one."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)  # typing resolves Literal | None to the latter
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        if option is types.NoneType and value is None:
            return None
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(map(str, value))
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and type(value) is option:
            return value
        if option is Path and isinstance(value, str):
            return Path(value)
    raise CompressError(f"{value!r} is not a value for it", where, f"it takes {_words(options)}")


def _words(options: Iterable[Any]) -> str:
    out = []
    for option in options:
        if typing.get_origin(option) is Literal:
            out += [str(v) for v in typing.get_args(option)]
        else:
            out.append("nothing" if option is types.NoneType else getattr(option, "__name__", str(option)))
    return " or ".join(out)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a YAML file. Raises CompressError that names the line's place in the list."""
    import yaml

    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"cannot be read ({error.strerror})", str(path), "pass a recipe's YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompressError(f"is no YAML ({' '.join(str(error).split())[:160]})", str(path), "mend it") from None
    return make_recipe(found, path.stem, str(path))


def make_recipe(found: Any, name: str, where: str) -> Recipe:
    """A recipe from plain values; see the module's text. Raises CompressError."""
    from compress.options import Options

    if not isinstance(found, Mapping) or not isinstance(found.get("steps"), list) or not found["steps"]:
        raise CompressError("holds no list of steps", where, "write steps: [...], as in the README")
    strange = set(found) - {"name", "steps", "options"}
    if strange:
        raise CompressError(f"{sorted(map(str, strange))[0]!r} means nothing here", where, "use name, steps, options")
    steps = [_step(value, f"{where}, step {i + 1}") for i, value in enumerate(found["steps"])]
    options = found.get("options") or {}
    fields = {f.name for f in dataclasses.fields(Options)}
    hints = typing.get_type_hints(Options)
    if not isinstance(options, Mapping):
        raise CompressError("options is no mapping", where, "write options: {samples: 128}")
    values = {}
    for key, value in options.items():
        plain = str(key).replace("-", "_")
        if plain not in fields:
            raise CompressError(f"no option {key!r}", f"{where}, options", f"there are {', '.join(sorted(fields))}")
        values[plain] = fitting(value, hints[plain], f"{where}, options: {key}")
    recipe = Recipe(tuple(steps), str(found.get("name") or name), values)
    if not recipe.passes and recipe.transforms:  # alone it brings the pass that follows it, as a sub-command does
        last = recipe.transforms[-1].method
        assert isinstance(last, Transform)
        recipe = replace(recipe, steps=(*steps, Step(parse(last.then))))
    elif any("then" in _given(value) for value in found["steps"]):
        raise CompressError("then is for a transform alone; here the steps say what follows", where, "leave it out")
    refiners = [s.name for s in recipe.steps if isinstance(s.method, Refiner)]
    if len(refiners) > 1:
        raise CompressError(f"{len(refiners)} steps tune the same blocks", where, "leave one of them")
    if refiners and recipe.settled(room=True).refiner is None and recipe.passes:
        what = f"{refiners[0]} has nothing to tune: no step has quality: best"
        raise CompressError(what, where, "add it to a step, as in gptq: {bits: 4, quality: best}")
    if not recipe.passes:
        raise CompressError("no step rounds or prunes anything", where, "add one such as gptq: {bits: 4}")
    return recipe


def _given(value: Any) -> Any:
    """The settings of one line."""
    if isinstance(value, str):
        return _words_of(value)[1]
    return next(iter(value.values())) or {}


def _step(value: Any, where: str) -> Step:
    if isinstance(value, str):
        name, settings_given = _words_of(value)
        value = {name: settings_given}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise CompressError("is not one method with its settings", where, "write - gptq: {bits: 4}")
    ((name, given),) = value.items()
    given = dict(given or {}) if isinstance(given, Mapping | types.NoneType) else None
    if given is None:
        raise CompressError(f"the settings of {name} are no mapping", where, "write - gptq: {bits: 4}")
    places = {}
    for key in ("layers", "exclude"):
        found = given.pop(key, ())
        places[key] = (found,) if isinstance(found, str) else fitting(found, tuple[str, ...], f"{where}: {key}")
    place = Where(**places, blocks=str(given.pop("blocks", "")))
    if name == KEEP:
        if given:
            raise CompressError(f"keep has no setting {next(iter(given))!r}", where, "it has layers, exclude, blocks")
        return Step(None, place)
    if name in REFINERS:
        if any(vars(place).values()):
            what = f"{name} tunes whole blocks, those with layers of quality: best"
            raise CompressError(what, where, "leave layers, exclude and blocks out")
        return Step(_built(load_refiner(name), str(name), given, where))
    method = build(str(name), given, where)
    if isinstance(method, Transform) and (place.layers or place.exclude):
        raise CompressError(f"{name} rescales whole blocks", where, "choose them with blocks, not with layers")
    return Step(method, place)
