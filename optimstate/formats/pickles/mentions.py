"""Finding the classes and functions that a pickle would import, with an unpickler that gets stand-ins for all of them.

CPython's own unpickler executes the opcodes, so memo, marks, frames and texts have exactly the meaning that they have
for a loader of the file. Pickles have no conditions, so the same opcodes follow whatever a call returns.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.formats.pickles.opcodes import OpcodeError, check_opcodes, find_end
from optimstate.formats.pickles.sharing import check_sharing
from optimstate.io.streams import Source
from optimstate.record import Record
from optimstate.tree import no_garbage_collection

__all__ = ["Mention", "Mentions", "mentions", "mentions_in_a_row"]


class Mention(NamedTuple):
    """A class or function.

    Attributes:
        module: The module as written in the pickle.
        name: The name as written in the pickle.
        offset: The byte of the pickle at which the name first occurs.
        times: How often it is looked up.
        called: Whether it is called; if not, it is only mentioned, or instances are made without a call.
    """

    module: str
    name: str
    offset: int
    times: int
    called: bool


class Mentions(Record):
    """The classes and functions that one pickle names.

    Attributes:
        found: In order of first mention.
        embedded: Pickles inside it that loading it would load too.
        problem: Why it cannot be followed to its end; empty if it can.
    """

    found: tuple[Mention, ...]
    embedded: tuple[bytes, ...]
    problem: str


class _Sink:
    """Stands for the result of any call: accepts everything that is put into it, and keeps nothing."""

    def __call__(self, *_: Any, **__: Any) -> _Sink:
        return self

    def _take(self, *_: Any) -> None:
        pass

    __setstate__ = __setitem__ = append = extend = add = _take


_SINK = _Sink()


class _Name(type):
    """A stand-in for a class or function; it is a class, because pickles make instances without a call."""

    uses: _Uses
    path: tuple[str, str]

    def __call__(cls, *arguments: Any) -> Any:
        return cls.uses.call(cls.path, arguments)

    def __setstate__(cls, _: Any) -> None:
        cls.uses.problems.append(f"gives attributes to {'.'.join(cls.path)} itself")

    def _alter(cls, *_: Any) -> None:
        cls.uses.problems.append(f"alters {'.'.join(cls.path)} itself")

    __setitem__ = append = extend = add = _alter


class _Uses:
    """Records what is looked up and called."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, str], int] = {}
        self.called: set[tuple[str, str]] = set()
        self.embedded: list[bytes] = []
        self.problems: list[str] = []
        self._stand_ins: dict[tuple[str, str], _Name] = {}

    def fetch(self, module: str, name: str) -> _Name:
        """The stand-in for a global; counts the look-up."""
        path = (module, name)
        self.times[path] = self.times.get(path, 0) + 1
        if path not in self._stand_ins:
            made = _Name("Name", (), {"__new__": lambda _, *__, **___: _SINK})
            made.uses, made.path = self, path
            self._stand_ins[path] = made
        return self._stand_ins[path]

    def call(self, path: tuple[str, str], arguments: tuple[Any, ...]) -> Any:
        """The result of a call: for `getattr` on a class the nested class, else a `_Sink`."""
        if path in _GETATTR and len(arguments) == 2 and type(arguments[0]) is _Name and type(arguments[1]) is str:
            self.times.pop(path, None)
            owner = arguments[0].path
            return self.fetch(owner[0], f"{owner[1]}.{arguments[1]}")
        if path == _LOAD_FROM_BYTES and len(arguments) == 1 and type(arguments[0]) in (bytes, bytearray):
            self.times.pop(path, None)  # the bytes that it would load are examined instead
            self.embedded.append(bytes(arguments[0]))
            return _SINK
        self.called.add(path)
        return _SINK


_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}
_LOAD_FROM_BYTES = ("torch.storage", "_load_from_bytes")


class _Follower(pickle.Unpickler):
    def __init__(self, file: Any, uses: _Uses) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self.find_class = uses.fetch  # type: ignore[method-assign]

    def persistent_load(self, _: Any, /) -> Any:
        return _SINK


def mentions(read: Callable[[int], bytes], size: int) -> tuple[int, Mentions] | None:
    """The length of the pickle that some bytes begin with, and what it names.

    Args:
        read: Returns the given number of bytes, from the first on.
        size: How many bytes there are.

    Returns:
        None if the bytes are not a pickle: an unpickler would reach neither a name nor an end. The length is 0 if the
        pickle has no end.
    """
    data, end, error = find_end(read, size)
    if end:
        found = _followed(data[:end])
        return (end, found) if found.found or not found.problem else None
    assert error is not None
    if not isinstance(error, OpcodeError):  # beyond a limit, so the rest was not read
        return 0, Mentions((), (), error.message)
    stopped = error.offset
    found = _followed(data[:stopped])
    if not found.found and not _extends(data[:stopped]):
        return None
    return 0, found._replace(problem=f"ends in bytes that no unpickler reads: {error.message}")


def mentions_in_a_row(source: Source) -> Iterator[tuple[int, int, Mentions]]:
    """Where each of the consecutive pickles at the beginning of a source begins and ends, and what it names."""
    start = 0
    while start < source.size:
        found = mentions(partial(source.read, start), source.size - start)
        if found is None:
            return
        length, named = found
        stop = start + length if length else source.size
        yield start, stop, named
        start = stop


_EXTENSIONS = frozenset(b"\x82\x83\x84")


def _extends(data: bytes) -> bool:
    """Whether one of the opcodes may be an extension code."""
    return not _EXTENSIONS.isdisjoint(data)


def _followed(data: bytes) -> Mentions:
    uses = _Uses()
    problem = ""
    try:
        with no_garbage_collection():
            loose: list[int] = []
            with suppress(OpcodeError):
                check_opcodes(data, loose=loose)
            check_sharing(data, loose)
            _Follower(io.BufferedReader(io.BytesIO(data), 1 << 20), uses).load()
    except Exception as error:  # noqa: BLE001  # malformed bytes can lead to any error
        problem = f"cannot be followed to its end: {describe(error)}"
        if type(error) is ValueError and _extends(data):
            uses.times.setdefault(("copyreg", "an extension code"), 1)
    except RecursionError:
        problem = "is nested too deeply"
    problem = problem or "; ".join(uses.problems[:3])
    found = [
        Mention(module, name, _place(data, module, name), times, (module, name) in uses.called)
        for (module, name), times in uses.times.items()
    ]
    return Mentions(tuple(found), tuple(uses.embedded), problem)


def _place(data: bytes, module: str, name: str) -> int:
    """The byte at which a name first occurs; 0 if the pickle puts it together from parts."""
    owner, member = (text.encode("utf-8", "surrogatepass") for text in (module, name))
    for spelled in (b"c%s\n%s\n" % (owner, member), b"i%s\n%s\n" % (owner, member), member):
        at = data.find(spelled)
        if at >= 0:
            return at
    return 0
