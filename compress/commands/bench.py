"""`compress bench`: the speed of this GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from compress.commands.shared import Json, Out, Quiet

_Gpu = Annotated[str, typer.Option(help="cuda, cuda:1")]
_Anywhere = Annotated[str, typer.Option(help="cuda, cuda:1; cpu for a try with small shapes")]
_Half = Annotated[str, typer.Option(help="float16 or bfloat16")]


def bench_kernels_command(
    kinds: Annotated[str, typer.Option(help="of layers: w4,w3,w2,w8,nf4,spqr,...")] = "all",
    tokens: Annotated[str, typer.Option(help="how many inputs at once")] = "1,8,16,32,64,256,2048",
    shapes: Annotated[
        str, typer.Option(help="out_features x in_features")
    ] = "4096x4096,11008x4096,4096x11008,8192x8192,28672x8192,8192x28672",
    group: Annotated[int, typer.Option(help="columns of a group, of integer grids; -1: the whole row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="integer grids have zero points")] = False,
    dtype: _Half = "float16",
    tune: Annotated[
        bool, typer.Option("--tune", help="find the fastest launch shapes first, and keep them for this user")
    ] = False,
    no_others: Annotated[bool, typer.Option("--no-others", help="our kernels only")] = False,
    device: _Gpu = "cuda",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Our kernels beside the card's ceilings and other libraries. Exits with 1 where a result is wrong."""
    from compress.bench import arguments, kernels, record, tables
    from compress.bench.cases import CASES

    plan = kernels.Plan(
        kinds=arguments.names(kinds, CASES, "--kinds"),
        shapes=arguments.shapes(shapes, "--shapes"),
        tokens=arguments.counts(tokens, "--tokens"),
        dtype=arguments.names(dtype, ("float16", "bfloat16"), "--dtype")[0],
        group=arguments.group(group, "--group"),
        asymmetric=asymmetric,
        others=not no_others,
        tune=tune,
        device=record.find_device(device),
    )
    report = kernels.run(plan, _teller(quiet))
    made = tables.kernels(report), tables.kernels_notes(report)
    _report("Kernels", report, *made, out, as_json)


def bench_decode_command(
    methods: Annotated[str, typer.Option(help="dense, and kinds of layers: dense,w4,w3,nf4,...")] = "all",
    batch: Annotated[str, typer.Option(help="sequences at once")] = "1,16",
    layers: Annotated[int, typer.Option(min=1, help="decoder blocks; fewer for a quick look")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="tokens before the clock runs")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="tokens while it runs")] = 128,
    dtype: _Half = "float16",
    eager: Annotated[bool, typer.Option("--eager", help="no torch.compile: slower")] = False,
    device: _Gpu = "cuda",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tokens a second of a random Llama-2-7B, greedy, its linear layers packed. Exits with 1 where one fails."""
    from compress.bench import arguments, decode, llama, record, tables
    from compress.bench.cases import CASES

    plan = decode.Plan(
        methods=arguments.names(methods, (decode.DENSE, *CASES), "--methods"),
        batches=arguments.counts(batch, "--batch"),
        model=llama.Model(layers=layers),
        prompt=prompt,
        steps=steps,
        eager=eager,
        dtype=arguments.names(dtype, ("float16", "bfloat16"), "--dtype")[0],
        device=record.find_device(device),
    )
    report = decode.run(plan, _teller(quiet))
    made = tables.decode(report), tables.decode_notes(report)
    _report("Decoding", report, *made, out, as_json)


def bench_solver_command(
    methods: Annotated[str, typer.Option(help="gptq,gptq-search,sparsegpt,spqr")] = "all",
    shapes: Annotated[str, typer.Option(help="out_features x in_features")] = "4096x4096,11008x4096,4096x11008",
    bits: Annotated[int, typer.Option(min=2, max=8, help="of GPTQ's grids")] = 4,
    group: Annotated[int, typer.Option(help="columns of a group, of GPTQ's grids; -1: the whole row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="GPTQ's grids have zero points")] = False,
    tokens: Annotated[int, typer.Option(min=1, help="of calibration; Hessians are timed on 16384 of them")] = 262144,
    dtype: _Half = "float16",
    tf32: Annotated[bool, typer.Option("--tf32", help="products of the loops in TF32")] = False,
    runs: Annotated[int, typer.Option(min=1, help="of which the median counts")] = 5,
    no_others: Annotated[bool, typer.Option("--no-others", help="our solvers only")] = False,
    device: _Anywhere = "cuda",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What GPTQ and its kin take for a layer, stage by stage, and a block of Llama-2-7B, beside other tools.

    Exits with 1 where a result is not that of the same loops in Python.
    """
    from compress.bench import arguments, record, solver, solver_tables
    from compress.bench.stages import METHODS

    plan = solver.Plan(
        methods=arguments.names(methods, METHODS, "--methods"),
        shapes=arguments.shapes(shapes, "--shapes"),
        device=record.place(device),
        bits=bits,
        group=arguments.group(group, "--group"),
        asymmetric=asymmetric,
        tokens=tokens,
        dtype=arguments.names(dtype, ("float16", "bfloat16"), "--dtype")[0],
        tf32=tf32,
        others=not no_others,
        runs=runs,
    )
    report = solver.run(plan, _teller(quiet))
    _report("Solvers", report, solver_tables.tables(report), solver_tables.notes(report), out, as_json)


def bench_quantise_command(
    model: Annotated[
        str, typer.Option(help="llama-2-7b, llama-3-8b, llama-3-70b, smollm2-135m or tiny")
    ] = "llama-2-7b",
    blocks: Annotated[
        str, typer.Option(help="decoder blocks, 2,4: a model each, carried on to all; default: all")
    ] = "",
    methods: Annotated[str, typer.Option(help="gptq-fast (the loop alone),gptq,gptq-best,rtn,nf4,absmax")] = "all",
    bits: Annotated[int, typer.Option(min=2, max=8, help="of integer grids")] = 4,
    group: Annotated[int | None, typer.Option(help="columns of a group; default: 128, 64 or 32 if it divides")] = None,
    samples: Annotated[int, typer.Option(min=1, help="calibration rows")] = 128,
    seq_len: Annotated[int, typer.Option(min=1, help="tokens a row")] = 2048,
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="run what calibrates once more with low memory")
    ] = False,
    cold: Annotated[bool, typer.Option("--cold", help="drop files from the system's cache before each run")] = False,
    peers: Annotated[bool, typer.Option("--peers", help="llm-compressor and GPTQModel too, where installed")] = False,
    work: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder for the model and the results, which are deleted; default: the system's"),
    ] = None,
    device: _Anywhere = "cuda",
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Seconds and memory of whole runs on random weights in a published shape. Exits with 1 where one fails."""
    from compress.bench import arguments, models, once, quantise, quantise_tables, record

    plan = quantise.Plan(
        model=arguments.names(model, models.MODELS, "--model")[0],
        blocks=arguments.counts(blocks, "--blocks") if blocks else (),
        methods=arguments.names(methods, once.METHODS, "--methods"),
        device=record.place(device),
        bits=bits,
        group=group,
        samples=samples,
        seq_len=seq_len,
        low_memory=low_memory,
        cold=cold,
        peers=peers,
        work=work,
    )
    report = quantise.run(plan, _teller(quiet))
    _report("Whole runs", report, quantise_tables.tables(report), quantise_tables.notes(report), out, as_json)


def _teller(quiet: bool) -> Callable[[str], None]:
    """Lines of progress on stderr, in a log too: a run takes minutes."""
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def _report(
    title: str, report: dict[str, Any], made: Sequence[Any], notes: Sequence[str], out: Path | None, as_json: bool
) -> None:
    """Print it, write it, and exit with 1 where a row of it failed."""
    from compress.bench import record, tables

    if as_json:
        print(json.dumps(report, indent=2))
    else:
        tables.show(made, notes)
    if out is not None:
        files = record.write(out, report, tables.markdown(title, report, made, notes))
        print(f"written: {', '.join(map(str, files))}", file=sys.stderr)
    if report["failed"] or report["missing"]:
        raise typer.Exit(1)
