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

_MAX_LOCKS = 500  # files of a group that are kept open; a process can commonly open 1,024
FLUSH_FROM = 1 << 26  # bytes from which a file is flushed while it is written


def write_bytes(fd: int, data: bytes | memoryview) -> int:
    """Append bytes to an open file and return their number."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return len(data)


class Output(Protocol):
    """A file or object that is written from its beginning to its end.

    As a context manager it gets its name, complete, if no error is raised; otherwise nothing is left of it.
    """

    def tell(self) -> int:
        """The current position, at which the next bytes are written."""

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:
        """Append the bytes of `extents` and return their number."""

    def copier(self, progress: Progress | None = None) -> Copier:
        """A copier that fills the output from the current position on; the position does not change."""

    def seek(self, position: int) -> None:
        """Set the position to that up to which a copier has filled the output."""

    def stream(self) -> AbstractContextManager[IO[bytes]]:
        """The output, from the current position on, as a binary file object for libraries."""


class FileOutput:
    """An open file as an `Output`; the caller closes it."""

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
        """A copier that fills the file; the position does not change."""
        return FileCopier(self.fd, progress)

    def seek(self, position: int) -> None:
        """Set the position."""
        os.lseek(self.fd, position, os.SEEK_SET)

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The file as a binary file object for libraries."""
        with os.fdopen(os.dup(self.fd), "wb") as file:
            yield file
        os.lseek(self.fd, 0, os.SEEK_END)


class _Flusher:
    """A thread that flushes a file to the disk while it is being written, so that little is left at the end."""

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
        except OSError as error:  # kept, because the system reports a failed write only once
            self._error = error

    def stop(self) -> None:
        """Wait for the thread, and raise its error if it had one."""
        self._stopped.set()
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            raise error


class AtomicFile(Atomic, FileOutput):
    """A new file that gets its name only when it is complete and on disk.

    A context manager; an exception of any kind removes the new file and leaves an older one unchanged.

    Args:
        path: The final name.
        expected_size: The number of bytes to allocate in advance.
        sync: Flush to the disk before the file gets its name; without it a power cut can lose the file.
        group: Files that get their names together; this one waits for the others.

    Raises:
        DestinationError: The file cannot be created, written or renamed, or something other than a file has its name.
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
        """The path from which the temporary name is made."""
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
        """Flush the complete file, and give it the permissions of the file that it replaces."""
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
    """Files in one folder that get their names together when all of them are complete: shards and their index.

    They get their names in the order in which they were written. A reader that finds the others by the last one, the
    index, sees the old checkpoint or the new one, provided that the two have no names in common.

    Args:
        path: The last file. All temporary names are made from it, so that its next writer finds leftovers.
        replaced: Files to remove when the last file has its name.
        sync: As for `AtomicFile`.
    """

    def __init__(self, path: Path, *, replaced: Sequence[Path] = (), sync: bool = True) -> None:
        self.path = path
        self._replaced = replaced
        self._sync = sync
        self._waiting: list[tuple[Path, Path]] = []
        self._named: list[Path] = []
        self._locks: list[int] = []
        self._last: Path | None = None  # the temporary name of the last file, set just before it is renamed

    def take(self, temporary: Path, path: Path, fd: int) -> int:
        """Keep a complete file, its final name and its lock, which shows other writers that this one lives.

        Returns:
            The descriptor, if the caller must close it; else -1.
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
            self._remove_replaced()  # all files have their names, so the group is complete
            self._close()
            return
        for temporary, _ in self._waiting:
            remove(temporary)
        for path in self._named:
            withdraw(path)
        with suppress(OSError):
            self._close()
