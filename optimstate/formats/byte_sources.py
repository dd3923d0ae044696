"""Parts of sources, sources in memory, and the decompressors for compressed ones."""

from __future__ import annotations

import bz2
import lzma
import zlib
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.io.extents import StoredSource
from optimstate.io.location import Location
from optimstate.io.streams import Source

__all__ = ["LoadedFile", "Part", "unpacker"]


class Part:
    """A part of a source, with offsets counted from its beginning."""

    def __init__(self, source: Source, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > source.size:
            raise CorruptCheckpointError(f"a part of {size} bytes at offset {start} of {source.size} bytes")
        self._source, self._start, self.size = source, start, size

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer at the end of the part."""
        return self._source.read(self._start + offset, max(min(length, self.size - offset), 0))


class LoadedFile(StoredSource):
    """A file, or a part of one, that was read into memory as a whole."""

    __slots__ = ("_data", "path", "size")

    def __init__(self, path: Location, data: bytes) -> None:
        self.path, self._data, self.size = path, data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""
        self.check(offset, length)
        return self._data[offset : offset + length]


def unpacker(head: bytes) -> tuple[str, Any] | None:
    """The name of a compression and a function that makes its decompressor, by the first bytes of a stream."""
    if head[:2] == b"\x1f\x8b":
        return "gzip", lambda: zlib.decompressobj(31)
    if head[:3] == b"BZh":
        return "bz2", _Limited.of(bz2.BZ2Decompressor)
    if head[:6] == b"\xfd7zXZ\x00" or head[:3] == b"\x5d\x00\x00":
        return "xz", _Limited.of(lambda: lzma.LZMADecompressor(memlimit=1 << 28))
    if head[:1] == b"\x78" and len(head) > 1 and int.from_bytes(head[:2], "big") % 31 == 0:
        return "zlib", lambda: zlib.decompressobj(15)
    return None


class _Limited:
    """A decompressor of bz2 or lzma with the interface of zlib's."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @classmethod
    def of(cls, make: Any) -> Any:
        return lambda: cls(make())

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data)

    def decompress(self, data: bytes, limit: int) -> bytes:
        try:
            return bytes(self._stream.decompress(data, limit))
        except lzma.LZMAError as error:
            raise CorruptCheckpointError(f"the compressed data is damaged: {error}") from error
