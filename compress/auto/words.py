"""What `compress auto` tells: notes for the report, tables for a screen, JSON, and the recipe as a file."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from compress.recipe import KEEP, Recipe
from compress.report import card
from compress.types import defaults, settings

if TYPE_CHECKING:
    from compress.auto.run import Outcome
    from compress.bench.tables import Table


def recipe_file(recipe: Recipe) -> str:
    """A recipe as the YAML that `compress run` reads: settings at their defaults are left out."""
    import yaml

    steps = []
    for step in recipe.steps:
        given: dict[str, Any] = {}
        if step.method is not None:
            plain = defaults(step.method)
            given = {k: v for k, v in settings(step.method).items() if v != plain[k]}
        where = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(step.where).items() if v}
        steps.append({KEEP if step.method is None else step.method.name: {**given, **where}})
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.options.items()}
    value = {"name": recipe.name, "steps": steps, "options": options}
    return str(yaml.safe_dump(value, sort_keys=False, width=120))


def uniform(outcome: Outcome) -> list[tuple[int, int, float]]:
    """The candidates that all groups may take, with the bytes and the cost of a model that has this one everywhere."""
    found = []
    for c in range(len(outcome.field.candidates)):
        sizes = [group.sizes[c] for group in outcome.field.groups]
        if None not in sizes:
            found.append((c, sum(s or 0 for s in sizes), math.fsum(row[c] for row in outcome.costs)))
    return found


def near(outcome: Outcome) -> list[tuple[int, int, float]]:
    """Of `uniform`, the cheapest within the budget, and the smallest of those that are cheaper than the choice."""
    every = uniform(outcome)
    fit = sorted((u for u in every if u[1] <= outcome.budget), key=lambda u: u[2])[:1]
    better = sorted((u for u in every if u[2] <= outcome.allocation.cost and u not in fit), key=lambda u: u[1])[:1]
    return fit + better


def _measure(outcome: Outcome) -> str:
    return "KL divergence, nats a token" if outcome.ask.sensitivity == "kl" else "sum of relative errors"


def _asked(outcome: Outcome) -> str:
    ask = outcome.ask
    return f"{ask.avg_bits:g} bits a weight" if ask.max_size is None else f"{ask.max_size} of weight files"


def counts(outcome: Outcome) -> list[tuple[str, int]]:
    """How many layers each chosen setting has."""
    found: dict[int, int] = {}
    for group, c in zip(outcome.field.groups, outcome.allocation.choice, strict=True):
        found[c] = found.get(c, 0) + len(group.linears)
    return [(outcome.field.candidates[c].words, found[c]) for c in sorted(found)]


def notes(outcome: Outcome) -> list[str]:
    """For the model card and the end of a run."""
    field, best = outcome.field, outcome.allocation
    first = (
        f"auto: at most {_asked(outcome)}, {outcome.bits:.4f} bits a weight stored; predicted {_measure(outcome)} "
        f"{best.cost:.4g}, the sum over {len(field.groups)} groups of layers"
    )
    if outcome.on is not None:
        name, dots, source = outcome.on.partition(" tokens of ")
        first += f", each rounded alone, on {name}{dots}{card.text_name(source)}"
    out = [first, "auto: " + ", ".join(f"{n} layers {words}" for words, n in counts(outcome))]
    for c, size, cost in near(outcome):
        bits = 8 * size / field.weights
        out.append(f"auto: all layers with {field.candidates[c].words}: {bits:.4f} bits a weight, predicted {cost:.4g}")
    if best.gap > 0:
        out.append(f"auto: the solver ran out of time; another choice may be better by {100 * best.gap:.2g}% at most")
    return out + [f"auto: not offered: {note}" for note in field.notes]


def tables(outcome: Outcome) -> list[Table]:
    """Settings by kind of layer, and uniform settings beside the choice."""
    from compress.bench.tables import Table

    field, best = outcome.field, outcome.allocation
    used = sorted(set(best.choice))
    kinds: dict[str, list[int]] = {}
    for i, group in enumerate(field.groups):
        kinds.setdefault(group.kind, []).append(i)
    short = {kind: " + ".join(name.rpartition(".")[2] for name in kind.split(" + ")) for kind in [*kinds, "all"]}
    if len(set(short.values())) < len(short):
        short = {kind: kind for kind in short}
    rows = []
    for kind, mine in [*kinds.items(), ("all", list(range(len(field.groups))))]:
        layers = [sum(len(field.groups[i].linears) for i in mine if best.choice[i] == c) for c in used]
        size = sum(field.groups[i].sizes[best.choice[i]] or 0 for i in mine)
        cost = math.fsum(outcome.costs[i][best.choice[i]] for i in mine)
        bits = 8 * size / sum(field.groups[i].weights for i in mine)
        rows.append((short[kind], *(str(n) if n else "" for n in layers), f"{bits:.3f}", f"{cost:.4g}"))
    heads = ("layers with", *(field.candidates[c].key for c in used), "bits a weight", "predicted")
    title = f"{outcome.job.origin}, at most {_asked(outcome)}: {outcome.bits:.4f} bits a weight"
    beside = [
        (field.candidates[c].words, f"{8 * size / field.weights:.4f}", f"{cost:.4g}")
        for c, size, cost in sorted(uniform(outcome), key=lambda u: u[1])
    ]
    beside.append(("this choice", f"{outcome.bits:.4f}", f"{best.cost:.4g}"))
    return [
        Table(title, heads, tuple(rows)),
        Table(f"Beside one setting for all layers (predicted: {_measure(outcome)})",
              ("setting", "bits a weight", "predicted"), tuple(beside)),
    ]  # fmt: skip


def as_json(outcome: Outcome) -> dict[str, Any]:
    """Everything as plain values; the run's own record under "run", null for a dry run."""
    from compress.report import screen

    field, best = outcome.field, outcome.allocation
    groups = [
        {
            "layers": [x.name for x in group.linears],
            "setting": field.candidates[c].key,
            "bytes": group.sizes[c],
            "predicted": row[c],
            "candidates": {field.candidates[o].key: row[o] for o in group.options},
        }
        for group, c, row in zip(field.groups, best.choice, outcome.costs, strict=True)
    ]
    return {
        "asked": {k: str(v) if k == "measured" and v else v for k, v in dataclasses.asdict(outcome.ask).items()},
        "format": field.format,
        "budget_bytes": outcome.budget,
        "bytes": best.size,
        "bits_per_weight": outcome.bits,
        "predicted": best.cost,
        "gap": best.gap,
        "groups": groups,
        "uniform": [
            {"setting": field.candidates[c].key, "bits_per_weight": 8 * size / field.weights, "predicted": cost}
            for c, size, cost in uniform(outcome)
        ],
        "notes": notes(outcome),
        "measured": str(outcome.measured),
        "run": None if outcome.result is None else screen.as_json(outcome.result),
    }
