"""Arguments and options that several commands have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

Model = Annotated[str, typer.Argument(help="model folder, hub id, or 'bundled'")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Quiet = Annotated[bool, typer.Option(help="no progress line")]
Code = Annotated[bool, typer.Option(help="run model code that comes with the checkpoint")]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1; default: cuda if there is one")]  # noqa: UP045

NoVerify = Annotated[bool, typer.Option("--no-verify", help="do not read the result back")]
NoClient = Annotated[bool, typer.Option("--no-client", help="do not load it through the client that reads its format")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace an existing output")]

Out = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("-o", "--out", help="write OUT.json and OUT.md"),
]


def hidden(quiet: bool, as_json: bool) -> bool:
    """No progress line where nobody sees it move: a log would get a blank line."""
    return quiet or as_json or not sys.stderr.isatty()
