"""Files that appear whole or not at all, one by one or several together.

Everything is written under a temporary name (`optimstate.io.temporary`), flushed, and only then renamed.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import IO, Protocol

from optimstate.errors import DestinationError
from optimstate.io.atomic import Atomic
from optimstate.io.copying import Copier, FileCopier
from optimstate.io.destination import check_kind
from optimstate.io.extents import Extent, Progress
from optimstate.io.temporary import begin, count_as_unfinished, remove, sync_directory, take_name, withdraw

__all__ = ["AtomicFile", "AtomicGroup", "FileOutput", "Output", "write_bytes"]

_MAX_LOCKS = 500  # files of a group that are held open; a process may commonly open 1,024
FLUSH_FROM = 1 << 26  # files from this size on are flushed while they are written


def write_bytes(fd: int, data: bytes | memoryview) -> int:
    """Append bytes to an open file and return their number."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


class Output(Protocol):
    """A file or object that is being written, from its beginning to its end.

    Used as a context manager: left without an error it takes its name, whole; left with one it never was.
    """

    def tell(self) -> int:
        """The current position, where the next bytes go."""

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:
        """Append the bytes of `extents` and return their number."""

    def copier(self, progress: Progress | None = None) -> Copier:
        """What fills a stretch from the current position on; `seek` goes on behind it."""

    def seek(self, position: int) -> None:
        """Go on at the position up to which a copier has filled the output."""

    def stream(self) -> AbstractContextManager[IO[bytes]]:
        """The output as the file that libraries write to, from the current position on."""


class FileOutput:
    """An open file as an `Output`; whoever opened it closes it."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def tell(self) -> int:
        """The current position."""
        return os.lseek(self.fd, 0, os.SEEK_CUR)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        return write_bytes(self.fd, data)

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:
        """Append the bytes of `extents` and return their number."""
        start = self.tell()
        with self.copier(progress) as copier:
            length = copier.put(extents, start)
        self.seek(start + length)
        return length

    def copier(self, progress: Progress | None = None) -> Copier:
        """What fills a stretch of the file; its position is not moved."""
        return FileCopier(self.fd, progress)

    def seek(self, position: int) -> None:
        """Go on at this position."""
        os.lseek(self.fd, position, os.SEEK_SET)

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The file as libraries write to it."""
        with os.fdopen(os.dup(self.fd), "wb") as file:
            yield file
        os.lseek(self.fd, 0, os.SEEK_END)


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


class AtomicFile(Atomic, FileOutput):
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
        self._expected_size = expected_size
        self._sync = sync
        self._group = group
        self._flusher: _Flusher | None = None

    def __enter__(self) -> AtomicFile:
        self._or_nothing(self._begin)
        return self

    def _begin(self) -> None:
        self._temporary, self.fd = begin(self._beside(), self._make)
        if self._expected_size and hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self.fd, 0, self._expected_size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                    raise
        if self._sync and self._expected_size >= FLUSH_FROM:
            self._flusher = _Flusher(self.fd)

    def _beside(self) -> Path:
        """The path whose temporary name this one has."""
        return self.path if self._group is None else self._group.path

    def _make(self, temporary: Path) -> int:
        self._temporary = temporary
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        return os.open(temporary, flags, 0o666)

    def _complete(self) -> None:
        assert self._temporary is not None
        self._flush(self._temporary)
        if self._group is not None:
            self.fd = self._group.take(self._temporary, self.path, self.fd)
        else:
            check_kind(self.path)
            take_name(self._temporary, self.path)
            if self._sync:
                sync_directory(self.path.parent)
        self._close()

    def _flush(self, temporary: Path) -> None:
        """Everything is there and on disk; only the name is missing."""
        os.ftruncate(self.fd, self.tell())
        if self._flusher is not None:
            self._flusher.stop()
        if self._sync:
            os.fsync(self.fd)
        with suppress(FileNotFoundError):
            temporary.chmod(S_IMODE(self.path.stat().st_mode))

    def _discard(self) -> None:
        if self._flusher is not None:
            with suppress(OSError):
                self._flusher.stop()
        super()._discard()


class AtomicGroup(Atomic):
    """Files beside one another that take their names together, when all of them are complete: shards and their index.

    The names are given in the order in which the files were written. A reader that finds the others by the last one,
    the index, meets the old checkpoint or the new one, provided that no name of the new is one of the old.

    Args:
        path: That of the last one, whose temporary names all of them have: so the next writer finds what is left.
        replaced: Files that are of no use when the last one has its name; they are removed then.
        sync: As for `AtomicFile`.
    """

    def __init__(self, path: Path, *, replaced: Sequence[Path] = (), sync: bool = True) -> None:
        self.path = path
        self._replaced = replaced
        self._sync = sync
        self._waiting: list[tuple[Path, Path]] = []
        self._named: list[Path] = []
        self._locks: list[int] = []
        self._last: Path | None = None  # the last temporary name, from when on it may be gone

    def take(self, temporary: Path, path: Path, fd: int) -> int:
        """Hold a complete file, its name and its lock, without which another writer would take it for a dead one's.

        Returns:
            What the file's writer still has to close, -1 for nothing.
        """
        self._waiting.append((temporary, path))
        if len(self._locks) == _MAX_LOCKS:
            return fd
        self._locks.append(fd)
        return -1

    def __enter__(self) -> AtomicGroup:
        return self

    def _complete(self) -> None:
        for temporary, path in self._waiting[:-1]:
            if os.path.lexists(path):
                raise DestinationError(f"{path}: appeared while it was written")
            self._named.append(path)
            take_name(temporary, path)
        if self._sync and self._waiting:
            sync_directory(self.path.parent)
        for temporary, path in self._waiting[-1:]:
            check_kind(path)
            self._last = temporary
            take_name(temporary, path)
            if self._sync:
                sync_directory(path.parent)
        self._remove_replaced()
        self._close()

    def _close(self) -> None:
        while self._locks:
            os.close(self._locks.pop())

    def _remove_replaced(self) -> None:
        for path in self._replaced:
            count_as_unfinished(path)
        for path in self._replaced:
            remove(path)

    def _discard(self) -> None:
        if self._last is not None and not os.path.lexists(self._last):
            self._remove_replaced()  # everything has its name: only this was missing
            self._close()
            return
        for temporary, _ in self._waiting:
            remove(temporary)
        for path in self._named:
            withdraw(path)
        with suppress(OSError):
            self._close()
