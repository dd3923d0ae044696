"""The containers of `torch.save` before zip archives: read, and written as today's zip archives.

The stream (torch 0.2 to 1.5, and still available as an option) is five pickles and then the bytes of each storage: a
magic number, a version, the byte order, the tree, the keys of the storages in order; for each storage an int64 number
of elements and the elements. The tar archive (torch 0.1) has the members `storages`, `tensors` and `pickle`; tensors
are numbered, and the tree refers to them by number.
"""

from __future__ import annotations

import struct
from io import BufferedReader
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.byte_sources import Part
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES, check_opcodes
from optimstate.formats.pickles.unpickle import InertUnpickler, errors_in, load
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent, StoredSource
from optimstate.io.location import Location
from optimstate.io.places import open_source
from optimstate.io.streams import Source, SourceFile
from optimstate.tensors.dtypes import DTYPES, ITEMSIZE_OF_STORAGE
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import GlobalName

__all__ = ["MAGIC_BYTES", "NAME", "SUFFIXES", "read", "read_stream", "read_tar", "sniff", "write"]

NAME = "torch-legacy"
SUFFIXES: tuple[str, ...] = ()  # nothing is written in this format

_MAGIC = 0x1950A86A20F9469CFC6C
MAGIC_BYTES = b"\x8a\n" + _MAGIC.to_bytes(10, "little")
_TAR_MEMBERS = (b"storages", b"tensors", b"pickle", b"sys_info")
_DTYPE_OF = {row.storage: row for row in DTYPES.values() if row.storage}
_FIRST_WINDOW = 1 << 16

Globals = list[tuple[str, str]]


def sniff(path: Location, head: bytes) -> Claim:
    """Whether a file begins with torch's magic number, or is a tar archive whose first member is one of torch's."""
    if MAGIC_BYTES in head[:32]:
        return Claim.CERTAIN
    is_tar = head.split(b"\0", 1)[0] in _TAR_MEMBERS and path.is_file() and _is_tar(path)
    return Claim.CERTAIN if is_tar else Claim.NO


def _is_tar(path: Location) -> bool:
    import tarfile

    with BufferedReader(SourceFile(open_source(path))) as file:
        return tarfile.is_tarfile(file)


def read(path: Location) -> Document:
    """Open a file of the old `torch.save`.

    Raises:
        CheckpointError: It is damaged, hostile or big-endian.
    """
    source = open_source(path)
    is_stream = MAGIC_BYTES in source.read(0, min(source.size, 32))
    with errors_in(path):
        tree, names = read_stream(source) if is_stream else read_tar(source)
    notes = [] if is_stream else ["a tar archive of torch 0.1: torch.load opens it only with weights_only=False"]
    return Document(path, NAME, tree, names, notes)


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a zip archive as today's `torch.save` does, which torch reads since 1.4."""
    return ["written as torch's zip container", *torch_zip.write(tree, path, like=like, options=options)]


# --- consecutive pickles --------------------------------------------------------------------------------------------


class _Reader:
    """Reads a source in which pickles and raw bytes alternate, from its beginning on."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.at = 0
        self.globals: Globals = []

    def take(self, length: int) -> bytes:
        if self.at + length > self.source.size:
            raise CorruptCheckpointError(
                f"needs {length} bytes, but ends at {self.source.size}", place=f"offset {self.at}"
            )
        data = self.source.read(self.at, length)
        self.at += length
        return data

    def number(self, code: str) -> int:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize(code)))
        return int(value)

    def pickle(self, storage: Any = None, unpickler: type[InertUnpickler] = InertUnpickler) -> Any:
        """The next pickle; its length is not known before, so windows of increasing size are tried."""
        data = self._pickle_bytes(_FIRST_WINDOW)
        tree, names = load(data, storage, unpickler=unpickler)
        self.at += len(data)
        self.globals = list(dict.fromkeys([*self.globals, *names]))
        return tree

    def _pickle_bytes(self, window: int) -> bytes:
        length = min(window, self.source.size - self.at)
        data = self.source.read(self.at, length)
        try:
            return data[: check_opcodes(data)]
        except CorruptCheckpointError as error:
            if length == window < MAX_PICKLE_BYTES:
                return self._pickle_bytes(window * 4)
            place = f"the pickle at offset {self.at}, {error.place}"
            raise error.within(place=place) from None

    def skip_storage(self, storage: Storage, name: object) -> None:
        """Locate the bytes of a storage, which come next after their number of elements, and skip them."""
        numel = self.number("q")
        itemsize = ITEMSIZE_OF_STORAGE.get(storage.kind, 1)
        if numel < 0 or numel * itemsize > self.source.size - self.at:
            raise CorruptCheckpointError(
                f"storage {describe(name)} declares {numel} elements, past the end of the file",
                place=f"offset {self.at}",
            )
        if storage.nbytes not in (-1, numel * itemsize):
            raise CorruptCheckpointError(
                f"storage {describe(name)} has {numel * itemsize} bytes, the pickle says {storage.nbytes}",
                place=f"offset {self.at}",
            )
        storage.nbytes = numel * itemsize
        storage.pieces = (Extent(self.source, self.at, storage.nbytes),) if storage.nbytes else ()
        self.at += storage.nbytes


# --- the stream -----------------------------------------------------------------------------------------------------


class _View(NamedTuple):
    """A storage that is a part of another one, as torch before 0.4 saved them; `start` is in bytes."""

    storage: Storage
    root: Storage
    start: int


class _StreamUnpickler(InertUnpickler):
    """Persistent ids of the stream: storages, windows into storages, and the source code of modules.

    Attributes:
        views: The windows, by their keys.
    """

    views: dict[Any, _View]

    def persistent_load(self, pid: Any, /) -> Any:
        if type(pid) is tuple and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # the class; the source code that follows it is for people
        root = super().persistent_load(pid)
        if len(pid) < 6 or pid[5] is None:
            return root
        key, offset, numel = _fields(pid[5], 3, "view of a storage")
        itemsize = ITEMSIZE_OF_STORAGE.get(root.kind, 1)
        if not (type(offset) is type(numel) is int and offset >= 0 and 0 <= numel <= root.nbytes // itemsize - offset):
            raise CorruptCheckpointError(
                f"a view of {describe(numel)} elements from {describe(offset)} reaches past storage {describe(pid[2])}"
            )
        made = Storage((), numel * itemsize, root.kind, root.location)
        view = self.views.setdefault(key, _View(made, root, offset * itemsize))
        if (view.root, view.start, view.storage.nbytes) != (root, offset * itemsize, made.nbytes):
            raise CorruptCheckpointError(
                f"the view {describe(key)} of storage {describe(pid[2])} is described in two ways"
            )
        return view.storage


def read_stream(source: Source) -> tuple[Any, Globals]:
    """The tree of a stream, and the globals that its pickles mention.

    Raises:
        CheckpointError: It is damaged, hostile or big-endian.
    """
    reader = _Reader(source)
    if reader.pickle() != _MAGIC:
        raise CorruptCheckpointError("the magic number is missing")
    version = reader.pickle()
    if version != 1001:
        raise UnsupportedCheckpointError(f"version {describe(version)} of the legacy container is not known")
    system = reader.pickle()
    if not isinstance(system, dict):
        raise CorruptCheckpointError(f"the description of the machine is {describe(system)}"[:200])
    if system.get("little_endian") is False:
        raise UnsupportedCheckpointError(
            "written on a big-endian machine", hint="Load it with torch, which swaps the bytes, and save it."
        )
    storages: dict[str, Storage] = {}

    def storage(kind: str, key: str, location: str, nbytes: int) -> Storage:
        if key not in storages:
            storages[key] = Storage((), nbytes, kind, location, key)
        return storages[key]

    views: dict[Any, _View] = {}

    class Unpickler(_StreamUnpickler):
        def __init__(self, file: Any, storage: Any = None) -> None:
            super().__init__(file, storage)
            self.views = views

    tree = reader.pickle(storage, Unpickler)
    keys = reader.pickle()
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise CorruptCheckpointError("the list of storages is not that of the pickle", place=f"offset {reader.at}")
    for key in keys:
        reader.skip_storage(storages[key], key)
    for view in views.values():
        view.storage.pieces = view.root.cut(view.start, view.start + view.storage.nbytes)
    return tree, reader.globals


# --- the tar --------------------------------------------------------------------------------------------------------


def read_tar(source: StoredSource) -> tuple[Any, Globals]:
    """The tree of a tar archive, and the globals that its pickles mention.

    Raises:
        CheckpointError: It is damaged or hostile.
    """
    members = _tar_members(source)
    for name in ("storages", "tensors", "pickle"):
        if name not in members:
            raise CorruptCheckpointError(f"the tar archive has no member {describe(name)}")
    reader = _Reader(Part(source, *members["storages"]))
    storages = _tar_storages(reader)
    objects: dict[int, Any] = {}
    tensors = _Reader(Part(source, *members["tensors"]))
    for _ in range(_count(tensors.pickle(), tensors)):
        key, storage_key, _ = _fields(tensors.pickle(), 3, "tensor")
        if storage_key not in storages:
            raise CorruptCheckpointError(f"tensor {describe(key)} is in the unknown storage {describe(storage_key)}")
        objects[key] = _tar_tensor(tensors, storages[storage_key], key)
    objects = {**storages, **objects}

    class TarUnpickler(InertUnpickler):
        def persistent_load(self, pid: Any, /) -> Any:
            if isinstance(pid, tuple) and pid:
                return pid[0]  # a class with its source code
            number = int(pid) if str(pid).lstrip("-").isdigit() else None
            if number not in objects:
                raise CorruptCheckpointError(f"the pickle refers to {describe(pid)}, which is not defined"[:200])
            return objects[number]

    trees = _Reader(Part(source, *members["pickle"]))
    tree = trees.pickle(unpickler=TarUnpickler)
    return tree, list(dict.fromkeys([*reader.globals, *tensors.globals, *trees.globals]))


def _tar_members(source: StoredSource) -> dict[str, tuple[int, int]]:
    """Offset and size of each regular member."""
    import tarfile

    try:
        with BufferedReader(SourceFile(source)) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return {m.name: (m.offset_data, m.size) for m in archive.getmembers() if m.isreg()}
    except (tarfile.TarError, OSError) as error:
        raise CheckpointError(f"the tar archive cannot be read: {error}", path=source.path) from error


def _tar_storages(reader: _Reader) -> dict[int, Storage]:
    found: dict[int, Storage] = {}
    for _ in range(_count(reader.pickle(), reader)):
        key, location, kind = _fields(reader.pickle(), 3, "storage")
        if not isinstance(kind, GlobalName) or kind.qualname not in _DTYPE_OF:
            raise UnsupportedCheckpointError(f"storage {describe(key)} is of unknown class {describe(kind)}")
        found[key] = Storage((), -1, kind.qualname, str(location))
        reader.skip_storage(found[key], key)
    for target, root, offset, numel in (_fields(view, 4, "view") for view in reader.pickle()):
        itemsize = _DTYPE_OF[found[root].kind].itemsize
        start, stop = offset * itemsize, (offset + numel) * itemsize
        if not 0 <= start <= stop <= found[root].nbytes:
            raise CorruptCheckpointError(f"view {describe(target)} reaches past its storage {describe(root)}")
        found[target] = Storage(found[root].cut(start, stop), stop - start, found[root].kind, found[root].location)
    return found


def _tar_tensor(reader: _Reader, storage: Storage, key: object) -> LazyTensor:
    ndim = reader.number("i")
    if not 0 <= ndim <= 64:
        raise CorruptCheckpointError(f"tensor {describe(key)} has {ndim} dimensions", place=f"offset {reader.at}")
    reader.take(4)
    shape = tuple(reader.number("q") for _ in range(ndim))
    stride = tuple(reader.number("q") for _ in range(ndim))
    tensor = LazyTensor(storage, _DTYPE_OF[storage.kind].name, shape, stride, reader.number("q"))
    if min((*shape, *stride, tensor.offset), default=0) < 0 or tensor.span()[1] > storage.nbytes:
        raise CorruptCheckpointError(f"tensor {describe(key)} of shape {shape} reaches past its storage")
    return tensor


def _count(value: Any, reader: _Reader) -> int:
    if type(value) is not int or not 0 <= value <= reader.source.size:
        raise CorruptCheckpointError(f"a number of items is {describe(value)}"[:100], place=f"offset {reader.at}")
    return value


def _fields(value: Any, count: int, what: str) -> tuple[Any, ...]:
    if not isinstance(value, tuple) or len(value) != count:
        raise CorruptCheckpointError(f"a {what} is described by {describe(value)}"[:200])
    return value
