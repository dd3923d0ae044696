"""Ranges of files copied into an output, by two threads that read and write or by the system where it can do better."""

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

__all__ = ["BLOCK", "Checksum", "Copier", "FileCopier", "SharedTasks", "blocks"]

BLOCK = 1 << 18  # one read and write: a block stays in the processor's cache between the two
STRIPE = 1 << 24  # what a thread takes at a time
FAR_STRIPE = 1 << 23  # the same of a store: one request
SMALL_PIECE = 1 << 16  # shorter pieces are joined before they are written

# File systems that can only move bytes through memory; others may share blocks between files, or copy on a server.
_PLAIN_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "tmpfs"}
_SYSTEM_CHUNK = 1 << 28  # one copy_file_range call, so that progress and Ctrl-C are served
_SYSTEM_CANNOT = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.ETXTBSY}


class Checksum:
    """The CRC-32 of bytes that are being copied; complete when the copier has finished."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0


Task = Callable[[memoryview], None]
"""Something to do, given a buffer of `BLOCK` bytes to do it with."""


class SharedTasks:
    """Tasks that other threads begin with at once, and that the caller's does its share of when it waits for them.

    They gain where the time goes into calls that leave Python's lock alone: reading, writing, checksums. After an error
    no further task is begun.

    Attributes:
        stopped: Whether a task in progress should give up.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._helpers: list[Thread] = []
        self._failure: BaseException | None = None

    def add(self, task: Task, lanes: int = 1) -> None:
        """Have a task done; so many threads beside the caller's are of use to those of its kind."""
        while len(self._helpers) < lanes:
            helper = Thread(target=self._help, name="optimstate-helper", daemon=True)
            helper.start()
            self._helpers.append(helper)
        self._tasks.put(task)

    def finish(self) -> None:
        """Do what is left, wait for the rest, and raise the first error met; more may be added afterwards."""
        if not self._helpers:
            return
        try:
            buffer = memoryview(bytearray(BLOCK))
            while not self.stopped:
                task = self._tasks.get_nowait()
                assert task is not None  # only put below, behind all others
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
        """Give up what is not done, and wait for the other threads."""
        self.stopped = True
        self._end_helpers()

    def _end_helpers(self) -> None:
        helpers, self._helpers = self._helpers, []
        for _ in helpers:
            self._tasks.put(None)
        try:
            for helper in helpers:
                helper.join()
        except BaseException:  # Ctrl-C: no file must be closed under a helper, which stops after its block
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
    """Fills an output with ranges of files, with what is computed and with bytes.

    Used as a context manager: everything is there when it is left. A file is filled in any order, an upload only from
    its beginning to its end.
    """

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` one after the other to `position`; returns their number."""

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`; the CRC-32 of the bytes, known already or when the copier has finished."""

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes at once, on the caller's thread."""

    def report(self, done: int) -> None:
        """Say that so many bytes more are written."""

    def finish(self) -> None:
        """Wait until everything that was put is there; more may be put afterwards."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class FileCopier:
    """Fills an open file at given positions, in any order; everything is there when the context is left.

    Ranges of files are read and written by the caller's thread and another; those of stores by as many threads as their
    stores serve well, each part written where it belongs. Both calls leave Python's lock alone; the
    system lets one thread write to a file at a time, but the other can read meanwhile, so a third would add little.
    What a computation yields is read by the caller's thread only. The file's own position is not used.

    Args:
        fd: The output.
        progress: Called with the bytes written since the last call; by either thread, never by both at once.

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
        """Copy the bytes of `extents` one after the other to `position`; returns their number."""
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
        """As `put`; every byte is also given to the checksum."""
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
        """Wait until everything that was put is there; more may be put afterwards.

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
                # To the next block of the output first: pages that are written whole take a fifth less time.
                block = buffer[: min(len(buffer) - (position + done) % len(buffer), length - done)]
                source.read_into(block, offset + done)
                self.write(block, position + done)
                done += len(block)
            self.report(length)

        return copy

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes at once, on the caller's thread."""
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self.fd, rest, position)
            rest = rest[done:]
            position += done

    def report(self, done: int) -> None:
        """Say that so many bytes more are written."""
        if self._progress is not None and done:
            with self._lock:
                self._progress(done)


def _lanes(source: ByteSource | None) -> int:
    """How many threads beside the caller's are of use."""
    return max(source.lanes - 1, 1) if isinstance(source, StoredSource) else 1


def blocks(extents: Iterable[Extent], buffer: memoryview) -> Iterator[bytes | memoryview]:
    """The bytes of `extents` in order; what is read from files is in the same buffer each time.

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
    """The kind of file system of each mounted device; proc(5) gives the form of the lines."""
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
    """Whether reading and writing is all that the system could do itself."""
    if not hasattr(os, "copy_file_range"):
        return True
    device = source.inode[0]
    return device != os.fstat(fd).st_dev or _file_systems().get(device) in _PLAIN_FILE_SYSTEMS


def _copy_in_system(
    source: FileSource, offset: int, length: int, fd: int, position: int, report: Callable[[int], None]
) -> int:
    """Let the system copy as far as it can; returns how many bytes it did."""
    done = 0
    while done < length:
        count = min(length - done, _SYSTEM_CHUNK)
        try:
            n = os.copy_file_range(source.fileno(), fd, count, offset + done, position + done)
        except OSError as error:
            if error.errno in _SYSTEM_CANNOT:
                return done
            raise
        if n == 0:  # some file systems answer 0 instead of an error
            return done
        done += n
        report(n)
    return done
