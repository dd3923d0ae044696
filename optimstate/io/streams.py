"""Sources as file objects, for libraries that read files."""

from __future__ import annotations

import io
from typing import Any, Protocol

__all__ = ["Source", "SourceFile"]


class Source(Protocol):
    """Bytes by position, with a known size."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""


class SourceFile(io.RawIOBase):
    """A source as a raw binary file object."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    # For the methods see `io.RawIOBase`.
    def readable(self) -> bool:  # noqa: D102
        return True

    def seekable(self) -> bool:  # noqa: D102
        return True

    def tell(self) -> int:  # noqa: D102
        return self._at

    def seek(self, offset: int, whence: int = 0, /) -> int:  # noqa: D102
        self._at = max(offset + (0, self._at, self._source.size)[whence], 0)
        return self._at

    def readinto(self, buffer: Any, /) -> int:  # noqa: D102
        length = max(min(len(buffer), self._source.size - self._at), 0)
        buffer[:length] = self._source.read(self._at, length)
        self._at += length
        return length
