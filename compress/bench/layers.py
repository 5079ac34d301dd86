"""What a layer is to the benchmarks: how it is asked for, what it must do, and how it is told from others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.cuda import choice, layout, ops

Shape = tuple[int, int]


@dataclass(frozen=True)
class Setting:
    """What a builder is told besides the shape.

    Attributes:
        device: where it is built.
        dtype: of inputs, outputs and 16-bit statistics.
        group: columns of a group, of integer grids.
        asymmetric: integer grids have zero points.
        std: standard deviation of the weights, about.
    """

    device: str
    dtype: torch.dtype = torch.float16
    group: int = 128
    asymmetric: bool = False
    std: float = 0.05

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """[shape] in `dtype`."""
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, std)


class Subject(Protocol):
    """What is timed: a dataclass of tensors that multiplies. `fast.Kernel` is one."""

    def linear(self, x: Tensor) -> Tensor: ...

    def tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Built:
    """A layer.

    Attributes:
        subject: what is timed; copies of it are made by copy.deepcopy.
        size: bytes of it that a product must read.
        reference: makes a function from x to the product in float32 [tokens, rows], by definition.
        way: which kernel runs for so many tokens, in short; "" where that is not known.
    """

    subject: Subject
    size: int
    reference: Callable[[], Callable[[Tensor], Tensor]]
    way: Callable[[int], str] = lambda tokens: ""


@dataclass(frozen=True)
class Case:
    """A kind of layer.

    Attributes:
        name: as the command line has it.
        what: for a reader.
        build: from rows and columns.
        limit: the largest relative error (Frobenius) that is rounding, with float16.
        operand: whose dense rate bounds it.
        work: the share of a dense product's operations that it does.
    """

    name: str
    what: str
    build: Callable[[Shape, Setting], Built]
    limit: float = 1e-3
    operand: str = "fp16"
    work: float = 1.0


@dataclass(frozen=True)
class Laid:
    """A layer in fragment order, through the operators that users run."""

    layer: ops.Layer

    def linear(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.compress.linear(x, *self.layer.arguments)
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {k: v for k, v in vars(self.layer).items() if isinstance(v, Tensor)}

    def way(self, tokens: int, columns: int) -> choice.Way:
        """How the operator would multiply so many inputs."""
        x, outliers = self.layer, self.layer.outlier_rows is not None
        return choice.choose(x.kind, x.bits, tokens, x.rows, columns, x.codes.device.index, outliers)


def short(way: Any) -> str:
    """ "narrow 1 2 8 3": a way of choice.py on a table."""
    return " ".join([type(way).__name__.lower(), *map(str, vars(way).values())])


def built(layer: ops.Layer, columns: int) -> Built:
    """A layer in fragment order with what it is checked against."""
    subject = Laid(layer)

    def reference() -> Callable[[Tensor], Tensor]:
        weight = ops.plain(layer, columns, torch.float32)
        return lambda x: x.float() @ weight.t()

    parts = subject.tensors()
    parts.pop("outlier_steps", None)  # it stands for the values, or they for it
    return Built(subject, total(parts), reference, lambda tokens: short(subject.way(tokens, columns)))


def total(parts: dict[str, Tensor]) -> int:
    """Bytes."""
    return sum(part.nbytes for part in parts.values())


def words(shape: Shape, bits: int, setting: Setting, bytewise: bool = False) -> Tensor:
    """Random codes in fragment order, without packing any: whatever bits a word has are codes."""
    like = layout.pack(torch.empty(shape, dtype=torch.uint8, device="meta"), bits, bytewise)
    return torch.randint(-(2**31), 2**31, like.shape, dtype=like.dtype, device=setting.device)


def uniform(low: float, high: float, size: tuple[int, ...], setting: Setting) -> Tensor:
    """float32, evenly between the two."""
    return torch.rand(size, device=setting.device) * (high - low) + low


def codes(below: int, size: tuple[int, ...], setting: Setting) -> Tensor:
    """uint8"""
    return torch.randint(0, below, size, dtype=torch.uint8, device=setting.device)
