"""What a report says, as plain values: gather.py makes them from files, the renderers only read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.evaluate.intervals import Estimate

#: how a layer's error was measured
MEASURES = {
    "output": "share of the energy of the layer's output on the calibration data that is error",
    "weight": "share of the energy of the layer's weights that is error",
    "evaluation": "distance of the layer's output from the original's, ‖Wx - W'x‖ / ‖Wx‖, on the evaluation text",
    "unknown": "relative error as the method counted it",
}


@dataclass(frozen=True)
class Score:
    """Figures of one model on one text.

    Attributes:
        protocol: how the text was cut into windows, and how many predictions that made.
        perplexity, original: of the model and of the original.
        kl, kl_tail: mean divergence from the original in nats a token; its median, p99, p999, max.
        top1: share of positions with the original's most likely token.
        flips: share of positions whose most likely token is another one; lost and gained, where known.
        measured: where the figures come from.
    """

    text: str
    protocol: str
    measured: str
    perplexity: Estimate | None = None
    original: Estimate | None = None
    kl: Estimate | None = None
    kl_tail: Mapping[str, float] = field(default_factory=dict)
    top1: Estimate | None = None
    flips: Mapping[str, float] = field(default_factory=dict)
    bits_per_byte: Estimate | None = None


@dataclass(frozen=True)
class Layer:
    """One compressed matrix.

    Attributes:
        block: None outside of the decoder blocks.
        kind: its name within the block, experts as one: "mlp.experts.*.up_proj".
        error: see `measure`, a key of MEASURES; None where it is not known.
        outliers: how many weights (SpQR) or columns (LLM.int8) are kept apart; None for other kinds.
    """

    name: str
    block: int | None
    kind: str
    method: str
    shape: tuple[int, ...]
    bytes: int
    bits_per_weight: float
    error: float | None
    measure: str
    tokens: int
    outliers: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Histogram:
    """The weights of one layer before and after, over the same bins.

    Attributes:
        low, high: ends of the range that the bins divide evenly.
        before, after: share of the weights in each bin.
        outside: share of the weights beyond the range, before and after.
        zeros: share of exact zeros, before and after.
        distance: ||W - W'|| / ||W||, from the files.
    """

    layer: str
    error: float | None
    low: float
    high: float
    before: tuple[float, ...]
    after: tuple[float, ...]
    outside: tuple[float, float]
    zeros: tuple[float, float]
    distance: float


@dataclass(frozen=True)
class Strip:
    """Where the outliers of all layers of one kind lie.

    Attributes:
        features: input features of the layers, which `rows` cut into bins.
        blocks: number of each row's decoder block.
        rows: for each block the share of each bin's weights that are outliers.
        total: share over all.
    """

    kind: str
    features: int
    blocks: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    total: float


@dataclass(frozen=True)
class Mask:
    """The outliers within one layer: share of each cell of a grid over its output rows and input columns."""

    layer: str
    shape: tuple[int, int]
    cells: tuple[tuple[float, ...], ...]
    total: float


@dataclass(frozen=True)
class Outliers:
    """`unit`: what is kept apart, "columns" or "weights"."""

    unit: str
    strips: tuple[Strip, ...]
    mask: Mask | None = None


@dataclass(frozen=True)
class Warning:
    """One line that a reader must know; `layers` are those that it is true of, () for the run as a whole."""

    topic: str
    text: str
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """One folder.

    Attributes:
        recipe: one line a step, as the model card has it.
        words: what the methods did, in the words of their papers.
        calibration: which rows of which text; "" for none.
        bytes, bytes_before: of all tensors, from the headers of the files; of the original, as the run recorded it.
        bits_per_weight: of the compressed layers; `average_bits`: of all parameters.
        histograms, outliers: empty or None where `unseen` or the method says why.
        unseen: why the original's weights could not be read; "" if they could.
        rescaled: a transform rescaled channels before weights were rounded.
        seconds: by part of the run; beside: of threads that worked meanwhile.
        command: as typed; `rebuilt`: made from the record, where the record holds none.
    """

    name: str
    folder: str
    source: str
    method: str
    recipe: tuple[str, ...]
    words: tuple[str, ...]
    format: str
    device: str
    calibration: str
    bytes: int
    bytes_before: int
    parameters: int
    packed_parameters: int
    bits_per_weight: float
    layers: tuple[Layer, ...]
    scores: tuple[Score, ...]
    histograms: tuple[Histogram, ...]
    unseen: str
    rescaled: bool
    outliers: Outliers | None
    seconds: Mapping[str, float]
    beside: Mapping[str, float]
    host_bytes: int | None
    device_bytes: int | None
    room: Mapping[str, Any]
    warnings: tuple[Warning, ...]
    checks: tuple[str, ...]
    command: str
    rebuilt: str
    versions: Mapping[str, str]
    tasks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def average_bits(self) -> float:
        return 8.0 * self.bytes / self.parameters if self.parameters else 0.0

    @property
    def smaller(self) -> float:
        """How many times smaller than the original."""
        return self.bytes_before / self.bytes if self.bytes else 0.0

    @property
    def score(self) -> Score | None:
        """On the first text."""
        return self.scores[0] if self.scores else None

    @property
    def measure(self) -> str:
        """How the errors of its layers were measured; "" where they differ in that."""
        found = {x.measure for x in self.layers}
        return found.pop() if len(found) == 1 else ""


@dataclass(frozen=True)
class Evaluation:
    """A file of `compress eval`, as far as it is not in the models' scores."""

    file: str
    command: str
    machine: str
    date: str
    seconds: Mapping[str, float]
    versions: Mapping[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """A whole report."""

    models: tuple[Model, ...]
    evaluations: tuple[Evaluation, ...]
    notes: tuple[str, ...]
    command: str
    date: str
    machine: str
    versions: Mapping[str, str]

    @property
    def sources(self) -> tuple[str, ...]:
        """Distinct originals."""
        return tuple(dict.fromkeys(m.source for m in self.models))
