"""Reading entries of `.metadata` that are similar to the first of their kind, with one regular expression for each.

The expression is made from the positions of field and class names in the memo after the first entry. A match is read
like the opcodes one by one, with the same effect on the memo. The part that many entries have in common, because a
model has few shapes, is read once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from optimstate.formats.dcp.columns import Box, Form, Metadata
from optimstate.formats.dcp.opcodes import (
    BYTES,
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

T = TypeVar("T")
Fast = Callable[[int], int]
"""Reads entries from an offset on, as long as the expression matches; returns the offset of the next one."""

_REF = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_NAME = rb"(?:\x8c(.)([^\x94]*+)\x94|(" + _REF + rb"))"  # the length is compared with the byte before
_TUPLES = {1: b"\x85", 2: b"\x86", 3: b"\x87"}  # items of a tuple without a mark -> opcode
_ALIKE = rb"(?:"  # begins a group that captures nothing


class _Known(dict[bytes, T]):
    """Parsed parts of entries. When they exceed the limit of memory, all are forgotten."""

    _ROOM = 1 << 22  # bytes, about

    def __init__(self) -> None:
        super().__init__()
        self._room = self._ROOM

    def keep(self, raw: bytes, parsed: T) -> T:
        """Keep a parsed part, and return it."""
        self._room -= len(raw) + 64
        if self._room < 0:
            self.clear()
            self._room = self._ROOM
        self[raw] = parsed
        return parsed


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
        "state_dict_metadata": entries.items,
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

    def is_known(self, path: tuple[str, str]) -> bool:
        """Whether a class has occurred before."""
        return self.globals.get(path) in self.memo.ways

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
        if inner[-2:-1] != (b"t" if inner[:1] == b"(" else _TUPLES.get(len(numbers))):
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

    def items(self) -> Fast:
        """Those of `state_dict_metadata`: name -> properties, size and chunks of a tensor, or nothing for an object.

        The expression matches only entries of classes that have occurred before.
        """
        kinds = [self.tensor_expression(_ALIKE)] if self.is_known(TENSOR) else []
        kinds += [self.constant(BYTES) + rb"\)\x81\x94"] if self.is_known(BYTES) else []
        if not kinds:
            raise KeyError(TENSOR)
        match_entry = re.compile(_NAME + b"(" + b"|".join(kinds) + b")", re.DOTALL).match
        values, recalled, read, known = self.memo.values, self.memo.recalled, self.reader_of_items(), _Known[Any]()
        data, made = self.data, self.made

        def fast(at: int) -> int:
            names: list[str] = []
            entries: list[tuple[Form | None, Sequence[Box | None]]] = []
            while match := match_entry(data, at):
                length, text, ref, raw = match.groups()
                if length is None:
                    name = recalled(ref)
                elif length[0] != len(text):
                    break
                else:
                    name = text.decode()
                    values.append(name)
                if type(name) is not str:
                    raise UnfamiliarError
                found = known.get(raw)
                if found is None:
                    found = known.keep(raw, read(raw))
                else:
                    values.extend(found[1])
                names.append(name)
                entries.append(found[0])
                at = match.end()
            made.extend(names, entries)
            if len(made.numbers) != len(made.order):
                raise UnfamiliarError  # two of one name
            return at

        return fast

    def chunk_expression(self, group: bytes) -> bytes:
        is_, size = self.constant, self.size_expression()
        begin = is_(CHUNK) + rb"\)\x81\x94}\x94\(" + is_("offsets")
        return begin + group + size + b")" + is_("sizes") + group + size + b")ub"

    def tensor_expression(self, group: bytes) -> bytes:
        """An expression for what follows the name of a tensor: properties, size and chunks."""
        is_, size, chunk = self.constant, self.size_expression(), self.chunk_expression(_ALIKE)
        begin = is_(TENSOR) + rb"\)\x81\x94}\x94\(" + is_("properties") + is_(PROPERTIES) + rb"\)\x81\x94\("
        begin += group + _REF + b")" + group + _REF + b")" + group + rb"[\x88\x89])" + _REF + rb"[\x88\x89]"
        # torch 2.15 added the strides, which say nothing of how the bytes lie.
        begin += rb"(?:N|\)|" + _REF + b"|" + group + rb"\(?(?:" + _INT + rb")++[\x85-\x87t]\x94))?t\x94b"
        begin += is_("size") + group + size + b")" + is_("chunks")
        return begin + rb"\]\x94(?:" + chunk + rb"a|\((?:" + chunk + rb")++e)ub"

    def reader_of_items(self) -> Callable[[bytes], tuple[Any, Any]]:
        """A function that reads what follows a name: returns the form and the boxes, and what they add to the memo."""
        values, recalled = self.memo.values, self.memo.recalled
        if not self.is_known(TENSOR):
            match_tensor = each_chunk = None
        else:
            match_tensor = re.compile(self.tensor_expression(b"("), re.DOTALL).fullmatch
            each_chunk = re.compile(self.chunk_expression(b"("), re.DOTALL).finditer

        def read(raw: bytes) -> tuple[Any, Any]:
            match = match_tensor(raw) if match_tensor is not None else None
            before = len(values)
            if match is None or each_chunk is None:
                values.append(NOTHING)
                return (None, (None,)), (NOTHING,)
            dtype, layout, grad, strides, size = match.groups()
            values.extend(
                (NOTHING,) * (4 if strides is None else 5)
            )  # the tensor, its fields, the properties and theirs
            form = self.forms.form(recalled(dtype), recalled(layout), grad == b"\x88", self.size(size))
            values.append(NOTHING)  # the list of chunks
            boxes = []
            for found in each_chunk(raw, match.end(5)):
                values.extend((NOTHING, NOTHING))  # the chunk and its fields
                offsets, sizes = found.groups()
                boxes.append(self.forms.box(self.size(offsets), self.size(sizes)))
            return (form, tuple(dict.fromkeys(boxes))), values[before:]

        return read

    def places(self) -> Fast:
        """Those of `storage_data`: name and box -> file, offset and length."""
        is_, size = self.constant, self.size_expression()
        start = is_(INDEX) + rb"\)\x81\x94}\x94\(" + is_("fqn")

        def between(group: bytes, file: bytes) -> bytes:
            begin = is_("index") + group + _INT + b"|N)(?:" + is_("offset") + group + size + b"|N))?ub"
            return begin + is_(INFO) + rb"\)\x81\x94}\x94\(" + is_("relative_path") + file

        some_file = rb"(?:\x8c.[^\x94]*+\x94|" + _REF + b")"
        entry = start + _NAME + b"(" + between(_ALIKE, some_file) + b")" + is_("offset") + b"(" + _INT + b")"
        match_entry = re.compile(entry + is_("length") + b"(" + _INT + b")ub", re.DOTALL).match
        match_between = re.compile(between(b"(", _NAME), re.DOTALL).fullmatch
        values, made, text_of = self.memo.values, self.made, self.text

        def read(raw: bytes) -> tuple[int, tuple[int, ...] | None, int, Any] | None:
            """The number and the offsets of the piece, the number of its file, and what they add to the memo."""
            match = match_between(raw)
            assert match is not None
            number, offset, length, text, ref = match.groups()
            if length is not None and length[0] != len(text):
                return None
            before = len(values)
            begin = None if offset in (None, b"N") else self.size(offset)
            values.extend((NOTHING, NOTHING))  # the place and its fields
            file = made.number_of_file(text_of(length, text, ref))
            return 0 if number == b"N" else max(_whole(number), 0), begin, file, values[before:]

        data, numbers, first, boxes = self.data, made.numbers, made.first, made.boxes
        files, offsets, lengths = made.file, made.offset, made.length
        known, numerals, two = _Known[Any](), _Known[int](), (NOTHING, NOTHING)
        number_of = int.from_bytes

        def fast(at: int) -> int:
            made.allocate()
            while match := match_entry(data, at):
                length, text, ref, raw, in_file, in_all = match.groups()
                if length is not None and length[0] != len(text):
                    break
                before = len(values)
                values.extend(two)  # the index and its fields
                name = text_of(length, text, b"") if ref is None else values[number_of(ref[1:], "little")]
                found = known.get(raw)
                if found is not None:
                    values.extend(found[3])
                elif (found := known.keep(raw, read(raw))) is None:
                    del values[before:]  # it is read opcode by opcode
                    break
                offset, nbytes = _whole(in_file), numerals.get(in_all)
                if nbytes is None:
                    nbytes = numerals.keep(in_all, _whole(in_all))
                if type(name) is not str or offset < 0 or nbytes < 0 or offset + nbytes >> 63:
                    raise UnfamiliarError
                number = numbers.get(name)
                if number is not None:
                    piece, begin, file, _ = found
                    row, stop = first[number], first[number + 1]
                    if stop - row > 1:
                        row += piece
                    box = boxes[row] if row < stop else None
                    if row < stop and (box and box[0]) == begin:
                        files[row], offsets[row], lengths[row] = file, offset, nbytes
                    else:
                        made.place(name, begin, (made.files[file], offset, nbytes))
                at = match.end()
            return at

        return fast

    def paths(self) -> Fast:
        """Those of `planner_data`: name -> the keys that lead to it; those before the last two are mostly the same."""
        key = rb"(?:\x8c.[^\x94]*+\x94|" + _REF + b"|" + _INT + b")"
        entry = _NAME + rb"(\(?(?:" + key + b")*?)(" + key + b")?(" + key + rb")([\x85-\x87t])\x94"
        match_entry, keys_in = re.compile(entry, re.DOTALL).match, re.compile(key, re.DOTALL).findall
        data, values, text_of, paths = self.data, self.memo.values, self.text, self.made.paths
        known, begins = _Known[str](), _Known[list[str | int]]()

        def read(raw: bytes) -> str | int | None:
            """A key; None if its length is wrong."""
            if raw[0] == 0x8C:
                return text_of(raw[1:2], raw[2:-1], b"") if raw[1] == len(raw) - 3 else None
            if raw[0] not in b"hj":
                return _whole(raw)
            said = values[int.from_bytes(raw[1:], "little")]
            if type(said) is not str:
                raise UnfamiliarError
            return known.keep(raw, said)

        def read_begin(raw: bytes) -> list[str | int] | None:
            """All keys but the last two; None if there is something else between them."""
            spelled = keys_in(raw, 1 if raw[:1] == b"(" else 0)
            keys = [key for key in map(read, spelled) if key is not None]
            if len(keys) < len(spelled) or sum(map(len, spelled)) != len(raw) - (raw[:1] == b"("):
                return None
            return keys if b"\x8c" in raw else begins.keep(raw, keys)

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, begin, middle, last, end = match.groups()
                if length is not None and length[0] != len(text):
                    break
                before = len(values)
                name = text_of(length, text, ref)
                keys = begins.get(begin)
                if keys is None:
                    keys = read_begin(begin)
                parent = "" if middle is None else known.get(middle) or read(middle)
                key = known.get(last) or read(last)
                if keys is None or parent is None or key is None:
                    del values[before:]  # it is read opcode by opcode
                    break
                path = (key,) if middle is None else (*keys, parent, key)
                if end != (b"t" if begin[:1] == b"(" else _TUPLES.get(len(path))):
                    raise UnfamiliarError
                values.append(NOTHING)
                paths[name] = path
                at = match.end()
            return at

        return fast
