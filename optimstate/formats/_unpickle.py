"""Pickles without execution: an unpickler that builds only data and records.

It is the C unpickler with every lookup of a class or function answered by an inert stand-in, after a scan that refuses
opcodes whose arguments would make it allocate.
"""

from __future__ import annotations

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LimitExceededError,
    UnsupportedCheckpointError,
)
from optimstate.tensors import DTYPES, LazyTensor, Storage
from optimstate.tree import GlobalName, no_garbage_collection

__all__ = ["MAX_PICKLE_BYTES", "InertUnpickler", "load"]

MAX_PICKLE_BYTES = 1 << 29
"""Largest pickle that is read. 80,000 tensors take 7 MB."""

StorageLoader = Callable[[str, str, str, int], Storage]
"""(class of the storage, key, location, number of elements) -> Storage."""


# --- the scan -------------------------------------------------------------------------------------------------------


def _opcode_pattern(memo_limit: int) -> re.Pattern[bytes]:
    """A run of opcodes whose arguments are short and whose memo indices are below about `memo_limit`.

    One anchored C-level match walks over most of a pickle; what it stops at is looked at by `_step`.
    """

    def counted(opcode: bytes, length_bytes: int, most: int) -> list[bytes]:
        rows = []
        for n in range(most):
            prefix = re.escape(opcode + n.to_bytes(length_bytes, "little"))
            rows.append(prefix + (b".{%d}" % n if n else b""))
        return rows

    high = min(memo_limit >> 16, 0xFF)
    rows = [
        rb"[(.012NQRabdelostu})\]\x81\x85-\x89\x8f-\x94]",
        rb"r..[\x00-" + re.escape(bytes([high])) + rb"]\x00",
        rb"[hqK\x80\x82].",
        rb"[Jj\x84].{4}",
        rb"[M\x83]..",
        rb"G.{8}",
        rb"c[^\n]*\n[^\n]*\n",
        *counted(b"X", 4, 96),
        *counted(b"U", 1, 16),
        *counted(b"\x8c", 1, 96),
        *counted(b"\x8a", 1, 16),
        *counted(b"C", 1, 16),
    ]
    return re.compile(rb"(?s:" + rb"|".join(rows) + rb")*+")


_LENGTH_PREFIXED = {
    **dict.fromkeys(b"U\x8c\x8aC", 1),
    **dict.fromkeys(b"XTB\x8b", 4),
    **dict.fromkeys(b"\x8d\x8e\x96\x95", 8),
}
_ONE_LINE = frozenset(b"ILFSVgPp")
_STOP = ord(".")


def check_opcodes(data: bytes) -> None:
    """Refuse pickles whose opcodes declare more than the pickle holds, before anything is unpickled.

    Raises:
        CorruptCheckpointError: An argument reaches past the end, or there is no end.
        LimitExceededError: A memo index or a size is beyond any honest pickle of this length.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"a pickle of {len(data)} bytes is over the limit of {MAX_PICKLE_BYTES}")
    pattern = _opcode_pattern(len(data))
    at = 0
    while at < len(data):
        match = pattern.match(data, at)
        assert match is not None
        at = match.end()
        if at < len(data):
            at = _step(data, at)
    if not data or data[-1] != _STOP:
        raise CorruptCheckpointError("the pickle does not end with STOP", place=f"byte {len(data)} of the pickle")


def _step(data: bytes, at: int) -> int:
    """Check the opcode at `at`, which the pattern did not take, and return where the next one begins."""
    opcode = data[at]
    place = f"byte {at} of the pickle"
    if opcode == ord("r"):
        index = int.from_bytes(data[at + 1 : at + 5], "little")
        if len(data) < at + 5 or index > len(data):
            raise LimitExceededError(f"memo index {index} in a pickle of {len(data)} bytes", place=place)
        return at + 5
    if opcode in _LENGTH_PREFIXED:
        width = _LENGTH_PREFIXED[opcode]
        length = int.from_bytes(data[at + 1 : at + 1 + width], "little")
        if at + 1 + width + length > len(data):
            raise CorruptCheckpointError(f"declares {length} bytes, past the end of the pickle", place=place)
        return at + 1 + width + (0 if opcode == 0x95 else length)  # a frame's contents are opcodes
    lines = 2 if opcode in b"ci" else 1 if opcode in _ONE_LINE else 0
    if not lines:
        raise CorruptCheckpointError(f"0x{opcode:02x} is no opcode, or its argument is cut off", place=place)
    end = at
    for _ in range(lines):
        end = data.find(b"\n", end + 1)
        if end < 0:
            raise CorruptCheckpointError("a line of text does not end", place=place)
    if opcode in b"gp" and (not data[at + 1 : end].isdigit() or int(data[at + 1 : min(end, at + 12)]) > len(data)):
        raise LimitExceededError(f"memo index {data[at + 1 : end][:20]!r}", place=place)
    return end + 1


# --- reading --------------------------------------------------------------------------------------------------------


class _Builder(GlobalName):
    """A global whose calls give plain data or a `LazyTensor`; mentioned without a call it is a name like any other."""

    build: Callable[..., Any]

    def __new__(mcs, module: str, qualname: str, build: Callable[..., Any]) -> _Builder:
        made = super().__new__(mcs, module, qualname)
        assert isinstance(made, _Builder)
        made.build = build
        return made

    def __init__(cls, module: str, qualname: str, _build: Callable[..., Any]) -> None:  # noqa: N805 - a metaclass
        super().__init__(module, qualname)

    def __call__(cls, *arguments: Any) -> Any:  # noqa: N805
        """Build what the call would give."""
        return cls.build(*arguments)


class InertUnpickler(pickle.Unpickler):
    """Builds plain data, `LazyTensor`s and `Opaque` records; imports and calls nothing that a pickle names.

    Args:
        data: The pickle.
        storage: Called for each persistent id of a storage.

    Attributes:
        globals: Every `(module, name)` the pickle mentioned, in order of first mention.
    """

    def __init__(self, file: Any, storage: StorageLoader | None = None) -> None:
        super().__init__(file, fix_imports=False, encoding="latin1")
        self._storage = storage
        self._stand_ins: dict[tuple[str, str], Any] = {}
        self._storages: dict[str, Storage] = {}
        self._spans: dict[tuple[Any, Any], int] = {}  # checkpoints have few shapes and many tensors

    @property
    def globals(self) -> list[tuple[str, str]]:
        """Every class or function mentioned."""
        return list(self._stand_ins)

    def find_class(self, module: str, name: str, /) -> Any:
        """The stand-in for a global; never the thing itself, except for a few builtin containers."""
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
            key = _REBUILDERS.get(f"{module}.{name}")
            build = getattr(self, key) if key else None
        return _Builder(module, name, build) if build else GlobalName(module, name)

    def _nested_class(self, owner: Any, name: Any) -> Any:
        # Protocol 2 spells a nested class as getattr(Outer, "Inner"); this is only a longer name.
        if isinstance(owner, GlobalName) and isinstance(name, str):
            return self.find_class(owner.module, f"{owner.qualname}.{name}")
        return GlobalName("builtins", "getattr")(owner, name)

    def persistent_load(self, pid: Any, /) -> Storage:
        """The storage a persistent id names: ('storage', class, key, location, number of elements, ...)."""
        known = type(pid) is tuple and len(pid) >= 5
        tag, kind, key, location, numel = pid[:5] if known else (None, None, None, None, None)
        if self._storage is None or tag != "storage":
            raise CorruptCheckpointError(f"an unknown persistent id {pid!r}"[:200])
        if not (type(kind) is GlobalName and type(key) is str and type(location) is str):
            raise CorruptCheckpointError(f"a malformed storage id {pid!r}"[:200])
        if type(numel) is not int or numel < 0:
            raise CorruptCheckpointError(f"storage {key!r} declares {numel!r} elements")
        found = self._storages.get(key)
        if found is None:
            found = self._storages[key] = self._storage(kind.qualname, key, location, numel)
        elif found.nbytes != numel * _ITEMSIZE_OF_STORAGE.get(kind.qualname, 1):
            raise CorruptCheckpointError(f"storage {key!r} has {found.nbytes} bytes and is used with {numel} elements")
        elif found.kind != kind.qualname:
            raise UnsupportedCheckpointError(f"storage {key!r} is used as {found.kind} and as {kind.qualname}")
        return found

    def _tensor_v2(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
    ) -> LazyTensor:
        dtype = _DTYPE_OF_STORAGE.get(storage.kind) if isinstance(storage, Storage) else None
        if dtype is None:
            raise CorruptCheckpointError(f"a tensor over {storage!r}"[:200])
        return self._checked_tensor(storage, dtype, offset, size, stride, grad, hooks, metadata)

    def _tensor_v3(
        self, storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
    ) -> LazyTensor:
        name = dtype.qualname if isinstance(dtype, GlobalName) and dtype.module == "torch" else None
        if not isinstance(storage, Storage) or name not in DTYPES:
            raise UnsupportedCheckpointError(f"a tensor of dtype {dtype!r} over {storage!r}"[:200])
        return self._checked_tensor(storage, name, offset, size, stride, grad, hooks, metadata)

    def _checked_tensor(
        self,
        storage: Storage,
        dtype: str,
        offset: Any,
        size: Any,
        stride: Any,
        grad: Any,
        hooks: Any,
        metadata: Any,
    ) -> LazyTensor:
        if type(size) is not tuple or type(stride) is not tuple or type(offset) is not int or offset < 0:
            raise CorruptCheckpointError(f"a tensor with size {size!r}, stride {stride!r}, offset {offset!r}"[:200])
        if hooks:
            raise UnsupportedCheckpointError("a tensor with backward hooks")
        span = self._spans.get((size, stride))
        if span is None:
            span = self._spans[size, stride] = _span(size, stride)
        if span and (offset + span) * DTYPES[dtype].itemsize > storage.nbytes:
            raise CorruptCheckpointError(
                f"a tensor of size {size!r}, stride {stride!r}, offset {offset} reaches past its storage of "
                f"{storage.nbytes} bytes"[:300]
            )
        return LazyTensor(storage, dtype, size, stride, offset, bool(grad), False, metadata)

    def _parameter(self, data: Any, grad: Any, hooks: Any) -> Any:
        if not isinstance(data, LazyTensor) or hooks or data.is_parameter:
            return GlobalName("torch._utils", "_rebuild_parameter")(data, grad, hooks)
        return LazyTensor(
            data.storage, data.dtype, data.shape, data.stride, data.offset, bool(grad), True, data.metadata
        )


def _span(size: tuple[Any, ...], stride: tuple[Any, ...]) -> int:
    """Elements from the first to behind the last one of a view."""
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (*size, *stride)):
        raise CorruptCheckpointError(f"a tensor with size {size!r} and stride {stride!r}"[:200])
    return 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


_REBUILDERS = {
    "torch._utils._rebuild_tensor_v2": "_tensor_v2",
    "torch._utils._rebuild_tensor_v3": "_tensor_v3",
    "torch._utils._rebuild_parameter": "_parameter",
}
_DTYPE_OF_STORAGE = {row.storage: row.name for row in DTYPES.values() if row.storage}
_ITEMSIZE_OF_STORAGE = {row.storage: row.itemsize for row in DTYPES.values() if row.storage}


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if isinstance(text, str) and encoding in ("latin1", "latin-1"):
        return text.encode("latin1")
    raise UnsupportedCheckpointError(f"bytes spelled as text in {encoding!r}")


def _bytearray(data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    # bytearray(10**12) would allocate: only real contents are taken.
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


def load(data: bytes, storage: StorageLoader | None = None) -> tuple[Any, list[tuple[str, str]]]:
    """Unpickle `data` inertly.

    Args:
        data: One whole pickle, any protocol.
        storage: Resolves storages; without it a pickle that refers to one is an error.

    Returns:
        The tree, and every global mentioned.

    Raises:
        CheckpointError: The pickle is damaged, hostile or uses something unknown.
    """
    check_opcodes(data)
    # The C unpickler reads through `peek` of a buffered file without calling back into Python for each opcode.
    unpickler = InertUnpickler(io.BufferedReader(io.BytesIO(data), 1 << 20), storage)
    try:
        with no_garbage_collection():
            tree = unpickler.load()
    except CheckpointError:
        raise
    except RecursionError:
        raise LimitExceededError("the pickle is nested too deeply") from None
    except Exception as error:
        raise CorruptCheckpointError(f"the pickle cannot be read: {error}"[:300]) from error
    return tree, unpickler.globals
