"""Comparing the checksums recorded in a checkpoint's containers, alone or during other work."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import itemgetter
from threading import Lock
from typing import TYPE_CHECKING

from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.protocol import Document, WriteOptions
from optimstate.io.checksums import Recorded, compare
from optimstate.io.copying import BLOCK, SharedTasks, Task
from optimstate.io.extents import Extent, Progress
from optimstate.io.places import is_remote
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import format_path, walk

if TYPE_CHECKING:
    from optimstate.io.together import Stage

__all__ = ["UNCOMPARED", "compares", "damaged", "verified", "verify_checksums", "verify_read"]


def damaged(document: Document, progress: Progress | None = None) -> Iterator[CorruptCheckpointError | None]:
    """For each recorded checksum None if it matches, else the error."""
    buffer = memoryview(bytearray(BLOCK))
    for found in _recorded(document):
        try:
            yield None if compare(found, buffer, progress=progress) else _error(document, found)
        except CorruptCheckpointError as error:
            yield error


def verify_checksums(document: Document) -> None:
    """Compare every recorded checksum with the bytes.

    Raises:
        CorruptCheckpointError: One does not match; the message names the tensor.
    """
    for error in damaged(document):
        if error is not None:
            raise error


def compares(document: Document, verify: bool | None, stage: Stage | None = None) -> bool:
    """Whether this process compares checksums.

    Args:
        document: The checkpoint.
        verify: What was asked; None means yes unless it is in a store or several processes share the work.
        stage: The folder that several processes write; only the first of them compares.
    """
    if stage is not None and stage.team.rank:
        return False
    return not is_remote(document.path) and stage is None if verify is None else verify


UNCOMPARED = "checksums were not compared: with --verify they are, and the source is read twice"
"""The note on a source in a store."""


@contextmanager
def verified(document: Document, options: WriteOptions, *, verify: bool | None = None) -> Iterator[WriteOptions]:
    """Compare a document's checksums while it is written; the output appears only if all of them match.

    Args:
        document: The source of the bytes.
        options: How to write.
        verify: As in `compares`.

    Returns:
        The options to write with.
    """
    if not compares(document, verify, options.stage):
        yield options
        return
    with _comparing(document, _recorded(document)) as tasks:
        yield options._replace(confirm=tasks.finish)


def verify_read(document: Document, read: Iterable[Extent], *, wholly: bool) -> None:
    """Compare the checksums of bytes that were read; none of a document in a store, which would be read twice.

    Args:
        document: The checkpoint that was read.
        read: The bytes that were read.
        wholly: Leave out checksums that cover other bytes as well.

    Raises:
        CorruptCheckpointError: One does not match; the message names the tensor.
    """
    if not compares(document, None):
        return
    runs = _Runs(read)
    with _comparing(document, (each for each in _recorded(document) if runs.has(each.extents, wholly=wholly))):
        pass


@contextmanager
def _comparing(document: Document, checksums: Iterator[Recorded]) -> Iterator[SharedTasks]:
    """Compares checksums during the block and waits for the rest after it."""
    tasks = SharedTasks()
    check = _check(document, checksums, tasks)
    tasks.add(check)  # for the other thread, at once
    tasks.add(check)  # for this thread, while it waits
    try:
        yield tasks
        tasks.finish()
    finally:
        tasks.stop()


class _Runs:
    """The byte ranges that some extents cover, by source."""

    def __init__(self, extents: Iterable[Extent]) -> None:
        found: dict[int, list[tuple[int, int]]] = {}
        self._keep = [extent for extent in extents if extent.length]  # so that no other source gets one of their ids
        for extent in self._keep:
            found.setdefault(id(extent.source), []).append((extent.offset, extent.offset + extent.length))
        self._runs = {source: _joined(sorted(runs)) for source, runs in found.items()}

    def has(self, extents: Sequence[Extent], *, wholly: bool) -> bool:
        """Whether all (`wholly`) or any bytes of `extents` are covered; without extents they may be."""
        if not extents:
            return not wholly
        return (all if wholly else any)(
            first < last and (not wholly or (first + 1 == last and self._contains(extent, first)))
            for extent in extents
            for first, last in [self._touching(extent)]
        )

    def _touching(self, extent: Extent) -> tuple[int, int]:
        """The indices of the runs that overlap an extent: of the first, and of the one after the last."""
        runs = self._runs.get(id(extent.source), [])
        first = bisect_right(runs, extent.offset, key=itemgetter(1))
        return first, max(first, bisect_left(runs, extent.offset + extent.length, key=itemgetter(0)))

    def _contains(self, extent: Extent, number: int) -> bool:
        start, stop = self._runs[id(extent.source)][number]
        return start <= extent.offset and extent.offset + extent.length <= stop


def _joined(runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    made: list[tuple[int, int]] = []
    for start, stop in runs:
        if made and start <= made[-1][1]:
            made[-1] = made[-1][0], max(stop, made[-1][1])
        else:
            made.append((start, stop))
    return made


def _check(document: Document, waiting: Iterator[Recorded], tasks: SharedTasks) -> Task:
    """A task that compares one checksum after another; several threads may run it at once."""
    lock = Lock()

    def check(buffer: memoryview) -> None:
        while not tasks.stopped:
            with lock:  # there may be a million, so no list is made of them
                found = next(waiting, None)
            if found is None:
                return
            if not compare(found, buffer, stopped=lambda: tasks.stopped):
                raise _error(document, found)

    return check


def _recorded(document: Document) -> Iterator[Recorded]:
    for gives in document.checksums:
        yield from gives()
    for part in document.parts.values():
        yield from _recorded(part)


def _error(document: Document, found: Recorded) -> CorruptCheckpointError:
    names = list(_tensors_in(document, found.extents))
    more = f" and of {len(names) - 1} more" if len(names) > 1 else ""
    what = f"the bytes of {names[0]}{more}" if names else "the bytes"
    return CorruptCheckpointError(
        f"{what} do not match their checksum",
        path=found.path,
        place=found.place,
        hint="The file is damaged; copy it again from its source.",
    )


def _tensors_in(document: Document, extents: tuple[Extent, ...]) -> Iterator[str]:
    """The tensors that have some of these bytes."""
    for path, node in walk(document.tree) if extents else ():
        with suppress(CheckpointError):  # the tensor is damaged in another way
            if isinstance(node, LazyTensor) and any(
                piece.source is extent.source
                and piece.offset < extent.offset + extent.length
                and extent.offset < piece.offset + piece.length
                for piece in node.storage.pieces
                for extent in extents
            ):
                yield format_path(path)
