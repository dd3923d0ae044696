"""The data files of a folder: writing new items, and linking or copying files with kept ones."""

from __future__ import annotations

from collections.abc import Sequence

from optimstate.describe import exact
from optimstate.formats.dcp.columns import Box, Item
from optimstate.formats.dcp.layout import Layout, Part
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.torch import zip_writer
from optimstate.io.extents import Extent
from optimstate.io.linking import linked
from optimstate.io.location import Location
from optimstate.io.places import is_remote
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, announced

__all__ = ["copy_files", "link_files", "notes_of_dead", "write_file"]


def link_files(folder: Location, made: Layout, options: WriteOptions) -> tuple[list[int], list[str]]:
    """Link the files with kept items into the folder, unless they are to be copied.

    Returns:
        The numbers of the files that must be copied, and notes for people.
    """
    if made.source is None:
        return [], []
    files, names = made.linked(), made.source.metadata.files
    if options.copy:
        return files, []
    left = [number for number in files if not linked(made.source.sources[number], folder / names[number])]
    notes, links = [], len(files) - len(left)
    if links:
        notes.append(
            f"{links} data files are links to those of {made.source.folder}: no bytes were copied (--copy copies them)"
        )
    if left and not (is_remote(folder) or is_remote(made.source.folder)):
        notes.append(f"{len(left)} data files were copied, because the file system cannot link them to this folder")
    return left, notes


def copy_files(folder: Location, made: Layout, files: Sequence[int], options: WriteOptions) -> None:
    """Copy files with kept items into the folder."""
    for number in files:
        assert made.source is not None
        source, target = made.source.sources[number], folder / made.source.metadata.files[number]
        with options.new_file(target, expected_size=source.size) as out:
            out.copy([Extent(source, 0, source.size)], options.progress)


def notes_of_dead(made: Layout) -> list[str]:
    """A note on bytes of other tensors in the files with kept items, if there are any."""
    if made.source is None:
        return []
    metadata = made.source.metadata
    used = {row for number in made.kept.values() for row in metadata.rows(number)}
    held = set(made.linked())
    dead = 0
    for row, box in enumerate(metadata.boxes):
        if box is not None and row not in used and metadata.file[row] in held:
            dead += metadata.length[row]
    return [f"{dead:,} bytes of the kept data files belong to tensors that are not in this folder"] if dead else []


def write_file(path: Location, parts: Sequence[Part], options: WriteOptions) -> dict[tuple[str, Box | None], Item]:
    """Write one data file, objects first and then tensors, as torch does; returns the places of the items."""
    items: dict[tuple[str, Box | None], Item] = {}
    scalars: dict[tuple[type, str], Item] = {}
    expected = sum(part.nbytes for part in parts if part.box is not None)
    announced(part.value for part in parts if isinstance(part.value, LazyTensor))
    with options.new_file(path, expected_size=expected) as out:
        position = 0
        for part in sorted(parts, key=lambda part: part.box is not None):
            value = part.value
            plain = (type(value), exact(value)) if value is None or type(value) in (bool, int, float, str) else None
            if plain in scalars:
                items[part.name, part.box] = scalars[plain]
                continue
            value = _alone(value) if isinstance(value, LazyTensor) else value
            length = zip_writer.write_archive(out, value, options)
            item = items[part.name, part.box] = Item(path.name, position, length)
            position += length
            if plain is not None:
                scalars[plain] = item
    return items


def _alone(tensor: LazyTensor) -> LazyTensor:
    """A plain tensor of the same elements in row-major order, over a storage of its own."""
    kind = DTYPES[tensor.dtype].storage_class
    whole = tensor.is_contiguous() and tensor.nbytes == tensor.storage.nbytes
    storage = Storage(tensor.extents(), tensor.nbytes, kind, crc=tensor.storage.crc if whole else None)
    return LazyTensor(storage, tensor.dtype, tensor.shape)
