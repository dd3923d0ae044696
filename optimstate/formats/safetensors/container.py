"""The safetensors container: plain files of named tensors, shards with an index, and whole training checkpoints.

A plain file becomes a tree of one level; a whole checkpoint has the rest of its tree in the metadata of the file (see
the module `checkpoint`).
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import CheckpointError, CorruptCheckpointError
from optimstate.formats.protocol import Claim, Document, WriteOptions, malformed
from optimstate.formats.pruning import LostStorage, without_lost
from optimstate.formats.safetensors.checkpoint import Layout, decode_checkpoint
from optimstate.formats.safetensors.digests import DIGEST, algorithm_of
from optimstate.formats.safetensors.file import MAX_HEADER, Entry, File, read_file, write_file
from optimstate.formats.safetensors.hf_values import begins_with_archive, named_values, read_values
from optimstate.io.extents import StoredSource
from optimstate.io.location import Location
from optimstate.io.places import new_group, open_source, prefetch
from optimstate.tensors.lazy import LazyTensor

NAME = "safetensors"
SUFFIXES = (".safetensors",)
OPTIONS = frozenset({"clone_views", "digest", "shard_size"})

_INDEX_SUFFIX = ".safetensors.index.json"


# --- reading ----------------------------------------------------------------------------------------------------------


def sniff(path: Location, head: bytes) -> Claim:
    """Certain if a file begins with a safetensors header, or is the index of a sharded checkpoint."""
    if path.name.endswith(_INDEX_SUFFIX):
        return Claim.CERTAIN
    if path.suffix in SUFFIXES and head.startswith(b"PK\x03\x04"):
        return Claim.CERTAIN  # values in front of the header, see `hf_values`
    if len(head) < 9:
        return Claim.LIKELY if path.suffix in SUFFIXES and path.is_file() else Claim.NO
    (length,) = struct.unpack_from("<Q", head)
    fits = head[8:9] == b"{" and (length <= MAX_HEADER or path.suffix in SUFFIXES)
    return Claim.CERTAIN if fits else Claim.NO


def read(path: Location) -> Document:
    """Open a file, or all shards of an index.

    Raises:
        CheckpointError: It is damaged, or a shard is missing.
    """
    if path.name.endswith(_INDEX_SUFFIX):
        return _read_sharded(path, salvage=False)
    file, values = _read_any(path, salvage=False)
    if values is None:
        return _document(path, file)
    more, notes = named_values(path, values[0], None)
    document = _document(path, file._replace(tensors={**file.tensors, **more}))
    document.notes += notes
    document.globals = values[1]
    return document


Values = tuple[list[Any], list[tuple[str, str]]]


def _read_any(path: Location, *, salvage: bool) -> tuple[File, Values | None]:
    """The contents of a file, and the values in front of its header if there are some."""
    source = open_source(path)
    if not begins_with_archive(source):
        return read_file(path, salvage=salvage), None
    values, names, start = read_values(source)
    if start == source.size:
        return File({}, {}, []), (values, names)
    return read_file(path, start=start, salvage=salvage), (values, names)


def salvage(path: Location) -> Document:
    """The complete tensors of a truncated file, or of the shards of an index that exist.

    Raises:
        CheckpointError: There are none.
    """
    sharded = path.name.endswith(_INDEX_SUFFIX)
    document = _read_sharded(path, salvage=True) if sharded else _document(path, read_file(path, salvage=True))
    document.tree, document.lost = without_lost(document.tree, path)
    return document


def _document(path: Location, file: File) -> Document:
    rest = {key: value for key, value in file.metadata.items() if key != "optimstate"}
    document = Document(path, NAME, file.tensors, checksums=[lambda: file.digests], handle=rest)
    if "optimstate" not in file.metadata:
        return document
    try:
        document.tree = decode_checkpoint(json.loads(file.metadata["optimstate"]), file.tensors)
    except CheckpointError as error:
        raise error.within(path=path, place="header entry 'optimstate'") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        message = f"the description of the tree is malformed: {describe(error)}"[:300]
        raise CorruptCheckpointError(message, path=path, place="header entry 'optimstate'") from error
    return document


def read_index(path: Location) -> tuple[dict[str, str], dict[str, str]]:
    """The file of each tensor of an index, and those entries of the index's metadata that are strings.

    Raises:
        CorruptCheckpointError: The index is malformed, or names a file outside its folder.
    """
    source = open_source(path)
    with malformed("the index cannot be read", path=path):
        index = json.loads(source.read(0, source.size))
        names = {str(name): str(file) for name, file in index["weight_map"].items()}
        metadata = {key: value for key, value in index.get("metadata", {}).items() if isinstance(value, str)}
    for file in names.values():
        if Path(file).name != file:
            raise CorruptCheckpointError(f"the index names {describe(file)}, outside its folder", path=path)
    return names, metadata


def _read_sharded(path: Location, *, salvage: bool) -> Document:
    weight_map, metadata = read_index(path)
    tree: dict[str, Any] = {}
    shards: dict[str, File] = {}
    mentioned: dict[tuple[str, str], None] = {}
    files = dict.fromkeys(weight_map.values())
    prefetch(path.parent / file for file in files)
    for file in files:
        try:
            shards[file], values = _read_any(path.parent / file, salvage=salvage)
            found = shards[file].tensors
            if values is not None:
                rest = [name for name, where in weight_map.items() if where == file and name not in found]
                found.update(named_values(path.parent / file, values[0], rest)[0])
                mentioned.update(dict.fromkeys(values[1]))
        except CheckpointError:
            if not salvage:
                raise
            lost = (name for name, where in weight_map.items() if where == file)
            shards[file] = File({name: LazyTensor(LostStorage((), 0), "uint8", (0,)) for name in lost}, {}, [])
    for file, shard in shards.items():
        for name in shard.tensors:
            if weight_map.get(name) != file:
                raise CorruptCheckpointError(
                    f"{file} holds {describe(name)}, which the index does not place there", path=path
                )
    for name, file in weight_map.items():
        if name not in shards[file].tensors:
            raise CorruptCheckpointError(f"{describe(name)} is not in {file}, where the index places it", path=path)
        tree[name] = shards[file].tensors[name]
        if DIGEST in shards[file].metadata:
            metadata.setdefault(DIGEST, shards[file].metadata[DIGEST])  # for the algorithm
    document = _document(path, File(tree, metadata, [found for shard in shards.values() for found in shard.digests]))
    document.globals = list(mentioned)
    return document


# --- writing ----------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a tree as one file, as an index with its shards, or, with a shard size, as a folder of both.

    Raises:
        RepresentationError: The tree has an object or shared memory that the container cannot express.
    """
    options = options or WriteOptions()
    layout = Layout(tree, options)
    metadata = {"format": "pt", **layout.metadata}
    if like is not None and like.format == NAME and isinstance(like.handle, dict):
        metadata = {**like.handle, **metadata}
        options = options._replace(digest=options.digest or algorithm_of(metadata))
        metadata.pop(DIGEST, None)
    if path.name.endswith(_INDEX_SUFFIX):
        known = read_index(like.path)[0] if like is not None and like.path.name.endswith(_INDEX_SUFFIX) else {}
        size = options.shard_size
        shards = _shards_by_origin(layout.entries, known) if size is None else _shards_by_size(layout.entries, size)
        _write_shards(shards, metadata, path, options)
    elif options.shard_size is None:
        write_file(layout.entries, metadata, path, options)
    else:
        with options.together(path) as (folder, inner):
            shards = _shards_by_size(layout.entries, options.shard_size)
            if len(shards) == 1:
                write_file(layout.entries, metadata, folder / "model.safetensors", inner)
            else:
                _write_shards(shards, metadata, folder / f"model{_INDEX_SUFFIX}", inner)
    return layout.notes


def _shards_by_size(entries: list[Entry], shard_size: int) -> dict[str, list[Entry]]:
    """As many consecutive tensors in each file as fit; a tensor larger than `shard_size` gets its own file."""
    shards: list[list[Entry]] = [[]]
    room = shard_size
    for entry in entries:
        if shards[-1] and entry.tensor.nbytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(entry)
        room -= entry.tensor.nbytes
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _shards_by_origin(entries: list[Entry], known: Mapping[str, str]) -> dict[str, list[Entry]]:
    """Each tensor in the file from which it was read; a computed one in that of its name, else in the previous file.

    Args:
        entries: The tensors.
        known: The file of each name in the index from which they were read.
    """
    files = dict.fromkeys(known.values())
    file = next(iter(files), "model-00001-of-00001.safetensors")
    shards: dict[str, list[Entry]] = {}
    for entry in entries:
        source = entry.tensor.storage.pieces[0].source if entry.tensor.storage.pieces else None
        origin = source.path.name if isinstance(source, StoredSource) else ""
        file = origin if origin in files else known.get(entry.name, file)
        shards.setdefault(file, []).append(entry)
    return shards


def _write_shards(
    shards: dict[str, list[Entry]], metadata: dict[str, str], index: Location, options: WriteOptions
) -> None:
    """Write the files beside `index`, then the index; finally remove the shards of an index that it replaces."""
    is_new = options.shared is not None  # existing files are of an earlier attempt and are written again
    replaced = set() if is_new else _shards_of(index)
    taken = set() if is_new else replaced | {file.name for file in index.parent.iterdir()}
    names = {file: _fresh_shard_name(file) if file in taken else file for file in shards}
    weight_map = {entry.name: names[file] for file, entries in shards.items() for entry in entries}
    total = sum(entry.tensor.nbytes for entries in shards.values() for entry in entries)
    old = replaced | abandoned_shards(taken, replaced) - set(names.values())
    useless = [index.parent / file for file in sorted(old) if "/" not in file]
    with new_group(index, replaced=useless, sync=options.sync) as group:
        for file, entries in shards.items():
            write_file(entries, {"format": "pt"}, index.parent / names[file], options, group=group)
        with options.new_file(index, group=group) as out:
            document = {"metadata": {"total_size": total, **metadata}, "weight_map": weight_map}
            out.write(json.dumps(document, indent=1).encode())
    for location in useless:
        if not isinstance(location, Path):  # in a store, where no group removes them
            location.unlink(missing_ok=True)


_FRESH = re.compile(r"\.[0-9a-f]{12}\.safetensors$")


def abandoned_shards(files: Iterable[str], named: Set[str]) -> set[str]:
    """The shards that a killed writer left beside an index.

    Args:
        files: The names of the files beside the index.
        named: The names of the shards in the index.
    """
    followed = {_FRESH.sub(".safetensors", file) for file in named if _FRESH.search(file)}
    return {file for file in files if file not in named and (_FRESH.search(file) or file in followed)}


def _fresh_shard_name(file: str) -> str:
    """A name that is in no index, so that readers of the old index never open a new shard."""
    return f"{_FRESH.sub('.safetensors', file)[: -len('.safetensors')]}.{os.urandom(6).hex()}.safetensors"


def _shards_of(index: Location) -> set[str]:
    """The files named by an index that will be replaced; none if it cannot be read."""
    try:
        return set(read_index(index)[0].values()) if index.is_file() else set()
    except CheckpointError:
        return set()
