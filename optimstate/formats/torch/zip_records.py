"""Writing the records of a zip archive in the order, with the alignment and the flags of `torch.save`."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence

from optimstate.formats.protocol import WriteOptions
from optimstate.formats.torch.zip_end import CENTRAL, END, END64, LOCAL, LOCATOR64, MAX32
from optimstate.io.copying import Checksum, Copier, DirectCopier
from optimstate.io.extents import Extent
from optimstate.io.output import Output
from optimstate.tensors.lazy import Storage

__all__ = ["RecordWriter", "end_records", "records_behind", "write_records"]

_ALIGNMENT = 64
_BUFFER = 1 << 20  # bytes of small records that are joined before they are written
_SMALL_RECORD = 1 << 14  # bytes
_FLAGS = 0x0808  # sizes follow the data; names are UTF-8
_FLAGS_EMPTY = 0x0800  # names are UTF-8
_CENTRAL_CRC = slice(16, 20)  # the CRC in a directory entry


class RecordWriter:
    """Writes records one after another, and keeps their directory entries."""

    def __init__(self, copier: Copier, root: str, position: int, *, origin: int = 0) -> None:
        self.copier = copier
        self.root = root
        self.position = position  # in the archive, which begins at `origin` of the file
        self.entries: list[bytes | bytearray] = []
        self._origin = origin
        self._pending: list[bytes] = []
        self._pending_at = position
        self._unknown: list[tuple[Checksum, int, bytearray]] = []  # with the offset of the descriptor and the entry

    def _emit(self, data: bytes) -> None:
        self.position += len(data)
        self._pending.append(data)
        if self.position - self._pending_at >= _BUFFER:
            self._flush()

    def _flush(self) -> None:
        self._write(b"".join(self._pending), self._pending_at)
        self._pending.clear()
        self._pending_at = self.position

    def _write(self, data: bytes, position: int) -> None:
        self.copier.write(data, self._origin + position)

    def add(self, name: str, extents: Sequence[Extent] | bytes, crc: int | None = None) -> int | Checksum:
        """Write a record and return its CRC-32, computed while copying unless given; known after `settle`."""
        size = len(extents) if isinstance(extents, bytes) else sum(extent.length for extent in extents)
        header = self.position
        encoded = (self.root + name).encode()
        extra = _zip64_extra(size, size, header)
        start = header + LOCAL.size + len(encoded) + len(extra) + 4
        padding = -start % _ALIGNMENT
        extra_length = len(extra) + 4 + padding
        flags = _FLAGS if size else _FLAGS_EMPTY
        self._emit(
            LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(encoded), extra_length)
            + encoded
            + _zip64_extra(size, 0, header)  # the stored size follows the data
            + struct.pack("<2sH", b"FB", padding)
            + b"Z" * padding
        )
        found: int | Checksum
        if isinstance(extents, bytes):
            found = zlib.crc32(extents)
            self._emit(extents)
        elif size <= _SMALL_RECORD:
            data = b"".join(extent.read() for extent in extents)
            found = zlib.crc32(data) if crc is None else crc
            self._emit(data)
            self.copier.report(size)
        else:
            self._flush()
            at = self._origin + self.position
            if crc is None:
                found = self.copier.put_with_checksum(extents, at)
            else:
                found = crc
                self.copier.put(extents, at)
            self.position += size
            self._pending_at = self.position
        known = 0 if isinstance(found, Checksum) else found
        descriptor = self.position
        if size:
            shape = "<4sL2Q" if extra else "<4s3L"
            self._emit(struct.pack(shape, b"PK\x07\x08", known, size, size))
        small, offset = min(size, MAX32), min(header, MAX32)
        fields = (b"PK\x01\x02", 0, 0, flags, 0, 0, 0, known, small, small, len(encoded), len(extra))
        entry = bytearray(CENTRAL.pack(*fields, 0, 0, 0, 0, offset) + encoded + extra)
        self.entries.append(entry)
        if isinstance(found, Checksum):
            self._unknown.append((found, descriptor, entry))
        return found

    def settle(self) -> None:
        """Wait until everything is copied, then write the checksums that were computed meanwhile."""
        self._flush()
        self.copier.finish()
        for found, descriptor, entry in self._unknown:
            crc = struct.pack("<L", found.value)
            self._write(crc, descriptor + 4)
            entry[_CENTRAL_CRC] = crc
        self._unknown.clear()

    def directory(self) -> tuple[bytes, bytes]:
        """The directory and the end records that make it valid, to be written after the records."""
        self.settle()
        body = b"".join(self.entries)
        return body, end_records(len(self.entries), self.position, self.position + len(body))


def records_behind(
    root: str, position: int, record: tuple[str, bytes], entries: Sequence[bytes]
) -> tuple[bytes, bytes, bytes]:
    """A record, a directory with `entries` and its own entry, and end records, to be written at `position` in order."""
    written = _Bytes()
    directory = RecordWriter(written, root, position)
    directory.add(*record)
    directory.entries.extend(entries)
    body, end = directory.directory()
    return bytes(written.data), body, end


class _Bytes(DirectCopier):
    """A copier into memory, which must be filled from its beginning to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    def write(self, data: bytes | memoryview, position: int) -> None:  # noqa: ARG002
        self.data += data

    def put(self, extents: Iterable[Extent], position: int) -> int:
        before = len(self.data)
        for extent in extents:
            self.write(extent.read(), position)
        return len(self.data) - before

    def put_with_checksum(self, extents: Sequence[Extent], position: int) -> int:
        before = len(self.data)
        self.put(extents, position)
        return zlib.crc32(memoryview(self.data)[before:])


def end_records(entries: int, start: int, stop: int) -> bytes:
    """The end records that make a directory valid, always with those of zip64.

    Args:
        entries: The number of directory entries.
        start: The offset of the directory.
        stop: The offset of its end, where these records are written.
    """
    size = stop - start
    end64 = END64.pack(b"PK\x06\x06", END64.size - 12, 0x031E, 45, 0, 0, entries, entries, size, start)
    locator = LOCATOR64.pack(b"PK\x06\x07", 0, stop, 1)
    short = min(entries, 0xFFFF)
    end = END.pack(b"PK\x05\x06", 0, 0, short, short, min(size, MAX32), min(start, MAX32), 0)
    return end64 + locator + end


def _zip64_extra(size: int, stored: int, header: int) -> bytes:
    """The zip64 field as miniz writes it, with only the values that do not fit; torch relies on its exact length."""
    if size < MAX32 and header < MAX32:
        return b""
    values = ([size, stored] if size >= MAX32 else []) + ([header] if header >= MAX32 else [])
    return struct.pack(f"<2H{len(values)}Q", 1, 8 * len(values), *values)


def write_records(
    out: Output,
    root: str,
    pickled: bytes,
    storages: Sequence[Storage],
    others: Sequence[tuple[str, Extent]],
    options: WriteOptions,
) -> int:
    """Append a whole archive to an output and return its size.

    Args:
        out: The output, at the position where the archive begins.
        root: The folder of all records, with a slash.
        pickled: The contents of `data.pkl`.
        storages: The storages in the order of their keys.
        others: Further records with their names.
        options: Whether checksums are computed, and the progress.
    """
    origin = out.tell()
    with out.copier(options.progress) as copier:
        directory = RecordWriter(copier, root, 0, origin=origin)
        checks = [directory.add("data.pkl", pickled)]
        directory.add(".format_version", b"1")
        directory.add(".storage_alignment", str(_ALIGNMENT).encode())
        directory.add("byteorder", b"little")
        for key, storage in enumerate(storages):
            crc = storage.crc if storage.crc is not None or options.checksums else 0
            checks.append(directory.add(f"data/{key}", storage.pieces, crc))
        for name, record in others:
            directory.add(name, (record,) if record.length else ())
        directory.add("version", b"3\n")
        directory.settle()
        known = [str(check.value if isinstance(check, Checksum) else check) for check in checks]
        directory.add(".data/serialization_id", _serialization_id([root, *known]))
        body, end = directory.directory()
    out.seek(origin + directory.position)
    return directory.position + out.write(body) + out.write(end)


def _serialization_id(parts: Sequence[str]) -> bytes:
    import hashlib  # importing it takes longer than everything else here

    digest = int.from_bytes(hashlib.sha256("\n".join(parts).encode()).digest(), "big")
    return b"%040d" % (digest % 10**40)
