"""Files whose bytes several processes move: what a writer makes is written by the first, what it copies by all.

Every process cuts the same list of ranges into contiguous shares of equal bytes. The first one tells the others theirs
as files, offsets and lengths, so that they need neither the checkpoint nor the plan; where something must be computed,
a process decides for itself, and the same.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from optimstate.io.copying import Checksum, FileCopier
from optimstate.io.destination import cannot_write
from optimstate.io.extents import Extent, Progress, StoredSource
from optimstate.io.location import Location
from optimstate.io.together import Stage

__all__ = ["Range", "SharedFiles", "move", "range_of_row", "reporting", "row_of_range"]


class Range(NamedTuple):
    """Bytes of a file, or computed ones, and where they go."""

    extent: Extent
    target: Path
    position: int


def row_of_range(found: Range) -> list[Any] | None:
    """A range as JSON; None where its bytes are computed."""
    source = found.extent.source
    if not isinstance(source, StoredSource):
        return None
    return [str(source.path), found.extent.offset, str(found.target), found.position, found.extent.length]


def range_of_row(row: Sequence[Any], source: StoredSource) -> Range:
    """A range that was JSON."""
    _, offset, target, position, length = row
    return Range(Extent(source, offset, length), Path(target), position)


def reporting(moved: Progress, progress: Progress | None) -> Progress:
    """One function that tells both of bytes: what others are told of this process, and who watches it."""

    def report(nbytes: int) -> None:
        moved(nbytes)
        if progress is not None:
            progress(nbytes)

    return report


def move(ranges: Iterable[Range], progress: Progress | None, *, sync: bool) -> None:
    """Copy ranges into files that are there.

    Raises:
        CheckpointError: A source cannot be read, or ends too early.
        DestinationError: A file cannot be written.
    """
    for target, group in groupby(ranges, key=lambda found: found.target):
        try:
            fd = os.open(target, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            try:
                with FileCopier(fd, progress) as copier:
                    for found in group:
                        copier.put([found.extent], found.position)
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise cannot_write(target, error) from error


class SharedFiles:
    """The files of a stage as a writer makes them.

    Args:
        stage: The folder that processes fill together, of which this is one.
        sync: Flush what is written to the disk.
    """

    def __init__(self, stage: Stage, *, sync: bool) -> None:
        self.stage = stage
        self.sync = sync
        self.ranges: list[Range] = []

    def file(self, path: Location, expected_size: int) -> SharedFile:  # noqa: ARG002  # for who deals out whole files
        """A file of the folder; what it held at an earlier attempt stays where nothing else is written."""
        return SharedFile(self, path)

    @contextmanager
    def folder(self, path: Location) -> Iterator[Location]:
        """A folder of the folder."""
        path.mkdir(exist_ok=True)
        yield path

    def share_out(self, moved: Progress, progress: Progress | None, confirmed: Callable[[], None]) -> None:
        """Do together with the other processes what was noted.

        Args:
            moved: Told of the bytes that this process has moved; what others are told of it.
            progress: Told of the bytes that all have moved.
            confirmed: The last thing before the commit; what it raises undoes the writing.

        Raises:
            DestinationError: One of them is dead.
        """
        stage, rank = self.stage, self.stage.team.rank
        if rank == 0:
            for other in range(1, stage.team.size):
                stage.give(other, self._work(other))
        if stage.voted() is None:
            stage.vote(self._moved(rank, reporting(moved, progress)))
        if rank:
            stage.wait()
        else:
            votes = stage.votes(progress)
            confirmed()
            self._end(votes)

    def _work(self, rank: int) -> dict[str, Any]:
        """What another process is to do; nothing of it where it must decide for itself."""
        rows = [row_of_range(found) for found in self._shares[rank]]
        return {"ranges": [], "files": None} if None in rows else {"ranges": rows, "files": {}}

    def _moved(self, rank: int, progress: Progress) -> Any:
        """Do what is this process's part, and return its vote."""
        move(self._shares[rank], progress, sync=self.sync)
        return []

    def _end(self, votes: Sequence[Any]) -> None:
        """What is left to the first process when all have voted."""

    @cached_property
    def _shares(self) -> list[list[Range]]:
        """The ranges in their order, cut into shares of equal bytes."""
        size = self.stage.team.size
        total = sum(found.extent.length for found in self.ranges)
        shares: list[list[Range]] = [[] for _ in range(size)]
        rank = at = 0
        for extent, target, position in self.ranges:
            done = 0
            while done < extent.length:
                while at >= total * (rank + 1) // size:
                    rank += 1
                length = min(extent.length - done, total * (rank + 1) // size - at)
                if not isinstance(extent.source, StoredSource):
                    length = extent.length - done  # what is computed is computed once
                shares[rank].append(Range(extent.cut(done, done + length), target, position + done))
                done += length
                at += length
        return shares


class SharedFile:
    """One of the files, as an `Output`; in other processes than the first nothing is written."""

    def __init__(self, files: SharedFiles, path: Location) -> None:
        self._files = files
        self.path = path
        self._at = 0
        self._fd: int | None = None

    def __enter__(self) -> SharedFile:
        if self._files.stage.team.rank == 0:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
            try:
                self._fd = os.open(Path(str(self.path)), flags, 0o666)
            except OSError as error:
                raise cannot_write(Path(str(self.path)), error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._fd is None:
            return
        try:
            if error is None:
                os.ftruncate(self._fd, self._at)
                if self._files.sync:
                    os.fsync(self._fd)
        except OSError as problem:
            raise cannot_write(Path(str(self.path)), problem) from problem
        finally:
            os.close(self._fd)

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self._fd is not None

    def tell(self) -> int:
        """The current position."""
        return self._at

    def seek(self, position: int) -> None:
        """Go on at this position."""
        self._at = position

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        self.write_at(data, self._at)
        self._at += len(data)
        return len(data)

    def write_at(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes, in the first process."""
        view = memoryview(data)
        while view and self._fd is not None:
            done = os.pwrite(self._fd, view, position)
            view, position = view[done:], position + done

    def note(self, extents: Iterable[Extent], position: int) -> int:
        """Note what is to be moved to a position, and return its length; zeros are there already."""
        start = position
        for extent in extents:
            if extent.source is not None and extent.length:
                self._files.ranges.append(Range(extent, Path(str(self.path)), position))
            position += extent.length
        return position - start

    def note_with_checksum(self, extents: Sequence[Extent], position: int, progress: Progress) -> int:
        """Write ranges to a position at once, and return their CRC-32: the first process reads them in any case."""
        value = 0
        for extent in extents if self.is_first else ():
            for at in range(0, extent.length, 1 << 20):
                data = extent.cut(at, min(at + (1 << 20), extent.length)).read()
                value = zlib.crc32(data, value)
                self.write_at(data, position)
                position += len(data)
                progress(len(data))
        return value

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:  # noqa: ARG002
        """Append the bytes of `extents`, later."""
        length = self.note(extents, self._at)
        self._at += length
        return length

    def copier(self, progress: Progress | None = None) -> SharedCopier:
        """What fills a stretch."""
        return SharedCopier(self, progress)

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The file as libraries write to it."""
        with io.BytesIO() as file:
            yield file
            self.write(file.getvalue())


class SharedCopier:
    """Fills one of the files; see `Copier`."""

    def __init__(self, file: SharedFile, progress: Progress | None) -> None:
        self._file = file
        self._progress = progress

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` to a position, later."""
        return self._file.note(extents, position)

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`; the CRC-32 stands in the file."""
        return self._file.note_with_checksum(extents, position, self.report)

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes."""
        self._file.write_at(data, position)

    def report(self, done: int) -> None:
        """Say that so many bytes more are written."""
        if self._progress is not None and done:
            self._progress(done)

    def finish(self) -> None:
        """Nothing is waited for."""

    def __enter__(self) -> SharedCopier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
