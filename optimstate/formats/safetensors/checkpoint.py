"""Whole training checkpoints in safetensors files: everything that is not a named tensor goes into the metadata.

The metadata entry `optimstate` is a JSON document

    {"version": 1, "tree": TREE, "storages": {ID: {"nbytes": N, "kind": CLASS, "location": DEVICE}}}

whose TREE (see `json_tree`) refers to the file's tensors by name; any reader of safetensors still sees named tensors.
`{"$tensor": NAME}` may have "dtype" (if safetensors has no code for it and the bytes are stored as another type),
"stride", "offset" and "storage" (tensors with the same storage share memory), "parameter", "requires_grad", "location",
"metadata" and "attributes" (Python attributes of the tensor), each only if it is not the default.
"""

from __future__ import annotations

import json
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, LimitExceededError, RepresentationError
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.pruning import LostStorage
from optimstate.formats.safetensors import json_tree
from optimstate.formats.safetensors.file import BY_CODE, Entry, are_natural
from optimstate.io.extents import Extent
from optimstate.state.sections import parameter_labels
from optimstate.tensors.compute import resolved
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, contiguous_strides
from optimstate.tree import AttributedTensor, format_path, tensors
from optimstate.tree import Path as TreePath

__all__ = ["Layout", "decode_checkpoint"]

MAX_GAPS = 1 << 30
_STORAGE_KINDS = {"UntypedStorage"} | {row.storage for row in DTYPES.values() if row.storage}


# --- reading ----------------------------------------------------------------------------------------------------------


def decode_checkpoint(document: Any, found: dict[str, LazyTensor]) -> Any:
    """The tree that a checkpoint document describes, with the file's tensors in it.

    Raises:
        CorruptCheckpointError: The document contradicts itself or the tensors.
    """
    if document.get("version") != 1:
        raise CorruptCheckpointError(f"unknown version {describe(document.get('version'))} of the checkpoint form")
    members: dict[str, list[tuple[int, LazyTensor]]] = {}
    views: list[tuple[LazyTensor, str]] = []

    def tensor(node: dict[str, Any]) -> LazyTensor:
        stored = found[node["$tensor"]]
        if isinstance(stored.storage, LostStorage):
            return stored
        dtype = node.get("dtype", stored.dtype)
        shape = tuple(node["shape"]) if "shape" in node else stored.shape
        stride = tuple(node["stride"]) if "stride" in node else contiguous_strides(shape)
        offset = node.get("offset", 0)
        if dtype not in DTYPES or len(shape) != len(stride) or not are_natural((*shape, *stride, offset)):
            raise CorruptCheckpointError(
                f"tensor {describe(node['$tensor'])} is described with dtype {describe(dtype)}, "
                f"shape {describe(shape)}, "
                f"stride {describe(stride)} and offset {describe(offset)}"
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
            made = AttributedTensor.of(made, json_tree.decode(node["attributes"], _no_tensor))
        if made.nbytes != stored.nbytes:
            raise CorruptCheckpointError(
                f"tensor {describe(node['$tensor'])} has {stored.nbytes} bytes, described {made.nbytes}"
            )
        if "storage" in node:
            members.setdefault(node["storage"], []).append((made.span()[0], stored))
            views.append((made, node["storage"]))
        else:
            made.storage = _laid_out(made, stored, DTYPES[dtype].storage_class, str(node.get("location", "cpu")))
        return made

    tree = json_tree.decode(document["tree"], tensor)
    storages = document["storages"] if members else {}
    shared = {key: _assembled(storages[key], pieces) for key, pieces in members.items()}
    for made, key in views:
        made.storage = shared[key]
        if made.span()[1] > made.storage.nbytes:
            raise CorruptCheckpointError(f"a tensor reaches past its storage {describe(key)}")
    return tree


def _check_gaps(total: int, stored: int) -> None:
    """Refuse a storage with too many bytes outside of all tensors, which a small file could declare without storing."""
    if total > max(MAX_GAPS, 100 * stored):
        raise LimitExceededError(f"a storage of {total} bytes, of which the file holds {stored}")


def _no_tensor(node: dict[str, Any]) -> LazyTensor:
    raise CorruptCheckpointError(f"an attribute is the tensor {describe(node['$tensor'])}")


def _laid_out(made: LazyTensor, stored: LazyTensor, kind: str, location: str) -> Storage:
    """A storage for one tensor, with the stored elements at the positions given by its strides."""
    _check_gaps(made.span()[1], made.nbytes)
    if made.is_contiguous() and made.offset == 0:
        return Storage(stored.storage.pieces, stored.nbytes, kind, location)
    return made.scattered(stored.storage, kind, location)


def _assembled(description: dict[str, Any], pieces: list[tuple[int, LazyTensor]]) -> Storage:
    """A storage made of the row-major tensors that share it; bytes outside of them are zero."""
    extents: list[Extent] = []
    at = 0
    total, kind, location = description["nbytes"], description["kind"], description["location"]
    if not are_natural([total]) or kind not in _STORAGE_KINDS or not isinstance(location, str):
        raise CorruptCheckpointError(f"a storage described as {describe(description)}"[:200])
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


# --- writing ----------------------------------------------------------------------------------------------------------


# For dtypes without a code in the format: the code to store them as, and a trailing dimension that keeps the size.
_STAND_INS: dict[str, tuple[str, tuple[int, ...]]] = {
    "complex128": ("F64", (2,)),
    "complex32": ("F16", (2,)),
    "bcomplex32": ("BF16", (2,)),
    "quint8": ("U8", ()),
    "qint8": ("I8", ()),
    "qint32": ("I32", ()),
    "quint4x2": ("U8", ()),
    "quint2x4": ("U8", ()),
    "bits8": ("U8", ()),
    "bits16": ("U16", ()),
    "bits1x8": ("U8", ()),
    "bits2x4": ("U8", ()),
    "bits4x2": ("U8", ()),
    **{f"{kind}{bits}": ("U8", ()) for kind in ("int", "uint") for bits in range(1, 8)},
}


class Layout:
    """Names for the tensors of a tree, and the metadata from which everything else is restored."""

    def __init__(self, tree: Any, options: WriteOptions) -> None:
        self.options = options
        self.notes: list[str] = []
        self.metadata: dict[str, str] = {}
        plain = _plain_entries(tree, options)
        if plain is not None:
            self.entries = plain
            return
        self.labels = parameter_labels(tree)
        self.names: dict[tuple[Any, ...], str] = {}
        self.used: set[str] = set()
        self.storage_ids: dict[int, str] = {}
        self.shared = _shared_storages(tree, clone=options.clone_views)
        self.storages: dict[str, dict[str, Any]] = {}
        self.resolved: dict[int, LazyTensor] = {}
        self.entries = []
        encoded = json_tree.encode(tree, self._tensor, self.notes.append)
        # Larger items first, so that every tensor is aligned to its item size.
        self.entries.sort(key=lambda entry: -DTYPES[BY_CODE[entry.code].name].itemsize)
        document = {"version": 1, "tree": encoded, "storages": self.storages}
        self.metadata["optimstate"] = json.dumps(document, separators=(",", ":"), allow_nan=False)

    def _tensor(self, path: TreePath, tensor: LazyTensor) -> dict[str, Any]:
        if tensor.flags:
            tensor = self.resolved.setdefault(id(tensor), resolved(tensor))
        shared = not self.options.clone_views and id(tensor.storage) in self.shared
        view = (
            (id(tensor.storage), tensor.dtype, tensor.shape, tensor.stride, tensor.offset)
            if shared
            else (id(tensor), path)
        )
        if view not in self.names:
            self.names[view] = self._name(path)
            self.entries.append(Entry(self.names[view], tensor, *_code_and_shape(tensor)))
        node: dict[str, Any] = {"$tensor": self.names[view]}
        if BY_CODE[_code_and_shape(tensor)[0]].name != tensor.dtype:
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
            node["attributes"] = json_tree.encode(dict(tensor.attributes), self._tensor)
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


def _plain_entries(tree: Any, options: WriteOptions) -> list[Entry] | None:
    """The tensors of a tree if a plain file says everything about it, and can have them in this order; else None."""
    if type(tree) is not dict:
        return None
    made: list[Entry] = []
    largest = max((row.itemsize for row in DTYPES.values()), default=0)
    for name, tensor in tree.items():
        if type(name) is not str or name.startswith("$") or name == "__metadata__" or type(tensor) is not LazyTensor:
            return None
        code, shape = _code_and_shape(tensor)
        row = BY_CODE[code]
        if (
            row.name != tensor.dtype
            or row.itemsize > largest
            or tensor.stride != contiguous_strides(tensor.shape)
            or tensor.storage.location != "cpu"
            or tensor.is_parameter
            or tensor.requires_grad
            or tensor.metadata
        ):
            return None
        largest = row.itemsize
        made.append(Entry(name, tensor, code, shape))
    shares = len({id(entry.tensor.storage) for entry in made}) < len(made)
    return None if shares and not options.clone_views else made


def _code_and_shape(tensor: LazyTensor) -> tuple[str, tuple[int, ...]]:
    """The code of a tensor's dtype and its shape, as written in the header."""
    row, shape = DTYPES[tensor.dtype], tensor.shape
    if row.safetensors and row.packed == 1:
        return row.safetensors, shape
    if row.safetensors and shape:
        return row.safetensors, (*shape[:-1], shape[-1] * row.packed)
    code, trailing = _STAND_INS.get(tensor.dtype, ("U8", (row.itemsize,)))
    return code, (*shape, *trailing)


def _shared_storages(tree: Any, *, clone: bool) -> set[int]:
    """The ids of the storages that several tensors of the tree share.

    Raises:
        RepresentationError: One of these tensors is not contiguous, which the format cannot express.
    """
    users: dict[int, list[tuple[TreePath, LazyTensor]]] = {}
    for path, tensor in tensors(tree):
        if tensor.flags:
            continue  # it gets a storage of its own when it is written
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
