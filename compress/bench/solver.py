"""How long solvers take for a layer, stage by stage, beside other tools on the same tensors: `compress bench solver`.

Every method's result is compared with the same loops in Python on the smallest of the shapes. The layers of a block of
Llama-2-7B are then added up, and its four calls (layers of one input are solved in one) timed as a run makes them.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.bench import quantisers, record, stages, timing
from compress.bench.peers import first_line
from compress.bench.quantisers import TOOLS, Tool
from compress.bench.stages import METHODS, Layer, Setting, Shape
from compress.bench.sums import BLOCK, CALLS, block, goals
from compress.errors import CompressError
from compress.solvers.columns import products
from compress.solvers.hessian import row_losses
from compress.sums import accumulate

#: inputs that are timed; more are as many times as long
CHUNK = 16384
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_LOSS = 5e-4  # by which two right results of a layer of 2^24 weights may differ; fewer weights average out less

Told = Callable[[str], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured: every method on every shape.

    Attributes:
        methods: of `METHODS`.
        shapes: out_features, in_features.
        device: CUDA's index; None: the CPU.
        bits, group, asymmetric: of integer grids.
        tokens: of calibration.
        dtype: "float16" or "bfloat16", of weights and inputs.
        tf32: products of the loops in TF32.
        others: other tools too.
        runs: of which the median counts.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    shapes: tuple[Shape, ...] = tuple(BLOCK)
    device: int | None = 0
    bits: int = 4
    group: int = 128
    asymmetric: bool = False
    tokens: int = 128 * 2048
    dtype: str = "float16"
    tf32: bool = False
    others: bool = True
    runs: int = 5

    @property
    def setting(self) -> Setting:
        return Setting(self.bits, self.group, self.asymmetric, _DTYPES[self.dtype], self.tf32)

    @property
    def place(self) -> torch.device:
        return torch.device("cpu") if self.device is None else torch.device("cuda", self.device)

    def layer(self, shape: Shape) -> Layer:
        """A random layer, the same each time."""
        return stages.drawn(shape, min(self.tokens, CHUNK), self.place, self.setting.dtype)


def run(plan: Plan, told: Told) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        plan: what to measure.
        told: is called with a line before something that takes long.
    """
    rows: list[Row] = []
    tools: list[Row] = []
    absent = {tool.name: tool.absent() for tool in TOOLS} if plan.others else {}
    whole = set(BLOCK) <= set(plan.shapes)
    with record.on(plan.device), torch.no_grad(), products(False):
        report = record.head(plan.device)
        for shape in plan.shapes:
            rows += _shape(plan, shape, told)
        calls = {name: _calls(plan, name, absent, told) for name in plan.methods} if whole else {}
        for shape in plan.shapes:  # behind ours: importing a tool may change torch's settings
            for tool in TOOLS if plan.others else ():
                tools += [] if absent[tool.name] else _tool(plan, tool, shape, absent, told)
    tools += _quoted(plan, tools, report["machine"]["device"])
    sums = block(rows, tools, calls) if whole else {}
    return report | {
        "kind": "solver",
        "setting": {
            "dtype": plan.dtype, "bits": plan.bits, "group": plan.group, "asymmetric": plan.asymmetric,
            "tokens": plan.tokens, "timed_tokens": min(plan.tokens, CHUNK), "tf32": plan.tf32, "runs": plan.runs,
        },
        "methods": {name: METHODS[name].what for name in plan.methods},
        "rows": rows,
        "tools": tools,
        "absent": {name: reason for name, reason in absent.items() if reason},
        "block": sums,
        "goals": goals(rows, sums),
        "failed": sum(bool(r["failed"]) for r in rows),
        "missing": 0,
    }  # fmt: skip


def _shape(plan: Plan, shape: Shape, told: Told) -> list[Row]:
    """A row for each method."""
    rows: list[Row] = [{"method": m, "rows": shape[0], "columns": shape[1], "failed": ""} for m in plan.methods]
    told(f"{shape[0]}x{shape[1]}: Hessian")
    try:
        layer = plan.layer(shape)
        hessian = _hessian(plan, layer)
    except (CompressError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        for row in rows:
            row["failed"] = _reason(error)
        return rows
    for row in rows:
        told(f"{shape[0]}x{shape[1]}: {row['method']}")
        try:
            _method(plan, row, layer, hessian)
        except (CompressError, RuntimeError) as error:
            row["failed"] = _reason(error)
        told(row["failed"] or f"{row['ms']['whole']:.2f} ms")
    return rows


def _hessian(plan: Plan, layer: Layer) -> float:
    """Milliseconds for all tokens, from a chunk of them."""
    total = torch.zeros_like(layer.hessian)
    return median(lambda: accumulate(total, layer.x), plan.runs, plan.place) * plan.tokens / len(layer.x)


def _method(plan: Plan, row: Row, layer: Layer, hessian: float) -> None:
    """Fill in a row: its stages, the whole call, what it reaches and, on the smallest shape, whether that is right."""
    method, dtype = METHODS[row["method"]].make(plan.setting), plan.setting.dtype
    ms = {"hessian": hessian}
    for name, stage in METHODS[row["method"]].stages(method, layer, dtype):
        if name == "block":
            row["block_us"] = round(timing.graph([stage]), 2)
        else:
            ms[name] = median(stage, plan.runs, plan.place)
    call = stages.whole(method, layer, dtype)
    ms["whole"] = median(call, plan.runs, plan.place)
    row["ms"] = {name: round(took, 4) for name, took in ms.items()}
    solved = call()
    row["loss"] = float(solved.row_loss.sum() / solved.row_norm.sum())
    if not math.isfinite(row["loss"]):
        row["failed"] = "wrong result: its loss is not finite"
    elif (row["rows"], row["columns"]) == min(plan.shapes, key=math.prod):
        exact = METHODS[row["method"]].make(replace(plan.setting, tf32=False))
        with stages.in_python():
            twin = exact(layer.weight, layer.stats, dtype)
        ratio = float(solved.row_loss.sum() / twin.row_loss.sum())
        equal = float((stages.codes(solved.packed) == stages.codes(twin.packed)).float().mean())
        limit = _LOSS * max(1.0, (2**24 / layer.weight.numel()) ** 0.5)
        row["twin"] = {"ratio": ratio, "equal": equal, "limit": limit}
        if not abs(ratio - 1) <= limit:
            row["failed"] = f"wrong result: {ratio:.5f} times the loss of the loops in Python"


def median(run: Callable[[], object], runs: int, device: torch.device) -> float:
    """Milliseconds of a call as a host drives it: what is compiled or captured once has been before."""
    for _ in range(2):
        run()
    return statistics.median(_took(run, device) for _ in range(runs))


def _took(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return timing.elapsed(run)
    begun = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begun)


def _calls(plan: Plan, name: str, absent: dict[str, str], told: Told) -> list[Row]:
    """The calls of a block, each with the time of its Hessian; none, and the reason among `absent`, where one fails."""
    if METHODS[name].make(plan.setting).row_unit != 1:
        return []  # a run solves each layer by itself
    found = []
    for shape in CALLS:
        told(f"a block's {shape[0]}x{shape[1]}: {name}")
        try:
            layer = plan.layer(shape)
            call = stages.whole(METHODS[name].make(plan.setting), layer, plan.setting.dtype)
            took = median(call, plan.runs, plan.place)
            hessian = _hessian(plan, layer)
        except (CompressError, RuntimeError) as error:
            absent[f"a block as a run calls it, {name}"] = _reason(error)
            return []
        found.append({"rows": shape[0], "columns": shape[1], "ms": round(took, 4), "hessian_ms": round(hessian, 4)})
    return found


# --- other tools ----------------------------------------------------------------------------------------------------


def _tool(plan: Plan, tool: Tool, shape: Shape, absent: dict[str, str], told: Told) -> list[Row]:
    """A row of another tool, none with the reason among `absent` where it raises: that stops nothing."""
    told(f"{shape[0]}x{shape[1]}: {tool.name}")
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            layer = plan.layer(shape)
            hessian = median(tool.hessian(layer), plan.runs, plan.place) * plan.tokens / len(layer.x)
            took, out = [], layer.weight
            for _ in range(plan.runs + 1):  # the first compiles
                ready = tool.ready(layer, plan.setting)
                kept: list[Tensor] = []
                took.append(_took(partial(_keep, ready, kept), plan.place))
                out = kept[0]
    except Exception as error:  # others' code: whatever it refuses is its own row
        absent[f"{tool.name}, {shape[0]}x{shape[1]}"] = first_line(error)
        return []
    weight = layer.weight.float()
    loss, norm = (row_losses(e, layer.hessian).sum() for e in (weight - out.float(), weight))
    row = {"tool": tool.name, "rows": shape[0], "columns": shape[1], "quoted": False, "loss": float(loss / norm)}
    return [row | {"hessian_ms": round(hessian, 4), "solve_ms": round(statistics.median(took[1:]), 4)}]


def _keep(ready: Callable[[], Tensor], kept: list[Tensor]) -> None:
    kept.append(ready())


def _quoted(plan: Plan, measured: list[Row], device: str) -> list[Row]:
    """What is quoted of tools that this run did not time, if it ran on such a card."""
    known = quantisers.quoted()
    if known["device"] != device or not plan.others or (plan.bits, plan.group) != (4, 128):
        return []
    found: list[Row] = []
    for tool in known["tools"]:
        for rows, columns in plan.shapes:
            took = tool["solve"].get(f"{rows}x{columns}")
            if took is not None and not any(r["tool"] == tool["name"] for r in measured):
                hessian = tool["hessian"][str(columns)] * plan.tokens / known["tokens"]
                row = {"tool": tool["name"], "rows": rows, "columns": columns, "quoted": True}
                found.append(row | {"hessian_ms": round(hessian, 4), "solve_ms": float(took)})
    return found


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return " ".join(str(error).split())[:300]
