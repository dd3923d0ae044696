"""Checksums and digests of bytes, and those that containers record of theirs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

from optimstate.errors import UsageError
from optimstate.io.copying import BLOCK, blocks
from optimstate.io.extents import Extent, Progress
from optimstate.io.location import Location

__all__ = ["ALGORITHMS", "Digest", "Recorded", "compare", "digest_of", "recorded"]

ALGORITHMS = {"sha256": 64, "xxh3": 32}
"""The digests that can be recorded, by the number of their hexadecimal digits."""

Blocks = Callable[[memoryview], Iterable[bytes | memoryview]]
"""Gives the bytes in order; what is read from files may be in the given buffer, the same each time."""


class Digest:
    """A digest of the bytes given so far.

    Args:
        algorithm: One of `ALGORITHMS`.

    Raises:
        UsageError: There is no such algorithm, or its library is not installed.
    """

    __slots__ = ("_hash",)

    def __init__(self, algorithm: str) -> None:
        self._hash: Any
        if algorithm == "sha256":
            import hashlib

            self._hash = hashlib.sha256()
        elif algorithm == "xxh3":
            try:
                import xxhash
            except ImportError:
                raise UsageError(
                    "digests of xxh3 need the package xxhash", hint="`pip install 'optimstate[xxh3]'`."
                ) from None
            self._hash = xxhash.xxh3_128()
        else:
            raise UsageError.unknown(f"no digest is called {algorithm}", algorithm, ALGORITHMS)

    def update(self, data: bytes | memoryview) -> None:
        """Add bytes."""
        self._hash.update(data)

    @property
    def value(self) -> str:
        """In hexadecimal digits."""
        return str(self._hash.hexdigest())


def digest_of(extents: Iterable[Extent], algorithm: str) -> str:
    """The digest of the bytes of `extents`, in hexadecimal digits."""
    found = Digest(algorithm)
    for block in blocks(extents, memoryview(bytearray(BLOCK))):
        found.update(block)
    return found.value


class Recorded(NamedTuple):
    """Bytes whose checksum their container recorded.

    Attributes:
        path: The file they are in.
        place: Where in it, for people.
        blocks: Gives them.
        expected: The CRC-32 as a number, a digest in hexadecimal digits.
        algorithm: `crc32`, or one of `ALGORITHMS`.
        extents: Where they are in files, when they are stored as they are.
    """

    path: Location
    place: str
    blocks: Blocks
    expected: int | str
    algorithm: str = "crc32"
    extents: tuple[Extent, ...] = ()


def recorded(
    path: Location, place: str, extents: tuple[Extent, ...], expected: int | str, algorithm: str = "crc32"
) -> Recorded:
    """What was recorded of bytes that are stored as they are."""
    return Recorded(path, place, partial(blocks, extents), expected, algorithm, extents)


def compare(
    found: Recorded, buffer: memoryview, *, stopped: Callable[[], bool] | None = None, progress: Progress | None = None
) -> bool:
    """Whether bytes are as they were recorded; True as well where it was given up.

    Raises:
        CheckpointError: They cannot be read.
        UsageError: The library of the algorithm is not installed.
    """
    digest = None if found.algorithm == "crc32" else Digest(found.algorithm)
    crc = 0
    for block in found.blocks(buffer):
        if stopped is not None and stopped():
            return True
        if digest is None:
            crc = zlib.crc32(block, crc)
        else:
            digest.update(block)
        if progress is not None:
            progress(len(block))
    return (crc if digest is None else digest.value) == found.expected
