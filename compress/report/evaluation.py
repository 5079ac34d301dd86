"""What `compress eval` tells: one JSON object, and tables of it for a screen or a Markdown file.

Schema 1. Shares are 0 to 1, KL divergences nats a token, sizes bytes; an estimate is {"value", "low", "high"}, its ends
those of a 95% interval (null where too little was measured); what was not asked for is not there:

    schema, command, date, machine, versions    as in the reports of `compress bench`
    kind         "evaluation"
    base         a model as below, without what compares it; null without --against
    models       name, folder, format, bytes, average_bits (of packed weights; null for a dense model), dtype,
        texts    text, name, protocol, bos, window, stride, windows, predictions,
                 perplexity, bits_per_byte (estimates), accuracy (share of next tokens that are the most likely one);
                 against a base: kl {mean (estimate), median, p99, p999, max}, top1 (estimate), flips {share
                 (estimate), lost, gained}, nll_more (estimate: mean negative log likelihood less the base's)
        layers   name, block, kind, error: ||W x - W' x|| / ||W x|| on the base's inputs
        blocks   block, error: ||h - h'|| / ||h|| of the hidden states behind it
        tasks    lm_eval (its version), results {task: {version, shots, samples, metrics {name: {value, stderr,
                 higher_is_better}}}}
    seconds      by part
    notes        what a reader must know
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.bench import record
from compress.bench.tables import Table, markdown, show

_WORST = 10  # layers of a model that the table names

Found = Mapping[str, Any]


def whole(found: Mapping[str, Any], seconds: Mapping[str, float], device: int | None) -> dict[str, Any]:
    """The report: what was found, and beside it the machine, the command and the time.

    Args:
        found: of suite.evaluate_all.
        device: index of the CUDA device, None for the CPU.
    """
    return {**record.head(device), **found, "seconds": {**seconds, "total": sum(seconds.values())}}


def print_report(report: dict[str, Any]) -> None:
    """On the screen."""
    show(tables(report), notes(report))


def write(out: Path, report: dict[str, Any]) -> list[Path]:
    """OUT.json and OUT.md."""
    return record.write(out, report, markdown("Evaluation", report, tables(report), notes(report)))


def tables(report: Found) -> list[Table]:
    """One a text, one of tasks, one of each model's worst layers."""
    models, base = report["models"], report["base"]
    every = [*([base] if base else []), *models]
    names = list(dict.fromkeys(text["name"] for model in every for text in model["texts"]))
    made = [table for name in names for table in _text(name, every, base)]
    made += [_tasks(every)] if any("tasks" in model for model in every) else []
    return made + [_layers(model) for model in models if "layers" in model]


def notes(report: Found) -> list[str]:
    """How to read the tables."""
    found = []
    for text in {t["name"]: t for model in report["models"] for t in model["texts"]}.values():
        cut = "side by side" if text["stride"] is None else f"a window every {text['stride']}"
        found.append(
            f"text: {text['text']}; {text['protocol']}; {text['windows']} windows of {text['window']} tokens, {cut}, "
            f"{text['predictions']} predictions; BOS: {text['bos']}"
        )
    found.append("in brackets 95% intervals, by a studentised bootstrap over windows unless a note says otherwise")
    seconds = ", ".join(f"{part} {value:.1f}" for part, value in report["seconds"].items())
    return [*found, *(f"note: {note}" for note in report["notes"]), f"seconds: {seconds}"]


def _text(name: str, every: Sequence[Found], base: Found | None) -> list[Table]:
    """Every model on one text: its own figures, and with an original its distance from that."""
    rows, apart = [], []
    for model in every:
        for text in model["texts"]:
            if text["name"] == name:
                called = f"{model['name']} (original)" if model is base else model["name"]
                rows.append((called, *_own(model, text)))
                apart += [(called, *_compared(text))] if "kl" in text else []
    made = [Table(name, ("model", "MB", "bits", "perplexity", "bits a byte"), tuple(rows))]
    if apart:
        headings = ("model", "KL, nats a token", "median", "p99", "p99.9", "same top token", "lost / gained")
        made.append(Table(f"{name}: distance from the original", headings, tuple(apart)))
    return made


def _own(model: Found, text: Found) -> tuple[str, ...]:
    bits, size = model["average_bits"], text["bits_per_byte"]
    return (
        f"{model['bytes'] / 1e6:.1f}",
        "" if bits is None else f"{bits:.2f}",
        _estimate(text["perplexity"], ".4f"),
        "" if size is None else _estimate(size, ".4f"),
    )


def _compared(text: Found) -> tuple[str, ...]:
    kl, flips = text["kl"], text["flips"]
    quantiles = [_number(kl[name], ".3g") for name in ("median", "p99", "p999")]
    turned = f"{100 * flips['lost']:.2f}% / {100 * flips['gained']:.2f}%"
    return (_estimate(kl["mean"], ".5f"), *quantiles, _estimate(text["top1"], ".2%"), turned)


def _tasks(every: Sequence[Found]) -> Table:
    rows = [
        (model["name"], task, metric, f"{_number(found['value'], '.4f')} ± {_number(found['stderr'], '.4f')}")
        for model in every
        for task, result in model.get("tasks", {"results": {}})["results"].items()
        for metric, found in result["metrics"].items()
    ]
    return Table("tasks, by lm-eval", ("model", "task", "metric", "value ± standard error"), tuple(rows))


def _layers(model: Found) -> Table:
    """The layers furthest from the original, and the last block."""
    known = [layer for layer in model["layers"] if layer["error"] is not None]
    worst = sorted(known, key=lambda layer: -layer["error"])[:_WORST]
    rows = [(layer["name"], layer["kind"], f"{layer['error']:.4f}") for layer in worst]
    if model["blocks"]:
        last = model["blocks"][-1]
        rows.append((f"hidden states behind block {last['block']}", "", _number(last["error"], ".4f")))
    title = f"{model['name']}: relative output error, the {len(worst)} worst of {len(model['layers'])} layers"
    return Table(title, ("layer", "stored as", "error"), tuple(rows))


def _estimate(found: Found, form: str) -> str:
    """A figure, and its interval with a digit less."""
    value, less = _number(found["value"], form), f".{int(form[1:-1]) - 1}{form[-1]}"
    if found["low"] is None or found["high"] is None:
        return value
    return f"{value} [{_number(found['low'], less)}, {_number(found['high'], less)}]"


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "-"
