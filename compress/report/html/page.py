"""Facts -> one HTML file that needs nothing else: style, script and figures are within, and its policy forbids more."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.report.html import heat, panels, pareto, tables
from compress.report.html.facts import MEASURES, Facts, Model
from compress.report.html.remarks import CALM, ORDER
from compress.report.html.svg import COLOURS, LEVELS, render
from compress.report.html.words import has_intervals, headline, percent, sentence, spent

if TYPE_CHECKING:
    from markupsafe import Markup

_HERE = Path(__file__).parent
#: what marks a file as one that may be written over
GENERATOR = "compress report"

#: topic, text, the models it is true of, "model: layer" of its layers
Line = tuple[str, str, list[str], list[str]]


def page(facts: Facts) -> str:
    """The whole page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(_HERE),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "sentence": sentence}
    script = (_HERE / "page.js.j2").read_text(encoding="utf-8").strip()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        facts=facts,
        generator=GENERATOR,
        title=title(facts),
        themes=[{k: v[i] for k, v in COLOURS.items()} for i in (0, 1)],
        css=Markup((_HERE / "page.css.j2").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        levels=range(LEVELS),
        groups=panels.GROUPS,
        measures=MEASURES,
        headline=headline,
        tables=tables,
        seconds=spent,
        intervals=has_intervals([m.score for m in facts.models if m.score is not None]),
        pareto={"why": pareto.why_not(facts), "figures": _pareto(facts)},
        maps=[_map(m, i) for i, m in enumerate(facts.models)],
        weights=[_weights(m, i) for i, m in enumerate(facts.models)],
        outliers=[_outliers(m, i) for i, m in enumerate(facts.models)],
        costs=_costs(facts),
        calm=CALM,
        warnings=warnings(facts),
        checks=checks(facts),
    )


def title(facts: Facts) -> str:
    """What the page is called."""
    names = ", ".join(facts.sources)
    count = len(facts.models)
    return f"{names}, compressed" + (f" {count} ways" if count > 1 else f": {facts.models[0].name}")


def warnings(facts: Facts) -> list[Line]:
    """Every warning of every model, those that say the same as one, the most telling first."""
    found = tables.merged([(w.topic, w.text, m.name, w.layers) for m in facts.models for w in m.warnings])
    found.sort(key=lambda line: ORDER.index(line[0]) if line[0] in ORDER else len(ORDER))
    unseen = tables.merged([("weights", m.unseen, m.name, ()) for m in facts.models if m.unseen])
    whole: list[Line] = [("comparison", note, [], []) for note in facts.notes]
    notes: list[Line] = [("evaluation", note, [e.file], []) for e in facts.evaluations for note in e.notes]
    return [*whole, *unseen, *found, *notes]


def checks(facts: Facts) -> list[Line]:
    """Everything that was verified."""
    return tables.merged([("verified", line, m.name, ()) for m in facts.models for line in m.checks])


def _both(drawings: Sequence[tuple[Any, dict[str, str]]], name: str, label: str) -> Markup:
    """A figure for wide pages and one for narrow ones, of which a page shows one."""
    from markupsafe import Markup

    sides = ("wide", "narrow")
    parts = [
        render(made, f"{name}-{side}", label, titles, side)
        for side, (made, titles) in zip(sides, drawings, strict=True)
    ]
    return Markup("".join(parts))


def _pareto(facts: Facts) -> Markup | str:
    if pareto.why_not(facts):
        return ""
    front = [p.name for p in pareto.points(facts, "kl") if p.front]
    names = f"on the front by KL divergence: {', '.join(front)}" if front else "no KL divergence was measured"
    label = f"Plot of quality against size for {len(pareto.measured(facts))} models; {names}"
    return _both([(pareto.draw(facts, wide), {}) for wide in (True, False)], "pareto", label)


def _map(model: Model, i: int) -> dict[str, Any]:
    """A model's heat map, and why there is none."""
    from markupsafe import Markup

    found = heat.grid(model)
    if not found.values:
        return {"model": model, "why": "The record holds no errors of layers in decoder blocks."}
    worst = max((x for x in model.layers if x.error is not None), key=lambda x: x.error or 0.0)
    label = (
        f"Heat map of the errors of {model.name}: {len(found.blocks)} blocks by {len(found.kinds)} kinds of layer; "
        f"the largest is {percent(worst.error)} in {worst.name}"
    )
    few = len(found.blocks) <= heat.FEW
    if few:
        made, titles = heat.draw(found, False)
        drawn = Markup(render(made, f"map{i}", label, titles))
    else:
        drawn = _both([heat.draw(found, upright) for upright in (False, True)], f"map{i}", label)
    return {"model": model, "why": "", "figure": drawn, "worst": worst, "few": few, "beside": found.beside}


def _weights(model: Model, i: int) -> dict[str, Any]:
    """Histograms of a model's worst layers, and why there are none."""
    from markupsafe import Markup

    drawn = []
    for j, found in enumerate(model.histograms):
        label = (
            f"Histogram of the weights of {found.layer} of {model.name}, before and after: they moved by "
            f"{percent(found.distance)} of their norm, {percent(found.zeros[1])} are zero after"
        )
        drawn.append((found, Markup(render(panels.histogram(found), f"weights{i}-{j}", label))))
    return {"model": model, "why": model.unseen, "figures": drawn}


def _outliers(model: Model, i: int) -> dict[str, Any]:
    """A model's outlier maps; `figure` None where it keeps no outliers apart."""
    from markupsafe import Markup

    found = model.outliers
    if found is None:
        return {"model": model, "figure": None, "mask": None}
    most = max(found.strips, key=lambda s: s.total)
    label = f"Map of the outlier {found.unit} of {model.name}; most are in {most.kind}, {percent(most.total)}"
    drawn = _both([(panels.outlier_map(found, wide), {}) for wide in (True, False)], f"outliers{i}", label)
    mask = None
    if found.mask is not None:
        label = f"Outlier weights within {found.mask.layer}: {percent(found.mask.total)} of its weights"
        mask = Markup(render(panels.outlier_mask(found.mask), f"mask{i}", label))
    return {"model": model, "figure": drawn, "mask": mask}


def _costs(facts: Facts) -> dict[str, Any]:
    """Bars of time and memory, and why there are none."""
    if not any(m.seconds for m in facts.models):
        return {"why": "No report.json is in these folders, so seconds and memory are not known.", "figure": ""}
    used = list(dict.fromkeys(g for m in facts.models for g in panels.grouped(m.seconds)))
    parts = [(g, panels.GROUPS[g][0] if g in panels.GROUPS else "other parts") for g in used]
    label = "Bars of the seconds of each run by what they went to, and of peak memory"
    drawn = _both([panels.costs(facts.models, wide) for wide in (True, False)], "costs", label)
    return {"why": "", "figure": drawn, "parts": parts}
