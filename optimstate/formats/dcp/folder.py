"""Folders of `torch.distributed.checkpoint`: `.metadata` and `__<rank>_<n>.distcp`, from any number of ranks.

Ranks that saved without collectives (`use_collectives=False`) have a `__<rank>.metadata` each; they are merged.

A tensor that ranks wrote in pieces is read as one tensor. Reading needs neither torch nor the number of ranks;
`torch.distributed.checkpoint.load` loads a written folder on any number of ranks.

The items of a folder have flat names; the paths in `.metadata` are those of the tree from which they came. If torch
flattened the optimizer (`flatten_optimizer_state_dict`), or Megatron wrote no paths, the tree still gets `state` and
`param_groups` (see the module `tree`). Other checkpoint files in the folder (`common.pt`, `meta.pt`) are entries of the
tree by name.
"""

from __future__ import annotations

import re
from typing import Any

from optimstate.errors import CorruptCheckpointError, LimitExceededError, RepresentationError
from optimstate.formats.dcp import megatron
from optimstate.formats.dcp import tree as tree_of_metadata
from optimstate.formats.dcp.columns import Box, Item, Metadata
from optimstate.formats.dcp.dump import dump_metadata
from optimstate.formats.dcp.layout import layout, metadata_of
from optimstate.formats.dcp.metadata import load_metadata, merged
from optimstate.formats.dcp.pieces import Pieces
from optimstate.formats.dcp.sharing import share_out
from optimstate.formats.dcp.writing import copy_files, link_files, notes_of_dead, write_file
from optimstate.formats.pickles.opcodes import MAX_PICKLE_BYTES
from optimstate.formats.pickles.unpickle import errors_in
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.registry import detect, get_format
from optimstate.io.folders import listed
from optimstate.io.location import Location
from optimstate.io.places import open_source

NAME = "dcp"
SUFFIXES = (".dcp",)
OPTIONS = frozenset({"checksums", "copy", "ranks"})
MAX_RANKS = 1 << 16
"""The largest number of processes for which tensors can be divided."""

_RANK_METADATA = re.compile(r"__(\d+)\.metadata")


# --- reading --------------------------------------------------------------------------------------------------------


def sniff(path: Location, head: bytes) -> Claim:
    """Certain of a folder with metadata or data files of a distributed checkpoint."""
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
    for _, names in loaded:
        document.mention(names)
    document.mention(items.globals)
    _add_other_files(document)
    beside = {name: part.tree for name, part in document.parts.items()}
    document.tree, more = tree_of_metadata.nested(values, metadata.paths, beside)
    document.notes.extend([*notes, *more])
    return document


def items_of(path: Location) -> dict[str, list[tuple[int, int]]]:
    """The offset and length of every item in the data files of a folder, by file; empty if there is no metadata.

    Raises:
        CheckpointError: The metadata cannot be read.
    """
    found: dict[str, set[tuple[int, int]]] = {}
    for file in _metadata_files(path):
        metadata, _ = _read_metadata(file)
        for number, offset, length in zip(metadata.file, metadata.offset, metadata.length, strict=True):
            found.setdefault(metadata.files[number], set()).add((offset, length))
    return {name: sorted(places) for name, places in found.items()}


def _metadata_files(path: Location) -> list[Location]:
    """The file with the metadata of all ranks, or the files of all ranks if they saved without collectives."""
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
    with errors_in(path):
        return load_metadata(source.read(0, source.size))


def _add_other_files(document: Document) -> None:
    """Add the other checkpoint files in the folder as parts, and notes on all other files."""
    for file in listed(document.path):
        if file.suffix in (".metadata", ".distcp") or file.name == ".metadata" or not file.is_file():
            continue
        found = detect(file)
        if found is None:
            document.notes.append(f"{file.name} is not a checkpoint, and is not read")
        else:
            document.parts[file.name] = found.read(file)
    document.mention_parts()


# --- writing --------------------------------------------------------------------------------------------------------


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a folder. Unchanged items of the folder from which the tree was read are linked and keep their pieces.

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
        share_out(made, stage, options, copied=())
        return notes
    with stage or options.new_folder(path) as folder:
        places: dict[tuple[str, Box | None], Item] = {}
        copied, more = link_files(folder, made, options)
        notes += [*more, *notes_of_dead(made)]
        if stage is not None:
            places = share_out(made, stage, options, copied=copied)
        else:
            copy_files(folder, made, copied, options)
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
        if stage is not None:
            stage.clear()
        with options.new_file(folder / ".metadata") as out:  # last, because it makes a folder in a store loadable
            out.write(dump_metadata(metadata))
    return notes
