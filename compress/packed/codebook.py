"""Learned code books: each row, or each group of columns of a row, has its own 2**bits values. weight = book[code]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from compress import bits as bitpack
from compress.packed.uniform import group_index
from compress.types import Storage, dense_linear


@dataclass(frozen=True)
class Codebook:
    """A linear layer on learned values.

    Attributes:
        codes: uint8 [out, in], in 0 .. 2**bits - 1.
        book: [out, groups, 2**bits] in the dtype of the dequantised weight, rising along the last dimension.
        bits: 2 to 8.
        group_size: columns that share a book, -1 for the whole row; the last group may be shorter.
    """

    kind: ClassVar[str] = "codebook"
    parts: ClassVar[tuple[str, ...]] = ("codes", "book")

    codes: Tensor
    book: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def storage(self) -> Storage:
        return Storage(self.kind, self.bits, self.group_size)

    def dequantize(self) -> Tensor:
        """The entry of each code: [out, in]."""
        out, groups, entries = self.book.shape
        group = group_index(self.shape[1], self.group_size, self.codes.device)
        first = torch.arange(out, device=self.codes.device)[:, None] * groups + group  # of the books, row after row
        index = (first * entries + self.codes).flatten()
        return self.book.flatten().index_select(0, index).reshape(self.codes.shape)

    def rows(self, start: int, stop: int) -> Self:
        return replace(self, codes=self.codes[start:stop], book=self.book[start:stop])

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": bitpack.pack(self.codes, self.bits), "book": self.book}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
    ) -> Self:
        codes = bitpack.unpack(tensors["codes"], storage.bits, shape[1])
        return cls(codes, tensors["book"], storage.bits, storage.group_size)

    @classmethod
    def stored_bytes(cls, storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> int:
        rows, columns = shape
        groups = 1 if storage.group_size == -1 else -(-columns // storage.group_size)
        book: int = groups * 2**storage.bits * dtype.itemsize
        return rows * (4 * bitpack.words(columns, storage.bits) + book)

    def linear(self, x: Tensor) -> Tensor:
        return dense_linear(self, x)
