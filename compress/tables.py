"""Fixed code tables: 4-bit NormalFloat, 4-bit floats, and the 8-bit map that double quantisation uses.

NF4 is built as section 3 of QLoRA (Dettmers, Pagnoni, Holtzman, Zettlemoyer 2023) says: quantiles of the standard
normal distribution at evenly spaced probabilities, 8 for the negative half and 9 for the positive one, whose common
zero is kept once, divided by the largest. Eq. 4 (means of neighbouring quantiles) is not what the published table
(appendix E) holds: that one takes the quantiles themselves, from the probability 1 - (1/32 + 1/30) / 2 down to 1/2, as
the released code does. In its order of roundings this gives the published table to the last bit of float32.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

#: the outermost probability: 1 - (1/32 + 1/30) / 2, as the released code rounds it
_NF4_OUTERMOST = 0.9677083

#: bitsandbytes' FP4, times 12, by bit pattern: E2M1 with a smallest number of 0.0625 where a subnormal has 1
_BNB_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

#: exponent and mantissa bits of the 4-bit floats that follow the common layout
_FLOATS = {"fp4-e2m1": (2, 1), "fp4-e1m2": (1, 2), "fp4-e3m0": (3, 0)}

NAMES = ("nf4", *_FLOATS, "fp4-bnb")


@cache
def _values(name: str) -> Tensor:
    if name == "nf4":
        return _nf4()
    if name in _FLOATS:
        half = _minifloat(*_FLOATS[name])
    elif name == "fp4-bnb":
        half = torch.tensor(_BNB_FP4) / 12
    else:
        raise KeyError(name)
    return torch.cat([half, 0.0 - half])  # 0 - x: the second zero is +0.0


def table(name: str, device: torch.device | str = "cpu") -> Tensor:
    """float32 [16]: the value of each code, in -1 .. 1. Raises KeyError for a name that is not in `NAMES`."""
    return _values(name).to(device)


@cache
def _levels(name: str) -> tuple[Tensor, Tensor]:
    values, code = torch.sort(_values(name), stable=True)
    first = torch.cat([torch.tensor([True]), values[1:] != values[:-1]])
    return values[first], code[first].to(torch.uint8)


def levels(name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The different values of a table in rising order, float32 [n], and the lowest code of each, uint8 [n]."""
    values, code = _levels(name)
    return values.to(device), code.to(device)


def _nf4() -> Tensor:
    def half(count: int) -> list[float]:
        probabilities = torch.linspace(_NF4_OUTERMOST, 0.5, count)[:-1].tolist()
        return [NormalDist().inv_cdf(p) for p in probabilities]

    values = torch.tensor(sorted([-v for v in half(8)] + [0.0] + half(9)))
    return values / values.max()


def _minifloat(exponent_bits: int, mantissa_bits: int) -> Tensor:
    """float32 [8]: the numbers from 0 up of a float without infinities and NaN, by bit pattern, largest 1."""
    steps = 2**mantissa_bits
    values: list[float] = []
    for pattern in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(pattern, steps)
        # exponent field 0 is subnormal: the power of field 1, no leading one
        values.append(2.0 ** max(exponent, 1) * (mantissa / steps + (exponent > 0)))
    return torch.tensor(values) / max(values)


@cache
def _dynamic() -> Tensor:
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [means, -means]
    return torch.cat(values).sort().values


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """float32 [256], rising: the signed dynamic 8-bit data type (Dettmers 2016, "8-Bit Approximations").

    Seven decades below 1, each split into twice as many equal parts as the one below it; also 0 and 1.
    """
    return _dynamic().to(device)
