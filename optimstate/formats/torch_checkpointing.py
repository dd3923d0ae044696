"""Folders of Meta's `torch_checkpointing` (0.1): each item has a file for each rank, `model_0.pt`, `optimizer_0.pt`.

For runs that can be resumed on another number of ranks, `metadata.pkl` describes which part of which tensor each file
has and which files each item has. Optimizers are keyed by name, and their groups have `param_names` but no `params`:
they are read as the package's `optimizer_transform_post` converts them for `torch.optim`, and written as its
`optimizer_transform_pre` converts them back. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    RepresentationError,
    UnrecognizedFormatError,
    UnsupportedCheckpointError,
)
from optimstate.formats.folder import copied
from optimstate.formats.named_optimizers import FORM_VERSION, by_name, is_optimizer, numbered
from optimstate.formats.pickles.pickle import dump
from optimstate.formats.protocol import Claim, Document, WriteOptions, malformed
from optimstate.formats.ranks.files import join_ranks
from optimstate.formats.ranks.shards import is_sharded
from optimstate.formats.registry import detect, get_format
from optimstate.formats.torch import pickle_file
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.io.places import beginning, located
from optimstate.record import Record
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import OpaqueFile, difference, nodes

__all__ = ["NAME", "SUFFIXES", "read", "sniff", "write"]

NAME = "torch-checkpointing"
SUFFIXES: tuple[str, ...] = ()
OPTIONS = frozenset({"checksums"})

_METADATA = "metadata.pkl"
_MARK = b"rank_to_layout_info"
_ITEM_FILE = re.compile(r"(?P<item>.+)_(?P<rank>\d+)\.pt")
_ITEM = re.compile(r"[\w-]+")
_MAX_RANKS = 1 << 20
_HEAD = 1 << 24  # bytes of an optimizer's file that are searched for `FORM_VERSION`
_SHARDED = "DTensorShardingMetadata"


class _Layout(Record):
    """The items of a folder.

    Attributes:
        files: For each item the files of the ranks, relative to the folder, in the order of the ranks.
        kinds: For each item how `metadata.pkl` describes its tensors: see `_kind`.
    """

    files: Mapping[str, Sequence[str]]
    kinds: Mapping[str, frozenset[str]]


# --- reading --------------------------------------------------------------------------------------------------------


def sniff(path: Location, head: bytes) -> Claim:
    """Certain of a folder with a `metadata.pkl` of this package, or with rank files with an optimizer in its form."""
    if head or not path.is_dir():
        return Claim.NO
    first = [file for file in path.glob("*_0.pt") if file.is_file()]
    if (path / _METADATA).is_file():
        return Claim.CERTAIN if _is_ours(path / _METADATA, damaged=bool(first)) else Claim.NO
    has_form = any(FORM_VERSION.encode() in beginning(file, _HEAD) for file in first)
    return Claim.CERTAIN if has_form else Claim.NO


def _is_ours(metadata: Location, *, damaged: bool) -> bool:
    """Whether a file is the metadata of such a folder; the answer for one that cannot be read is `damaged`."""
    if _MARK in beginning(metadata, _HEAD):
        return True
    try:
        tree = pickle_file.read(metadata).tree
    except CheckpointError:
        return damaged
    return isinstance(tree, dict) and {"metadata", "world_size", "version"} <= tree.keys()


def read(path: Location) -> Document:
    """Open the items of all ranks.

    Raises:
        CheckpointError: A file is missing or damaged, the ranks' parts are of different runs, or their form is not
            supported.
    """
    paths = sorted(_files(path))
    layout = _layout(path, paths)
    document = Document(path, NAME, {}, handle=layout)
    taken = {_METADATA}
    for item, files in layout.files.items():
        part = _item(path, item, files, layout.kinds.get(item, frozenset()))
        taken.update(files)
        document.tree[item] = numbered(part.tree, item, path)
        document.parts[item] = part
    for name in paths:
        if name not in taken:
            _add_file(document, name)
    document.mention_parts()
    return document


def _files(folder: Location, prefix: str = "") -> Iterator[str]:
    for file in listed(folder):
        if file.is_dir():
            yield from _files(file, f"{prefix}{file.name}/")
        else:
            yield prefix + file.name


def _add_file(document: Document, name: str) -> None:
    """Add a file that belongs to no item, under its name."""
    file = document.path / name
    found = detect(file)
    if found is None:
        document.tree[name] = OpaqueFile(str(file), file.stat().st_size)
    else:
        document.parts[name] = part = found.read(file)
        document.tree[name] = part.tree


def _layout(path: Location, paths: Sequence[str]) -> _Layout:
    """The items described by `metadata.pkl`, and those found by the names of rank files."""
    found: dict[str, dict[int, str]] = {}
    for name in paths:
        match = _ITEM_FILE.fullmatch(name)
        if match and int(match["rank"]) < _MAX_RANKS:
            found.setdefault(match["item"], {})[int(match["rank"])] = name
    world, kinds = 1 + max((rank for files in found.values() for rank in files), default=0), {}
    if _METADATA in paths:
        world, items = _metadata(path / _METADATA)
        for item, (layouts, kind) in items.items():
            kinds[item] = kind
            found[item] = {rank: file or f"{item}_{rank}.pt" for rank, file in layouts.items()}
    made: dict[str, list[str]] = {}
    for item, files in found.items():
        missing = [files[rank] for rank in files if files[rank] not in paths]
        missing += [f"{item}_{rank}.pt" for rank in range(max(files) + 1) if rank not in files]
        if missing or max(files) >= world:
            what = f"{missing[0]} is missing" if missing else f"rank {max(files)} of {world} ranks"
            hint = "The files of all ranks must be in one folder."
            raise CorruptCheckpointError(f"item {describe(item)}: {what}", path=path, hint=hint)
        made[item] = [files[rank] for rank in sorted(files)]
    return _Layout(made, kinds)


def _metadata(path: Location) -> tuple[int, dict[str, tuple[dict[int, str | None], frozenset[str]]]]:
    """The number of ranks, and for each item the file of each rank (None: the default name) and its kinds."""
    tree = pickle_file.read(path).tree
    with malformed("the metadata cannot be read", path=path):
        version, world = tree["version"], tree["world_size"]
        if version != "2.0":
            hint = "Load it with torch_checkpointing and save it again."
            raise UnsupportedCheckpointError(f"metadata of version {describe(version)}", path=path, hint=hint)
        items = {}
        for item, about in tree["metadata"].items():
            files = {int(rank): _file_of(layout) for rank, layout in about["rank_to_layout_info"].items()}
            groups = (group for found in about["nested_path_to_metadata"].values() for group in found)
            kinds = {_kind(group["sharding_metadata"]) for group in groups}
            items[str(item)] = files, frozenset(kinds)
        if not all(0 <= rank < _MAX_RANKS for files, _ in items.values() for rank in files):
            raise ValueError("a rank is out of range")
    return int(world), items


def _file_of(layout: Any) -> str | None:
    if layout is None:
        return None
    name = str(layout["file_path"])
    if name.startswith("/") or ".." in Path(name).parts:
        raise ValueError(f"{describe(name)} is outside the folder")
    return Path(name).as_posix()


def _kind(metadata: Mapping[str, Any]) -> str:
    """`replicated`, `sharded`, or the type of an unknown kind of metadata."""
    if metadata["type"] != _SHARDED:
        return str(metadata["type"])
    placements = {placement["type"] for placement in metadata["data"]["placements"]}
    return "replicated" if placements <= {"Replicate"} else "sharded"


def _item(path: Location, item: str, files: Sequence[str], kinds: frozenset[str]) -> Document:
    """An item, put together from the files of its ranks."""
    parts = {name: _opened(path / name) for name in files}
    first = next(iter(parts.values()))
    trees = [part.tree for part in parts.values()]
    sharded = any(is_sharded(node) for node in nodes(trees[0]))
    if len(parts) == 1 and not sharded:
        return first
    unread = kinds - {"replicated", "sharded"}
    if unread or ("sharded" in kinds and not sharded):
        what = f"described as {min(unread)}" if unread else "stored without saying which part of the whole they are"
        raise UnsupportedCheckpointError(
            f"item {describe(item)}: its tensors are {what}, and are in the files of {len(files)} ranks",
            path=path,
            hint="Load it with torch_checkpointing and save it with the default layout, or as a full state.",
        )
    if sharded:
        return join_ranks(path / item, parts)
    joined = Document(path / item, first.format, first.tree, parts=dict(parts))
    for part in parts.values():
        joined.mention(part.globals)
        joined.notes += part.notes
    if any(difference(trees[0], tree) is not None for tree in trees[1:]):
        joined.tree = {f"rank{rank}": tree for rank, tree in enumerate(trees)}
        joined.notes.append("differs from rank to rank and is kept for each")
    return joined


def _opened(file: Location) -> Document:
    found = detect(file)
    if found is None and file.suffix in torch_zip.SUFFIXES:
        raise UnrecognizedFormatError("not a file of torch.save, which its name says it is", path=file)
    if found is None:
        return Document(file, "file", OpaqueFile(str(file), file.stat().st_size))
    return found.read(file)


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write the files of one rank, with full tensors, and metadata with which any number of ranks can load them.

    Raises:
        RepresentationError: The tree is not a dict of items, or holds an object that torch cannot pickle.
    """
    options = options or WriteOptions()
    kept = like if like is not None and like.format == NAME else None
    items, notes = _items(tree, kept)
    metadata: dict[str, Any] = {}
    with options.new_folder(path) as folder:
        for item, node in items.items():
            part = kept.parts.get(item) if kept else None
            file, found = _target(item, node, kept, part)
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(node, OpaqueFile):
                copied(located(node.path), folder / file, options)
                continue
            made = node if kept and item not in kept.handle.files else by_name(node, item, notes)
            notes += found.write(made, folder / file, like=part, options=options)
            if not kept or item in kept.handle.files:
                metadata.update(_described(item, made, file, found.NAME))
        with options.new_file(folder / _METADATA) as out:
            out.write(dump({"metadata": metadata, "world_size": 1, "version": "2.0"}))
        options.confirmed()
    ranks = max((len(files) for files in kept.handle.files.values()), default=1) if kept else 1
    return [*notes, f"full tensors in the files of one rank, made of those of {ranks}"] if ranks > 1 else notes


def _items(tree: Any, kept: Document | None) -> tuple[dict[str, Any], list[str]]:
    """The items of a tree and the files beside them, with notes; a bare state dict becomes one item."""
    if not isinstance(tree, Mapping):
        raise RepresentationError(f"a folder of {NAME} holds named items, not {describe(tree)}"[:300])
    if is_optimizer(tree) or (tree and all(isinstance(node, LazyTensor) for node in tree.values())):
        item = "optimizer" if is_optimizer(tree) else "model"
        return {item: tree}, [f"the whole is written as one item, {describe(item)}"]
    for key, node in tree.items():
        beside = isinstance(node, OpaqueFile) or (kept is not None and key in kept.parts)
        if not isinstance(key, str) or not (_ITEM.fullmatch(key) or beside):
            raise RepresentationError(
                f"{describe(key)} cannot be the name of an item: letters, digits, hyphens and underscores can",
                hint="Rename it, or leave it out.",
            )
    return dict(tree), []


def _target(item: str, node: Any, kept: Document | None, part: Document | None) -> tuple[str, Any]:
    """The file of an item and its format, the same as when it was read if that was one file."""
    if kept is not None and item not in kept.handle.files:
        return item, get_format(part.format) if part is not None else torch_zip
    files: Sequence[str] = kept.handle.files.get(item, ()) if kept is not None else ()
    if len(files) == 1 and part is not None and (part.format != "pickle" or isinstance(node, OpaqueFile)):
        known = torch_zip if part.format in ("file", "ranks") else get_format(part.format)
        return files[0], known
    return f"{item}_0.pt", torch_zip


def _described(item: str, node: Any, file: str, kind: str) -> dict[str, Any]:
    """The entry of an item in `metadata.pkl`: every tensor is complete on the only rank."""
    tensors = dict(_leaves(node))
    if not tensors:
        return {}
    layout = None
    if file != f"{item}_0.pt":
        name = "SafetensorsSerialization" if kind == "safetensors" else "TorchSerialization"
        layout = {"file_path": file, "serialization_format": {"type": name}}
    mesh = {"device_type": "cpu", "mesh_shape": (1,), "mesh_data": (0,), "mesh_dim_names": None}
    return {
        item: {
            "nested_path_to_metadata": {
                json.dumps(list(where), separators=(",", ":")): [
                    {
                        "sharding_metadata": {
                            "type": _SHARDED,
                            "data": {
                                "global_shape": list(tensor.shape),
                                "dtype": f"torch.{tensor.dtype}",
                                "stride": list(tensor.stride),
                                "mesh_spec": mesh,
                                "placements": [{"type": "Replicate"}],
                            },
                        },
                        "ranks": (0,),
                    }
                ]
                for where, tensor in tensors.items()
            },
            "rank_to_layout_info": {0: layout},
        }
    }


def _leaves(node: Any, where: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], LazyTensor]]:
    """The tensors with their paths as the package writes them: keys of dicts and indices of sequences."""
    if isinstance(node, LazyTensor):
        yield where, node
    elif isinstance(node, dict):
        for key, value in node.items():
            if type(key) in (str, int):
                yield from _leaves(value, (*where, key))
    elif isinstance(node, list | tuple):
        for index, value in enumerate(node):
            yield from _leaves(value, (*where, index))
