"""Where in a pickle each class or function is named, read from the opcodes alone."""

from __future__ import annotations

import pickletools
from collections.abc import Iterator
from typing import NamedTuple

from optimstate.errors import CorruptCheckpointError
from optimstate.formats.pickles.opcodes import check_opcodes

__all__ = ["Mention", "mentions"]


class Mention(NamedTuple):
    """A global: what the pickle calls it, and the byte of the opcode that fetches it."""

    module: str
    name: str
    offset: int


_STRING_OPCODES = frozenset(
    {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
)
_MEMO_READS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_MEMO_WRITES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_NEUTRAL = frozenset({"MEMOIZE", "FRAME", "PROTO"}) | _MEMO_WRITES


def mentions(data: bytes) -> Iterator[Mention]:
    """Every global of one pickle, each time it is fetched.

    `STACK_GLOBAL` takes module and name from the stack; they are known here when two strings were pushed last, directly
    or from the memo, as every pickler writes it. Otherwise the mention is `?`.

    Raises:
        CorruptCheckpointError: The bytes are no pickle.
        LimitExceededError: It declares more than it holds.
    """
    check_opcodes(data)
    memo: dict[int, str] = {}
    pushed: list[str | None] = []  # the last values pushed: strings, or None for anything else
    try:
        for opcode, argument, position in pickletools.genops(data):
            name, offset = opcode.name, position or 0
            if name in ("GLOBAL", "INST"):
                module, _, qualname = str(argument).partition(" ")
                yield Mention(module, qualname, offset)
                pushed.append(None)
            elif name == "STACK_GLOBAL":
                owner, member = ([None, None, *pushed])[-2:]
                yield Mention(owner or "?", member or "?", offset)
                pushed = [None]
            elif name in _STRING_OPCODES:
                pushed.append(str(argument))
            elif name in _MEMO_READS:
                pushed.append(memo.get(int(str(argument))))
            elif name in _MEMO_WRITES or name == "MEMOIZE":
                key = len(memo) if name == "MEMOIZE" else int(str(argument))
                memo[key] = pushed[-1] if pushed and pushed[-1] is not None else ""
            elif name not in _NEUTRAL:
                pushed.append(None)
            del pushed[:-2]
    except (ValueError, UnicodeDecodeError, KeyError, IndexError) as error:
        raise CorruptCheckpointError(f"the pickle cannot be scanned: {error}"[:300]) from error
