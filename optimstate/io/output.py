"""Outputs that appear whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from stat import S_IMODE
from types import TracebackType

from optimstate.errors import (
    CheckpointError,
    DestinationError,
    DestinationExistsError,
)

__all__ = ["AtomicDirectory", "AtomicFile", "check_destination", "write_bytes"]


FLUSH_FROM = 1 << 26  # files from this size on are flushed while they are written


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
        DestinationError: It is (or holds, or lies in) an input, or its folder does not exist.
    """
    for source in sources:
        if destination.exists() and source.exists() and destination.samefile(source):
            raise DestinationError(
                f"{destination}: source and destination are the same",
                hint="Give another destination; `remap --in-place` changes a file where it is.",
            )
        resolved, inside = destination.resolve(), source.resolve()
        if source.is_dir() and inside in resolved.parents:
            raise DestinationError(f"{destination}: lies inside the source {source}", hint="Give a path outside of it.")
        if destination.is_dir() and resolved in inside.parents:
            raise DestinationError(f"{destination}: holds the source {source}", hint="Give another destination.")
    if destination.exists() and not force:
        raise DestinationExistsError(f"{destination}: exists already", hint="Give --force to replace it.")
    if not destination.parent.is_dir():
        raise DestinationError(
            f"{destination}: the folder {destination.parent} does not exist", hint="Create it first."
        )


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # not every system can sync a folder
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _temporary_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{os.urandom(6).hex()}.part")


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

    Used as a context manager; an exception removes what was written and leaves any older file as it was.

    Args:
        path: The final name.
        expected_size: A hint that lets the file system allocate at once.
        sync: Flush to the disk before the file takes its name; without it a power cut can lose what was written.

    Raises:
        DestinationError: The file cannot be created, written or renamed.
    """

    def __init__(self, path: str | os.PathLike[str], *, expected_size: int = 0, sync: bool = True) -> None:
        self.path = Path(path)
        self._temporary = _temporary_sibling(self.path)
        self._expected_size = expected_size
        self._sync = sync
        self._flusher: _Flusher | None = None
        self.fd = -1

    def __enter__(self) -> AtomicFile:
        try:
            self.fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
            if self._expected_size and hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(self.fd, 0, self._expected_size)
                except OSError as error:
                    if error.errno == errno.ENOSPC:
                        raise
        except OSError as error:
            self._discard()
            raise DestinationError(f"{self.path}: cannot be written: {error.strerror}") from error
        if self._sync and self._expected_size >= FLUSH_FROM:
            self._flusher = _Flusher(self.fd)
        return self

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
                raise DestinationError(f"{self.path}: cannot be written: {error.strerror or error}") from error
            return
        try:
            os.ftruncate(self.fd, self.tell())
            if self._flusher is not None:
                self._flusher.stop()
            if self._sync:
                os.fsync(self.fd)
            os.close(self.fd)
            self.fd = -1
            if self.path.exists():
                self._temporary.chmod(S_IMODE(self.path.stat().st_mode))
            self._temporary.replace(self.path)
            if self._sync:
                _sync_directory(self.path.parent)
        except OSError as failure:
            self._discard()
            raise DestinationError(f"{self.path}: cannot be written: {failure.strerror}") from failure

    def _discard(self) -> None:
        if self._flusher is not None:
            with suppress(OSError):
                self._flusher.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with suppress(OSError):
            self._temporary.unlink()


class AtomicDirectory:
    """A new folder that takes its name only when it is complete; see `AtomicFile`.

    The context manager's value is the temporary folder to fill.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._temporary = _temporary_sibling(self.path)

    def __enter__(self) -> Path:
        try:
            self._temporary.mkdir()
        except OSError as error:
            raise DestinationError(f"{self.path}: cannot be written: {error.strerror}") from error
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        from shutil import rmtree

        if error is not None:
            rmtree(self._temporary, ignore_errors=True)
            return
        replaced = _temporary_sibling(self.path)
        try:
            _sync_directory(self._temporary)
            if self.path.exists():
                self.path.replace(replaced)
            self._temporary.replace(self.path)
            _sync_directory(self.path.parent)
        except OSError as failure:
            if replaced.exists() and not self.path.exists():
                replaced.replace(self.path)
            rmtree(self._temporary, ignore_errors=True)
            raise DestinationError(f"{self.path}: cannot be written: {failure.strerror}") from failure
        if replaced.is_dir():
            rmtree(replaced, ignore_errors=True)
        elif replaced.exists():
            replaced.unlink()
