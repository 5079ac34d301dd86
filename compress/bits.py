"""Small unsigned integers <-> 32-bit words: one packer for every format.

Layout: a little-endian bit string; element i of a row occupies bits i*b .. i*b+b-1. For 2, 4 and 8 bits no element
crosses a word; for 3, 5, 6 and 7 bits some do ("dense"). This is compressed-tensors' layout (0.18 and later) along a
row, and GPTQ's along a column.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def words(count: int, bits: int) -> int:
    """How many 32-bit words hold `count` elements of `bits` bits."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension.

    Args:
        codes: uint8 [..., n], each below 2**bits.
        bits: 1 to 8.

    Returns:
        int32 [..., ceil(n * bits / 32)]; unused high bits of the last word are zero.
    """
    n = codes.shape[-1]
    padded = F.pad(codes, (0, words(n, bits) * 32 // bits + 8 - n))  # enough zeros for any width's last word
    if 8 % bits == 0:
        each = 8 // bits
        padded = padded[..., : words(n, bits) * 4 * each]
        packed = padded[..., 0::each].clone()
        for k in range(1, each):
            packed |= padded[..., k::each] << (k * bits)
    else:
        eights = -(-n // 8)  # 8 elements fill exactly `bits` bytes
        padded = F.pad(codes, (0, eights * 8 - n)).reshape(*codes.shape[:-1], eights, 8)
        gathered = padded[..., 0].to(torch.int64)
        for k in range(1, 8):
            gathered |= padded[..., k].to(torch.int64) << (k * bits)
        packed = gathered.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
        packed = F.pad(packed, (0, max(0, words(n, bits) * 4 - packed.shape[-1])))[..., : words(n, bits) * 4]
    return _plain(packed).view(torch.int32)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Exact inverse of `pack`: int32 [..., words] -> uint8 [..., count].

    Raises:
        ValueError: the words do not hold exactly `count` elements.
    """
    if packed.shape[-1] != words(count, bits):
        raise ValueError(f"{packed.shape[-1]} words cannot hold {count} elements of {bits} bits")
    raw = _plain(packed).view(torch.uint8)
    mask = (1 << bits) - 1
    if 8 % bits == 0:
        parts = [(raw >> (k * bits)) & mask for k in range(8 // bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :count].contiguous()
    eights = -(-count // 8)
    raw = F.pad(raw, (0, max(0, eights * bits - raw.shape[-1])))[..., : eights * bits]
    wide = F.pad(raw.reshape(*raw.shape[:-1], eights, bits), (0, 8 - bits)).contiguous().view(torch.int64)
    parts = [((wide >> (k * bits)) & mask).to(torch.uint8) for k in range(8)]
    return torch.cat(parts, dim=-1).flatten(-2)[..., :count].contiguous()


def _plain(x: Tensor) -> Tensor:
    """A copy with plain strides: `contiguous` keeps odd ones on dimensions of size 1, and then `view` refuses."""
    return x.clone(memory_format=torch.contiguous_format)
