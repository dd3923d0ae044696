"""Outputs that appear whole or not at all, and leave nothing behind.

Everything is written under a temporary name beside its destination, `.NAME.<12 hex digits>.part`, flushed, and only
then renamed. The temporary file is locked while its writer lives, so the next writer of the same destination can tell
what dead ones left and remove it. Whatever ends a writer but SIGKILL or the end of the machine removes what it began.

A folder is exchanged with the one it replaces where the system can do that in one step (Linux). Elsewhere the old one
is renamed first: it stands whole under a temporary name until the new one has its name.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE, S_ISDIR, S_ISREG
from types import TracebackType

from optimstate.errors import (
    CheckpointError,
    DestinationError,
    DestinationExistsError,
)

__all__ = [
    "AtomicDirectory",
    "AtomicFile",
    "AtomicGroup",
    "check_destination",
    "finished",
    "is_leftover",
    "leftovers",
    "remove_unfinished",
    "write_bytes",
]


FLUSH_FROM = 1 << 26  # files from this size on are flushed while they are written

_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{12}\.part", re.DOTALL)
_unfinished: dict[Path, None] = {}  # what this process must remove before it ends, in the order it was begun
_finished: list[Path] = []


def is_leftover(name: str) -> bool:
    """Whether a file or folder is called as unfinished outputs are."""
    return _LEFTOVER.fullmatch(name) is not None


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
        _remove(path)
    return [path for path in removed if not os.path.lexists(path)]


def write_bytes(fd: int, data: bytes | memoryview) -> int:
    """Append bytes to an open file and return their number."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


def check_destination(destination: Path, sources: Sequence[Path], *, force: bool) -> None:
    """Refuse a destination that exists, is one of the inputs, or has no parent folder.

    Raises:
        DestinationExistsError: It exists and `force` is false.
        DestinationError: It is (or holds, or lies in) an input, is neither a regular file nor a folder, or its folder
            does not exist.
    """
    try:
        for source in sources:
            if destination.exists() and source.exists() and destination.samefile(source):
                raise DestinationError(
                    f"{destination}: source and destination are the same",
                    hint="Give another destination; `remap --in-place` changes a file where it is.",
                )
            resolved, inside = destination.resolve(), source.resolve()
            if source.is_dir() and inside in resolved.parents:
                raise DestinationError(
                    f"{destination}: lies inside the source {source}", hint="Give a path outside of it."
                )
            if destination.is_dir() and resolved in inside.parents:
                raise DestinationError(f"{destination}: holds the source {source}", hint="Give another destination.")
        _check_kind(destination)
        if os.path.lexists(destination) and not force:
            raise DestinationExistsError(f"{destination}: exists already", hint="Give --force to replace it.")
        if not destination.parent.is_dir():
            raise DestinationError(
                f"{destination}: the folder {destination.parent} does not exist", hint="Create it first."
            )
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, DestinationError):
            raise
        raise _cannot(destination, error) from error


def _check_kind(path: Path) -> None:
    """Refuse to replace anything but files and folders: pipes, sockets and devices are not ours to remove."""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not (S_ISREG(mode) or S_ISDIR(mode)):
            raise DestinationError(
                f"{path}: is not a regular file or folder",
                hint="Give another destination; to write to a pipe, write a file and copy it.",
            )


def _cannot(path: Path, error: BaseException) -> DestinationError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DestinationError(f"{path}: cannot be written: {reason}")


# --- names and locks --------------------------------------------------------------------------------------------------


def _temporary_sibling(path: Path) -> Path:
    begin = os.fsdecode(os.fsencode(path.name)[:200])
    return path.with_name(f".{begin}.{os.urandom(6).hex()}.part")


def _lock(fd: int) -> bool | None:
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


def _begin(path: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make and lock a temporary file or folder beside `path`; dead ones of the same destination are removed first."""
    _check_kind(path)
    _remove_dead(path)
    while True:
        temporary = _temporary_sibling(path)
        _unfinished[temporary] = None  # before there is anything to remove
        fd = make(temporary)
        # Another process may take it for a dead one in the moment before it is locked: then there is a next name.
        if _lock(fd) is not False and os.path.lexists(temporary):
            return temporary, fd
        os.close(fd)
        _remove(temporary)


def _remove_dead(path: Path) -> None:
    """Remove what writers of this destination left who are no longer there."""
    begin = _temporary_sibling(path).name[:-18]
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return
    for name in names:
        dead = path.with_name(name)
        if not (name.startswith(begin) and is_leftover(name)) or len(name) != len(begin) + 18 or dead in _unfinished:
            continue
        with suppress(OSError):
            fd = os.open(dead, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
            try:
                if _lock(fd):
                    _remove(dead)
            finally:
                os.close(fd)


def _remove(path: Path) -> None:
    """Remove a temporary file or folder; it counts as unfinished until it is gone."""
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except OSError:
        from shutil import rmtree

        rmtree(path, ignore_errors=True)
    if not os.path.lexists(path):
        _unfinished.pop(path, None)


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # not every system can sync a folder
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _rename(temporary: Path, path: Path) -> None:
    temporary.replace(path)
    _unfinished.pop(temporary, None)
    _finished.append(path)


# --- files ------------------------------------------------------------------------------------------------------------


class _Flusher:
    """Writes a growing file back to the disk while it is still being written, so that little is left at the end."""

    def __init__(self, fd: int) -> None:
        from threading import Event, Thread

        self._fd = fd
        self._stopped = Event()
        self._error: OSError | None = None
        self._thread = Thread(target=self._run, name="optimstate-flusher", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopped.wait(0.02):
                os.fdatasync(self._fd)
        except OSError as error:  # the system reports a failed write once: it must not be lost here
            self._error = error

    def stop(self) -> None:
        """Wait for the thread; raises what it met."""
        self._stopped.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


class AtomicFile:
    """A new file that takes its name only when it is complete and on disk.

    Used as a context manager; an exception of any kind removes what was written and leaves any older file as it was.

    Args:
        path: The final name.
        expected_size: A hint that lets the file system allocate at once.
        sync: Flush to the disk before the file takes its name; without it a power cut can lose what was written.
        group: Files that take their names together; this one waits for the others.

    Raises:
        DestinationError: The file cannot be created, written or renamed, or there is something else than a file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expected_size: int = 0,
        sync: bool = True,
        group: AtomicGroup | None = None,
    ) -> None:
        self.path = Path(path)
        self._temporary: Path | None = None
        self._expected_size = expected_size
        self._sync = sync
        self._group = group
        self._flusher: _Flusher | None = None
        self.fd = -1

    def __enter__(self) -> AtomicFile:
        try:
            self._temporary, self.fd = _begin(self.path, self._make)
            if self._expected_size and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self.fd, 0, self._expected_size)
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                        raise
            if self._sync and self._expected_size >= FLUSH_FROM:
                self._flusher = _Flusher(self.fd)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, DestinationError):
                raise _cannot(self.path, error) from error
            raise
        return self

    def _make(self, temporary: Path) -> int:
        self._temporary = temporary
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(temporary, flags, 0o666)

    def tell(self) -> int:
        """The current position."""
        return os.lseek(self.fd, 0, os.SEEK_CUR)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        write_bytes(self.fd, data)
        return len(data)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, DestinationError | CheckpointError):
                raise _cannot(self.path, error) from error
            return
        try:
            self._complete()
            if self._group is not None:
                self._group.take(self._taken())
            else:
                self._take_name()
                if self._sync:
                    _sync_directory(self.path.parent)
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError) and not isinstance(failure, DestinationError):
                raise _cannot(self.path, failure) from failure
            raise
        self._close()

    def _complete(self) -> None:
        """Everything is there and flushed; only the name is missing."""
        assert self._temporary is not None
        os.ftruncate(self.fd, self.tell())
        if self._flusher is not None:
            self._flusher.stop()
        if self._sync:
            os.fsync(self.fd)
        with suppress(FileNotFoundError):
            self._temporary.chmod(S_IMODE(self.path.stat().st_mode))

    def _take_name(self) -> None:
        assert self._temporary is not None
        _check_kind(self.path)
        _rename(self._temporary, self.path)

    def _taken(self) -> tuple[Path, Path]:
        assert self._temporary is not None
        return self._temporary, self.path

    def _close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _discard(self) -> None:
        if self._flusher is not None:
            with suppress(OSError):
                self._flusher.stop()
        if self._temporary is not None:
            _remove(self._temporary)
        with suppress(OSError):
            self._close()


class AtomicGroup:
    """Files beside one another that take their names together, when all of them are complete: shards and their index.

    The names are given in the order in which the files were written. A reader that finds the others by the last one,
    the index, meets the old checkpoint or the new one, provided that no name of the new is one of the old.
    """

    def __init__(self, *, sync: bool = True) -> None:
        self._sync = sync
        self._waiting: list[tuple[Path, Path]] = []

    def take(self, waiting: tuple[Path, Path]) -> None:
        """Hold a complete file and its name."""
        self._waiting.append(waiting)

    def __enter__(self) -> AtomicGroup:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        named: list[Path] = []
        try:
            if error is None:
                for temporary, path in self._waiting[:-1]:
                    if os.path.lexists(path):
                        raise DestinationError(f"{path}: appeared while it was written")
                    named.append(path)
                    _rename(temporary, path)
                if self._sync and self._waiting:
                    _sync_directory(self._waiting[-1][1].parent)
                for temporary, path in self._waiting[-1:]:
                    _check_kind(path)
                    _rename(temporary, path)
                    named.clear()
                    if self._sync:
                        _sync_directory(path.parent)
                return
        except BaseException as failure:
            self._discard(named)
            if isinstance(failure, OSError) and not isinstance(failure, DestinationError):
                raise _cannot(self._waiting[-1][1], failure) from failure
            raise
        self._discard(named)

    def _discard(self, named: Sequence[Path]) -> None:
        for temporary, _ in self._waiting:
            _remove(temporary)
        for path in named:
            _remove(path)
            if path in _finished:
                _finished.remove(path)


# --- folders ----------------------------------------------------------------------------------------------------------


class AtomicDirectory:
    """A new folder that takes its name only when it is complete; see `AtomicFile`.

    The context manager's value is the temporary folder to fill.
    """

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = True) -> None:
        self.path = Path(path)
        self._sync = sync
        self._temporary: Path | None = None
        self._fd = -1

    def __enter__(self) -> Path:
        try:
            self._temporary, self._fd = _begin(self.path, self._make)
        except BaseException as error:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, DestinationError):
                raise _cannot(self.path, error) from error
            raise
        return self._temporary

    def _make(self, temporary: Path) -> int:
        self._temporary = temporary
        temporary.mkdir()
        return os.open(temporary, os.O_RDONLY)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._discard()
            if isinstance(error, OSError) and not isinstance(error, DestinationError | CheckpointError):
                raise _cannot(self.path, error) from error
            return
        assert self._temporary is not None
        try:
            if self._sync:
                for inner in os.walk(self._temporary, topdown=False):
                    _sync_directory(Path(inner[0]))
            _check_kind(self.path)
            if os.path.lexists(self.path):
                self._replace(self._temporary)
            else:
                _rename(self._temporary, self.path)
            if self._sync:
                _sync_directory(self.path.parent)
        except BaseException as failure:
            self._discard()
            if isinstance(failure, OSError) and not isinstance(failure, DestinationError):
                raise _cannot(self.path, failure) from failure
            raise
        within = f"{self._temporary}{os.sep}"
        _finished[:] = [path for path in _finished if not str(path).startswith(within)]
        self._close()

    def _replace(self, temporary: Path) -> None:
        """Exchange the new folder with what stands at its place, which is removed."""
        if _exchange(temporary, self.path):
            _finished.append(self.path)
            _remove(temporary)  # under this name stands what was replaced
            return
        replaced = _temporary_sibling(self.path)
        try:
            self.path.replace(replaced)
            temporary.replace(self.path)
        except BaseException:
            if not os.path.lexists(self.path) and os.path.lexists(replaced):
                replaced.replace(self.path)
            raise
        _unfinished[replaced] = None
        _unfinished.pop(temporary, None)
        _finished.append(self.path)
        _remove(replaced)

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _discard(self) -> None:
        if self._temporary is not None:
            _remove(self._temporary)
        with suppress(OSError):
            self._close()


_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, where the system and the file system can; renameat2(2)."""
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
