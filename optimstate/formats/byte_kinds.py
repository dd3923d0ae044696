"""Recognising files by all their bytes: safetensors, tar and text."""

from __future__ import annotations

import json
import struct

from optimstate.formats.safetensors.file import MAX_HEADER
from optimstate.io.streams import Source

__all__ = ["MAX_TEXT", "is_safetensors", "is_tar", "is_text"]

MAX_TEXT = 1 << 26


def is_safetensors(source: Source) -> bool:
    """Whether a source is a complete safetensors file and nothing else, with any dtypes."""
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
    """Whether the checksum of the first header is correct; archives written before 1988 have no signature."""
    import tarfile  # takes milliseconds, and few files need it

    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def is_text(source: Source, head: bytes) -> bool:
    """Whether a source is UTF-8 text without control characters other than whitespace and escape."""
    if source.size > MAX_TEXT or b"\0" in head:
        return False
    data = source.read(0, source.size)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return not data.translate(None, _NOT_CONTROLS)


_NOT_CONTROLS = bytes({*range(256)} - {*range(32), 127} | {*b"\t\n\v\f\r\x1b"})
