"""Temporary names of unfinished outputs, by which the leftovers of dead writers are recognised.

Everything is written under a temporary name beside its destination, `.NAME.<12 hex digits>.part`. The temporary file is
locked while its writer lives, so the next writer of the same destination can recognise and remove the leftovers of dead
ones. A writer that ends in any way but SIGKILL or a power cut removes its unfinished outputs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from optimstate.io.destination import check_kind
from optimstate.io.location import Location

__all__ = [
    "begin",
    "count_as_finished",
    "count_as_parts",
    "count_as_unfinished",
    "finished",
    "is_leftover",
    "keep",
    "kept",
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
_unfinished: dict[Path, None] = {}  # unfinished outputs of this process, which it must remove before it ends
_finished: list[Location] = []
_kept: list[str] = []


def is_leftover(name: str) -> bool:
    """Whether the name of a file or folder is that of an unfinished output."""
    return re.fullmatch(_LEFTOVER, name) is not None


def leftovers(folder: Path) -> Iterator[Path]:
    """The unfinished outputs in a folder and below."""
    for inner, folders, files in os.walk(folder):
        found = sorted(filter(is_leftover, [*folders, *files]))
        yield from (Path(inner, name) for name in found)
        folders[:] = [name for name in folders if name not in found]


def finished() -> Sequence[Location]:
    """The outputs that this process has finished, in order; files may have been removed since."""
    return _finished


def remove_unfinished() -> list[Path]:
    """Remove the unfinished outputs of this process, when a program is interrupted.

    Returns:
        The removed files and folders.
    """
    begun = list(_unfinished)
    removed = [path for path in begun if os.path.lexists(path)]
    for path in begun:
        remove(path)
    return [path for path in removed if not os.path.lexists(path)]


def keep(place: str) -> None:
    """Remember an unfinished output with which another attempt of the same command goes on."""
    _kept.append(place)


def kept() -> Sequence[str]:
    """The unfinished outputs of this process with which another attempt of the same command goes on."""
    return _kept


def temporary_sibling(path: Path) -> Path:
    """A new temporary name beside a path."""
    begin = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{begin}.{os.urandom(6).hex()}.part")


def lock(fd: int) -> bool | None:
    """Try to lock an open file; False if another process has it locked, None where files cannot be locked."""
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
    """Create and lock a temporary file or folder beside `path`, after removing the leftovers of dead writers.

    Args:
        path: The destination.
        make: Creates the file or folder and returns an open descriptor.

    Returns:
        The temporary name and the descriptor.
    """
    check_kind(path)
    for dead in others_of(path):
        remove_dead(dead)
    while True:
        temporary = temporary_sibling(path)
        _unfinished[temporary] = None  # before it is created
        fd = make(temporary)
        # Before it is locked, another process may remove it as a dead writer's: then the next name is tried.
        if lock(fd) is not False and os.path.lexists(temporary):
            return temporary, fd
        os.close(fd)
        remove(temporary)


def others_of(path: Path) -> Iterator[Path]:
    """The temporary names for this destination that are not of this process."""
    begin = temporary_sibling(path).name[:-18]
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return
    for name in names:
        other = path.with_name(name)
        if name.startswith(begin) and is_leftover(name) and len(name) == len(begin) + 18 and other not in _unfinished:
            yield other


def remove_dead(dead: Path) -> bool | None:
    """Remove a temporary file or folder unless its writer lives; False if it does, None if that is not known."""
    with suppress(OSError):
        fd = os.open(dead, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            is_dead = lock(fd)
            if is_dead:
                remove(dead)
            return is_dead
        finally:
            os.close(fd)
    return None


def remove(path: Path) -> None:
    """Remove a temporary file or folder; it counts as unfinished until it is gone."""
    for _ in range(_TRIES):  # a disk error may not occur again
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
    """Flush the names in a folder, if the system can."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def take_name(temporary: Path, path: Path) -> None:
    """Give a finished output its name, in one step."""
    temporary.replace(path)
    count_as_finished(path, temporary)


def count_as_finished(path: Location, temporary: Path | None = None) -> None:
    """Count an output as finished under its final name; a file or folder has had a temporary name."""
    if temporary is not None:
        _unfinished.pop(temporary, None)
    _finished.append(path)


def count_as_unfinished(path: Path) -> None:
    """Count a file or folder as unfinished, so that it is removed before the program ends."""
    _unfinished[path] = None


def withdraw(path: Path) -> None:
    """Remove an output that already has its name but is useless without others."""
    remove(path)
    if path in _finished:
        _finished.remove(path)


def count_as_parts(folder: Path) -> None:
    """Do not count the outputs in a folder as finished separately any more."""
    within = f"{folder}{os.sep}"
    _finished[:] = [path for path in _finished if not str(path).startswith(within)]
