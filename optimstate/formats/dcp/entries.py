"""Reading entries of `.metadata` that are similar to the first of their kind, with one regular expression for each.

The expression is made from the positions of field and class names in the memo after the first entry. A match is read
like the opcodes one by one, with the same effect on the memo. The part that many entries have in common, because a
model has few shapes, is read once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from optimstate.formats.dcp.columns import Box, Form, Metadata
from optimstate.formats.dcp.opcodes import (
    CHUNK,
    INDEX,
    INFO,
    NOTHING,
    PROPERTIES,
    SIZE,
    STRIDED,
    TENSOR,
    Global,
    Machine,
    UnfamiliarError,
    dimensions,
)
from optimstate.tensors.dtypes import DTYPES

__all__ = ["Forms", "reader_of"]

Fast = Callable[[int], int]
"""Reads entries from an offset on, as long as the expression matches; returns the offset of the next one."""

_REF = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_NAME = rb"(?:\x8c(.)([^\x94]*+)\x94|(" + _REF + rb"))"  # the length is compared with the byte before
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}  # opcode -> items of a tuple without a mark
_ALIKE = rb"(?:"  # begins a group that captures nothing


class _Known(dict[bytes, Any]):
    """The parsed parts of entries, up to a limit of memory."""

    room = 1 << 22  # bytes of parts

    def keep(self, raw: bytes, parsed: Any) -> None:
        """Keep a parsed part, if there is room."""
        if self.room > 0:
            self.room -= len(raw)
            self[raw] = parsed


class Forms:
    """Boxes and forms, of which equal ones are one object."""

    def __init__(self) -> None:
        self._boxes: dict[Box, Box] = {}
        self._forms: dict[Form, Form] = {}

    def box(self, offsets: Any, sizes: Any) -> Box:
        """The box of a piece."""
        box = (dimensions(offsets), dimensions(sizes))
        return self._boxes.setdefault(box, box)

    def form(self, dtype: Any, layout: Any, requires_grad: Any, shape: Any) -> Form:
        """The form of a tensor.

        Raises:
            UnfamiliarError: The tensor is not a strided tensor of a known dtype.
        """
        if type(dtype) is not Global or type(layout) is not Global or type(requires_grad) is not bool:
            raise UnfamiliarError
        module, name = dtype.path
        if module != "torch" or name not in DTYPES or layout.path != STRIDED:
            raise UnfamiliarError
        form = Form(name, dimensions(shape), requires_grad)
        return self._forms.setdefault(form, form)


def reader_of(role: str, machine: Machine, forms: Forms) -> Fast:
    """A function that reads the further entries of a table.

    Raises:
        KeyError: A class or a field has not occurred yet.
    """
    entries = _Entries(machine, forms)
    made = {
        "state_dict_metadata": entries.tensors,
        "storage_data": entries.places,
        "planner_data": entries.paths,
    }
    return made[role]()


def _whole(raw: bytes) -> int:
    """The number of one of `_INT`."""
    if raw[0] == 0x8A:
        return int.from_bytes(raw[2:], "little", signed=True)
    return int.from_bytes(raw[1:], "little", signed=raw[0] == 0x4A)


class _Entries:
    def __init__(self, machine: Machine, forms: Forms) -> None:
        self.data = machine.data
        self.made: Metadata = machine.made
        self.memo = machine.memo
        self.globals = machine.globals
        self.forms = forms

    # --- parts of expressions, and how they are read --------------------------------------------------------------

    def constant(self, value: str | tuple[str, str]) -> bytes:
        """An expression for all opcodes that recall the name of a field or a class from the memo."""
        ways = self.memo.ways[value if isinstance(value, str) else self.globals[value]]
        return b"(?:" + b"|".join(map(re.escape, ways)) + b")"

    def size_expression(self) -> bytes:
        numbers = rb"(?:\(?(?:" + _INT + rb")++[\x85-\x87t]\x94|\)|" + _REF + rb")"
        return rb"(?:" + self.constant(SIZE) + numbers + rb"\x85\x94R\x94|" + _REF + rb")"

    def size(self, raw: bytes) -> tuple[int, ...]:
        """A size, written out or recalled; adds to the memo what the opcodes would add."""
        values = self.memo.values
        if len(raw) in (2, 5):
            return dimensions(self.memo.recalled(raw))
        inner = raw[2 if raw[:1] == b"h" else 5 : -4]
        if inner[:1] in b"hj":
            size = dimensions(self.memo.recalled(inner))
            values.extend((NOTHING, size))
            return size
        numbers = tuple(map(_whole, re.findall(_INT, inner, re.DOTALL)))
        if inner == b")":
            values.extend((NOTHING, numbers))
            return numbers
        several = _TUPLES.get(inner[-2])
        if (several or len(numbers)) != len(numbers) or (several is None) != (inner[:1] == b"("):
            raise UnfamiliarError
        size = dimensions(numbers)
        values.extend((size, NOTHING, size))
        return size

    def text(self, length: bytes | None, text: bytes, ref: bytes) -> str:
        """A text, written out or recalled; one that is written out is added to the memo."""
        if length is None:
            found = self.memo.recalled(ref)
            if type(found) is not str:
                raise UnfamiliarError
            return found
        found = self.memo.name(text.decode())
        self.memo.values.append(found)
        return found

    # --- entries --------------------------------------------------------------------------------------------------

    def tensors(self) -> Fast:
        """Those of `state_dict_metadata`: name -> properties, size and chunks."""
        is_, size = self.constant, self.size_expression()

        def chunk(group: bytes) -> bytes:
            begin = is_(CHUNK) + rb"\)\x81\x94}\x94\(" + is_("offsets")
            return begin + group + size + b")" + is_("sizes") + group + size + b")ub"

        def tail(group: bytes) -> bytes:
            begin = is_(TENSOR) + rb"\)\x81\x94}\x94\(" + is_("properties") + is_(PROPERTIES) + rb"\)\x81\x94\("
            begin += group + _REF + b")" + group + _REF + b")" + group + rb"[\x88\x89])" + _REF + rb"[\x88\x89]t\x94b"
            begin += is_("size") + group + size + b")" + is_("chunks")
            return begin + rb"\]\x94(?:" + chunk(_ALIKE) + rb"a|\((?:" + chunk(_ALIKE) + rb")++e)ub"

        match_entry = re.compile(_NAME + b"(" + tail(_ALIKE) + b")", re.DOTALL).match
        match_tail = re.compile(tail(b"("), re.DOTALL).fullmatch
        each_chunk = re.compile(chunk(b"("), re.DOTALL).finditer
        values, recalled = self.memo.values, self.memo.recalled

        def read(raw: bytes) -> tuple[Form, list[Box], Any]:
            """The form and the boxes after a name, and what they add to the memo."""
            match = match_tail(raw)
            assert match is not None
            dtype, layout, grad, size = match.groups()
            before = len(values)
            values.extend((NOTHING,) * 4)  # the tensor, its fields, the properties and theirs
            form = self.forms.form(recalled(dtype), recalled(layout), grad == b"\x88", self.size(size))
            values.append(NOTHING)  # the list of chunks
            boxes = []
            for found in each_chunk(raw, match.end(4)):
                values.extend((NOTHING, NOTHING))  # the chunk and its fields
                offsets, sizes = found.groups()
                boxes.append(self.forms.box(self.size(offsets), self.size(sizes)))
            return form, boxes, values[before:]

        data, numbers, add = self.data, self.made.numbers, self.made.add
        known = _Known()

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, raw = match.groups()
                if length is None:
                    name = recalled(ref)
                elif length[0] != len(text):
                    break
                else:
                    name = text.decode()
                    values.append(name)
                if type(name) is not str or name in numbers:
                    raise UnfamiliarError
                found = known.get(raw)
                if found is not None:
                    values.extend(found[2])
                else:
                    found = read(raw)
                    known.keep(raw, found)
                add(name, found[0], found[1])
                at = match.end()
            return at

        return fast

    def places(self) -> Fast:
        """Those of `storage_data`: name and box -> file, offset and length."""
        is_, size = self.constant, self.size_expression()
        start = is_(INDEX) + rb"\)\x81\x94}\x94\(" + is_("fqn")

        def between(group: bytes) -> bytes:
            begin = is_("index") + group + _INT + b"|N)" + is_("offset") + group + size + b"|N)ub"
            return begin + is_(INFO) + rb"\)\x81\x94}\x94\(" + is_("relative_path")

        entry = start + _NAME + b"(" + between(_ALIKE) + b")" + _NAME + is_("offset") + b"(" + _INT + b")"
        match_entry = re.compile(entry + is_("length") + b"(" + _INT + b")ub", re.DOTALL).match
        match_between = re.compile(between(b"("), re.DOTALL).fullmatch
        values = self.memo.values

        def read(raw: bytes) -> tuple[int, tuple[int, ...] | None, Any]:
            match = match_between(raw)
            assert match is not None
            number, offset = match.groups()
            before = len(values)
            begin = None if offset == b"N" else self.size(offset)
            values.extend((NOTHING, NOTHING))  # the place and its fields
            return 0 if number == b"N" else _whole(number), begin, values[before:]

        data, made, text_of = self.data, self.made, self.text
        numbers, first, boxes, two = made.numbers, made.first, made.boxes, (NOTHING, NOTHING)
        known = _Known()

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, raw, in_length, in_text, in_ref, offset, nbytes = match.groups()
                if length is not None and length[0] != len(text):
                    break
                if in_length is not None and in_length[0] != len(in_text):
                    break
                values.extend(two)  # the index and its fields
                name = text_of(length, text, ref)
                found = known.get(raw)
                if found is not None:
                    values.extend(found[2])
                else:
                    found = read(raw)
                    known.keep(raw, found)
                item = text_of(in_length, in_text, in_ref), _whole(offset), _whole(nbytes)
                number = numbers.get(name)
                if number is not None:
                    row, stop, begin = first[number], first[number + 1], found[1]
                    row += 0 if stop - row == 1 else found[0]
                    box = boxes[row] if row < stop else None
                    if first[number] <= row < stop and (box and box[0]) == begin:
                        made.put(row, name, item)
                    else:
                        made.place(name, begin, item)
                at = match.end()
            return at

        return fast

    def paths(self) -> Fast:
        """Those of `planner_data`: name -> the keys that lead to it."""
        key = rb"(?:\x8c[^\x94]*+\x94|" + _REF + b"|" + _INT + b")"
        match_entry = re.compile(_NAME + rb"(\(?(?:" + key + rb")++[\x85-\x87t])\x94", re.DOTALL).match
        keys_in = re.compile(rb"\x8c(.)([^\x94]*+)\x94|(" + _REF + rb")|(" + _INT + rb")", re.DOTALL).findall
        data, values, text_of, paths = self.data, self.memo.values, self.text, self.made.paths

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, raw = match.groups()
                if length is not None and length[0] != len(text):
                    break
                before = len(values)
                name = text_of(length, text, ref)
                keys: list[str | int] = []
                end = 1 if raw[0] == 0x28 else 0
                for spelled, inner, recalled, whole in keys_in(raw, end):
                    if recalled:
                        part = values[int.from_bytes(recalled[1:], "little")]
                        if type(part) is not str:
                            raise UnfamiliarError
                        keys.append(part)
                        end += len(recalled)
                    elif whole:
                        keys.append(_whole(whole))
                        end += len(whole)
                    elif spelled[0] != len(inner):
                        break
                    else:
                        keys.append(text_of(spelled, inner, b""))
                        end += 3 + len(inner)
                several = _TUPLES.get(raw[-1])
                # Where something between two keys was passed over, they do not add up to the whole.
                if end != len(raw) - 1 or (several or len(keys)) != len(keys) or (several is None) != (raw[0] == 0x28):
                    del values[before:]  # it is read opcode by opcode
                    break
                values.append(NOTHING)
                paths[name] = tuple(keys)
                at = match.end()
            return at

        return fast
