"""The commands that read checkpoints, compare them, move them, and look at the machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from compress.commands.shared import Code, Device, Json, Model, NoClient, NoVerify, Out, Overwrite, Quiet, hidden

if TYPE_CHECKING:
    from compress.rotation.asked import Rotation
    from compress.tuning.asked import Tuning


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
    device: Device = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="keep nothing on the device that can be elsewhere")
    ] = False,
    trust_remote_code: Code = False,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
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


def inspect_command(model: Model, as_json: Json = False) -> None:
    """What a checkpoint holds: of each packed layer the kind, bits, groups, bytes and bits a weight. Any tool's."""
    from compress.api import find_model
    from compress.inventory import inventory
    from compress.report import files

    found = inventory(find_model(model))
    print(json.dumps(found.as_json(), indent=2)) if as_json else files.print_inventory(found)


def verify_command(
    model: Model,
    against: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="the original: its other tensors must be there, and each layer's distance from it is told"),
    ] = None,
    no_client: NoClient = False,
    device: Device = None,
    trust_remote_code: Code = False,
    as_json: Json = False,
    quiet: Quiet = False,
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
    model: Model,
    format: Annotated[str, typer.Option(help="compressed-tensors, gptq, gptq_v2, bitsandbytes, gguf, native, dense")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="output folder; default: MODEL-FORMAT here"),
    ] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="go on where the other format rounds or drops something")
    ] = False,
    target: Annotated[Optional[str], typer.Option(help="the client that must load the result")] = None,  # noqa: UP045
    no_verify: NoVerify = False,
    no_client: NoClient = False,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Code = False,
    as_json: Json = False,
    quiet: Quiet = False,
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


def rotate(
    model: str,
    settings: Rotation,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="output folder; default: MODEL-rotated here"),
    ] = None,
    no_verify: NoVerify = False,
    no_client: NoClient = False,
    overwrite: Overwrite = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of going on with a stopped run")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="read pytorch_model.bin through torch's weights-only unpickler")
    ] = False,
    device: Device = None,
    trust_remote_code: Code = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What `compress rotate` does with its settings (cli.py makes its signature from both)."""
    from compress import api
    from compress.job import Status
    from compress.report import files, screen
    from compress.rotation import rotate as rotating

    folder = api.find_model(model)
    with screen.progress_line(hidden(quiet, as_json)) as progress:
        done = rotating.rotate(
            folder,
            out or Path(f"{folder.name}-rotated"),
            settings,
            overwrite=overwrite,
            fresh=fresh,
            check=not no_verify,
            client=not no_client,
            device=api.find_device(device),
            trust_remote_code=trust_remote_code,
            allow_pickle=allow_pickle,
            step=lambda done, total: progress(Status("rotate", done, total)),
        )
    print(json.dumps(done.as_json(), indent=2)) if as_json else files.print_rotated(done)


def tune(
    model: str,
    settings: Tuning,
    against: Annotated[str, typer.Option("--against", help="the original: folder, hub id, or 'bundled'")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("-o", "--out", help="output folder; default: MODEL-tuned here"),
    ] = None,
    calib: Annotated[str, typer.Option("--calib", help="calibration data, as for a pass")] = "pile",
    calib_column: Annotated[Optional[str], typer.Option("--calib-column", help="text column of a data set")] = None,  # noqa: UP045
    samples: Annotated[int, typer.Option("--samples", help="calibration rows")] = 128,
    seq_len: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--seq-len", help="tokens a row; default: 2048, or the model's context if shorter"),
    ] = None,
    dtype: Annotated[
        str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16: what both compute in")
    ] = "auto",
    no_verify: NoVerify = False,
    no_client: NoClient = False,
    overwrite: Overwrite = False,
    device: Device = None,
    trust_remote_code: Code = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What `compress tune` does with its settings (cli.py makes its signature from both)."""
    from compress import api
    from compress.job import Status
    from compress.options import Options
    from compress.report import files, screen
    from compress.tuning import tune as tuning

    folder, original = api.find_model(model), api.find_model(against)
    asked = Options(
        calib=calib, calib_column=calib_column, samples=samples, seq_len=seq_len, seed=settings.seed, dtype=dtype,
        device=device, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    with screen.progress_line(hidden(quiet, as_json)) as progress:
        done = tuning.run(
            folder,
            original,
            asked,
            out or Path(f"{folder.name}-tuned"),
            settings,
            overwrite=overwrite,
            check=not no_verify,
            client=not no_client,
            step=lambda done, total: progress(Status("tune", done, total)),
        )
    print(json.dumps(done.as_json(), indent=2)) if as_json else files.print_tuned(done)


def doctor_command(as_json: Json = False) -> None:
    """What this machine has: versions, GPUs, which kernels are used and if not why, optional packages, free space."""
    from compress.doctor import examine
    from compress.report import machine

    found = examine()
    print(json.dumps(found, indent=2)) if as_json else machine.print_machine(found)
