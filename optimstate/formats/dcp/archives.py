"""The archives in a data file: one for each item, most of them small, or equal except for their elements.

One archive of each layout is read completely: others of the same dtype, sizes and length, with the same first bytes and
the same directory except for checksums, have their elements at the same offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

from optimstate.formats.torch import zip as torch_zip
from optimstate.formats.torch.zip_directory import Archive
from optimstate.io.checksums import Recorded, recorded
from optimstate.io.extents import FileSlice
from optimstate.record import Record
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage

__all__ = ["Archives", "small_ones"]

_SMALL = 1 << 13  # bytes up to which an item is read as a whole, and compared with those already read
_WINDOW = 1 << 20  # bytes of consecutive small items that are read together
_GAP = 1 << 16  # bytes between two small items up to which they are read together
_CRC = 16  # offset of the checksum in a directory entry


class _Layout(Record):
    """The layout of an archive with one tensor.

    Attributes:
        head: The bytes before the elements.
        directory: The bytes from the directory on, with zeros in place of checksums.
        checksums: The offsets of the checksums in `directory`.
        of_elements: The offset of the elements' checksum in `directory`.
    """

    head: bytes
    directory: bytes
    checksums: tuple[int, ...]
    of_elements: int

    def blank(self, directory: bytes) -> bytes:
        """A directory with zeros in place of its checksums."""
        made = bytearray(directory)
        for at in self.checksums:
            made[at : at + 4] = bytes(4)
        return bytes(made)


class Archives:
    """Reads archives of items.

    Attributes:
        globals: Every `(module, name)` that the pickles mention.
    """

    def __init__(self) -> None:
        self.globals: list[tuple[str, str]] = []
        self._scalars: dict[bytes, Any] = {}
        self._layouts: dict[tuple[str, tuple[int, ...], int], _Layout] = {}
        self._compared: set[tuple[str, tuple[int, ...], int]] = set()

    # --- objects ------------------------------------------------------------------------------------------------------

    def read(self, slice_of: Callable[[int], FileSlice], rows: Sequence[int]) -> dict[int, Any]:
        """The objects that are not tensors; equal numbers, of which a folder has many, are unpickled once.

        Args:
            slice_of: Returns the bytes of a row.
            rows: The rows in the order of the files.
        """
        return {row: self._object(part, data) for row, part, data in small_ones(slice_of, rows)}

    def _object(self, part: FileSlice, data: bytes) -> Any:
        if data and data in self._scalars:
            return self._scalars[data]
        tree, names, _ = torch_zip.read_archive(part)
        self.globals = list(dict.fromkeys([*self.globals, *names]))
        if data and (_is_constant(tree) or (type(tree) is tuple and all(map(_is_constant, tree)))):
            self._scalars[data] = tree
        return tree

    # --- tensors --------------------------------------------------------------------------------------------------

    def elements(self, part: FileSlice, dtype: str, sizes: tuple[int, ...]) -> Any:
        """The row-major elements of a tensor that is alone in an archive.

        Returns:
            A storage; the contents of the archive if they are not a tensor of this dtype and these sizes; None if it is
            not an archive.

        Raises:
            CheckpointError: The archive is damaged.
        """
        key = dtype, sizes, part.size
        known = self._layouts.get(key)
        if known is not None and _directory_like(part, known):
            nbytes = prod(sizes) * DTYPES[dtype].itemsize
            return Storage((part.extent(len(known.head), nbytes),) if nbytes else (), nbytes)
        if part.read(0, min(4, part.size)) != b"PK\x03\x04":
            return None
        piece, _, archive = torch_zip.read_archive(part)
        if not isinstance(piece, LazyTensor) or piece.dtype != dtype or piece.shape != sizes:
            return piece
        extents = piece.extents()
        whole = piece.is_contiguous() and piece.nbytes == piece.storage.nbytes
        if known is None and whole and len(extents) == 1 and extents[0].source is part.file:
            places, at = [], 0
            for _, entry in archive.entries():
                places.append(at + _CRC)
                at += len(entry)
            of_elements = places[archive.records.positions[f"data/{piece.storage.key}"]]
            layout = _Layout(part.read(0, extents[0].offset - part.start), b"", tuple(places), of_elements)
            directory = part.read(archive.directory_offset, part.size - archive.directory_offset)
            self._layouts[key] = layout._replace(directory=layout.blank(directory))
        return Storage(extents, piece.nbytes)

    # --- checksums ------------------------------------------------------------------------------------------------

    def recorded(self, part: FileSlice, tensor: tuple[str, tuple[int, ...]] | None) -> Iterator[Recorded]:
        """The checksums of an archive.

        Args:
            part: The archive.
            tensor: The dtype and sizes of its only tensor, or None if it contains something else. For archives with the
                same layout, records other than the elements are compared once.
        """
        if tensor is None:
            yield from _of_archive(part)
            return
        key = *tensor, part.size
        known = self._layouts.get(key)
        directory = b"" if known is None else _directory_like(part, known)
        if known is None or not directory or key not in self._compared:
            yield from _of_archive(part)
            self.elements(part, *tensor)
            if directory or self._layouts.get(key) is not known:
                self._compared.add(key)
            return
        crc = int.from_bytes(directory[known.of_elements : known.of_elements + 4], "little")
        nbytes = prod(tensor[1]) * DTYPES[tensor[0]].itemsize
        if crc and nbytes:
            place = f"item at offset {part.start}, its elements"
            yield recorded(part.path, place, (part.extent(len(known.head), nbytes),), crc)


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _of_archive(part: FileSlice) -> Iterator[Recorded]:
    if part.read(0, min(4, part.size)) == b"PK\x03\x04":
        for found in Archive(part).recorded():
            yield found._replace(place=f"item at offset {part.start}, {found.place}")


def small_ones(slice_of: Callable[[int], FileSlice], rows: Sequence[int]) -> Iterator[tuple[int, FileSlice, bytes]]:
    """Items with the bytes of those that are small, of which neighbours are read together; of others no bytes.

    Args:
        slice_of: Returns the place of a row.
        rows: The rows in the order of the files.
    """
    parts = [slice_of(row) for row in rows]
    window, begin, end, file = b"", 0, 0, None
    for place, (row, part) in enumerate(zip(rows, parts, strict=True)):
        if part.size > _SMALL:
            yield row, part, b""
            continue
        if part.file is not file or not begin <= part.start <= end - part.size:
            file, begin, end = part.file, part.start, _end_of_window(parts, place)
            window = file.read(begin, end - begin)
        at = part.start - begin
        yield row, part, window[at : at + part.size]


def _end_of_window(parts: Sequence[FileSlice], place: int) -> int:
    """Where to stop reading so that the small items after this one are read together with it."""
    first = parts[place]
    end = first.start + first.size
    for part in parts[place + 1 :]:
        stop = part.start + part.size
        if part.file is not first.file or part.size > _SMALL or part.start > end + _GAP or stop > first.start + _WINDOW:
            break
        end = max(end, stop)
    return end


def _directory_like(part: FileSlice, layout: _Layout) -> bytes:
    """The directory of an archive that has the given layout; empty if it has another one."""
    tail = part.size - len(layout.directory)
    if part.size <= _SMALL:
        data = part.read(0, part.size)
        head, directory = data[: len(layout.head)], data[tail:]
    else:
        head, directory = part.read(0, len(layout.head)), part.read(tail, len(layout.directory))
    return directory if head == layout.head and layout.blank(directory) == layout.directory else b""
