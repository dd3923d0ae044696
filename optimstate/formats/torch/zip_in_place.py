"""Appending a new directory to an archive that torch can load at every moment of the change.

Readers look for the end record of a zip archive in the last 64 KB of the file. So that they find one while a longer
directory is written, end records that point to the old directory are first written after the end of the file, at most
60 kB apart, the last of them after the space for the new bytes. The new bytes are then written in front of that last
one, and truncating the file there makes the new directory the valid one.
"""

from __future__ import annotations

import os

from optimstate.formats.torch.zip_records import end_records
from optimstate.io.copying import write_at

__all__ = ["append_directory"]

_STEP = 60_000  # less than the 65,557 bytes that readers search, by more than the length of an end record


def append_directory(fd: int, size: int, new: bytes, *, directory: int, entries: int) -> None:
    """Append records, a directory and its end; an error or kill at any point leaves the old archive or the new one.

    Args:
        fd: The file, open for writing.
        size: Its number of bytes.
        new: The bytes to append.
        directory: The offset of the old directory.
        entries: The number of its entries.

    Raises:
        OSError: It cannot be written; the file is as it was.
    """
    stop = size + len(new)
    try:
        for at in (*range(size + _STEP, stop, _STEP), stop):
            # This record counts all bytes before it as directory; readers stop after the last entry.
            write_at(fd, end_records(entries, directory, at), at)
            os.fsync(fd)
        write_at(fd, new, size)
        os.fsync(fd)
        os.ftruncate(fd, stop)
        os.fsync(fd)
    except BaseException:
        os.ftruncate(fd, size)
        raise
