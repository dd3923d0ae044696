"""Elements brought into row-major order, or scattered from it, by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optimstate.io.extents import Extent, FileSource, chunks

if TYPE_CHECKING:
    from optimstate.tensors.lazy import LazyTensor, Storage

__all__ = ["ScatteredSource", "StridedSource", "moving_dtype", "readable"]


class StridedSource:
    """The row-major bytes of a tensor whose elements are stored in another order, gathered through torch on demand.

    The source file is memory-mapped where the storage is one piece of it, so that no more than the pages in use and one
    block of rows are in memory.
    """

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor
        self._view: Any = None

    def _strided(self) -> Any:
        from optimstate.installed_torch import torch

        if self._view is None:
            tensor = self._tensor
            start, stop = tensor.span()
            flat = torch.frombuffer(readable(tensor.storage.cut(start, stop)), dtype=moving_dtype(tensor.itemsize))
            self._view = flat.as_strided(tensor.shape, tensor.stride, 0)
        return self._view

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the row-major order."""
        from ctypes import string_at

        view = self._strided()
        rows = self._tensor.shape[0]
        row_bytes = self._tensor.nbytes // rows
        first, last = offset // row_bytes, -(-(offset + length) // row_bytes)
        block = view[first:last].contiguous()
        skip = offset - first * row_bytes
        return string_at(block.data_ptr() + skip, length)


class ScatteredSource:
    """The reverse: a storage made from row-major elements, each placed where a view's strides expect it.

    The storage is built whole in memory when it is first read.
    """

    def __init__(self, view: LazyTensor, row_major: Storage) -> None:
        self._view = view
        self._row_major = row_major
        self._built = b""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the storage."""
        if not self._built:
            from optimstate.installed_torch import torch

            view = self._view
            buffer = bytearray(view.span()[1])
            width = moving_dtype(view.itemsize)
            elements = torch.frombuffer(readable(self._row_major.pieces), dtype=width).view(view.shape)
            target = torch.frombuffer(buffer, dtype=width)
            if _may_overlap(view):  # torch refuses to copy into such a view
                places = torch.arange(len(target)).as_strided(view.shape, view.stride, view.offset)
                target[places.reshape(-1)] = elements.reshape(-1)
            else:
                target.as_strided(view.shape, view.stride, view.offset).copy_(elements)
            self._built = bytes(buffer)
        return self._built[offset : offset + length]


def _may_overlap(view: LazyTensor) -> bool:
    """Whether two elements of a view could share memory, as in an expanded tensor."""
    reach = 0
    for step, size in sorted(zip(view.stride, view.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def moving_dtype(itemsize: int) -> Any:
    """A torch dtype of this width: elements are only moved, so any type of the width will do."""
    from optimstate.installed_torch import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]


def readable(pieces: Sequence[Extent]) -> Any:
    """A writable buffer over the bytes of `pieces`, mapped where possible (torch warns about read-only ones)."""
    import mmap

    if len(pieces) == 1 and isinstance(pieces[0].source, FileSource):
        piece = pieces[0]
        assert isinstance(piece.source, FileSource)
        page = mmap.ALLOCATIONGRANULARITY
        base = piece.offset // page * page
        mapped = mmap.mmap(
            piece.source.fileno(), piece.offset - base + piece.length, access=mmap.ACCESS_COPY, offset=base
        )
        return memoryview(mapped)[piece.offset - base :]
    return bytearray(b"".join(chunks(pieces)))
