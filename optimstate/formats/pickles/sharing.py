"""Refusing pickles whose tuples contain one another many times: a hundred bytes can make 2**60 items.

Python hashes a tuple by visiting all its items as often as they occur in it, and unpickling hashes tuples: as keys, in
sets, as arguments. So the number of items of every tuple is computed from the opcodes first. Only tuples that are not
part of a tensor as torch writes it are counted; honest checkpoints have few of them.
"""

from __future__ import annotations

from optimstate.errors import LimitExceededError
from optimstate.formats.pickles.opcodes import LENGTH_PREFIXED, ONE_LINE

__all__ = ["check_sharing"]

_ENOUGH = 1 << 20  # items that any pickle may hash
_PER_BYTE = 64
_FIXED = {
    **dict.fromkeys(b"hqK\x80\x82", 1),
    **dict.fromkeys(b"M\x83", 2),
    **dict.fromkeys(b"jrJ\x84", 4),
    ord("G"): 8,
}
_PUSHES = frozenset(b"N\x88\x89})]\x8fIJKLMGFSTUVXBC\x8a\x8b\x8c\x8d\x8e\x96cP\x82\x83\x84")
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


def check_sharing(data: bytes, loose: list[int]) -> None:
    """Refuse a pickle whose tuples have more items than its size can justify, counted as often as they occur.

    Args:
        data: One pickle, which `check_opcodes` accepts.
        loose: The offsets of the opcodes of tuples that are not part of a plain tensor.

    Raises:
        LimitExceededError: There are too many items.
    """
    most, before = 1, 0
    for at in loose:
        most *= _TUPLES.get(data[at]) or at - before + 1
        before = at
        if most > _ENOUGH:
            _Sizes(data).check()
            return


class _Sizes:
    """Runs the opcodes on the sizes of objects in place of objects: 1 for everything but tuples."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[int] = []
        self.marks: list[int] = []
        self.memo: dict[int, int] = {}
        self.left = _ENOUGH + _PER_BYTE * len(data)

    def check(self) -> None:
        data, at = self.data, 0
        try:
            while at < len(data) and data[at] != ord("."):
                at = self._step(data[at], at)
        except LimitExceededError:
            raise
        except (IndexError, ValueError):
            return  # an opcode takes from an empty stack, which the unpickler will report

    def _spend(self, size: int) -> int:
        self.left -= size
        if self.left < 0:
            limit = _ENOUGH + _PER_BYTE * len(self.data)
            raise LimitExceededError(
                f"tuples that contain one another so often that they have over {limit} items, the limit for a pickle "
                f"of {len(self.data)} bytes"
            )
        return 1

    def _tuple(self, count: int) -> None:
        begin = len(self.stack) - count
        if begin < 0:
            raise IndexError
        size = 1 + sum(self.stack[begin:])
        self.stack[begin:] = [size]
        if size > self.left:
            self._spend(size)

    def _marked(self) -> list[int]:
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def _step(self, opcode: int, at: int) -> int:
        data, stack = self.data, self.stack
        following = _following(data, opcode, at)
        if opcode in _PUSHES:
            stack.append(1)
        elif opcode in b"qrp":
            self.memo[_index(data, opcode, at, following)] = stack[-1]
        elif opcode == 0x94:
            self.memo[len(self.memo)] = stack[-1]
        elif opcode in b"hjg":
            stack.append(self.memo.get(_index(data, opcode, at, following), 1))
        elif opcode == ord("("):
            self.marks.append(len(stack))
        elif opcode == ord("t"):
            self._tuple(len(stack) - self.marks.pop())
        elif opcode in _TUPLES:
            self._tuple(_TUPLES[opcode])
        elif opcode == ord("2"):
            stack.append(stack[-1])
        elif opcode == ord("0"):
            if self.marks and self.marks[-1] == len(stack):
                self.marks.pop()
            else:
                stack.pop()
        elif opcode == ord("1"):
            self._marked()
        elif opcode in b"ldoi\x91":
            items = self._marked()
            self._spend(sum(items))
            stack.append(1)
        elif opcode in b"eu\x90":
            self._spend(sum(self._marked()))
        elif opcode in b"ab":
            self._spend(stack.pop())
        elif opcode == ord("s"):
            self._spend(stack.pop() + stack.pop())
        elif opcode in b"R\x81\x93":
            stack[-2:] = [self._spend(sum(stack[-2:]))]
        elif opcode == 0x92:
            stack[-3:] = [self._spend(sum(stack[-3:]))]
        elif opcode == ord("Q"):
            stack[-1] = self._spend(stack[-1])
        return following


def _following(data: bytes, opcode: int, at: int) -> int:
    """The offset of the next opcode."""
    if opcode in _FIXED:
        return at + 1 + _FIXED[opcode]
    if opcode in LENGTH_PREFIXED:
        width = LENGTH_PREFIXED[opcode]
        return at + 1 + width + (0 if opcode == 0x95 else int.from_bytes(data[at + 1 : at + 1 + width], "little"))
    end = at
    for _ in range(2 if opcode in b"ci" else 1 if opcode in ONE_LINE else 0):
        end = data.index(b"\n", end + 1)
    return end + 1


def _index(data: bytes, opcode: int, at: int, following: int) -> int:
    """The index of the memo entry to which an opcode refers."""
    return int(data[at + 1 : following]) if opcode in b"pg" else int.from_bytes(data[at + 1 : following], "little")
