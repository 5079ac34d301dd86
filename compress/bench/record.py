"""What stands beside every figure: the machine, versions, the command and the date; and the files of a report."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from compress import __version__
from compress.cuda import support
from compress.errors import CompressError
from compress.writer import write_json, write_text

SCHEMA = 1
_PACKAGES = (
    "numpy", "transformers", "triton", "bitsandbytes", "safetensors", "llmcompressor", "compressed-tensors",
    "gptqmodel",
)  # fmt: skip
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


def place(name: str) -> int | None:
    """`find_device`, or None for "cpu". Raises CompressError."""
    return None if name == "cpu" else find_device(name)


def on(device: int | None) -> contextlib.AbstractContextManager[Any]:
    """Within, this is torch's current CUDA device; None: as it is."""
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)


def machine(device: int | None) -> dict[str, Any]:
    """The card and what drives it; None: the host alone."""
    if device is None:
        return {"device": _cpu(), **host()}
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
        **host(),
    }


def host() -> dict[str, int]:
    """Its size."""
    return {"cores": os.cpu_count() or 1, "host_memory": psutil.virtual_memory().total}


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        told = ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _smi(uuid: str) -> dict[str, str]:
    """Limits and clocks, where nvidia-smi tells them."""
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_ASKED.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_ASKED, (value.strip() for value in said.strip().split(",")), strict=False))


def versions(device: int | None) -> dict[str, str]:
    """Of everything that a figure depends on."""
    own = {"compress": __version__, "python": platform.python_version(), "torch": torch.__version__}
    if device is None:
        return own | _installed()
    known = support.probe(device)
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


def head(device: int | None) -> dict[str, Any]:
    """The start of a report; None: of a run on the CPU."""
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
    parts = [card["device"]]
    if "sms" in card:
        parts += [f"{card['sms']} multiprocessors", f"{card['l2'] / 1e6:.0f} MB L2", f"{card['memory'] / 1e9:.0f} GB"]
        parts += [f"driver {card['driver'] or card['driver_cuda']}"]
    parts += [f"{k.replace('_', ' ')} {card[k]}" for k in _ASKED if k in card]
    if "cores" in card:
        parts += [f"{card['cores']} CPU cores", f"{card['host_memory'] / 1e9:.0f} GB of host memory"]
    return [
        f"`{report['command']}`, {report['date']}.",
        f"Machine: {', '.join(parts)}.",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in used.items()) + ".",
    ]


def write(out: Path, report: dict[str, Any], text: str) -> list[Path]:
    """OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_name(out.name + suffix) for suffix in (".json", ".md")]
    write_json(files[0], report)
    write_text(files[1], text)
    return files
