"""Plain pickles (`pickle.dump(model.state_dict(), file)`): read only.

A pickled tensor has its storage as a call of `torch.storage._load_from_bytes`, whose argument is a legacy container.
That container is read as inertly as the pickle around it; its bytes stay in memory.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.pickles.unpickle import InertUnpickler, load_file
from optimstate.formats.protocol import Claim, Document, read_only
from optimstate.formats.torch.legacy import Globals, read_stream
from optimstate.io.extents import InMemory
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.tensors.dtypes import ITEMSIZE_OF_STORAGE, encode_elements
from optimstate.tensors.lazy import Storage

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "pickle"
SUFFIXES: tuple[str, ...] = ()
_LOAD = ("torch.storage", "_load_from_bytes")
_TEXT_SUFFIXES = (".pkl", ".pickle")  # protocols 0 and 1 have no signature


def sniff(path: Location, head: bytes) -> Claim:
    """Likely if a file begins like a pickle of protocol 2 or later, or like an older one and has its suffix."""
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
                    hint="Give the folder that contains data.pkl and the folder `data`.",
                )
            return super().persistent_load(pid)

        def _stand_in(self, module: str, name: str) -> Any:
            if (module, name) == _LOAD:
                return self.builder(module, name, self.storage_from_bytes)
            if module in ("torch", "torch.cuda") and name in ITEMSIZE_OF_STORAGE:
                return self.builder(module, name, partial(_storage_of_numbers, name))
            return super()._stand_in(module, name)

    tree, names = load_file(open_source(path), unpickler=Unpickler)
    outer = [name for name in names if name != _LOAD]  # the globals in the bytes that it would load are in `inner`
    return Document(path, NAME, tree, list(dict.fromkeys([*outer, *inner])))


# Others could read a plain pickle only by running it.
write = read_only(
    "plain pickles are read, but not written", hint="`optimstate convert` writes a torch or safetensors file."
)


def _storage_of_numbers(kind: str, numbers: Any = ()) -> Storage:
    """`torch.FloatStorage([1.0, 2.0])`, as torch before 0.4 pickles a storage."""
    try:
        data = encode_elements(numbers, kind)
    except (TypeError, ValueError, struct.error) as error:
        raise CorruptCheckpointError(f"a {kind} of {describe(numbers)}: {error}"[:200]) from None
    return Storage(InMemory(data).extents(), len(data), kind)


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
