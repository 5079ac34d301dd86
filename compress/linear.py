"""Computing with packed weights: a linear layer that stays packed, and the forward of layers with quantised inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd, lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from compress import bits as bitpack
from compress import fast
from compress.packed import KINDS
from compress.packed.bilevel import BiLevel, Statistic
from compress.packed.blockwise import Blockwise
from compress.packed.outlier_columns import OutlierColumns
from compress.packed.outliers import Outliers
from compress.packed.sparse import Sparse
from compress.types import Packed, Storage

#: bytes of a dense weight that may exist at once; a larger layer is multiplied by runs of its output rows
BUDGET = 1 << 28
#: weights that are unpacked at once: on a CPU what stays in its caches, on a GPU what fills it
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 25

#: parts whose first dimension runs over the output rows, in the kinds of `_SLICED`
_ROW_PARTS = ("codes", "scales", "zeros", "book", "values", "outlier_weight", "mask", "kept", "minima")
_SLICED = ("uniform", "affine", "codebook", "dense", "outlier_columns", "sparse")


def install(module: nn.Module, packed: Packed) -> None:
    """Let a linear module (nn.Linear, Conv1D) compute with its packed weight. Undone by `remove`.

    Where gradients are asked for, it computes with its dense weight: rounded inputs have none.
    """

    def forward(x: Tensor) -> Tensor:
        if x.requires_grad:
            dense: Tensor = type(module).forward(module, x)
            return dense
        out = packed.linear(x)
        bias = module.bias
        return out if bias is None else out + bias.to(out.dtype)  # type: ignore[operator]

    module.forward = forward


def remove(module: nn.Module) -> None:
    """Give a module its own forward back."""
    module.__dict__.pop("forward", None)


class Experts(TorchFunctionMode):
    """While it is active, F.linear on a slice of a fused experts tensor computes with the packed weights of that slice.

    Args:
        packed: for each fused parameter [experts, out, in] its packed slices, by expert, each with its first row.
    """

    def __init__(self, packed: Sequence[tuple[Tensor, Mapping[int, list[tuple[int, Packed]]]]]) -> None:
        super().__init__()
        self._ranges = [
            (data.data_ptr(), data[0].numel() * data.element_size(), len(data), slices) for data, slices in packed
        ]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            weight = args[1] if len(args) > 1 else (kwargs or {})["weight"]
            for start, step, count, slices in self._ranges:
                index, inside = divmod(weight.data_ptr() - start, step)
                if inside == 0 and 0 <= index < count and index in slices:
                    return self._compute(args, kwargs or {}, slices[index])
        return func(*args, **(kwargs or {}))

    def _compute(self, args: tuple[Any, ...], kwargs: dict[str, Any], slices: list[tuple[int, Packed]]) -> Tensor:
        """Rows of a slice that no packed weight covers (a projection left dense) come from the dense weight."""
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        x, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        out = F.linear(x, weight)
        for first, packed in () if x.requires_grad else slices:
            out[..., first : first + packed.shape[0]] = packed.linear(x)
        return out if bias is None else out + bias


class PackedLinear(nn.Module):
    """A linear layer that keeps its weight packed, in place of an nn.Linear or a Conv1D.

    Its buffers are the stored tensors, by their names in `Packed.tensors`, so it moves between devices and has a
    state_dict like any module; a change of dtype leaves them as they are and changes the bias alone. Where a kernel of
    `compress.cpu` or `compress.cuda` takes the layer, its layout replaces these buffers when a first input comes that
    it takes, and they come back for a state_dict, another device or another dtype.

    Without such a kernel the output is, bit for bit, `Packed.linear` plus the bias. The weight is unpacked a few rows
    at a time; a layer whose dense weight is above `BUDGET` is also multiplied by runs of rows, which may sum in
    another order.

    Args:
        tensors: `Packed.tensors`; on meta for a layer that is filled later.
        storage: of the packed weight.
        shape: (out_features, in_features).
        dtype: of the dequantised weight.
        bias: [out], or None.
        transposed: it takes the place of a Conv1D, which kept its weight as [in, out].
        kernels: use the kernels of `compress.cpu` and `compress.cuda`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        storage: Storage,
        shape: tuple[int, int],
        dtype: torch.dtype,
        bias: Tensor | None = None,
        transposed: bool = False,
        kernels: bool = True,
    ) -> None:
        super().__init__()
        self.storage = storage
        self.out_features, self.in_features = shape
        self.dtype = dtype
        self.transposed = transposed
        self.kernels = kernels
        self._kernel: fast.Kernel | None = None
        self._refused: type[fast.Kernel] | None = None  # a kernel that does not take these tensors
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self._parts = tuple(tensors)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    @classmethod
    def of(
        cls,
        packed: Packed,
        dtype: torch.dtype | None = None,
        bias: Tensor | None = None,
        transposed: bool = False,
        kernels: bool = True,
    ) -> PackedLinear:
        """The layer of a packed weight. dtype: of the dequantised weight, None to find out."""
        found = packed.dequantize().dtype if dtype is None else dtype
        return cls(packed.tensors(), packed.storage, packed.shape, found, bias, transposed, kernels)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)"""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module held it, made anew each time: for model code that looks at it."""
        dense = self.dense(self.dtype)
        return dense.t() if self.transposed else dense

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes now, in whichever layout."""
        return sum(t.numel() * t.element_size() for t in self._buffers.values() if t is not None)

    def packed(self) -> Packed:
        """The packed weight."""
        if self._kernel is not None:
            return self._kernel.restore()
        return KINDS[self.storage.kind].from_tensors(self._stored(), self.storage, self.shape, self.dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantised weight [out, in], unpacked by a few rows at a time."""
        rows = self._reader()
        return self.packed().dequantize().to(dtype) if rows is None else self._dense(rows, 0, self.out_features, dtype)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self._layout(x)
        out = self._product(x) if kernel is None else kernel.linear(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def computes_packed(self, x: Tensor) -> bool:
        """Whether the product with x is anything else than one with the dense weight."""
        if self.storage.activations or self.storage.kind == OutlierColumns.kind:
            return True
        return self._layout(x) is not None

    def extra_repr(self) -> str:
        s = self.storage
        group = f", group_size={s.group_size}" if s.group_size != -1 else ""
        inputs = f", activations={s.activations}" if s.activations else ""
        size = f"{self.weight_bytes} bytes, {8 * self.weight_bytes / self.out_features / self.in_features:.2f} a weight"
        kernel = f", {type(self._kernel).__name__}" if self._kernel is not None else ""
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {s.kind}, bits={s.bits}"
            f"{group}{inputs}, {size}{kernel}"
        )

    # -- layouts ------------------------------------------------------------------------------------------------

    def prepare(self, dtype: torch.dtype) -> None:
        """Take the layout now that inputs of this dtype will want, rather than with the first of them."""
        self._layout(torch.empty(0, dtype=dtype, device=self._device))

    def _layout(self, x: Tensor) -> fast.Kernel | None:
        """The kernel for this input, with its layout in place; None with the stored one in place."""
        if self._kernel is None:
            kind = fast.find(self.storage, self.shape, x.device) if self.kernels else None
            if kind is None or kind is self._refused or (kind.dtypes and x.dtype not in kind.dtypes):
                return None
            made = kind.of(self.packed())
            if made is None:
                self._refused = kind
                return None
            self._clear()
            for name, tensor in made.tensors().items():
                self.register_buffer(f"kernel_{name}", tensor, persistent=False)
            self._kernel = made
        elif x.device != self._device or (self._kernel.dtypes and x.dtype not in self._kernel.dtypes):
            self._restore()
        return self._kernel

    @property
    def _device(self) -> torch.device:
        return next((t.device for t in self._buffers.values() if t is not None), torch.device("cpu"))

    def _restore(self) -> None:
        """Put the stored tensors back in place of a kernel's."""
        if self._kernel is not None:
            tensors = self._kernel.restore().tensors()
            self._clear()
            self._kernel = None
            for name in self._parts:
                self.register_buffer(name, tensors[name])

    def _clear(self) -> None:
        for name in list(self._buffers):
            delattr(self, name)

    def _stored(self) -> dict[str, Tensor]:
        if self._kernel is not None:
            return self._kernel.restore().tensors()
        return {name: getattr(self, name) for name in self._parts}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Moves the packed tensors without changing their dtype: `to`, `cuda`, `half`, `to_empty` come through here."""
        if (
            self._kernel is not None
            and fn(torch.empty(0, dtype=torch.uint8, device=self._device)).device != self._device
        ):
            self._restore()
        buffers, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers = buffers
        for name, tensor in buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._kernel is not None:
            destination.update({prefix + name: tensor for name, tensor in self._stored().items()})

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    # -- the product --------------------------------------------------------------------------------------------

    def _product(self, x: Tensor) -> Tensor:
        """x W^T without a kernel."""
        rows = self._reader()
        if rows is None:
            return self.packed().linear(x)
        runs = list(self._runs(rows, BUDGET // (self.in_features * x.element_size())))
        parts = [self._run(x, rows, *run) for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _run(self, x: Tensor, rows: Rows, start: int, stop: int) -> Tensor:
        if self.storage.activations or self.storage.kind == OutlierColumns.kind:  # its own product, not a dense one
            return rows.read(start, stop).linear(x)
        return F.linear(x, self._dense(rows, start, stop, x.dtype))

    def _dense(self, rows: Rows, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """float [stop - start, in]: those rows, dequantised."""
        dense = torch.empty(stop - start, self.in_features, dtype=dtype, device=self._device)
        at_once = _AT_ONCE.get(self._device.type, _AT_ONCE_ELSEWHERE) // self.in_features
        for first, last in self._runs(rows, at_once, start, stop):
            part = rows.read(first, last)
            part = part.inner if isinstance(part, Sparse) else part  # which would prove its zeros each time
            dense[first - start : last - start] = part.dequantize()
        return dense

    def _runs(self, rows: Rows, count: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Runs of about `count` rows, each beginning where one may."""
        stop = self.out_features if stop is None else stop
        step = max(rows.unit, count // rows.unit * rows.unit)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def _reader(self) -> Rows | None:
        """How to unpack some of its rows alone; None for a kind that must be unpacked whole."""
        return None if self._kernel is not None else reader(self._stored(), self.storage, self.shape, self.dtype)


class Rows:
    """Reads runs of output rows out of stored tensors.

    Args:
        unit: runs begin at multiples of it.
        read: (start, stop) -> the layer made of these rows.
    """

    def __init__(self, unit: int, read: Callable[[int, int], Packed]) -> None:
        self.unit = unit
        self.read = read


def reader(tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> Rows | None:
    """`Rows` of the tensors of a kind, None where its rows cannot be told apart before they are unpacked.

    The rows that it reads are those of `Packed.rows`; what is small beside the codes is unpacked here, once.
    """
    columns = shape[1]
    if storage.kind in _SLICED and (storage.kind != Sparse.kind or dict(storage.details).get("m")):
        kind = KINDS[storage.kind]

        def sliced(start: int, stop: int) -> Packed:
            part = {n: t[start:stop] if n in _ROW_PARTS else t for n, t in tensors.items()}
            return kind.from_tensors(part, storage, (stop - start, columns), dtype)

        return Rows(1, sliced)
    if storage.kind == Blockwise.kind:
        return _blockwise(tensors, storage, shape, dtype)
    if storage.kind == BiLevel.kind:
        return _bilevel(tensors, storage, shape, dtype)
    if storage.kind == Outliers.kind and storage.inner is not None:
        inside = reader({n: t for n, t in tensors.items() if n not in Outliers.parts}, storage.inner, shape, dtype)
        pointers = tensors["outlier_rows"].tolist()

        def outliers(start: int, stop: int) -> Packed:
            assert inside is not None
            first, last = pointers[start], pointers[stop]
            own = (tensors["outlier_cols"][first:last], tensors["outlier_values"][first:last])
            return Outliers(inside.read(start, stop), tensors["outlier_rows"][start : stop + 1] - first, *own)

        return None if inside is None else Rows(inside.unit, outliers)
    return None


def _blockwise(
    tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype
) -> Rows | None:
    """Runs of rows that begin between blocks and between words; scales of the second level are worked out before."""
    rows, columns = shape
    size = storage.group_size
    whole = lcm(size, 8)  # 8 codes a word
    unit = whole // gcd(whole, columns)
    if unit >= rows:
        return None
    no_codes = torch.empty(0, columns, dtype=torch.uint8, device=tensors["codes"].device)
    table = storage.detail("table")
    nested = tensors.get("nested_absmax"), tensors.get("nested_offset")
    scales = Blockwise(no_codes, tensors["absmax"], table, size, dtype, *nested).block_scales()

    def read(start: int, stop: int) -> Packed:
        words = tensors["codes"][start * columns // 8 : -(-stop * columns // 8)]
        codes = bitpack.unpack(words, 4, (stop - start) * columns).reshape(-1, columns)
        blocks = scales[start * columns // size : -(-stop * columns // size)]
        return Blockwise(codes, blocks, table, size, dtype)

    return Rows(unit, read)


def _bilevel(tensors: Mapping[str, Tensor], storage: Storage, shape: tuple[int, int], dtype: torch.dtype) -> Rows:
    """Statistics are packed along the rows: they are unpacked before, codes as they are asked for."""
    run = storage.detail("qq_groupsize")
    bits = storage.detail("qq_scale_bits"), storage.detail("qq_zero_bits")
    scale = Statistic.from_tensors("scale", tensors, shape[0], bits[0], run)
    zero = Statistic.from_tensors("zero", tensors, shape[0], bits[1], run)

    def read(start: int, stop: int) -> Packed:
        codes = bitpack.unpack(tensors["codes"][start:stop], storage.bits, shape[1])
        both = scale.rows(start, stop), zero.rows(start, stop)
        return BiLevel.of(codes, *both, storage.bits, storage.group_size, dtype)

    return Rows(run, read)
