"""The items of a `torch.distributed.checkpoint` folder, at the places given in `.metadata`.

Each item is a separate archive, of `torch.save` or of safetensors; most are equal except for their elements.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any
from zlib import crc32

from optimstate.describe import describe, exact
from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.dcp.archives import Archives, small_ones
from optimstate.formats.dcp.columns import Box, Form, Metadata
from optimstate.formats.ranks.tiles import DeferredStorage, Tile, check_tiling, tiled
from optimstate.formats.safetensors.file import MAX_HEADER
from optimstate.io.checksums import Recorded
from optimstate.io.extents import Extent, FileSlice, InMemory, StoredSource, announce, chunks
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.state.records import tensor_record
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, contiguous_strides
from optimstate.tree import Opaque

__all__ = ["PieceStorage", "Pieces"]

_ZIP = b"PK\x03\x04"
_SMALL_OBJECT = 1 << 20  # bytes
_ARCHIVES_KEPT = 1 << 12
ENDS = 2048  # bytes at either end of an archive with one tensor that contain its pickle and its directory


class Pieces:
    """The pieces of all tensors in a folder, whose files are opened once.

    Making a tensor does not read its pieces: they are located when its elements are first needed.
    """

    def __init__(self, folder: Location, metadata: Metadata) -> None:
        self.folder = folder
        self.metadata = metadata
        self.sources = [open_source(folder / name) for name in metadata.files]
        self._archives = Archives()
        self._blobs: dict[tuple[str, int], Mapping[str, Any]] = {}
        self._layouts: dict[tuple[str, tuple[int, ...]], tuple[int, str, tuple[int, ...]]] = {}
        self._scalars: dict[tuple[type, str], int] = {}
        self._objects: dict[int, tuple[Any, int]] = {}  # keeps the values, so that no other object gets their ids
        self._tiled: set[tuple[tuple[int, ...], tuple[Box | None, ...]]] = set()
        self._check_places()

    @property
    def globals(self) -> list[tuple[str, str]]:
        """Every `(module, name)` that the pickles of objects mention."""
        return self._archives.globals

    def _check_places(self) -> None:
        """Check that all items are inside their files."""
        sizes = [source.size for source in self.sources]
        columns = zip(self.metadata.file, self.metadata.offset, self.metadata.length, strict=True)
        for file, offset, length in columns:
            if offset + length > sizes[file]:
                FileSlice(self.sources[file], offset, length)  # raises the error

    def slice(self, row: int) -> FileSlice:
        """The bytes of an item."""
        metadata = self.metadata
        return FileSlice(self.sources[metadata.file[row]], metadata.offset[row], metadata.length[row])

    def values(self) -> dict[str, Any]:
        """Every item by name."""
        metadata = self.metadata
        objects = [metadata.first[number] for number, form in enumerate(metadata.forms) if form is None]
        announce(part.extent(0, part.size) for part in map(self.slice, objects) if part.size <= _SMALL_OBJECT)
        found = self._archives.read(self.slice, self._in_files(objects))
        made: dict[str, Any] = {}
        met: set[int] = set()  # equal numbers are one object, see `Archives`
        for number, (name, form) in enumerate(zip(metadata.order, metadata.forms, strict=True)):
            if form is not None:
                made[name] = self.tensor(number, form)
                continue
            value = made[name] = found[metadata.first[number]]
            if id(value) in met:
                continue
            met.add(id(value))
            if value is None or type(value) in (bool, int, float, str):
                self._scalars.setdefault((type(value), exact(value)), number)
            else:
                self._objects[id(value)] = value, number
        return made

    def _in_files(self, rows: Iterable[int]) -> list[int]:
        """Rows in the order of the files."""
        return sorted(rows, key=lambda row: (self.metadata.file[row], self.metadata.offset[row]))

    def read_numbers(self, storages: Iterable[PieceStorage]) -> None:
        """Read small tensors that are not in a store: equal archives, as most steps have, are looked into once."""
        metadata = self.metadata
        at = {metadata.first[one.number]: one for one in storages if len(metadata.rows(one.number)) == 1}
        near = self._in_files(row for row in at if self.sources[metadata.file[row]].lanes == 1)
        known: dict[tuple[bytes, int], tuple[tuple[Extent, ...], int]] = {}
        for row, _, data in small_ones(self.slice, near):
            if not data.startswith(_ZIP):
                continue  # the bytes of a blob do not say which of its tensors is meant
            storage = at[row]
            found = known.get((data, storage.nbytes))
            if found is None:
                if len(known) == _ARCHIVES_KEPT:
                    known.clear()
                content = b"".join(chunks(storage.pieces))
                found = known[data, storage.nbytes] = InMemory(content).extents(), crc32(content)
            storage.hold(*found)

    def number_of(self, value: Any) -> int | None:
        """The number of the item from which an object was read, or None."""
        if value is None or type(value) in (bool, int, float, str):
            return self._scalars.get((type(value), exact(value)))
        found = self._objects.get(id(value))
        return found[1] if found is not None else None

    def files_with_names(self) -> set[int]:
        """The numbers of files whose contents include the names of items: blobs of safetensors."""
        metadata = self.metadata
        first: dict[int, int] = {}
        for row, file in enumerate(metadata.file):
            first.setdefault(file, row)
        return {file for file, row in first.items() if self.slice(row).read(0, min(4, metadata.length[row])) != _ZIP}

    def tensor(self, number: int, form: Form) -> LazyTensor:
        """An item that is a tensor."""
        self._check_tiling(number, form)
        key = form.dtype, form.shape
        layout = self._layouts.get(key)
        if layout is None:
            about = DTYPES[form.dtype]
            nbytes = prod(form.shape) * about.itemsize
            layout = self._layouts[key] = nbytes, about.storage_class, contiguous_strides(form.shape)
        nbytes, kind, stride = layout
        return LazyTensor(
            PieceStorage(self, number, nbytes, kind), form.dtype, form.shape, stride, 0, form.requires_grad
        )

    def _check_tiling(self, number: int, form: Form) -> None:
        """Check that the pieces fill the tensor, once for all tensors with the same pieces."""
        metadata = self.metadata
        start, stop = metadata.first[number], metadata.first[number + 1]
        boxes = metadata.boxes[start:stop]
        key = form.shape, tuple(boxes)
        if key in self._tiled:
            return
        try:
            check_tiling(form.shape, [box for box in boxes if box is not None])
        except CheckpointError as error:
            name = describe(metadata.order[number])
            raise error.within(path=self.folder, part=f"tensor {name}") from error
        self._tiled.add(key)

    def recorded(self) -> Iterator[Recorded]:
        """The checksums of the items' archives; blobs of safetensors have none."""
        metadata = self.metadata
        seen: set[tuple[int, int]] = set()
        for number, form in enumerate(metadata.forms):
            for row in metadata.rows(number):
                place = metadata.file[row], metadata.offset[row]
                if place not in seen:
                    seen.add(place)
                    box = metadata.boxes[row]
                    tensor = (form.dtype, box[1]) if form and box else None
                    yield from self._archives.recorded(self.slice(row), tensor)

    def locate(self, number: int) -> tuple[Extent, ...]:
        """The extents of a tensor in row-major order."""
        metadata = self.metadata
        form, name = metadata.forms[number], metadata.order[number]
        assert form is not None
        tiles = []
        for row in metadata.rows(number):
            box = metadata.boxes[row]
            assert box is not None
            tiles.append(Tile(*box, self._piece(name, form.dtype, box[1], row)))
        return tiled(form.shape, DTYPES[form.dtype].itemsize, tiles)

    def _piece(self, name: str, dtype: str, sizes: tuple[int, ...], row: int) -> Storage:
        part = self.slice(row)
        found = self._archives.elements(part, dtype, sizes)
        if found is None:
            return self._piece_of_blob(name, dtype, sizes, row)
        if isinstance(found, Storage):
            return found
        if isinstance(found, Opaque):
            described = tensor_record(found)
            kind = describe(found) if described is None else str(described)
            raise UnsupportedCheckpointError(
                f"tensor {describe(name)} is stored as a subclass of tensors: {kind}"[:300],
                path=part.path,
                place=f"offset {part.start}",
                hint="Leave it out: load it with torch and the library of that class, and save the rest without it.",
            )
        raise CorruptCheckpointError(
            f"a piece of tensor {describe(name)} should be {dtype}{list(sizes)}, the file has {describe(found)}"[:300],
            path=part.path,
            place=f"offset {part.start}",
        )

    def _piece_of_blob(self, name: str, dtype: str, sizes: tuple[int, ...], row: int) -> Storage:
        """A piece in a safetensors blob; torch records the offset of the blob in the file, not that of the tensor."""
        item, file = self.metadata.item(row), self.sources[self.metadata.file[row]]
        key = (item.file, item.offset)
        if key not in self._blobs:
            self._blobs[key] = _blob_header(file, item.offset)
        header = self._blobs[key]
        entry = header.get(name)
        try:
            assert entry is not None
            start, stop = entry["data_offsets"]
            fits = entry["dtype"] == DTYPES[dtype].safetensors and tuple(entry["shape"]) == sizes
        except (KeyError, TypeError, ValueError, AssertionError):
            start = stop = 0
            fits = False
        nbytes = prod(sizes) * DTYPES[dtype].itemsize
        if not fits or stop - start != nbytes:
            raise CorruptCheckpointError(
                f"a piece of tensor {describe(name)} should be {dtype}{list(sizes)}, the file has {describe(entry)}"[
                    :300
                ],
                path=file.path,
                place=f"offset {item.offset}",
            )
        at = item.offset + 8 + int(header["__header_bytes__"]) + start
        return Storage((FileSlice(file, at, nbytes).extent(0, nbytes),), nbytes)


class PieceStorage(DeferredStorage):
    """The elements of one tensor in a folder; without a closure, because there may be a million of them.

    Attributes:
        table: The folder's pieces.
        number: The number of the tensor among the items.
    """

    __slots__ = ("number", "table")

    def __init__(self, table: Pieces, number: int, nbytes: int, kind: str) -> None:
        self.table = table
        self.number = number
        self._pieces = None
        self.nbytes = nbytes
        self.kind = kind
        self.location = "cpu"
        self.key = ""
        self.crc = None

    def reach(self) -> tuple[Extent, ...]:
        """The ends of the pieces' archives, or all of a small archive."""
        found: list[Extent] = []
        for row in self.table.metadata.rows(self.number):
            part = self.table.slice(row)
            if part.size <= 4 * ENDS:
                found.append(part.extent(0, part.size))
            else:
                found += (part.extent(0, ENDS), part.extent(part.size - ENDS, ENDS))
        return tuple(found)

    def locate(self) -> tuple[Extent, ...]:
        """The extents of the bytes."""
        return self.table.locate(self.number)

    def hold(self, pieces: tuple[Extent, ...], crc: int) -> None:
        """Take bytes that have been read."""
        self._pieces, self.crc = pieces, crc

    @classmethod
    def read_together(cls, storages: Iterable[Storage]) -> None:
        """Read small storages, those that are neighbours in a file together."""
        by_table: dict[int, list[PieceStorage]] = {}
        for one in storages:
            if isinstance(one, PieceStorage) and one.crc is None:
                by_table.setdefault(id(one.table), []).append(one)
        for found in by_table.values():
            found[0].table.read_numbers(found)

    def copy_of(self, start: int, stop: int) -> Storage:
        """As of any storage; a copy of all bytes still counts as the same item."""
        if start == 0 and stop == self.nbytes:
            return PieceStorage(self.table, self.number, self.nbytes, self.kind)
        return super().copy_of(start, stop)


def _blob_header(file: StoredSource, offset: int) -> Mapping[str, Any]:
    (length,) = struct.unpack("<Q", file.read(offset, 8))
    try:
        if length > MAX_HEADER:
            raise ValueError(f"{length} bytes long")
        header = json.loads(file.read(offset + 8, length))
        assert isinstance(header, dict)
    except (ValueError, RecursionError, AssertionError) as error:
        raise UnsupportedCheckpointError(
            f"neither a torch.save archive nor a safetensors header: {error}"[:200],
            path=file.path,
            place=f"offset {offset}",
        ) from None
    return {**header, "__header_bytes__": length}
