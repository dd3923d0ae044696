"""What kind of file bytes are: text, tar, safetensors, or an archive that programs read in different ways."""

from __future__ import annotations

import json
import struct
import tarfile

from optimstate.formats.byte_sources import Part, Source
from optimstate.formats.safetensors.file import MAX_HEADER
from optimstate.formats.torch.zip_end import CENTRAL, END, END64, LOCATOR64

__all__ = ["MAX_TEXT", "archive_length", "is_safetensors", "is_tar", "is_text", "read_in_two_ways"]

MAX_TEXT = 1 << 26


def is_safetensors(source: Source) -> bool:
    """Whether all of a source is the header and the data of a safetensors file; of any dtypes."""
    if source.size < 8 or source.read(8, 1) != b"{":
        return False
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > min(source.size - 8, MAX_HEADER):
        return False
    try:
        header = json.loads(source.read(8, length))
        header.pop("__metadata__", None)
        ranges = sorted((int(start), int(stop)) for start, stop in (entry["data_offsets"] for entry in header.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False
    end = 0
    for start, stop in ranges:
        if start != end or stop < start:
            return False
        end = stop
    return bool(8 + length + end == source.size)


def is_tar(head: bytes) -> bool:
    """Whether the sum of the first header is right; archives of before 1988 have no other mark."""
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def is_text(source: Source, head: bytes) -> bool:
    """Whether all of a source is text in UTF-8."""
    if source.size > MAX_TEXT or b"\0" in head:
        return False
    data = source.read(0, source.size)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not data.translate(None, _NOT_CONTROLS)


_NOT_CONTROLS = bytes({*range(256)} - {*range(32), 127} | {*b"\t\n\v\f\r\x1b"})


def read_in_two_ways(source: Source) -> str | None:
    """What makes programs disagree about the directory of an archive, or None where they agree.

    Some take the last end record, others the first; some obey its offset, others look directly in front of it.
    """
    tail_size = min(source.size, END.size + 0xFFFF + LOCATOR64.size + END64.size)
    tail = source.read(source.size - tail_size, tail_size)
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
            return "the zip64 end record does not stand where it belongs"
        end64 = source.read(end, END64.size)
        if len(end64) < END64.size or end64[:4] != b"PK\x06\x06":
            return "the zip64 end record is damaged"
        *_, count64, size64, offset64 = END64.unpack(end64)
        short = ((count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (offset, offset64, 0xFFFFFFFF))
        if any(small not in (full, most) for small, full, most in short):
            return "the two end records contradict each other"
        count, size, offset = count64, size64, offset64
    if offset + size != end:
        return "the directory does not stand in front of its end record"
    if count and source.read(0, 4) != b"PK\x03\x04":
        return "it does not begin with a member"
    return None if count * CENTRAL.size <= size else "the directory cannot hold its entries"


def archive_length(source: Source, start: int) -> int:
    """How long the archive is that begins at `start`, before others; 0 where there is none."""
    block = 1 << 22
    at = start
    while at < source.size:
        data = source.read(at, min(block + END.size + 0x10000, source.size - at))
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
    return 0
