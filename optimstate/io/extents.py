"""Byte ranges of files, objects in stores and memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, groupby
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple, Protocol

from optimstate.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CorruptCheckpointError,
)
from optimstate.io.location import Location

__all__ = [
    "ByteSource",
    "Extent",
    "FileSlice",
    "FileSource",
    "InMemory",
    "Progress",
    "StoredSource",
    "announce",
    "chunks",
    "is_far",
    "near",
    "trips",
]

Progress = Callable[[int], None]
"""Called with the number of bytes written since the last call."""

CHUNK = 1 << 20  # one read or write through user space


class ByteSource(Protocol):
    """Anything that returns bytes by position: a file, or a computation that makes them on demand."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""


class StoredSource:
    """A file, or an object in a store, which several threads can read at any offset.

    Attributes:
        path: Its name.
        size: Its number of bytes.
        version: The store's identifier of this version of the object; None for a file.
        lanes: How many concurrent reads are useful; more than one means that each read is a request to a store.
    """

    __slots__ = ()
    path: Location
    size: int
    version: str | None = None
    lanes: int = 1

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            CorruptCheckpointError: It ends before that.
            CheckpointError: It cannot be read.
        """
        raise NotImplementedError

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes at `offset`.

        Raises:
            CorruptCheckpointError: It ends before that.
            CheckpointError: It cannot be read.
        """
        buffer[:] = self.read(offset, len(buffer))

    def prefetch(self, extents: Iterable[Extent]) -> None:
        """Announce that extents of any stored sources will be read soon; objects in stores are fetched together."""

    def trips(self, extents: Iterable[Extent]) -> int:  # noqa: ARG002
        """The number of requests that `prefetch` would make."""
        return 0

    def ahead(self, extents: Iterable[Extent]) -> Iterator[bytes | memoryview]:
        """The bytes of extents of any stored sources in order, with several reads in progress in advance."""
        return (extent.read() for extent in extents)

    def check(self, offset: int, length: int) -> None:
        """Check that the file has a range.

        Raises:
            CorruptCheckpointError: The file ends before that.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptCheckpointError(
                f"needs {length} bytes at offset {offset}, but the file has {self.size} bytes",
                path=self.path,
                place=f"offset {offset}",
                hint="The file is truncated or damaged; copy it again from its source.",
            )

    def extent(self, offset: int, length: int) -> Extent:
        """The bytes [offset, offset + length) of the file."""
        return Extent(self, offset, length)


class FileSource(StoredSource):
    """A file opened for reading at any offset; several threads may read at once.

    Args:
        path: The file.

    Raises:
        CheckpointNotFoundError: The path does not exist.
        CheckpointError: It exists but cannot be opened as a file.
    """

    __slots__ = ("_fd", "inode", "path", "size")
    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = -1
        try:
            # Non-blocking, so that opening a pipe does not wait for its other end.
            flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
            self._fd = os.open(self.path, flags)
            status = os.fstat(self._fd)
        except FileNotFoundError:
            raise CheckpointNotFoundError("no such file or folder", path=self.path) from None
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", path=self.path) from error
        except ValueError as error:
            raise CheckpointError(f"cannot be opened: {error}", path=self.path) from error
        if not S_ISREG(status.st_mode):
            raise CheckpointError("is not a regular file", path=self.path)
        self.size = status.st_size
        self.inode = (status.st_dev, status.st_ino)

    def fileno(self) -> int:
        """The file descriptor."""
        return self._fd

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`.

        Raises:
            CorruptCheckpointError: The file ends before that.
        """
        self.check(offset, length)
        try:
            parts = []
            while length:
                part = os.pread(self._fd, min(length, 1 << 30), offset)
                if not part:
                    raise CorruptCheckpointError("the file shrank while it was read", path=self.path)
                parts.append(part)
                offset += len(part)
                length -= len(part)
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror}", path=self.path, place=f"offset {offset}"
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes at `offset`.

        Raises:
            CorruptCheckpointError: The file ends before that.
        """
        if not hasattr(os, "preadv"):
            buffer[:] = self.read(offset, len(buffer))
            return
        try:
            while buffer:
                done = os.preadv(self._fd, [buffer], offset)
                if not done:
                    raise CorruptCheckpointError("the file shrank while it was read", path=self.path)
                buffer = buffer[done:]
                offset += done
        except OSError as error:
            raise CheckpointError(
                f"cannot be read: {error.strerror}", path=self.path, place=f"offset {offset}"
            ) from error

    def close(self) -> None:
        """Close the descriptor; the file cannot be read afterwards."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        try:  # noqa: SIM105 - when the interpreter exits, contextlib may be gone
            self.close()
        except Exception:  # noqa: BLE001
            pass

    def __repr__(self) -> str:
        return f"FileSource({self.path}, {self.size} bytes)"


class FileSlice:
    """A part of a file, with offsets counted from its beginning: an archive inside a larger file.

    Args:
        file: The file.
        start: The offset of the part in the file.
        size: The number of bytes of the part.

    Raises:
        CorruptCheckpointError: The file ends before the part does.
    """

    __slots__ = ("file", "path", "size", "start")

    def __init__(self, file: StoredSource, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > file.size:
            raise CorruptCheckpointError(
                f"a part of {size} bytes should be at offset {start}, but the file has {file.size} bytes",
                path=file.path,
                place=f"offset {start}",
                hint="The file is truncated or damaged; copy it again from its source.",
            )
        self.file = file
        self.path = file.path
        self.start = start
        self.size = size

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset` of the part.

        Raises:
            CorruptCheckpointError: The part ends before that.
        """
        self._check(offset, length)
        return self.file.read(self.start + offset, length)

    def extent(self, offset: int, length: int) -> Extent:
        """The bytes [offset, offset + length) of the part, as bytes of the file."""
        self._check(offset, length)
        return Extent(self.file, self.start + offset, length)

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise CorruptCheckpointError(
                f"needs {length} bytes at {offset} of a part of {self.size} bytes",
                path=self.path,
                place=f"offset {self.start + offset}",
            )


class Extent(NamedTuple):
    """`length` bytes of `source` from `offset`; a source of None stands for zeros."""

    source: ByteSource | None
    offset: int
    length: int

    def cut(self, start: int, stop: int) -> Extent:
        """The bytes [start, stop) of this extent."""
        return Extent(self.source, self.offset + start, stop - start)

    def read(self) -> bytes:
        """The bytes themselves."""
        return self.source.read(self.offset, self.length) if self.source is not None else bytes(self.length)


class InMemory:
    """Bytes in memory as a source."""

    __slots__ = ("_data", "size")

    def __init__(self, data: bytes | memoryview) -> None:
        self._data, self.size = data, len(data)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer at the end."""
        return bytes(self._data[offset : offset + length])

    def extents(self) -> tuple[Extent, ...]:
        """All the bytes."""
        return (Extent(self, 0, self.size),) if self.size else ()


def is_far(extent: Extent) -> bool:
    """Whether the bytes are in a store, so that several reads at once pay."""
    return isinstance(extent.source, StoredSource) and extent.source.lanes > 1


def near(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes in the same order, with those of stores fetched into memory a few reads in advance."""
    for far, group in groupby(extents, is_far):
        if not far:
            yield from group
            continue
        first = next(group)
        assert isinstance(first.source, StoredSource)
        for data in first.source.ahead(chain((first,), group)):
            yield Extent(InMemory(data), 0, len(data))


def announce(extents: Iterable[Extent]) -> None:
    """Announce that these bytes will be read soon in small pieces; has no effect for files."""
    source, extents = _store_of(extents)
    if source is not None:
        source.prefetch(extents)


def trips(extents: Iterable[Extent]) -> int:
    """The number of requests that `announce` would make; 0 for files."""
    source, extents = _store_of(extents)
    return 0 if source is None else source.trips(extents)


def _store_of(extents: Iterable[Extent]) -> tuple[StoredSource | None, Iterable[Extent]]:
    """The first source if it is in a store, as then all of a checkpoint's are; and the same extents."""
    rest = iter(extents)
    first = next(rest, None)
    if first is None or not is_far(first):
        return None, ()
    assert isinstance(first.source, StoredSource)
    return first.source, chain((first,), rest)


def chunks(extents: Iterable[Extent], size: int = CHUNK) -> Iterator[bytes]:
    """The bytes of `extents` in order, in blocks of `size` bytes; the last one may be shorter."""
    pending: list[bytes] = []
    room = size
    for extent in near(extents):
        at = 0
        while at < extent.length:
            block = extent.cut(at, min(at + room, extent.length)).read()
            at += len(block)
            room -= len(block)
            pending.append(block)
            if not room:
                yield pending[0] if len(pending) == 1 else b"".join(pending)
                pending, room = [], size
    if pending:
        yield b"".join(pending)
