"""Temporary names: what is written stands under one until it is complete, and what dead writers left is known by it.

Everything is written under a temporary name beside its destination, `.NAME.<12 hex digits>.part`. The temporary file is
locked while its writer lives, so the next writer of the same destination can tell what dead ones left and remove it.
Whatever ends a writer but SIGKILL or the end of the machine removes what it began.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from optimstate.io.destination import check_kind

__all__ = [
    "begin",
    "count_as_finished",
    "count_as_parts",
    "count_as_unfinished",
    "finished",
    "is_leftover",
    "leftovers",
    "lock",
    "others_of",
    "remove",
    "remove_dead",
    "remove_unfinished",
    "sync_directory",
    "take_name",
    "temporary_sibling",
    "withdraw",
]

_TRIES = 3
_LEFTOVER = r"(?s)\..+\.[0-9a-f]{12}\.part"
_unfinished: dict[Path, None] = {}  # what this process must remove before it ends, in the order it was begun
_finished: list[Path] = []


def is_leftover(name: str) -> bool:
    """Whether a file or folder is called as unfinished outputs are."""
    return re.fullmatch(_LEFTOVER, name) is not None


def leftovers(folder: Path) -> Iterator[Path]:
    """What unfinished writers left in a folder and below."""
    for inner, folders, files in os.walk(folder):
        found = sorted(filter(is_leftover, [*folders, *files]))
        yield from (Path(inner, name) for name in found)
        folders[:] = [name for name in folders if name not in found]


def finished() -> Sequence[Path]:
    """What this process has written whole, the last one last."""
    return _finished


def remove_unfinished() -> list[Path]:
    """Remove what this process began and did not finish: for the end of a program that was interrupted.

    Returns:
        What was removed.
    """
    begun = list(_unfinished)
    removed = [path for path in begun if os.path.lexists(path)]
    for path in begun:
        remove(path)
    return [path for path in removed if not os.path.lexists(path)]


def temporary_sibling(path: Path) -> Path:
    """A new temporary name beside a path."""
    begin = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{begin}.{os.urandom(6).hex()}.part")


def lock(fd: int) -> bool | None:
    """Whether this process now holds the lock of an open file; None where files cannot be locked."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def begin(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make and lock a temporary file or folder beside `path`; dead ones of the same destination are removed first."""
    check_kind(path)
    _remove_dead(path)
    while True:
        temporary = temporary_sibling(path)
        _unfinished[temporary] = None  # before there is anything to remove
        fd = make(temporary)
        # Another process may take it for a dead one in the moment before it is locked: then there is a next name.
        if lock(fd) is not False and os.path.lexists(temporary):
            return temporary, fd
        os.close(fd)
        remove(temporary)


def others_of(path: Path) -> Iterator[Path]:
    """The temporary names of this destination that are not this process's."""
    begin = temporary_sibling(path).name[:-18]
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return
    for name in names:
        other = path.with_name(name)
        if name.startswith(begin) and is_leftover(name) and len(name) == len(begin) + 18 and other not in _unfinished:
            yield other


def _remove_dead(path: Path) -> None:
    """Remove what writers of this destination left who are no longer there."""
    for dead in others_of(path):
        remove_dead(dead)


def remove_dead(dead: Path) -> None:
    """Remove a temporary file or folder unless its writer lives."""
    with suppress(OSError):
        fd = os.open(dead, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            if lock(fd):
                remove(dead)
        finally:
            os.close(fd)


def remove(path: Path) -> None:
    """Remove a temporary file or folder; it counts as unfinished until it is gone."""
    for _ in range(_TRIES):  # a disk that fails once does not always fail twice
        try:
            path.unlink()
        except FileNotFoundError:
            break
        except OSError:
            from shutil import rmtree

            rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            break
    if not os.path.lexists(path):
        _unfinished.pop(path, None)


def sync_directory(path: Path) -> None:
    """Flush the names in a folder, where the system can."""
    with suppress(OSError):  # not every system can sync a folder
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def take_name(temporary: Path, path: Path) -> None:
    """Give a finished output its name, in one step."""
    temporary.replace(path)
    count_as_finished(temporary, path)


def count_as_finished(temporary: Path, path: Path) -> None:
    """What had a temporary name stands whole at its place."""
    _unfinished.pop(temporary, None)
    _finished.append(path)


def count_as_unfinished(path: Path) -> None:
    """What stands under this name is removed before the program ends."""
    _unfinished[path] = None


def withdraw(path: Path) -> None:
    """Remove an output that has its name already but is of no use alone."""
    remove(path)
    if path in _finished:
        _finished.remove(path)


def count_as_parts(folder: Path) -> None:
    """What was finished within a temporary folder counts no longer by itself."""
    within = f"{folder}{os.sep}"
    _finished[:] = [path for path in _finished if not str(path).startswith(within)]
