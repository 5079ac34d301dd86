"""A Llama for decoding: four products a block, and between them as few small kernels as torch.compile makes.

It computes what transformers' LlamaForCausalLM does, with q, k and v in one product, gate and up in another. What lies
between the products are functions of tensors alone (`Parts`). Compiled, each serves all blocks of all kinds of layers:
they know nothing of modules or layers, whose kernels no compiler would fuse with anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5
THETA = 10000.0


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama; those of Llama-2-7B."""

    layers: int = 32
    hidden: int = 4096
    intermediate: int = 11008
    heads: int = 32
    vocabulary: int = 32000


@dataclass(frozen=True)
class Cache:
    """What attention reads and writes, in place.

    Attributes:
        keys: a block: [batch, heads, length, size].
        values: a block: [batch, heads, size, length], in the order in which a step sums them up.
        turns: float32 [length, 2, size], cosine and sine of each position, see `turned`.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    turns: Tensor


@dataclass(frozen=True)
class Parts:
    """What lies between the products; `STEP` has the signatures."""

    norm: Callable[[Tensor, Tensor], Tensor]
    add: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gate: Callable[[Tensor], Tensor]


class Block(nn.Module):
    """The weights of a decoder block."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.attention_norm = nn.Parameter(torch.ones(model.hidden))
        self.qkv = nn.Linear(model.hidden, 3 * model.hidden, bias=False)
        self.out = nn.Linear(model.hidden, model.hidden, bias=False)
        self.mlp_norm = nn.Parameter(torch.ones(model.hidden))
        self.gate_up = nn.Linear(model.hidden, 2 * model.intermediate, bias=False)
        self.down = nn.Linear(model.intermediate, model.hidden, bias=False)


class Llama(nn.Module):
    """Linear layers may be put in the place of those of the blocks."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.embedding = nn.Embedding(model.vocabulary, model.hidden)
        self.blocks: Any = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = nn.Parameter(torch.ones(model.hidden))
        self.lm_head = nn.Linear(model.hidden, model.vocabulary, bias=False)

    def cache(self, batch: int, length: int) -> Cache:
        """Room for so many sequences of so many tokens."""
        like, heads, size = self.embedding.weight, self.model.heads, self.model.hidden // self.model.heads
        keys = tuple(like.new_zeros(batch, heads, length, size) for _ in self.blocks)
        values = tuple(like.new_zeros(batch, heads, size, length) for _ in self.blocks)
        return Cache(keys, values, turns(length, size).to(like.device))

    def forward(self, tokens: Tensor, positions: Tensor, cache: Cache, parts: Parts) -> Tensor:
        """Logits [batch, vocabulary] behind the last token.

        Args:
            tokens: [batch, n].
            positions: [n], theirs; on the device, where they stay.
            cache: knows the tokens before, and then these.
            parts: `PROMPT` for tokens from position 0 on, `STEP` or what `compiled` gives for one token.
        """
        turn = cache.turns.index_select(0, positions)
        after = [*(block.attention_norm for block in self.blocks), self.norm]
        x = self.embedding(tokens.flatten())  # [batch * n, hidden]
        normed = parts.norm(x, after[0])
        for block, keys, values, norm in zip(self.blocks, cache.keys, cache.values, after[1:], strict=True):
            seen = parts.attend(block.qkv(normed), turn, positions, keys, values)
            x, normed = parts.add(x, block.out(seen), block.mlp_norm)
            x, normed = parts.add(x, block.down(parts.gate(block.gate_up(normed))), norm)
        count = tokens.shape[1]
        logits: Tensor = self.lm_head(normed[count - 1 :: count])
        return logits


def turns(length: int, size: int) -> Tensor:
    """float32 [length, 2, size]: `Cache.turns`."""
    speeds = THETA ** -(torch.arange(0, size, 2).float() / size)
    angles = torch.arange(length).float()[:, None] * speeds  # [length, size / 2]
    cosine, sine = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)], 1)


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding: x [..., n, size] turned by [n, 2, size], in float32. Pairs are half a size apart."""
    x, (cosine, sine) = x.float(), turn.unbind(1)
    swapped: Tensor = torch.unflatten(x, -1, (2, -1)).flip(-2).flatten(-2)  # the halves
    return x * cosine + swapped * sine


def normalised(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm of x [rows, hidden], in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def added(x: Tensor, more: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual sum [rows, hidden], and that normalised."""
    x = x + more
    return x, normalised(x, weight)


def gated(both: Tensor) -> Tensor:
    """Gates and what they let through [rows, 2 * intermediate] -> [rows, intermediate]"""
    gate, up = both.chunk(2, -1)
    return F.silu(gate) * up


def kept(qkv: Tensor, turn: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, heads, n, size] of n new tokens; the keys and values are in the cache now.

    Args:
        qkv: [batch * n, 3 * hidden].
        turn: float32 [n, 2, size].
        positions: [n].
        keys, values: a block's, of the cache.
    """
    batch, heads, _, size = keys.shape
    q, k, v = qkv.reshape(batch, -1, 3, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = turned(q, turn), turned(k, turn).to(keys.dtype)
    keys.index_copy_(2, positions, k)
    values.index_copy_(3, positions, v.mT)
    return q, k, v


def prompted(qkv: Tensor, turn: Tensor, positions: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention [batch * n, hidden] of n tokens from position 0 on to one another, by torch's kernels."""
    q, k, v = kept(qkv, turn, positions, keys, values)
    out = F.scaled_dot_product_attention(q.to(k.dtype), k, v, is_causal=True)
    return out.transpose(1, 2).reshape(len(qkv), -1)


def stepped(qkv: Tensor, turn: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention [batch, hidden] of one token to all until itself: sums in float32 that a compiler makes three kernels
    of, where torch's attention has one block of threads a head."""
    q, _, _ = kept(qkv, turn, position, keys, values)
    length, size = keys.shape[2:]
    scores = (q * size**-0.5 * keys.float()).sum(-1)  # [batch, heads, length]
    scores = scores.masked_fill(torch.arange(length, device=keys.device) > position, float("-inf"))
    spread = scores.unsqueeze(2).expand_as(values)  # a softmax for each sum, all alike: so they are one kernel
    shares = (spread - spread.amax(-1, keepdim=True)).exp()
    out: Tensor = (shares * values.float()).sum(-1) / shares.sum(-1)
    return out.to(qkv.dtype).flatten(1)


PROMPT = Parts(normalised, added, prompted, gated)
STEP = Parts(normalised, added, stepped, gated)


@functools.cache
def compiled(backend: Any = "inductor") -> Parts:
    """`STEP` by torch.compile, a graph for each function and batch; raises where it is called if it cannot be."""
    options: dict[str, Any] | None = None
    if backend == "inductor":
        # keys and values read nothing in common but the position, 8 bytes: by default too little to be one kernel
        options = {"score_fusion_memory_threshold": 8}
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0):
            options["triton.enable_pdl"] = True  # the next kernel is launched while one runs
    made = functools.partial(torch.compile, backend=backend, dynamic=False, fullgraph=True, options=options)
    return Parts(made(normalised), made(added), made(stepped), made(gated))
