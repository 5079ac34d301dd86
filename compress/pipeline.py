"""The flow, from top to bottom: open, calibrate, one decoder block at a time, write, verify, evaluate.

compress_checkpoint() is the whole system in one function; what it calls are the rooms of the house.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from compress import hidden
from compress import plan as planning
from compress.ahead import Begun, Outbox
from compress.asking import ask
from compress.blocks import BlockModel
from compress.checkpoint import Checkpoint
from compress.early import Early
from compress.errors import CompressError
from compress.evaluate.perplexity import evaluate
from compress.evaluate.texts import sizes_of
from compress.flows import SLACK, Flows, start_flows
from compress.formats import FORMATS
from compress.hidden import Activations
from compress.hub import push
from compress.job import Clock, Job, Progress, Result, Status
from compress.journal import Journal, check_output
from compress.lane import Here, Lane, lane_to
from compress.output import assemble, config_of, room_needed, written_once
from compress.plan import Plan
from compress.report import finish
from compress.solve import Block, close_blocks, compress_block, survey_model, window
from compress.types import moved
from compress.verify import Proof, Seen, verify
from compress.weights import Weights
from compress.writer import write_text


def open_model(job: Job, pickle_cache: Path | None = None) -> tuple[Weights, BlockModel]:
    """The source checkpoint and its model on the meta device.

    Args:
        pickle_cache: where pickled weights are rewritten; without it they cannot be read, and nothing is written.

    Raises:
        CompressError: input that cannot be used.
    """
    weights = Weights(open_dense(job.source, job.allow_pickle, pickle_cache))
    probe = BlockModel(weights, torch.float32, job.device, job.trust_remote_code, job.low_memory)
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


def make_plan(job: Job, model: BlockModel) -> Plan:
    """What the job will do with this model. Raises CompressError for what cannot be done."""
    return planning.make_plan(
        model, job.recipe, FORMATS[job.format], job.include, job.exclude, job.blocks, job.lm_head, job.target,
        job.fallback,
    )  # fmt: skip


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
    plan = make_plan(job, model)
    planning.check_room(job.out, room_needed(job.out, plan.format, plan.bytes_after))
    if plan.needs.past and job.true_sequential:
        what = "the original's inputs are compared before anything in the block is compressed"
        raise CompressError(what, "--correct-past --true-sequential", "leave one of them out")
    if plan.needs and job.rows is None:
        raise CompressError(
            f"{plan.recipe.name} needs calibration data", "--calib", "pass --calib bundled or a text file"
        )

    with (
        Journal(job.out, job.overwrite, job.source) as journal,
        Begun(weights.checkpoint.fingerprint, clock.beside, "hash") as sources,
        Early(
            config_of(plan.format, plan.quantization_config(), weights.checkpoint), job.device, clock.beside
        ) as early,
    ):
        earlier = {} if job.fresh else journal.earlier()
        flows = start_flows(model, plan, job, journal.folder, earlier.get("batch_rows"))
        with clock("hash"):
            done = journal.start(
                lambda: fingerprint(job, plan, sources.result(), model.dtype, flows.compressed), job.fresh, sources.done
            )
            if done < len(plan.blocks):  # blocks that are refined together are finished together
                done = window(model, plan, done).start
        with flows:
            try:
                room = compress_blocks(job, model, plan, flows, journal, early, done, clock, progress)
            finally:  # whatever stops the run
                with clock("hash"):
                    journal.settle()
        records, changed, notes = journal.everything(len(plan.blocks))
        with clock("write"):
            blocks = range(len(plan.blocks))
            stored = {n: s for block in blocks for n, s in journal.tensors(block, check=block < done).items()}
            files = [journal.written(block) for block in blocks]
            config = plan.quantization_config()
            hashes = assemble(journal.final, plan.format, config, weights.checkpoint, plan.owners(), stored, files)
        with clock("verify"):
            seen = early.seen()
            proof = (
                prove(job, journal.final, records, weights.checkpoint, changed, hashes, seen) if job.verify else None
            )
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
                    low_memory=job.low_memory,
                    sizes=sizes_of(job.text),
                    step=lambda d, t: progress(Status("evaluate", d, t, plan.layers, plan.layers)),
                )
        result = Result(
            job, plan, records, proof, score, original, clock.seconds, done, model.dtype, [*job.notes, *notes],
            tuple(changed), clock.seconds_beside, room,
        )  # fmt: skip
        for name, content in job.files.items():
            write_text(journal.final / name, content)
        finish(result, journal.final, hashes)
        journal.publish()
    if job.push_to is not None:
        progress(Status("upload", 0, 1, plan.layers, plan.layers))
        with clock("upload"):
            push(job.out, job.push_to, job.push_public, job.overwrite)
    return result


def compress_blocks(
    job: Job,
    model: BlockModel,
    plan: Plan,
    flows: Flows,
    journal: Journal,
    early: Early,
    done: int,
    clock: Clock,
    progress: Progress,
) -> dict[str, Any]:
    """Compress every block that is not among the first `done`, one at a time, into the journal.

    While a block is worked on, the tensors of the next one are read, and what is finished of those before is written,
    and on a GPU read back. Blocks that are refined together stay loaded until the last of them is solved.

    Returns:
        where what was kept, for the report.
    """
    total, layers, flow = len(plan.blocks), 0, flows.compressed
    waiting = place_ahead(job, plan)
    reading_back = early if reads_early(job, plan, waiting) else None
    for rows in filter(None, (flow, flows.original)):
        with clock("forward"):
            rows.enter()
    survey = survey_model(model, plan, flow, clock, waiting) if flow is not None and plan.needs.survey else {}
    needed = [block for block in range(total) if block >= done or (flow is not None and block + 1 < total)]
    opened: list[Block] = []  # solved, and not yet written
    writers = 1 if waiting.device.type == "cpu" else 2  # each holds a block on the host
    with (
        model.ahead(needed, waiting, clock.beside) as ahead,
        Outbox(lane_to(job.device), clock.beside, writers) as outbox,
    ):
        for block, linears in enumerate(plan.blocks):
            if block in needed:
                outbox.check()
                early.check()
                with clock("load"):
                    model.load(block, ahead.take(block))
                together = window(model, plan, block) if block >= done else range(block, block + 1)
                if block < done:
                    with clock("forward"):
                        if flows.original is not None and block < len(model.block_names):
                            flows.original.advance(block)
                    restore(model, journal, plan, block, flow)
                else:
                    entering = flows.entering(block, together)
                    made = compress_block(
                        model, plan, block, entering, survey, job.true_sequential, clock, outbox, job.shared,
                        flows.original,
                    )  # fmt: skip
                    opened.append(made)
                if block + 1 < together.stop:
                    with clock("forward"):
                        flows.step_inside(block, together)
                else:
                    close_blocks(model, plan, opened, flow, flows.original, clock, outbox)
                    put_away(journal, opened, flows, clock, outbox, reading_back)
                    for passed in together:
                        if flow is not None and passed + 1 < total:
                            with clock("forward"):
                                flow.advance(passed)
                    for passed in together:  # with the first the packed experts of all would go
                        model.free(passed)
            layers += len(linears)
            progress(Status("compress", block + 1, total, layers, plan.layers))
        with clock("write"):
            outbox.flush()
    room: dict[str, Any] = {"next_block": waiting.device.type, "blocks_without_room_ahead": ahead.late}
    if flow is not None:
        room |= {"hidden_states": flow.tier, "batch_rows": flow.size, "rows_at_once": flow.rows}
    return room


def put_away(
    journal: Journal, opened: list[Block], flows: Flows, clock: Clock, outbox: Outbox, early: Early | None
) -> None:
    """Let finished blocks be written, in order; the list is empty then."""
    while opened:
        made = opened.pop(0)
        made.rows, notes = flows.told()
        made.notes += notes
        with clock("write"):
            stored = partial(journal.store, made.number, made.tensors)
            outbox.put("write", stored, partial(count, journal, made, early))


def count(journal: Journal, made: Block, early: Early | None, sha256: str) -> None:
    """Let a block that was stored count. Runs in a thread, for one block after another."""
    made.seal()
    file = journal.count(made.number, sha256, made.records, made.changed, made.notes, made.rows)
    if early is not None:
        early.add(file, sha256, made.records)


def place_ahead(job: Job, plan: Plan) -> Lane:
    """Where the next block's tensors wait while one is worked on: on the device, if it has plenty of room."""
    roomy = not job.low_memory and SLACK * plan.device_bytes < hidden.free_memory(job.device)
    return lane_to(job.device) if roomy else Here()


def reads_early(job: Job, plan: Plan, waiting: Lane) -> bool:
    """Whether blocks are read back while later ones are worked on: on a GPU that has the room for it."""
    roomy = waiting.device.type != "cpu"
    return job.verify and roomy and written_once(job.out, plan.format, plan.bytes_after)


def prove(
    job: Job,
    folder: Path,
    records: list[dict[str, Any]],
    source: Checkpoint,
    changed: dict[str, str],
    hashes: dict[str, str],
    seen: Seen,
) -> Proof:
    """Read the written folder back, and load it through its client. Raises CompressError for the first difference."""
    proof = verify(folder, records, source, job.trust_remote_code, changed, hashes=hashes, device=job.device, seen=seen)
    if not job.client:
        return proof
    text = None if job.text is None else job.text.tokens
    tokens = text if job.rows is None else job.rows.tokens
    return replace(proof, clients=(ask(folder, tokens, job.device, job.trust_remote_code).line(),))


def restore(model: BlockModel, journal: Journal, plan: Plan, block: int, flow: Activations | None) -> None:
    """Give a loaded block the weights that an earlier run stored for it; as many rows go through it as did then."""
    from compress.checkpoint import read_tensor

    if flow is not None:
        flow.rows = min(flow.rows, journal.rows(block) or flow.rows)
    stored = journal.tensors(block)
    config = plan.quantization_config()
    for linear in plan.blocks[block]:
        names = {s: f"{linear.name}.{s}" for s in plan.format.suffixes}
        parts = {s: read_tensor(stored.pop(n)) for s, n in names.items() if n in stored}
        if linear.transposed and not plan.format.quantised:
            parts = {s: t.t() for s, t in parts.items()}
        model.set_packed(linear, moved(plan.format.unpack(linear.name, parts, config), model.device))
    for name, tensor in stored.items():  # what a transform changed beside the packed layers
        model.set_stored(block, name, read_tensor(tensor))


def fingerprint(
    job: Job, plan: Plan, sources: dict[str, str], dtype: torch.dtype, flow: Activations | None
) -> dict[str, Any]:
    """Everything the result depends on; a stopped run goes on only under the same one."""
    import transformers

    from compress import __version__

    device = torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu"
    return {
        "checkpoint": sources,
        "method": plan.recipe.as_json(),
        "format": plan.format.name,
        "calibration": None if job.rows is None else {"source": job.rows.source, "sha256": job.rows.sha256},
        "layers": {
            "include": list(job.include),
            "exclude": list(job.exclude),
            "lm_head": job.lm_head,
            "blocks": job.blocks,
        },
        "true_sequential": job.true_sequential,
        "seed": job.seed,
        "batch_rows": None if flow is None else flow.size,
        "device": device,
        "threads": None if job.device.type == "cuda" else torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {"compress": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
