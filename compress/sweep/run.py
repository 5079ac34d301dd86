"""The flow of a sweep: refuse what cannot be, make each checkpoint, measure all against the original, choose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compress import api, pipeline
from compress.calibration import Rows
from compress.checkpoint import read_json
from compress.errors import CompressError
from compress.job import Job, Progress
from compress.journal import compare
from compress.options import Options
from compress.output import read_record
from compress.plan import check_room
from compress.stats import Shared
from compress.sweep.front import Point, Wish, choose, front
from compress.sweep.settings import Setting
from compress.writer import write_json

Told = Callable[[str], None]
Row = dict[str, Any]
_ASKED = "sweep.settings.json"
_STATES = 20.0  # GB of the original's states that are kept while checkpoints are measured one by one


@dataclass(frozen=True)
class Sweep:
    """What is tried.

    Attributes:
        model: folder, hub id or "bundled".
        settings: the runs.
        out: folder of folders, one a setting, and of what was measured.
        options: of every run; `eval` names the text.
        wish: what the choice must keep to.
        discard: measure each checkpoint as soon as it is made, then delete it.
    """

    model: str
    settings: tuple[Setting, ...]
    out: Path
    options: Options
    wish: Wish = Wish()
    discard: bool = False


def run(sweep: Sweep, told: Told, progress: Progress = lambda status: None) -> dict[str, Any]:
    """The report, also as OUT/sweep.json and .md: schema in compress/report/sweep.py. What a stopped sweep made is not
    made again.

    Args:
        told: is called with a line before something that takes long.

    Raises:
        CompressError: nothing can be tried; the folder holds another sweep; the disk has no room.
    """
    from compress.bench import record
    from compress.report import sweep as sweep_report

    device = api.find_device(sweep.options.device)
    made_out = [replace(s, recipe=api.settled(s.recipe, device, sweep.options)) for s in sweep.settings]
    sweep = replace(sweep, settings=tuple(made_out))
    jobs, rows = _plan(sweep, told)
    _begin(sweep)
    together = _Together(sweep)
    for setting in sweep.settings:
        row = rows[setting.name]
        if row["refused"] or _measured(sweep, setting):
            continue
        if not _made(sweep, setting):
            told(f"{setting.name}: {row['command']}")
            _make(together, setting, jobs[setting.name], row, progress)
        if sweep.discard and not row["refused"]:
            _measure(sweep, [setting], progress, _STATES)
            shutil.rmtree(sweep.out / setting.name)
    left = [s for s in sweep.settings if not rows[s.name]["refused"] and not _measured(sweep, s)]
    if left:
        told(f"measuring {len(left)} checkpoints against {sweep.model}")
        _measure(sweep, left, progress, 0.0)
    base = None
    for setting in sweep.settings:
        if not rows[setting.name]["refused"]:
            found = read_json(sweep.out / f"{setting.name}.json")
            rows[setting.name] |= found["model"]
            base = found["base"]
    head = record.head(None if device.type == "cpu" else device.index or 0)
    report = {**head, "kind": "sweep", "model": sweep.model, "base": base, **_decided(sweep, list(rows.values()))}
    sweep_report.write(sweep.out / "sweep", report)
    return report


def _plan(sweep: Sweep, told: Told) -> tuple[dict[str, Job], dict[str, Row]]:
    """A job for each setting, without its texts, and a row of the report, which says why a setting cannot be tried."""
    jobs: dict[str, Job] = {}
    rows: dict[str, Row] = {}
    total = 0
    for setting in sweep.settings:
        options = replace(sweep.options, out=sweep.out / setting.name, no_eval=True, fresh=False)
        row: Row = {
            "name": setting.name, "command": setting.command(sweep.model, setting.name, sweep.options), "refused": "",
            "method": setting.recipe.as_json(),
        }  # fmt: skip
        rows[setting.name] = row
        try:
            job = api.make_job(sweep.model, setting.recipe, options, dry=True)
            plan = pipeline.make_plan(job, pipeline.open_model(job)[1])
        except CompressError as error:
            row["refused"] = error.line()
            told(f"{setting.name} is left out: {error.line()}")
            continue
        jobs[setting.name] = job
        if sweep.options.fresh or not (_made(sweep, setting) or _measured(sweep, setting)):
            total = max(total, 2 * plan.bytes_after) if sweep.discard else total + plan.bytes_after
    if not jobs:
        first = rows[sweep.settings[0].name]["refused"]
        raise CompressError(f"none of {len(rows)} settings can be tried; the first: {first}", "sweep", "change it")
    check_room(sweep.out / "any", total)
    return jobs, rows


def _begin(sweep: Sweep) -> None:
    """Make the folder, or make sure that it holds this sweep. Raises CompressError."""
    options = {k: v for k, v in asdict(sweep.options).items() if k not in ("out", "overwrite", "fresh", "device")}
    asked = json.loads(json.dumps({"model": sweep.model, "options": options}, default=str))
    file = sweep.out / _ASKED
    if sweep.out.exists() and any(sweep.out.iterdir()):
        if not file.exists():
            raise CompressError("is not the folder of a sweep", str(sweep.out), "choose another -o")
        earlier = read_json(file)
        if sweep.options.fresh:
            shutil.rmtree(sweep.out)
        elif differences := compare(earlier, asked):
            what = f"an earlier sweep differs in {'; '.join(differences)}"
            raise CompressError(what, str(sweep.out), "pass --fresh to start over, or another -o")
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_json(file, asked)


@dataclass
class _Together:
    """What runs of one sweep have in common; a recipe with options of its own may have other rows."""

    sweep: Sweep
    shared: Shared = field(default_factory=Shared)
    rows: Rows | None = None

    def job(self, setting: Setting, dry: Job) -> Job:
        """The job, with its calibration rows. Raises CompressError."""
        options = replace(self.sweep.options, out=self.sweep.out / setting.name, no_eval=True, fresh=False)
        if setting.recipe.options:
            return api.make_job(self.sweep.model, setting.recipe, options)
        if not dry.recipe.needs:
            return dry
        if self.rows is None:
            self.rows = api.make_job(self.sweep.model, setting.recipe, options).rows
        return replace(dry, rows=self.rows, shared=self.shared)


def _make(together: _Together, setting: Setting, dry: Job, row: Row, progress: Progress) -> None:
    """One checkpoint; why there is none goes into its row."""
    try:
        pipeline.compress_checkpoint(together.job(setting, dry), _about(setting, progress))
    except CompressError as error:
        row["refused"] = error.line()


def _made(sweep: Sweep, setting: Setting) -> bool:
    """Whether the checkpoint is there. Raises CompressError for another one under its name."""
    folder = sweep.out / setting.name
    record = read_record(folder) if folder.is_dir() else None
    if record is None:
        return False
    if record.get("method") != json.loads(json.dumps(setting.recipe.as_json())):
        raise CompressError("was made by other settings", str(folder), "pass --fresh to start over, or another -o")
    return True


def _measured(sweep: Sweep, setting: Setting) -> bool:
    return (sweep.out / f"{setting.name}.json").exists()


def _measure(sweep: Sweep, settings: Sequence[Setting], progress: Progress, cache: float) -> None:
    """Perplexity and distance from the original of some checkpoints, in one pass over the original; a file for each."""
    options = sweep.options
    found = api.evaluate_models(
        [sweep.out / s.name for s in settings],
        [options.eval],
        against=sweep.model,
        device=options.device,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        low_memory=options.low_memory,
        cache_gb=cache,
        progress=progress,
    )
    for setting, model in zip(settings, found["models"], strict=True):
        report = read_json(sweep.out / setting.name / "report.json")
        model |= {"name": setting.name, "seconds": report.get("seconds", {}), "notes": found["notes"]}
        write_json(sweep.out / f"{setting.name}.json", {"model": model, "base": found["base"]})


def _decided(sweep: Sweep, rows: list[Row]) -> dict[str, Any]:
    """The rows, those on the front marked, and what was chosen."""
    points = [_point(row) for row in rows if not row["refused"]]
    best = {point.name for point in front(points)}
    for row in rows:
        row["on_front"] = row["name"] in best
    chosen = choose(points, sweep.wish) if sweep.wish else None
    said = None
    if sweep.wish and chosen is None:
        said = f"none of {len(points)} keeps to {sweep.wish.words()}"
    return {
        "settings": rows,
        "wish": {**asdict(sweep.wish), "words": sweep.wish.words()},
        "choice": None if chosen is None else chosen.name,
        "why_none": said,
        "failed": sum(bool(row["refused"]) for row in rows),
        "missing": 0,
    }


def _point(row: Row) -> Point:
    text = row["texts"][0]
    bits = row["average_bits"] if row["average_bits"] is not None else 16.0
    return Point(row["name"], row["bytes"], bits, text["kl"]["mean"]["value"], text["perplexity"]["value"])


def _about(setting: Setting, progress: Progress) -> Progress:
    """A progress line that says which setting it is about."""
    return lambda at: progress(replace(at, phase=f"{setting.name}: {at.phase}"))
