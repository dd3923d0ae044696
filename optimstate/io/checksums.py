"""Computing digests of bytes, and comparing bytes with the checksums that their containers recorded."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, NamedTuple

from optimstate.errors import UsageError
from optimstate.io.copying import BLOCK, blocks
from optimstate.io.extents import Extent, Progress
from optimstate.io.location import Location

__all__ = ["ALGORITHMS", "Digest", "Recorded", "bytes_of_crc", "compare", "digest_of", "recorded"]

ALGORITHMS = {"sha256": 64, "xxh3": 32}
"""The digests that can be recorded -> their number of hexadecimal digits."""

Blocks = Callable[[memoryview], Iterable[bytes | memoryview]]
"""Returns bytes in order, in blocks; each block may be in the given buffer, which the next one overwrites."""


@cache
def _crc_table() -> tuple[list[int], dict[int, int]]:
    """The table of CRC-32, and the index of each entry by its highest byte."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
        table.append(value)
    return table, {entry >> 24: index for index, entry in enumerate(table)}


def bytes_of_crc(crc: int) -> bytes:
    """The four bytes with a CRC-32; there is exactly one such message for each checksum."""
    table, index_of = _crc_table()
    register = crc ^ 0xFFFFFFFF
    for _ in range(4):
        index = index_of[register >> 24]
        register = (register ^ table[index]) << 8 & 0xFFFFFFFF | index
    return (register ^ 0xFFFFFFFF).to_bytes(4, "little")


class Digest:
    """A digest to which bytes are added.

    Args:
        algorithm: One of `ALGORITHMS`.

    Raises:
        UsageError: The algorithm is unknown, or its library is not installed.
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
        """The digest of the bytes so far, in hexadecimal digits."""
        return str(self._hash.hexdigest())


def digest_of(extents: Iterable[Extent], algorithm: str) -> str:
    """The digest of the bytes of `extents`, in hexadecimal digits."""
    found = Digest(algorithm)
    for block in blocks(extents, memoryview(bytearray(BLOCK))):
        found.update(block)
    return found.value


class Recorded(NamedTuple):
    """Bytes with the checksum that their container recorded.

    Attributes:
        path: The file of the bytes.
        place: Their place in it, for messages.
        blocks: Returns the bytes.
        expected: The CRC-32 as a number, or a digest in hexadecimal digits.
        algorithm: `crc32`, or one of `ALGORITHMS`.
        extents: The extents of the bytes; empty if they are stored compressed.
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
    """The record for bytes that are stored uncompressed."""
    return Recorded(path, place, partial(blocks, extents), expected, algorithm, extents)


def compare(
    found: Recorded, buffer: memoryview, *, stopped: Callable[[], bool] | None = None, progress: Progress | None = None
) -> bool:
    """Whether bytes match their recorded checksum; also True if `stopped` ended the comparison.

    Raises:
        CheckpointError: The bytes cannot be read.
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
