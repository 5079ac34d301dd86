"""The commands that compare results and choose among settings: `compress report`, `compress auto`, `compress sweep`."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from compress.commands.shared import Json, Quiet, hidden

if TYPE_CHECKING:
    from compress.auto.asked import Ask as AutoAsk
    from compress.options import Options
    from compress.sweep.asked import Ask as SweepAsk


def report_command(
    folders: Annotated[
        list[Path],
        typer.Argument(help="folders that compress wrote, a sweep's too; files of `compress eval` that end in .json"),
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
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """One HTML page that needs nothing else, of one run or several compared; the same facts as JSON and Markdown."""

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


def auto_command(model: str, ask: AutoAsk, options: Options, dry_run: bool, as_json: bool, quiet: bool) -> None:
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


def sweep_command(model: str, ask: SweepAsk, options: Options, as_json: bool, quiet: bool) -> None:
    """What `compress sweep` does with its settings (cli.py makes its signature from them)."""
    from compress.errors import Interrupted
    from compress.report import screen
    from compress.report import sweep as report
    from compress.sweep.run import run

    sweep = ask.sweep(model, options)
    try:
        with screen.progress_line(hidden(quiet, as_json)) as progress:
            found = run(sweep, lambda line: None if as_json else print(line, file=sys.stderr), progress)
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is finished is kept", "", "give the same command again to go on") from None
    if as_json:
        print(json.dumps(found, indent=2))
        return
    report.print_report(found)
    files = f"{sweep.out / 'sweep.json'}, {sweep.out / 'sweep.md'}"
    print(f"written: {files}; a page of it: compress report {shlex.quote(str(sweep.out))}")
