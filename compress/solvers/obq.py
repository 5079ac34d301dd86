"""OBQ (Frantar, Singh, Alistarh: "Optimal Brain Compression", NeurIPS 2022), the method that GPTQ made fast.

Each row quantises its weights greedily: next is the weight whose rounding costs least, (q_i - w_i)^2 / [F^-1]_ii with F
the Hessian of the weights that are still free (equation 7); the free ones move to make up for it, and i leaves F^-1 by
one step of Gaussian elimination (equation 4). A row costs in^3, so this is a reference for small layers: what GPTQ's
fixed order gives up (section 4 of its paper, figure 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress import grid

#: elements of all inverse Hessians that are held at once
_CHUNK = 1 << 26


def sweep(target: Tensor, damped: Tensor, scale: Tensor, low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels in OBQ's greedy order.

    Args:
        target: float32 [out, in], the weights.
        damped: float32 [in, in], the damped Hessian.
        scale, low, high: float32 [out, in], the grid of each weight.
        dtype: dequantised weights are rounded to it.

    Returns:
        float32 [out, in], the levels.
    """
    inverse = torch.linalg.inv(damped.double())
    rows = max(1, _CHUNK // damped.numel())
    parts = []
    for i in range(0, len(target), rows):
        mine = slice(i, i + rows)
        parts.append(_rows(target[mine], scale[mine], low[mine], high[mine], inverse, dtype))
    return torch.cat(parts)


def _rows(target: Tensor, scale: Tensor, low: Tensor, high: Tensor, inverse: Tensor, dtype: torch.dtype) -> Tensor:
    w = target.double()
    levels = torch.empty_like(target)
    free = torch.ones_like(target, dtype=torch.bool)
    f = inverse.expand(len(w), -1, -1).clone()  # [rows, in, in]
    row = torch.arange(len(w), device=w.device)
    for _ in range(w.shape[1]):
        k = grid.nearest(w.float(), scale, low, high)
        error = grid.value(k, scale, dtype).double() - w
        cost = torch.where(free, error.square() / f.diagonal(dim1=1, dim2=2), torch.inf)
        i = cost.argmin(1)
        levels[row, i] = k[row, i]
        column = f[row, :, i]  # [rows, in]
        pivot = column[row, i]
        w += column * (error[row, i] / pivot)[:, None] * free
        f -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        free[row, i] = False
    return levels
