"""Folders that appear whole or not at all.

Where the system can exchange two names in one step (Linux), a folder is exchanged with the one that it replaces.
Elsewhere the old folder is first renamed: it is complete under a temporary name until the new one has its name.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

from optimstate.io.atomic import Atomic
from optimstate.io.destination import check_kind
from optimstate.io.temporary import (
    begin,
    count_as_finished,
    count_as_parts,
    count_as_unfinished,
    remove,
    sync_directory,
    take_name,
    temporary_sibling,
)

__all__ = ["AtomicDirectory"]


class AtomicDirectory(Atomic):
    """A new folder that gets its name only when it is complete; see `AtomicFile`.

    The context manager's value is the temporary folder to fill.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = True) -> None:
        self.path = Path(path)
        self._sync = sync

    def __enter__(self) -> Path:
        self._or_nothing(self._begin)
        assert self._temporary is not None
        return self._temporary

    def _begin(self) -> None:
        self._temporary, self.fd = begin(self.path, self._make)

    def _make(self, temporary: Path) -> int:
        self._temporary = temporary
        temporary.mkdir()
        return os.open(temporary, os.O_RDONLY)

    def _complete(self) -> None:
        assert self._temporary is not None
        if self._sync:
            for inner in os.walk(self._temporary, topdown=False):
                sync_directory(Path(inner[0]))
        check_kind(self.path)
        if os.path.lexists(self.path):
            self._replace(self._temporary)
        else:
            take_name(self._temporary, self.path)
        if self._sync:
            sync_directory(self.path.parent)
        count_as_parts(self._temporary)
        self._close()

    def _replace(self, temporary: Path) -> None:
        """Exchange the new folder with the file or folder that has its name, and remove the latter."""
        if _exchange(temporary, self.path):
            count_as_finished(self.path, temporary)
            count_as_unfinished(temporary)  # now the name of the old folder
            remove(temporary)
            return
        replaced = temporary_sibling(self.path)
        try:
            self.path.replace(replaced)
            temporary.replace(self.path)
        except BaseException:
            if not os.path.lexists(self.path) and os.path.lexists(replaced):
                replaced.replace(self.path)
            raise
        count_as_unfinished(replaced)
        count_as_finished(self.path, temporary)
        remove(replaced)


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False if the system or the file system cannot. See renameat2(2)."""
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))
