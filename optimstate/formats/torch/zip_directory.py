"""The directory of a zip archive whose records are stored uncompressed: it locates the records without reading any.

An archive of `torch.save` has a record for each tensor, so all entries of the directory are processed at once: long
runs of consecutive entries have equal lengths, and are unpacked and checked column by column.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from operator import sub
from typing import TYPE_CHECKING, NamedTuple

from optimstate.describe import describe
from optimstate.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    UnrecognizedFormatError,
    UnsupportedCheckpointError,
)
from optimstate.formats.torch.zip_end import CENTRAL, LOCAL, MAX32, find_directory
from optimstate.io.extents import Extent, FileSlice, StoredSource
from optimstate.tensors.lazy import FEW_BYTES, Storage
from optimstate.tree import no_garbage_collection

if TYPE_CHECKING:
    from optimstate.io.checksums import Recorded

__all__ = ["Archive", "Record", "RecordStorage", "Records"]


_SIGNATURE = b"PK\x01\x02"
_MAX32_BYTES = b"\xff\xff\xff\xff"
# Position and type of fields in an entry: flags (the low byte), method, CRC, both sizes, offset of the header.
_FIELDS = ((8, "B"), (10, "H"), (16, "I"), (20, "I"), (24, "I"), (42, "I"))

_FEW = 16  # entries of a directory up to which they are unpacked one by one


class Record(NamedTuple):
    """An entry of the archive's directory.

    Attributes:
        name: The name without the root folder.
        header: The offset of its local header.
        size: The number of bytes of its contents.
        crc: The CRC-32 of its contents; also 0 if the writer computed none.
    """

    name: str
    header: int
    size: int
    crc: int


class _Run(NamedTuple):
    """Consecutive entries of equal length in the directory.

    Attributes:
        at: The offset of the first entry.
        entries: The number of entries.
        length: The number of bytes of each entry.
        name: The number of bytes of each name, which follows the numbers.
        extra: The number of bytes of each extra field, which follows the name.
    """

    at: int
    entries: int
    length: int
    name: int
    extra: int

    def column(self, directory: bytes, place: int) -> bytes:
        """The byte at position `place` of every entry."""
        return directory[self.at + place : self.at + self.entries * self.length : self.length]

    def field(self, directory: bytes, place: int, width: int, apart: int = 0) -> bytearray:
        """The `width` bytes at position `place` of every entry, each followed by `apart` zeros.

        They are copied with a stride: all first bytes, all second ones, ...
        """
        if self.entries == 1:
            start = self.at + place
            return bytearray(directory[start : start + width] + bytes(apart))
        found = bytearray(self.entries * (width + apart))
        for index in range(width):
            found[index :: width + apart] = self.column(directory, place + index)
        return found

    def extras(self, directory: bytes) -> Iterator[bytes]:
        """The extra field of every entry."""
        first = self.at + CENTRAL.size + self.name
        for start in range(first, first + self.entries * self.length, self.length):
            yield directory[start : start + self.extra]

    def count_equal(self, directory: bytes, place: int, expected: bytes) -> int:
        """How many entries, from the first on, have these bytes at position `place`; 0 if entries are too short."""
        if place + len(expected) > self.length:
            return 0
        if self.entries == 1:
            return int(directory.startswith(expected, self.at + place))
        found = self.entries
        for index, byte in enumerate(expected, place):
            column = self.column(directory, index)
            if column != bytes([byte]) * len(column):
                found = min(found, len(column) - len(column.lstrip(bytes([byte]))))
        return found


class Records(Mapping[str, Record]):
    """Records by name, in directory order; each `Record` is made when it is looked up.

    Attributes:
        names: The names in directory order.
        positions: The index of each name in the columns.
        headers, sizes, crcs: The fields of all records as columns.
    """

    def __init__(self, names: Sequence[str], headers: Sequence[int], sizes: Sequence[int], crcs: Sequence[int]) -> None:
        self.names = names
        self.positions = dict(zip(names, range(len(names)), strict=True))
        self.headers = headers
        self.sizes = sizes
        self.crcs = crcs

    def __getitem__(self, name: str) -> Record:
        at = self.positions[name]
        return Record(name, self.headers[at], self.sizes[at], self.crcs[at])

    def __iter__(self) -> Iterator[str]:
        return iter(self.positions)

    def __len__(self) -> int:
        return len(self.positions)

    def __contains__(self, name: object) -> bool:
        return name in self.positions


class Archive:
    """The directory of a zip file whose records are stored without compression.

    Attributes:
        source: The file.
        root: The folder of all records, with a slash.
        records: The records by name without the root, in directory order.
        directory_offset: The offset of the directory.
        compressed: The names of compressed records, which cannot be read.
    """

    def __init__(self, source: StoredSource | FileSlice) -> None:
        self.source = source
        self.compressed: set[str] = set()
        self.directory_offset, size, count = find_directory(source)
        if count * CENTRAL.size > size:
            raise CorruptCheckpointError(
                f"the zip directory cannot hold {count} entries in {size} bytes", path=source.path
            )
        self._directory = source.read(self.directory_offset, size)
        with no_garbage_collection():
            self.root, self.records = self._parsed(count)

    @classmethod
    def of_records(cls, source: StoredSource | FileSlice, root: str, records: Records) -> Archive:
        """An archive without a directory, of records that were found one by one."""
        made = object.__new__(cls)
        made.source, made.root, made.records, made.compressed = source, root, records, set()
        made.directory_offset, made._directory = source.size, b""
        return made

    def entries(self) -> Iterator[tuple[str, bytes]]:
        """The name of each record and the bytes of its entry in the directory."""
        names = iter(self.records)
        for run in self._runs(len(self.records)):
            for start in range(run.at, run.at + run.entries * run.length, run.length):
                yield next(names), self._directory[start : start + run.length]

    def _runs(self, count: int) -> Iterator[_Run]:
        """The entries in runs of equal lengths."""
        data, at = self._directory, 0
        few = count <= _FEW  # distributed checkpoints have thousands of archives with one tensor each
        while count:
            lengths = data[at + 28 : at + 34]
            name, extra, comment = struct.unpack("<3H", lengths) if len(lengths) == 6 else (0, 0, 0)
            length = CENTRAL.size + name + extra + comment
            if not data.startswith(_SIGNATURE, at) or at + length > len(data):
                problem = "cut off" if at + CENTRAL.size > len(data) else "damaged"
                raise self.corrupt(f"the zip directory is {problem}", self.directory_offset + at)
            most = 1 if few else min(count, (len(data) - at) // length)
            run = equal = window = 1
            while equal == window and run < most:  # compare more and more: most runs are short or very long
                window = min(8 * run, most - run)
                ahead = _Run(at + run * length, window, length, name, extra)
                equal = min(ahead.count_equal(data, 0, _SIGNATURE), ahead.count_equal(data, 28, lengths))
                run += equal
            yield _Run(at, run, length, name, extra)
            at += run * length
            count -= run

    def _parsed(self, count: int) -> tuple[str, Records]:
        """The common folder of the records, and the records."""
        runs = list(self._runs(count))
        if not runs:
            return "", Records((), array("Q"), array("Q"), array("Q"))
        flags, methods, crcs, sizes, full, headers = (self._numbers(runs, *field) for field in _FIELDS)
        if any(_MAX32_BYTES in column.tobytes() for column in (sizes, full, headers)):
            extras = chain.from_iterable(run.extras(self._directory) for run in runs)
            rows = map(_zip64, full, sizes, headers, extras)
            full, sizes, headers = (array("Q", column) for column in zip(*rows, strict=True))
        root, names = self._names(runs)
        records = Records(names, headers, sizes, crcs)
        if len(records) != len(names):
            raise CorruptCheckpointError("the zip directory has two entries for one record", path=self.source.path)
        gaps = map(sub, map(sub, [*headers[1:], self.directory_offset], headers), sizes)
        if min(gaps) < LOCAL.size or sizes != full or any(methods) or any(flag & 1 for flag in set(flags)):
            self._check_entries(zip(names, flags, methods, sizes, full, headers, strict=True))
            self._check_overlaps(records)
        return root, records

    def _names(self, runs: Sequence[_Run]) -> tuple[str, list[str]]:
        """The common folder of all records, and their names in it."""
        first = self._directory[runs[0].at + CENTRAL.size :][: runs[0].name]
        root = first[: first.find(b"/") + 1]
        for run in runs:
            if not root or run.name < len(root) or run.count_equal(self._directory, CENTRAL.size, root) < run.entries:
                raise UnrecognizedFormatError(
                    "a zip file, but not one of torch.save: no common folder", path=self.source.path
                )
        joined = bytearray()
        for run in runs:
            joined += run.field(self._directory, CENTRAL.size + len(root), run.name - len(root), apart=1)
        # All at once: decoding them one by one would take as long as everything else here.
        names = joined[:-1].decode("utf-8", "replace").split("\0")
        if b"\0" in root or len(names) != sum(run.entries for run in runs):
            raise CorruptCheckpointError("the name of a record has a zero in it", path=self.source.path)
        return root.decode("utf-8", "replace"), names

    def _numbers(self, runs: Sequence[_Run], place: int, kind: str) -> array[int]:
        """One field of every entry."""
        found = array(kind)
        for run in runs:
            found.frombytes(run.field(self._directory, place, found.itemsize))
        if sys.byteorder == "big":
            found.byteswap()
        return found

    def _check_entries(self, entries: Iterable[tuple[str, int, int, int, int, int]]) -> None:
        """Refuse encrypted records and those that reach past the data; collect compressed ones."""
        for name, flag, method, size, full_size, header in entries:
            if flag & 1:
                raise UnsupportedCheckpointError(f"record {describe(name)} is encrypted", path=self.source.path)
            if method:
                self.compressed.add(name)
            if (size != full_size and not method) or header + LOCAL.size + size > self.directory_offset:
                raise self.corrupt(f"record {describe(name)} of {size} bytes reaches past the data", header)

    def _check_overlaps(self, records: Records) -> None:
        """Refuse a record that begins inside another; records may be in any order."""
        end = 0
        for header, size, name in sorted(zip(records.headers, records.sizes, records, strict=True)):
            if header < end:
                raise self.corrupt(f"record {describe(name)} overlaps another", header)
            end = header + LOCAL.size + size

    def refuse_compressed(self) -> None:
        """Refuse an archive with compressed records.

        Raises:
            UnsupportedCheckpointError: There are some.
        """
        for name in sorted(self.compressed):
            raise UnsupportedCheckpointError(
                f"record {describe(name)} is compressed",
                path=self.source.path,
                hint="torch.save stores records as they are; load the file with torch and save it again.",
            )

    def data_offset(self, record: Record) -> int:
        """The offset of a record's contents, which follow its local header and the padding in it."""
        expected = (self.root + record.name).encode("utf-8", "replace")
        header = self.source.read(record.header, LOCAL.size + len(expected))
        fields = LOCAL.unpack_from(header)
        if fields[0] != b"PK\x03\x04":
            raise self.corrupt(f"record {describe(record.name)} has no local header", record.header)
        name = header[LOCAL.size :]
        if name != expected and name.decode("utf-8", "replace") != self.root + record.name:
            raise self.corrupt(
                f"record {describe(record.name)} has the name {describe(name)} in its header", record.header
            )
        start = record.header + LOCAL.size + int(fields[9]) + int(fields[10])
        if start + record.size > self.directory_offset:
            raise self.corrupt(f"record {describe(record.name)} reaches into the directory", record.header)
        return start

    def extent(self, record: Record) -> Extent:
        """The extent of a record's contents."""
        return self.source.extent(self.data_offset(record), record.size)

    def read(self, record: Record, limit: int) -> bytes:
        """The contents of a record of at most `limit` bytes, compared with its checksum."""
        if record.size > limit:
            raise LimitExceededError(
                f"record {describe(record.name)} has {record.size} bytes, over the limit of {limit}",
                path=self.source.path,
            )
        data = self.extent(record).read()
        if record.crc and zlib.crc32(data) != record.crc:
            raise self.corrupt(f"record {describe(record.name)} does not match its checksum", record.header)
        return data

    def recorded(self) -> Iterator[Recorded]:
        """The checksums in the directory; 0 means that the writer computed none."""
        from optimstate.io.checksums import recorded  # needed only to compare them

        for name, crc in zip(self.records, self.records.crcs, strict=True):
            record = self.records[name]
            if crc and name not in self.compressed:
                yield recorded(self.source.path, f"record {describe(name)}", (self.extent(record),), crc)

    def corrupt(self, message: str, offset: int) -> CorruptCheckpointError:
        """An error at an offset of this file."""
        return CorruptCheckpointError(
            message,
            path=self.source.path,
            place=f"offset {offset}",
            hint="The file is truncated or damaged; copy it again from its source.",
        )


_NAME_AND_PADDING = 320  # bytes of a local header after its fixed part; nearly always enough


class RecordStorage(Storage):
    """A storage that is one record of an archive; its bytes are located when they are first needed.

    Attributes:
        archive: The archive.
        position: The index of the record in `archive.records`.
    """

    __slots__ = ("_pieces", "archive", "position")

    archive: Archive
    position: int
    _pieces: tuple[Extent, ...]

    @property
    def crc(self) -> int | None:  # type: ignore[override]
        """The CRC-32 in the directory, or None."""
        return self.archive.records.crcs[self.position] or None

    def reach(self) -> tuple[Extent, ...]:
        """The record's local header, which gives the offset of its contents, and the contents if they are small."""
        if not self.nbytes or hasattr(self, "_pieces"):
            return ()
        source = self.archive.source
        header = self.archive.records.headers[self.position]
        length = LOCAL.size + _NAME_AND_PADDING + (self.nbytes if self.nbytes <= FEW_BYTES else 0)
        return (source.extent(header, min(length, source.size - header)),)

    @property
    def pieces(self) -> tuple[Extent, ...]:  # type: ignore[override]
        """The extents of the record's contents."""
        try:
            return self._pieces
        except AttributeError:
            archive = self.archive
            record = archive.records[archive.records.names[self.position]]
            self._pieces = (archive.extent(record),) if self.nbytes else ()
            return self._pieces


def _zip64(unpacked: int, packed: int, header: int, extra: bytes) -> tuple[int, int, int]:
    """The sizes and the offset, with values that do not fit 32 bits taken from the entry's zip64 field."""
    fields = [unpacked, packed, header]
    if MAX32 in fields:
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == 1 and at + 4 + length <= len(extra):
                values = iter(struct.unpack_from(f"<{length // 8}Q", extra, at + 4))
                fields = [next(values, value) if value == MAX32 else value for value in fields]
                break
            at += 4 + length
    return fields[0], fields[1], fields[2]
