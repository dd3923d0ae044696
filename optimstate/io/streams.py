"""Bytes by position as the files that libraries read."""

from __future__ import annotations

import io
from typing import Any, Protocol

__all__ = ["Source", "SourceFile"]


class Source(Protocol):
    """Bytes by position, so many of them."""

    size: int

    def read(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes at `offset`."""


class SourceFile(io.RawIOBase):
    """A source as the file that libraries ask for."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0

    # The methods of a raw file, as `io` describes them.
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
