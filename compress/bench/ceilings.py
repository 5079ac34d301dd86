"""What a card can do at most, measured in the run: copying, reading so many bytes, dense products.

The time of reading is no straight line through 0: of every launch some microseconds do not shrink with the size. So the
floor under a kernel is the time in which a kernel that does nothing else reads as many bytes, interpolated between
sizes, or the time of its arithmetic at the rate of a large dense product, whichever is longer.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.bench import timing
from compress.cuda.compiler import function, launch
from compress.cuda.source import Kernel

#: bytes
SIZES = tuple(round(x * 1e6) for x in (0.25, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000))
#: threads of a block, blocks a multiprocessor, loads of a thread at once
_SHAPES = [(t, b, u) for t, b in ((256, 4), (256, 8), (512, 2), (512, 4), (1024, 1), (1024, 2)) for u in (4, 8)]
_DENSE = 8192


@dataclass(frozen=True)
class Ceilings:
    """What was measured.

    Attributes:
        copy: GB/s of a device copy, bytes read and written counted.
        reads: (bytes, microseconds), sizes rising, at least two.
        rates: of dense products in 10^12 operations a second, by operand ("fp16", "int8").
    """

    copy: float
    reads: tuple[tuple[int, float], ...]
    rates: dict[str, float]

    def read(self, size: float) -> float:
        """Microseconds to read so many bytes; beyond what was measured on the line of the two nearest sizes."""
        sizes = [s for s, _ in self.reads]
        i = min(max(bisect.bisect(sizes, size), 1), len(sizes) - 1)
        (x0, y0), (x1, y1) = self.reads[i - 1 : i + 1]
        return max(y0 + (y1 - y0) * (size - x0) / (x1 - x0), 0.0)

    def floor(self, size: float, operations: float, operand: str = "fp16") -> float:
        """Microseconds that no kernel goes below: of reading `size` bytes or of the operations."""
        rate = self.rates.get(operand, self.rates["fp16"])
        return max(self.read(size), operations / rate / 1e6)

    def as_json(self) -> dict[str, Any]:
        reads = [{"bytes": s, "us": round(us, 3), "gbps": round(s / us / 1e3, 1)} for s, us in self.reads]
        return {"copy_gbps": round(self.copy, 1), "reads": reads, "tera_per_second": self.rates}


def measure(device: int) -> Ceilings:
    """All of them, in about ten seconds; takes 2 GB of the device's memory, less where there is less."""
    free, _ = torch.cuda.mem_get_info(device)
    room = min(SIZES[-1], free // 4) // 16 * 16
    buffer = torch.randint(-(2**31), 2**31, (room // 4,), dtype=torch.int32, device=f"cuda:{device}")
    reads = tuple((size, _read(buffer, size)) for size in SIZES if size <= room)
    copy = 2 * room / timing.graph([functools.partial(torch.empty_like(buffer).copy_, buffer)]) / 1e3
    del buffer
    return Ceilings(copy, reads, _rates(device))


def _read(buffer: Tensor, size: int) -> float:
    """Microseconds of the best of some shapes of launch, through all of the buffer by turns."""
    device = buffer.get_device()
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    sink = torch.zeros(1, dtype=torch.int32, device=buffer.device)
    places = range(buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes - size + 1, -(-size // 256) * 256)

    def run(place: int, threads: int, blocks: int, unroll: int) -> None:
        compiled = function(Kernel("read_through", "read.cu", (("UNROLL", unroll),)), device)
        grid = min(sms * blocks, -(-size // (16 * threads * unroll)))
        launch(compiled, (grid,), (threads,), (place, size // 16, sink), 0, buffer)

    some = places[: timing.copies(size, device, most=len(places))]
    return min(timing.graph([functools.partial(run, p, *shape) for p in some]) for shape in _SHAPES)


def _rates(device: int) -> dict[str, float]:
    """Of short bursts: a long one is held back by the card's power limit. Without those that the card cannot do."""
    on = f"cuda:{device}"
    half = [torch.randn(_DENSE, _DENSE, dtype=torch.float16, device=on) for _ in range(2)]
    byte = [(h * 40).to(torch.int8) for h in half]
    rates = {"fp16": _rate(lambda: torch.mm(half[0], half[1].t()))}
    with contextlib.suppress(RuntimeError):  # a card or a torch without it
        rates["int8"] = _rate(lambda: torch._int_mm(byte[0], byte[1].t()))
    return rates


def _rate(product: Callable[[], Tensor]) -> float:
    return round(2.0 * _DENSE**3 / timing.graph([product]) / 1e6, 1)
