"""The items of a data file by their places, which the metadata names, as `scan` reads them."""

from __future__ import annotations

from collections.abc import Sequence

from optimstate.formats.byte_sources import LoadedFile
from optimstate.formats.dcp.pieces import ENDS
from optimstate.io.extents import Extent, FileSlice, StoredSource
from optimstate.io.streams import Source

__all__ = ["ends", "fill", "read_item"]

_SMALL = 1 << 16  # bytes of an archive that is read as a whole


def fill(places: Sequence[tuple[int, int]], size: int) -> bool:
    """Whether places in ascending order fill a file of a size, each with at least a byte and without gaps."""
    end = 0
    for start, length in places:
        if start != end or not length:
            return False
        end += length
    return bool(places) and end == size


def ends(source: StoredSource, start: int, size: int) -> tuple[Extent, ...]:
    """The bytes of an item that are read: all of a small one, else those at its ends."""
    if size <= max(_SMALL, 2 * ENDS):
        return (source.extent(start, size),)
    return source.extent(start, ENDS), source.extent(start + size - ENDS, ENDS)


def read_item(source: StoredSource, start: int, size: int) -> Source:
    """An item of a data file; a small one in memory, because reading it piece by piece takes longer."""
    if size <= _SMALL:
        return LoadedFile(source.path, source.read(start, size))
    return FileSlice(source, start, size)
