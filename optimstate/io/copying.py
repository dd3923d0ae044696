"""Copying ranges of files into an output, with two threads, or by the system where that is faster."""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Protocol, Self

from optimstate.io.extents import CHUNK, ByteSource, Extent, FileSource, Progress, StoredSource, near

__all__ = ["BLOCK", "Checksum", "Copier", "DirectCopier", "FileCopier", "SharedTasks", "blocks", "write_at"]

BLOCK = 1 << 18  # bytes of one read and write; they stay in the processor's cache between the two
STRIPE = 1 << 24  # bytes that a thread copies as one task
FAR_STRIPE = 1 << 23  # the same for a store, in one request
SMALL_PIECE = 1 << 16  # bytes below which pieces are joined before they are written

# File systems that move bytes through memory in any case; others may share blocks between files, or copy on a server.
_PLAIN_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "tmpfs"}
_SYSTEM_CHUNK = 1 << 28  # bytes of one copy_file_range call; between calls progress and Ctrl-C are handled
_SYSTEM_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY}


class Checksum:
    """The CRC-32 of bytes that are being copied; complete when the copier has finished."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


Task = Callable[[memoryview], None]
"""Called with a buffer of `BLOCK` bytes to work with."""


class SharedTasks:
    """Tasks that other threads start at once, and in which the caller's thread joins while it waits for them.

    This helps where the time goes into calls that release Python's lock: reading, writing, checksums. After an error no
    further task is started.

    Attributes:
        stopped: Whether a task in progress should give up.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._helpers: list[Thread] = []
        self._failure: BaseException | None = None

    def add(self, task: Task, lanes: int = 1) -> None:
        """Add a task; `lanes` is the number of threads, without the caller's, that are useful for tasks of its kind."""
        while len(self._helpers) < lanes:
            helper = Thread(target=self._help, name="optimstate-helper", daemon=True)
            helper.start()
            self._helpers.append(helper)
        self._tasks.put(task)

    def finish(self) -> None:
        """Run the remaining tasks, wait for those in progress, and raise the first error; more may be added then."""
        if not self._helpers:
            return
        try:
            buffer = memoryview(bytearray(BLOCK))
            while not self.stopped:
                task = self._tasks.get_nowait()
                assert task is not None  # only `_end_helpers` adds None, after all tasks
                task(buffer)
        except Empty:
            pass
        except BaseException:
            self.stopped = True
            raise
        finally:
            self._end_helpers()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Drop the tasks that have not started, and wait for the other threads."""
        self.stopped = True
        self._end_helpers()

    def _end_helpers(self) -> None:
        helpers, self._helpers = self._helpers, []
        for _ in helpers:
            self._tasks.put(None)
        try:
            for helper in helpers:
                helper.join()
        except BaseException:  # Ctrl-C: helpers stop after their block, and no file may be closed before
            self.stopped = True
            for helper in helpers:
                helper.join()
            raise

    def _help(self) -> None:
        buffer = memoryview(bytearray(BLOCK))
        for task in iter(self._tasks.get, None):
            if self.stopped:
                continue
            try:
                task(buffer)
            except BaseException as error:  # noqa: BLE001  # raised again by `finish`
                self._failure = error
                self.stopped = True


class Copier(Protocol):
    """Fills an output with ranges of files, computed bytes and bytes in memory.

    As a context manager it has written everything when it is left. A file is filled in any order, an upload only from
    its beginning to its end.
    """

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` one after the other to `position`, and return their number."""

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`, but return the CRC-32 of the bytes, as a `Checksum` if it is known only when they are copied."""

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes at once, in the caller's thread."""

    def report(self, done: int) -> None:
        """Report that `done` more bytes are written."""

    def finish(self) -> None:
        """Wait until everything is written; more may be added afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class DirectCopier:
    """The base class of copiers without threads, which write or note everything at once."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress

    def report(self, done: int) -> None:
        """Report that `done` more bytes are written."""
        if self._progress is not None and done:
            self._progress(done)

    def finish(self) -> None:
        """Nothing: there is nothing to wait for."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class FileCopier:
    """Fills an open file at given positions, in any order; everything is written when the context is left.

    The caller's thread and one other copy ranges of files; for ranges of stores there are as many threads as the store
    serves well. Reading and writing release Python's lock. The system lets only one thread at a time write to a file,
    but another can read meanwhile; a third would gain little. Computed bytes are read only in the caller's thread. The
    file's own position is not used.

    Args:
        fd: The output.
        progress: Called with the bytes written since the last call, from any thread, but never at the same time.

    Raises:
        CheckpointError: A source cannot be read or ends too early.
        OSError: The output cannot be written.
    """

    def __init__(self, fd: int, progress: Progress | None = None) -> None:
        self.fd = fd
        self._progress = progress
        self._lock = Lock()
        self._tasks = SharedTasks()

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` one after the other to `position`, and return their number."""
        start = position
        joined: list[bytes] = []
        joined_at = position

        def write_joined() -> None:
            data = b"".join(joined)
            joined.clear()
            self.write(data, joined_at)
            self.report(len(data))

        for extent in extents:
            if isinstance(extent.source, StoredSource) and extent.length >= SMALL_PIECE:
                if joined:
                    write_joined()
                self._copy_stored(extent.source, extent.offset, extent.length, position)
                position += extent.length
                joined_at = position
                continue
            for at in range(0, extent.length, CHUNK):
                data = extent.cut(at, min(at + CHUNK, extent.length)).read()
                joined.append(data)
                position += len(data)
                if position - joined_at >= CHUNK:
                    write_joined()
                    joined_at = position
        if joined:
            write_joined()
        return position - start

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum:
        """As `put`, but return the CRC-32 of the bytes, which is known when they are copied."""
        found = Checksum()

        def copy(buffer: memoryview) -> None:
            at = position
            for block in blocks(extents, buffer):
                if self._tasks.stopped:
                    return
                found.value = zlib.crc32(block, found.value)
                self.write(block, at)
                at += len(block)
            self.report(at - position)

        if all(isinstance(extent.source, StoredSource) for extent in extents):
            self._tasks.add(copy, _lanes(extents[0].source) if extents else 1)
        else:
            copy(memoryview(bytearray(CHUNK)))
        return found

    def finish(self) -> None:
        """Wait until everything is written; more may be added afterwards.

        Raises:
            CheckpointError: A source could not be read or ended too early.
            OSError: The output could not be written.
        """
        self._tasks.finish()

    def __enter__(self) -> FileCopier:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self._tasks.stop()

    def _copy_stored(self, source: StoredSource, offset: int, length: int, position: int) -> None:
        """Copy a range of a file or object, in parts that end on multiples of `STRIPE` of the output."""
        source.check(offset, length)
        done = 0
        if isinstance(source, FileSource) and not _goes_through_memory(source, self.fd):
            done = _copy_in_system(source, offset, length, self.fd, position, self.report)
        far = source.lanes > 1
        stripe, task = (FAR_STRIPE, self._far_stripe) if far else (STRIPE, self._stripe)
        while done < length:
            stop = min(length, done + stripe - (position + done) % stripe)
            self._tasks.add(task(source, offset + done, stop - done, position + done), _lanes(source))
            done = stop

    def _far_stripe(self, source: StoredSource, offset: int, length: int, position: int) -> Task:
        def copy(_: memoryview) -> None:
            self.write(source.read(offset, length), position)
            self.report(length)

        return copy

    def _stripe(self, source: StoredSource, offset: int, length: int, position: int) -> Task:
        def copy(buffer: memoryview) -> None:
            done = 0
            while done < length and not self._tasks.stopped:
                # First up to the next block of the output, because writing whole pages takes a fifth less time.
                block = buffer[: min(len(buffer) - (position + done) % len(buffer), length - done)]
                source.read_into(block, offset + done)
                self.write(block, position + done)
                done += len(block)
            self.report(length)

        return copy

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes at once, in the caller's thread."""
        write_at(self.fd, data, position)

    def report(self, done: int) -> None:
        """Report that `done` more bytes are written."""
        if self._progress is not None and done:
            with self._lock:
                self._progress(done)


def write_at(fd: int, data: bytes | memoryview, position: int) -> None:
    """Write bytes at a position of an open file."""
    rest = memoryview(data)
    while rest:
        done = os.pwrite(fd, rest, position)
        rest, position = rest[done:], position + done


def _lanes(source: ByteSource | None) -> int:
    """The number of threads, without the caller's, that are useful for reading a source."""
    return max(source.lanes - 1, 1) if isinstance(source, StoredSource) else 1


def blocks(extents: Iterable[Extent], buffer: memoryview) -> Iterator[bytes | memoryview]:
    """The bytes of `extents` in order; those read from files are in the same buffer each time.

    Raises:
        CheckpointError: A source cannot be read or ends too early.
    """
    for extent in near(extents):
        source = extent.source
        if isinstance(source, StoredSource):
            source.check(extent.offset, extent.length)
        for at in range(0, extent.length, len(buffer)):
            length = min(len(buffer), extent.length - at)
            if isinstance(source, StoredSource):
                source.read_into(buffer[:length], extent.offset + at)
                yield buffer[:length]
            else:
                yield extent.cut(at, at + length).read()


@cache
def _file_systems() -> dict[int, str]:
    """The kind of file system of each mounted device; see proc(5) for the format of the lines."""
    found = {}
    try:
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, kind = line.partition(" - ")
            major, minor = fields.split()[2].split(":")
            found[os.makedev(int(major), int(minor))] = kind.split()[0]
    except (OSError, ValueError, IndexError):
        return {}
    return found


def _goes_through_memory(source: FileSource, fd: int) -> bool:
    """Whether the system itself could only read and write, so that leaving the copy to it gains nothing."""
    if not hasattr(os, "copy_file_range"):
        return True
    device = source.inode[0]
    return device != os.fstat(fd).st_dev or _file_systems().get(device) in _PLAIN_FILE_SYSTEMS


def _copy_in_system(
    source: FileSource, offset: int, length: int, fd: int, position: int, report: Callable[[int], None]
) -> int:
    """Let the system copy as much as it can, and return the number of bytes that it copied."""
    done = 0
    while done < length:
        count = min(length - done, _SYSTEM_CHUNK)
        try:
            n = os.copy_file_range(source.fileno(), fd, count, offset + done, position + done)
        except OSError as error:
            if error.errno in _SYSTEM_CANNOT:
                return done
            raise
        if n == 0:  # some file systems return 0 instead of an error
            return done
        done += n
        report(n)
    return done
