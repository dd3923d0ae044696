"""A folder as a tree: a dict whose keys are the names of its files, recursively.

Files of known container formats are opened; any other file is an `OpaqueFile` and is copied as it is. Files in which
several ranks wrote parts of the same tensors become one entry (see `ranks.files` and `safetensors.hf_shards`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    RepresentationError,
    UnrecognizedFormatError,
)
from optimstate.formats.protocol import Claim, Document, WriteOptions
from optimstate.formats.ranks import files as ranks
from optimstate.formats.registry import detect, get_format, salvaged
from optimstate.formats.safetensors.container import abandoned_shards, read_index
from optimstate.formats.safetensors.hf_shards import join_shards, shard_files
from optimstate.io.extents import Extent
from optimstate.io.folders import kind_of, listed
from optimstate.io.location import Location
from optimstate.io.places import located, open_source, prefetch
from optimstate.tree import OpaqueFile

NAME = "folder"
SUFFIXES: tuple[str, ...] = ()
OPTIONS = frozenset({"checksums", "clone_views"})
MAX_FILES = 10_000
LOST = "lost"
"""The format of a document that stands for a file of which nothing can be read."""


def sniff(path: Location, head: bytes) -> Claim:
    """Any folder, if no other format claims more."""
    return Claim.FALLBACK if path.is_dir() and not head else Claim.NO


def read(path: Location) -> Document:
    """Open every checkpoint in a folder.

    Raises:
        UnrecognizedFormatError: The folder has no checkpoint.
        CheckpointError: A file that looks like a checkpoint cannot be read.
    """
    return _read(path, salvaging=False)


def salvage(path: Location) -> Document:
    """The checkpoints in a folder that can be read, and the intact parts of damaged ones.

    Raises:
        CheckpointError: There are none.
    """
    return _read(path, salvaging=True)


def _read(path: Location, *, salvaging: bool) -> Document:
    document = _read_folder(path, path, salvaging=salvaging)
    if not document.parts:
        raise UnrecognizedFormatError(
            "a folder without a checkpoint",
            path=path,
            hint="`optimstate convert --help` lists the containers that are known.",
        )
    return document


def _read_folder(path: Location, root: Location, *, salvaging: bool) -> Document:
    document = Document(path, NAME, {})
    files = listed(path)
    if len(files) > MAX_FILES:
        raise CheckpointError(f"{len(files)} files in one folder, over the limit of {MAX_FILES}", path=path)
    prefetch(file for file in files if file.suffix != ".distcp")
    shards: set[str] = set()
    for file in files:
        if file.name.endswith(".safetensors.index.json"):
            shards.update(read_index(file)[0].values())
    abandoned = abandoned_shards((file.name for file in files), shards) if shards else ()
    missing = _missing_shards(file.name for file in files if file.name not in shards)
    if missing and not salvaging:
        raise CorruptCheckpointError(
            missing[0],
            path=path,
            hint="Whoever wrote it did not finish: copy it again. `optimstate convert --salvage` writes what is there.",
        )
    document.lost.extend(missing)
    for file in files:
        if file.name in abandoned:
            document.notes.append(f"{file.name} is a shard that no index names: a writer was killed; it may be deleted")
            continue
        if file.name in shards or _leads_outside(file, root):
            continue
        part = _read_entry(file, root, salvaging=salvaging)
        if part is None:
            document.tree[file.name] = OpaqueFile(str(file), file.stat().st_size)
            continue
        document.lost.extend(f"{file.name}: {lost}" for lost in part.lost)
        if part.format == LOST:
            continue
        document.tree[file.name] = part.tree
        if part.parts or part.format != NAME:
            document.parts[file.name] = part
    _join_ranks(document)
    document.mention_parts()
    return document


_NUMBERED = re.compile(r"(?!shard-)(.+)-(\d{5})-of-(\d{5})\.safetensors")


def _missing_shards(names: Iterable[str]) -> list[str]:
    """A message for each series of numbered shards without an index of which a file is missing."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    messages = []
    for (stem, count), numbers in found.items():
        first = next((number for number in range(1, count + 1) if number not in numbers), None)
        if first is not None:
            name = describe(f"{stem}-{first:05d}-of-{count:05d}.safetensors")
            messages.append(f"{name} is missing: the folder has {len(numbers)} of {count} shards, and no index of them")
    return messages


def _leads_outside(file: Location, root: Location) -> bool:
    """Whether a file is a symbolic link to something outside the folder `root`."""
    return (
        isinstance(file, Path)
        and isinstance(root, Path)
        and file.is_symlink()
        and root.resolve() not in file.resolve().parents
    )


def _join_ranks(document: Document) -> None:
    """Replace files that hold parts of the same tensors by one entry."""
    for find, join in ((ranks.rank_files, ranks.join_ranks), (shard_files, join_shards)):
        for together, files in find(document.parts).items():
            name = f"joined.{together}" if together in document.tree.keys() - set(files) else together
            members = {file: document.parts.pop(file) for file in files}
            for file in files:
                del document.tree[file]
            part = document.parts[name] = join(document.path / name, members)
            document.tree[name] = part.tree


def _read_entry(file: Location, root: Location, *, salvaging: bool) -> Document | None:
    """The document of a file or folder in a folder, or None where it is not a checkpoint."""
    kind_of(file)
    found = detect(file)
    if found is None:
        return None
    if found.NAME == NAME:
        return _read_folder(file, root, salvaging=salvaging)
    try:
        return salvaged(found, file) if salvaging else found.read(file)
    except UnrecognizedFormatError:
        return None
    except CheckpointError as error:
        if not salvaging:
            raise
        return Document(file, LOST, None, lost=[error.message])


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a folder: checkpoints in the formats in which they were read, all other files copied.

    Raises:
        RepresentationError: The tree was not read from a folder.
    """
    options = options or WriteOptions()
    if like is None or like.format != NAME:
        raise RepresentationError("only what was read from a folder can be written as one", hint="Give a file name.")
    notes: list[str] = []
    with options.together(path) as (folder, inner):
        _write_entries(tree, folder, like, inner, notes)
        inner.confirmed()
        if inner.shared is not None and inner.shared.alone:
            notes.append(
                f"{inner.shared.alone:,} bytes of tensors were written by the first process alone: "
                "the archives in which they are need checksums first"
            )
    return notes


def _write_entries(
    tree: dict[str, Any], folder: Location, like: Document, options: WriteOptions, notes: list[str]
) -> None:
    for name, node in tree.items():
        part = like.parts.get(name)
        target = folder / name
        if isinstance(node, OpaqueFile):
            copied(located(node.path), target, options)
        elif part is None or part.format == NAME:  # None: a folder without a checkpoint
            target.mkdir(exist_ok=options.shared is not None)
            _write_entries(node, target, part or Document(like.path / name, NAME, node), options, notes)
        elif node is part.tree and not part.path.is_dir():
            for file in _files_of(part):
                copied(file, folder / file.name, options)
        elif node is part.tree:
            _copy_folder(part.path, target, options)
        else:
            made = get_format(part.format).write(node, target, like=part, options=options)
            notes.extend(f"{name}: {note}" for note in made)


def _files_of(part: Document) -> list[Location]:
    """The file of a document with its shards, or the ranks' files from which it was put together."""
    if not part.path.exists():
        return [member.path for member in part.parts.values()]
    if not part.path.name.endswith(".safetensors.index.json"):
        return [part.path]
    return [part.path, *(part.path.parent / file for file in dict.fromkeys(read_index(part.path)[0].values()))]


def _copy_folder(source: Location, target: Location, options: WriteOptions) -> None:
    """Copy a folder with everything in it."""
    target.mkdir()
    for file in listed(source):
        if file.is_dir():
            _copy_folder(file, target / file.name, options)
        else:
            copied(file, target / file.name, options)


def copied(source: Location, target: Location, options: WriteOptions) -> None:
    """Copy a file, with its permissions where source and target are local."""
    file = open_source(source)
    with options.new_file(target, expected_size=file.size) as out:
        out.copy([Extent(file, 0, file.size)], options.progress)
    if isinstance(source, Path) and isinstance(target, Path):
        target.chmod(source.stat().st_mode & 0o7777)
