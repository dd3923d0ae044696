"""Tensors that torch computes from others, block by block, when their bytes are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

from optimstate.errors import UnsupportedCheckpointError
from optimstate.io.extents import Extent
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, with_pieces
from optimstate.tensors.strided import stored_elements

__all__ = ["bytes_of", "computed", "concatenated", "filled", "mapped", "reduced", "resolved", "taken", "to_torch"]


def to_torch(tensor: LazyTensor) -> Any:
    """The tensor as a `torch.Tensor`; memory-mapped where possible, and never written back to the file."""
    from optimstate.installed_torch import dtype_of, torch

    dtype = dtype_of(tensor.dtype)
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    found = stored_elements(tensor)
    found = found if found.dtype == dtype else found.view(dtype)
    found = -found if "neg" in tensor.flags else found
    return found.conj() if "conj" in tensor.flags else found


def resolved(tensor: LazyTensor) -> LazyTensor:
    """The tensor with its conjugation or negation applied, which torch saves as a flag beside the stored elements."""
    return mapped(tensor, tensor.dtype, lambda block: block.resolve_conj())


class _Rows:
    """Bytes that are produced on demand, some rows at a time.

    Args:
        row_bytes: Bytes per row.
        make: Returns the bytes of the rows [first, last).
    """

    def __init__(self, row_bytes: int, make: Callable[[int, int], bytes]) -> None:
        self._row_bytes = row_bytes
        self._make = make

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        first, last = offset // self._row_bytes, -(-(offset + length) // self._row_bytes)
        skip = offset - first * self._row_bytes
        return self._make(first, last)[skip : skip + length]


def concatenated(tensors: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """Tensors of one dtype concatenated along `dim`; their other dimensions must be equal.

    Long runs of bytes are not copied but referred to; short runs are interleaved when they are read.
    """
    first = tensors[0]
    if any(tensor.flags != first.flags for tensor in tensors):
        raise UnsupportedCheckpointError(
            "some of the tensors to concatenate were saved conjugated or negated, and some were not",
            hint="Save them with `tensor.resolve_conj().resolve_neg()`.",
        )
    size = sum(tensor.shape[dim] for tensor in tensors)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    outer = prod(first.shape[:dim])
    parts = [Storage(tensor.extents(), tensor.nbytes) for tensor in tensors if tensor.nbytes]
    if not parts or not outer:
        return with_pieces(first, (), first.dtype, shape)
    if outer == 1:
        return with_pieces(first, tuple(piece for part in parts for piece in part.pieces), first.dtype, shape)
    widths = [part.nbytes // outer for part in parts]
    if min(widths) >= _SHORT_RUN:
        pieces = tuple(
            piece
            for row in range(outer)
            for part, width in zip(parts, widths, strict=True)
            for piece in part.cut(row * width, (row + 1) * width)
        )
        return with_pieces(first, pieces, first.dtype, shape)
    source = _Rows(sum(widths), lambda low, high: _interleaved(parts, widths, low, high))
    return with_pieces(first, (Extent(source, 0, sum(widths) * outer),), first.dtype, shape)


_SHORT_RUN = 1 << 16


def _interleaved(parts: Sequence[Storage], widths: Sequence[int], first: int, last: int) -> bytes:
    from optimstate.installed_torch import torch

    blocks = [
        torch.frombuffer(_joined(part.cut(first * width, last * width)), dtype=torch.uint8).view(-1, width)
        for part, width in zip(parts, widths, strict=True)
    ]
    return bytes_of(torch.cat(blocks, dim=1))


def _joined(pieces: Sequence[Extent]) -> bytearray:
    joined = bytearray()
    for piece in pieces:
        joined += piece.read()
    return joined


def bytes_of(tensor: Any) -> bytes:
    """The row-major bytes of a torch tensor of any dtype."""
    from ctypes import string_at

    tensor = tensor.contiguous()
    return string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def taken(tensor: LazyTensor, dim: int, index: Sequence[int]) -> LazyTensor:
    """The given indices of a dimension, in any order and with repetitions.

    Long rows are not copied but referred to; short ones are gathered when they are read.
    """
    shape = (*tensor.shape[:dim], len(index), *tensor.shape[dim + 1 :])
    outer, width = prod(shape[:dim]), prod(shape[dim + 1 :]) * tensor.itemsize
    source = Storage(tensor.extents(), tensor.nbytes)
    if not prod(shape):
        return with_pieces(tensor, (), tensor.dtype, shape)
    block = tensor.shape[dim] * width
    if width >= _SHORT_RUN:
        pieces = tuple(
            piece
            for row in range(outer)
            for position in index
            for piece in source.cut(row * block + position * width, row * block + (position + 1) * width)
        )
        return with_pieces(tensor, pieces, tensor.dtype, shape)

    def make(first: int, last: int) -> bytes:
        from optimstate.installed_torch import torch

        found = torch.frombuffer(_joined(source.cut(first * block, last * block)), dtype=torch.uint8)
        return bytes_of(found.view(last - first, tensor.shape[dim], width).index_select(1, torch.tensor(index)))

    rows = _Rows(len(index) * width, make)
    return with_pieces(tensor, (Extent(rows, 0, len(index) * width * outer),), tensor.dtype, shape)


def mapped(tensor: LazyTensor, dtype: str, function: Callable[[Any], Any]) -> LazyTensor:
    """An elementwise function of a tensor, computed by torch a block at a time when the result is read.

    Args:
        tensor: The argument.
        dtype: The dtype of the result.
        function: Takes a 1-D torch tensor and returns one of the same shape and of `dtype`.
    """
    source, itemsize = Storage(tensor.extents(), tensor.nbytes), tensor.itemsize
    like = tensor.viewed((tensor.numel,), (1,), 0)

    def block(first: int, last: int) -> Any:
        pieces = source.cut(first * itemsize, last * itemsize)
        return function(to_torch(with_pieces(like, pieces, tensor.dtype, (last - first,))))

    return computed(tensor, dtype, tensor.shape, block)


def computed(like: LazyTensor, dtype: str, shape: tuple[int, ...], function: Callable[[int, int], Any]) -> LazyTensor:
    """A tensor that torch computes when it is read, a block at a time.

    Args:
        like: A tensor whose device and flags the result takes.
        dtype: The dtype of the result.
        shape: The shape of the result.
        function: Takes the first element of a block, in row-major order, and the one after its last; returns a torch
            tensor of the block's elements.
    """
    width, count = DTYPES[dtype].itemsize, prod(shape)

    def make(first: int, last: int) -> bytes:
        return bytes_of(function(first, last))

    pieces = (Extent(_Rows(width, make), 0, count * width),) if count else ()
    made = with_pieces(like, pieces, dtype, shape)
    made.metadata = None  # its flags are applied
    return made


def reduced(
    tensors: Sequence[LazyTensor], shape: tuple[int, ...], function: Callable[[Sequence[Any]], Any]
) -> LazyTensor:
    """A function of whole tensors with a small result of their dtype, computed once, when it is first read.

    Args:
        tensors: The arguments.
        shape: The shape of the result.
        function: Takes torch tensors and returns one of `shape`.
    """
    made: list[bytes] = []
    row_bytes = prod(shape) * tensors[0].itemsize

    def make(_first: int, _last: int) -> bytes:
        if not made:
            made.append(bytes_of(function([to_torch(tensor) for tensor in tensors])))
        return made[0]

    pieces = (Extent(_Rows(row_bytes, make), 0, row_bytes),) if row_bytes else ()
    return with_pieces(tensors[0], pieces, tensors[0].dtype, shape)


def filled(like: LazyTensor, shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor filled with one value, with the dtype and device of another; zeros need neither torch nor memory."""
    if not value:
        nbytes = prod(shape) * like.itemsize
        return with_pieces(like, (Extent(None, 0, nbytes),) if nbytes else (), like.dtype, shape)

    def function(block: Any) -> Any:
        return block.fill_(value)

    return mapped(filled(like, shape, 0.0), like.dtype, function)
