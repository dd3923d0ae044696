"""The `.metadata` of `torch.distributed.checkpoint`: a pickle that says which items there are and where they are.

It is read from inert records and written as the same records, so that no class of torch is needed for either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.formats.pickles.pickle import dump
from optimstate.formats.pickles.unpickle import load
from optimstate.record import Record
from optimstate.tensors.dtypes import DTYPES, check_sizes
from optimstate.tree import GlobalName, Opaque, Path

__all__ = ["Item", "Metadata", "TensorItem", "dump_metadata", "load_metadata", "merged"]

_MODULE = "torch.distributed.checkpoint.metadata"
_VERSION = "1.0.0"


class Item(Record):
    """Where one item is: a file of the folder, an offset and a length."""

    file: str
    offset: int
    length: int


class TensorItem(Record):
    """A tensor and its chunks: offsets and sizes per dimension, with the item of each."""

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], Item], ...]


@dataclass
class Metadata:
    """What `.metadata` says.

    Attributes:
        tensors: By name.
        objects: Items that are no tensors, by name.
        order: All names, as in the file.
        paths: For each name the keys that lead to it in the saved state dict; empty where the file has none.
    """

    tensors: dict[str, TensorItem] = field(default_factory=dict)
    objects: dict[str, Item] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    paths: dict[str, Path] = field(default_factory=dict)


# --- reading --------------------------------------------------------------------------------------------------------


def load_metadata(data: bytes) -> tuple[Metadata, list[tuple[str, str]]]:
    """Read the pickle inertly.

    Returns:
        What it says, and every global it mentions.

    Raises:
        CheckpointError: It is damaged, hostile, or of a form that is not known.
    """
    tree, names = load(data)
    try:
        return _metadata(tree), names
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CorruptCheckpointError(f"the metadata is malformed: {describe(error)}"[:300]) from error


def merged(ranks: Sequence[Metadata], path: FilePath) -> tuple[Metadata, list[str]]:
    """The metadata of all ranks from that of each.

    Of an item that is no tensor, and of a part that several ranks have, the first rank's is taken, as torch does where
    ranks save together.

    Args:
        ranks: In the order of the ranks.
        path: The folder, for messages.

    Returns:
        The whole, and notes for people.

    Raises:
        CorruptCheckpointError: The ranks contradict one another about a tensor.
    """
    made = Metadata()
    for rank in ranks:
        made.paths = {**rank.paths, **made.paths}
        made.objects = {**rank.objects, **made.objects}
        for name, tensor in rank.tensors.items():
            known = made.tensors.get(name, tensor)
            if (known.dtype, known.shape) != (tensor.dtype, tensor.shape):
                raise CorruptCheckpointError(
                    f"tensor {describe(name)} is {known.dtype}{list(known.shape)} in the metadata of one rank and "
                    f"{tensor.dtype}{list(tensor.shape)} in that of another",
                    path=path,
                    hint="The folder holds files of several checkpoints.",
                )
            boxes = {(offsets, sizes): item for offsets, sizes, item in (*tensor.chunks, *known.chunks)}
            made.tensors[name] = known._replace(chunks=tuple((*box, item) for box, item in boxes.items()))
    made.order = list(dict.fromkeys(name for rank in ranks for name in rank.order))
    clash = made.objects.keys() & made.tensors.keys()
    if clash:
        raise CorruptCheckpointError(
            f"item {describe(min(clash))} is a tensor for one rank and none for another", path=path
        )
    notes = [f"the metadata of {len(ranks)} ranks is put together"]
    if made.objects:
        notes.append(f"what is no tensor is the first rank's: {', '.join(sorted(made.objects)[:5])}")
    return made, notes


def _metadata(tree: Any) -> Metadata:
    if not isinstance(tree, Opaque) or tree.type.qualname != "Metadata":
        raise CorruptCheckpointError(f"the metadata is {describe(tree)}"[:200])
    fields = tree.state
    places: dict[tuple[str, tuple[int, ...] | None], Item] = {}
    for index, info in (fields["storage_data"] or {}).items():
        offset = index.state.get("offset")
        places[index.state["fqn"], None if offset is None else _size(offset)] = _item(index.state["fqn"], info.state)
    made = Metadata()
    for name, entry in fields["state_dict_metadata"].items():
        made.order.append(name)
        if entry.type.qualname == "TensorStorageMetadata":
            made.tensors[name] = _tensor_item(name, entry.state, places)
        elif (name, None) in places:
            made.objects[name] = places[name, None]
        else:
            raise CorruptCheckpointError(f"item {describe(name)} has no place in any file")
    paths = fields.get("planner_data")
    if isinstance(paths, Mapping):
        made.paths = {name: tuple(path) for name, path in paths.items()}
    return made


def _item(name: str, info: Mapping[str, Any]) -> Item:
    transforms = info.get("transform_descriptors")
    if transforms:
        raise UnsupportedCheckpointError(
            f"item {describe(name)} went through {', '.join(map(str, transforms))} when it was written",
            hint="Load it with torch and save it without extensions.",
        )
    file, offset, length = info["relative_path"], info["offset"], info["length"]
    if type(file) is not str or "/" in file or "\\" in file or file in ("", ".", ".."):
        raise CorruptCheckpointError(f"item {describe(name)} is said to be in {describe(file)}, outside the folder")
    if type(offset) is not int or type(length) is not int or offset < 0 or length < 0:
        raise CorruptCheckpointError(
            f"item {describe(name)} is said to be at {describe(offset)}, {describe(length)} bytes long"
        )
    return Item(file, offset, length)


def _tensor_item(
    name: str, fields: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...] | None], Item]
) -> TensorItem:
    dtype, _, requires_grad, *_ = fields["properties"].state
    if not isinstance(dtype, GlobalName) or dtype.qualname not in DTYPES:
        raise UnsupportedCheckpointError(f"tensor {describe(name)} has dtype {describe(dtype)}")
    chunks: dict[tuple[tuple[int, ...], tuple[int, ...]], Item] = {}
    for chunk in fields["chunks"]:
        offsets, sizes = _size(chunk.state["offsets"]), _size(chunk.state["sizes"])
        if (name, offsets) not in places:
            raise CorruptCheckpointError(f"the piece of tensor {describe(name)} at {offsets} has no place in any file")
        chunks[offsets, sizes] = places[name, offsets]  # a copy on another rank may be listed too
    listed = tuple((*box, item) for box, item in chunks.items())
    return TensorItem(dtype.qualname, _size(fields["size"]), requires_grad is True, listed)


def _size(value: Any) -> tuple[int, ...]:
    numbers = value.arguments[0] if isinstance(value, Opaque) else value
    if not isinstance(numbers, tuple | list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise CorruptCheckpointError(f"a size or offset is {describe(numbers)}"[:200])
    check_sizes(numbers, len(numbers))
    return tuple(numbers)


# --- writing --------------------------------------------------------------------------------------------------------


def dump_metadata(metadata: Metadata) -> bytes:
    """The pickle that torch reads."""
    return dump(_Records().metadata(metadata))


class _Records:
    """Records of torch's classes; each class and each constant is one object, as pickles share them."""

    def __init__(self) -> None:
        self.classes: dict[tuple[str, str], GlobalName] = {}
        self.constants: dict[tuple[str, str, Any], Opaque] = {}

    def named(self, module: str, name: str) -> GlobalName:
        key = (module, name)
        if key not in self.classes:
            self.classes[key] = GlobalName(module, name)
        return self.classes[key]

    def called(self, module: str, name: str, argument: Any) -> Opaque:
        key = (module, name, argument)
        if key not in self.constants:
            self.constants[key] = self.named(module, name)(argument)
        return self.constants[key]

    def instance(self, name: str, state: Any, module: str = _MODULE) -> Opaque:
        record = self.named(module, name).record()
        record.state = state
        return record

    def size(self, numbers: tuple[int, ...]) -> Opaque:
        return self.called("torch", "Size", numbers)

    def metadata(self, metadata: Metadata) -> Opaque:
        entries: dict[str, Opaque] = {}
        storage: dict[Opaque, Opaque] = {}
        for name in metadata.order:
            tensor = metadata.tensors.get(name)
            if tensor is None:
                entries[name] = self.named(_MODULE, "BytesStorageMetadata").record()
                storage[self.index(name, None, None)] = self.storage_info(metadata.objects[name])
                continue
            entries[name] = self.tensor(tensor)
            for number, (offsets, _, item) in enumerate(tensor.chunks):
                storage[self.index(name, offsets, number)] = self.storage_info(item)
        fields = {
            "state_dict_metadata": entries,
            "planner_data": dict(metadata.paths),
            "storage_data": storage,
            "storage_meta": None,
            "version": _VERSION,
        }
        return self.instance("Metadata", fields)

    def tensor(self, tensor: TensorItem) -> Opaque:
        properties = (
            self.named("torch", tensor.dtype),
            self.called("torch.serialization", "_get_layout", "torch.strided"),
            tensor.requires_grad,
            self.called(_MODULE, "_MEM_FORMAT_ENCODING", 0),
            False,
        )
        chunks = [
            self.instance("ChunkStorageMetadata", {"offsets": self.size(offsets), "sizes": self.size(sizes)})
            for offsets, sizes, _ in tensor.chunks
        ]
        fields = {
            "properties": self.instance("TensorProperties", properties),
            "size": self.size(tensor.shape),
            "chunks": chunks,
        }
        return self.instance("TensorStorageMetadata", fields)

    def index(self, name: str, offsets: tuple[int, ...] | None, number: int | None) -> Opaque:
        offset = None if offsets is None else self.size(offsets)
        return self.instance("MetadataIndex", {"fqn": name, "index": number, "offset": offset})

    def storage_info(self, item: Item) -> Opaque:
        fields = {"relative_path": item.file, "offset": item.offset, "length": item.length}
        return self.instance("_StorageInfo", fields, "torch.distributed.checkpoint.filesystem")
