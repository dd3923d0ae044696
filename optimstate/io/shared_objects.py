"""Objects of a store that several processes upload, each by one process; all objects are created at the end.

The contents of an object are noted first: bytes, and ranges of other files. The process that uploads it is chosen by
the sizes of earlier objects, so that all processes choose the same one. No object exists before the commit: until then
the store keeps the uploaded parts, and each process's vote lists its parts.
"""

from __future__ import annotations

import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

from optimstate.errors import RepresentationError
from optimstate.io.extents import Extent, Progress, StoredSource, chunks
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.io.remote.path import Held, RemotePath
from optimstate.io.remote.stage import StoreStage
from optimstate.io.shared import SharedFile, SharedFiles
from optimstate.io.together import Stage

__all__ = ["SharedObjects", "upload_objects"]

Piece = bytes | Extent


class SharedObjects(SharedFiles):
    """The objects of a stage, to be used by a writer.

    Args:
        stage: The folder of a store that this process and others fill together.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, sync=False)
        assert isinstance(stage, StoreStage)
        self._stage = stage
        self._filled = [0] * stage.team.size
        self.objects: list[SharedObject] = []

    def file(self, path: Location, expected_size: int) -> SharedObject:
        """An object in the folder, uploaded by the process with the least work; small ones by the first process."""
        owner = min(range(len(self._filled)), key=self._filled.__getitem__) if expected_size else 0
        self._filled[owner] += expected_size
        assert isinstance(path, RemotePath)
        return SharedObject(self, path, owner)

    @contextmanager
    def folder(self, path: Location) -> Iterator[Location]:
        """A folder in the folder, which in a store is only a part of names."""
        yield path

    def _work(self, rank: int) -> dict[str, Any]:
        rows = [made.row() for made in self.objects if made.owner == rank]
        return {"ranges": [], "files": None} if None in rows else {"ranges": [], "files": {}, "objects": rows}

    def _moved(self, rank: int, progress: Progress) -> dict[str, Any]:
        return _uploaded(
            self._stage, [(made.path, made.pieces) for made in self.objects if made.owner == rank], progress
        )

    def _end(self, votes: Sequence[Any]) -> None:
        sizes = {made.path.key: made.tell() for made in self.objects}
        self._stage.release({name: held for vote in votes for name, held in vote["held"].items()}, sizes)


class SharedObject(SharedFile):
    """One of the objects as an `Output`, whose contents are noted in order."""

    path: RemotePath

    def __init__(self, files: SharedObjects, path: RemotePath, owner: int) -> None:
        super().__init__(files, path)
        self.owner = owner
        self.pieces: list[Piece] = []
        self._objects = files
        self._end = 0
        self._is_partial = False

    def __enter__(self) -> SharedObject:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._objects.objects.append(self)

    @property
    def is_first(self) -> bool:
        """Whether this process uploads it."""
        return self.owner == self._objects.stage.team.rank

    def row(self) -> list[Any] | None:
        """Its name and contents as JSON; None if something is computed."""
        pieces: list[Any] = []
        for piece in self.pieces:
            if isinstance(piece, bytes):
                pieces.append(b64encode(piece).decode())
            elif piece.source is None or isinstance(piece.source, StoredSource):
                pieces.append([piece.source and str(piece.source.path), piece.offset, piece.length])
            else:
                return None
        return None if self._is_partial else [str(self.path), pieces]

    def write_at(self, data: bytes | memoryview, position: int) -> None:
        """Append bytes."""
        self._expect(position)
        self._end += len(data)
        if data:
            self.pieces.append(bytes(data))

    def note(self, extents: Iterable[Extent], position: int) -> int:
        """Append ranges, and return their length."""
        self._expect(position)
        for extent in extents:
            if extent.length:
                self.pieces.append(extent)
                self._end += extent.length
        return self._end - position

    def note_with_checksum(self, extents: Sequence[Extent], position: int, progress: Progress) -> int:  # noqa: ARG002
        """Append ranges, and return their CRC-32, for which the uploading process reads them once more."""
        self.note(extents, position)
        self._is_partial = True
        value = 0
        for data in chunks(extents) if self.is_first else ():
            value = zlib.crc32(data, value)
        return value

    def _expect(self, position: int) -> None:
        if position != self._end:
            raise RepresentationError(f"{self.path}: an object can only be written from its beginning to its end")


def upload_objects(stage: Stage, rows: Sequence[Any], progress: Progress) -> dict[str, Any]:
    """Upload objects whose contents the first process has listed.

    Returns:
        This process's vote.
    """
    assert isinstance(stage, StoreStage)
    sources: dict[str, StoredSource] = {}

    def piece(row: Any) -> Piece:
        if isinstance(row, str):
            return b64decode(row)
        name, offset, length = row
        if name is not None and name not in sources:
            sources[name] = open_source(name)
        return Extent(None if name is None else sources[name], offset, length)

    return _uploaded(stage, ((stage.place(name), map(piece, pieces)) for name, pieces in rows), progress)


def _uploaded(
    stage: StoreStage, objects: Iterable[tuple[RemotePath, Iterable[Piece]]], progress: Progress
) -> dict[str, Any]:
    held: dict[str, Held] = {}
    try:
        for path, pieces in objects:
            with stage.new_object(path, held) as out:
                for _, group in groupby(pieces, key=type):  # consecutive ranges are copied in one call
                    extents = []
                    for piece in group:
                        if isinstance(piece, bytes):
                            out.write(piece)
                        else:
                            extents.append(piece)
                    out.copy(extents, progress)
    except BaseException:
        stage.discard(held)
        raise
    return {"held": held}
