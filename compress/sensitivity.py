"""How much an error of a layer's output counts, token by token: what it does to what the block makes.

A Hessian that is the mean of x x^T takes all tokens for alike. They are not: what v_proj makes of a row's first token,
which later tokens attend to, may decide more of the block's output than what it makes of all others together. So a
token counts by the square of the slope of the block's output, itself in units of each token's root mean square (the
next norm sees no more), with respect to the layer's output at that token, to the power `_POWER`: of the Gauss-Newton
matrix of the block's relative error, taken as a Kronecker product of a layer's inputs and one number a token (Martens &
Grosse, K-FAC, ICML 2015), the trace, estimated by one backward pass from a random sign in each place of the output
(Hutchinson 1990).
Weighting tokens by what is attended to: Sung et al., RSQ, ICML 2025; by slopes of the model's loss, which take the
whole model: Kim et al., GuidedQuant, ICML 2025. This one needs no more than the block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from compress.blocks import BlockModel, Linear
from compress.repeatable import ordered

#: of the squares: one estimate of a trace is noisy, and the noise of its largest would be what counts
_POWER = 0.75
#: what a sign is multiplied by: slopes of float16 stay clear of its smallest numbers
_LOUD = 64.0


class Shares:
    """The weights of layers with one input, one Hessian, until all of them are there."""

    def __init__(self) -> None:
        self._found: dict[str, list[Tensor]] = {}

    def add(self, group: str, members: int, weights: Tensor) -> Tensor | None:
        """Take a layer's weights, float32 [rows, seq] or [tokens]. Returns the mean of all, with the last: of each row
        what its tokens are among each other, so that layers count alike, and rows; where nothing counts, all do."""
        found = self._found.setdefault(group, [])
        mean = weights.mean(-1, keepdim=True)
        found.append(torch.where(mean > 0, weights / mean, 1.0) if weights.dim() > 1 else weights)
        if len(found) < members:
            return None
        del self._found[group]
        return torch.stack(found).mean(0) if members > 1 else found[0]


class Slopes:
    """Runs a loaded block with gradients, and tells of each watched layer its inputs and what each of them counts.

    Args:
        linears: modules of their own, not slices of fused experts (see `watch`).
        tell: gets a layer's name, its inputs [..., in] and float32 [...], what each counts, up to a factor.
    """

    def __init__(
        self, model: BlockModel, linears: Collection[Linear], tell: Callable[[str, Tensor, Tensor], None]
    ) -> None:
        self._model, self._tell = model, tell
        self._waiting: dict[int, tuple[str, Tensor]] | None = None  # for slopes; None outside of `run`
        self._stack = ExitStack()
        for linear in linears:
            handle = model.module(linear).register_forward_hook(self._after(linear.name))
            self._stack.callback(handle.remove)

    def __enter__(self) -> Slopes:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def _after(self, name: str) -> Callable[[Any, tuple[Any, ...], Tensor], Tensor]:
        return lambda module, args, out: self.watch(name, args[0], out)

    def watch(self, name: str, x: Tensor, out: Tensor) -> Tensor:
        """A layer has made `out` of `x`. Returns what is to go on in its place; outside of `run` that is `out`.

        Raises:
            RuntimeError: the block switches gradients off there.
        """
        if self._waiting is None:
            return out
        if not torch.is_grad_enabled():
            raise RuntimeError(f"{name} computes without gradients")
        if not out.requires_grad:  # no watched layer comes before it: the way back ends here
            out = out.requires_grad_().clone()  # which a block may write into
        number = len(self._waiting)
        self._waiting[number] = name, x.detach()
        out.register_hook(lambda slope: self._reached(number, slope))  # type: ignore[no-untyped-call]
        return out

    def _reached(self, number: int, slope: Tensor) -> None:
        assert self._waiting is not None
        name, x = self._waiting[number]
        self._waiting[number] = name, x[:0]  # told, and its memory free
        with torch.no_grad():
            self._tell(name, x, _mean_square(slope).pow_(_POWER))

    def run(self, block: int, states: Tensor, seq: int, first: int) -> None:
        """Send rows through, and back.

        Args:
            states: [rows, seq, hidden], what enters the block.
            first: number of the first row among all. A row's signs depend on nothing else but the block, so that it
                makes no difference how many rows go together.

        Raises:
            RuntimeError: the block cannot be differentiated, as far as torch or `watch` can tell.
        """
        waiting = self._waiting = {}
        try:
            with ordered(states.device):
                out = self._model.traced(block, states, (len(states), seq))
                if waiting:  # else nothing watched was reached
                    torch.autograd.backward([out], [_signs(out.detach(), block, first)])
            for name, x in waiting.values():  # what decides without a slope, as a choice does: all alike
                if x.numel():
                    self._tell(name, x, x.new_ones(x.shape[:-1], dtype=torch.float32))
        finally:
            waiting.clear()  # the graph's hooks know this
            self._waiting = None


def _mean_square(x: Tensor) -> Tensor:
    """float32 [...] of [..., n]: in one pass, without a float32 copy."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norm.float().square_().div_(x.shape[-1])


def _signs(output: Tensor, block: int, first: int) -> Tensor:
    """Random signs [rows, seq, hidden] over each token's root mean square."""
    unit = _mean_square(output)[..., None].clamp_(min=1e-12).rsqrt_().mul_(_LOUD)
    signs = torch.empty_like(output)
    generator = torch.Generator(output.device)
    for i, row in enumerate(signs):
        generator.manual_seed(block << 32 | (first + i))
        row.bernoulli_(0.5, generator=generator)
    return signs.mul_(2).sub_(1).mul_(unit)
