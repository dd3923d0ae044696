"""A new directory behind the old one, in a file that torch loads at every moment in between.

Readers look for the end record of a zip archive in the last 64 KB of the file. So that they find one while a longer
directory is written, end records that lead to the old directory are put further and further behind the file first, none
more than 60 kB after the one before; the last stands behind the place of all that is new. What is new is written in
front of it, and cutting it off makes the new directory the valid one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from optimstate.formats.torch.zip_records import end_records

__all__ = ["append_directory"]

_STEP = 60_000  # less than the 65,557 bytes in which an end record is looked for, by more than a record's length


def append_directory(fd: int, size: int, new: bytes, *, directory: int, entries: int) -> None:
    """Write new records, directory and end behind an archive; an error or kill at any point leaves the old or the new.

    Args:
        fd: The file, open for writing.
        size: Its bytes.
        new: All that is to stand behind them.
        directory: Where the old directory begins.
        entries: How many it has.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    stop = size + len(new)
    try:
        for at in _places(size, stop):
            # What is between the directory and this record is told to belong to it: readers stop after the last entry.
            _write(fd, end_records(entries, directory, at), at)
            os.fsync(fd)
        _write(fd, new, size)
        os.fsync(fd)
        os.ftruncate(fd, stop)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, size)
        raise


def _places(size: int, stop: int) -> Iterator[int]:
    yield from range(size + _STEP, stop, _STEP)
    yield stop


def _write(fd: int, data: bytes, position: int) -> None:
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, position)
        rest = rest[done:]
        position += done
