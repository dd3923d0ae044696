"""Reading the pickle of `.metadata` in the form that torch writes, without an object for each opcode.

An entry of a folder, which may have a million, has some sixty opcodes, and all entries are similar. The first of each
kind is read opcode by opcode (see `opcodes`), all others as a whole (see `entries`). Both accept the same grammar, in
which nothing is called and nothing contains another object twice. Anything else raises `UnfamiliarError`, and is left
to the general unpickler.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from optimstate.formats.dcp.columns import Metadata
from optimstate.formats.dcp.entries import Forms, reader_of
from optimstate.formats.dcp.opcodes import (
    BYTES,
    CHUNK,
    INDEX,
    INFO,
    METADATA,
    PROPERTIES,
    TENSOR,
    Machine,
    Record,
    Table,
    UnfamiliarError,
)

__all__ = ["parse"]


def parse(data: bytes, made: Metadata) -> list[tuple[str, str]]:
    """Fill `made` from a pickle.

    Returns:
        Every class and function that the pickle mentions.

    Raises:
        UnfamiliarError: It is not in the form that torch writes, or damaged; then `made` must not be used.
        CheckpointError: A size or a place is invalid.
    """
    try:
        reader = _Reader(_without_frames(data), made)
        reader.run()
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UnfamiliarError from error
    return list(reader.globals)


def _without_frames(data: bytes) -> bytes:
    """The opcodes of a pickle of protocol 4 or 5."""
    if data[:1] != b"\x80" or data[1] not in (4, 5) or not data.endswith(b"."):
        raise UnfamiliarError
    if data[2] != 0x95:
        return data[2:]
    view, parts, at = memoryview(data), [], 2
    while at < len(data):
        if data[at] != 0x95:
            raise UnfamiliarError  # an object outside of frames, because it is too long for one
        length = int.from_bytes(view[at + 1 : at + 9], "little")
        if at + 9 + length > len(data):
            raise UnfamiliarError
        parts.append(view[at + 9 : at + 9 + length])
        at += 9 + length
    return b"".join(parts)


class _Reader(Machine):
    def __init__(self, data: bytes, made: Metadata) -> None:
        super().__init__(data, made)
        self._forms = Forms()

    def run(self) -> None:
        """Read to the end of the pickle."""
        data = self.data
        while data[self.at] != 0x2E:
            if data[self.at] == 0x28 and self.stack and type(self.stack[-1]) is Table:
                self._fill(self.stack[-1])
            else:
                self.step()
        if self.at + 1 != len(data) or len(self.stack) != 1 or self.stack[0].kind != METADATA:
            raise UnfamiliarError
        state = self.stack[0].state
        if not {"state_dict_metadata", "storage_data"} <= state.keys():
            raise UnfamiliarError

    def _fill(self, table: Table) -> None:
        """A batch of entries: from the mark to SETITEMS."""
        data, stack = self.data, self.stack
        self.at += 1
        base = len(stack)
        while True:
            if table.fast is not None:
                self.at = table.fast(self.at)
            if data[self.at] == 0x75:
                self.at += 1
                return
            while True:  # one entry, up to where a key begins or the batch ends
                self.step()
                if len(stack) == base + 2 and type(stack[-1]) in (Record, tuple) and data[self.at] in b"\x8cXhju":
                    break
                if len(stack) < base:
                    raise UnfamiliarError
            value, key = stack.pop(), stack.pop()
            self.entry(table, key, value)
            table.slow += 1
            if table.slow & (table.slow - 1) == 0:  # rebuilt after 1, 2, 4, 8 ... slow entries, for new classes
                with suppress(KeyError):  # a class or a field has not occurred yet
                    table.fast = reader_of(table.role, self, self._forms)

    def entry(self, table: Table, key: Any, value: Any) -> None:
        """Take an entry of one of the tables."""
        made = self.made
        if table.role == "planner_data":
            if type(key) is not str or not all(type(part) in (str, int) for part in value):
                raise UnfamiliarError
            made.paths[key] = value
        elif table.role == "storage_data":
            if key.kind != INDEX or value.kind != INFO or value.state.get("transform_descriptors"):
                raise UnfamiliarError
            info = value.state
            place = info["relative_path"], info["offset"], info["length"]
            made.place(key.state["fqn"], key.state.get("offset"), place)
        elif type(key) is not str or key in made.numbers:
            raise UnfamiliarError
        elif value.kind == BYTES:
            made.add(key, None)
        elif value.kind == TENSOR:
            state = value.state
            chunks = [chunk.state for chunk in state["chunks"] if chunk.kind == CHUNK]
            boxes = [self._forms.box(chunk["offsets"], chunk["sizes"]) for chunk in chunks]
            if len(boxes) != len(state["chunks"]) or state["properties"].kind != PROPERTIES:
                raise UnfamiliarError
            dtype, layout, requires_grad, *_ = state["properties"].state
            made.add(key, self._forms.form(dtype, layout, requires_grad, state["size"]), boxes)
        else:
            raise UnfamiliarError
