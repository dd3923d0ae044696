"""Files that several processes fill together: the first writes new bytes, and all of them copy ranges of other files.

The list of ranges is divided into contiguous shares with equal numbers of bytes. The first process gives the others
their shares as files, offsets and lengths, so that they need neither the checkpoint nor the plan. If something must be
computed, every process makes the same list itself.
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

from optimstate.io.copying import Checksum, DirectCopier, FileCopier, write_at
from optimstate.io.destination import cannot_write
from optimstate.io.extents import Extent, Progress, StoredSource, chunks
from optimstate.io.location import Location
from optimstate.io.together import Stage

__all__ = ["Notes", "Range", "SharedFiles", "move", "range_of_row", "reporting", "row_of_range", "shape_of"]


PORTION = 1 << 28  # bytes after which a process notes how far it is; an attempt repeats at most as many


class Range(NamedTuple):
    """Bytes of a file, or computed bytes, with the file and the position to write them to."""

    extent: Extent
    target: Path
    position: int


def row_of_range(found: Range) -> list[Any] | None:
    """A range as a JSON array; None if its bytes are computed."""
    source = found.extent.source
    if not isinstance(source, StoredSource):
        return None
    return [str(source.path), found.extent.offset, str(found.target), found.position, found.extent.length]


def range_of_row(row: Sequence[Any], source: StoredSource) -> Range:
    """A range from its JSON array."""
    _, offset, target, position, length = row
    return Range(Extent(source, offset, length), Path(target), position)


def reporting(moved: Progress, progress: Progress | None) -> Progress:
    """A function that reports bytes both to the other processes (`moved`) and to the caller (`progress`)."""

    def report(nbytes: int) -> None:
        moved(nbytes)
        if progress is not None:
            progress(nbytes)

    return report


class Notes:
    """What a process has finished of its share, for another attempt, which leaves it out.

    Args:
        stage: The folder to which the share belongs.

    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sizes = stage.sizes()

    def moved(self, shape: Sequence[int]) -> int:
        """How many bytes of the ranges with this shape (see `shape_of`) are written, in order."""
        *noted, moved = self._stage.noted() or (0,)
        return int(moved) if noted == shape else 0

    def add_moved(self, shape: Sequence[int], moved: int) -> None:
        """Note up to which of their bytes the ranges with this shape are written, and flushed if they are to be."""
        self._stage.note([*shape, moved])

    def of_file(self, name: str) -> Any:
        """What was noted of a complete file, or None."""
        size, found = self._stage.noted(name) or (None, None)
        return found if self._sizes.get(name) == size else None

    def add_file(self, name: str, size: int, found: Any) -> None:
        """Note that a file is complete."""
        self._stage.note([size, found], name)


def shape_of(ranges: Sequence[Range]) -> list[int]:
    """Numbers by which other ranges than these are recognised."""
    return [len(ranges), sum(found.extent.length for found in ranges)]


def move(ranges: Sequence[Range], progress: Progress | None, notes: Notes, *, sync: bool) -> None:
    """Copy ranges into existing files, without those that an earlier attempt has copied.

    Raises:
        CheckpointError: A source cannot be read, or ends too early.
        DestinationError: A file cannot be written.
    """
    shape = shape_of(ranges)
    end = notes.moved(shape)
    for _, portion in groupby(_numbered(ranges, end), key=lambda numbered: numbered[0]):
        for target, group in groupby((found for _, found in portion), key=lambda found: found.target):
            try:
                fd = os.open(target, os.O_WRONLY | getattr(os, "O_BINARY", 0))
                try:
                    with FileCopier(fd, progress) as copier:
                        for found in group:
                            copier.put([found.extent], found.position)
                            end += found.extent.length
                    if sync:
                        os.fsync(fd)
                finally:
                    os.close(fd)
            except OSError as error:
                raise cannot_write(target, error) from error
        notes.add_moved(shape, end)


def _numbered(ranges: Iterable[Range], moved: int) -> Iterator[tuple[int, Range]]:
    """Ranges with the numbers of their portions, at whose ends they are divided, without the first `moved` bytes."""
    at = 0
    for extent, target, position in ranges:
        done = 0
        while done < extent.length:
            number = (at + done) // PORTION
            length = min(extent.length - done, (number + 1) * PORTION - at - done)
            if not isinstance(extent.source, StoredSource):
                length = extent.length  # computed bytes are not divided
            if at + done >= moved:
                yield number, Range(extent.cut(done, done + length), target, position + done)
            done += length
        at += extent.length


class SharedFiles:
    """The files of a stage, to be used by a writer.

    Args:
        stage: The folder that this process and others fill together.
        sync: Flush written data to the disk.

    Attributes:
        alone: The number of bytes that the first process writes alone.
    """

    alone = 0

    def __init__(self, stage: Stage, *, sync: bool) -> None:
        self.stage = stage
        self.sync = sync
        self.ranges: list[Range] = []

    def file(self, path: Location, expected_size: int) -> SharedFile:  # noqa: ARG002  # used by `SharedObjects`
        """A file in the folder; bytes of an earlier attempt stay where nothing else is written."""
        return SharedFile(self, path)

    @contextmanager
    def folder(self, path: Location) -> Iterator[Location]:
        """A folder in the folder."""
        path.mkdir(exist_ok=True)
        yield path

    def share_out(self, moved: Progress, progress: Progress | None, confirmed: Callable[[], None]) -> None:
        """Copy the noted ranges together with the other processes.

        Args:
            moved: Called with the bytes that this process has copied, to tell the others.
            progress: Called with the bytes that all processes have copied.
            confirmed: Called before the commit; if it raises, the output is removed.

        Raises:
            DestinationError: Another process is dead.
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
        """The work of another process as JSON; without ranges if it must make its own list of them."""
        rows = [row_of_range(found) for found in self._shares[rank]]
        return {"ranges": [], "files": None} if None in rows else {"ranges": rows, "files": {}}

    def _moved(self, rank: int, progress: Progress) -> Any:
        """Copy this process's share, and return its vote."""
        move(self._shares[rank], progress, Notes(self.stage), sync=self.sync)
        return []

    def _end(self, votes: Sequence[Any]) -> None:
        """Called in the first process when all have voted."""

    @cached_property
    def _shares(self) -> list[list[Range]]:
        """The ranges in order, divided into shares with equal numbers of bytes."""
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
                    length = extent.length - done  # computed bytes are not divided
                shares[rank].append(Range(extent.cut(done, done + length), target, position + done))
                done += length
                at += length
        return shares


class SharedFile:
    """One of the files as an `Output`; only the first process writes to it."""

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
        """Whether this process writes the file."""
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
        if self._fd is not None:
            write_at(self._fd, data, position)

    def note(self, extents: Iterable[Extent], position: int) -> int:
        """Note ranges to copy to a position, and return their length; nothing is noted for zeros."""
        start = position
        for extent in extents:
            if extent.source is not None and extent.length:
                self._files.ranges.append(Range(extent, Path(str(self.path)), position))
            position += extent.length
        return position - start

    def note_with_checksum(self, extents: Sequence[Extent], position: int, progress: Progress) -> int:
        """Write ranges to a position at once, in the first process, and return their CRC-32."""
        value = 0
        for data in chunks(extents) if self.is_first else ():
            value = zlib.crc32(data, value)
            self.write_at(data, position)
            position += len(data)
            self._files.alone += len(data)
            progress(len(data))
        return value

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:  # noqa: ARG002
        """Append the bytes of `extents`, later."""
        length = self.note(extents, self._at)
        self._at += length
        return length

    def copier(self, progress: Progress | None = None) -> SharedCopier:
        """A copier that fills the file."""
        return SharedCopier(self, progress)

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The file as a binary file object for libraries."""
        with io.BytesIO() as file:
            yield file
            self.write(file.getvalue())


class SharedCopier(DirectCopier):
    """Fills one of the files; see `Copier`."""

    def __init__(self, file: SharedFile, progress: Progress | None) -> None:
        super().__init__(progress)
        self._file = file

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` to a position, later."""
        return self._file.note(extents, position)

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`, but return the CRC-32 of the bytes, which are written at once."""
        return self._file.note_with_checksum(extents, position, self.report)

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Write bytes."""
        self._file.write_at(data, position)
