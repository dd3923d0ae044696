"""Objects and folders in a store as outputs, which appear whole or not at all."""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from optimstate.errors import CheckpointError, DestinationError, RepresentationError
from optimstate.io.copying import Checksum, DirectCopier
from optimstate.io.extents import Extent, Progress, chunks
from optimstate.io.output import AtomicGroup
from optimstate.io.remote.path import Held, RemotePath
from optimstate.io.remote.source import RemoteSource
from optimstate.io.remote.store import Store, Upload, in_window
from optimstate.io.temporary import count_as_finished

__all__ = ["RemoteFile", "RemoteFolder", "RemoteGroup", "discard", "release"]

SMALLEST = 5 << 20  # bytes of the parts of an upload, except the last one


class RemoteFile:
    """An object that is written from its beginning to its end; see `Output`.

    Args:
        path: The object.
        expected_size: Its approximate number of bytes.
        replace: Whether it may replace an existing object.
        made: Gets the path when the object exists.
        held: Called with the result of `Upload.hold` instead of creating the object.
        aside: The key that the object may have until then.
    """

    def __init__(
        self,
        path: RemotePath,
        *,
        expected_size: int = 0,
        replace: bool = True,
        made: list[RemotePath] | None = None,
        held: Callable[[dict[str, Any]], None] | None = None,
        aside: str = "",
    ) -> None:
        self.path = path
        self._hold = held
        self._aside = aside
        self._expected = expected_size
        self._replace = replace
        self._made = made
        self._held = bytearray()
        self._at = 0

    def __enter__(self) -> RemoteFile:
        if not self.path.key or self.path.is_named_as_folder:
            raise DestinationError(
                f"{self.path}: this is the name of a folder, and what is to be written is one object",
                hint="Give a name without a slash at its end, such as s3://BUCKET/NAME.pt.",
            )
        begin = self.path.store.begin
        self._upload = begin(self.path.key, expected=self._expected, replace=self._replace, aside=self._aside)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self._upload.abort()
            return
        try:
            if self._hold is not None:
                self._hold(self._upload.hold(bytes(self._held)))
                return
            if self.path.held is not None and self._upload.holds:
                self.path.held[self.path.key] = self._upload.hold(bytes(self._held))
                return
            self._upload.complete(bytes(self._held))
        except BaseException:
            if self._upload.created:  # interrupted while the store was creating it
                self._count()
            else:
                self._upload.abort()
            raise
        self._count()

    def _count(self) -> None:
        """Note that the object exists."""
        self.path.forget()
        if self.path.held is not None:
            self.path.made.append(self.path)
        elif self._made is None:
            count_as_finished(self.path)
        if self._made is not None:
            self._made.append(self.path)

    def tell(self) -> int:
        """The current position."""
        return self._at

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes, and send complete parts."""
        self._held += data
        self._at += len(data)
        size = self._upload.size
        while len(self._held) >= size + SMALLEST:  # so that the last part is large enough if a copy follows it
            self._upload.part(bytes(memoryview(self._held)[:size]))
            del self._held[:size]
        return len(data)

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:
        """Append the bytes of `extents`; ranges that the store can copy itself are not transferred."""
        start = self._at
        for extent in _joined(extents):
            for data in chunks(self._not_copied(extent, progress)):
                self.write(data)
                if progress is not None:
                    progress(len(data))
        return self._at - start

    def _not_copied(self, extent: Extent, progress: Progress | None) -> list[Extent]:
        """Let the store copy an extent, if it can; returns what remains to be written."""
        source = extent.source
        if not isinstance(source, RemoteSource) or extent.length < 2 * SMALLEST or not self._upload.copies(source):
            return [extent]
        lacking = max(SMALLEST - len(self._held), 0) if self._at else 0
        if lacking:
            self.write(source.read(extent.offset, lacking))
        if self._held:
            self._upload.part(bytes(self._held))
            self._held.clear()
        rest = extent.length - lacking
        copied = self._upload.copy(source, extent.offset + lacking, rest)
        self._at += rest if copied else 0
        if progress is not None:
            progress(extent.length if copied else lacking)
        return [] if copied else [extent.cut(lacking, extent.length)]

    def copier(self, progress: Progress | None = None) -> RemoteCopier:
        """A copier that fills the object from the current position on."""
        return RemoteCopier(self, progress)

    def seek(self, position: int) -> None:
        """Check that this is the current position, the only one at which an object can be written."""
        if position != self._at:
            raise RepresentationError(f"{self.path}: an object can only be written from its beginning to its end")

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The object as a binary file object for libraries."""
        with io.BufferedWriter(_Stream(self), 1 << 20) as file:
            yield file


class _Stream(io.RawIOBase):
    def __init__(self, out: RemoteFile) -> None:
        self._out = out

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._out.tell()

    def write(self, data: Any, /) -> int:
        return self._out.write(bytes(data))


class RemoteCopier(DirectCopier):
    """Fills an object in order; see `Copier`."""

    def __init__(self, out: RemoteFile, progress: Progress | None) -> None:
        super().__init__(progress)
        self._out = out

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` to `position`, which must be the current end."""
        self._out.seek(position)
        return self._out.copy(extents, self._progress)

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`, but return the CRC-32, which is known at once because the record after the bytes contains it."""
        self._out.seek(position)
        value = 0
        for data in chunks(extents):
            value = zlib.crc32(data, value)
            self._out.write(data)
            self.report(len(data))
        return value

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Append bytes."""
        self._out.seek(position)
        self._out.write(data)


def _joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The same bytes with consecutive extents of one source joined."""
    last: Extent | None = None
    for extent in extents:
        if (
            last is not None
            and extent.source is last.source
            and (extent.source is None or extent.offset == last.offset + last.length)
        ):
            last = Extent(last.source, last.offset, last.length + extent.length)
            continue
        if last is not None and last.length:
            yield last
        last = extent
    if last is not None and last.length:
        yield last


def _remove(made: Sequence[RemotePath]) -> None:
    for path in made:
        with suppress(CheckpointError, OSError):
            path.unlink(missing_ok=True)


class RemoteGroup(AtomicGroup):
    """Objects in one folder, the last of which names the others; on an error those that exist are removed."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(Path(path.name), sync=False)
        self.made: list[RemotePath] = []
        self._named_last = path

    def _complete(self) -> None:
        """Nothing to do in the store: the objects exist already."""
        for path in self.made:
            count_as_finished(path)

    def _discard(self) -> None:
        if self._named_last in self.made:  # interrupted when all existed; the last may have replaced an older one
            self._complete()
        else:
            _remove(self.made)


def release(store: Store, held: Mapping[str, Held], made: list[str] | None = None) -> None:
    """Create the objects of held uploads, by key; those that name others are created last.

    Args:
        store: The store.
        held: The held uploads.
        made: Gets the key of every object that was created.
    """

    def create(upload: Upload, key: str) -> None:
        upload.release(held[key])
        if made is not None:
            made.append(key)

    others, last = (
        [key for key in held if key.endswith((".index.json", ".metadata")) == naming] for naming in (False, True)
    )
    for group in (others, last):
        uploads = [store.begin(key, expected=0, replace=False) for key in group]
        tasks = [partial(create, upload, key) for upload, key in zip(uploads, group, strict=True)]
        for _ in in_window(tasks, to_end=True):
            pass


def discard(store: Store, held: Mapping[str, Held]) -> None:
    """Abort held uploads."""
    for key, found in held.items():
        with suppress(CheckpointError, OSError):
            store.begin(key, expected=0, replace=False).discard(found)


class RemoteFolder:
    """A new folder of objects, which are created when all are uploaded; at once if the store cannot hold uploads.

    An object that names others is created last, and on an error all of them are removed; objects of others are not.

    Args:
        path: The folder; there must be no objects below it.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._held: dict[str, Held] = {}
        self._made: list[RemotePath] = []

    def __enter__(self) -> RemotePath:
        if self.path.exists():
            raise DestinationError(
                f"{self.path}: there are objects below this name; a folder of a store is not replaced",
                hint="Give another name, or remove it with the store's own tools first.",
            )
        self.path.hold(self._held, self._made)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.path.hold(None, [])
        if error is not None:
            self._discard([])
            return
        made: list[str] = []
        try:
            self._expect_no_others()
            release(self.path.store, self._held, made)
        except BaseException:
            if made and self._held.keys() <= set(made):  # interrupted when all existed
                count_as_finished(self.path)
            else:
                self._discard(made)
            raise
        self.path.forget()
        count_as_finished(self.path)

    def _expect_no_others(self) -> None:
        """Check that nobody else has written objects to the folder meanwhile."""
        others = {entry.key for entry in self.path.store.listed(self.path.key)} - {path.key for path in self._made}
        if others:
            raise DestinationError(
                f"{self.path}: another program has written {min(others)} there meanwhile",
                hint="Give another name, or remove it with the store's own tools first.",
            )

    def _discard(self, made: Sequence[str]) -> None:
        """Abort what is held, and remove the objects that this process has created."""
        discard(self.path.store, {key: found for key, found in self._held.items() if key not in made})
        for key in (*made, *(path.key for path in self._made)):
            with suppress(CheckpointError, OSError):
                self.path.store.delete(key)
        self.path.forget()
