"""Other libraries' products of the same shapes, timed in the same run: a line of `PEERS` each.

A peer that is not installed, does not run on this card or does not take a shape is told with the reason and stops
nothing. Each is checked as ours are, against float32 on the weights that it has, before it is timed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.bench import timing
from compress.bench.cases import patterned
from compress.bench.checks import coarseness, difference, poisoned
from compress.bench.layers import Setting, Shape, codes, uniform

_STD = 0.05
_TINY_GROUP, _TINY_TILES = 128, 8
_OUTLIERS = 8  # columns planted for LLM.int8


@dataclass(frozen=True)
class Ready:
    """A peer with its weights.

    Attributes:
        runs: multiply x, one for each copy of the weights.
        reference: the product in float32.
        input: makes x for so many tokens.
        prepare: called with x once before it is timed.
    """

    runs: Sequence[Callable[[Tensor], Tensor]]
    reference: Callable[[Tensor], Tensor]
    input: Callable[[int], Tensor]
    prepare: Callable[[Tensor], None] = lambda x: None


@dataclass(frozen=True)
class Peer:
    """A library.

    Attributes:
        name: on tables.
        kinds: of ours, to which it is compared; empty for all.
        make: with random weights of a shape.
        limit: the largest relative error that is rounding, with float16.
        absent: why it cannot run on the machine; "" if it can.
        fewest: tokens that it takes.
        eager: timed as a host drives it, since it cannot be captured in a graph.
    """

    name: str
    kinds: tuple[str, ...]
    make: Callable[[Shape, Setting], Ready]
    limit: float
    absent: Callable[[], str] = lambda: ""
    fewest: int = 1
    eager: bool = False

    @property
    def timing(self) -> str:
        return "driven by the host" if self.eager else "graph replay"


@dataclass
class Found:
    """What a peer took.

    Attributes:
        us: microseconds by tokens.
        error: relative error by tokens.
        why_not: by tokens, why there is no time; 0: for all.
    """

    us: dict[int, float] = field(default_factory=dict)
    error: dict[int, float] = field(default_factory=dict)
    why_not: dict[int, str] = field(default_factory=dict)


def wanted(kinds: Iterable[str]) -> list[Peer]:
    """The peers of some kinds."""
    every = set(kinds)
    return [p for p in PEERS if not p.kinds or every & set(p.kinds)]


def measure(peer: Peer, shape: Shape, tokens: Sequence[int], setting: Setting) -> Found:
    """Times of a shape, and why there are none."""
    found = Found()
    reason = peer.absent()
    if reason:
        found.why_not[0] = reason
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ready = peer.make(shape, setting)
        except Exception as error:  # others' code: whatever it refuses is its own row
            found.why_not[0] = first_line(error)
            return found
        for count in (n for n in tokens if n >= peer.fewest):
            try:
                _one(peer, ready, count, peer.limit * coarseness(setting.dtype), found)
            except Exception as error:
                found.why_not[count] = first_line(error)
    return found


def _one(peer: Peer, ready: Ready, tokens: int, limit: float, found: Found) -> None:
    x = ready.input(tokens)
    ready.prepare(x)
    with poisoned():
        out = ready.runs[0](x)
    found.error[tokens] = error = difference(out, ready.reference(x))
    if not error <= limit:
        found.why_not[tokens] = f"wrong result: relative error {error:.1e}"
        return
    calls = [partial(run, x) for run in ready.runs]
    found.us[tokens] = timing.eager(calls) if peer.eager else timing.graph(calls)


def first_line(error: Exception) -> str:
    """Of its message, with its type."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"


def _many(make: Callable[[], Callable[[Tensor], Tensor]], size: int) -> list[Callable[[Tensor], Tensor]]:
    """As many as must take turns so that none of `size` bytes is found in the cache."""
    return [make() for _ in range(timing.copies(size, torch.cuda.current_device()))]


def _inputs(shape: Shape, setting: Setting) -> Callable[[int], Tensor]:
    return lambda tokens: setting.normal(tokens, shape[1])


# --- torch's own ----------------------------------------------------------------------------------------------------


def dense(shape: Shape, setting: Setting) -> Ready:
    """F.linear, which is cuBLAS."""
    weight = setting.normal(*shape, std=_STD)
    whole = weight.float()

    def one() -> Callable[[Tensor], Tensor]:
        mine = weight.clone()
        return lambda x: F.linear(x, mine)

    return Ready(_many(one, weight.nbytes), lambda x: x.float() @ whole.t(), _inputs(shape, setting))


def tinygemm(shape: Shape, setting: Setting) -> Ready:
    """torch's 4-bit product in bfloat16: weight = scale (code - 8) + zero, groups of 128."""
    rows, columns = shape
    plain = codes(16, shape, setting)
    step = _STD / (16 / 12**0.5)
    scales = uniform(0.5 * step, 1.5 * step, (rows, columns // _TINY_GROUP), setting).bfloat16()
    whole = (plain.float() - 8) * scales.float().repeat_interleave(_TINY_GROUP, 1)
    both = torch.ops.aten._convert_weight_to_int4pack(plain[:, ::2] << 4 | plain[:, 1::2], _TINY_TILES)
    statistics = torch.stack([scales.t(), torch.zeros_like(scales).t()], -1).contiguous()  # [groups, rows, 2]

    def one() -> Callable[[Tensor], Tensor]:
        mine, own = both.clone(), statistics.clone()

        def run(x: Tensor) -> Tensor:
            out: Tensor = torch.ops.aten._weight_int4pack_mm(x, mine, _TINY_GROUP, own)
            return out

        return run

    return Ready(
        _many(one, both.nbytes + statistics.nbytes),
        lambda x: x.float() @ whole.t(),
        _inputs(shape, replace(setting, dtype=torch.bfloat16)),
    )


def int_mm(shape: Shape, setting: Setting) -> Ready:
    """The 8-bit product alone: both sides quantised already, 32-bit integers come out."""
    weight = codes(255, shape, setting).to(torch.int16).sub_(127).to(torch.int8)
    whole = weight.float()

    def one() -> Callable[[Tensor], Tensor]:
        mine = weight.clone()
        return lambda x: torch._int_mm(x, mine.t())

    def make(tokens: int) -> Tensor:
        return codes(255, (tokens, shape[1]), setting).to(torch.int16).sub_(127).to(torch.int8)

    return Ready(_many(one, weight.nbytes), lambda x: x.float() @ whole.t(), make)


def cusparselt(shape: Shape, setting: Setting) -> Ready:
    """2:4 with the algorithm that cuSPARSELt's search finds for the number of tokens, or its default one if that is
    quicker. Tokens are filled up to a multiple of 8 before the clock runs."""
    weight = setting.normal(*shape, std=_STD).masked_fill_(~patterned(shape, setting), 0)
    whole, packed = weight.float(), torch._cslt_compress(weight)
    chosen = [0]

    def product(x: Tensor, mine: Tensor, algorithm: int) -> Tensor:
        return torch._cslt_sparse_mm(mine, x.t(), alg_id=algorithm).t()  # left as it lies, to its advantage

    def prepare(x: Tensor) -> None:
        from compress.cuda import cusparselt

        searched = cusparselt.search(packed, x.t())
        both = dict.fromkeys((searched, 0))
        chosen[0] = min(both, key=lambda a: timing.graph([partial(run, x, a) for run in mine]))

    def one() -> Callable[..., Tensor]:
        own = packed.clone()
        return lambda x, algorithm: product(x, own, algorithm)

    mine: list[Callable[..., Tensor]] = [one() for _ in range(timing.copies(packed.nbytes, packed.get_device()))]
    fill = _inputs(shape, setting)

    def chosen_one(run: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: run(x, chosen[0])

    return Ready(
        [chosen_one(run) for run in mine],
        lambda x: x.float() @ whole.t(),
        lambda tokens: fill(-(-tokens // 8) * 8),
        prepare,
    )


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


def bnb_nf4(shape: Shape, setting: Setting) -> Ready:
    """NF4, blocks of 64: `matmul_4bit`, and for one token `gemv_4bit` if that is quicker."""
    bitsandbytes: Any = import_module("bitsandbytes")
    functional = bitsandbytes.functional
    packed, state = functional.quantize_4bit(setting.normal(*shape, std=_STD), blocksize=64, quant_type="nf4")
    whole = functional.dequantize_4bit(packed, state).float()
    gemv = [False]

    def one() -> Callable[[Tensor], Tensor]:
        mine, own = packed.clone(), copy.copy(state)
        own.absmax = state.absmax.clone()

        def run(x: Tensor) -> Tensor:
            if gemv[0]:
                few: Tensor = functional.gemv_4bit(x, mine.t(), state=own)
                return few
            out: Tensor = bitsandbytes.matmul_4bit(x, mine.t(), quant_state=own)
            return out

        return run

    runs = _many(one, packed.nbytes + state.absmax.nbytes)

    def prepare(x: Tensor) -> None:
        gemv[0] = False
        if len(x) == 1:
            slow = timing.graph([partial(run, x) for run in runs])
            gemv[0] = True
            gemv[0] = timing.graph([partial(run, x) for run in runs]) < slow

    return Ready(runs, lambda x: x.float() @ whole.t(), _inputs(shape, setting), prepare)


def bnb_int8(shape: Shape, setting: Setting) -> Ready:
    """LLM.int8: `Linear8bitLt` with threshold 6 and 8 columns above it. It waits for the host, so one copy will do."""
    bitsandbytes: Any = import_module("bitsandbytes")
    half = replace(setting, dtype=torch.float16)
    weight = half.normal(*shape, std=_STD)
    layer = bitsandbytes.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = bitsandbytes.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    layer = layer.to(setting.device).eval()
    whole, make = weight.float(), _inputs(shape, half)

    def planted(tokens: int) -> Tensor:
        x = make(tokens)
        x[:, :: shape[1] // _OUTLIERS] = 20.0
        return x

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            out: Tensor = layer(x)
        return out

    return Ready([run], lambda x: x.float() @ whole.t(), planted)


def _no_bitsandbytes() -> str:
    return "" if find_spec("bitsandbytes") is not None else "bitsandbytes is not installed"


def _no_cusparselt() -> str:
    return "" if torch.backends.cusparselt.is_available() else "this torch has no cuSPARSELt"


#: the first is what ratios on every table are to
PEERS: tuple[Peer, ...] = (
    Peer("cuBLAS 16-bit", (), dense, 1e-3),
    Peer("tinygemm", ("w4",), tinygemm, 1e-2),
    Peer("torch._int_mm", ("int8", "w8a8"), int_mm, 1e-4, fewest=17),
    Peer("cuSPARSELt", ("sparse", "sparse-w4"), cusparselt, 1e-3, _no_cusparselt),
    Peer("bitsandbytes", ("nf4",), bnb_nf4, 2e-3, _no_bitsandbytes),
    Peer("bitsandbytes", ("int8",), bnb_int8, 5e-2, _no_bitsandbytes, eager=True),
)
