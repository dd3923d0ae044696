"""A folder as a tree: a dict whose keys are the names of its files, recursively.

Files of known container formats are entered; any other file is an `OpaqueFile` and is copied as it is. Files that
several ranks wrote of the same tensors are one entry (see `ranks` and `_hf_shards`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from optimstate.describe import describe
from optimstate.errors import (
    CheckpointError,
    CorruptCheckpointError,
    RepresentationError,
    UnrecognizedFormatError,
)
from optimstate.formats.protocol import Claim, Document, Format, WriteOptions
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
MAX_FILES = 10_000
LOST = "lost"
"""The format of a document that stands for a file of which nothing can be read."""


def sniff(path: Location, head: bytes) -> Claim:
    """Any folder, if no other format knows it better."""
    return Claim.FALLBACK if path.is_dir() and not head else Claim.NO


def read(path: Location) -> Document:
    """Open every checkpoint of a folder.

    Raises:
        UnrecognizedFormatError: There is none in it.
        CheckpointError: One that looks like a checkpoint cannot be read.
    """
    return _read(path, _opened)


def salvage(path: Location) -> Document:
    """What is whole in a folder: every checkpoint that can be read, and of damaged ones what is whole in them.

    Raises:
        CheckpointError: There is nothing.
    """
    return _read(path, _rescued)


Open = Callable[[Format, Location], Document]


def _opened(found: Format, path: Location) -> Document:
    return found.read(path)


def _rescued(found: Format, path: Location) -> Document:
    try:
        return salvaged(found, path)
    except UnrecognizedFormatError:
        raise
    except CheckpointError as error:
        return Document(path, LOST, None, lost=[error.message])


def _read(path: Location, opened: Open) -> Document:
    document = _read_folder(path, path, opened)
    if not document.parts:
        raise UnrecognizedFormatError(
            "a folder without a checkpoint",
            path=path,
            hint="`optimstate convert --help` lists the containers that are known.",
        )
    return document


def _read_folder(path: Location, root: Location, opened: Open) -> Document:
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
    if missing and opened is _opened:
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
        if file.name in shards or (_leads_outside(file, root)):
            continue
        part = _read_entry(file, root, opened)
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
    for name, part in document.parts.items():
        document.notes.extend(f"{name}: {note}" for note in part.notes)
        document.globals = list(dict.fromkeys([*document.globals, *part.globals]))
    return document


_NUMBERED = re.compile(r"(?!shard-)(.+)-(\d{5})-of-(\d{5})\.safetensors")


def _missing_shards(names: Iterable[str]) -> list[str]:
    """Of shards whose names say how many there are, and that no index names, what is not there."""
    found: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            found.setdefault((match[1], int(match[3])), set()).add(int(match[2]))
    said = []
    for (stem, count), numbers in found.items():
        first = next((number for number in range(1, count + 1) if number not in numbers), None)
        if first is not None:
            name = describe(f"{stem}-{first:05d}-of-{count:05d}.safetensors")
            said.append(f"{name} is not there: no index names these shards, and {len(numbers)} of {count} are there")
    return said


def _leads_outside(file: Location, root: Location) -> bool:
    """Whether a file is a link to something outside of the folder."""
    return (
        isinstance(file, Path)
        and isinstance(root, Path)
        and file.is_symlink()
        and root.resolve() not in file.resolve().parents
    )


def _join_ranks(document: Document) -> None:
    """Files with parts of the same tensors become one entry."""
    for find, join in ((ranks.rank_files, ranks.join_ranks), (shard_files, join_shards)):
        for together, files in find(document.parts).items():
            name = f"joined.{together}" if together in document.tree.keys() - set(files) else together
            members = {file: document.parts.pop(file) for file in files}
            for file in files:
                del document.tree[file]
            part = document.parts[name] = join(document.path / name, members)
            document.tree[name] = part.tree


def _read_entry(file: Location, root: Location, opened: Open) -> Document | None:
    kind_of(file)
    found = detect(file)
    if found is not None and found.NAME == NAME:
        return _read_folder(file, root, opened)
    try:
        return opened(found, file) if found is not None else None
    except UnrecognizedFormatError:
        return None


def write(tree: Any, path: Location, *, like: Document | None = None, options: WriteOptions | None = None) -> list[str]:
    """Write a folder: each entry in the format it was read from, all other files copied.

    Raises:
        RepresentationError: The tree did not come from a folder.
    """
    options = options or WriteOptions()
    if like is None or like.format != NAME:
        raise RepresentationError("only what was read from a folder can be written as one", hint="Give a file name.")
    notes: list[str] = []
    with options.together(path) as (folder, inner):
        _write_entries(tree, folder, like, inner, notes)
        inner.confirmed()
    return notes


def _write_entries(
    tree: dict[str, Any], folder: Location, like: Document, options: WriteOptions, notes: list[str]
) -> None:
    for name, node in tree.items():
        part = like.parts.get(name)
        target = folder / name
        if isinstance(node, OpaqueFile):
            copied(located(node.path), target, options)
        elif part is None:  # a folder without a checkpoint in it
            target.mkdir(exist_ok=options.shared is not None)
            _write_entries(node, target, Document(like.path / name, NAME, node), options, notes)
        elif part.format == NAME:
            target.mkdir(exist_ok=options.shared is not None)
            _write_entries(node, target, part, options, notes)
        elif node is part.tree and not part.path.is_dir():
            for file in _files_of(part):
                copied(file, folder / file.name, options)
        elif node is part.tree:
            _copy_folder(part.path, target, options)
        else:
            made = get_format(part.format).write(node, target, like=part, options=options)
            notes.extend(f"{name}: {note}" for note in made)


def _files_of(part: Document) -> list[Location]:
    """The file of a document, and its shards; the files of the ranks it was put together from."""
    if not part.path.exists():
        return [member.path for member in part.parts.values()]
    if not part.path.name.endswith(".safetensors.index.json"):
        return [part.path]
    return [part.path, *(part.path.parent / file for file in dict.fromkeys(read_index(part.path)[0].values()))]


def _copy_folder(source: Location, target: Location, options: WriteOptions) -> None:
    """A checkpoint that is a folder of its own, unchanged."""
    target.mkdir()
    for file in listed(source):
        if file.is_dir():
            _copy_folder(file, target / file.name, options)
        else:
            copied(file, target / file.name, options)


def copied(source: Location, target: Location, options: WriteOptions) -> None:
    """A file that is not a checkpoint, unchanged."""
    file = open_source(source)
    with options.new_file(target, expected_size=file.size) as out:
        out.copy([Extent(file, 0, file.size)], options.progress)
    if isinstance(source, Path) and isinstance(target, Path):
        target.chmod(source.stat().st_mode & 0o7777)
