"""Hard links: giving a file a second name without copying its bytes."""

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
    """Link a file to a second name, if the file system can.

    Both names then have the same bytes. This library never changes a file under its name but replaces it, which does
    not affect the other name.

    Args:
        source: The open file.
        target: The new name. If a file has it, it was linked or copied by an earlier attempt to write the same folder.

    Returns:
        Whether the file is linked; otherwise nothing was done, or a link to another file was removed.

    Raises:
        CheckpointError: Another file has taken the name of the source since it was opened.
        OSError: The target cannot be made.
    """
    if not isinstance(source, FileSource) or not isinstance(target, Path):
        return False
    try:
        os.link(str(source.path), target)
    except FileExistsError:
        found = target.lstat()
        if (found.st_dev, found.st_ino) != source.inode:
            if found.st_nlink == 1:
                return False
            target.unlink()  # nothing may be written to it
            return linked(source, target)
    except OSError as error:
        if error.errno not in _CANNOT_LINK:
            raise
        return False
    found = target.stat()
    if (found.st_dev, found.st_ino, found.st_size) != (*source.inode, source.size):
        target.unlink()
        raise CheckpointError("was replaced while it was read", path=source.path)
    return True
