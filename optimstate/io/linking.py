"""Files that appear in a second folder without their bytes being moved."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from optimstate.errors import CheckpointError
from optimstate.io.extents import FileSource, StoredSource
from optimstate.io.location import Location

__all__ = ["linked"]

_CANNOT_LINK = {
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
}


def linked(source: StoredSource, target: Location) -> bool:
    """Give a file a second name where the file systems can.

    Both names have the same bytes from then on. Whatever this library writes takes the place of a name and leaves the
    bytes behind the other alone.

    Args:
        source: The file, which is open.
        target: A name that is free.

    Returns:
        Whether it has the name now; otherwise nothing was done.

    Raises:
        CheckpointError: Another file has taken the name of the source since it was opened.
        OSError: The target cannot be made.
    """
    if not isinstance(source, FileSource) or not isinstance(target, Path):
        return False
    try:
        os.link(str(source.path), target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    found = target.stat()
    if (found.st_dev, found.st_ino, found.st_size) != (*source.inode, source.size):
        target.unlink()
        raise CheckpointError("was replaced while it was read", path=source.path)
    return True
