"""One run of a method on a model's folder, in a process of its own: its memory is its own, and a crash is a row."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.bench.quantisers import TOOLS
from compress.bench.stages import Setting, best_gptq, default_gptq, fast_gptq
from compress.errors import CompressError
from compress.passes.absmax import Absmax
from compress.passes.nf4 import NF4
from compress.passes.rtn import RTN
from compress.types import Pass

_START = "from compress.bench import once; once.answer()"
_DTYPE = torch.bfloat16  # of the checkpoints
_LIBRARIES = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama", "compress.pipeline")


@dataclass(frozen=True)
class Request:
    """What a run is told.

    Attributes:
        source, out: folders.
        method: of `METHODS`, or a tool's name.
        bits, group: of integer grids.
        samples, seq_len, vocabulary: of the calibration rows, random token ids below the last.
        device: "cpu", "cuda:0".
        low_memory: nothing stays on the device that can be elsewhere.
    """

    source: str
    out: str
    method: str
    bits: int
    group: int
    samples: int
    seq_len: int
    vocabulary: int
    device: str
    low_memory: bool = False

    @property
    def setting(self) -> Setting:
        return Setting(self.bits, self.group, dtype=_DTYPE)

    def rows(self) -> Tensor:
        """int64 [samples, seq_len], the same each time."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (self.samples, self.seq_len), generator=generator)


METHODS: dict[str, Callable[[Setting], Pass]] = {
    "gptq-fast": fast_gptq,
    "gptq": default_gptq,
    "gptq-best": best_gptq,
    "rtn": lambda setting: RTN(setting.bits, setting.group),
    "nf4": lambda setting: NF4(),
    "absmax": lambda setting: Absmax(),
}
#: those that only read and write
FREE = ("rtn", "nf4", "absmax")


def apart(request: Request, answer: Path) -> dict[str, Any]:
    """`run` in a new process, with the seconds from its start to its end; "failed" and the reason where it failed.

    Args:
        answer: a file for what it answers.
    """
    begun = time.perf_counter()
    path = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _START, json.dumps(asdict(request)), str(answer)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    found: dict[str, Any] = {"process_seconds": round(time.perf_counter() - begun, 3)}
    if done.returncode == 0 and answer.exists():
        said: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return found | said
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return found | {"failed": lines[-1][:300] if lines else f"it ended with {done.returncode}"}


def answer() -> None:
    """The process: takes the request and the file from the command line. What others print goes to stderr."""
    request = Request(**json.loads(sys.argv[1]))
    with contextlib.redirect_stdout(sys.stderr):
        try:
            found = run(request)
        except CompressError as error:
            found = {"failed": str(error)}
        except torch.OutOfMemoryError:
            found = {"failed": "out of memory"}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def run(request: Request) -> dict[str, Any]:
    """Compress it, and tell what that took. The clock starts when libraries are loaded and the device is awake."""
    import psutil

    from compress.report import peak_device_bytes, peak_host_bytes

    device, source, out = torch.device(request.device), Path(request.source), Path(request.out)
    tool = next((t for t in TOOLS if t.name == request.method), None)
    for module in _LIBRARIES if tool is None else (*_LIBRARIES, tool.package):
        import_module(module)
    torch.zeros(1, device=device)
    rows = request.rows()
    blocks: list[float] = []
    before = time.time() - psutil.Process().create_time()
    begun = time.perf_counter()
    if tool is None:
        found = _ours(request, rows, device, lambda: blocks.append(time.perf_counter() - begun))
    else:
        tool.run(source, rows, out, request.setting, device)
        found = {}
    return found | {
        "failed": "",
        "seconds": round(time.perf_counter() - begun, 3),
        "before_seconds": round(before, 3),
        "blocks_done": [round(t, 3) for t in blocks],
        "peak_device_bytes": peak_device_bytes(device),
        "reserved_device_bytes": torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0,
        "peak_host_bytes": peak_host_bytes(),
        "bytes_out": sum(f.stat().st_size for f in out.iterdir() if f.is_file()),
    }


def _ours(request: Request, rows: Tensor, device: torch.device, tick: Callable[[], None]) -> dict[str, Any]:
    """By compress' own API, to a checkpoint that was read back; without a client, and no text to evaluate on.

    Args:
        tick: called when a block is done.
    """
    from compress.api import wake
    from compress.calibration import Rows
    from compress.clients import pick
    from compress.job import Job, Status
    from compress.pipeline import compress_checkpoint
    from compress.recipe import Recipe

    def progress(status: Status) -> None:
        if status.phase == "compress":
            tick()

    wake(device)
    recipe = Recipe.of(METHODS[request.method](request.setting))
    sha256 = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    job = Job(
        source=Path(request.source), out=Path(request.out), recipe=recipe,
        format=pick("auto", [p.storage for p in recipe.passes]),
        rows=Rows(rows, "random token ids", (), sha256) if recipe.needs else None,
        device=device, low_memory=request.low_memory, client=False, fallback=True, origin="random weights",
    )  # fmt: skip
    result = compress_checkpoint(job, progress)
    assert result.proof is not None
    return {
        "phases": {part: round(took, 3) for part, took in result.seconds.items()},
        "beside": {part: round(took, 3) for part, took in result.beside.items()},
        "room": result.room,
        "format": result.plan.format.name,
        "layers": result.plan.layers,
        "verified": result.proof.layers,
    }
