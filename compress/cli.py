"""The command line: one sub-command a pass, its options derived from the pass's fields.

The commands that run no method are in commands/; no other file imports typer. A sub-command is built when it is
called for, so that `compress --help` imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import shlex
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, Optional

import typer
from typer.core import TyperGroup

from compress.commands import bench, checkpoints, choosing, talk
from compress.commands.shared import hidden
from compress.errors import CompressError, Interrupted
from compress.options import Options
from compress.passes import known, load

if TYPE_CHECKING:
    from compress.recipe import Recipe
    from compress.types import Pass, Transform

_OTHER = {
    "auto": "mixed precision: bits and groups for each layer, so that the model stays nearest at a given size",
    "sweep": "many methods, bits and group sizes: all made, all measured, the front, and which one to take",
    "run": "the steps of a recipe (YAML): mixed bits, prune then quantise, rescale then quantise",
    "methods": "every method: its paper, and which formats can hold its result",
    "eval": "perplexity and distance from the original of any checkpoints, dense or packed, and tasks",
    "inspect": "what a checkpoint holds, layer by layer: kind, bits, groups, bytes",
    "verify": "check a checkpoint: files, layers, parameters, and what its client makes of it",
    "export": "move a packed checkpoint to another format without rounding again",
    "rotate": "fold rotations that spread outliers into a model's weights: an ordinary checkpoint to quantise",
    "tune": "let a packed checkpoint's scales and norm gains learn the original's predictions, end to end",
    "generate": "what a model makes of a prompt, and the original's words beside it",
    "chat": "a conversation with a model, and the original's answers beside it",
    "report": "one page of one run or several: plots, tables, warnings, commands; HTML, JSON and Markdown",
    "doctor": "what this machine has: GPUs, kernels and why not, optional packages, free memory and disk",
    "bench": "speed on this GPU: kernels and solvers beside others', tokens a second, whole runs",
    "demo": "the whole job on a small model that comes with the package: no hub, no GPU, a minute",
}


#: what typer raises for a command line it cannot read; it exports only this class's heir
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
#: errors of the machine that its user can mend
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENAMETOOLONG}


class LazyGroup(TyperGroup):
    """Lists every command from plain tables; builds the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [*known(), *_OTHER]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in known() or cmd_name in _OTHER:
            return _build(cmd_name) if ctx.meta.get("compress.building") else _stub(cmd_name)
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta["compress.building"] = True
        return super().resolve_command(ctx, args)


def _stub(name: str) -> Any:
    """A command with a name and a help line only, for the list."""
    summary = _OTHER[name] if name in _OTHER else known()[name].summary
    small = typer.Typer(add_completion=False)
    small.command(name=name, help=summary)(lambda: None)
    return typer.main.get_command(small)


def _build(name: str) -> Any:
    if name == "bench":
        return _bench()
    small = typer.Typer(add_completion=False, rich_markup_mode=None)
    functions: dict[str, Callable[..., None]] = {
        "eval": checkpoints.eval_command,
        "inspect": checkpoints.inspect_command,
        "verify": checkpoints.verify_command,
        "export": checkpoints.export_command,
        "report": choosing.report_command,
        "doctor": checkpoints.doctor_command,
        "demo": demo_command,
        "methods": methods_command,
        "generate": talk.generate_command,
        "chat": talk.chat_command,
    }
    made = {
        "run": run_command,
        "auto": auto_command,
        "sweep": sweep_command,
        "rotate": rotate_command,
        "tune": tune_command,
    }
    function = functions.get(name) or (made[name]() if name in made else pass_command(name))
    small.command(name=name, help=inspect.getdoc(function))(function)
    return typer.main.get_command(small)


def _bench() -> Any:
    """Its own commands."""
    group = typer.Typer(name="bench", add_completion=False, rich_markup_mode=None, help=_OTHER["bench"])
    found: dict[str, Callable[..., None]] = {
        "kernels": bench.bench_kernels_command,
        "decode": bench.bench_decode_command,
        "solver": bench.bench_solver_command,
        "quantise": bench.bench_quantise_command,
    }
    for name, function in found.items():
        group.command(name=name, help=inspect.getdoc(function))(function)
    return typer.main.get_command(group)


app = typer.Typer(
    cls=LazyGroup,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Compress language models after training: quantise, evaluate, write checkpoints that other tools load.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from compress import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", help="print the version and stop", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """An eager option works without a command."""


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """A typer option from a dataclass field."""
    meta = field.metadata
    flag = "--" + field.name.replace("_", "-")
    names = list(meta.get("flags") or ())
    if not names:
        off = meta.get("off") or ("no-" + flag[2:] if field.default is True else None)
        names = [f"{flag}/--{off}"] if off else [flag]
    default: Any = field.default
    if typing.get_origin(hint) is tuple:
        hint, default = list[str], []
    if isinstance(hint, types.UnionType):  # typer wants Optional[...] spelled out
        hint = Optional[next(a for a in typing.get_args(hint) if a is not types.NoneType)]  # noqa: UP045
    annotation = Annotated[hint, typer.Option(*names, help=meta.get("help", ""))]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameters(settings: type[Any]) -> list[inspect.Parameter]:
    hints = typing.get_type_hints(settings)
    return [_parameter(f, hints[f.name]) for f in dataclasses.fields(settings)]


def _take(settings: type[Any], given: dict[str, Any]) -> dict[str, Any]:
    """The values of a dataclass's fields out of a command's arguments."""
    names = {f.name for f in dataclasses.fields(settings)}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in names}


_MODEL = inspect.Parameter(
    "model",
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
    annotation=Annotated[str, typer.Argument(help="model folder, hub id, or 'bundled'")],
)
_SWITCHES = [
    inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, typer.Option(flag, help=text)]
    )
    for name, flag, text in (
        ("dry_run", "--dry-run", "say what would be done, from config.json and shard headers alone"),
        ("as_json", "--json", "print one JSON object instead of tables"),
        ("quiet", "--quiet", "no progress line"),
    )
]


def pass_command(name: str) -> Callable[..., None]:
    """The function behind `compress NAME MODEL`, its signature made from the pass and from Options."""
    method = load(name)

    def command(model: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
        _run(model, method(**_take(method, given)), Options(**_take(Options, given)), dry_run, as_json, quiet)

    return _dressed(command, [_MODEL, *_parameters(method), *_parameters(Options), *_SWITCHES], inspect.getdoc(method))


def run_command() -> Callable[..., None]:
    """The function behind `compress run RECIPE MODEL`."""

    def command(recipe: Path, model: str, show: bool, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
        from compress.recipe import read_recipe

        steps = read_recipe(recipe)
        _run(model, steps, Options(**_take(Options, given)), dry_run or show, as_json, quiet)

    first = inspect.Parameter(
        "recipe",
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        annotation=Annotated[Path, typer.Argument(help="a YAML file with a list of steps")],
    )
    text = "print the resolved plan: which step takes which layers, sizes, what is left dense (same as --dry-run)"
    show = inspect.Parameter(
        "show",
        inspect.Parameter.KEYWORD_ONLY,
        default=False,
        annotation=Annotated[bool, typer.Option("--show", help=text)],
    )
    return _dressed(
        command,
        [first, _MODEL, *_parameters(Options), show, *_SWITCHES],
        "The steps of a recipe in order. Options given here go before the recipe's own.",
    )


def auto_command() -> Callable[..., None]:
    """The function behind `compress auto MODEL`, its signature made from Ask and from Options."""
    from compress.auto.asked import Ask

    def command(model: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
        ask, options = Ask(**_take(Ask, given)), Options(**_take(Options, given))
        choosing.auto_command(model, ask, options, dry_run, as_json, quiet)

    text = "Mixed precision: bits and group size for each layer, so that the model stays nearest at a given size."
    more = (
        "With --dry-run it measures and chooses, and writes no checkpoint; what it measured is kept for other budgets."
    )
    return _dressed(command, [_MODEL, *_parameters(Ask), *_parameters(Options), *_SWITCHES], f"{text}\n\n{more}")


def sweep_command() -> Callable[..., None]:
    """The function behind `compress sweep MODEL`, its signature made from Ask and from Options."""
    from compress.sweep.asked import Ask

    def command(model: str, as_json: bool, quiet: bool, **given: Any) -> None:
        ask, options = Ask(**_take(Ask, given)), Options(**_take(Options, given))
        choosing.sweep_command(model, ask, options, as_json, quiet)

    text = "Every combination of methods, bits and group sizes, each measured against the original; a front, a choice."
    more = "Given again after a stop it goes on. OUT holds a folder a setting, sweep.json and sweep.md."
    return _dressed(command, [_MODEL, *_parameters(Ask), *_parameters(Options), *_SWITCHES[1:]], f"{text}\n\n{more}")


def rotate_command() -> Callable[..., None]:
    """The function behind `compress rotate MODEL`, its signature made from Rotation."""
    from compress.rotation.asked import Rotation

    def command(model: str, **given: Any) -> None:
        taken = _take(Rotation, given)
        checkpoints.rotate(model, Rotation(**taken), **{k: v for k, v in given.items() if k not in taken})

    text = "Fold rotations that spread outliers into the weights (QuaRot; SpinQuant's R1 and R2): the same function."
    more = (
        "The result is an ordinary dense checkpoint: quantise it like any other. GPTQ and quantised activations gain "
        "by it; round-to-nearest weights alone can lose. Models whose function would change are refused."
    )
    rest = [p for p in inspect.signature(checkpoints.rotate).parameters.values() if p.name not in ("model", "settings")]
    hints = typing.get_type_hints(checkpoints.rotate, localns={"Rotation": Rotation}, include_extras=True)
    rest = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in rest]
    return _dressed(command, [_MODEL, *_parameters(Rotation), *rest], f"{text}\n\n{more}")


def tune_command() -> Callable[..., None]:
    """The function behind `compress tune MODEL`, its signature made from Tuning."""
    from compress.tuning.asked import Tuning

    def command(model: str, **given: Any) -> None:
        taken = _take(Tuning, given)
        checkpoints.tune(model, Tuning(**taken), **{k: v for k, v in given.items() if k not in taken})

    text = "Tune the scales and norm gains of a packed checkpoint to the original's predictions; every code stays."
    more = (
        "Both models are on the device whole. What held-out rows do not confirm is not kept; the result has the same "
        "format. It gains most at 2 and 3 bits."
    )
    rest = [p for p in inspect.signature(checkpoints.tune).parameters.values() if p.name not in ("model", "settings")]
    hints = typing.get_type_hints(checkpoints.tune, localns={"Tuning": Tuning}, include_extras=True)
    rest = [p.replace(annotation=hints[p.name], kind=inspect.Parameter.KEYWORD_ONLY) for p in rest]
    return _dressed(command, [_MODEL, *_parameters(Tuning), *rest], f"{text}\n\n{more}")


def _dressed(
    command: Callable[..., None], parameters: list[inspect.Parameter], text: str | None
) -> Callable[..., None]:
    """The function with the signature and help that typer reads."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = text
    return command


def methods_command(as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False) -> None:
    """Every method: one line, its paper, and the formats that can hold its result at its default settings."""
    from compress.report import screen

    found = screen.methods()
    print(json.dumps(found, indent=2)) if as_json else screen.print_methods(found)


def _run(
    model: str, method: Pass | Transform | Recipe, options: Options, dry_run: bool, as_json: bool, quiet: bool
) -> None:
    import torch

    from compress import api
    from compress.pipeline import compress_checkpoint
    from compress.report import screen

    if dry_run:
        plan = screen.dry_run(api.make_job(model, method, options, dry=True))
        print(json.dumps(plan, indent=2)) if as_json else screen.print_plan(plan)
        return
    job = None
    try:
        job = api.make_job(model, method, options)
        with screen.progress_line(hidden(quiet, as_json)) as progress:
            result = compress_checkpoint(job, progress)
    except KeyboardInterrupt:
        raise _interrupted(None if job is None else job.out) from None
    except torch.OutOfMemoryError as error:
        what = f"out of memory ({str(error).partition('. ')[0]})"
        less = "--device cpu" if options.low_memory else "--low-memory"
        remedy = f"finished blocks are kept: free some of it and give the same command again, or use {less}"
        raise CompressError(what, f"--device {options.device or 'cuda'}", remedy) from error
    if as_json:
        print(json.dumps(screen.as_json(result), indent=2))
    else:
        screen.print_result(result)
        if job.push_to is not None:
            print(f"uploaded to {job.push_to}")


def _interrupted(out: Path | None) -> Interrupted:
    """What Ctrl-C left behind, and the command that goes on."""
    command = shlex.join(["compress", *sys.argv[1:]])
    partial = None if out is None else out.with_name(out.name + ".partial")
    done = 0 if partial is None else len(list(partial.glob("block-*.json")))
    what = f"stopped; {done} finished blocks are kept" if done else "stopped before a block was finished"
    return Interrupted(what, str(partial or ""), f"to go on, type: {command}")


def demo_command(
    model: Annotated[
        str, typer.Option(help="bundled, or smollm2: SmolLM2-135M-Instruct from a published package")
    ] = "bundled",
    bits: Annotated[int, typer.Option(help="bits a weight")] = 4,
    out: Annotated[Path, typer.Option("-o", "--out", help="output folder")] = Path("demo-out"),
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on with a stopped run")] = False,
    quiet: Annotated[bool, typer.Option(help="no progress line")] = False,
) -> None:
    """The whole job, end to end: calibrate, GPTQ, write, verify, evaluate. No hub, no GPU, about a minute."""
    from compress.passes.gptq import GPTQ

    if model == "smollm2":
        from compress.smollm2 import fetch

        source, samples, seq_len = str(fetch()), 32, 512
    elif model == "bundled":
        source, samples, seq_len = "bundled", 128, 256
    else:
        raise CompressError(f"no demo model {model!r}", "--model", "use bundled or smollm2")
    options = Options(
        out=out, calib="bundled", eval="bundled", samples=samples, seq_len=seq_len, overwrite=True, fresh=fresh
    )
    _run(source, GPTQ(bits=bits), options, dry_run=False, as_json=False, quiet=quiet)


def main() -> None:
    """Entry point: errors a user can mend take one line on stderr and exit code 2; Ctrl-C exits with 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # large tensors of a CPU in huge pages, where the system lets a program ask: half the time of RTN was page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        code = app(prog_name="compress", standalone_mode=False)
    except Interrupted as stopped:
        _fail(stopped.line(), 130)
    except CompressError as error:
        _fail(f"error: {error.line()}", 2)
    except _UsageError as error:
        if len(sys.argv) == 1:  # the error's message is the whole help
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        context = getattr(error, "ctx", None)
        path = "compress" if context is None else context.command_path
        _fail(f"error: {path}: {error.format_message()}; {path} --help lists what there is", 2)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = error.filename or "writing"
        _fail(f"error: {where}: {error.strerror}; mend that and give the same command again", 2)
    if code == 130:  # typer turns a KeyboardInterrupt into this code
        _fail("stopped", 130)
    sys.exit(code or 0)


def _fail(line: str, code: int) -> NoReturn:
    print(" ".join(line.splitlines()), file=sys.stderr)
    sys.exit(code)
