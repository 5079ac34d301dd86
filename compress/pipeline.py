"""The flow, from top to bottom: open, calibrate, one decoder block at a time, write, verify, evaluate.

compress_checkpoint() is the whole system in one function; what it calls are the rooms of the house.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress import plan as planning
from compress import stats
from compress.blocks import BlockModel, Linear
from compress.checkpoint import Checkpoint
from compress.errors import CompressError
from compress.evaluate.perplexity import evaluate
from compress.formats import FORMATS
from compress.hidden import Activations, batch_rows
from compress.job import Clock, Job, Progress, Result, Status
from compress.journal import Journal, check_output
from compress.output import assemble
from compress.plan import Plan
from compress.report import finish
from compress.types import LayerStats, Needs, Solved, settings
from compress.verify import digest, verify
from compress.weights import Weights


def open_model(job: Job, pickle_cache: Path | None = None) -> tuple[Weights, BlockModel]:
    """The source checkpoint and its model on the meta device.

    Args:
        pickle_cache: where pickled weights are rewritten; without it they cannot be read, and nothing is written.

    Raises:
        CompressError: input that cannot be used.
    """
    weights = Weights(open_dense(job.source, job.allow_pickle, pickle_cache))
    probe = BlockModel(weights, torch.float32, job.device, job.trust_remote_code)
    first = next((x for i in range(len(probe.block_names)) for x in probe.linears(i)), None)
    if first is None:
        what = f"0 linear layers in its {len(probe.block_names)} blocks"
        raise CompressError(what, str(job.source), "this architecture is not supported")
    probe.dtype = job.dtype or default_dtype(weights.dtype(first.name + ".weight"), job.device)
    return weights, probe


def open_dense(source: Path, allow_pickle: bool = False, pickle_cache: Path | None = None) -> Checkpoint:
    """`Checkpoint.open` of a checkpoint that nothing has quantised yet. Raises CompressError."""
    checkpoint = Checkpoint.open(source, allow_pickle, pickle_cache)
    declared = checkpoint.config.get("quantization_config")
    if declared is not None:
        method = declared.get("quant_method") if isinstance(declared, dict) else type(declared).__name__
        what = f"the input is already quantised (quantization_config: {method})"
        raise CompressError(what, str(source / "config.json"), "pass the original model")
    return checkpoint


def default_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The checkpoint's own dtype on a GPU, float32 on a CPU (many have no 16-bit arithmetic worth using)."""
    return stored if device.type == "cuda" else torch.float32


def compress_checkpoint(job: Job, progress: Progress = lambda status: None) -> Result:
    """Compress one checkpoint.

    Returns:
        What was done, with the evaluation of the file as written.

    Raises:
        CompressError: anything a user can mend; nothing is left under the final name, finished blocks are kept.
    """
    clock = Clock(device=job.device)
    check_output(job.out, job.overwrite, job.source)
    with clock("load"):
        weights, model = open_model(job, job.out.with_name(job.out.name + ".unpickled"))
    plan = planning.make_plan(model, job.method, FORMATS[job.format], job.include, job.exclude, job.lm_head)
    planning.check_room(job.out, 2 * plan.bytes_after)
    if Needs.HESSIAN in plan.method.needs and job.rows is None:
        raise CompressError(
            f"{plan.method.name} needs calibration data", "--calib", "pass --calib bundled or a text file"
        )

    with Journal(job.out, job.overwrite, job.source) as journal:
        earlier = {} if job.fresh else journal.earlier()
        flow = start_flow(model, plan, job, journal.folder / "hidden.bin", earlier.get("batch_rows"))
        with clock("hash"):
            sources = weights.checkpoint.fingerprint()
        done = journal.start(fingerprint(job, plan, sources, model.dtype, flow), job.fresh)
        if flow is not None:
            with clock("forward"):
                flow.enter()
        layers = 0
        for block, linears in enumerate(plan.blocks):
            last = block + 1 == len(plan.blocks)
            if block >= done or (flow is not None and not last):
                with clock("load"):
                    model.load(block)
                if block < done:
                    restore(model, journal, plan, block)
                else:
                    tensors, records = compress_block(model, plan, block, flow, job.true_sequential, clock)
                    with clock("write"):
                        journal.add(block, tensors, records)
                if flow is not None and not last:
                    with clock("forward"):
                        flow.advance(block)
                model.free(block)
            layers += len(linears)
            progress(Status("compress", block + 1, len(plan.blocks), layers, plan.layers))
        if flow is not None:
            flow.close()
        records = [r for block in range(len(plan.blocks)) for r in journal.records(block)]
        with clock("write"):
            assemble(plan, weights.checkpoint, journal)
        with clock("verify"):
            proof = verify(journal.final, records, weights.checkpoint, job.trust_remote_code)
        score = original = None
        if job.text is not None:
            with clock("evaluate"):
                written = Weights(Checkpoint.open(journal.final))
                score, original = evaluate(
                    written,
                    job.text.tokens,
                    job.device,
                    model.dtype,
                    original=weights,
                    trust_remote_code=job.trust_remote_code,
                    step=lambda d, t: progress(Status("evaluate", d, t, layers, plan.layers)),
                )
        result = Result(job, plan, records, proof, score, original, clock.seconds, done, model.dtype)
        finish(result, journal.final)
        journal.publish()
    return result


def start_flow(model: BlockModel, plan: Plan, job: Job, spill: Path, rows_before: int | None) -> Activations | None:
    """The calibration rows as activations, None for a pass that needs none.

    Batches are sized to the free memory; a run that goes on keeps the size it began with, and so its sums.
    """
    if job.rows is None or Needs.HESSIAN not in plan.method.needs:
        return None
    tokens = job.rows.tokens
    widest = max(linear.shape[0] for block in plan.blocks for linear in block)
    size = rows_before or batch_rows(len(tokens), tokens.shape[1], model.hidden_size, widest, job.device)
    return Activations(model, tokens, size, spill)


def compress_block(
    model: BlockModel, plan: Plan, block: int, flow: Activations | None, true_sequential: bool, clock: Clock
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Compress every chosen layer of a loaded block, in place.

    Returns:
        the tensors to store, by full name, and a record for each layer.
    """
    linears = plan.blocks[block]
    if flow is None or not linears:
        inputs = [stats.Inputs([linear], LayerStats(0)) for linear in linears]
    else:
        with clock("hessian"):
            inputs = stats.collect(model, block, linears, flow)
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    for position in range(len(inputs)):
        group = inputs[position]
        if flow is not None and true_sequential and position and group.stage != inputs[position - 1].stage:
            with clock("hessian"):  # the layers before this one are compressed now
                rest = [linear for later in inputs[position:] for linear in later.linears]
                inputs[position:] = stats.collect(model, block, rest, flow)
            group = inputs[position]
        with clock("solve"):
            weight = torch.cat([model.weight(linear).float() for linear in group.linears])
            solved = solve(plan, group, weight)
        start = 0
        for linear in group.linears:
            stop = start + linear.shape[0]
            part = solved.packed.rows(start, stop)
            dense = part.dequantize()
            model.set_weight(linear, dense)
            stored = {f"{linear.name}.{s}": t.cpu() for s, t in plan.format.pack(part).items()}
            tensors |= stored
            records.append(record(linear, group.stats, solved, start, stop, stored, dense))
            start = stop
    return tensors, records


def solve(plan: Plan, group: stats.Inputs, weight: Tensor) -> Solved:
    """Run the pass on the rows of all layers that share an input; errors name the layers."""
    try:
        return plan.method(weight, group.stats, plan.scale_dtype)
    except CompressError as error:
        names = ", ".join(linear.name for linear in group.linears)
        raise CompressError(error.what, error.where or f"layer {names}", error.remedy) from None


def record(
    linear: Linear,
    layer_stats: LayerStats,
    solved: Solved,
    start: int,
    stop: int,
    stored: dict[str, Tensor],
    dense: Tensor,
) -> dict[str, Any]:
    """What the report says of one layer."""
    loss, norm = float(solved.row_loss[start:stop].sum()), float(solved.row_norm[start:stop].sum())
    if not math.isfinite(loss) or not math.isfinite(norm):
        what = f"its error overflows float32 (weights up to {float(dense.abs().max()):.1e})"
        raise CompressError(what, f"layer {linear.name}", f"--exclude '{linear.name}' leaves it dense")
    notes = list(solved.notes)
    if linear.expert is not None and layer_stats.hessian is not None and layer_stats.tokens < linear.shape[1]:
        notes.append(f"only {layer_stats.tokens} calibration tokens reached this expert ({linear.shape[1]} inputs)")
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    return {
        "name": linear.name,
        "shape": list(linear.shape),
        "bytes": nbytes,
        "bits_per_weight": 8 * nbytes / (linear.shape[0] * linear.shape[1]),
        "tokens": layer_stats.tokens,
        "relative_error": loss / norm if norm > 0 else 0.0,
        "notes": notes,
        "sha256_dense": digest(dense),
    }


def restore(model: BlockModel, journal: Journal, plan: Plan, block: int) -> None:
    """Give a loaded block the weights that an earlier run stored for it."""
    from compress.checkpoint import read_tensor

    stored = journal.tensors(block)
    config = plan.quantization_config()
    for linear in plan.blocks[block]:
        parts = {
            s: read_tensor(stored[f"{linear.name}.{s}"]) for s in plan.format.suffixes if f"{linear.name}.{s}" in stored
        }
        model.set_weight(linear, plan.format.unpack(linear.name, parts, config).dequantize())


def fingerprint(
    job: Job, plan: Plan, sources: dict[str, str], dtype: torch.dtype, flow: Activations | None
) -> dict[str, Any]:
    """Everything the result depends on; a stopped run goes on only under the same one."""
    import transformers

    from compress import __version__

    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    return {
        "checkpoint": sources,
        "method": {"name": plan.method.name, **settings(plan.method)},
        "format": plan.format.name,
        "calibration": None if job.rows is None else {"source": job.rows.source, "sha256": job.rows.sha256},
        "layers": {"include": list(job.include), "exclude": list(job.exclude), "lm_head": job.lm_head},
        "true_sequential": job.true_sequential,
        "seed": job.seed,
        "batch_rows": None if flow is None else flow.size,
        "device": device,
        "threads": None if job.device.type == "cuda" else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
