"""The end of a zip archive: the records that locate its directory."""

from __future__ import annotations

import struct

from optimstate.errors import CorruptCheckpointError
from optimstate.formats.byte_sources import Part
from optimstate.io.extents import FileSlice, StoredSource
from optimstate.io.streams import Source

__all__ = [
    "CENTRAL",
    "END",
    "END64",
    "LOCAL",
    "LOCATOR64",
    "MAX32",
    "archive_length",
    "find_directory",
    "read_in_two_ways",
]

# Structures of the zip format (PKWARE's APPNOTE.TXT, section 4.3), with their signatures.
LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
MAX32 = 0xFFFFFFFF


def find_directory(source: StoredSource | FileSlice) -> tuple[int, int, int]:
    """Offset, size and number of entries of the central directory."""
    tail = _tail(source)
    tail_size = len(tail)
    at = _rfind_end(tail)
    if at < 0:
        raise CorruptCheckpointError(
            "the zip directory at the end is missing",
            path=source.path,
            place=f"offset {source.size}",
            hint=_restore_hint(source),
        )
    end_offset = source.size - tail_size + at
    _, _, _, _, count, size, offset, _ = END.unpack_from(tail, at)
    expected_end = end_offset
    if at >= LOCATOR64.size and tail[at - LOCATOR64.size : at - LOCATOR64.size + 4] == b"PK\x06\x07":
        _, _, end64_offset, _ = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)
        end64 = source.read(end64_offset, END64.size)
        if end64[:4] != b"PK\x06\x06":
            raise CorruptCheckpointError(
                "the zip64 directory is damaged", path=source.path, place=f"offset {end64_offset}"
            )
        *_, count, size, offset = END64.unpack(end64)
        expected_end = end64_offset
    if offset + size != expected_end:
        raise CorruptCheckpointError(
            f"the zip directory says it ends at {offset + size}, but it ends at {expected_end}",
            path=source.path,
            place=f"offset {end_offset}",
        )
    return offset, size, count


def _tail(source: Source) -> bytes:
    """The end with the last end record, what may be in front of it, and all that may follow it."""
    few = END64.size + LOCATOR64.size + END.size
    tail = source.read(max(source.size - few, 0), min(source.size, few))
    if tail.rfind(b"PK\x05\x06") == few - END.size:  # most archives have no comment at the end
        return tail
    size = min(source.size, few + 0xFFFF)
    return source.read(source.size - size, size)


def _rfind_end(data: bytes) -> int:
    """The offset of the last complete end record, which the beginning of another one may follow; -1 without one."""
    return data.rfind(b"PK\x05\x06", 0, max(len(data) - END.size + 4, 0))


def _restore_hint(source: StoredSource | FileSlice) -> str:
    """How to restore the file: an interrupted in-place edit leaves the old end record inside it."""
    block = 1 << 24
    for low in range(max(source.size - block, 0), max(source.size - 16 * block, -1), -block):
        data = source.read(low, min(block + END.size, source.size - low))
        at = _rfind_end(data)
        if at >= 0 and data[max(at - LOCATOR64.size, 0) :][:4] == b"PK\x06\x07":
            size = low + at + END.size
            return f"An edit in place was interrupted; `truncate -s {size} {source.path}` restores the file as it was."
        if low == 0:
            break
    return "The file is truncated or not a checkpoint of torch.save; copy it again from its source."


def read_in_two_ways(source: Source) -> str | None:
    """Why programs may read different directories in an archive, or None where they agree.

    Some take the last end record, others the first; some use its offset, others look directly in front of it.
    """
    tail = _tail(source)
    tail_size = len(tail)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        return "the directory at the end is missing"
    _, disk, _, _, count, size, offset, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail) or disk not in (0, 0xFFFF):
        return "bytes follow the end record"
    end = source.size - tail_size + at
    large = tail[at - LOCATOR64.size : at - LOCATOR64.size + 4] == b"PK\x06\x07" if at >= LOCATOR64.size else False
    if large:
        _, _, where, _ = LOCATOR64.unpack_from(tail, at - LOCATOR64.size)
        end -= LOCATOR64.size + END64.size
        if where != end:
            return "the zip64 end record is not where it belongs"
        end64 = source.read(end, END64.size)
        if len(end64) < END64.size or end64[:4] != b"PK\x06\x06":
            return "the zip64 end record is damaged"
        *_, count64, size64, offset64 = END64.unpack(end64)
        short = ((count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (offset, offset64, 0xFFFFFFFF))
        if any(small not in (full, most) for small, full, most in short):
            return "the two end records contradict each other"
        count, size, offset = count64, size64, offset64
    if offset + size != end:
        return "the directory is not directly in front of its end record"
    if count and source.read(0, 4) != b"PK\x03\x04":
        return "it does not begin with a member"
    return None if count * CENTRAL.size <= size else "the directory cannot hold its entries"


def archive_length(source: Source, start: int) -> int:
    """The length of the archive that begins at `start`, which others may follow; 0 where there is none."""
    block = 1 << 12
    at = start
    while at < source.size:
        data = source.read(at, min(block + END.size, source.size - at))
        found = data.find(b"PK\x05\x06")
        while 0 <= found < block:
            end = at + found
            if found + END.size <= len(data):
                comment = int(END.unpack_from(data, found)[7])
                length = end + END.size + comment - start
                if start + length <= source.size and read_in_two_ways(Part(source, start, length)) is None:
                    return length
            found = data.find(b"PK\x05\x06", found + 1)
        at += block
        block = min(2 * block, 1 << 22)
    return 0
