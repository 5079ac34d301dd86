"""The layers that the benchmarks multiply by: random weights of every kind, drawn on the device by torch's generator.

A kind is a line of `CASES`: how it is built, how far it may be from its definition, and what bounds it. A layer that
has a `fast.Kernel` needs `of_kernel` and a function that makes the packed layer; any other a builder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from inspect import signature

import torch
from torch import Tensor

from compress.bench import ways
from compress.bench.layers import Built, Case, Setting, Shape, built, codes, short, total, uniform, words
from compress.cuda import layout, ops
from compress.packed.dense import Dense
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.sparse import Sparse
from compress.packed.uniform import UniformGrid
from compress.solvers.masks import Pattern
from compress.types import Packed


def of_kernel(home: str, make: Callable[[Shape, Setting], Packed], shape: Shape, setting: Setting) -> Built:
    """A packed layer in the layout of a kernel. Its definition is `Packed.linear` of float32 inputs.

    Args:
        home: the kernel's module and class, "compress.cuda.eight:EightBit". If the module has a function `choose` of
            tokens, rows, columns and device, that tells the way.
        make: makes the layer.
    """
    where, _, name = home.partition(":")
    packed, module = make(shape, setting), import_module(where)
    kernel = getattr(module, name).of(packed)
    assert kernel is not None, f"{home} does not take {packed.storage}"
    parts = kernel.tensors()
    unread = total(parts) - parts["weight"].nbytes if name == "PrunedValues" else 0  # kept to restore the layer

    def way(tokens: int) -> str:
        if (layer := ways.layer_of(kernel)) is not None:
            return short(ways.chosen(layer, shape, tokens, torch.device(setting.device).index))
        if list(signature(getattr(module, "choose", way)).parameters) != ["tokens", "rows", "columns", "device"]:
            return ""
        return short(module.choose(tokens, *shape, torch.device(setting.device).index))

    return Built(kernel, total(parts) - unread, lambda: lambda x: packed.linear(x.float()).float(), way)


def grid(bits: int, shape: Shape, setting: Setting) -> Built:
    """Integers with a scale a group, and a zero point where asymmetric."""
    rows, columns = shape
    size = (rows, 1 if setting.group == -1 else -(-columns // setting.group))
    step = setting.std / (2**bits / 12**0.5)  # of evenly spread codes
    scales = uniform(0.5 * step, 1.5 * step, size, setting).to(setting.dtype)
    zeros = codes(2**bits, size, setting) if setting.asymmetric else None
    layer = ops.Layer.of(
        ops.GRID, bits, setting.group, shape,
        codes=words(shape, bits, setting),
        scales=layout.pack_statistics(scales, columns, setting.group),
        offsets=None if zeros is None else layout.pack_statistics(zeros, columns, setting.group),
    )  # fmt: skip
    return built(layer, columns)


def nf4(shape: Shape, setting: Setting) -> Built:
    """NF4 in blocks of 64 with a float32 absmax each."""
    rows, columns = shape
    absmax = uniform(setting.std, 3 * setting.std, (rows, -(-columns // 64)), setting)
    layer = ops.Layer.of(
        ops.TABLE, 4, 64, shape,
        codes=words(shape, 4, setting, bytewise=True),
        scales=layout.pack_statistics(absmax, columns, 64),
        numbers="nf4",
    )  # fmt: skip
    return built(layer, columns)


def spqr(shape: Shape, setting: Setting, share: float = 0.01) -> Built:
    """3 bits in groups of 16 whose scales and zeros have 3 bits in runs of 16 rows, and a share of outliers.

    Scales come out as 1 to 10 steps and zeros as 0 to 7, so that a weight is 0 on the average.
    """
    rows, columns = shape
    groups, runs = -(-columns // 16), layout.tiles(rows)
    step, spread = setting.std / 18, (runs, groups)
    scale_grid = [uniform(0.5 * step, 1.5 * step, spread, setting), uniform(-3, -1, spread, setting)]
    zero_grid = [uniform(0.8, 1.2, spread, setting), uniform(-0.5, 0.5, spread, setting)]
    statistics, second = layout.pack_second_level(
        codes(8, (rows, groups), setting),
        torch.stack(scale_grid, -1).to(setting.dtype),
        codes(8, (rows, groups), setting),
        torch.stack(zero_grid, -1).to(setting.dtype),
    )
    layer = ops.Layer.of(ops.BILEVEL, 3, 16, shape, words(shape, 3, setting), statistics, second)
    if share:
        layer = with_outliers(layer, shape, setting, share)
    return built(layer, columns)


def with_outliers(layer: ops.Layer, shape: Shape, setting: Setting, share: float) -> ops.Layer:
    """Weights three times as large as others, anywhere."""
    there = torch.rand(shape, device=setting.device) < share
    first = torch.zeros(shape[0] + 1, dtype=torch.int32, device=setting.device)
    first[1:] = there.sum(1).cumsum(0)
    base = ops.plain(layer, shape[1], torch.float32)[there]
    values = setting.normal(len(base), std=3 * setting.std)
    return replace(
        layer,
        outlier_rows=first,
        outlier_columns=there.nonzero()[:, 1].to(torch.int16),
        outlier_values=values,
        outlier_steps=(values.float() - base).to(setting.dtype),
    )


def patterned(shape: Shape, setting: Setting) -> Tensor:
    """bool, two True in every four of a row."""
    pairs = [(1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1)]
    patterns = torch.tensor(pairs, dtype=torch.bool, device=setting.device)
    return patterns[codes(len(pairs), (shape[0], shape[1] // 4), setting).long()].flatten(1)


def pruned(bits: int, shape: Shape, setting: Setting) -> Sparse:
    """Two of every four weights of a row, anywhere: on a grid of so many bits, or (16) as they are."""
    mask = patterned(shape, setting)
    inner: Dense | UniformGrid
    if bits == 16:
        inner = Dense(setting.normal(*shape, std=setting.std).masked_fill_(~mask, 0))
    else:
        whole = integers(bits, shape, setting)
        inner = replace(whole, codes=whole.codes.masked_fill(~mask, 2 ** (bits - 1)), zeros=None)
    return Sparse(mask, inner, Pattern(2, 4))


def integers(bits: int, shape: Shape, setting: Setting, group: int = 128) -> UniformGrid:
    """A symmetric grid; group -1: a scale a row."""
    step = setting.std / (2**bits / 12**0.5)
    size = (shape[0], 1 if group == -1 else -(-shape[1] // group))
    scales = uniform(0.5 * step, 1.5 * step, size, setting).to(setting.dtype)
    return UniformGrid(codes(2**bits, shape, setting), scales, None, bits, group)


def llm_int8(shape: Shape, setting: Setting, count: int = 8) -> OutlierColumns:
    """8-bit weights with a float32 scale a row and 8-bit inputs, `count` columns in 16 bits."""
    whole = integers(8, shape, setting, -1)
    columns = torch.linspace(0, shape[1] - 1, count, device=setting.device).to(torch.int32)
    level = whole.codes.clamp(min=1).index_fill(1, columns.long(), 128)
    inner = replace(whole, codes=level, scales=whole.scales.float(), activations="token")
    return OutlierColumns(inner, columns, setting.normal(shape[0], count, std=setting.std))


def w8a8(shape: Shape, setting: Setting) -> UniformGrid:
    """8-bit weights with a float32 scale a row and 8-bit inputs with one a token."""
    whole = integers(8, shape, setting, -1)
    return replace(whole, codes=whole.codes.clamp(min=1), scales=whole.scales.float(), activations="token")


_INTEGERS = "{} bits, groups of 128, a 16-bit scale each"
_EIGHT = "compress.cuda.eight:EightBit"
_VALUES, _GRID = "compress.cuda.cusparselt:PrunedValues", "compress.cuda.pruned:PrunedGrid"


def _if_there(module: str, *cases: Case) -> tuple[Case, ...]:
    """The cases, if the module is there that they need."""
    return cases if find_spec(module) is not None else ()


#: every kind, by its name on the command line
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("w4", _INTEGERS.format(4), partial(grid, 4)),
        Case("w3", _INTEGERS.format(3), partial(grid, 3)),
        Case("w2", _INTEGERS.format(2), partial(grid, 2)),
        Case("w8", _INTEGERS.format(8), partial(grid, 8)),
        Case("nf4", "NF4, blocks of 64, a float32 absmax each", nf4),
        Case("spqr", "SpQR: 3 bits, groups of 16, two-level statistics, 1% outliers", spqr),
        *_if_there(
            "compress.cuda.eight",
            Case(
                "int8",
                "LLM.int8(): 8-bit inputs, 8 outlier columns",
                partial(of_kernel, _EIGHT, llm_int8),
                1e-3,
                "int8",
            ),
            Case("w8a8", "8-bit weights, 8-bit inputs", partial(of_kernel, _EIGHT, w8a8), 1e-3, "int8"),
        ),
        *_if_there(
            "compress.cuda.pruned",
            Case("sparse", "2:4, 16-bit values", partial(of_kernel, _VALUES, partial(pruned, 16)), work=0.5),
            Case("sparse-w4", "2:4, 4 bits, groups of 128", partial(of_kernel, _GRID, partial(pruned, 4)), work=0.5),
        ),
    )
}
