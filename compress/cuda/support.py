"""Whether GPU kernels can run on this machine, and if not, the one thing that is missing."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import logging
import re
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.fast import switched_off

#: compute capability of Ampere: bfloat16 tensor cores, cp.async
OLDEST = (8, 0)
#: the first driver of each CUDA version that torch is built for
_DRIVERS = {12: "525", 13: "580"}
_SHARED_OPTIN = 97  # cudaDevAttrMaxSharedMemoryPerBlockOptin
_LOG = logging.getLogger("compress.cuda")
_told: set[str] = set()


@dataclass(frozen=True)
class Support:
    """What was found; an empty text or 0 where it was not looked for, since something before it is missing.

    Attributes:
        usable: kernels can be compiled and launched.
        reason: on one line, what is missing and what to do; empty if usable.
        device: CUDA's index; -1 without a device.
        name: of the device.
        capability: (major, minor).
        memory: bytes.
        shared: bytes of shared memory that a block can have if it asks (opt-in).
        driver: the newest CUDA version that the driver runs, "13.0".
        cuda: that torch was built for, "13.0".
        cupy: version.
        nvrtc: version of the compiler that CuPy found, "13.0".
    """

    usable: bool
    reason: str
    device: int = -1
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    memory: int = 0
    shared: int = 0
    driver: str = ""
    cuda: str = ""
    cupy: str = ""
    nvrtc: str = ""


class _Missing(Exception):
    """Why not; caught here."""


def probe(device: int | None = None) -> Support:
    """What the device can do. Looked up once a device and process, but for COMPRESS_KERNELS; raises nothing.

    Args:
        device: CUDA's index; default: the current one.
    """
    found = _probe(device)
    if switched_off():
        return replace(found, usable=False, reason="COMPRESS_KERNELS=0 switches them off; unset it")
    return found


def preload() -> None:
    """Import CuPy, half a second to a second, unless kernels are switched off. For a thread, which `probe` is not: it
    changes the process's filters of warnings for a moment. It meets what keeps CuPy from being imported, and tells."""
    if not switched_off():
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module("cupy")


def why_not_once(support: Support) -> None:
    """Warn on one line that a CUDA tensor goes without kernels; once a process and reason."""
    if not support.usable and support.reason not in _told:
        _told.add(support.reason)
        _LOG.warning("GPU kernels are not used: %s", support.reason)


def cuda_devices() -> int:
    """How many CUDA devices torch sees. Quiet where torch would warn of its driver: `probe` says it better."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def driver_version() -> int:
    """The newest CUDA version that the NVIDIA driver runs, 1000 major + 10 minor; 0 without a driver."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    version = ctypes.c_int(0)
    try:
        ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return 0
    return version.value


def driver_cuda() -> str:
    """`driver_version` as text, "13.0"; empty without a driver."""
    return _dotted(driver_version())


def driver_name() -> str:
    """The driver's own version on Linux, "580.159.04"; empty where it is not told."""
    try:
        told = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    number = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", told)
    return number[0] if number else ""


def _probe(device: int | None) -> Support:
    if device is None:
        try:
            device = torch.cuda.current_device() if cuda_devices() else -1
        except RuntimeError:  # CUDA does not start; _look meets that again and tells it
            device = 0
    return _look(device)


@functools.cache
def _look(device: int) -> Support:
    """Each step fills in more; the first that fails says why."""
    known: dict[str, Any] = {}
    try:
        _torch(known, device)
        _cupy(known)
    except _Missing as missing:
        return Support(False, str(missing), **known)
    except Exception as error:  # others' code in a state not foreseen: no reason to end a run that has slow twins
        line = (str(error).strip().splitlines() or [""])[0]
        remedy = "compress doctor --json shows the versions: please report it"
        return Support(False, f"{type(error).__name__} while looking for a GPU: {line}; {remedy}", **known)
    return Support(True, "", **known)


def _torch(known: dict[str, Any], device: int) -> None:
    if torch.version.cuda is None:
        build = f"for ROCm {torch.version.hip}" if torch.version.hip else "without CUDA"
        remedy = "install a CUDA build (https://pytorch.org/get-started/locally)"
        raise _Missing(f"torch {torch.__version__} was built {build}; {remedy}")
    known["cuda"] = torch.version.cuda
    major = _major(known)
    count = cuda_devices()
    driver = driver_version()
    known["driver"] = _dotted(driver)
    if not count:
        newest = f"NVIDIA driver {_DRIVERS[major]} or newer" if major in _DRIVERS else "a newer NVIDIA driver"
        if not driver:
            raise _Missing(f"no NVIDIA driver was found; on a machine with an NVIDIA GPU install {newest}")
        if driver // 1000 < major:
            what = f"the NVIDIA driver runs CUDA {known['driver']} at most and torch was built for {known['cuda']}"
            raise _Missing(f"{what}; install {newest}, or torch for CUDA {driver // 1000}")
        raise _Missing("no CUDA device is visible; see nvidia-smi and CUDA_VISIBLE_DEVICES")
    if not 0 <= device < count:
        raise _Missing(f"there is no CUDA device {device}; there are {count}, counted from 0")
    properties = torch.cuda.get_device_properties(device)
    known |= {
        "device": device,
        "name": properties.name,
        "capability": (properties.major, properties.minor),
        "memory": properties.total_memory,
    }
    if known["capability"] < OLDEST:
        what = "{} has compute capability {}.{}, the kernels need {}.{} (Ampere) or newer"
        raise _Missing(what.format(properties.name, *known["capability"], *OLDEST) + "; use a newer GPU")


def _cupy(known: dict[str, Any]) -> None:
    major = _major(known)
    install = f"pip install 'compress-llm[cuda{major}]'"
    try:
        import cupy
        from cupy.cuda import nvrtc, runtime
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "cupy":
            raise
        raise _Missing(f"CuPy is not installed; {install}") from error
    except (ImportError, OSError) as error:  # a damaged installation; a cache folder that cannot be made
        line = (str(error).strip().splitlines() or [""])[0]
        raise _Missing(f"CuPy cannot be imported ({line}); {install}, or set CUPY_CACHE_DIR") from error
    known["cupy"] = cupy.__version__
    built = runtime.runtimeGetVersion() // 1000
    if built != major:
        what = f"CuPy {cupy.__version__} is for CUDA {built}, torch for CUDA {known['cuda']}"
        raise _Missing(f"{what}; pip uninstall cupy-cuda{built}x, then {install}")
    suffix = "" if major >= 13 else f"-cu{major}"
    try:
        known["nvrtc"] = "{}.{}".format(*nvrtc.getVersion())
    except (RuntimeError, ImportError, OSError) as error:
        raise _Missing(f"CuPy does not find the compiler NVRTC; pip install nvidia-cuda-nvrtc{suffix}") from error
    if not _headers():
        what = "CuPy does not find CUDA's headers, without which it compiles nothing"
        raise _Missing(f"{what}; pip install nvidia-cuda-runtime{suffix}, or set CUDA_PATH")
    known["shared"] = runtime.deviceGetAttribute(_SHARED_OPTIN, known["device"])


def _headers() -> bool:
    """CuPy 14 raises where it finds none, though ours include none; older ones do not ask cuda.pathfinder."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError:
        return True
    return find_nvidia_header_directory("cudart") is not None


def _major(known: dict[str, Any]) -> int:
    return int(str(known["cuda"]).partition(".")[0])


def _dotted(version: int) -> str:
    """13000 -> "13.0"."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""
