"""The 8-bit matrix product: activations quantised as they come, int8 x int8 summed in 32-bit integers, then scaled.

With x = sx (xq - zx) for each row of X and w = sw (wq - zw) for each output channel, the product of one row and one
channel over K features is

    sx sw (sum xq wq - zx sum wq - zw sum xq + K zx zw)

(Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
eq. 7; the unrolled form of Dettmers et al. 2022, "LLM.int8()", section 2.1). The bracket is an exact integer, so it
depends on no order of summation, no batch and no device; only the scales are applied in float32.

Scales of activations are never shared by two sequences: a result does not change with the batch it is computed in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

#: how activations may be quantised, in the words of `Storage.activations`
MODES = ("token", "tensor", "token_zeropoint", "tensor_zeropoint")

#: (xq - zx)(wq - zw) is at most 255**2, so this many of them fit in 31 bits; longer rows are summed in pieces
_SAFE_COLUMNS = 32768
#: a float32 holds every sum of this many products of two int8 exactly: 1024 * 128**2 = 2**24
_EXACT_IN_FLOAT = 1024


def quantise(x: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantise activations to 8 bits on the fly.

    "token": a scale a row of the last dimension. "tensor": a scale a sequence, over the last two dimensions; x of two
    dimensions or one is a single sequence. Both are absmax: scale = max|x| / 127, codes -127 .. 127. With "_zeropoint"
    the grid is affine: scale = (max - min) / 255 with 0 in the range and exactly on the grid, codes -128 .. 127.

    Args:
        x: [..., in], any float dtype; computed in float32.
        mode: one of `MODES`.

    Returns:
        codes int8 [..., in], scale float32 [..., 1], zero point int32 [..., 1] (None for absmax); the last two
        broadcast against x. A row of zeros has scale 1 and gives zeros; a NaN in a row makes its scale NaN.
    """
    assert mode in MODES, mode
    grain, _, affine = mode.partition("_")
    x = x.float()
    over = tuple(range(-min(x.dim(), 2), 0)) if grain == "tensor" else (-1,)
    if not affine:
        scale = _no_zero(x.abs().amax(over, keepdim=True) / 127)
        return torch.round(x / scale).clamp_(-127, 127).to(torch.int8), scale, None
    low = x.amin(over, keepdim=True).clamp_(max=0.0)
    high = x.amax(over, keepdim=True).clamp_(min=0.0)
    scale = _no_zero(high / 255 - low / 255)
    zero = torch.round(-low / scale).clamp_(0, 255) - 128
    codes = torch.round(x / scale).add_(zero).clamp_(-128, 127).to(torch.int8)
    return codes, scale, zero.to(torch.int32)


def _no_zero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def int_mm(x: Tensor, w: Tensor) -> Tensor:
    """int8 [M, K] times int8 [N, K] transposed, exact: int32 [M, N], for K up to 131071.

    torch._int_mm, with zeros added where it wants another shape: on CUDA it takes more than 16 rows and multiples of 8;
    on a CPU it never writes its result where K is 1 (torch 2.13). A CPU without AVX-512 has only a scalar loop behind
    it; there exact float32 products of short pieces are far faster.
    """
    cuda = x.device.type == "cuda"
    if not cuda and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return float_mm(x, w)
    rows, outputs, more = len(x), len(w), -x.shape[1] % 8
    x = _padded(x, max(24 - rows, -rows % 8) if cuda else 0, more)
    w = _padded(w, -outputs % 8 if cuda else 0, more)
    return torch._int_mm(x, w.t())[:rows, :outputs]


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """x with zeros below and to its right, contiguous."""
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x.contiguous()


def float_mm(x: Tensor, w: Tensor) -> Tensor:
    """`int_mm` by float32 products of so few columns at a time that every sum is exact."""
    total = torch.zeros(len(x), len(w), dtype=torch.int32, device=x.device)
    for start in range(0, x.shape[1], _EXACT_IN_FLOAT):
        part = slice(start, start + _EXACT_IN_FLOAT)
        total += (x[:, part].float() @ w[:, part].float().t()).to(torch.int32)
    return total


def product(x: Tensor, x_zero: Tensor | None, w: Tensor, w_zero: Tensor | None) -> Tensor:
    """sum over k of (x[m, k] - x_zero[m]) (w[n, k] - w_zero[n]), exact.

    Args:
        x: int8 [M, K].
        x_zero: int32 [M, 1], or None for zeros.
        w: int8 [N, K].
        w_zero: int32 [N], or None for zeros.

    Returns:
        int32 [M, N]; int64 where K is above 32768, since int32 could overflow.
    """
    total = _unrolled(x[:, :_SAFE_COLUMNS], x_zero, w[:, :_SAFE_COLUMNS], w_zero)
    for start in range(_SAFE_COLUMNS, x.shape[1], _SAFE_COLUMNS):
        part = slice(start, start + _SAFE_COLUMNS)
        total = total.to(torch.int64) + _unrolled(x[:, part], x_zero, w[:, part], w_zero)
    return total


def _unrolled(x: Tensor, x_zero: Tensor | None, w: Tensor, w_zero: Tensor | None) -> Tensor:
    total = int_mm(x, w)
    if x_zero is not None:
        total = total - x_zero * w.sum(1, dtype=torch.int32)
    if w_zero is not None:
        total = total - w_zero * x.sum(1, keepdim=True, dtype=torch.int32)
    if x_zero is not None and w_zero is not None:
        total = total + x.shape[1] * x_zero * w_zero
    return total


def linear(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, mode: str) -> Tensor:
    """x W^T with both sides in 8 bits.

    Args:
        x: [..., in], any float dtype.
        codes: uint8 [out, in], the weight's codes; the symmetric grid's zero is 128.
        scales: [out], any float dtype.
        zeros: uint8 [out], or None for the symmetric grid.
        mode: one of `MODES`.

    Returns:
        [..., out] in x's dtype.
    """
    xq, x_scale, x_zero = quantise(x, mode)
    per_row = (*x.shape[:-1], 1)
    x_scale = x_scale.expand(per_row).reshape(-1, 1)
    if x_zero is not None:
        x_zero = x_zero.expand(per_row).reshape(-1, 1)
    w = (codes ^ 128).view(torch.int8)  # code - 128
    w_zero = None if zeros is None else zeros.to(torch.int32) - 128
    total = product(xq.reshape(-1, x.shape[-1]), x_zero, w, w_zero)
    out = (total.float() * x_scale).mul_(scales.float())
    return out.to(x.dtype).reshape(*x.shape[:-1], len(codes))
