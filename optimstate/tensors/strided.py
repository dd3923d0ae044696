"""Elements that torch gathers into row-major order, or scatters from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optimstate.io.extents import Extent, FileSource, chunks

if TYPE_CHECKING:
    from optimstate.tensors.lazy import LazyTensor, Storage

__all__ = ["ScatteredSource", "StridedSource", "stored_elements"]


class StridedSource:
    """The row-major bytes of a tensor whose elements are stored in another order, gathered by torch on demand.

    If the storage is one piece of a file, the file is memory-mapped, so that only the pages in use and one block of
    rows are in memory.
    """

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor
        self._view: Any = None

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the row-major order."""
        from ctypes import string_at

        if self._view is None:
            self._view = stored_elements(self._tensor)
        row_bytes = self._tensor.nbytes // self._tensor.shape[0]
        first, last = offset // row_bytes, -(-(offset + length) // row_bytes)
        block = self._view[first:last].contiguous()
        skip = offset - first * row_bytes
        return string_at(block.data_ptr() + skip, length)


class ScatteredSource:
    """A storage made from row-major elements, each at the position that a view's strides give it.

    The whole storage is built in memory when it is first read.
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
            dtype = _dtype_of_size(view.itemsize)
            elements = torch.frombuffer(_readable(self._row_major.pieces), dtype=dtype).view(view.shape)
            target = torch.frombuffer(buffer, dtype=dtype)
            if _may_overlap(view):  # torch refuses to copy into such a view
                positions = torch.arange(len(target)).as_strided(view.shape, view.stride, view.offset)
                target[positions.reshape(-1)] = elements.reshape(-1)
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


def stored_elements(tensor: LazyTensor) -> Any:
    """A torch tensor of a tensor's shape and strides over its bytes, of some dtype of the same item size."""
    from optimstate.installed_torch import torch

    buffer = _readable(tensor.storage.cut(*tensor.span()))
    flat = torch.frombuffer(buffer, dtype=_dtype_of_size(tensor.itemsize))
    return flat.as_strided(tensor.shape, tensor.stride, 0)


def _dtype_of_size(itemsize: int) -> Any:
    """A torch dtype of this size in bytes; any will do, because elements are only moved."""
    from optimstate.installed_torch import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]


def _readable(pieces: Sequence[Extent]) -> Any:
    """A writable buffer with the bytes of `pieces`, mapped where possible (torch warns about read-only buffers)."""
    import mmap

    if len(pieces) == 1 and isinstance((piece := pieces[0]).source, FileSource):
        assert isinstance(piece.source, FileSource)
        page = mmap.ALLOCATIONGRANULARITY
        base = piece.offset // page * page
        mapped = mmap.mmap(
            piece.source.fileno(), piece.offset - base + piece.length, access=mmap.ACCESS_COPY, offset=base
        )
        return memoryview(mapped)[piece.offset - base :]
    return bytearray(b"".join(chunks(pieces)))
