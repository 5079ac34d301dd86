"""The vocabulary that passes, packed kinds, formats and the pipeline share. Imports torch alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Needs:
    """Which statistics of a layer's inputs a step wants.

    Attributes:
        hessian: the mean of x x^T.
        weighted: tokens count in the Hessian by what an error there does to the block's output
            (compress/sensitivity.py), for all steps with a Hessian; the head's has none of this.
        ranges: of each feature the largest and the mean magnitude, and the mean.
        above: the share of tokens in which a feature's magnitude reaches this number.
        survey: the same share over the blocks of the model, from a run through all of them before any is compressed.
        outputs: what the block makes in the original model, for a refiner that tunes what a pass solved.
        past: how the inputs differ from those that the original model gives the layer.
    """

    hessian: bool = False
    ranges: bool = False
    above: float | None = None
    survey: bool = False
    outputs: bool = False
    past: bool = False
    weighted: bool = False

    def __bool__(self) -> bool:
        return self.hessian or self.ranges or self.above is not None or self.survey or self.outputs or self.past

    @property
    def original(self) -> bool:
        """Whether the calibration rows must go through the original model too."""
        return self.outputs or self.past

    @property
    def statistics(self) -> Needs:
        """What is to be known of the layers' inputs."""
        return replace(self, outputs=False, past=False)

    def __or__(self, other: Needs) -> Needs:
        if self.above is not None and other.above is not None and self.above != other.above:
            raise ValueError("one threshold a run")
        return Needs(
            self.hessian or other.hessian,
            self.ranges or other.ranges,
            self.above if other.above is None else other.above,
            self.survey or other.survey,
            self.outputs or other.outputs,
            self.past or other.past,
            self.weighted or other.weighted,
        )


@dataclass(frozen=True)
class Past:
    """How the inputs x of a layer differ from the inputs x~ that the original model gives it.

    All float32 [in, in]; means over tokens, weighted where `Needs.weighted` asks for it.

    Attributes:
        cross: the mean of (x~ - x) x^T.
        held_cross: the same over some rows, which are held out.
        held_hessian: the mean of x x^T over those.
        share: of the tokens' weights that are held out.
    """

    cross: Tensor
    held_cross: Tensor
    held_hessian: Tensor
    share: float


@dataclass(frozen=True)
class LayerStats:
    """What calibration learned about the inputs of one linear layer; what no step needs is None.

    Attributes:
        tokens: how many input vectors were seen.
        hessian: float32 [in, in], the mean of x x^T over those vectors (GPTQ's H up to its factor 2), weighted where
            `Needs.weighted` asks for it.
        absmax: float32 [in], the largest |x| of each feature.
        mean_abs: float32 [in], the mean of |x|.
        mean: float32 [in], the mean of x.
        above: float32 [in], the share of vectors with |x| at or above `Needs.above`.
        spread: float32 [blocks, in], `above` in every block of the model for the layer of the same role.
        mask: bool [out, in], the weights that an earlier step of the recipe kept; zeros must stay zeros.
        past: see `Past`; None also for layers that others of the block feed, and experts, whose tokens differ.
    """

    tokens: int
    hessian: Tensor | None = None
    absmax: Tensor | None = None
    mean_abs: Tensor | None = None
    mean: Tensor | None = None
    above: Tensor | None = None
    spread: Tensor | None = None
    mask: Tensor | None = None
    past: Past | None = None


@dataclass(frozen=True)
class Storage:
    """How a pass will store a layer, known before it runs: what formats are asked `why_not` about.

    Attributes:
        kind: name in the KINDS table.
        bits: bits a code (16 or 32 where values are stored as they are).
        group_size: input columns that share a scale; -1 for the whole row.
        symmetric: no zero points are stored.
        ordered_groups: groups follow an activation order, so a g_idx tensor must be stored.
        activations: how the layer's input is quantised to 8 bits when it runs: "" not at all, "token" or "tensor" by
            a symmetric scale a token or a sequence, "token_zeropoint" and "tensor_zeropoint" on an affine grid.
        details: what else this kind must know to read its tensors, as sorted (name, value) pairs.
        inner: the storage that a kind wraps.
    """

    kind: str
    bits: int
    group_size: int = -1
    symmetric: bool = True
    ordered_groups: bool = False
    activations: str = ""
    details: tuple[tuple[str, int | float | str | bool], ...] = ()
    inner: Storage | None = None

    def detail(self, name: str) -> Any:
        """The value of one of `details`. Raises KeyError."""
        return dict(self.details)[name]

    def as_json(self) -> dict[str, Any]:
        """Plain values, without those at their defaults."""
        out: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default
        }
        if self.details:
            out["details"] = dict(self.details)
        if self.inner is not None:
            out["inner"] = self.inner.as_json()
        return out

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Inverse of `as_json`. Raises TypeError, KeyError for what is not one."""
        known = dict(value)
        details = tuple(sorted(known.pop("details", {}).items()))
        inner = known.pop("inner", None)
        return cls(**known, details=details, inner=None if inner is None else cls.from_json(inner))


@runtime_checkable
class Packed(Protocol):
    """One linear layer as it will be stored. `dequantize` in plain torch defines the kind.

    Attributes:
        kind: name in the KINDS table.
        parts: every name that `tensors` may use; no two kinds that nest share one.
    """

    kind: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        ...

    @property
    def storage(self) -> Storage: ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors as stored, bit-packed."""
        ...

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        """Exact inverse of `tensors`. dtype: of the dequantised weight."""
        ...

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        """Bytes of `tensors` of such a layer, before it exists (an estimate where they depend on the weights)."""
        ...

    def dequantize(self) -> Tensor:
        """Dense weight [out, in] in the dtype of the stored scales, to the last bit what a client computes."""
        ...

    def linear(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, without bias: as the layer computes, its input quantised or not."""
        ...

    def rows(self, start: int, stop: int) -> Self:
        """The layer made of output rows start..stop-1 (multiples of the pass's row_unit)."""
        ...


def dense_linear(packed: Packed, x: Tensor) -> Tensor:
    """`Packed.linear` of a kind whose activations stay as they are."""
    return F.linear(x, packed.dequantize().to(x.dtype))


def moved(packed: Packed, device: torch.device) -> Packed:
    """The same layer with its tensors, and those of a kind inside it, on `device`."""
    fresh: dict[str, Any] = {}
    for f in fields(packed):  # type: ignore[arg-type]
        value = getattr(packed, f.name)
        if isinstance(value, Tensor):
            fresh[f.name] = value.to(device)
        elif isinstance(value, Packed):
            fresh[f.name] = moved(value, device)
    return replace(packed, **fresh)  # type: ignore[type-var]


def tensor_bytes_of(packed: Packed) -> int:
    """Bytes of the tensors that are stored."""
    return sum(t.numel() * t.element_size() for t in packed.tensors().values())


def bits_per_weight(packed: Packed) -> float:
    """Stored bits for each weight, counted from the bytes of the tensors that are stored."""
    return 8.0 * tensor_bytes_of(packed) / (packed.shape[0] * packed.shape[1])


@dataclass(frozen=True)
class Solved:
    """A pass's answer for one weight matrix.

    Attributes:
        packed: the stored form.
        row_loss: float32 [out], for each output row (w - q) H (w - q)^T, or the plain squared error without H.
        row_norm: float32 [out], the same with q = 0, so that row_loss / row_norm is a relative error.
        notes: what the report must say: a raised damp, rows that fell back, dead columns.
        figures: what the paper would print of a layer: its outlier features, its sparsity. Plain numbers.
    """

    packed: Packed
    row_loss: Tensor
    row_norm: Tensor
    notes: tuple[str, ...] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


class Pass(Protocol):
    """A compression method: a frozen dataclass whose fields are its settings (and the command's options).

    Attributes:
        name: the sub-command.
        paper: authors, title, year; "" for common knowledge.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def needs(self) -> Needs: ...

    @property
    def row_unit(self) -> int:
        """Rows are independent of each other in runs of this many; 0 where the whole matrix decides together.

        Layers that share an input are solved in one call, rows upon rows, wherever this allows it.
        """
        ...

    def settle(self, in_features: Collection[int]) -> Self:
        """Fill settings that depend on the layers' shapes. Raises CompressError when none fits."""
        ...

    @property
    def storage(self) -> Storage: ...

    def __call__(self, weight: Tensor, stats: LayerStats, scale_dtype: torch.dtype) -> Solved:
        """Compress one weight matrix.

        Args:
            weight: [out, in], any float dtype; not modified.
            stats: statistics of the layer's inputs, holding at least what `needs` names.
            scale_dtype: the dtype in which scales are stored, and of the dequantised weight.
        """
        ...

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """What was done, in the words of the paper, one line each.

        Args:
            layers: the records of the layers that this pass compressed: "name", "shape", "bytes", "figures".
        """
        ...


@dataclass(frozen=True)
class Edge:
    """A place where a block's function allows a rescaling: channels that some linear layers read and one module makes.

    With any s > 0, dividing what is made by s and multiplying the readers' columns by s changes nothing.

    Attributes:
        maker: "norm" (a norm's gain) or "linear" (rows of the layer before it).
        readers: float32 [out_i, in], the weights that read the channels.
        stats: of those channels.
        rows: float32 [in, k], for each channel the weights that make it (several rows side by side where channels are
            shared by attention heads), and its bias in the last column; None for a norm.
        names: the readers' names, for messages.
    """

    maker: str
    readers: tuple[Tensor, ...]
    stats: LayerStats
    rows: Tensor | None = None
    names: tuple[str, ...] = ()


@runtime_checkable
class Transform(Protocol):
    """A step that rescales a block's channels without changing its function, before a pass rounds it.

    Attributes:
        then: the pass to follow when the transform is a sub-command: its name and settings, "rtn bits=4".
        makers: which edges it wants, of "norm" and "linear".
        sweeps: how often every edge is visited at most (edges that share a matrix move each other).
        shifts: it corrects biases after rounding.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    then: str

    @property
    def makers(self) -> tuple[str, ...]: ...

    @property
    def sweeps(self) -> int: ...

    @property
    def shifts(self) -> bool: ...

    @property
    def needs(self) -> Needs: ...

    def settle(self, in_features: Collection[int]) -> Self:
        """Fill settings that depend on the layers' shapes. Raises CompressError when none fits."""
        ...

    def scale(self, edge: Edge) -> Tensor | None:
        """float32 [in], s > 0 for each channel; None leaves this edge alone."""
        ...

    def shift(self, weight: Tensor, dequantised: Tensor, analytic: Tensor | None, stats: LayerStats) -> Tensor | None:
        """What to add to a layer's bias after rounding, float32 [out]; None for nothing.

        Args:
            weight, dequantised: [out, in].
            analytic: float32 [in], the input's mean as the bias of the LayerNorm before it has it, if there is one.
        """
        ...


class Task(Protocol):
    """What a block is to do, as a refiner sees it: pieces of the calibration rows with the original's output.

    Attributes:
        dtype: in which the block computes.
        device: where.
        vectors: gains of norms and biases of the block by name, as they are stored.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def vectors(self) -> Mapping[str, Tensor]: ...

    def __len__(self) -> int:
        """How many pieces there are."""
        ...

    def piece(self, i: int) -> tuple[Tensor, Tensor]:
        """[rows, seq, hidden] twice: what enters the block in the compressed model, what leaves it in the original."""
        ...

    def output(self, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """[rows, seq, hidden]: what the block makes of `inputs` with these weights [out, in], and vectors, in place of
        its own.

        Differentiable in the weights, which are of `dtype`.
        """
        ...

    def repeated(self, work: Callable[..., None]) -> Callable[..., None]:
        """`work` for many calls with tensors of the same shapes, quicker where a device can be told all of it at once.

        Args:
            work: a function of tensors that changes others in place, without waiting for the device.
        """
        ...


@dataclass(frozen=True)
class Refined:
    """What a refiner made of the packed layers of a block.

    Attributes:
        packed: by name, of the kind that was given.
        before, after: mean squared error of the block's output on pieces that the tuning did not see.
        vectors: those of `Task.vectors` that were tuned, as they are to be stored.
        notes: what the report must say.
    """

    packed: Mapping[str, Packed]
    before: float
    after: float
    vectors: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class Refiner(Protocol):
    """A step that tunes the packed layers of a whole block to the original's output; a settings dataclass like a pass.

    It runs on the layers whose pass asks for `Needs.outputs`.

    Attributes:
        window: how many neighbouring blocks it tunes together, 1 or more.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def window(self) -> int: ...

    def refine(self, layers: Mapping[str, Packed], weights: Mapping[str, Tensor], task: Task, seed: int) -> Refined:
        """Tune the layers of one block, or of neighbouring ones.

        Args:
            layers: as the passes solved them, by name.
            weights: float32 [out, in] of each, what the passes were given.
            seed: of the order of the pieces.
        """
        ...

    def words(self, layers: Sequence[Mapping[str, Any]]) -> list[str]:
        """What was done, one line each. layers: see `Pass.words`; "refined" among the figures of those it tuned is what
        the held-out error of their block became, as a share of what it was."""
        ...


def settings(value: Any) -> dict[str, Any]:
    """The fields of a settings dataclass as plain JSON values (which hold no infinity: it becomes "inf")."""
    plain = asdict(value)
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def defaults(value: Any) -> dict[str, Any]:
    """What the fields of a settings dataclass are when nobody sets them, by name."""
    made = type(value)()
    return {f.name: getattr(made, f.name) for f in fields(value)}
