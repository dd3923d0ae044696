"""Pickling trees with protocol 2, with the same opcodes that CPython writes.

Reading a checkpoint of torch and writing it again gives the same bytes.
"""

from __future__ import annotations

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from optimstate.describe import describe
from optimstate.errors import LimitExceededError, RepresentationError
from optimstate.tensors.dtypes import DTYPES, ITEMSIZE_OF_STORAGE
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import GlobalName, Opaque, no_garbage_collection

__all__ = ["dump"]

_BATCH = 1000  # items per SETITEMS / APPENDS, as CPython writes them


class _Pickler:
    """Collects the opcodes of one pickle, with the memo and the batches of CPython's pickler."""

    def __init__(self, key_of: Callable[[Storage], str]) -> None:
        self.key_of = key_of
        self.out: list[bytes] = []
        self.memo: dict[int, bytes] = {}
        self.global_memo: dict[tuple[str, str], bytes] = {}
        self.key_memo: dict[str, bytes] = {}
        self.alive: list[Any] = []  # keeps objects, so that no other gets an id that is in the memo
        self.count = 0

    def memoize(self, obj: Any) -> None:
        self.memo[id(obj)] = self.put()
        self.alive.append(obj)

    def put(self) -> bytes:
        """Emit a PUT for the object on top of the stack, and return the GET that recalls it."""
        n = self.count
        self.count += 1
        if n < 256:
            self.out.append(b"q%c" % n)
            return b"h%c" % n
        self.out.append(b"r" + n.to_bytes(4, "little"))
        return b"j" + n.to_bytes(4, "little")

    def save(self, obj: Any) -> None:
        kind = type(obj)
        if obj is None:
            self.out.append(b"N")
        elif kind is bool:
            self.out.append(b"\x88" if obj else b"\x89")
        elif kind is int:
            self.out.append(_int(obj))
        elif kind is float:
            self.out.append(b"G" + struct.pack(">d", obj))
        elif (known := self.memo.get(id(obj))) is not None:
            self.out.append(known)
        elif kind is str:
            self.save_str(obj)
        elif isinstance(obj, LazyTensor):
            self.save_tensor(obj)
        elif kind in _SAVERS:
            _SAVERS[kind](self, obj)
        elif obj is OrderedDict:
            self.save_global("collections", "OrderedDict")
        elif isinstance(obj, GlobalName):
            self.save_global(obj.module, obj.qualname)
        elif isinstance(obj, Opaque):
            self.save_opaque(obj)
        elif isinstance(obj, Storage):
            self.save_storage(obj)
        else:
            raise RepresentationError(f"an object of type {kind.__name__} cannot be stored in a torch checkpoint")

    def save_str(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self.out.append(b"X" + len(data).to_bytes(4, "little") + data)
        self.memoize(text)

    def save_bytes(self, data: bytes) -> None:
        if data:
            self.save_global("_codecs", "encode")
            self.save((data.decode("latin1"), "latin1"))
        else:
            self.save_global("__builtin__", "bytes")
            self.out.append(b")")
        self.out.append(b"R")
        self.memoize(data)

    def save_bytearray(self, data: bytearray) -> None:
        self.reduce("__builtin__", "bytearray", (bytes(data),) if data else (), data)

    def save_complex(self, value: complex) -> None:
        self.reduce("__builtin__", "complex", (value.real, value.imag), value)

    def save_set(self, items: set[Any] | frozenset[Any]) -> None:
        self.reduce("__builtin__", type(items).__name__, (list(items),), items)

    def save_tuple(self, items: tuple[Any, ...]) -> None:
        if not items:
            self.out.append(b")")
            return
        if len(items) > 3:
            self.out.append(b"(")
        for item in items:
            self.save(item)
        if (known := self.memo.get(id(items))) is not None:  # it contains itself
            self.out.append(b"0" * len(items) + known if len(items) <= 3 else b"1" + known)
            return
        self.out.append((b"", b"\x85", b"\x86", b"\x87")[len(items)] if len(items) <= 3 else b"t")
        self.memoize(items)

    def save_list(self, items: list[Any]) -> None:
        self.out.append(b"]")
        self.memoize(items)
        self.save_items(items)

    def save_items(self, items: list[Any]) -> None:
        if len(items) == 1:
            self.save(items[0])
            self.out.append(b"a")
            return
        for start in range(0, len(items), _BATCH):
            self.out.append(b"(")
            for item in items[start : start + _BATCH]:
                self.save(item)
            self.out.append(b"e")

    def save_dict(self, items: dict[Any, Any]) -> None:
        self.out.append(b"}")
        self.memoize(items)
        self.save_entries(list(items.items()), exact=True)

    def save_entries(self, entries: list[tuple[Any, Any]], *, exact: bool) -> None:
        # CPython treats dicts (`exact`) and reduced mappings differently: after a full batch it writes an empty one for
        # a dict, and for a mapping it writes a remainder of one entry as a single item.
        for start in range(0, len(entries) + (exact and bool(entries)), _BATCH):
            batch = entries[start : start + _BATCH]
            single = len(batch) == 1 and (not exact or len(entries) == 1)
            if not single:
                self.out.append(b"(")
            for key, value in batch:
                self.save(key)
                self.save(value)
            self.out.append(b"s" if single else b"u")

    def save_ordered_dict(self, items: OrderedDict[Any, Any]) -> None:
        self.save_global("collections", "OrderedDict")
        self.out.append(b")R")
        self.memoize(items)
        self.save_entries(list(items.items()), exact=False)
        if vars(items):
            self.save(vars(items))
            self.out.append(b"b")

    def save_global(self, module: str, qualname: str) -> None:
        known = self.global_memo.get((module, qualname))
        if known is not None:
            self.out.append(known)
            return
        if "." in qualname:
            owner, _, name = qualname.rpartition(".")
            self.save_global("__builtin__", "getattr")
            self.save_global(module, owner)
            self.save(name)
            self.out.append(b"\x86")
            self.put()
            self.out.append(b"R")  # CPython does not memoize this either
            return
        self.out.append(b"c" + module.encode() + b"\n" + qualname.encode() + b"\n")
        self.global_memo[module, qualname] = self.put()

    def reduce(self, module: str, qualname: str, arguments: tuple[Any, ...], obj: Any) -> None:
        self.save_global(module, qualname)
        self.save(arguments)
        self.out.append(b"R")
        self.memoize(obj)

    def save_opaque(self, record: Opaque) -> None:
        if record.keywords:
            raise RepresentationError(
                f"{describe(record)} was created with keyword arguments, which protocol 2 cannot express"
            )
        self.save_global(record.type.module, record.type.qualname)
        self.save(record.arguments)
        self.out.append(b"R" if record.called else b"\x81")
        if (known := self.memo.get(id(record))) is not None:  # it contains itself
            self.out.append(b"0" + known)
            return
        self.memoize(record)
        if record.items:
            self.save_items(record.items)
        if record.entries:
            self.save_entries(record.entries, exact=False)
        if record.state is not Opaque.NOTHING:
            self.save(record.state)
            self.out.append(b"b")

    def save_storage(self, storage: Storage) -> None:
        untyped = storage.kind == "UntypedStorage"
        self.out.append(b"(")
        self.save("storage")
        self.save_global("torch.storage" if untyped else "torch", storage.kind)
        self.save_key(self.key_of(storage))
        self.save(storage.location)
        self.save(storage.nbytes if untyped else storage.nbytes // ITEMSIZE_OF_STORAGE[storage.kind])
        self.out.append(b"t")
        self.put()
        self.out.append(b"Q")

    def save_key(self, key: str) -> None:
        # Python has one object for all strings "0", but torch's pickler has another one for each storage's key.
        if key in self.key_memo:
            self.out.append(self.key_memo[key])
            return
        data = key.encode()
        self.out.append(b"X" + len(data).to_bytes(4, "little") + data)
        self.key_memo[key] = self.put()

    def save_hooks(self) -> None:
        """Save the empty OrderedDict of backward hooks."""
        self.save_global("collections", "OrderedDict")
        self.out.append(b")R")
        self.put()

    def save_tensor(self, tensor: LazyTensor) -> None:
        if not DTYPES[tensor.dtype].in_torch:
            raise RepresentationError(
                f"a tensor of dtype {tensor.dtype} ({DTYPES[tensor.dtype].safetensors}), which torch does not have",
                hint="Write a safetensors file.",
            )
        attributes = getattr(tensor, "attributes", None)
        if tensor.is_parameter:
            stateful = attributes is not None
            self.save_global("torch._utils", "_rebuild_parameter_with_state" if stateful else "_rebuild_parameter")
            if stateful:
                self.out.append(b"(")
            self.save_plain_tensor(tensor)
            self.put()
            self.save(tensor.requires_grad)
            self.save_hooks()
            if stateful:
                self.save(attributes)
            self.out.append(b"t" if stateful else b"\x87")
            self.put()
            self.out.append(b"R")
        elif attributes is not None:
            self.save_global("torch._tensor", "_rebuild_from_type_v2")
            self.out.append(b"(")
            self.save_global("torch._utils", self.rebuilder(tensor))
            self.save_global("torch", "Tensor")
            self.save_tensor_arguments(tensor)
            self.save(attributes)
            self.out.append(b"t")
            self.put()
            self.out.append(b"R")
        else:
            self.save_plain_tensor(tensor)
        self.memoize(tensor)

    @staticmethod
    def rebuilder(tensor: LazyTensor) -> str:
        return "_rebuild_tensor_v3" if tensor.storage.kind == "UntypedStorage" else "_rebuild_tensor_v2"

    def save_plain_tensor(self, tensor: LazyTensor) -> None:
        self.save_global("torch._utils", self.rebuilder(tensor))
        self.save_tensor_arguments(tensor)
        self.out.append(b"R")

    def save_tensor_arguments(self, tensor: LazyTensor) -> None:
        self.out.append(b"(")
        self.save_storage(tensor.storage)
        self.save(tensor.offset)
        self.save(tensor.shape)
        self.save(tensor.stride)
        self.save(tensor.requires_grad and not tensor.is_parameter)
        self.save_hooks()
        if tensor.storage.kind == "UntypedStorage":
            self.save_global("torch", tensor.dtype)
        if tensor.metadata is not None:
            self.save(tensor.metadata)
        self.out.append(b"t")
        self.put()


_SAVERS: dict[type, Callable[[_Pickler, Any], None]] = {
    bytes: _Pickler.save_bytes,
    bytearray: _Pickler.save_bytearray,
    complex: _Pickler.save_complex,
    set: _Pickler.save_set,
    frozenset: _Pickler.save_set,
    tuple: _Pickler.save_tuple,
    list: _Pickler.save_list,
    dict: _Pickler.save_dict,
    OrderedDict: _Pickler.save_ordered_dict,
}


def _int(value: int) -> bytes:
    if 0 <= value < 0x100:
        return b"K%c" % value
    if 0 <= value < 0x10000:
        return b"M" + value.to_bytes(2, "little")
    if -0x80000000 <= value < 0x80000000:
        return b"J" + value.to_bytes(4, "little", signed=True)
    encoded = pickle.encode_long(value)
    if len(encoded) < 256:
        return b"\x8a%c" % len(encoded) + encoded
    return b"\x8b" + len(encoded).to_bytes(4, "little") + encoded


def dump(tree: Any, key_of: Callable[[Storage], str] | None = None) -> bytes:
    """Pickle a tree, protocol 2, with storages as persistent ids.

    Args:
        tree: Plain data, `LazyTensor`s, `Opaque` records.
        key_of: The key to write for each storage, called in pickling order; the storages' own keys by default.

    Raises:
        RepresentationError: The tree has an object that protocol 2 cannot express.
        LimitExceededError: The tree is nested too deeply.
    """
    pickler = _Pickler(key_of or (lambda storage: storage.key))
    pickler.out.append(b"\x80\x02")
    try:
        with no_garbage_collection():
            pickler.save(tree)
    except RecursionError:
        raise LimitExceededError("the tree is nested too deeply to be pickled") from None
    pickler.out.append(b".")
    return b"".join(pickler.out)
