"""Orthogonal matrices that spread outliers, and their products with weights. Tensors in, a value out, all in float64.

A randomised Hadamard matrix (QuaRot, Ashkboos et al. 2024, section 3) is diag(signs) H / sqrt(n), all entries of H
being 1 or -1: every coordinate of a rotated vector is a sum of all coordinates with random signs, so none stays large.

Sylvester's doubling gives H for powers of two. For n = m 2^k the core of order m is one of Paley's (type I of order
q + 1 for a prime q = 3 mod 4, type II of order 2 (q + 1) for a prime q = 1 mod 4), the smallest that there is. Where
there is none (52 = 13 * 4) the core is a random orthogonal matrix of n's odd part, distributed uniformly (QR of
Gaussians with the signs of R's diagonal moved into Q). Products take the doubling's part as a fast transform of n log n
steps; `Orthogonal.dense` is its slow twin.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import CompressError
from compress.rotation.asked import KINDS, Kind


@dataclass(frozen=True, eq=False)
class Orthogonal:
    """R = diag(signs) (core x S), S being the normalised Sylvester matrix of order size / len(core).

    Attributes:
        signs: float64 [size], 1 or -1.
        core: float64 [m, m], orthogonal; m divides size by a power of two.
        words: what it is, for the report.
    """

    signs: Tensor
    core: Tensor
    words: str

    @property
    def size(self) -> int:
        return len(self.signs)

    def times(self, x: Tensor) -> Tensor:
        """float64 [..., size]: x R, for x [..., size] of any float dtype, on x's device."""
        order = len(self.core)
        y = (x.double() * self.signs.to(x.device)).reshape(*x.shape[:-1], order, self.size // order)
        y = _doubled(y)
        if order > 1:
            y = (y.transpose(-1, -2) @ self.core.to(x.device)).transpose(-1, -2)
        return y.reshape(x.shape)

    def before(self, weight: Tensor) -> Tensor:
        """float64 [size, in]: R^T W, for W [size, in]: a layer whose outputs are rotated."""
        return self.times(weight.t()).t()

    def dense(self) -> Tensor:
        """float64 [size, size], on the CPU: the matrix that defines `times`."""
        power = self.size // len(self.core)
        return self.signs[:, None] * torch.kron(self.core, sylvester(power) / math.sqrt(power))


def rotation(size: int, kind: Kind = "hadamard", seed: int = 0) -> Orthogonal:
    """A rotation of `size` coordinates, the same for the same seed.

    Args:
        kind: hadamard: randomised Hadamard as far as there is one (see the module's text); orthogonal: uniformly
            random, a dense matrix.
        seed: of the signs and of random matrices.

    Raises:
        CompressError: no such kind, or no coordinates.
    """
    if kind not in KINDS:
        raise CompressError(f"no kind {kind!r} of rotation", "--kind", f"use {' or '.join(KINDS)}")
    if size < 1:
        raise CompressError(f"a rotation of {size} coordinates", "--kind", "there must be one or more")
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (size,), generator=generator).double() - 1
    if kind == "orthogonal":
        return Orthogonal(signs, _haar(size, generator), f"random orthogonal of order {size}")
    order = core_order(size)
    if order is None:
        order = size // (size & -size)
        words = f"random orthogonal of order {order} x Hadamard of order {size // order}"
        return Orthogonal(signs, _haar(order, generator), words)
    core = (torch.ones(1, 1).double() if order == 1 else paley(order)) / math.sqrt(order)
    return Orthogonal(signs, core, f"randomised Hadamard of order {size}")


def core_order(size: int) -> int | None:
    """The smallest order m for which Paley and doublings make a Hadamard matrix of `size`; 1: doublings alone do.

    None if there is none.
    """
    odd = size // (size & -size)
    if odd == 1:
        return 1
    order = 4 * odd
    while size % order == 0:
        if _paley_prime(order) is not None:
            return order
        order *= 2
    return None


def sylvester(order: int) -> Tensor:
    """float64 [order, order] of 1 and -1, for a power of two."""
    assert order & (order - 1) == 0
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def paley(order: int) -> Tensor:
    """float64 [order, order] of 1 and -1 with orthogonal rows (Paley, "On orthogonal matrices", 1933).

    Only for orders that `core_order` returns, but 1.
    """
    prime = _paley_prime(order)
    assert prime is not None
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[torch.arange(prime) ** 2 % prime] = 1.0
    squares[0] = 0.0
    places = torch.arange(prime)
    frame = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    frame[1:, 1:] = squares[(places[:, None] - places) % prime]  # Jacobsthal's matrix
    frame[0, 1:] = 1.0
    eye = torch.eye(prime + 1, dtype=torch.float64)
    if prime % 4 == 3:
        frame[1:, 0] = -1.0
        return frame + eye
    frame[1:, 0] = 1.0
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(frame, two) + torch.kron(eye, other)


def _paley_prime(order: int) -> int | None:
    """The prime behind Paley's matrix of an order, type I before type II; None if there is none."""
    if order % 4 == 0 and _is_prime(order - 1):
        return order - 1
    half = order // 2 - 1
    return half if order % 4 == 0 and half % 4 == 1 and _is_prime(half) else None


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % n for n in range(2, math.isqrt(number) + 1))


def _haar(order: int, generator: torch.Generator) -> Tensor:
    """float64 [order, order], uniform among the orthogonal matrices (Mezzadri 2007)."""
    q, r = torch.linalg.qr(torch.randn(order, order, dtype=torch.float64, generator=generator))
    found: Tensor = q * torch.sign(torch.diagonal(r))
    return found.contiguous()


def _doubled(x: Tensor) -> Tensor:
    """x [..., p] times the normalised Sylvester matrix of order p, a power of two, by the fast Walsh-Hadamard way."""
    shape, power = x.shape, x.shape[-1]
    half = 1
    while half < power:
        pairs = x.reshape(*shape[:-1], power // (2 * half), 2, half)
        a, b = pairs.unbind(-2)
        x = torch.stack([a + b, a - b], -2)
        half *= 2
    return x.reshape(shape) / math.sqrt(power)


def heads_out(weight: Tensor, rows: Tensor, matrix: Orthogonal) -> Tensor:
    """float64: a copy in which the rows of each head are rotated, W_h <- R^T W_h.

    Args:
        weight: [out, in], or a bias [out].
        rows: int64 [heads, width], which rows make a head; no row twice.
    """
    out = weight.double().clone()
    picked = out[rows]
    if weight.dim() == 1:
        out[rows] = matrix.times(picked)
    else:
        out[rows] = matrix.times(picked.transpose(1, 2)).transpose(1, 2)
    return out


def heads_in(weight: Tensor, matrix: Orthogonal) -> Tensor:
    """float64 [out, heads * width]: the columns of each head, which lie together, are rotated: W_h <- W_h R."""
    return matrix.times(weight.reshape(len(weight), -1, matrix.size)).reshape(weight.shape)
