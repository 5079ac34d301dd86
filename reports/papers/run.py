"""A published table beside ours: every row of a sweep compressed and scored, the paper's figure next to it.

    python reports/papers/run.py FILE.yaml [--models opt-125m,opt-1.3b] [--only TEXT] [--out DIR] [--allow-pickle]
    python reports/papers/run.py FILE.yaml --stand-in bundled

The file says which models, what to calibrate on, what to evaluate on, which steps make each row, and what the paper
has. Results go to DIR/results.json, which a second run goes on from, and DIR/table.md. A row that fails is written down
with its error and tried again by the next run. The dense model is scored once. `--stand-in bundled` runs all rows on
the bundled model and texts: the figures mean nothing beside a paper's and are printed alone.

Exit code: 0; 1 when a row failed; 2 for what stops everything (no such file, no hub).

The loop is its own, not reports/methods/run.py's: that one scores each row against the original in float32, which
needs the original's forward pass a row; here it is one pass a row, in the dtype the package runs in, on several texts.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import compress
from compress.api import BUNDLED, calibration, context_length, evaluation, find_device, find_model, load_tokenizer
from compress.calibration import EvalText
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import Score, evaluate
from compress.options import Options
from compress.pipeline import default_dtype, open_dense
from compress.recipe import Recipe, make_recipe, read_yaml
from compress.report import stored_bits
from compress.weights import Weights

FAILURES = (CompressError, RuntimeError, ValueError, AssertionError)
STAND_IN = {"samples": 8, "seq_len": 128, "window": 128, "tokens": 2048}
SWEEP_KEYS = {"paper", "table", "models", "calibration", "evaluation", "protocol", "sources", "notes", "rows"}
ROW_KEYS = {"name", "steps", "options", "paper", "source", "unconfirmed", "note"}


@dataclass(frozen=True)
class Row:
    """One line of a paper's table.

    Attributes:
        steps: as in a recipe; () for the model as it is.
        options: of the recipe (true_sequential and the like).
        paper: (model, text) -> the paper's figure, None where it has none or none was confirmed.
        unconfirmed: the keys of `paper` whose figures nobody looked up.
        source: key of the sweep's `sources`.
    """

    name: str
    steps: tuple[str, ...]
    options: Mapping[str, Any]
    paper: Mapping[tuple[str, str], float | None]
    unconfirmed: frozenset[tuple[str, str]]
    source: str
    note: str

    @property
    def key(self) -> str:
        return json.dumps([list(self.steps), dict(self.options)]) if self.steps else "dense"

    def recipe(self, where: str) -> Recipe:
        """Raises CompressError for steps or settings that the package does not know."""
        return make_recipe({"steps": list(self.steps), "options": dict(self.options)}, "paper", f"{where}, {self.name}")


@dataclass(frozen=True)
class Sweep:
    """One file: `texts` are names as for --eval, `calibration` has text, samples, seq_len."""

    name: str
    paper: Mapping[str, Any]
    table: str
    models: tuple[str, ...]
    texts: tuple[str, ...]
    calibration: Mapping[str, Any]
    protocol: str
    sources: Mapping[str, str]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]


def read_sweep(path: Path) -> Sweep:
    """A sweep from its file; steps are made into recipes once, so that a slip shows before any work.

    Raises:
        CompressError: no such file, no YAML, a key that is missing or means nothing, a figure that is none.
    """
    where = str(path)
    try:
        found = read_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CompressError(f"cannot be read ({error.strerror})", where, "pass a file of reports/papers") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CompressError(f"is no YAML ({' '.join(str(error).split())[:160]})", where, "mend it") from None
    _expect(isinstance(found, dict) and set(found) == SWEEP_KEYS, f"has not the keys {sorted(SWEEP_KEYS)}", where)
    _expect({"authors", "title", "venue", "year"} <= set(found["paper"]), "paper lacks a key", where)
    _expect(set(found["calibration"]) == {"text", "samples", "seq_len"}, "calibration is incomplete", where)
    models, texts = tuple(found["models"]), tuple(found["evaluation"])
    _expect(bool(models) and bool(texts), "names no model or no text", where)
    rows = tuple(_row(row, models, texts, found["sources"], where) for row in found["rows"])
    _expect(len({row.name for row in rows}) == len(rows), "has two rows of one name", where)
    for row in rows:
        if row.steps:
            row.recipe(where)
    return Sweep(
        path.stem, found["paper"], str(found["table"]), models, texts, found["calibration"], found["protocol"],
        found["sources"], tuple(found["notes"]), rows,
    )  # fmt: skip


def _expect(holds: bool, what: str, where: str) -> None:
    if not holds:
        raise CompressError(what, where, "see reports/papers/README.md")


def _row(found: Any, models: tuple[str, ...], texts: tuple[str, ...], sources: Mapping[str, str], where: str) -> Row:
    _expect(isinstance(found, dict) and {"name", "steps", "paper"} <= set(found) <= ROW_KEYS, f"row {found!r}", where)
    where = f"{where}, {found['name']}"
    given, doubted = found["paper"], found.get("unconfirmed", False)
    _expect(set(given) == set(models), "its figures are not for the models of the file", where)
    figures: dict[tuple[str, str], float | None] = {}
    for model, value in given.items():
        by_text = value if isinstance(value, dict) else dict.fromkeys(texts, value)
        _expect(isinstance(value, dict) or len(texts) == 1 or value is None, "one figure for several texts", where)
        _expect(set(by_text) == set(texts), "its figures are not for the texts of the file", where)
        for text, figure in by_text.items():
            number = isinstance(figure, int | float) and not isinstance(figure, bool)
            _expect(figure is None or (number and 0 < figure < math.inf), f"{figure!r} is no figure", where)
            figures[model, text] = figure
    places = {*models, *texts}
    _expect(isinstance(doubted, bool) or set(doubted) <= places, "unconfirmed names no model or text", where)
    unconfirmed = {k for k in figures if doubted is True or (doubted and not set(k).isdisjoint(doubted))}
    sure = any(v is not None and k not in unconfirmed for k, v in figures.items())
    _expect(found.get("source", "") in sources if sure else True, "says not where its figures were confirmed", where)
    return Row(
        str(found["name"]), tuple(found["steps"]), found.get("options", {}), figures, frozenset(unconfirmed),
        found.get("source", ""), found.get("note", ""),
    )  # fmt: skip


@dataclass
class Run:
    """One call: what is run, with what, and the results so far ("model | key of the row" -> plain values)."""

    sweep: Sweep
    models: tuple[str, ...]
    texts: tuple[str, ...]
    rows: tuple[Row, ...]
    out: Path
    settings: dict[str, Any]
    allow_pickle: bool
    stand_in: bool
    device: torch.device
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def load(self) -> None:
        """Take over an earlier run's results. Raises CompressError when they were made with other settings."""
        file = self.out / "results.json"
        if not file.exists():
            return
        earlier = json.loads(file.read_text())
        if earlier["settings"] != self.settings:
            raise CompressError("holds results made with other settings", str(file), "pass another --out")
        self.results = earlier["rows"]

    def save(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "results.json"
        file.write_text(json.dumps({"settings": self.settings, "rows": self.results}, indent=2) + "\n")
        (self.out / "table.md").write_text("\n".join(report(self)) + "\n")

    def result(self, model: str, row: Row) -> dict[str, Any]:
        return self.results.get(f"{model} | {row.key}", {})

    def pending(self, model: str) -> list[Row]:
        return [row for row in self.rows if "perplexity" not in self.result(model, row)]


def run_model(run: Run, model: str) -> None:
    """Every row that has no result yet. Raises CompressError when the model or a text cannot be had."""
    rows = run.pending(model)
    if not rows:
        return
    source = find_model(model, run.allow_pickle)
    dense = open_dense(source, run.allow_pickle, run.out / "pickle")
    tokenizer = load_tokenizer(source)
    longest = context_length(source)
    texts = {name: evaluation(tokenizer, name, min(2048, longest or 2048)) for name in run.texts}
    options = {"calib": run.settings["calib"], "samples": run.settings["samples"], "seq_len": run.settings["seq_len"]}
    if any(row.steps and row.recipe(run.sweep.name).needs for row in rows):  # what fails for all rows fails here
        calibration(source, tokenizer, Options(**options), run.device, longest)
    for row in rows:
        begun = time.perf_counter()
        folder = run.out / "checkpoint"
        try:
            made: dict[str, Any] = {}
            checkpoint = dense
            if row.steps:
                shutil.rmtree(folder, ignore_errors=True)
                result = compress.run(
                    source, row.recipe(run.sweep.name), folder, no_eval=True, fresh=True, device=str(run.device),
                    allow_pickle=run.allow_pickle, **options,
                )  # fmt: skip
                made = {"bits": stored_bits(result), "format": result.plan.format.name}
                checkpoint = Checkpoint.open(folder)
            scores = {name: score(run, dense, checkpoint, text) for name, text in texts.items()}
            made |= {
                "perplexity": {name: found.perplexity for name, found in scores.items()},
                "windows": {name: f"{found.windows} windows of {found.window}" for name, found in scores.items()},
                "protocol": {name: f"{text.protocol}; {text.bos}" for name, text in texts.items()},
                "seconds": time.perf_counter() - begun,
            }
        except FAILURES as error:
            made = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        shutil.rmtree(folder, ignore_errors=True)
        run.results[f"{model} | {row.key}"] = made
        run.save()
        said = made.get("error") or ", ".join(f"{t} {figure(x)}" for t, x in made["perplexity"].items())
        print(f"{short(model)}, {row.name}: {said}", file=sys.stderr, flush=True)
    shutil.rmtree(run.out / "pickle", ignore_errors=True)


def score(run: Run, dense: Checkpoint, checkpoint: Checkpoint, text: EvalText) -> Score:
    """By the package's protocol, in the dtype that it runs the dense model in."""
    stored = Weights(dense)
    first = next(name for name in stored.shapes_cache() if name.endswith(".weight"))
    dtype = default_dtype(stored.dtype(first), run.device)
    tokens = text.tokens[: run.settings["tokens"]]
    return evaluate(Weights(checkpoint), tokens, run.device, dtype, window=run.settings["window"])[0]


def short(model: str) -> str:
    return model.rsplit("/", 1)[-1]


def figure(x: float) -> str:
    return f"{x:.2f}" if x < 100 else f"{x:.4g}"


def cell(run: Run, model: str, text: str, row: Row) -> str:
    """paper / ours (difference); "?" behind a figure of the paper that nobody looked up."""
    found = run.result(model, row)
    mine = None if "perplexity" not in found else found["perplexity"][text]
    ours = "failed" if "error" in found else "" if mine is None else figure(mine)
    if run.stand_in:
        return ours
    paper = row.paper[model, text]
    if paper is None:
        return f"- / {ours}"
    told = figure(paper) + "?" * ((model, text) in row.unconfirmed)
    return f"{told} / {ours}" + ("" if mine is None else f" ({100 * (mine / paper - 1):+.1f}%)")


def bits(run: Run, row: Row) -> str:
    """Stored bits a weight, our count, over the models: one number or a range."""
    found = sorted({round(b, 2) for m in run.models if (b := run.result(m, row).get("bits")) is not None})
    return " to ".join(f"{b:.2f}" for b in dict.fromkeys([*found[:1], *found[-1:]]))


def report(run: Run) -> list[str]:
    """Markdown: a table a text, then what has to be known to read it."""
    paper, s = run.sweep.paper, run.settings
    device = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else f"{platform.machine()} CPU"
    what = "stand-in run, ours only: no figure here is comparable with the paper's" if run.stand_in else "paper / ours"
    lines = [
        f"# {paper['authors']}: {paper['title']}, {paper['venue']} {paper['year']}, table {run.sweep.table}",
        "",
        f"Perplexity, {what}. Calibration: {s['calib']}, {s['samples']} x {s['seq_len']} tokens. One {device}; "
        f"compress {compress.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}; {time.strftime('%Y-%m-%d')}.",
    ]
    for text in run.texts:
        lines += ["", f"## {text}", "", f"| | {' | '.join(map(short, run.models))} | bits a weight | steps |"]
        lines += ["|---" * (len(run.models) + 3) + "|"]
        for row in run.rows:
            cells = " | ".join(cell(run, model, text, row) for model in run.models)
            steps = f"`{'; '.join(row.steps)}`" if row.steps else "the model as it is"
            extra = "".join(f" `{k}: {json.dumps(v)}`" for k, v in row.options.items())
            lines.append(f"| {row.name} | {cells} | {bits(run, row)} | {steps}{extra} |")
    errors = [
        (m, r.name, run.result(m, r)["error"]) for m in run.models for r in run.rows if "error" in run.result(m, r)
    ]
    lines += ["", *(f"- failed: {short(m)}, {name}: {error}" for m, name, error in errors)]
    done = [found for m in run.models for r in run.rows if "perplexity" in (found := run.result(m, r))]
    for text in run.texts:
        lines += dict.fromkeys(f"- {text}, ours: {d['protocol'][text]}; {d['windows'][text]}" for d in done)
    if run.stand_in:
        return lines
    lines += [f"- the paper's protocol: {run.sweep.protocol}"]
    lines += [f"- {row.name}: {row.note}" for row in run.rows if row.note]
    lines += [f"- {note}" for note in run.sweep.notes]
    lines += [f"- the paper's figures ({name}): {text}" for name, text in run.sweep.sources.items()]
    if any(row.unconfirmed for row in run.rows):
        lines.append('- "?": from memory of the paper; nobody looked it up')
    return lines


def choose(sweep: Sweep, wanted: str) -> tuple[str, ...]:
    """The models that "opt-125m,opt-1.3b" names, in the file's order. Raises CompressError."""
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    for name in names:
        if not any(name in (m, short(m)) for m in sweep.models):
            there = ", ".join(map(short, sweep.models))
            raise CompressError(f"no model {name!r} in {sweep.name}", "--models", f"there are {there}")
    return tuple(m for m in sweep.models if not names or {m, short(m)} & set(names))


def make_run(args: argparse.Namespace) -> Run:
    """What the arguments and the file ask for. Raises CompressError."""
    sweep = read_sweep(args.file)
    stand_in = args.stand_in is not None
    asked = {k: getattr(args, k) for k in STAND_IN if getattr(args, k) is not None}
    given = {"samples": sweep.calibration["samples"], "seq_len": sweep.calibration["seq_len"]}
    base = STAND_IN if stand_in else {**dict.fromkeys(STAND_IN), **given}
    calib = BUNDLED if stand_in else sweep.calibration["text"]
    settings = {"sweep": sweep.name, "stand_in": args.stand_in, "calib": calib, **base, **asked}
    rows = tuple(row for row in sweep.rows if not row.steps or args.only in row.name)
    models, texts = ((BUNDLED,), (BUNDLED,)) if stand_in else (choose(sweep, args.models), sweep.texts)
    out = args.out or Path("papers-out") / (sweep.name + "-stand-in" * stand_in)
    device = find_device(args.device)
    run = Run(sweep, models, texts, rows, out, settings, args.allow_pickle, stand_in, device)
    run.load()
    return run


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A published table beside ours; see reports/papers/README.md.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--models", default="", help="only these of the file's models, by hub id or its last part")
    parser.add_argument("--only", default="", help="only rows whose name holds this text (and the dense model)")
    parser.add_argument("--out", type=Path, help="default: papers-out/NAME here")
    parser.add_argument("--stand-in", choices=[BUNDLED], help="the bundled model and texts in place of the file's")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: cuda if there is one")
    parser.add_argument("--allow-pickle", action="store_true", help="models without safetensors (facebook/opt-*)")
    for name in STAND_IN:
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, help=f"default: the file's; {STAND_IN[name]} stand-in"
        )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        run = make_run(args)
        for model in run.models:
            run_model(run, model)
    except CompressError as error:
        print(f"error: {error.line()}", file=sys.stderr)
        return 2
    run.save()
    print("\n".join(report(run)))
    return 1 if any(run.pending(model) for model in run.models) else 0


if __name__ == "__main__":
    sys.exit(main())
