"""2:4-pruned layers with plain values, by cuSPARSELt through torch: the operator `compress::pruned_linear`.

Where cuSPARSELt is not to be had it is a dense product. Seen with torch 2.11 and CUDA 13 on an H100: its search for the
best algorithm ends in an illegal instruction if it is to transpose the result, so results are transposed here.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.cuda.pruned import TWO_OF_FOUR, kept_of, spread, two_of_four
from compress.packed.dense import Dense
from compress.packed.sparse import Sparse, pack_mask, unpack_mask
from compress.types import Packed, Storage

library: Any = torch.library.Library("compress", "FRAGMENT")  # type: ignore[no-untyped-call]
library.define("pruned_linear(Tensor x, Tensor weight, bool compressed, int rows) -> Tensor")


@dataclass(frozen=True)
class PrunedValues:
    """2:4 with values as they are, a `compress.fast.Kernel`.

    Attributes:
        weight: what cuSPARSELt made of it; [rows, columns] where it has no product for that.
        mask: as stored, int32 [rows, words].
        kept: [rows, columns / 2], where `weight` is cuSPARSELt's and does not begin with these (as it does, unless a
            kept weight is 0: then it may list other zeros).
        compressed: whether `weight` is cuSPARSELt's.
        rows, columns: of the layer.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)

    weight: Tensor
    mask: Tensor
    kept: Tensor | None
    compressed: bool
    rows: int
    columns: int

    @staticmethod
    def why_not(storage: Storage, shape: tuple[int, int]) -> str | None:
        inner = storage.inner
        plain = inner is not None and inner.kind == Dense.kind and two_of_four(storage)
        return None if plain else "not plain values pruned 2:4"

    @classmethod
    def of(cls, packed: Packed) -> Self:
        assert isinstance(packed, Sparse)
        assert isinstance(packed.inner, Dense)
        values, mask = packed.inner.values, pack_mask(packed.mask, TWO_OF_FOUR)
        rows, columns = values.shape
        if not compressible(values):
            return cls(values, mask, None, False, rows, columns)
        weight = torch._cslt_compress(values.contiguous())
        kept = kept_of(values, packed.mask)
        listed = torch.equal(_first(weight, rows, columns).view(torch.int16), kept.view(torch.int16))  # bit for bit
        return cls(weight, mask, None if listed else kept, True, rows, columns)

    def linear(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            dense = self.restore().inner.dequantize() if self.compressed else self.weight
            return F.linear(x, dense.to(x.dtype))
        out: Tensor = torch.ops.compress.pruned_linear(x, self.weight, self.compressed, self.rows)
        return out

    def restore(self) -> Sparse:
        mask = unpack_mask(self.mask, TWO_OF_FOUR, self.columns)
        if not self.compressed:
            return Sparse(mask, Dense(self.weight), TWO_OF_FOUR)
        kept = _first(self.weight, self.rows, self.columns) if self.kept is None else self.kept
        values = torch.zeros_like(mask, dtype=kept.dtype)
        spread(kept, mask, values)
        return Sparse(mask, Dense(values), TWO_OF_FOUR)

    def tensors(self) -> dict[str, Tensor]:
        return {n: t for n, t in (("weight", self.weight), ("mask", self.mask), ("kept", self.kept)) if t is not None}


def compressible(values: Tensor) -> bool:
    """Whether cuSPARSELt is there and takes such a weight; its sizes are multiples of 16, as torch has it, too."""
    fits = values.dtype in PrunedValues.dtypes and values.numel() > 0 and all(n % 16 == 0 for n in values.shape)
    return fits and values.is_cuda and torch.backends.cusparselt.is_available()


def _first(weight: Tensor, rows: int, columns: int) -> Tensor:
    """[rows, columns / 2]: where cuSPARSELt stores what is kept."""
    return weight.flatten()[: rows * columns // 2].view(rows, columns // 2)


#: cuSPARSELt's algorithm by rows, columns, tokens (rounded up), dtype and device: what it found to be the quickest
algorithms: dict[tuple[int, int, int, torch.dtype, int], int] = {}


def search(weight: Tensor, x: Tensor) -> int:
    """The quickest algorithm for weight [rows, columns] times x [columns, tokens], whose result is not transposed."""
    with warnings.catch_warnings():  # torch 2.11 warns that the function will move
        warnings.filterwarnings("ignore", "torch._cslt_sparse_mm_search is deprecated")
        return torch._cslt_sparse_mm_search(weight, x)


def _algorithm(weight: Tensor, x: Tensor, rows: int) -> int:
    """Searched for the first time (milliseconds), but not while a graph is captured: there an unknown one is the
    default."""
    tokens, columns = x.shape
    key = rows, columns, 1 << (tokens - 1).bit_length(), x.dtype, x.get_device()
    if key not in algorithms:
        if torch.cuda.is_current_stream_capturing():
            return 0
        algorithms[key] = search(weight, x.t())
    return algorithms[key]


def _pruned_linear_cuda(x: Tensor, weight: Tensor, compressed: bool, rows: int) -> Tensor:
    if not compressed:
        return F.linear(x, weight)
    flat = x.reshape(-1, x.shape[-1])
    if not len(flat):
        return x.new_empty(*x.shape[:-1], rows)
    fill = -len(flat) % 8
    padded = (F.pad(flat, (0, 0, 0, fill)) if fill else flat).contiguous()
    found = _algorithm(weight, padded, rows)
    out = torch._cslt_sparse_mm(weight, padded.t(), alg_id=found).t().contiguous()  # [tokens, rows]
    return out[: len(flat)].reshape(*x.shape[:-1], rows)


def _pruned_linear_shape(x: Tensor, weight: Tensor, compressed: bool, rows: int) -> Tensor:
    out: Tensor = x.new_empty(*x.shape[:-1], rows)
    return out


def _pruned_linear_plain(x: Tensor, weight: Tensor, compressed: bool, rows: int) -> Tensor:
    assert not compressed, "cuSPARSELt's form is for CUDA devices"
    return F.linear(x, weight)


library.impl("pruned_linear", _pruned_linear_cuda, "CUDA")
library.impl("pruned_linear", _pruned_linear_plain, "CPU")
torch.library.register_fake("compress::pruned_linear", _pruned_linear_shape, lib=library)
