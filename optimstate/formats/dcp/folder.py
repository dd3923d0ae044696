"""Folders of `torch.distributed.checkpoint`: `.metadata` and `__<rank>_<n>.distcp`, from any number of ranks.

Ranks that saved without collectives (`use_collectives=False`) have `__<rank>.metadata` each; they are read as one.

A tensor that ranks wrote in pieces is one tensor here. Reading needs neither torch nor the number of ranks; what is
written `torch.distributed.checkpoint.load` gives to any number of them.

The items of a folder have flat names; the paths in `.metadata` say which tree they came from. Where torch flattened the
optimizer (`flatten_optimizer_state_dict`), or Megatron gave no paths, the tree has `state` and `param_groups` all the
same (see `_dcp_tree`). Other checkpoint files of the folder (`common.pt`, `meta.pt`) are entries of the tree by name.
"""

from __future__ import annotations

import re
from typing import Any

from optimstate.errors import (
    CorruptCheckpointError,
    LimitExceededError,
    RepresentationError,
    UnsupportedCheckpointError,
)
from optimstate.formats.dcp import megatron
from optimstate.formats.dcp import tree as tree_of_metadata
from optimstate.formats.dcp.columns import Box, Item, Metadata
from optimstate.formats.dcp.dump import dump_metadata
from optimstate.formats.dcp.layout import layout, metadata_of
from optimstate.formats.dcp.metadata import load_metadata, merged
from optimstate.formats.dcp.pieces import Pieces
from optimstate.formats.dcp.sharing import share_out
from optimstate.formats.dcp.writing import link_files, notes_of_dead, write_file
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.registry import detect, get_format
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.io.places import open_source

NAME = "dcp"
SUFFIXES = (".dcp",)
OPTIONS = frozenset({"checksums", "copy", "ranks"})
MAX_RANKS = 1 << 16
"""The most processes that tensors are cut for."""

_RANK_METADATA = re.compile(r"__(\d+)\.metadata")


# --- reading --------------------------------------------------------------------------------------------------------


def sniff(path: Location, head: bytes) -> Claim:
    """Whether it is a folder with the metadata or the data of a distributed checkpoint."""
    if head or not path.is_dir():
        return Claim.NO
    return Claim.CERTAIN if (path / ".metadata").exists() or any(path.glob("*.distcp")) else Claim.NO


def read(path: Location) -> Document:
    """Open a folder.

    Raises:
        CheckpointError: A file is missing or damaged, or the pieces of a tensor do not fill it.
    """
    loaded = [_read_metadata(file) for file in _metadata_files(path)]
    metadata = loaded[0][0]
    notes: list[str] = []
    if len(loaded) > 1:
        metadata, notes = merged([each for each, _ in loaded], path)
    items = Pieces(path, metadata)
    values = items.values()
    document = Document(path, NAME, {}, checksums=[items.recorded], handle=items)
    parts = _other_files(document)
    beside = {name: part.tree for name, part in parts.items()}
    document.tree, more = tree_of_metadata.nested(values, metadata.paths, beside)
    document.notes.extend([*notes, *more])
    names = [name for _, names in loaded for name in names]
    document.globals = list(dict.fromkeys([*names, *items.globals, *document.globals]))
    return document


def _metadata_files(path: Location) -> list[Location]:
    """The metadata of all ranks in one file, or of each in its own where they were saved without collectives."""
    if (path / ".metadata").is_file():
        return [path / ".metadata"]
    found = {int(match[1]): file for file in listed(path) if (match := _RANK_METADATA.fullmatch(file.name))}
    if not found:
        raise CorruptCheckpointError(
            ".distcp files without .metadata: names and shapes are unknown",
            path=path,
            hint="The save did not finish, or the file was left behind when the folder was copied.",
        )
    return [found[rank] for rank in sorted(found)]


def _read_metadata(path: Location) -> tuple[Metadata, list[tuple[str, str]]]:
    source = open_source(path)
    if source.size > MAX_PICKLE_BYTES:
        raise LimitExceededError(f"metadata of {source.size} bytes, over the limit", path=path)
    try:
        return load_metadata(source.read(0, source.size))
    except (CorruptCheckpointError, UnsupportedCheckpointError, LimitExceededError) as error:
        raise error.within(path=path) from error


def _other_files(document: Document) -> dict[str, Document]:
    """The checkpoint files beside the distributed one; others are only noted."""
    for file in listed(document.path):
        if file.suffix in (".metadata", ".distcp") or file.name == ".metadata" or not file.is_file():
            continue
        found = detect(file)
        if found is None:
            document.notes.append(f"{file.name} is not a checkpoint and is not part of what is read")
            continue
        part = found.read(file)
        document.parts[file.name] = part
        document.globals = [*document.globals, *part.globals]
        document.notes.extend(f"{file.name}: {note}" for note in part.notes)
    return document.parts


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a folder. What is unchanged in the folder that the tree came from is linked and stays in its pieces.

    Raises:
        RepresentationError: The tree is not a mapping, or two of its paths would have the same name.
    """
    options = options or WriteOptions()
    if not isinstance(tree, dict):
        raise RepresentationError(f"a {type(tree).__name__} cannot be the root of a distributed checkpoint")
    kept = like if like is not None and like.format == NAME else None
    beside = {name: part for name, part in (kept.parts if kept else {}).items() if name in tree}
    flattened = kept is not None and tree_of_metadata.is_flattened(kept.handle.metadata.paths)
    items = {key: v for key, v in tree.items() if key not in beside}
    named = megatron.flat_names(items, kept.tree) if kept is not None and not kept.handle.metadata.paths else None
    leaves: tree_of_metadata.Leaves = {}
    notes: list[str] = []
    if named is not None:
        leaves.update((name, ((name,), value)) for name, value in named.items())
    else:
        leaves, notes = tree_of_metadata.leaves(items, flattened=flattened)
    stage = options.stage
    source = kept.handle if kept is not None else None
    made = layout(leaves, source, ranks=options.ranks, team=1 if stage is None else stage.team.size)
    if stage is not None and stage.team.rank:
        share_out(made, stage, options, copied=options.copy)
        return notes
    with stage or options.new_folder(path) as folder:
        places: dict[tuple[str, Box | None], Item] = {}
        if stage is None or not (options.copy or stage.in_store):
            notes.extend(link_files(folder, made, options))
        notes.extend(notes_of_dead(made))
        if stage is not None:
            places = share_out(made, stage, options, copied=options.copy)
            stage.clear()
        else:
            for name, parts in made.files.items():
                places.update(write_file(folder / name, parts, options))
        metadata = metadata_of(made, places)
        if named is None:
            metadata.paths = {name: place for name, (place, _) in leaves.items()}
        for name, part in beside.items():
            beside_notes = get_format(part.format).write(
                tree[name], folder / name, like=part, options=options._replace(stage=None, confirm=None, replace=True)
            )
            notes.extend(f"{name}: {note}" for note in beside_notes)
        options.confirmed()
        with options.new_file(folder / ".metadata") as out:  # with it a folder of a store can be loaded
            out.write(dump_metadata(metadata))
    return notes
