"""The sub-commands that run no method: they read checkpoints, compare them, move them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

if TYPE_CHECKING:
    from compress.auto.asked import Ask
    from compress.options import Options

_Model = Annotated[str, typer.Argument(help="model folder, hub id, or 'bundled'")]
_Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
_Quiet = Annotated[bool, typer.Option(help="no progress line")]
_Code = Annotated[bool, typer.Option(help="run model code that comes with the checkpoint")]
_Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is one")]  # noqa: UP045

_Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--out", help="write OUT.json and OUT.md"),
]


def hidden(quiet: bool, as_json: bool) -> bool:
    """No progress line where nobody sees it move: a log would get a blank line."""
    return quiet or as_json or not sys.stderr.isatty()


def eval_command(
    models: Annotated[list[str], typer.Argument(help="model folders, hub ids, or 'bundled'", metavar="MODEL...")],
    text: Annotated[
        list[str],
        typer.Option(
            help="wikitext2, c4-new (c4), c4-old, ptb-new (ptb), ptb-old, bundled, a file, folder or hub data set; "
            "may be given several times"
        ),
    ] = ["wikitext2"],  # noqa: B006
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the original: adds KL divergence, its quantiles, top-1 agreement and flips"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="tokens a window; default: 2048, or the context if shorter")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="a window every so many tokens, each predicting those that are new to it")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="only the first so many windows of each text")] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="each layer's relative output error, and each block's; needs --against")
    ] = False,
    tasks: Annotated[
        str, typer.Option(help="hellaswag,arc_easy,...: tasks of lm-eval, or YAML files for it (extra: eval)")
    ] = "",
    cache: Annotated[float, typer.Option(help="GB for the original's states, kept for later runs; 0 keeps none")] = 0.0,
    device: _Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="keep nothing on the device that can be elsewhere")
    ] = False,
    trust_remote_code: _Code = False,
    out: _Out = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Perplexity, bits per byte and distance from the original of any checkpoints, streamed block by block.

    Several models cost one pass over the original. Perplexity is by the GPTQ papers' protocol unless --stride is given.
    """
    from compress import api
    from compress.report import evaluation, screen

    with screen.progress_line(hidden(quiet, as_json)) as progress:
        report = api.evaluate_models(
            models,
            text,
            against=against,
            window=window,
            stride=stride,
            windows=windows,
            layers=layers,
            tasks=[name for name in tasks.split(",") if name],
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            low_memory=low_memory,
            cache_gb=cache,
            progress=progress,
        )
    print(json.dumps(report, indent=2)) if as_json else evaluation.print_report(report)
    if out is not None:
        print(f"written: {', '.join(map(str, evaluation.write(out, report)))}", file=sys.stderr)


def inspect_command(model: _Model, as_json: _Json = False) -> None:
    """What a checkpoint holds: of each packed layer the kind, bits, groups, bytes and bits a weight. Any tool's."""
    from compress.api import find_model
    from compress.inventory import inventory
    from compress.report import files

    found = inventory(find_model(model))
    print(json.dumps(found.as_json(), indent=2)) if as_json else files.print_inventory(found)


def verify_command(
    model: _Model,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the original: its other tensors must be there, and each layer's distance from it is told"),
    ] = None,
    no_client: Annotated[
        bool, typer.Option("--no-client", help="do not load it through the client that reads its format")
    ] = False,
    device: _Device = None,
    trust_remote_code: _Code = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Check a checkpoint: sha256 of its files, every packed layer, every parameter, and what its client makes of it."""
    from compress import api
    from compress.examine import examine
    from compress.job import Status
    from compress.report import files, screen

    folder = api.find_model(model)
    original = None if against is None else api.find_model(against)
    with screen.progress_line(hidden(quiet, as_json)) as progress:
        lines = examine(
            folder,
            original,
            client=not no_client,
            device=api.find_device(device),
            trust_remote_code=trust_remote_code,
            step=lambda done, total: progress(Status("verify", done, total)),
        )
    print(json.dumps({"checked": lines}, indent=2)) if as_json else files.print_checks(str(folder), lines)


def export_command(
    model: _Model,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, gptq_v2, bitsandbytes, gguf, native, dense")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="output folder; default: MODEL-FORMAT here"),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="go on where the other format rounds or drops something")
    ] = False,
    target: Annotated[Optional[str], typer.Option(help="the client that must load the result")] = None,  # noqa: UP045
    no_verify: Annotated[bool, typer.Option("--no-verify", help="do not read the result back")] = False,
    no_client: Annotated[
        bool, typer.Option("--no-client", help="do not load it through the client that reads its format")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an existing output")] = False,
    device: _Device = None,
    trust_remote_code: _Code = False,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """Move a packed checkpoint to another format: the same codes and scales; what would be lost is said first."""
    from compress import api
    from compress.export import export
    from compress.job import Status
    from compress.report import files, screen

    folder = api.find_model(model)
    with screen.progress_line(hidden(quiet, as_json)) as progress:
        done = export(
            folder,
            out or Path(f"{folder.name}-{format}"),
            format,
            lossy=lossy,
            target=target,
            overwrite=overwrite,
            check=not no_verify,
            client=not no_client,
            device=api.find_device(device),
            trust_remote_code=trust_remote_code,
            step=lambda done, total: progress(Status("export", done, total)),
        )
    print(json.dumps(done.as_json(), indent=2)) if as_json else files.print_export(done)


def report_command(
    folders: Annotated[
        list[Path], typer.Argument(help="folders that compress wrote; files of `compress eval` that end in .json")
    ],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="the page; OUT.json and OUT.md are written beside it")
    ] = Path("report.html"),
    evaluated: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option("--eval", help="a file of `compress eval`: figures with intervals (repeatable)"),
    ] = None,
    against: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(help="the original's folder, where the record's own name does not lead to it (repeatable)"),
    ] = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
) -> None:
    """One HTML page that needs nothing else, of one run or several compared; the same facts as JSON and Markdown."""
    import shlex

    from compress.job import Status
    from compress.report import html, screen

    command = shlex.join(["compress", *sys.argv[1:]])
    with screen.progress_line(hidden(quiet, as_json)) as progress:
        files = html.write(
            folders,
            out,
            evaluated or (),
            against or (),
            command,
            lambda done, total: progress(Status("read", done, total)),
        )
    if as_json:
        print(files[1].read_text(encoding="utf-8"), end="")
    else:
        print(f"written: {', '.join(map(str, files))}")


def auto_command(model: str, ask: Ask, options: Options, dry_run: bool, as_json: bool, quiet: bool) -> None:
    """What `compress auto` does with its settings (cli.py makes its signature from them)."""
    import torch

    from compress.auto import run, words
    from compress.bench import tables
    from compress.errors import CompressError, Interrupted
    from compress.report import screen

    try:
        with screen.progress_line(hidden(quiet, as_json)) as progress:
            outcome = run.auto(model, ask, options, dry_run, progress)
    except KeyboardInterrupt:
        remedy = "give the same command again to go on"
        raise Interrupted("stopped; blocks that were measured or written are kept", "", remedy) from None
    except torch.OutOfMemoryError as error:
        what = f"out of memory ({str(error).partition('. ')[0]})"
        remedy = "what was measured is kept: free some of it, or use --low-memory or --device cpu"
        raise CompressError(what, f"--device {options.device or 'cuda'}", remedy) from error
    if as_json:
        print(json.dumps(words.as_json(outcome), indent=2))
        return
    tables.show(words.tables(outcome), words.notes(outcome) if dry_run else [])
    if outcome.result is not None:
        screen.print_result(outcome.result)
    print(f"measurements are kept in {outcome.measured}")


def doctor_command(as_json: _Json = False) -> None:
    """What this machine has: versions, GPUs, which kernels are used and if not why, optional packages, free space."""
    from compress.doctor import examine
    from compress.report import machine

    found = examine()
    print(json.dumps(found, indent=2)) if as_json else machine.print_machine(found)


_Gpu = Annotated[str, typer.Option(help="cuda, cuda:1")]
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
    out: _Out = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
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
    out: _Out = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
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


_Anywhere = Annotated[str, typer.Option(help="cuda, cuda:1; cpu for a try with small shapes")]


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
    out: _Out = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
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
    methods: Annotated[str, typer.Option(help="gptq-fast (no search, refit or descent),gptq,rtn,nf4,absmax")] = "all",
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
    out: _Out = None,
    as_json: _Json = False,
    quiet: _Quiet = False,
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
