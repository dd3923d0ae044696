"""Objects and folders of a store as outputs: whole or not there."""

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
from optimstate.io.copying import Checksum
from optimstate.io.extents import Extent, Progress, near
from optimstate.io.output import AtomicGroup
from optimstate.io.remote.path import Held, RemotePath
from optimstate.io.remote.source import RemoteSource
from optimstate.io.remote.store import Store, in_window

__all__ = ["RemoteFile", "RemoteFolder", "RemoteGroup", "discard", "release"]

SMALLEST = 5 << 20  # of the parts of an upload but its last
ZEROS = bytes(1 << 20)


class RemoteFile:
    """An object that is written from its beginning to its end; see `Output`.

    Args:
        path: Its name.
        expected_size: About how many bytes it will have.
        replace: Whether it may take the place of another.
        made: Told of the object when it is there.
        held: Told what makes the object, which is not there then; see `Upload.hold`.
        aside: The name that it may have meanwhile.
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
            self._upload.abort()
            raise
        self.path.forget()
        if self._made is not None:
            self._made.append(self.path)

    def tell(self) -> int:
        """The current position."""
        return self._at

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes; what makes a part is sent."""
        self._held += data
        self._at += len(data)
        size = self._upload.size
        while len(self._held) >= size + SMALLEST:  # so that the last part is never too small for a copy behind it
            self._upload.part(bytes(memoryview(self._held)[:size]))
            del self._held[:size]
        return len(data)

    def copy(self, extents: Iterable[Extent], progress: Progress | None = None) -> int:
        """Append the bytes of `extents`; what the store can copy itself does not come here."""
        start = self._at
        for extent in _joined(extents):
            done = self._copied(extent, progress)
            for block in near([extent.cut(done, extent.length)] if done < extent.length else []):
                for at in range(0, block.length, len(ZEROS)):
                    data = block.cut(at, min(at + len(ZEROS), block.length)).read()
                    self.write(data)
                    if progress is not None:
                        progress(len(data))
        return self._at - start

    def _copied(self, extent: Extent, progress: Progress | None) -> int:
        """How much of the beginning of an extent the store has copied itself."""
        source = extent.source
        if not isinstance(source, RemoteSource) or extent.length < 2 * SMALLEST or not self._upload.copies(source):
            return 0
        lacking = max(SMALLEST - len(self._held), 0) if self._at else 0
        if lacking:
            self.write(source.read(extent.offset, lacking))
        if self._held:
            self._upload.part(bytes(self._held))
            self._held.clear()
        self._upload.copy(source, extent.offset + lacking, extent.length - lacking)
        self._at += extent.length - lacking
        if progress is not None:
            progress(extent.length)
        return extent.length

    def copier(self, progress: Progress | None = None) -> RemoteCopier:
        """What fills the object from the current position on."""
        return RemoteCopier(self, progress)

    def seek(self, position: int) -> None:
        """Go on behind what a copier wrote, where it stands already."""
        if position != self._at:
            raise RepresentationError(f"{self.path}: an object is written from its beginning to its end")

    @contextmanager
    def stream(self) -> Iterator[IO[bytes]]:
        """The object as the file that libraries write to."""
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


class RemoteCopier:
    """Fills an object in order; see `Copier`."""

    def __init__(self, out: RemoteFile, progress: Progress | None) -> None:
        self._out = out
        self._progress = progress

    def put(self, extents: Iterable[Extent], position: int) -> int:
        """Copy the bytes of `extents` to `position`, where the object ends."""
        self._out.seek(position)
        return self._out.copy(extents, self._progress)

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> Checksum | int:
        """As `put`, and the CRC-32, which stands behind the bytes and so must be known before they are sent."""
        self._out.seek(position)
        value = 0
        for extent in near(extents):
            for at in range(0, extent.length, len(ZEROS)):
                data = extent.cut(at, min(at + len(ZEROS), extent.length)).read()
                value = zlib.crc32(data, value)
                self._out.write(data)
                self.report(len(data))
        return value

    def write(self, data: bytes | memoryview, position: int) -> None:
        """Append bytes."""
        self._out.seek(position)
        self._out.write(data)

    def report(self, done: int) -> None:
        """Say that so many bytes more are written."""
        if self._progress is not None and done:
            self._progress(done)

    def finish(self) -> None:
        """Everything is there already."""

    def __enter__(self) -> RemoteCopier:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


def _joined(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Extents of one source that follow one another as one."""
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


def _taken_back(made: Sequence[RemotePath]) -> None:
    for path in made:
        with suppress(CheckpointError, OSError):
            path.unlink(missing_ok=True)


class RemoteGroup(AtomicGroup):
    """Objects beside one another, the last of which names the others; on an error those that are there are removed."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(Path(path.name), sync=False)
        self.made: list[RemotePath] = []

    def _complete(self) -> None:
        """Every object has its name already."""

    def _discard(self) -> None:
        _taken_back(self.made)


def release(store: Store, held: Mapping[str, Held]) -> None:
    """Make objects of all that was held back, by key: those that name others when all others are there."""
    others, last = (
        [key for key in held if key.endswith((".index.json", ".metadata")) == naming] for naming in (False, True)
    )
    for group in (others, last):
        made = [store.begin(key, expected=0, replace=False) for key in group]
        for _ in in_window([partial(upload.release, held[key]) for upload, key in zip(made, group, strict=True)]):
            pass


def discard(store: Store, held: Mapping[str, Held]) -> None:
    """Give up what was held back."""
    for key, found in held.items():
        with suppress(CheckpointError, OSError):
            store.begin(key, expected=0, replace=False).discard(found)


class RemoteFolder:
    """A new folder of objects: they are made when all are uploaded, or, where the store cannot hold them back, at once.

    What names the others is last, and on an error all of them are removed.

    Args:
        path: Its name, below which there must be nothing.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._held: dict[str, Held] = {}

    def __enter__(self) -> RemotePath:
        if self.path.exists():
            raise DestinationError(
                f"{self.path}: there are objects below this name; a folder of a store is not replaced",
                hint="Give another name, or remove it with the store's own tools first.",
            )
        self.path.hold(self._held)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.path.hold(None)
        if error is None:
            try:
                release(self.path.store, self._held)
            except BaseException:
                self._discard()
                raise
            self.path.forget()
            return
        self._discard()

    def _discard(self) -> None:
        discard(self.path.store, self._held)
        with suppress(CheckpointError, OSError):
            self.path.forget()
            _taken_back(list(self.path.rglob("*")))
