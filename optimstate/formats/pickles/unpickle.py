"""Pickles without execution: an unpickler that builds only data and records.

It is the C unpickler with every lookup of a class or function answered by an inert stand-in, after a scan that refuses
opcodes whose arguments would make it allocate.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LimitExceededError,
    UnsupportedCheckpointError,
)
from optimstate.formats.pickles.checks import read_soundly
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES, check_opcodes
from optimstate.formats.pickles.sharing import check_sharing
from optimstate.formats.pickles.tensors import TensorBuilder
from optimstate.io.extents import StoredSource
from optimstate.io.location import Location
from optimstate.tensors.dtypes import ITEMSIZE_OF_STORAGE
from optimstate.tensors.lazy import Storage
from optimstate.tree import GlobalName, no_garbage_collection

__all__ = ["InertUnpickler", "errors_in", "load", "load_file"]

StorageLoader = Callable[[str, str, str, int], Storage]
"""(class of the storage, key, location, number of bytes) -> Storage; for the same key the same object."""


class InertUnpickler(pickle.Unpickler):
    """Builds plain data, `LazyTensor`s and `Opaque` records; imports and calls nothing that a pickle names.

    Args:
        file: The pickle as a binary file.
        storage: Called for each persistent id of a storage.
    """

    def __init__(self, file: Any, storage: StorageLoader | None = None) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._storage = storage
        self._stand_ins: dict[tuple[str, str], Any] = {}
        self._kinds: dict[Any, tuple[str, int]] = {}
        self._tensors = TensorBuilder()

    @property
    def globals(self) -> list[tuple[str, str]]:
        """Every `(module, name)` that the pickle mentions, in order of first mention."""
        return list(self._stand_ins)

    def finished(self) -> None:
        """Check and complete what was built, after the pickle was read to its end."""
        self._tensors.finished()

    def release(self) -> None:
        """Release the file, which reference cycles between stand-ins and unpickler would keep open."""
        for stand_in in self._stand_ins.values():
            if isinstance(stand_in, GlobalName) and type(stand_in) is not GlobalName:
                del type(stand_in).__call__  # a `builder` becomes a plain name

    def find_class(self, module: str, name: str, /) -> Any:
        """The stand-in for a global; never the global itself, except for a few builtin containers."""
        key = (module, name)
        if key not in self._stand_ins:
            self._stand_ins[key] = self._stand_in(module, name)
        return self._stand_ins[key]

    def _stand_in(self, module: str, name: str) -> Any:
        if module in ("builtins", "__builtin__"):
            build = self._nested_class if name == "getattr" else _BUILTINS.get(name)
        elif (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        elif (module, name) == ("_codecs", "encode"):
            build = _encode
        else:
            build = self._tensors.find(f"{module}.{name}")
        return self.builder(module, name, build) if build else GlobalName(module, name)

    def builder(self, module: str, name: str, build: Callable[..., Any]) -> GlobalName:
        """The stand-in for a global whose calls return `build(...)`; without a call it is a plain name."""
        # `build` is in the metaclass, so that the C unpickler's calls, one for each tensor, go straight to it.
        kind: type[GlobalName] = type("Builder", (GlobalName,), {"__call__": staticmethod(build)})
        return kind(module, name)

    def _nested_class(self, owner: Any, name: Any) -> Any:
        # Protocol 2 writes a nested class as getattr(Outer, "Inner"); this is only a longer name.
        if isinstance(owner, GlobalName) and isinstance(name, str):
            return self.find_class(owner.module, f"{owner.qualname}.{name}")
        return GlobalName("builtins", "getattr")(owner, name)

    def persistent_load(self, pid: Any, /) -> Storage:
        """The storage of a persistent id: ('storage', class, key, location, number of elements, ...)."""
        try:
            mark, kind, key, location, numel = pid if len(pid) == 5 else pid[:5]
            known = self._kinds.get(kind) if type(kind) is GlobalName else None
        except (TypeError, ValueError):
            raise CorruptCheckpointError(f"an unknown persistent id {describe(pid)}"[:200]) from None
        if mark != "storage" or self._storage is None or type(pid) is not tuple:
            raise CorruptCheckpointError(f"an unknown persistent id {describe(pid)}"[:200])
        name, itemsize = known or self._kind(kind, key)
        if type(key) is not str or type(location) is not str:
            raise CorruptCheckpointError(f"a malformed storage id {describe(pid)}"[:200])
        if type(numel) is not int or numel < 0:
            raise CorruptCheckpointError(f"storage {describe(key)} declares {describe(numel)} elements")
        nbytes = numel * itemsize
        found = self._storage(name, key, location, nbytes)
        if found.nbytes != nbytes:
            raise CorruptCheckpointError(
                f"storage {describe(key)} has {found.nbytes} bytes and is used with {numel} elements"
            )
        if found.kind != name:
            raise UnsupportedCheckpointError(f"storage {describe(key)} is used as {found.kind} and as {name}")
        return found

    def _kind(self, kind: Any, key: Any) -> tuple[str, int]:
        """The name of a storage class and its bytes per element."""
        if type(kind) is not GlobalName:
            raise CorruptCheckpointError(f"storage {describe(key)} is of class {describe(kind)}"[:200])
        name = kind.qualname.removeprefix("_") if kind.module == "torch.storage" else kind.qualname  # _Untyped, in 1.11
        itemsize = 1 if name == "UntypedStorage" else ITEMSIZE_OF_STORAGE.get(name)
        if itemsize is None:
            raise UnsupportedCheckpointError(f"storage {describe(key)} is of unknown class {describe(kind.qualname)}")
        self._kinds[kind] = (name, itemsize)
        return self._kinds[kind]


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin1")
    raise UnsupportedCheckpointError(f"bytes spelled as text in {describe(encoding)}")


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    # bytearray(10**12) would allocate memory, so only real contents are accepted.
    return bytearray(data if isinstance(data, bytes) else _encode(data, encoding))


def _bytes(data: Any = "", encoding: Any = "latin-1") -> bytes:
    return bytes(data) if isinstance(data, bytes) else _encode(data, encoding)


def _from_list(kind: Callable[[Iterable[Any]], Any]) -> Callable[..., Any]:
    def build(items: Any = ()) -> Any:
        if not isinstance(items, list | tuple):
            raise CorruptCheckpointError(f"{kind} made of {type(items).__name__}")
        return kind(items)

    return build


def _complex(real: Any, imaginary: Any) -> complex:
    return complex(float(real), float(imaginary))


_BUILTINS: dict[str, Any] = {
    "set": _from_list(set),
    "frozenset": _from_list(frozenset),
    "bytes": _bytes,
    "bytearray": _bytearray,
    "complex": _complex,
}


@contextmanager
def errors_in(path: Location, record: str = "") -> Iterator[None]:
    """Adds the file, and a record in it, to errors that do not name a file."""
    try:
        yield
    except CheckpointError as error:
        if error.path:
            raise
        raise error.within(path=path, place=f"{record} {error.place}".strip()) from error


def load_file(
    source: StoredSource, storage: StorageLoader | None = None, *, unpickler: type[InertUnpickler] = InertUnpickler
) -> tuple[Any, list[tuple[str, str]]]:
    """Unpickle a whole file inertly; as `load`, with the file's name in all errors.

    Raises:
        CheckpointError: As `load`, or it has more than `MAX_PICKLE_BYTES`.
    """
    if source.size > MAX_PICKLE_BYTES:
        message = f"a pickle of {source.size} bytes is over the limit of {MAX_PICKLE_BYTES}"
        raise LimitExceededError(message, path=source.path)
    with errors_in(source.path):
        return load(source.read(0, source.size), storage, unpickler=unpickler)


def load(
    data: bytes, storage: StorageLoader | None = None, *, unpickler: type[InertUnpickler] = InertUnpickler
) -> tuple[Any, list[tuple[str, str]]]:
    """Unpickle `data` inertly.

    Args:
        data: One whole pickle, any protocol.
        storage: Returns storages; without it a pickle that refers to one is an error.
        unpickler: A subclass, for containers with persistent ids of their own.

    Returns:
        The tree, and every global that the pickle mentions.

    Raises:
        CheckpointError: The pickle is damaged, hostile or uses something unknown.
    """
    loose: list[int] = []
    end = check_opcodes(data, loose=loose)
    if end != len(data):
        raise CorruptCheckpointError(f"{len(data) - end} bytes follow the pickle", place=f"byte {end} of the pickle")
    check_sharing(data, loose)
    # The C unpickler reads through `peek` of a buffered file without calling back into Python for each opcode.
    reader = unpickler(io.BufferedReader(io.BytesIO(data), 1 << 20), storage)
    try:
        with no_garbage_collection():
            tree = read_soundly(data, reader.load)
            reader.finished()
    except CheckpointError:
        raise
    except RecursionError:
        raise LimitExceededError("the pickle is nested too deeply") from None
    except Exception as error:
        raise CorruptCheckpointError(f"the pickle cannot be read: {_in_words(error)}"[:300]) from error
    finally:
        reader.release()
    return tree, reader.globals


# Names of this package's stand-ins in Python's error messages.
_OF_STAND_INS = r"\b(Opaque|GlobalName|\w*Tensor|\w*Unpickler|Storage)\b|__\w+__"


def _in_words(error: Exception) -> str:
    """The message of an interpreter's error, replaced where it is about a stand-in rather than about the file."""
    text = str(error)
    return "it uses an object in a way that such objects do not support" if re.search(_OF_STAND_INS, text) else text
