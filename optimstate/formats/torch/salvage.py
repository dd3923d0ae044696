"""Reading the complete records of a truncated `torch.save` archive, whose directory is lost.

Each record has a local header, the contents, and a descriptor with the checksum and size of the contents. A record is
complete if the descriptor is there and the checksum matches.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Iterator

from optimstate.errors import CorruptCheckpointError
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.unpickle import errors_in, load
from optimstate.formats.protocol import Document
from optimstate.formats.pruning import LostStorage, without_lost
from optimstate.formats.torch.zip_directory import Archive, Records
from optimstate.formats.torch.zip_end import LOCAL
from optimstate.formats.torch.zip_reader import storages_of
from optimstate.io.extents import StoredSource
from optimstate.io.location import Location
from optimstate.io.places import open_source

__all__ = ["salvage"]

_HAS_DESCRIPTOR = 8
_DESCRIPTOR = b"PK\x07\x08"
_BLOCK = 1 << 22


def salvage(path: Location, name: str) -> Document:
    """The document of the complete records.

    Args:
        path: The file.
        name: The name of the format.

    Raises:
        CorruptCheckpointError: The pickle that describes the tensors is not complete, or no tensor is.
    """
    source = open_source(path)
    root, records = _whole_records(source)
    archive = Archive.of_records(source, root, records)
    if "data.pkl" not in records:
        raise CorruptCheckpointError(
            "nothing can be read: the record that describes the tensors (data.pkl) is not complete", path=path
        )
    with errors_in(path, "data.pkl"):
        loader = storages_of(archive, "data/", lambda kind, key, at, n: LostStorage((), n, kind, at, key))
        tree, names = load(archive.read(records["data.pkl"], MAX_PICKLE_BYTES), loader)
    tree, lost = without_lost(tree, path)
    return Document(path, name, tree, names, checksums=[archive.recorded], lost=lost)


def _whole_records(source: StoredSource) -> tuple[str, Records]:
    """The root folder and the records, from the first to the last one before an incomplete one."""
    found: list[tuple[str, int, int, int]] = []
    at, root = 0, ""
    while (record := _record(source, at)) is not None or (at := _after_directory(source, at)):
        if record is None:
            continue
        full_name, start, size, crc, following = record
        folder, _, name = full_name.partition("/")
        root = root or f"{folder}/"
        if full_name.startswith(root) and (not crc or _checksum(source, start, size) == crc):
            found.append((name, at, size, crc))
        at = following
    names = dict.fromkeys(name for name, *_ in found)
    last = {name: entry for name, *entry in found}  # an in-place edit writes a record again
    columns = [array("Q", (last[name][column] for name in names)) for column in range(3)]
    return root, Records(list(names), *columns)


def _after_directory(source: StoredSource, at: int) -> int:
    """The offset of the next record after a directory, which in-place edits leave in the file; 0 if there is none."""
    if at + 4 > source.size or source.read(at, 4) != b"PK\x01\x02":
        return 0
    for block in range(at, source.size, _BLOCK):
        found = source.read(block, min(_BLOCK + 3, source.size - block)).find(b"PK\x03\x04")
        if found >= 0:
            return block + found
    return 0


def _record(source: StoredSource, at: int) -> tuple[str, int, int, int, int] | None:
    """Name, data offset, size and checksum of the record whose header is at `at`, and the offset of the next one."""
    if at + LOCAL.size > source.size:
        return None
    mark, _, flags, method, _, _, crc, size, full, name_length, extra_length = LOCAL.unpack(source.read(at, LOCAL.size))
    start = at + LOCAL.size + name_length + extra_length
    if mark != b"PK\x03\x04" or method or start > source.size:
        return None
    name = source.read(at + LOCAL.size, name_length).decode("utf-8", "replace")
    if flags & _HAS_DESCRIPTOR:
        described = next(_descriptors(source, start), None)
        return None if described is None else (name, start, *described)
    if size != full or start + size > source.size:
        return None
    return name, start, size, crc, start + size


def _descriptors(source: StoredSource, start: int) -> Iterator[tuple[int, int, int]]:
    """Size, checksum and end of each descriptor that fits contents beginning at `start`."""
    for block in range(start, source.size, _BLOCK):
        data = source.read(block, min(_BLOCK + 24, source.size - block))
        found = data.find(_DESCRIPTOR)
        while 0 <= found < _BLOCK:
            size = block + found - start
            fields = data[found + 4 : found + 24]
            crc = int.from_bytes(fields[:4], "little")
            short, long = struct.pack("<2L", size & 0xFFFFFFFF, size & 0xFFFFFFFF), struct.pack("<2Q", size, size)
            if fields[4:20] == long:
                yield size, crc, block + found + 24
            elif fields[4:12] == short and size < 1 << 32:
                yield size, crc, block + found + 16
            found = data.find(_DESCRIPTOR, found + 1)


def _checksum(source: StoredSource, start: int, size: int) -> int:
    value = 0
    for at in range(start, start + size, _BLOCK):
        value = zlib.crc32(source.read(at, min(_BLOCK, start + size - at)), value)
    return value
