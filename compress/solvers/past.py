"""What a layer's weights should be where its inputs are not those of the original model.

Earlier blocks are compressed, so the layer gets x where the original model's gets x~, and should still make W x~. With
H the mean of x x^T and C that of (x~ - x) x^T, the weights nearest to that are W + W C H^-1 (least squares; GPTAQ, Li
et al. 2025, and Qronos, Zhang et al. 2025, build this into the column loop). C is an estimate from few rows: H^-1 makes
its noise large exactly where inputs are small, and the whole correction can ruin a model. So it is shrunk by what rows
that had no part in it say: of W + t W C H^-1 the held-out error is a parabola in t, whose lowest point within [0, 1] is
taken. Where the correction is noise, t is 0. Only the first layers of a block are corrected (stats.py, `_unfed`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.types import Past


def aimed(weight: Tensor, hessian: Tensor, past: Past, damp_percent: float) -> tuple[Tensor, float]:
    """The weights to round in place of `weight`, and the share t of the correction that was made.

    Args:
        weight: float32 [out, in].
        hessian: float32 [in, in], the mean of x x^T over all rows.
        damp_percent: share of H's mean diagonal added to its diagonal before it is inverted.
    """
    held, share = past.held_hessian, past.share
    seen, seen_cross = ((a - share * b) / (1 - share) for a, b in ((hessian, held), (past.cross, past.held_cross)))
    move = _solved(weight @ seen_cross, seen, damp_percent)
    # E |W x~ - (W + t D) x|^2 = const - 2 t <D, W C> + t^2 <D H, D>, C and H of the held-out rows
    gain = (move * (weight @ past.held_cross)).sum(dtype=torch.float64)
    cost = ((move @ held) * move).sum(dtype=torch.float64)
    t = float(torch.where(cost > 0, gain / cost, torch.zeros_like(gain)).clamp(0, 1))
    if not t:
        return weight, 0.0
    return weight + t * _solved(weight @ past.cross, hessian, damp_percent), t


def _solved(right: Tensor, hessian: Tensor, damp_percent: float) -> Tensor:
    """right (H + damp)^-1, [out, in]."""
    damped = hessian.clone()
    damped.diagonal().add_((damp_percent * hessian.diagonal().mean()).clamp(min=1e-20))
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):  # sums of 16-bit products may miss by more than the damp: then nothing is corrected
        return torch.zeros_like(right)
    return torch.cholesky_solve(right.t(), factor).t()
