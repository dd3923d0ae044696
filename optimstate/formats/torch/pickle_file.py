"""Plain pickles (`pickle.dump(model.state_dict(), file)`): read only.

A pickled tensor names its storage by a call of `torch.storage._load_from_bytes` with a whole legacy container in the
pickle. That container is read as inertly as the pickle around it; its bytes stay in memory, as the pickle holds them.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.tensors import InMemory
from optimstate.formats.pickles.unpickle import InertUnpickler, load
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.torch.legacy import Globals, read_stream
from optimstate.io.extents import Extent
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.tensors.dtypes import ITEMSIZE_OF_STORAGE, encode_elements
from optimstate.tensors.lazy import Storage

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "pickle"
SUFFIXES: tuple[str, ...] = ()
_LOAD = ("torch.storage", "_load_from_bytes")
_TEXT_SUFFIXES = (".pkl", ".pickle")  # protocols 0 and 1 have no mark of their own


def sniff(path: Location, head: bytes) -> Claim:
    """Likely where a file begins as pickles of protocol 2 and later do, or is called one."""
    if path.name.endswith(".metadata"):  # a part of a distributed checkpoint
        return Claim.NO
    binary = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    fits = binary or (path.suffix in _TEXT_SUFFIXES and head[:1] in (b"(", b"c", b"}", b"]"))
    return Claim.LIKELY if fits else Claim.NO


def read(path: Location) -> Document:
    """Open a pickle.

    Raises:
        CheckpointError: It is damaged, hostile or too large.
    """
    source = open_source(path)
    if source.size > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"a pickle of {source.size} bytes is over the limit of {MAX_PICKLE_BYTES}", path=path)
    inner: Globals = []

    class Unpickler(InertUnpickler):
        def storage_from_bytes(self, data: Any) -> Storage:
            storage, names = _embedded_storage(data)
            inner.extend(names)
            return storage

        def persistent_load(self, pid: Any, /) -> Any:
            if type(pid) is tuple and pid[:1] == ("storage",):
                raise UnsupportedCheckpointError(
                    "its tensors are in other files: this is the data.pkl of an unpacked archive of torch.save",
                    hint="Give the folder in which data.pkl and the folder `data` are.",
                )
            return super().persistent_load(pid)

        def _stand_in(self, module: str, name: str) -> Any:
            if (module, name) == _LOAD:
                return self.builder(module, name, self.storage_from_bytes)
            if module in ("torch", "torch.cuda") and name in ITEMSIZE_OF_STORAGE:
                return self.builder(module, name, partial(_storage_of_numbers, name))
            return super()._stand_in(module, name)

    try:
        tree, names = load(source.read(0, source.size), unpickler=Unpickler)
    except (CorruptCheckpointError, UnsupportedCheckpointError, LimitExceededError) as error:
        if error.path:
            raise
        raise error.within(path=path) from error
    outer = [name for name in names if name != _LOAD]  # what it would load was read, and is listed in its place
    return Document(path, NAME, tree, list(dict.fromkeys([*outer, *inner])))


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:  # noqa: ARG001
    """Refused: reading a plain pickle means running it.

    Raises:
        RepresentationError: Always.
    """
    raise RepresentationError(
        f"{path.name}: plain pickles are read, but not written",
        hint="`optimstate convert` writes a torch or safetensors file.",
    )


def _storage_of_numbers(kind: str, numbers: Any = ()) -> Storage:
    """`torch.FloatStorage([1.0, 2.0])`, as torch before 0.4 pickles a storage."""
    try:
        data = encode_elements(numbers, kind)
    except (TypeError, ValueError, struct.error) as error:
        raise CorruptCheckpointError(f"a {kind} of {describe(numbers)}: {error}"[:200]) from None
    return Storage((Extent(InMemory(data), 0, len(data)),) if data else (), len(data), kind)


def _embedded_storage(data: Any) -> tuple[Storage, Globals]:
    if not isinstance(data, bytes | bytearray):
        raise CorruptCheckpointError(f"a storage made of {type(data).__name__}")
    tree, names = read_stream(InMemory(bytes(data)))
    if not isinstance(tree, Storage):
        raise UnsupportedCheckpointError(
            f"the bytes inside the pickle hold {describe(tree)} where a storage belongs"[:200],
            hint="Only pickled state dicts are read; save this object with torch.save.",
        )
    return tree, names
