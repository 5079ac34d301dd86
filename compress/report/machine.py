"""What a person sees of the machine."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_GB = 1e9


def print_machine(found: dict[str, Any]) -> None:
    """Two tables: what is there, with what is missing for GPU kernels; then the optional packages.

    Args:
        found: doctor.examine().
    """
    console = Console(markup=False, highlight=False)  # "compress-llm[data]" is no markup
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, value in _rows(found):
        table.add_row(what, value)
    console.print(table)
    packages = Table(title="optional packages", box=None, title_justify="left")
    for heading in ("package", "version", "for"):
        packages.add_column(heading, overflow="fold")
    for package in found["packages"]:
        absent = f"absent; {package['install']}"
        packages.add_row(package["name"], package["version"] or absent, package["what"])
    console.print(packages)


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("compress", found["compress"]),
        ("Python", f"{found['python']}, {found['platform']}"),
        ("torch", found["torch"]),
        ("its CUDA", found["torch_cuda"] or "none"),
        ("driver", _driver(found)),
    ]
    for gpu in found["gpus"]:
        rows.append((f"GPU {gpu['device']}", f"{gpu['name']}, {gpu['capability']}, {_size(gpu['memory'])}"))
    cpu, kernels = found["cpu"], found["gpu_kernels"]
    rows += [
        ("CuPy", found["cupy"] or "absent"),
        ("NVRTC", found["nvrtc"] or "absent"),
        ("GPU kernels", "used" if kernels["used"] else f"not used: {kernels['why_not']}"),
    ]
    for gpu in found["gpus"]:
        if gpu["kernels"] != kernels["used"]:
            rows.append(("", f"GPU {gpu['device']}: {gpu['why_not'] or 'used'}"))
    rows += [
        ("CPU", f"{cpu['capability']}, {cpu['threads']} threads"),
        ("CPU kernels", "used" if cpu["kernels"] else f"not used: {cpu['why_not']}"),
        ("memory", f"{_size(found['memory']['free'])} free of {_size(found['memory']['total'])}"),
    ]
    for cache in found["caches"]:
        free = "no such disk" if cache["free"] is None else f"{_size(cache['free'])} free"
        rows.append((cache["what"], f"{cache['folder']}, {free}"))
    return rows


def _driver(found: dict[str, Any]) -> str:
    if found["driver_cuda"] is None:
        return "no NVIDIA driver"
    return f"{found['driver'] or 'version unknown'}, runs CUDA {found['driver_cuda']}"


def _size(count: int) -> str:
    return f"{count / _GB:.1f} GB"
