"""What this machine has, for `compress doctor`: versions, devices, kernels, optional packages, free memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from compress import __version__, cpu, fast, smollm2
from compress.cuda import support

#: distribution -> what it is for, and how to get it
OPTIONAL = {
    "datasets": ("text from the hub, .parquet and .jsonl files", "compress-llm[data]"),
    "compressed-tensors": ("transformers loads compressed-tensors output", "compress-llm[clients]"),
    "accelerate": ("transformers loads our output onto a device", "compress-llm[clients]"),
    "gguf": ("writing GGUF files; compress demo --model smollm2", "compress-llm[gguf]"),
    "bitsandbytes": ("transformers loads bitsandbytes output", "bitsandbytes"),
    "gptqmodel": ("transformers loads gptq output", "gptqmodel"),
    "optimum": ("transformers loads gptq output", "optimum"),
    "lm-eval": ("task accuracy: compress eval --tasks", "compress-llm[eval]"),
}
_CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
_NVRTC = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


def examine() -> dict[str, Any]:
    """Everything, ready for JSON: sizes in bytes, None for what is not there."""
    devices = [support.probe(i) for i in range(support.cuda_devices())]
    first = next((d for d in devices if d.usable), devices[0] if devices else support.probe())
    return {
        "compress": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "driver": support.driver_name() or None,
        "driver_cuda": support.driver_cuda() or None,
        "gpus": [_device(d) for d in devices],
        "cupy": _installed(*_CUPY),
        "nvrtc": first.nvrtc or _installed(*_NVRTC),
        "gpu_kernels": {"used": first.usable, "why_not": first.reason},
        "cpu": _cpu(),
        "packages": [
            {"name": name, "version": _version(name), "what": what, "install": f"pip install '{extra}'"}
            for name, (what, extra) in OPTIONAL.items()
        ],
        "memory": {"free": psutil.virtual_memory().available, "total": psutil.virtual_memory().total},
        "caches": [_cache(*cache) for cache in _caches()],
    }


def _device(found: support.Support) -> dict[str, Any]:
    return {
        "device": found.device,
        "name": found.name,
        "capability": "{}.{}".format(*found.capability),
        "memory": found.memory,
        "kernels": found.usable,
        "why_not": found.reason,
    }


def _cpu() -> dict[str, Any]:
    capability = torch.backends.cpu.get_cpu_capability()
    why_not = "" if cpu.enabled() else "COMPRESS_KERNELS=0" if fast.switched_off() else "the CPU has no AVX2"
    return {"threads": torch.get_num_threads(), "capability": capability, "kernels": cpu.enabled(), "why_not": why_not}


def _caches() -> list[tuple[str, Path]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    kernels = os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache"
    return [
        ("models from the hub", Path(HF_HUB_CACHE)),
        ("compress' own", smollm2.cache_folder()),
        ("compiled kernels", Path(kernels)),
    ]


def _cache(what: str, folder: Path) -> dict[str, Any]:
    """With the free bytes of the disk it is on, or would be."""
    there = next((f for f in (folder, *folder.absolute().parents) if f.exists()), None)
    return {"what": what, "folder": str(folder), "free": None if there is None else shutil.disk_usage(there).free}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _installed(*names: str) -> str | None:
    """ "cupy-cuda13x 14.2.0": the first of the distributions that is installed."""
    return next((f"{name} {version}" for name in names if (version := _version(name)) is not None), None)
