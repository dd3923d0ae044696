"""Reads the pickle of `.metadata` as torch writes it, without making an object for each of its opcodes.

An entry of a million-item folder is some sixty opcodes, and all entries are alike. The first of each kind is read
opcode by opcode by a machine that knows only texts, numbers, tuples and records of torch's classes; from where it has
put the names of fields and classes in the memo, one expression is made that matches every further entry whole. Both
read the same grammar, in which nothing is called and nothing holds another thing twice. Whatever does not fit is
`UnfamiliarError`, and the unpickler of all pickles judges it.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from optimstate.formats.dcp.columns import Box, Form, Metadata
from optimstate.tensors.dtypes import DTYPES, check_sizes

__all__ = ["UnfamiliarError", "parse"]

_CLASSES = "torch.distributed.checkpoint.metadata"
_METADATA = (_CLASSES, "Metadata")
_TENSOR = (_CLASSES, "TensorStorageMetadata")
_BYTES = (_CLASSES, "BytesStorageMetadata")
_PROPERTIES = (_CLASSES, "TensorProperties")
_CHUNK = (_CLASSES, "ChunkStorageMetadata")
_INDEX = (_CLASSES, "MetadataIndex")
_INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_SIZE = ("torch", "Size")
_STRIDED = ("torch.serialization._get_layout", "torch.strided")
_UNKNOWN = ("", "")  # what was not kept in the memo: nothing that is read
_NOTHING = -1  # in the memo: what is never recalled

_REF = rb"(?:h.|j.{4})"
_INT = rb"(?:K.|M..|J.{4}|\x8a(?:\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8}))"
_NAME = rb"(?:\x8c(.)([^\x94]*+)\x94|(" + _REF + rb"))"  # the length is compared with the byte before


class UnfamiliarError(Exception):
    """The pickle is not of the form that is read here."""


class _Global:
    """A class or function that is mentioned, or one of torch's constants; each is one object."""

    __slots__ = ("path",)

    def __init__(self, path: tuple[str, str]) -> None:
        self.path = path


class _Record:
    """An instance of one of torch's classes with its state."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: tuple[str, str]) -> None:
        self.kind = kind
        self.state: Any = None


class _Table:
    """A dict of the metadata whose entries are read one by one."""

    __slots__ = ("fast", "role")

    def __init__(self, role: str) -> None:
        self.role = role
        self.fast: Callable[[int], int] | None = None


def parse(data: bytes, made: Metadata) -> list[tuple[str, str]]:
    """Fill `made` from a pickle.

    Returns:
        Every class and function that is mentioned.

    Raises:
        UnfamiliarError: It is not as torch writes it, or damaged; `made` is of no use then.
        CheckpointError: A size or a place is not one.
    """
    try:
        machine = _Machine(_without_frames(data), made)
        machine.run()
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise UnfamiliarError from error
    return list(machine.globals)


def _without_frames(data: bytes) -> bytes:
    """The opcodes of a pickle of protocol 4 or 5."""
    if data[:1] != b"\x80" or data[1] not in (4, 5) or not data.endswith(b"."):
        raise UnfamiliarError
    if data[2] != 0x95:
        return data[2:]
    view, parts, at = memoryview(data), [], 2
    while at < len(data):
        if data[at] != 0x95:
            raise UnfamiliarError  # something too long for a frame
        length = int.from_bytes(view[at + 1 : at + 9], "little")
        if at + 9 + length > len(data):
            raise UnfamiliarError
        parts.append(view[at + 9 : at + 9 + length])
        at += 9 + length
    return b"".join(parts)


def _whole(raw: bytes) -> int:
    """The number of one of `_INT`."""
    if raw[0] == 0x8A:
        return int.from_bytes(raw[2:], "little", signed=True)
    return int.from_bytes(raw[1:], "little", signed=raw[0] == 0x4A)


def _recall(index: int) -> bytes:
    return b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little")


class _Machine:
    """Runs the opcodes; see the module.

    Attributes:
        memo: Of each memo entry the place of its value in `values`, or `_NOTHING`.
        places: Of each constant how the memo entries that hold it are recalled.
        globals: What is mentioned.
    """

    def __init__(self, data: bytes, made: Metadata) -> None:
        self.data, self.made, self.at = data, made, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo = array("i")
        self.values: list[Any] = []
        self.places: dict[Any, list[bytes]] = {}
        self.globals: dict[tuple[str, str], _Global] = {}
        self._constants: dict[tuple[str, str], _Global] = {}
        self._sizes: dict[bytes, tuple[int, tuple[int, ...]]] = {}
        self._numbers: dict[tuple[int, ...], int] = {}
        self._boxes: dict[Box, Box] = {}
        self._forms: dict[Form, Form] = {}

    def run(self) -> None:
        """To the end of the pickle."""
        data = self.data
        while data[self.at] != 0x2E:
            if data[self.at] == 0x28 and self.stack and type(self.stack[-1]) is _Table:
                self._fill(self.stack[-1])
            else:
                self.step()
        if self.at + 1 != len(data) or len(self.stack) != 1 or self.stack[0].kind != _METADATA:
            raise UnfamiliarError
        state = self.stack[0].state
        if not {"state_dict_metadata", "storage_data"} <= state.keys():
            raise UnfamiliarError

    # --- entries --------------------------------------------------------------------------------------------------

    def _fill(self, table: _Table) -> None:
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
                if len(stack) == base + 2 and type(stack[-1]) in (_Record, tuple) and data[self.at] in b"\x8cXhju":
                    break
                if len(stack) < base:
                    raise UnfamiliarError
            value, key = stack.pop(), stack.pop()
            self._entry(table, key, value)
            if table.fast is None:
                with suppress(KeyError):  # a class or a field has not been met yet
                    table.fast = getattr(self, f"_{table.role}")()

    def _entry(self, table: _Table, key: Any, value: Any) -> None:
        made = self.made
        if table.role == "planner_data":
            if type(key) is not str or not all(type(part) in (str, int) for part in value):
                raise UnfamiliarError
            made.paths[key] = value
        elif table.role == "storage_data":
            if key.kind != _INDEX or value.kind != _INFO or value.state.get("transform_descriptors"):
                raise UnfamiliarError
            info = value.state
            place = info["relative_path"], info["offset"], info["length"]
            made.place(key.state["fqn"], key.state.get("offset"), place)
        elif type(key) is not str or key in made.numbers:
            raise UnfamiliarError
        elif value.kind == _BYTES:
            made.add(key, None)
        elif value.kind == _TENSOR:
            state = value.state
            chunks = [chunk.state for chunk in state["chunks"] if chunk.kind == _CHUNK]
            boxes = [self._box(chunk["offsets"], chunk["sizes"]) for chunk in chunks]
            if len(boxes) != len(state["chunks"]) or state["properties"].kind != _PROPERTIES:
                raise UnfamiliarError
            made.add(key, self._form(state["properties"].state, state["size"]), boxes)
        else:
            raise UnfamiliarError

    def _box(self, offsets: Any, sizes: Any) -> Box:
        box = (_dimensions(offsets), _dimensions(sizes))
        return self._boxes.setdefault(box, box)

    def _form(self, properties: Any, shape: Any) -> Form:
        dtype, layout, requires_grad, *_ = properties
        if type(dtype) is not _Global or type(layout) is not _Global or type(requires_grad) is not bool:
            raise UnfamiliarError
        module, name = dtype.path
        if module != "torch" or name not in DTYPES or layout.path != _STRIDED:
            raise UnfamiliarError
        form = Form(name, _dimensions(shape), requires_grad)
        return self._forms.setdefault(form, form)

    # --- entries that are like the first --------------------------------------------------------------------------

    def _constant(self, value: str | tuple[str, str]) -> bytes:
        """An expression for all ways to recall the name of a field, or a class."""
        ways = self.places[value if isinstance(value, str) else self.globals[value]]
        return b"(?:" + b"|".join(map(re.escape, ways)) + b")"

    def _size_expression(self) -> bytes:
        numbers = rb"(?:\(?(?:" + _INT + rb")++[\x85-\x87t]\x94|\)|" + _REF + rb")"
        return rb"(?:" + self._constant(_SIZE) + numbers + rb"\x85\x94R\x94|" + _REF + rb")"

    def _size(self, raw: bytes) -> tuple[int, ...]:
        """A size that is spelled out or recalled; what reading it puts into the memo is there afterwards."""
        found = self._sizes.get(raw)
        if found is None:
            if len(raw) in (2, 5):
                return _dimensions(self.values[self._recalled(raw)])
            inner = raw[2 if raw[:1] == b"h" else 5 : -4]
            if inner[:1] in b"hj":
                at = self._recalled(inner)
                self.memo.extend((_NOTHING, at))
                return _dimensions(self.values[at])
            numbers = tuple(map(_whole, re.findall(_INT, inner, re.DOTALL)))
            if inner != b")":
                several = {0x85: 1, 0x86: 2, 0x87: 3}.get(inner[-2])
                if (several or len(numbers)) != len(numbers) or (several is None) != (inner[:1] == b"("):
                    raise UnfamiliarError
            at = self._value_of(_dimensions(numbers))
            found = self._sizes[raw] = at, ((_NOTHING, at) if inner == b")" else (at, _NOTHING, at))
        self.memo.extend(found[1])
        size: tuple[int, ...] = self.values[found[0]]
        return size

    def _value_of(self, numbers: tuple[int, ...]) -> int:
        at = self._numbers.setdefault(numbers, len(self.values))
        if at == len(self.values):
            self.values.append(numbers)
        return at

    def _recalled(self, raw: bytes) -> int:
        at = self.memo[int.from_bytes(raw[1:], "little")]
        if at < 0:
            raise UnfamiliarError
        return at

    def _text(self, length: bytes | None, text: bytes, ref: bytes) -> str:
        """A text that is spelled out or recalled; of one that is spelled out the memo has an entry more."""
        if length is None:
            found = self.values[self._recalled(ref)]
        else:
            found = text.decode()
            number = self.made.numbers.get(found)
            if number is not None:
                found = self.made.order[number]  # the same object again
            self.memo.append(len(self.values))
            self.values.append(found)
        if type(found) is not str:
            raise UnfamiliarError
        return found

    def _state_dict_metadata(self) -> Callable[[int], int]:
        is_ = self._constant
        size = self._size_expression()
        chunk = is_(_CHUNK) + rb"\)\x81\x94}\x94\(" + is_("offsets") + b"(" + size + b")" + is_("sizes")
        chunk += b"(" + size + b")ub"
        several = chunk.replace(b"(" + size + b")", size)
        properties = _REF + _REF + rb"[\x88\x89]" + _REF + rb"[\x88\x89]t\x94b"
        entry = _NAME + is_(_TENSOR) + rb"\)\x81\x94}\x94\(" + is_("properties") + is_(_PROPERTIES)
        entry += rb"\)\x81\x94\((" + properties + b")" + is_("size") + b"(" + size + b")" + is_("chunks")
        entry += rb"\]\x94(?:" + chunk + rb"a|\(((?:" + several + rb")++)e)ub"
        match_entry = re.compile(entry, re.DOTALL).match
        each_chunk = re.compile(chunk, re.DOTALL).finditer
        kinds: dict[bytes, tuple[str, bool]] = {}
        data, made, memo, size_of = self.data, self.made, self.memo, self._size
        before_size = (_NOTHING,) * 4  # the tensor, its fields, the properties and theirs

        def kind(raw: bytes, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], bool]:
            if raw not in kinds:
                dtype, layout, grad = re.findall(_REF + rb"|[\x88\x89]", raw, re.DOTALL)[:3]
                recalled = (self.values[self._recalled(dtype)], self.values[self._recalled(layout)], grad == b"\x88")
                form = self._form(recalled, ())
                kinds[raw] = form.dtype, form.requires_grad
            dtype, requires_grad = kinds[raw]
            return dtype, shape, requires_grad

        def box(offsets: bytes, sizes: bytes) -> Box:
            memo.extend((_NOTHING, _NOTHING))  # the chunk and its fields
            return self._box(size_of(offsets), size_of(sizes))

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, props, size, offsets, sizes, many = match.groups()
                if length is not None and length[0] != len(text):
                    break
                name = self._text(length, text, ref)
                if name in made.numbers:
                    raise UnfamiliarError
                memo.extend(before_size)
                form = Form(*kind(props, size_of(size)))
                form = self._forms.setdefault(form, form)
                memo.append(_NOTHING)  # the list of chunks
                if many is None:
                    made.add(name, form, (box(offsets, sizes),))
                else:
                    made.add(name, form, [box(*found.groups()) for found in each_chunk(many)])
                at = match.end()
            return at

        return fast

    def _storage_data(self) -> Callable[[int], int]:
        is_ = self._constant
        size = self._size_expression()
        key = is_(_INDEX) + rb"\)\x81\x94}\x94\(" + is_("fqn") + _NAME + is_("index") + b"(" + _INT + b"|N)"
        key += is_("offset") + b"(" + size + b"|N)ub"
        entry = key + is_(_INFO) + rb"\)\x81\x94}\x94\(" + is_("relative_path") + _NAME + is_("offset")
        entry += b"(" + _INT + b")" + is_("length") + b"(" + _INT + b")ub"
        match_entry = re.compile(entry, re.DOTALL).match
        data, made, memo, size_of = self.data, self.made, self.memo, self._size
        first, boxes, two = made.first, made.boxes, (_NOTHING, _NOTHING)

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, number, start, in_length, in_text, in_ref, offset, nbytes = match.groups()
                if length is not None and length[0] != len(text):
                    break
                if in_length is not None and in_length[0] != len(in_text):
                    break
                memo.extend(two)  # the index and its fields
                name = self._text(length, text, ref)
                begin = None if start == b"N" else size_of(start)
                memo.extend(two)  # the place and its fields
                item = self._text(in_length, in_text, in_ref), _whole(offset), _whole(nbytes)
                known = made.numbers.get(name)
                if known is not None:
                    row, stop = first[known], first[known + 1]
                    row += 0 if stop - row == 1 or number == b"N" else _whole(number)
                    box = boxes[row] if row < stop else None
                    if row < stop and (box and box[0]) == begin:
                        made.put(row, name, item)
                    else:
                        made.place(name, begin, item)
                at = match.end()
            return at

        return fast

    def _planner_data(self) -> Callable[[int], int]:
        key = rb"(?:\x8c[^\x94]*+\x94|" + _REF + b"|" + _INT + b")"
        match_entry = re.compile(_NAME + rb"(\(?(?:" + key + rb")++[\x85-\x87t])\x94", re.DOTALL).match
        each_key = re.compile(rb"\x8c(.)([^\x94]*+)\x94|(" + _REF + rb")|(" + _INT + rb")", re.DOTALL).finditer
        data, memo, paths = self.data, self.memo, self.made.paths

        def fast(at: int) -> int:
            while match := match_entry(data, at):
                length, text, ref, raw = match.groups()
                if length is not None and length[0] != len(text):
                    break
                before = len(memo)
                name = self._text(length, text, ref)
                keys: list[str | int] = []
                end = 1 if raw[0] == 0x28 else 0
                for found in each_key(raw, end):
                    if found.start() != end:
                        break
                    spelled, inner, recalled, whole = found.groups()
                    if spelled is not None and spelled[0] != len(inner):
                        break
                    keys.append(_whole(whole) if whole else self._text(spelled, inner, recalled))
                    end = found.end()
                several = {0x85: 1, 0x86: 2, 0x87: 3}.get(raw[-1])
                if end != len(raw) - 1 or (several or len(keys)) != len(keys) or (several is None) != (raw[0] == 0x28):
                    del memo[before:]  # it is read opcode by opcode
                    break
                memo.append(_NOTHING)
                paths[name] = tuple(keys)
                at = match.end()
            return at

        return fast

    # --- opcodes --------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One opcode."""
        opcode = self.data[self.at]
        self.at += 1
        _STEPS[opcode](self)

    def _take(self, length: int) -> bytes:
        found = self.data[self.at : self.at + length]
        if len(found) != length:
            raise UnfamiliarError
        self.at += length
        return found

    def _since_mark(self) -> list[Any]:
        begin = self.marks.pop()
        found = self.stack[begin:]
        del self.stack[begin:]
        return found

    def _short_text(self) -> None:
        self.stack.append(self._take(self._take(1)[0]).decode())

    def _long_text(self) -> None:
        self.stack.append(self._take(int.from_bytes(self._take(4), "little")).decode())

    def _memoize(self) -> None:
        value = self.stack[-1]
        if type(value) is _Record:  # recalled where ranks' plans share one
            self.memo.append(len(self.values))
            self.values.append(value)
        elif type(value) in (str, _Global) or (
            type(value) is tuple and all(type(item) in (str, int) for item in value)
        ):
            if type(value) is str and value in self.made.numbers:
                value = self.stack[-1] = self.made.order[self.made.numbers[value]]
            ways = self.places.setdefault(value, [])
            if len(ways) < 4:
                ways.append(_recall(len(self.memo)))
            self.memo.append(len(self.values))
            self.values.append(value)
        else:
            self.memo.append(_NOTHING)

    def _recall(self, width: int) -> None:
        at = self.memo[int.from_bytes(self._take(width), "little")]
        self.stack.append(_Record(_UNKNOWN) if at < 0 else self.values[at])

    def _global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise UnfamiliarError
        self.stack.append(self.globals.setdefault((module, name), _Global((module, name))))

    def _instance(self) -> None:
        if self.stack.pop() != () or type(self.stack[-1]) is not _Global:
            raise UnfamiliarError
        self.stack[-1] = _Record(self.stack[-1].path)

    def _dict(self) -> None:
        stack = self.stack
        outermost = len(stack) > 1 and type(stack[0]) is _Record and stack[0].kind == _METADATA and self.marks == [2]
        role = stack[-1] if outermost and type(stack[-1]) is str else ""
        stack.append(_Table(role) if role in ("state_dict_metadata", "storage_data", "planner_data") else {})

    def _call(self) -> None:
        """Sizes and two kinds of constants; paths, and the plan of a save, are not looked at."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not _Global or type(arguments) is not tuple:
            raise UnfamiliarError
        if called.path == _SIZE and len(arguments) == 1:
            self.stack.append(_dimensions(arguments[0]))
        elif called.path in (("torch.serialization", "_get_layout"), (_CLASSES, "_MEM_FORMAT_ENCODING")):
            path = (".".join(called.path), str(*arguments))
            self.stack.append(self._constants.setdefault(path, _Global(path)))
        elif called.path[0].partition(".")[0] == "pathlib" or called.path[0] == "torch.distributed.checkpoint.planner":
            self.stack.append(_Record(called.path))
        else:
            raise UnfamiliarError

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not _Record or self.stack[-1].state is not None:
            raise UnfamiliarError
        self.stack[-1].state = state

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if type(target) is _Table:
            for key, value in zip(items[::2], items[1::2], strict=True):
                self._entry(target, key, value)
        else:
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is not str or key in target:
                    raise UnfamiliarError
                target[key] = value

    def _append(self, items: Sequence[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise UnfamiliarError
        self.stack[-1].extend(items)

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise UnfamiliarError
        items = self.stack[-count:]
        del self.stack[-count:]
        self.stack.append(tuple(items))

    def _last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items


def _dimensions(numbers: Any) -> tuple[int, ...]:
    """A size or offset.

    Raises:
        CheckpointError: No tensor has it.
    """
    if type(numbers) is not tuple or any(type(n) is not int or n < 0 for n in numbers):
        raise UnfamiliarError
    check_sizes(numbers, len(numbers))
    return numbers


def _pushes(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord(")"): _pushes(lambda _: ()),
    ord("N"): _pushes(lambda _: None),
    0x88: _pushes(lambda _: True),
    0x89: _pushes(lambda _: False),
    ord("K"): _pushes(lambda machine: machine._take(1)[0]),
    ord("M"): _pushes(lambda machine: int.from_bytes(machine._take(2), "little")),
    ord("J"): _pushes(lambda machine: int.from_bytes(machine._take(4), "little", signed=True)),
    0x8A: _pushes(lambda machine: int.from_bytes(machine._take(machine._take(1)[0]), "little", signed=True)),
    0x8C: _Machine._short_text,
    ord("X"): _Machine._long_text,
    0x94: _Machine._memoize,
    ord("h"): lambda machine: machine._recall(1),
    ord("j"): lambda machine: machine._recall(4),
    0x93: _Machine._global,
    0x81: _Machine._instance,
    ord("}"): _Machine._dict,
    ord("]"): _pushes(lambda _: []),
    0x85: lambda machine: machine._tuple(1),
    0x86: lambda machine: machine._tuple(2),
    0x87: lambda machine: machine._tuple(3),
    ord("t"): lambda machine: machine.stack.append(tuple(machine._since_mark())),
    ord("R"): _Machine._call,
    ord("b"): _Machine._build,
    ord("s"): lambda machine: machine._set_items(machine._last(2)),
    ord("u"): lambda machine: machine._set_items(machine._since_mark()),
    ord("a"): lambda machine: machine._append(machine._last(1)),
    ord("e"): lambda machine: machine._append(machine._since_mark()),
}
