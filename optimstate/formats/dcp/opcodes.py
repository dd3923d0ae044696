"""A machine for the opcodes of `.metadata`, for texts, numbers, tuples and records of torch's classes only.

Nothing is called, and nothing contains another object twice. Anything else raises `UnfamiliarError`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from optimstate.formats.dcp.columns import Metadata
from optimstate.tensors.dtypes import check_sizes

__all__ = [
    "BYTES",
    "CHUNK",
    "INDEX",
    "INFO",
    "METADATA",
    "NOTHING",
    "PROPERTIES",
    "SIZE",
    "STRIDED",
    "TABLES",
    "TENSOR",
    "Global",
    "Machine",
    "Memo",
    "Record",
    "Table",
    "UnfamiliarError",
    "dimensions",
]

_CLASSES = "torch.distributed.checkpoint.metadata"
METADATA = (_CLASSES, "Metadata")
TENSOR = (_CLASSES, "TensorStorageMetadata")
BYTES = (_CLASSES, "BytesStorageMetadata")
PROPERTIES = (_CLASSES, "TensorProperties")
CHUNK = (_CLASSES, "ChunkStorageMetadata")
INDEX = (_CLASSES, "MetadataIndex")
INFO = ("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = ("torch", "Size")
STRIDED = ("torch.serialization._get_layout", "torch.strided")
TABLES = ("state_dict_metadata", "storage_data", "planner_data")
_UNKNOWN = ("", "")  # the kind of a record for an object that was not kept in the memo
NOTHING = object()
"""In the memo, stands for an object that was not kept."""


class UnfamiliarError(Exception):
    """The pickle is not in the form that torch writes."""


class Global:
    """A class, a function, or one of torch's constants; equal ones are one object."""

    __slots__ = ("path",)

    def __init__(self, path: tuple[str, str]) -> None:
        self.path = path


class Record:
    """An instance of one of torch's classes with its state."""

    __slots__ = ("kind", "state")

    def __init__(self, kind: tuple[str, str]) -> None:
        self.kind = kind
        self.state: Any = None


class Table:
    """A dict of the metadata.

    Attributes:
        role: The name of its field, or an empty string.
        fast: Reads entries that are like earlier ones; None before the first one was read.
        slow: The number of entries that were read opcode by opcode.
    """

    __slots__ = ("fast", "role", "slow")

    def __init__(self, role: str) -> None:
        self.role = role
        self.fast: Callable[[int], int] | None = None
        self.slow = 0


class Memo:
    """The memo.

    Args:
        made: The metadata being filled; equal names become its objects.

    Attributes:
        values: The value of each memo entry, or `NOTHING`.
        ways: For each constant up to four opcodes that recall it.
    """

    __slots__ = ("_made", "values", "ways")

    def __init__(self, made: Metadata) -> None:
        self._made = made
        self.values: list[Any] = []
        self.ways: dict[Any, list[bytes]] = {}

    def add(self, value: Any) -> Any:
        """Add a value, which is kept if it is a constant, a text, a size or a record; returns its one object."""
        if type(value) is str:
            value = self.name(value)
        elif type(value) is Record:  # recalled if the plans of ranks share one
            self.values.append(value)
            return value
        elif type(value) is not Global and not (
            type(value) is tuple and all(type(item) in (str, int) for item in value)
        ):
            self.values.append(NOTHING)
            return value
        ways = self.ways.setdefault(value, [])
        if len(ways) < 4:
            index = len(self.values)
            ways.append(b"h%c" % index if index < 256 else b"j" + index.to_bytes(4, "little"))
        self.values.append(value)
        return value

    def name(self, text: str) -> str:
        """The item's name that is equal to a text, or the text itself."""
        number = self._made.numbers.get(text)
        return text if number is None else self._made.order[number]

    def recalled(self, raw: bytes) -> Any:
        """The value that an opcode with its argument recalls.

        Raises:
            UnfamiliarError: It was not kept.
        """
        found = self.values[int.from_bytes(raw[1:], "little")]
        if found is NOTHING:
            raise UnfamiliarError
        return found


class Machine:
    """Runs opcodes one by one.

    Args:
        data: The opcodes.
        made: The metadata to fill.

    Attributes:
        at: The offset of the next opcode.
        stack: The stack.
        memo: The memo.
        globals: Every class and function mentioned.
    """

    def __init__(self, data: bytes, made: Metadata) -> None:
        self.data, self.made, self.at = data, made, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo = Memo(made)
        self.globals: dict[tuple[str, str], Global] = {}
        self._constants: dict[tuple[str, str], Global] = {}

    def entry(self, table: Table, key: Any, value: Any) -> None:
        """Take an entry of one of the tables."""
        raise NotImplementedError

    def step(self) -> None:
        """Run one opcode.

        Raises:
            UnfamiliarError: Torch does not write it here; LookupError, TypeError and ValueError mean the same.
        """
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
        self.stack[-1] = self.memo.add(self.stack[-1])

    def _recall(self, width: int) -> None:
        found = self.memo.values[int.from_bytes(self._take(width), "little")]
        self.stack.append(Record(_UNKNOWN) if found is NOTHING else found)

    def _global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise UnfamiliarError
        self.stack.append(self.globals.setdefault((module, name), Global((module, name))))

    def _instance(self) -> None:
        if self.stack.pop() != () or type(self.stack[-1]) is not Global:
            raise UnfamiliarError
        self.stack[-1] = Record(self.stack[-1].path)

    def _dict(self) -> None:
        stack = self.stack
        outermost = len(stack) > 1 and type(stack[0]) is Record and stack[0].kind == METADATA and self.marks == [2]
        role = stack[-1] if outermost and type(stack[-1]) is str else ""
        stack.append(Table(role) if role in TABLES else {})

    def _call(self) -> None:
        """Make a size or one of two kinds of constants; calls for paths and for the plan of a save are ignored."""
        arguments, called = self.stack.pop(), self.stack.pop()
        if type(called) is not Global or type(arguments) is not tuple:
            raise UnfamiliarError
        if called.path == SIZE and len(arguments) == 1:
            self.stack.append(dimensions(arguments[0]))
        elif called.path in (("torch.serialization", "_get_layout"), (_CLASSES, "_MEM_FORMAT_ENCODING")):
            path = (".".join(called.path), str(*arguments))
            self.stack.append(self._constants.setdefault(path, Global(path)))
        elif called.path[0].partition(".")[0] == "pathlib" or called.path[0] == "torch.distributed.checkpoint.planner":
            self.stack.append(Record(called.path))
        else:
            raise UnfamiliarError

    def _build(self) -> None:
        state = self.stack.pop()
        if type(self.stack[-1]) is not Record or self.stack[-1].state is not None:
            raise UnfamiliarError
        self.stack[-1].state = state

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if type(target) is Table:
            for key, value in zip(items[::2], items[1::2], strict=True):
                self.entry(target, key, value)
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
        items = self._last(count)
        self.stack.append(tuple(items))

    def _last(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        del self.stack[-count:]
        return items


def dimensions(numbers: Any) -> tuple[int, ...]:
    """A size or offset.

    Raises:
        UnfamiliarError: It is not a tuple of natural numbers.
        CheckpointError: No tensor can have it.
    """
    if type(numbers) is not tuple or any(type(n) is not int or n < 0 for n in numbers):
        raise UnfamiliarError
    check_sizes(numbers, len(numbers))
    return numbers


def _pushes(value: Callable[[Machine], Any]) -> Callable[[Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_STEPS: dict[int, Callable[[Machine], None]] = {
    ord("("): lambda machine: machine.marks.append(len(machine.stack)),
    ord(")"): _pushes(lambda _: ()),
    ord("N"): _pushes(lambda _: None),
    0x88: _pushes(lambda _: True),
    0x89: _pushes(lambda _: False),
    ord("K"): _pushes(lambda machine: machine._take(1)[0]),
    ord("M"): _pushes(lambda machine: int.from_bytes(machine._take(2), "little")),
    ord("J"): _pushes(lambda machine: int.from_bytes(machine._take(4), "little", signed=True)),
    0x8A: _pushes(lambda machine: int.from_bytes(machine._take(machine._take(1)[0]), "little", signed=True)),
    0x8C: Machine._short_text,
    ord("X"): Machine._long_text,
    0x94: Machine._memoize,
    ord("h"): lambda machine: machine._recall(1),
    ord("j"): lambda machine: machine._recall(4),
    0x93: Machine._global,
    0x81: Machine._instance,
    ord("}"): Machine._dict,
    ord("]"): _pushes(lambda _: []),
    0x85: lambda machine: machine._tuple(1),
    0x86: lambda machine: machine._tuple(2),
    0x87: lambda machine: machine._tuple(3),
    ord("t"): lambda machine: machine.stack.append(tuple(machine._since_mark())),
    ord("R"): Machine._call,
    ord("b"): Machine._build,
    ord("s"): lambda machine: machine._set_items(machine._last(2)),
    ord("u"): lambda machine: machine._set_items(machine._since_mark()),
    ord("a"): lambda machine: machine._append(machine._last(1)),
    ord("e"): lambda machine: machine._append(machine._since_mark()),
}
