"""Tensors in files: a dtype, a shape, strides, and the byte extents that hold the elements.

Nothing here reads a tensor's elements until they are asked for, and torch is imported only where elements must be
rearranged one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.io.extents import Extent, announce, chunks
from optimstate.tensors.dtypes import DTYPES, decode_scalar
from optimstate.tensors.strided import ScatteredSource, StridedSource

__all__ = [
    "FEW_BYTES",
    "LazyTensor",
    "Storage",
    "announced",
    "consecutive",
    "contiguous_strides",
    "read_numbers",
    "tensor_of",
    "with_pieces",
]


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch counts them (a dimension of 0 counts as 1)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Sealed:
    """Base of objects that are checked when they are made, so that no unpickler can change their state later."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CorruptCheckpointError(f"a pickle that sets attributes of a {type(self).__name__}")


FEW_BYTES = 1 << 12
"""Tensors of up to this size are fetched together with the data that says where tensors are."""


class Storage(_Sealed):
    """A run of bytes that one or more tensors are views of; two tensors share memory when they share a Storage.

    Attributes:
        pieces: Where the bytes are, in order.
        nbytes: Their number.
        kind: The class torch saved it as: `FloatStorage`, ..., `UntypedStorage`.
        location: The device it was on: `cpu`, `cuda:0`.
        key: Its name in the file it came from; kept so that an unchanged pickle is written back byte for byte.
        crc: CRC-32 of the bytes where the container recorded one, else None.
    """

    __slots__ = ("crc", "key", "kind", "location", "nbytes", "pieces")

    def __init__(
        self,
        pieces: tuple[Extent, ...],
        nbytes: int,
        kind: str = "UntypedStorage",
        location: str = "cpu",
        key: str = "",
        crc: int | None = None,
    ) -> None:
        self.pieces = pieces
        self.nbytes = nbytes
        self.kind = kind
        self.location = location
        self.key = key
        self.crc = crc

    def reach(self) -> tuple[Extent, ...]:
        """The extents to read ahead: those of the bytes if they are few, else none."""
        return self.pieces if self.nbytes <= FEW_BYTES else ()

    @classmethod
    def read_together(cls, storages: Iterable[Storage]) -> None:
        """Read small storages of this class whose bytes would otherwise be looked for one by one; here none are."""

    def cut(self, start: int, stop: int) -> tuple[Extent, ...]:
        """The extents of the bytes [start, stop)."""
        if start == 0 and stop == self.nbytes:
            return self.pieces
        found = []
        at = 0
        for piece in self.pieces:
            low, high = max(start - at, 0), min(stop - at, piece.length)
            if low < high:
                found.append(piece.cut(low, high))
            at += piece.length
            if at >= stop:
                break
        return tuple(found)

    def copy_of(self, start: int, stop: int) -> Storage:
        """A new storage of the bytes [start, stop)."""
        return Storage(self.cut(start, stop), stop - start, self.kind, self.location)


class LazyTensor(_Sealed):
    """A tensor in a file.

    Attributes:
        storage: The bytes, possibly shared with other tensors.
        dtype: A key of `DTYPES`.
        shape: Elements per dimension.
        stride: Elements between neighbours, per dimension.
        offset: Elements from the start of the storage to the first element.
        requires_grad: As saved.
        is_parameter: True where torch saved an `nn.Parameter` object rather than a plain tensor.
        metadata: Flags torch saved with the tensor (conjugate, negative), else None.
    """

    __slots__ = ("dtype", "is_parameter", "metadata", "offset", "requires_grad", "shape", "storage", "stride")

    def __init__(
        self,
        storage: Storage,
        dtype: str,
        shape: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        offset: int = 0,
        requires_grad: bool = False,
        is_parameter: bool = False,
        metadata: Any = None,
    ) -> None:
        self.storage = storage
        self.dtype = dtype
        self.shape = shape
        self.stride = contiguous_strides(shape) if stride is None else stride
        self.offset = offset
        self.requires_grad = requires_grad
        self.is_parameter = is_parameter
        self.metadata = metadata

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the elements, not of the whole storage."""
        return self.numel * self.itemsize

    def is_contiguous(self) -> bool:
        """Whether the elements are in row-major order without gaps."""
        if 0 in self.shape:
            return True
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def span(self) -> tuple[int, int]:
        """The bytes [start, stop) of the storage from the first to the last element."""
        if 0 in self.shape:
            return self.offset * self.itemsize, self.offset * self.itemsize
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True))
        return self.offset * self.itemsize, (self.offset + last + 1) * self.itemsize

    def extents(self) -> tuple[Extent, ...]:
        """Where the elements are, in row-major order; elements stored in another order are gathered when read."""
        if self.is_contiguous():
            start, stop = self.span()
            return self.storage.cut(start, stop)
        return (Extent(StridedSource(self), 0, self.nbytes),)

    def chunks(self) -> Iterator[bytes]:
        """The elements' bytes in row-major order, a bounded number at a time."""
        return chunks(self.extents())

    def tobytes(self) -> bytes:
        """The elements' bytes in row-major order."""
        return b"".join(self.chunks())

    def item(self) -> bool | int | float | complex:
        """The value of a tensor of one element.

        Raises:
            ValueError: It has several elements.
            UnsupportedCheckpointError: Its dtype has no Python value without torch.
        """
        if self.numel != 1:
            raise ValueError(f"a tensor of shape {self.shape} has no single value")
        value = decode_scalar(self.tobytes(), self.dtype)
        if "neg" in self.flags:
            value = -value
        return value.conjugate() if "conj" in self.flags else value

    @property
    def flags(self) -> frozenset[str]:
        """Operations still to be applied to the stored elements: `neg` (negate), `conj` (conjugate)."""
        if not isinstance(self.metadata, Mapping):
            return frozenset()
        return frozenset(flag for flag in ("conj", "neg") if self.metadata.get(flag))

    def with_storage(self, storage: Storage) -> LazyTensor:
        """The same view of another storage of the same size."""
        return self._view_of(storage, self.shape, self.stride, self.offset)

    def clone(self) -> LazyTensor:
        """A tensor of the same elements and strides that shares memory with nothing."""
        return self._view_of(self.storage.copy_of(*self.span()), self.shape, self.stride, 0)

    def viewed(self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> LazyTensor:
        """Another view of the same storage."""
        return self._view_of(self.storage, shape, stride, offset)

    def _view_of(
        self, storage: Storage, shape: tuple[int, ...], stride: tuple[int, ...] | None, offset: int
    ) -> LazyTensor:
        return LazyTensor(
            storage, self.dtype, shape, stride, offset, self.requires_grad, self.is_parameter, self.metadata
        )

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> LazyTensor:
        """The view of `length` indices of one dimension, from `start`, each `step` apart."""
        shape, stride = list(self.shape), list(self.stride)
        shape[dim], stride[dim] = length, self.stride[dim] * step
        return self.viewed(tuple(shape), tuple(stride), self.offset + start * self.stride[dim])

    def permute(self, dims: Sequence[int]) -> LazyTensor:
        """The view whose dimension `i` is this one's `dims[i]`."""
        return self.viewed(tuple(self.shape[dim] for dim in dims), tuple(self.stride[dim] for dim in dims), self.offset)

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same elements in row-major order in another shape: a view if this one is contiguous."""
        tensor = self if self.is_contiguous() else self.contiguous()
        return tensor.viewed(shape, contiguous_strides(shape), tensor.offset)

    def expand(self, dim: int, size: int) -> LazyTensor:
        """The view that repeats a dimension of size 1 `size` times."""
        shape, stride = list(self.shape), list(self.stride)
        shape[dim], stride[dim] = size, 0
        return self.viewed(tuple(shape), tuple(stride), self.offset)

    def contiguous(self) -> LazyTensor:
        """The same elements, row-major, in a storage of their own."""
        return with_pieces(self, self.extents(), self.dtype, self.shape)

    def scattered(self, row_major: Storage, kind: str, location: str) -> Storage:
        """A storage with the elements of `row_major` at the positions that this view's strides give them."""
        length = self.span()[1]
        view = self.with_storage(row_major)  # not self: this tensor will refer to the result
        return Storage((Extent(ScatteredSource(view, row_major), 0, length),), length, kind, location)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"

    __describe__ = __repr__


def announced(tensors: Iterable[LazyTensor]) -> None:
    """Announce that tensors will be read, so that small ones in a store are fetched together."""
    announce(extent for tensor in tensors for extent in tensor.storage.reach())


def read_numbers(numbers: Iterable[LazyTensor]) -> None:
    """Read tensors of one element together where a file has each in a place of its own, and note their checksums."""
    kinds: dict[type[Storage], list[Storage]] = {}
    for number in numbers:
        kinds.setdefault(type(number.storage), []).append(number.storage)
    for kind, storages in kinds.items():
        kind.read_together(storages)


def consecutive(tensors: Iterable[LazyTensor]) -> Iterator[Iterator[memoryview]]:
    """The elements' bytes of each tensor in blocks; those of the next ones in a store are requested in advance.

    Each tensor's blocks must be taken before those of the next.
    """
    known = list(tensors)
    announced(known)
    stream = chunks(extent for tensor in known for extent in tensor.extents())
    rest = memoryview(b"")

    def blocks(missing: int) -> Iterator[memoryview]:
        nonlocal rest
        while missing:
            rest = rest or memoryview(next(stream))
            block, rest = rest[:missing], rest[missing:]
            missing -= len(block)
            yield block

    for tensor in known:
        yield blocks(tensor.nbytes)


def tensor_of(
    pieces: Sequence[Extent], dtype: str, shape: tuple[int, ...], stride: tuple[int, ...] | None = None
) -> LazyTensor:
    """A tensor over a storage of its own, made of all bytes of the pieces; row-major without strides."""
    nbytes = sum(piece.length for piece in pieces)
    return LazyTensor(Storage(tuple(pieces), nbytes, DTYPES[dtype].storage_class), dtype, shape, stride)


def with_pieces(like: LazyTensor, pieces: tuple[Extent, ...], dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    """A row-major tensor over a storage of its own, with the device and the flags of `like`."""
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    kind = like.storage.kind if dtype == like.dtype else DTYPES[dtype].storage_class
    storage = Storage(pieces, nbytes, kind, like.storage.location)
    return LazyTensor(storage, dtype, shape, None, 0, like.requires_grad, like.is_parameter, like.metadata)
