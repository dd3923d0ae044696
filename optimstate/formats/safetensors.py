"""The safetensors container: plain files of named tensors, shards with an index, and whole training checkpoints.

A plain file becomes a tree of one level. A whole checkpoint has, in the metadata entry `optimstate`, a JSON document

    {"version": 1, "tree": TREE, "storages": {ID: {"nbytes": N, "kind": CLASS, "location": DEVICE}}}

whose TREE (see `_json_tree`) refers to the file's tensors by name; any reader of safetensors still sees named tensors.
`{"$tensor": NAME}` may carry "dtype" (where safetensors has no code for it and the bytes are stored as another type),
"stride" and "offset" and "storage" (tensors of one storage share memory), "parameter", "requires_grad", "location",
"metadata" and "attributes" (what a program had set on the tensor), each only where it is not the default.

Format: https://huggingface.co/docs/safetensors (header of JSON, at most 100 MB; no holes, no overlaps).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.files import AtomicDirectory, AtomicFile, Extent, FileSource, copy_extents
from optimstate.formats import _json_tree
from optimstate.formats._protocol import Document, WriteOptions
from optimstate.state.sections import parameter_labels
from optimstate.tensors import DTYPES, LazyTensor, Storage, contiguous_strides
from optimstate.tree import AttributedTensor, format_path, tensors
from optimstate.tree import Path as TreePath

NAME = "safetensors"
SUFFIXES = (".safetensors",)

MAX_HEADER = 100_000_000
_BY_CODE = {row.safetensors: row for row in DTYPES.values() if row.safetensors}
MAX_GAPS = 1 << 30
_STORAGE_KINDS = {"UntypedStorage"} | {row.storage for row in DTYPES.values() if row.storage}
_SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}
_INDEX_SUFFIX = ".safetensors.index.json"


# --- reading --------------------------------------------------------------------------------------------------------


def sniff(path: Path, head: bytes) -> bool:
    """Whether a file begins with a safetensors header, or is the index of a sharded one."""
    if path.name.endswith(_INDEX_SUFFIX):
        return True
    if len(head) < 9:
        return path.suffix in SUFFIXES and path.is_file()
    (length,) = struct.unpack_from("<Q", head)
    return head[8:9] == b"{" and (length <= MAX_HEADER or path.suffix in SUFFIXES)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {name!r} is there twice")
    return made


def _read_header(source: FileSource) -> tuple[dict[str, Any], int]:
    """The header of a file and where its data begins."""
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > MAX_HEADER:
        raise LimitExceededError(f"a header of {length} bytes, over the limit of {MAX_HEADER}", path=source.path)
    try:
        header = json.loads(source.read(8, length), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CorruptCheckpointError):
            raise
        raise CorruptCheckpointError(
            f"the header cannot be read: {error}"[:300], path=source.path, place="header"
        ) from None
    if not isinstance(header, dict):
        raise CorruptCheckpointError("the header is no JSON object", path=source.path, place="header")
    return header, 8 + length


def _read_tensor(source: FileSource, base: int, name: str, entry: Any) -> LazyTensor:
    try:
        code, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not _are_natural((*shape, start, stop)) or not isinstance(code, str):
            raise ValueError("a size or offset is no natural number, or the dtype no text")
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptCheckpointError(f"the entry of {name!r} is malformed: {error!r}", path=source.path) from None
    if code not in _BY_CODE:
        kind = UnsupportedCheckpointError if code in _SUB_BYTE else CorruptCheckpointError
        raise kind(f"tensor {name!r} has dtype {code!r}", path=source.path)
    dtype = _BY_CODE[code]
    storage = Storage((Extent(source, base + start, stop - start),), stop - start, dtype.storage or "UntypedStorage")
    tensor = LazyTensor(storage, dtype.name, tuple(shape))
    if tensor.nbytes != stop - start:
        raise CorruptCheckpointError(
            f"tensor {name!r} of shape {shape} and dtype {code} has {tensor.nbytes} bytes, its range {stop - start}",
            path=source.path,
        )
    return tensor


def _read_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors in the order of the header, and the metadata."""
    source = FileSource(path)
    header, base = _read_header(source)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CorruptCheckpointError("__metadata__ is no mapping of strings", path=path, place="header")
    found = {name: _read_tensor(source, base, name, entry) for name, entry in header.items()}
    end = base
    for extent in sorted((tensor.storage.pieces[0] for tensor in found.values()), key=lambda e: (e.offset, e.length)):
        if extent.offset != end:
            raise CorruptCheckpointError("tensors overlap or leave a hole", path=path, place=f"offset {extent.offset}")
        end += extent.length
    if end != source.size:
        raise CorruptCheckpointError(
            f"the tensors end at byte {end}, the file has {source.size}",
            path=path,
            place=f"offset {end}",
            hint="The file is truncated or damaged; copy it again from its source.",
        )
    return found, metadata


def read(path: Path) -> Document:
    """Open a file, or all shards of an index.

    Raises:
        CheckpointError: It is damaged, or a shard is missing.
    """
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_sharded(path)
    found, metadata = _read_file(path)
    return _document(path, found, metadata)


def _document(path: Path, found: dict[str, LazyTensor], metadata: dict[str, str]) -> Document:
    rest = {key: value for key, value in metadata.items() if key != "optimstate"}
    if "optimstate" not in metadata:
        return Document(path, NAME, found, handle=rest)
    try:
        tree = _decode_checkpoint(json.loads(metadata["optimstate"]), found)
    except CheckpointError as error:
        raise type(error)(error.message, path=path, place="header entry 'optimstate'", hint=error.hint) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"the description of the tree is malformed: {error!r}"[:300]
        raise CorruptCheckpointError(message, path=path, place="header entry 'optimstate'") from error
    return Document(path, NAME, tree, handle=rest)


def read_index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Which file of an index holds each tensor, and the index's metadata of strings.

    Raises:
        CorruptCheckpointError: The index is malformed, or names a file outside its folder.
    """
    source = FileSource(path)
    try:
        index = json.loads(source.read(0, source.size))
        names = {str(name): str(file) for name, file in index["weight_map"].items()}
        metadata = {key: value for key, value in index.get("metadata", {}).items() if isinstance(value, str)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CorruptCheckpointError(f"the index cannot be read: {error!r}"[:300], path=path) from None
    for file in names.values():
        if Path(file).name != file:
            raise CorruptCheckpointError(f"the index names {file!r}, outside its folder", path=path)
    return names, metadata


def _read_sharded(path: Path) -> Document:
    weight_map, metadata = read_index(path)
    tree: dict[str, LazyTensor] = {}
    shards = {file: _read_file(path.parent / file) for file in dict.fromkeys(weight_map.values())}
    for file, (found, _) in shards.items():
        for name in found:
            if weight_map.get(name) != file:
                raise CorruptCheckpointError(f"{file} holds {name!r}, which the index does not place there", path=path)
    for name, file in weight_map.items():
        if name not in shards[file][0]:
            raise CorruptCheckpointError(f"{name!r} is not in {file}, where the index places it", path=path)
        tree[name] = shards[file][0][name]
    return _document(path, tree, metadata)


def _decode_checkpoint(document: Any, found: dict[str, LazyTensor]) -> Any:
    if document.get("version") != 1:
        raise CorruptCheckpointError(f"version {document.get('version')!r} of the checkpoint form is not known")
    members: dict[str, list[tuple[int, LazyTensor]]] = {}
    views: list[tuple[LazyTensor, str]] = []

    def tensor(node: dict[str, Any]) -> LazyTensor:
        stored = found[node["$tensor"]]
        dtype = node.get("dtype", stored.dtype)
        shape = tuple(node["shape"]) if "shape" in node else stored.shape
        stride = tuple(node["stride"]) if "stride" in node else contiguous_strides(shape)
        offset = node.get("offset", 0)
        if dtype not in DTYPES or len(shape) != len(stride) or not _are_natural((*shape, *stride, offset)):
            raise CorruptCheckpointError(
                f"tensor {node['$tensor']!r} is described with dtype {dtype!r}, shape {shape!r}, stride {stride!r} "
                f"and offset {offset!r}"
            )
        made = LazyTensor(
            stored.storage,
            dtype,
            shape,
            stride,
            offset,
            bool(node.get("requires_grad", False)),
            bool(node.get("parameter", False)),
            node.get("metadata"),
        )
        if "attributes" in node:
            made = AttributedTensor.of(made, _json_tree.decode(node["attributes"], _no_tensor))
        if made.nbytes != stored.nbytes:
            raise CorruptCheckpointError(
                f"tensor {node['$tensor']!r} has {stored.nbytes} bytes, described {made.nbytes}"
            )
        if "storage" in node:
            members.setdefault(node["storage"], []).append((made.span()[0], stored))
            views.append((made, node["storage"]))
        else:
            kind = DTYPES[dtype].storage or "UntypedStorage"
            made.storage = _laid_out(made, stored, kind, str(node.get("location", "cpu")))
        return made

    tree = _json_tree.decode(document["tree"], tensor)
    storages = document["storages"] if members else {}
    shared = {key: _assembled(storages[key], pieces) for key, pieces in members.items()}
    for made, key in views:
        made.storage = shared[key]
        if made.span()[1] > made.storage.nbytes:
            raise CorruptCheckpointError(f"a tensor reaches past its storage {key!r}")
    return tree


def _are_natural(numbers: Iterable[Any]) -> bool:
    return all(type(n) is int and n >= 0 for n in numbers)


def _check_gaps(total: int, stored: int) -> None:
    """What no tensor shows is not in the file, so a small file could declare any amount of it."""
    if total > max(MAX_GAPS, 100 * stored):
        raise LimitExceededError(f"a storage of {total} bytes, of which the file holds {stored}")


def _no_tensor(node: dict[str, Any]) -> LazyTensor:
    raise CorruptCheckpointError(f"an attribute is the tensor {node['$tensor']!r}")


def _laid_out(made: LazyTensor, stored: LazyTensor, kind: str, location: str) -> Storage:
    """The storage of a tensor alone in it, its elements put where its strides say."""
    _check_gaps(made.span()[1], made.nbytes)
    if made.is_contiguous() and made.offset == 0:
        return Storage(stored.storage.pieces, stored.nbytes, kind, location)
    return made.scattered(stored.storage, kind, location)


def _assembled(description: dict[str, Any], pieces: list[tuple[int, LazyTensor]]) -> Storage:
    """One storage from the row-major tensors that look into it; what none of them shows is zero."""
    extents: list[Extent] = []
    at = 0
    total, kind, location = description["nbytes"], description["kind"], description["location"]
    if not _are_natural([total]) or kind not in _STORAGE_KINDS or not isinstance(location, str):
        raise CorruptCheckpointError(f"a storage described as {description!r}"[:200])
    _check_gaps(total, sum(stored.nbytes for _, stored in pieces))
    for start, stored in sorted(pieces, key=lambda piece: (piece[0], -piece[1].nbytes)):
        if start > at:
            extents.append(Extent(None, 0, start - at))
            at = start
        if start + stored.nbytes > at:
            extents.extend(stored.storage.cut(at - start, stored.nbytes))
            at = start + stored.nbytes
    if at > total:
        raise CorruptCheckpointError(f"tensors of {at} bytes in a storage of {total}")
    if at < total:
        extents.append(Extent(None, 0, total - at))
    return Storage(tuple(extents), total, kind, location)


# --- writing --------------------------------------------------------------------------------------------------------


class _Entry(NamedTuple):
    name: str
    tensor: LazyTensor
    code: str
    shape: tuple[int, ...]


# What stands in for a dtype the format has no code for: the code, and the trailing dimension that keeps the size.
_STAND_INS: dict[str, tuple[str, tuple[int, ...]]] = {
    "complex128": ("F64", (2,)),
    "complex32": ("F16", (2,)),
    "quint8": ("U8", ()),
    "qint8": ("I8", ()),
    "qint32": ("I32", ()),
    "quint4x2": ("U8", ()),
    "quint2x4": ("U8", ()),
    "float4_e2m1fn_x2": ("U8", ()),
}


def write(tree: Any, path: Path, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a tree as one file, or with a shard size as a folder of shards with an index.

    Raises:
        RepresentationError: The tree holds an object or shared memory the container cannot express.
    """
    options = options or WriteOptions()
    layout = _Layout(tree, options)
    metadata = {"format": "pt", **layout.metadata}
    if like is not None and like.format == NAME and isinstance(like.handle, dict):
        metadata = {**like.handle, **metadata}
    if path.name.endswith(_INDEX_SUFFIX):
        _write_shards(_shards_by_origin(layout.entries), metadata, path, options)
    elif options.shard_size is None:
        _write_file(layout.entries, metadata, path, options)
    else:
        with AtomicDirectory(path) as folder:
            shards = _shards_by_size(layout.entries, options.shard_size)
            if len(shards) == 1:
                _write_file(layout.entries, metadata, folder / "model.safetensors", options)
            else:
                _write_shards(shards, metadata, folder / f"model{_INDEX_SUFFIX}", options)
    return layout.notes


class _Layout:
    """Names for the tensors of a tree and the metadata that restores everything else."""

    def __init__(self, tree: Any, options: WriteOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        self.labels = parameter_labels(tree)
        self.names: dict[tuple[Any, ...], str] = {}
        self.used: set[str] = set()
        self.storage_ids: dict[int, str] = {}
        self.shared = _shared_storages(tree, clone=options.clone_views)
        self.storages: dict[str, dict[str, Any]] = {}
        self.entries: list[_Entry] = []
        encoded = _json_tree.encode(tree, self._tensor, self._dropped if options.drop_opaque else None)
        in_order = [entry.name for entry in self.entries]
        # Larger items first: every tensor is then aligned to its item size, whatever stands before it.
        self.entries.sort(key=lambda entry: -DTYPES[_BY_CODE[entry.code].name].itemsize)
        plain = encoded == {name: {"$tensor": name} for name in in_order} and in_order == [e.name for e in self.entries]
        self.metadata: dict[str, str] = {}
        if not plain:
            document = {"version": 1, "tree": encoded, "storages": self.storages}
            self.metadata["optimstate"] = json.dumps(document, separators=(",", ":"), allow_nan=False)

    def _dropped(self, _: TreePath, what: str) -> None:
        self.notes.append(f"left out: {what}")

    def _tensor(self, path: TreePath, tensor: LazyTensor) -> dict[str, Any]:
        shared = not self.options.clone_views and id(tensor.storage) in self.shared
        view = (
            (id(tensor.storage), tensor.dtype, tensor.shape, tensor.stride, tensor.offset)
            if shared
            else (id(tensor), path)
        )
        if view not in self.names:
            self.names[view] = self._name(path)
            code = DTYPES[tensor.dtype].safetensors
            code, trailing = (code, ()) if code else _STAND_INS[tensor.dtype]
            self.entries.append(_Entry(self.names[view], tensor, code, (*tensor.shape, *trailing)))
        node: dict[str, Any] = {"$tensor": self.names[view]}
        if not DTYPES[tensor.dtype].safetensors:
            node["dtype"] = tensor.dtype
            node["shape"] = list(tensor.shape)
        if tensor.stride != contiguous_strides(tensor.shape):
            node["stride"] = list(tensor.stride)
        if shared:
            node["offset"] = tensor.offset
            node["storage"] = self._storage(tensor.storage)
        elif tensor.storage.location != "cpu":
            node["location"] = tensor.storage.location
        if tensor.is_parameter:
            node["parameter"] = True
        if tensor.requires_grad:
            node["requires_grad"] = True
        if tensor.metadata:
            node["metadata"] = tensor.metadata
        if isinstance(tensor, AttributedTensor):
            node["attributes"] = _json_tree.encode(dict(tensor.attributes), self._tensor)
        return node

    def _storage(self, storage: Storage) -> str:
        key = self.storage_ids.setdefault(id(storage), str(len(self.storage_ids)))
        self.storages[key] = {"nbytes": storage.nbytes, "kind": storage.kind, "location": storage.location}
        return key

    def _name(self, path: TreePath) -> str:
        parts = [self.labels.get(path[: i + 1], str(key)) for i, key in enumerate(path)]
        name = base = ".".join(parts) or "tensor"
        count = 1
        while name in self.used or name == "__metadata__":
            count += 1
            name = f"{base}~{count}"
        self.used.add(name)
        return name


def _shared_storages(tree: Any, *, clone: bool) -> set[int]:
    """The storages that several tensors of the tree look into.

    Raises:
        RepresentationError: One of them is not contiguous, so that the bytes around it would be lost.
    """
    users: dict[int, list[tuple[TreePath, LazyTensor]]] = {}
    for path, tensor in tensors(tree):
        users.setdefault(id(tensor.storage), []).append((path, tensor))
    shared = {key: members for key, members in users.items() if len(members) > 1}
    if not clone:
        for members in shared.values():
            for path, tensor in members:
                if not tensor.is_contiguous():
                    other = next(place for place, found in members if found is not tensor or place != path)
                    raise RepresentationError(
                        f"{format_path(path)} is a strided view of memory it shares with {format_path(other)}, "
                        "which safetensors cannot express",
                        hint="Give --clone-views to store each tensor on its own.",
                    )
    return set(shared)


def _header(entries: list[_Entry], metadata: dict[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        stop = at + entry.tensor.nbytes
        header[entry.name] = {"dtype": entry.code, "shape": entry.shape, "data_offsets": (at, stop)}
        at = stop
    data = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")
    data += b" " * (-len(data) % 8)
    if len(data) > MAX_HEADER:
        raise RepresentationError(
            f"the header would have {len(data)} bytes, over safetensors' limit of {MAX_HEADER}",
            hint="Give --shard-size to spread the tensors over several files.",
        )
    return struct.pack("<Q", len(data)) + data


def _write_file(entries: list[_Entry], metadata: dict[str, str], path: Path, options: WriteOptions) -> None:
    header = _header(entries, metadata)
    with AtomicFile(
        path,
        expected_size=len(header) + sum(entry.tensor.nbytes for entry in entries),
        sync=options.sync,
    ) as out:
        out.write(header)
        pieces: Iterator[Extent] = (extent for entry in entries for extent in entry.tensor.extents())
        copy_extents(pieces, out.fd, progress=options.progress)


def _shards_by_size(entries: list[_Entry], shard_size: int) -> dict[str, list[_Entry]]:
    """Consecutive tensors per file, as many as fit; a larger one has a file of its own."""
    shards: list[list[_Entry]] = [[]]
    room = shard_size
    for entry in entries:
        if shards[-1] and entry.tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(entry)
        room -= entry.tensor.nbytes
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _shards_by_origin(entries: list[_Entry]) -> dict[str, list[_Entry]]:
    """Each tensor in a file of the name it was read from."""
    shards: dict[str, list[_Entry]] = {}
    for entry in entries:
        source = entry.tensor.storage.pieces[0].source
        assert isinstance(source, FileSource)
        shards.setdefault(source.path.name, []).append(entry)
    return shards


def _write_shards(
    shards: dict[str, list[_Entry]], metadata: dict[str, str], index: Path, options: WriteOptions
) -> None:
    """The files beside `index`, then the index itself."""
    for file, entries in shards.items():
        _write_file(entries, {"format": "pt"}, index.parent / file, options)
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    total = sum(entry.tensor.nbytes for entries in shards.values() for entry in entries)
    with AtomicFile(index, sync=options.sync) as out:
        document = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
        out.write(json.dumps(document, indent=1).encode())
