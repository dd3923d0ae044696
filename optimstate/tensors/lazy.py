"""Tensors that live in files: a dtype, a shape, strides, and the byte extents that hold the elements.

Nothing here reads a tensor's elements until they are asked for, and torch is imported only where elements must be
rearranged one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.io.extents import Extent, FileSource, chunks

__all__ = [
    "DTYPES",
    "DType",
    "ITEMSIZE_OF_STORAGE",
    "LazyTensor",
    "Storage",
    "computed",
    "concatenated",
    "contiguous_strides",
    "filled",
    "mapped",
    "reduced",
    "to_torch",
]


class DType(NamedTuple):
    """How an element type is called by torch and by the containers.

    Attributes:
        name: The name in torch: `torch.<name>`.
        itemsize: Bytes per element.
        storage: The class of torch's typed storage, empty where torch has none and saves an untyped one.
        safetensors: The code in safetensors headers, empty where the format has none.
    """

    name: str
    itemsize: int
    storage: str
    safetensors: str


DTYPES: dict[str, DType] = {
    row[0]: DType(*row)
    for row in (
        ("float64", 8, "DoubleStorage", "F64"),
        ("float32", 4, "FloatStorage", "F32"),
        ("float16", 2, "HalfStorage", "F16"),
        ("bfloat16", 2, "BFloat16Storage", "BF16"),
        ("int64", 8, "LongStorage", "I64"),
        ("int32", 4, "IntStorage", "I32"),
        ("int16", 2, "ShortStorage", "I16"),
        ("int8", 1, "CharStorage", "I8"),
        ("uint8", 1, "ByteStorage", "U8"),
        ("bool", 1, "BoolStorage", "BOOL"),
        ("complex64", 8, "ComplexFloatStorage", "C64"),
        ("complex128", 16, "ComplexDoubleStorage", ""),
        ("complex32", 4, "", ""),
        ("uint16", 2, "", "U16"),
        ("uint32", 4, "", "U32"),
        ("uint64", 8, "", "U64"),
        ("float8_e4m3fn", 1, "", "F8_E4M3"),
        ("float8_e5m2", 1, "", "F8_E5M2"),
        ("float8_e4m3fnuz", 1, "", "F8_E4M3FNUZ"),
        ("float8_e5m2fnuz", 1, "", "F8_E5M2FNUZ"),
        ("float8_e8m0fnu", 1, "", "F8_E8M0"),
        ("float4_e2m1fn_x2", 1, "", ""),
        ("quint8", 1, "QUInt8Storage", ""),
        ("qint8", 1, "QInt8Storage", ""),
        ("qint32", 4, "QInt32Storage", ""),
        ("quint4x2", 1, "QUInt4x2Storage", ""),
        ("quint2x4", 1, "QUInt2x4Storage", ""),
    )
}

ITEMSIZE_OF_STORAGE = {row.storage: row.itemsize for row in DTYPES.values() if row.storage}
"""Bytes per element of each of torch's typed storages, by its class."""


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements, as torch counts them (a dimension of 0 counts as 1)."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


class _Sealed:
    """What an unpickler cannot put state into once it was made and checked."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise CorruptCheckpointError(f"a pickle that sets attributes of a {type(self).__name__}")


class Storage(_Sealed):
    """A run of bytes that one or more tensors look into; two tensors share memory when they share a Storage.

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
        """Bytes of the elements, without what else the storage holds."""
        return self.numel * self.itemsize

    def is_contiguous(self) -> bool:
        """Whether the elements stand in row-major order without gaps."""
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
        return decode_scalar(self.tobytes(), self.dtype)

    def with_storage(self, storage: Storage) -> LazyTensor:
        """The same view of another storage of the same size."""
        return LazyTensor(
            storage,
            self.dtype,
            self.shape,
            self.stride,
            self.offset,
            self.requires_grad,
            self.is_parameter,
            self.metadata,
        )

    def clone(self) -> LazyTensor:
        """A tensor of the same elements and strides that shares memory with nothing."""
        start, stop = self.span()
        storage = Storage(self.storage.cut(start, stop), stop - start, self.storage.kind, self.storage.location)
        return LazyTensor(
            storage, self.dtype, self.shape, self.stride, 0, self.requires_grad, self.is_parameter, self.metadata
        )

    def viewed(self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> LazyTensor:
        """Another view of the same storage."""
        return LazyTensor(
            self.storage, self.dtype, shape, stride, offset, self.requires_grad, self.is_parameter, self.metadata
        )

    def narrow(self, dim: int, start: int, length: int, step: int = 1) -> LazyTensor:
        """The view of `length` places of one dimension, from `start`, each `step` apart."""
        shape, stride = list(self.shape), list(self.stride)
        shape[dim], stride[dim] = length, self.stride[dim] * step
        return self.viewed(tuple(shape), tuple(stride), self.offset + start * self.stride[dim])

    def permute(self, dims: Sequence[int]) -> LazyTensor:
        """The view whose dimension `i` is this one's `dims[i]`."""
        return self.viewed(tuple(self.shape[dim] for dim in dims), tuple(self.stride[dim] for dim in dims), self.offset)

    def reshape(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same elements in row-major order in another shape: a view where this one is contiguous."""
        tensor = self if self.is_contiguous() else self.contiguous()
        return tensor.viewed(shape, contiguous_strides(shape), tensor.offset)

    def expand(self, dim: int, size: int) -> LazyTensor:
        """The view that repeats the only place of a dimension `size` times."""
        shape, stride = list(self.shape), list(self.stride)
        shape[dim], stride[dim] = size, 0
        return self.viewed(tuple(shape), tuple(stride), self.offset)

    def contiguous(self) -> LazyTensor:
        """The same elements, row-major, in a storage that holds nothing else."""
        return _with_pieces(self, self.extents(), self.dtype, self.shape)

    def scattered(self, row_major: Storage, kind: str, location: str) -> Storage:
        """A storage of this view's span with the elements of `row_major` where the strides put them."""
        length = self.span()[1]
        view = self.with_storage(row_major)  # this tensor will hold the result, which must not hold this tensor
        return Storage((Extent(ScatteredSource(view, row_major), 0, length),), length, kind, location)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype}, {list(self.shape)})"


_STRUCT_CODES = {
    "float64": "d",
    "float32": "f",
    "float16": "e",
    "int64": "q",
    "int32": "i",
    "int16": "h",
    "int8": "b",
    "uint8": "B",
    "uint16": "H",
    "uint32": "I",
    "uint64": "Q",
    "bool": "?",
}


def decode_scalar(data: bytes, dtype: str) -> bool | int | float | complex:
    """The Python value of one little-endian element of `dtype`."""
    import struct

    if dtype == "bfloat16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype in ("complex64", "complex128"):
        real, imaginary = struct.unpack("<ff" if dtype == "complex64" else "<dd", data)
        return complex(real, imaginary)
    if dtype not in _STRUCT_CODES:
        raise UnsupportedCheckpointError(f"an element of dtype {dtype} cannot be shown as a number")
    value: bool | int | float = struct.unpack("<" + _STRUCT_CODES[dtype], data)[0]
    return value


class StridedSource:
    """The row-major bytes of a tensor whose elements are stored in another order, gathered through torch on demand.

    The source file is memory-mapped where the storage is one piece of it, so that no more than the pages in use and one
    block of rows are in memory.
    """

    def __init__(self, tensor: LazyTensor) -> None:
        self._tensor = tensor
        self._view: Any = None

    def _strided(self) -> Any:
        import torch

        if self._view is None:
            tensor = self._tensor
            start, stop = tensor.span()
            flat = torch.frombuffer(_readable(tensor.storage.cut(start, stop)), dtype=_moving_dtype(tensor.itemsize))
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
    """The reverse: a storage made of row-major elements, each put where a view's strides expect it.

    The storage is built whole in memory when it is first read.
    """

    def __init__(self, view: LazyTensor, row_major: Storage) -> None:
        self._view = view
        self._row_major = row_major
        self._built = b""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the storage."""
        if not self._built:
            import torch

            view = self._view
            buffer = bytearray(view.span()[1])
            width = _moving_dtype(view.itemsize)
            elements = torch.frombuffer(_readable(self._row_major.pieces), dtype=width).view(view.shape)
            target = torch.frombuffer(buffer, dtype=width)
            if _may_overlap(view):  # torch refuses to copy into such a view
                places = torch.arange(len(target)).as_strided(view.shape, view.stride, view.offset)
                target[places.reshape(-1)] = elements.reshape(-1)
            else:
                target.as_strided(view.shape, view.stride, view.offset).copy_(elements)
            self._built = bytes(buffer)
        return self._built[offset : offset + length]


def _may_overlap(view: LazyTensor) -> bool:
    """Whether two elements of a view could be in one place, as in an expanded tensor."""
    reach = 0
    for step, size in sorted(zip(view.stride, view.shape, strict=True)):
        if size > 1:
            if step <= reach:
                return True
            reach += (size - 1) * step
    return False


def _moving_dtype(itemsize: int) -> Any:
    """A torch dtype of this width: elements are only moved, so that one type stands for all."""
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}[itemsize]


def _readable(pieces: Sequence[Extent]) -> Any:
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


def to_torch(tensor: LazyTensor) -> Any:
    """The tensor as a `torch.Tensor`: memory-mapped where the file allows, and never written back to it."""
    import torch

    dtype = getattr(torch, tensor.dtype)
    if not tensor.numel:
        return torch.empty(tensor.shape, dtype=dtype)
    if tensor.metadata:
        raise UnsupportedCheckpointError(f"a tensor saved with {tensor.metadata} cannot be computed with")
    start, stop = tensor.span()
    flat = torch.frombuffer(_readable(tensor.storage.cut(start, stop)), dtype=_moving_dtype(tensor.itemsize))
    if flat.dtype != dtype:
        flat = flat.view(dtype)
    return flat.as_strided(tensor.shape, tensor.stride, 0)


class _Rows:
    """Bytes that are made on demand, some rows at a time.

    Args:
        row_bytes: Bytes per row.
        make: The bytes of the rows [first, last).
    """

    def __init__(self, row_bytes: int, make: Callable[[int, int], bytes]) -> None:
        self._row_bytes = row_bytes
        self._make = make

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length)."""
        first, last = offset // self._row_bytes, -(-(offset + length) // self._row_bytes)
        skip = offset - first * self._row_bytes
        return self._make(first, last)[skip : skip + length]


def _with_pieces(like: LazyTensor, pieces: tuple[Extent, ...], dtype: str, shape: tuple[int, ...]) -> LazyTensor:
    """A row-major tensor over a storage of its own."""
    nbytes = prod(shape) * DTYPES[dtype].itemsize
    kind = like.storage.kind if dtype == like.dtype else DTYPES[dtype].storage or "UntypedStorage"
    storage = Storage(pieces, nbytes, kind, like.storage.location)
    return LazyTensor(storage, dtype, shape, None, 0, like.requires_grad, like.is_parameter, like.metadata)


def concatenated(tensors: Sequence[LazyTensor], dim: int) -> LazyTensor:
    """Tensors of one dtype, alike in every other dimension, one after the other along `dim`.

    Long runs of bytes stay references to where they are; short ones are interleaved when they are read.
    """
    first = tensors[0]
    size = sum(tensor.shape[dim] for tensor in tensors)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    outer = prod(first.shape[:dim])
    parts = [Storage(tensor.extents(), tensor.nbytes) for tensor in tensors if tensor.nbytes]
    if not parts or not outer:
        return _with_pieces(first, (), first.dtype, shape)
    if outer == 1:
        return _with_pieces(first, tuple(piece for part in parts for piece in part.pieces), first.dtype, shape)
    widths = [part.nbytes // outer for part in parts]
    if min(widths) >= _SHORT_RUN:
        pieces = tuple(
            piece
            for row in range(outer)
            for part, width in zip(parts, widths, strict=True)
            for piece in part.cut(row * width, (row + 1) * width)
        )
        return _with_pieces(first, pieces, first.dtype, shape)
    source = _Rows(sum(widths), lambda low, high: _interleaved(parts, widths, low, high))
    return _with_pieces(first, (Extent(source, 0, sum(widths) * outer),), first.dtype, shape)


_SHORT_RUN = 1 << 16


def _interleaved(parts: Sequence[Storage], widths: Sequence[int], first: int, last: int) -> bytes:
    import torch

    blocks = [
        torch.frombuffer(_joined(part.cut(first * width, last * width)), dtype=torch.uint8).view(-1, width)
        for part, width in zip(parts, widths, strict=True)
    ]
    return _bytes_of(torch.cat(blocks, dim=1))


def _joined(pieces: Sequence[Extent]) -> bytearray:
    joined = bytearray()
    for piece in pieces:
        joined += piece.read()
    return joined


def _bytes_of(tensor: Any) -> bytes:
    """The row-major bytes of a torch tensor of any dtype."""
    from ctypes import string_at

    tensor = tensor.contiguous()
    return string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())


def mapped(tensor: LazyTensor, dtype: str, function: Callable[[Any], Any]) -> LazyTensor:
    """A function of each element by itself, computed by torch a block at a time when the result is read.

    Args:
        tensor: The elements.
        dtype: Of the result.
        function: Takes a torch tensor of one dimension, gives one of the same shape and of `dtype`.
    """
    source, itemsize = Storage(tensor.extents(), tensor.nbytes), tensor.itemsize
    like = tensor.viewed((tensor.numel,), (1,), 0)

    def block(first: int, last: int) -> Any:
        pieces = source.cut(first * itemsize, last * itemsize)
        return function(to_torch(_with_pieces(like, pieces, tensor.dtype, (last - first,))))

    return computed(tensor, dtype, tensor.shape, block)


def computed(like: LazyTensor, dtype: str, shape: tuple[int, ...], function: Callable[[int, int], Any]) -> LazyTensor:
    """Elements that torch computes when they are read, a block at a time.

    Args:
        like: A tensor whose place in the file and device the result takes.
        dtype: Of the result.
        shape: Of the result.
        function: Takes the first element, in row-major order, and the one after the last; gives a torch tensor of them.
    """
    width, count = DTYPES[dtype].itemsize, prod(shape)

    def make(first: int, last: int) -> bytes:
        return _bytes_of(function(first, last))

    pieces = (Extent(_Rows(width, make), 0, count * width),) if count else ()
    return _with_pieces(like, pieces, dtype, shape)


def reduced(
    tensors: Sequence[LazyTensor], shape: tuple[int, ...], function: Callable[[Sequence[Any]], Any]
) -> LazyTensor:
    """A function of whole tensors with a small result of their dtype: computed once, when it is first read.

    Args:
        tensors: What it is computed from.
        shape: Of the result.
        function: Takes torch tensors, gives one of `shape`.
    """
    made: list[bytes] = []
    row_bytes = prod(shape) * tensors[0].itemsize

    def make(_first: int, _last: int) -> bytes:
        if not made:
            made.append(_bytes_of(function([to_torch(tensor) for tensor in tensors])))
        return made[0]

    pieces = (Extent(_Rows(row_bytes, make), 0, row_bytes),) if row_bytes else ()
    return _with_pieces(tensors[0], pieces, tensors[0].dtype, shape)


def filled(like: LazyTensor, shape: tuple[int, ...], value: float) -> LazyTensor:
    """A tensor of one value, with the dtype and place of another; zeros take neither torch nor memory."""
    if not value:
        nbytes = prod(shape) * like.itemsize
        return _with_pieces(like, (Extent(None, 0, nbytes),) if nbytes else (), like.dtype, shape)

    def function(block: Any) -> Any:
        return block.fill_(value)

    return mapped(filled(like, shape, 0.0), like.dtype, function)


def storages(tensors: Iterable[LazyTensor]) -> list[Storage]:
    """The distinct storages of `tensors`, in order of first use."""
    return list({id(tensor.storage): tensor.storage for tensor in tensors}.values())
