"""`compress auto` from top to bottom: what may be chosen, what it costs, the choice, and one ordinary run with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import api
from compress.auto import words
from compress.auto.allocate import Allocation, allocate, interpolated
from compress.auto.asked import Ask
from compress.auto.candidates import Field, base_method, recipe_of, survey
from compress.auto.measure import Work, forks_of, measure
from compress.auto.store import Store
from compress.blocks import BlockModel
from compress.calibration import Rows
from compress.errors import CompressError
from compress.flows import start_flows
from compress.formats import FORMATS
from compress.job import Job, Progress, Result
from compress.options import Options
from compress.output import WEIGHT_FILES
from compress.pipeline import compress_checkpoint, make_plan, open_model
from compress.plan import Plan
from compress.recipe import Recipe
from compress.report import card
from compress.types import settings

#: candidates of each group whose divergence is measured, see `measure.forks_of`
POINTS = 2
#: options that change what is written, which the recipe carries
_CARRIED = ("target", "calib", "calib_column", "chat_template", "samples", "seq_len", "seed", "eval", "include",
            "exclude", "blocks", "lm_head", "true_sequential", "dtype", "refine")  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What was chosen, and the run with it.

    Attributes:
        budget: bytes that the compressed layers may take.
        costs: predicted KL divergence (nats a token; with --sensitivity loss relative errors) by group and candidate,
            math.inf where a group may not take a candidate.
        on: the tokens on which divergences were measured; None with --sensitivity loss.
        result: None for a dry run.
    """

    job: Job
    ask: Ask
    field: Field
    budget: int
    costs: list[list[float]]
    allocation: Allocation
    recipe: Recipe
    measured: Path
    on: str | None
    result: Result | None = None

    @property
    def bits(self) -> float:
        """Stored bits a compressed weight."""
        return 8.0 * self.allocation.size / self.field.weights


def auto(
    model: str,
    ask: Ask,
    options: Options | None = None,
    dry: bool = False,
    progress: Progress = lambda status: None,
) -> Outcome:
    """Choose each layer's setting within the budget and write the checkpoint.

    Args:
        model: a folder, a hub id, or "bundled".
        dry: measure and choose, write no checkpoint (measurements are kept).

    Raises:
        CompressError: anything a user can mend; what was measured until then is kept.
    """
    options = options or Options()
    name = os.path.basename(os.path.abspath(os.path.expanduser(model))) if model != api.BUNDLED else model
    out = options.out or Path(f"{name}-auto-{ask.label}")
    kept = ask.measured or Path(f"{name if options.out is None else out}.auto")
    method = base_method(ask)
    quick = api.make_job(model, method, replace(options, out=out), dry=True)
    unpickled = Path(f"{out}.unpickled")
    weights, streamed = open_model(quick, unpickled)
    field = survey(streamed, quick, ask, options.format)
    budget = budget_of(ask, field)
    least = [[0.0 if size is not None else float("inf") for size in group.sizes] for group in field.groups]
    allocate(least, _sizes(field), budget)  # without the solver nothing is measured
    fixed = replace(options, out=out, format=field.format)
    job = replace(api.make_job(model, method, fixed, dry=dry), format=field.format, fallback=False)
    rows = job.rows or _rows(job, field, ask, options)
    plan = make_plan(replace(job, recipe=recipe_of(field, [group.options[0] for group in field.groups])), streamed)
    probes = None if rows is None or ask.sensitivity == "loss" else rows.tokens[: ask.probes, : ask.probe_len]
    store = Store(kept)
    with store.opened(lambda: fingerprint(job, ask, weights.checkpoint.fingerprint(), rows, streamed, plan), job.fresh):
        _measure(streamed, plan, field, store, replace(job, rows=rows), probes, progress)
        costs = costs_of(field, store, ask.sensitivity == "kl")
    allocation = allocate(costs, _sizes(field), budget)
    recipe = recipe_of(field, allocation.choice, _carried(options, field.format))
    on = None if probes is None or rows is None else f"{len(probes)} x {probes.shape[1]} tokens of {rows.source}"
    outcome = Outcome(job, ask, field, budget, costs, allocation, recipe, kept, on)
    if dry:
        shutil.rmtree(unpickled, ignore_errors=True)
        return outcome
    told = tuple(words.notes(outcome))
    job = replace(
        job,
        recipe=api.settled(recipe, job.device, options),
        notes=told,
        files={"recipe.yaml": words.recipe_file(recipe)},
    )
    result = compress_checkpoint(job, progress)
    check(outcome, result)
    return replace(outcome, job=job, result=result)


def budget_of(ask: Ask, field: Field) -> int:
    """Bytes for the compressed layers. Raises CompressError for a budget that no choice meets, or every one does."""
    least, most = (sum(f(s for s in g.sizes if s is not None) for g in field.groups) for f in (min, max))
    if ask.max_size is None:
        assert ask.avg_bits is not None
        budget = int(ask.avg_bits * field.weights / 8 + 1e-6)
        option, asked = "--avg-bits", f"{ask.avg_bits:g} bits a weight"
        low, high = (f"{8 * size / field.weights:.4f} bits" for size in (least, most))
    else:
        if FORMATS[field.format].container != "safetensors":
            raise CompressError(f"sizes of {field.format} files are not known before", "--max-size", "use --avg-bits")
        budget = ask.bytes() - field.dense_bytes
        option, asked = "--max-size", f"{ask.bytes():,} bytes for all weight files"
        low, high = (f"{size + field.dense_bytes:,} bytes" for size in (least, most))
    if budget < least:
        what = f"{asked}, the smallest choice takes {low}"
        raise CompressError(what, option, "allow as much, or offer less with --bits and --group-size")
    if budget > most:
        what = f"{asked}, the largest choice takes {high}"
        raise CompressError(what, option, "ask for less, or offer more with --bits and --group-size")
    return budget


def _sizes(field: Field) -> list[list[int]]:
    return [[size or 0 for size in group.sizes] for group in field.groups]


def _rows(job: Job, field: Field, ask: Ask, options: Options) -> Rows | None:
    """Calibration rows where the ordinary job brought none: of a dry run, and of a method that needs none itself."""
    if ask.sensitivity == "loss" and not field.candidates[0].method.needs:
        return None
    tokenizer = api.load_tokenizer(job.source, options.trust_remote_code)
    longest = api.context_length(job.source, options.trust_remote_code)
    return api.calibration(job.source, tokenizer, options, job.device, longest)


def _measure(
    model: BlockModel, plan: Plan, field: Field, store: Store, job: Job, probes: Tensor | None, progress: Progress
) -> None:
    """Fill the store. Hidden states that fit in no memory lie beside it."""
    with start_flows(model, plan, job, store.folder, None) as flows:
        measure(
            Work(
                model,
                field,
                store,
                plan.scale_dtype,
                flows.compressed,
                probes,
                store.folder / "probes.bin",
                POINTS,
                2 * plan.device_bytes,
                job.low_memory,
            ),
            progress,
        )


def costs_of(field: Field, store: Store, divergence: bool) -> list[list[float]]:
    """What each candidate costs each group, see `Outcome.costs`.

    The relative error of a group is the mean of its layers', weighted by the tokens that reached them (experts).

    Args:
        divergence: by the measured KL divergences, on straight lines between them; else parts * relative error.
    """
    known = store.divergences() if divergence else {}
    blocks = {group.block: store.losses(group.block) for group in field.groups}
    table = []
    for group in field.groups:
        errors: dict[int, float] = {}
        for c in group.options:
            mine = [blocks[group.block][x.name][field.candidates[c].key] for x in group.linears]
            counts = [max(m["tokens"], 1.0) for m in mine]
            shares = [n * m["loss"] / m["norm"] if m["norm"] > 0 else 0.0 for m, n in zip(mine, counts, strict=True)]
            errors[c] = sum(shares) / sum(counts)
        row = [float("inf")] * len(field.candidates)
        if divergence:
            forks = forks_of(group, field.candidates, POINTS)
            points = [(errors[c], known[group.key][field.candidates[c].key]) for c in forks]
        for c, error in errors.items():
            row[c] = interpolated(points, error) if divergence else group.parts * error
        table.append(row)
    return table


def fingerprint(
    job: Job, ask: Ask, sources: Mapping[str, str], rows: Rows | None, model: BlockModel, plan: Plan
) -> dict[str, Any]:
    """Everything that losses and divergences depend on, but for which layers and candidates there are."""
    import transformers

    from compress import __version__

    plain = {k: v for k, v in settings(base_method(ask)).items() if k not in ("bits", "group_size")}
    return {
        "checkpoint": dict(sources),
        "method": {"name": base_method(ask).name, **plain},
        "calibration": None if rows is None else {"source": rows.source, "sha256": rows.sha256},
        "probes": {"rows": ask.probes, "tokens": ask.probe_len},
        "scales": str(plan.scale_dtype).removeprefix("torch."),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "versions": {"compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _carried(options: Options, format: str) -> dict[str, Any]:
    """The options that the recipe brings, so that `compress run` makes the same checkpoint."""
    plain = Options()
    found: dict[str, Any] = {k: getattr(options, k) for k in _CARRIED if getattr(options, k) != getattr(plain, k)}
    public: dict[str, Any] = {
        k: card.text_name(found[k]) for k in ("calib", "eval") if k in found
    }  # the folder may be published
    return {"format": format, **found, **public}


def check(outcome: Outcome, result: Result) -> None:
    """Compare what was written with what was promised. Raises CompressError for a file that is larger than asked."""
    stored = sum(record["bytes"] for record in result.records)
    assert stored == outcome.allocation.size <= outcome.budget, (stored, outcome.allocation.size, outcome.budget)
    if outcome.ask.max_size is not None:
        files = [f for f in sorted(outcome.job.out.iterdir()) if f.name.endswith(WEIGHT_FILES)]
        size = sum(f.stat().st_size for f in files if not f.name.endswith(".json"))
        if size > outcome.ask.bytes():
            what = f"its weight files take {size:,} bytes, {outcome.ask.bytes():,} were asked for"
            raise CompressError(what, str(outcome.job.out), "report this, and ask for less")
