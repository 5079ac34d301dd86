"""What stands beside every figure: the machine, versions, the command and the date; and the files of a report."""

from __future__ import annotations

import datetime
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from compress import __version__
from compress.checkpoint import write_json, write_text
from compress.cuda import support
from compress.errors import CompressError

SCHEMA = 1
_PACKAGES = ("numpy", "transformers", "triton", "bitsandbytes")
_ASKED = {"power_limit": "power.limit", "sm_clock_most": "clocks.max.sm", "memory_clock": "clocks.mem"}


def find_device(name: str) -> int:
    """The index of a CUDA device on which kernels run.

    Raises:
        CompressError: it is none, or something is missing, with the remedy.
    """
    kind, _, index = name.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise CompressError(f"no CUDA device {name!r}", "--device", "use cuda or cuda:1: kernels run on NVIDIA GPUs")
    found = support.probe(int(index or 0))
    if not found.usable:
        what, _, remedy = found.reason.partition("; ")
        raise CompressError(what, f"--device {name}", remedy)
    return found.device


def machine(device: int) -> dict[str, Any]:
    """The card and what drives it."""
    found, known = torch.cuda.get_device_properties(device), support.probe(device)
    return {
        "device": found.name,
        "capability": [found.major, found.minor],
        "sms": found.multi_processor_count,
        "memory": found.total_memory,
        "l2": found.L2_cache_size,
        "driver": support.driver_name(),
        "driver_cuda": known.driver,
        **_smi(str(found.uuid)),
    }


def _smi(uuid: str) -> dict[str, str]:
    """Limits and clocks, where nvidia-smi tells them."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED, (value.strip() for value in said.strip().split(",")), strict=False))


def versions(device: int) -> dict[str, str]:
    """Of everything that a figure depends on."""
    known = support.probe(device)
    own = {"compress": __version__, "python": platform.python_version(), "torch": torch.__version__}
    return own | {"cuda": known.cuda, "cupy": known.cupy, "nvrtc": known.nvrtc} | _installed()


def _installed() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def today() -> str:
    return datetime.date.today().isoformat()


def head(device: int) -> dict[str, Any]:
    """The start of a report."""
    return {
        "schema": SCHEMA,
        "command": shlex.join(["compress", *sys.argv[1:]]),
        "date": today(),
        "machine": machine(device),
        "versions": versions(device),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """`head` for a reader: Markdown."""
    card, used = report["machine"], report["versions"]
    more = ", ".join(f"{k.replace('_', ' ')} {card[k]}" for k in _ASKED if k in card)
    return [
        f"`{report['command']}`, {report['date']}.",
        f"Machine: {card['device']}, {card['sms']} multiprocessors, {card['l2'] / 1e6:.0f} MB L2, "
        f"{card['memory'] / 1e9:.0f} GB, driver {card['driver'] or card['driver_cuda']}{', ' if more else ''}{more}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in used.items()) + ".",
    ]


def write(out: Path, report: dict[str, Any], text: str) -> list[Path]:
    """OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_name(out.name + suffix) for suffix in (".json", ".md")]
    write_json(files[0], report)
    write_text(files[1], text)
    return files
