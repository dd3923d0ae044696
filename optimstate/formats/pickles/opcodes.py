"""Refusing pickles whose opcodes declare more bytes than there are, before anything is unpickled."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

from optimstate.errors import CheckpointError, CorruptCheckpointError, LimitExceededError

__all__ = ["LENGTH_PREFIXED", "MAX_PICKLE_BYTES", "ONE_LINE", "OpcodeError", "check_opcodes", "find_end"]

MAX_PICKLE_BYTES = 1 << 29
"""The size of the largest pickle that is read. 80,000 tensors take 7 MB."""

_FEW = 1 << 16  # bytes of a pickle up to which `_step` checks all texts, instead of a pattern


@cache
def _opcode_pattern(high: int, few: bool) -> re.Pattern[bytes]:
    """A pattern for runs of opcodes with short arguments and memo indices below (high + 1) << 16, high at most 255.

    One anchored match in C covers most of a pickle; `_step` checks the opcode at which it stops. Longer texts are rare,
    and compiling one more length costs as much as checking twenty such texts. For a small pickle (`few`) the pattern
    has no texts, because compiling them takes 20 ms.
    """

    def counted(opcode: bytes, length_bytes: int, lengths: range) -> bytes:
        rows = (re.escape(n.to_bytes(length_bytes, "little")) + b".{%d}" % n for n in lengths)
        return re.escape(opcode) + b"(?:" + b"|".join(rows) + b")"

    bare = rb"[(012NQRabdelosu})\]\x81\x88\x89\x8f-\x94]"
    memo = rb"r..[\x00-" + re.escape(bytes([high])) + rb"]\x00"
    number = rb"(?:K.|M..|J.{4})"
    numbers = rb"(?:\(?+" + number + rb"++[\x85-\x87t]" + memo + rb"|\))"
    storage = rb"\(h.h." + counted(b"X", 4, range(1, 9)) + memo + rb"h." + number + rb"t" + memo + rb"Q"
    tensor = number + numbers + numbers + rb"[\x88\x89]h.\)R" + memo + rb"t" + memo + rb"R" + memo
    put = rb"(?:q.|" + memo + rb")"
    item = rb"(?:h.|j.{4}|" + counted(b"X", 4, range(1, 48)) + put + rb"|c[^\n]*\n[^\n]*\n" + put + rb")"
    flat = rb"\(?+(?:" + number + rb"++|(?:G.{8})++)[\x85-\x87t]"
    sizes = rb"(?:" + flat + put + rb"|\))"
    first = rb"(?:h.|j.{4}|c[^\n]*\n[^\n]*\n" + put + rb")"
    early = first + rb"\(\(" + item * 4 + number + rb"t" + put + rb"Q" + number + sizes + sizes
    early += rb"[\x88\x89]" + item + rb"\)R" + put + rb"t" + put + rb"R" + put
    simple = [
        memo + bare + b"?+",
        rb"[hq\x80\x82]." + bare + b"?+",
        bare,
        flat,
        number + rb"++" + bare + rb"?+",  # a whole row of numbers that is not a tuple, so that it is matched once
        rb"(?:G.{8})++",
        rb"[j\x84].{4}",
        rb"\x83..",
    ]
    rows = [  # the most frequent first
        rb"h.\(" + storage + tensor,  # a whole tensor, as torch writes nearly all of them
        early,  # the first tensors, which write names that the others recall from the memo
        *simple,
        counted(b"X", 4, range(48)),
        rb"c[^\n]*\n[^\n]*\n",
        counted(b"U", 1, range(16)),
        counted(b"\x8c", 1, range(48)),
        counted(b"\x8a", 1, range(16)),
        counted(b"C", 1, range(16)),
    ]
    return re.compile(rb"(?s:" + rb"|".join(simple if few else rows) + rb")*+")


LENGTH_PREFIXED = {
    **dict.fromkeys(b"U\x8c\x8aC", 1),
    **dict.fromkeys(b"XTB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96\x95", 8),
}
ONE_LINE = frozenset(b"ILFSVgPp")
_LONG_ARGUMENTS = frozenset(LENGTH_PREFIXED) | ONE_LINE | frozenset(b"ci")
_TUPLES = frozenset(b"t\x85\x86\x87")
_STOP = ord(".")


class OpcodeError(CorruptCheckpointError):
    """A byte of a pickle is not an opcode, or the argument is cut off: every unpickler stops there.

    Attributes:
        offset: The position of the byte.
    """

    offset = 0

    @classmethod
    def at(cls, offset: int, message: str) -> OpcodeError:
        """An error at this byte of the pickle."""
        error = cls(message, place=f"byte {offset} of the pickle")
        error.offset = offset
        return error


_FIRST_WINDOW = 1 << 14  # below `_FEW`, so that bytes that are not a pickle cost little


def find_end(read: Callable[[int], bytes], size: int) -> tuple[bytes, int, CheckpointError | None]:
    """Find the end of a pickle that other bytes may follow, by reading more and more of them.

    Args:
        read: Returns the given number of bytes, from the first on.
        size: How many bytes there are.

    Returns:
        The bytes that were read, the length of the pickle in them, and, if that is 0, why it has no end.
    """
    window = _FIRST_WINDOW
    while True:
        length = min(window, size)
        data = read(length)
        try:
            return data, check_opcodes(data), None
        except OpcodeError as error:
            # Reading more can complete an argument that was cut off, but does not make a byte an opcode.
            is_final = error.offset + 16 < length and data[error.offset] not in _LONG_ARGUMENTS
            if is_final or length == size:
                return data, 0, error
            if window >= MAX_PICKLE_BYTES:
                message = f"a pickle of more than {MAX_PICKLE_BYTES} bytes, the limit"
                return data, 0, LimitExceededError(message)
        except LimitExceededError as error:
            if length == size:
                return data, 0, error
        window *= 4


def check_opcodes(data: bytes, start: int = 0, *, loose: list[int] | None = None) -> int:
    """Refuse a pickle whose opcodes declare more bytes than `data` has, before anything is unpickled.

    Args:
        data: The pickle and the bytes that follow it.
        start: The offset at which it begins.
        loose: Gets the offsets of the opcodes of tuples that are not part of a tensor as torch writes it.

    Returns:
        The offset at which the pickle ends.

    Raises:
        CorruptCheckpointError: An argument reaches past the end, or the pickle has no end.
        LimitExceededError: A memo index or a size exceeds that of any honest pickle of this length.
    """
    if len(data) - start > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"a pickle of {len(data)} bytes is over the limit of {MAX_PICKLE_BYTES}")
    pattern = _opcode_pattern(min(len(data) >> 16, 0xFF), len(data) - start < _FEW)
    at = start
    while at < len(data):
        match = pattern.match(data, at)
        assert match is not None
        at = match.end()
        if at < len(data):
            if data[at] == _STOP:
                return at + 1
            if data[at] in _TUPLES:
                if loose is not None:
                    loose.append(at)
                at += 1
            else:
                at = _step(data, at)
    raise OpcodeError.at(len(data), "the pickle does not end with STOP")


def _step(data: bytes, at: int) -> int:
    """Check the opcode at `at`, which the pattern does not cover, and return the offset of the next one."""
    opcode = data[at]
    place = f"byte {at} of the pickle"
    if opcode == ord("r"):
        index = int.from_bytes(data[at + 1 : at + 5], "little")
        if len(data) < at + 5 or index > len(data):
            raise LimitExceededError(f"memo index {index} in a pickle of {len(data)} bytes", place=place)
        return at + 5
    if opcode in LENGTH_PREFIXED:
        width = LENGTH_PREFIXED[opcode]
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        if at + 1 + width + length > len(data):
            raise OpcodeError.at(at, f"declares {length} bytes, past the end of the pickle")
        return at + 1 + width + (0 if opcode == 0x95 else length)  # a frame's contents are opcodes
    lines = 2 if opcode in b"ci" else 1 if opcode in ONE_LINE else 0
    if not lines:
        raise OpcodeError.at(at, f"0x{opcode:02x} is not an opcode, or its argument is cut off")
    end = at
    for _ in range(lines):
        end = data.find(b"\n", end + 1)
        if end < 0:
            raise OpcodeError.at(at, "a line of text does not end")
    if opcode in b"gp" and (not data[at + 1 : end].isdigit() or int(data[at + 1 : min(end, at + 12)]) > len(data)):
        try:
            int(data[at + 1 : min(end, at + 40)])
        except ValueError:
            raise OpcodeError.at(at, "the index of a memo entry is not a number") from None
        raise LimitExceededError(f"memo index of {end - at - 1} digits in a pickle of {len(data)} bytes", place=place)
    return end + 1
