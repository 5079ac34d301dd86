"""Greedy decoding, end to end: tokens a second of a Llama-2-7B-shaped model, its linear layers packed.

Weights are random and packed as they are drawn: there is no quantisation run, and no model to download. A step (the
model on a static cache, argmax, the positions moved on) is captured in a CUDA graph and replayed, so that neither
Python nor launches count. What lies between the products is compiled by torch.compile, the same for every method.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.bench import llama, record, timing
from compress.bench.cases import CASES
from compress.bench.layers import Setting, Subject
from compress.bench.llama import Llama, Model, Parts
from compress.errors import CompressError

DENSE = "dense"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_STD = 0.02
_RUNS = 3

Told = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        methods: "dense", or of `CASES`.
        batches: sequences at once.
        model: its sizes.
        device: CUDA's index.
        dtype: of what is not packed: "float16" or "bfloat16".
        prompt, steps: tokens before the clock runs, and while it does.
        eager: the step is not compiled.
    """

    methods: tuple[str, ...]
    batches: tuple[int, ...] = (1, 16)
    model: Model = Model()
    device: int = 0
    dtype: str = "float16"
    prompt: int = 16
    steps: int = 128
    eager: bool = False

    @property
    def setting(self) -> Setting:
        return Setting(f"cuda:{self.device}", _DTYPES[self.dtype], std=_STD)

    @property
    def parts(self) -> Parts:
        return llama.STEP if self.eager else llama.compiled()


class Packed(nn.Module):
    """A linear layer that computes by a kernel."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject = subject

    def forward(self, x: Tensor) -> Tensor:
        return self.subject.linear(x)


def build(model: Model, method: str, setting: Setting) -> Llama:
    """A model on the device, made layer by layer: what is packed never exists in 16 bits.

    Args:
        model: its sizes.
        method: "dense", or of `CASES`: the linear layers of the blocks.
        setting: device and dtype.
    """
    with torch.device("meta"):
        made = Llama(model)
    if method != DENSE:
        for block in made.blocks:
            _pack(block, method, setting)
    for module in made.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(_drawn(parameter, setting), requires_grad=False))
    return made.eval()


def _pack(block: nn.Module, method: str, setting: Setting) -> None:
    for name, module in list(block.named_children()):
        if isinstance(module, nn.Linear):
            subject = CASES[method].build((module.out_features, module.in_features), setting).subject
            setattr(block, name, Packed(subject))


def _drawn(parameter: Tensor, setting: Setting) -> Tensor:
    """Norms are ones, matrices random."""
    if parameter.dim() == 1:
        return torch.ones(parameter.shape, dtype=setting.dtype, device=setting.device)
    return setting.normal(*parameter.shape, std=_STD)


def weights(model: Llama) -> tuple[int, int]:
    """Bytes of all weights, and of those that a step reads: all but the embeddings, of which it reads a row."""
    packed = [p for m in model.modules() if isinstance(m, Packed) for p in m.subject.tensors().values()]
    total = sum(p.nbytes for p in (*model.parameters(), *packed))
    return total, total - model.embedding.weight.nbytes


class Decoder:
    """Greedy decoding on a static cache: everything that a step reads and writes stays where it is.

    Args:
        model: from `build`.
        batch: sequences.
        length: tokens that the cache holds, prompt included.
        parts: of a step.
    """

    def __init__(self, model: Llama, batch: int, length: int, parts: Parts = llama.STEP) -> None:
        device = model.embedding.weight.device
        self.model, self.parts = model, parts
        self.cache = model.cache(batch, length)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.history = torch.zeros(batch, length, dtype=torch.long, device=device)
        self.sum = torch.zeros((), device=device)  # of all logits: it stays infinite or nan

    @property
    def finite(self) -> bool:
        """Whether all logits so far were."""
        return bool(self.sum.isfinite())

    def prefill(self, prompt: Tensor) -> None:
        """Read a prompt [batch, tokens] and choose the first token."""
        count = prompt.shape[1]
        self._choose(self.model(prompt, torch.arange(count, device=prompt.device), self.cache, llama.PROMPT))
        self.position.fill_(count)
        self._tell()

    def step(self) -> None:
        """Read the last token and choose the next: with nothing that waits for the host, so that it can be captured."""
        self._choose(self.model(self.token, self.position, self.cache, self.parts))
        self.position.add_(1)
        self._tell()

    def _choose(self, logits: Tensor) -> None:
        """`token`, by logits [batch, vocabulary]."""
        self.sum.add_(logits.sum(dtype=torch.float32))
        torch.argmax(logits, -1, keepdim=True, out=self.token)

    def _tell(self) -> None:
        """`history` has `token` at its position, where it will be read."""
        self.history.index_copy_(1, self.position, self.token)

    def rewind(self, first: Tensor, position: int) -> None:
        """Back to where `first` [batch, 1] is the token to be read at `position`. What the cache holds behind it is
        masked until it is written again."""
        self.token.copy_(first)
        self.position.fill_(position)


def run(plan: Plan, told: Told) -> dict[str, Any]:
    """The report, ready for JSON.

    Args:
        plan: what to measure.
        told: is called with a line before something that takes long.
    """
    rows: list[dict[str, Any]] = []
    with torch.cuda.device(plan.device), torch.no_grad():
        report = record.head(plan.device)
        for method in plan.methods:
            told(f"{method}: building {plan.model.layers} layers")
            rows += _method(plan, method, told)
    _compare(rows)
    sizes = vars(plan.model) | {"parameters": parameters(plan.model)}
    return report | {
        "kind": "decode",
        "setting": {"dtype": plan.dtype, "prompt": plan.prompt, "steps": plan.steps, "compiled": not plan.eager},
        "model": sizes,
        "rows": rows,
        "failed": sum(bool(r["failed"]) for r in rows),
        "missing": len(plan.methods) * len(plan.batches) - len(rows),
    }


def parameters(model: Model) -> int:
    """How many the dense model has."""
    block = 4 * model.hidden**2 + 3 * model.hidden * model.intermediate + 2 * model.hidden
    return model.layers * block + 2 * model.vocabulary * model.hidden + model.hidden


def _compare(rows: list[dict[str, Any]]) -> None:
    """How many times as fast as the dense model of the same batch, where that ran."""
    dense = {row["batch"]: row["ms"] for row in rows if row["method"] == DENSE and not row["failed"]}
    for row in rows:
        if row["batch"] in dense and not row["failed"]:
            row["times_dense"] = round(dense[row["batch"]] / row["ms"], 3)


def _method(plan: Plan, method: str, told: Told) -> list[dict[str, Any]]:
    """A row for each batch."""
    gc.collect()  # the model before
    torch.cuda.empty_cache()
    rows: list[dict[str, Any]] = []
    try:
        model = build(plan.model, method, plan.setting)
        size, read = weights(model)
    except (CompressError, RuntimeError) as error:  # torch.OutOfMemoryError is one
        return [{"method": method, "batch": batch, "failed": _reason(error)} for batch in plan.batches]
    for batch in plan.batches:
        row: dict[str, Any] = {"method": method, "batch": batch, "failed": "", "weight_bytes": size}
        rows.append(row)
        torch.cuda.reset_peak_memory_stats()
        try:
            ms, differing = _time(plan, model, batch)
            if differing and method != DENSE:
                raise CompressError(f"two runs from one state differ in {differing:.1%} of the tokens")
        except (CompressError, RuntimeError) as error:
            row["failed"] = _reason(error)
            continue
        row |= {
            "ms": round(ms, 4), "tokens_per_second": round(1e3 * batch / ms, 2), "gbps": round(read / ms / 1e6, 1),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }  # fmt: skip
        if differing:  # the library's product for this batch is not the same at every run
            row["differing_tokens"] = round(differing, 4)
        told(f"{method}: batch {batch}: {row['tokens_per_second']} tokens/s")
    return rows


def _time(plan: Plan, model: Llama, batch: int) -> tuple[float, float]:
    """Milliseconds of a step, and the share of tokens that two runs from one state give differently. Raises
    CompressError for numbers that are not finite."""
    decoder = Decoder(model, batch, -(-(plan.prompt + plan.steps + 1) // 16) * 16, plan.parts)
    prompt = torch.randint(0, plan.model.vocabulary, (batch, plan.prompt), device=decoder.token.device)
    decoder.prefill(prompt)
    first = decoder.token.clone()
    step = _captured(decoder, first, plan.prompt)
    times, told = [], []
    for _ in range(_RUNS):
        decoder.rewind(first, plan.prompt)
        decoder.history.zero_()
        times.append(_replay(step, plan.steps))
        told.append(decoder.history.clone())
    if not decoder.finite:
        raise CompressError("logits are not finite")
    differing = max(float((told[0] != other).float().mean()) for other in told[1:])
    return statistics.median(times) / plan.steps, differing


def _captured(decoder: Decoder, first: Tensor, position: int) -> torch.cuda.CUDAGraph:
    """One step as a graph. It runs twice before: kernels are compiled and libraries make their plans."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        _warm(decoder, first, position)
    torch.cuda.current_stream().wait_stream(aside)
    decoder.rewind(first, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder.step()
    return graph


def _warm(decoder: Decoder, first: Tensor, position: int) -> None:
    """Two steps. Raises CompressError where something is left to run as it is that was to be compiled."""
    from torch._dynamo import config, utils

    with config.patch(recompile_limit=1 << 16):  # a graph for each batch; but 8 of them would be the limit
        for _ in range(2):
            decoder.rewind(first, position)
            decoder.step()
    if decoder.parts is not llama.STEP and not utils.counters["stats"]["unique_graphs"]:
        what = "torch.compile did nothing"
        raise CompressError(what, "compress bench decode", "unset TORCH_COMPILE_DISABLE and the like, or use --eager")


def _replay(graph: torch.cuda.CUDAGraph, steps: int) -> float:
    """Milliseconds of so many."""

    def run() -> None:
        for _ in range(steps):
            graph.replay()

    torch.cuda.synchronize()
    return timing.elapsed(run)


def _reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    what = " ".join(str(error).split())[:300]
    uncompiled = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return f"torch.compile (--eager runs without it): {what}" if uncompiled else what
