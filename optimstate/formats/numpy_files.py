"""NumPy arrays, `.npy` and `.npz`, as tensors: read only, and no arrays of objects, which are pickles.

Format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import ast
import struct
import zipfile
import zlib
from functools import partial
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, LimitExceededError, UnsupportedCheckpointError
from optimstate.formats.archive import data_offset, members, recorded_members
from optimstate.formats.protocol import Claim, Document, read_only
from optimstate.io.extents import Extent, FileSlice, InMemory
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import contiguous_strides, tensor_of
from optimstate.tree import OpaqueFile

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "numpy"
SUFFIXES: tuple[str, ...] = ()

_MAGIC = b"\x93NUMPY"
_MAX_HEADER = 1 << 16
MAX_INFLATED = 1 << 30
"""The largest total of bytes that is decompressed from one file; they stay in memory."""
_DTYPES = {
    **{f"<f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"<i{size}": f"int{8 * size}" for size in (2, 4, 8)},
    **{f"<u{size}": f"uint{8 * size}" for size in (2, 4, 8)},
    "|i1": "int8",
    "|u1": "uint8",
    "|b1": "bool",
    "<c8": "complex64",
    "<c16": "complex128",
}


def sniff(path: Location, head: bytes) -> Claim:
    """An array, or a zip archive whose first member is one."""
    if head.startswith(_MAGIC):
        return Claim.CERTAIN
    if head[:4] != b"PK\x03\x04":
        return Claim.CERTAIN if head[:4] == b"PK\x05\x06" and path.suffix == ".npz" else Claim.NO
    (length,) = struct.unpack_from("<H", head, 26) if len(head) >= 30 else (0,)
    return Claim.CERTAIN if head[30 : 30 + length].endswith(b".npy") else Claim.NO


def read(path: Location) -> Document:
    """Open an array, or an archive as a dict of arrays.

    Raises:
        CheckpointError: It is damaged, is too large when decompressed, or has arrays of objects.
    """
    source = open_source(path)
    if source.read(0, min(source.size, len(_MAGIC))) == _MAGIC:
        return Document(path, NAME, _array(FileSlice(source, 0, source.size), path.name))
    tree: dict[str, Any] = {}
    room = MAX_INFLATED
    for info in members(path):
        stored = FileSlice(source, data_offset(source, info), info.compress_size)
        part: FileSlice | _Inflated = stored
        if info.compress_type == zipfile.ZIP_DEFLATED:
            room -= info.file_size
            part = _inflated(stored, info, room)
        elif info.compress_type != zipfile.ZIP_STORED:
            raise UnsupportedCheckpointError(
                f"array {describe(info.filename)} is packed by method {info.compress_type}",
                path=path,
                hint="Load it with numpy.load and save it with numpy.savez, which does not compress.",
            )
        name = info.filename.removesuffix(".npy")
        is_array = name != info.filename
        tree[name] = _array(part, name) if is_array else OpaqueFile(f"{path}:{info.filename}", info.file_size)
    return Document(path, NAME, tree, checksums=[partial(recorded_members, source, path)])


class _Inflated(InMemory):
    """A member that was compressed, in memory."""

    def __init__(self, data: bytes, path: Location) -> None:
        super().__init__(data)
        self.path = path

    def extent(self, offset: int, length: int) -> Extent:
        """`length` bytes at `offset`."""
        return Extent(self, offset, length)


def _inflated(part: FileSlice, info: zipfile.ZipInfo, room: int) -> _Inflated:
    """A decompressed member.

    Args:
        part: The compressed bytes.
        info: Its entry in the directory.
        room: The rest of `MAX_INFLATED` after this member; below 0 the member is refused.
    """
    where = f"array {describe(info.filename)}"
    if room < 0:
        raise LimitExceededError(
            f"unpacks to more than {MAX_INFLATED:,} bytes, the limit",
            path=part.path,
            place=where,
            hint="Load it with numpy.load and save it with numpy.savez, which does not compress.",
        )
    try:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(part.read(0, part.size), info.file_size + 1)
    except zlib.error as error:
        raise CorruptCheckpointError(f"cannot be unpacked: {error}", path=part.path, place=where) from None
    if len(data) != info.file_size or zlib.crc32(data) != info.CRC:
        raise CorruptCheckpointError("its bytes do not match its checksum", path=part.path, place=where)
    return _Inflated(data, part.path)


def _array(part: FileSlice | _Inflated, name: str) -> Any:
    """An array as a tensor; arrays of text or dates, which tensors cannot hold, as an `OpaqueFile`."""
    where = f"array {describe(name)}"
    head = part.read(0, min(12, part.size))
    if len(head) < 10 or head[:6] != _MAGIC or head[6] not in (1, 2, 3):
        raise CorruptCheckpointError("not an array of NumPy", path=part.path, place=where)
    wide = head[6] > 1
    start = 12 if wide else 10
    (length,) = struct.unpack_from("<I" if wide else "<H", head.ljust(12, b"\0"), 8)
    if length > _MAX_HEADER or start + length > part.size:
        raise CorruptCheckpointError(f"a header of {length} bytes", path=part.path, place=where)
    try:
        header = ast.literal_eval(part.read(start, length).decode("utf-8" if head[6] == 3 else "latin-1").strip())
        code, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
        if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape):
            raise ValueError(f"a shape of {describe(shape)}")
    except (ValueError, KeyError, TypeError, SyntaxError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        message = f"the header cannot be read: {describe(error)}"[:200]
        raise CorruptCheckpointError(message, path=part.path, place=where) from None
    at = start + length
    if isinstance(code, str) and code[1:2] in ("S", "U", "M", "m") and code not in _DTYPES:
        return OpaqueFile(f"{part.path}:{name}", part.size - at)
    if not isinstance(code, str) or code not in _DTYPES:
        objects = code == "|O"
        raise UnsupportedCheckpointError(
            "an array of objects, which is a pickle" if objects else f"an array of dtype {describe(code)}"[:200],
            path=part.path,
            place=where,
            hint="Save its contents with torch.save." if objects else "Save it as a little-endian array of numbers.",
        )
    dtype = DTYPES[_DTYPES[code]]
    stride = tuple(reversed(contiguous_strides(shape[::-1]))) if fortran else None
    nbytes = part.size - at
    tensor = tensor_of((part.extent(at, nbytes),) if nbytes else (), dtype.name, shape, stride)
    if tensor.nbytes != nbytes:
        raise CorruptCheckpointError(
            f"{nbytes} bytes for an array of {dtype.name}{list(shape)}, which has {tensor.nbytes}",
            path=part.path,
            place=where,
        )
    return tensor


# NumPy files can hold neither options nor half of torch's dtypes.
write = read_only(
    "arrays of NumPy are read, but not written", hint="`optimstate convert` writes a .pt or .safetensors file."
)
