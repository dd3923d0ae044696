"""Refuses a pickle whose opcodes declare more than it holds, before anything is unpickled."""

from __future__ import annotations

import re
from functools import cache

from optimstate.errors import CorruptCheckpointError, LimitExceededError

__all__ = ["MAX_PICKLE_BYTES", "check_opcodes"]

MAX_PICKLE_BYTES = 1 << 29
"""Largest pickle that is read. 80,000 tensors take 7 MB."""


@cache
def _opcode_pattern(high: int) -> re.Pattern[bytes]:
    """A run of opcodes whose arguments are short and whose memo indices are below (high + 1) << 16, high at most 255.

    One anchored C-level match walks over most of a pickle; what it stops at is looked at by `_step`. Longer texts are
    few, and compiling one more length takes as long as twenty of them take there.
    """

    def counted(opcode: bytes, length_bytes: int, lengths: range) -> bytes:
        rows = (re.escape(n.to_bytes(length_bytes, "little")) + b".{%d}" % n for n in lengths)
        return re.escape(opcode) + b"(?:" + b"|".join(rows) + b")"

    bare = rb"[(012NQRabdelostu})\]\x81\x85-\x89\x8f-\x94]"
    memo = rb"r..[\x00-" + re.escape(bytes([high])) + rb"]\x00"
    number = rb"(?:K.|M..|J.{4})"
    numbers = rb"(?:\(?+" + number + rb"++[\x85-\x87t]" + memo + rb"|\))"
    storage = rb"\(h.h." + counted(b"X", 4, range(1, 9)) + memo + rb"h." + number + rb"t" + memo + rb"Q"
    tensor = number + numbers + numbers + rb"[\x88\x89]h.\)R" + memo + rb"t" + memo + rb"R" + memo
    rows = [  # the most frequent first
        rb"h.\(" + storage + tensor,  # a whole tensor as torch writes nearly all of them
        memo + bare + b"?+",
        rb"[hqK\x80\x82]." + bare + b"?+",
        bare,
        rb"[Jj\x84].{4}",
        rb"[M\x83]..",
        counted(b"X", 4, range(48)),
        rb"G.{8}",
        rb"c[^\n]*\n[^\n]*\n",
        counted(b"U", 1, range(16)),
        counted(b"\x8c", 1, range(48)),
        counted(b"\x8a", 1, range(16)),
        counted(b"C", 1, range(16)),
    ]
    return re.compile(rb"(?s:" + rb"|".join(rows) + rb")*+")


_LENGTH_PREFIXED = {
    **dict.fromkeys(b"U\x8c\x8aC", 1),
    **dict.fromkeys(b"XTB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96\x95", 8),
}


_ONE_LINE = frozenset(b"ILFSVgPp")


_STOP = ord(".")


def check_opcodes(data: bytes, start: int = 0) -> int:
    """Refuse a pickle whose opcodes declare more than `data` holds, before anything is unpickled.

    Returns:
        Where the pickle that begins at `start` ends.

    Raises:
        CorruptCheckpointError: An argument reaches past the end, or there is no end.
        LimitExceededError: A memo index or a size is beyond any honest pickle of this length.
    """
    if len(data) - start > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"a pickle of {len(data)} bytes is over the limit of {MAX_PICKLE_BYTES}")
    pattern = _opcode_pattern(min(len(data) >> 16, 0xFF))
    at = start
    while at < len(data):
        match = pattern.match(data, at)
        assert match is not None
        at = match.end()
        if at < len(data):
            if data[at] == _STOP:
                return at + 1
            at = _step(data, at)
    raise CorruptCheckpointError("the pickle does not end with STOP", place=f"byte {len(data)} of the pickle")


def _step(data: bytes, at: int) -> int:
    """Check the opcode at `at`, which the pattern did not take, and return where the next one begins."""
    opcode = data[at]
    place = f"byte {at} of the pickle"
    if opcode == ord("r"):
        index = int.from_bytes(data[at + 1 : at + 5], "little")
        if len(data) < at + 5 or index > len(data):
            raise LimitExceededError(f"memo index {index} in a pickle of {len(data)} bytes", place=place)
        return at + 5
    if opcode in _LENGTH_PREFIXED:
        width = _LENGTH_PREFIXED[opcode]
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        if at + 1 + width + length > len(data):
            raise CorruptCheckpointError(f"declares {length} bytes, past the end of the pickle", place=place)
        return at + 1 + width + (0 if opcode == 0x95 else length)  # a frame's contents are opcodes
    lines = 2 if opcode in b"ci" else 1 if opcode in _ONE_LINE else 0
    if not lines:
        raise CorruptCheckpointError(f"0x{opcode:02x} is no opcode, or its argument is cut off", place=place)
    end = at
    for _ in range(lines):
        end = data.find(b"\n", end + 1)
        if end < 0:
            raise CorruptCheckpointError("a line of text does not end", place=place)
    if opcode in b"gp" and (not data[at + 1 : end].isdigit() or int(data[at + 1 : min(end, at + 12)]) > len(data)):
        raise LimitExceededError(f"memo index {data[at + 1 : end][:20]!r}", place=place)
    return end + 1
