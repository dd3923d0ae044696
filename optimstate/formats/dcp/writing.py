"""The data files of a folder that is written: those of the folder it came from as they are, and what is new.

The bytes of an item say nothing of its name, so an item that only changed its name stays where it is, in the pieces in
which ranks wrote it, and its file is linked. What changed goes into new files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optimstate.describe import exact
from optimstate.formats.dcp.columns import Box, Chunk, Form, Item, Metadata
from optimstate.formats.dcp.pieces import Pieces, PieceStorage
from optimstate.formats.dcp.tree import Leaves
from optimstate.formats.protocol import WriteOptions
from optimstate.formats.torch import zip as torch_zip
from optimstate.io.extents import Extent
from optimstate.io.linking import linked
from optimstate.io.location import Location
from optimstate.record import Record
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage, announced, contiguous_strides

__all__ = ["Layout", "Part", "layout", "metadata_of", "write_file", "write_items"]

_DATA_FILE = re.compile(r"__(\d+)_(\d+)\.distcp")
_ARCHIVE_BYTES = 2048  # of an archive beside the elements, about


class Part(NamedTuple):
    """An item, or a piece of a tensor, that is written anew.

    Attributes:
        name: Of the item.
        box: Where the piece is in its tensor; None for what is no tensor.
        value: The piece.
    """

    name: str
    box: Box | None
    value: Any

    @property
    def nbytes(self) -> int:
        """About how long it is in a file."""
        return _ARCHIVE_BYTES + (self.value.nbytes if isinstance(self.value, LazyTensor) else 0)


class Layout(Record):
    """Where every item of a new folder is.

    Attributes:
        leaves: All items.
        source: The pieces of the folder that they came from.
        kept: Of each item that stays where it is, its number there.
        files: What is written anew, by the name of its file.
    """

    leaves: Leaves
    source: Pieces | None
    kept: Mapping[str, int]
    files: Mapping[str, Sequence[Part]]

    def linked(self) -> list[int]:
        """The numbers of the source's files that are kept."""
        if self.source is None:
            return []
        metadata = self.source.metadata
        return sorted({metadata.file[row] for number in self.kept.values() for row in metadata.rows(number)})


def layout(leaves: Leaves, source: Pieces | None, ranks: int | None) -> Layout:
    """Decide what is kept and what is written into which file.

    Args:
        leaves: All items.
        source: The pieces of the folder that the items came from, where they did.
        ranks: Write every tensor anew, cut along its first dimension for so many ranks; None keeps what can be kept.
    """
    kept = {} if source is None or ranks else _kept(leaves, source)
    new = {name: leaf for name, (_, leaf) in leaves.items() if name not in kept}
    if ranks:
        files: dict[str, list[Part]] = {f"__{rank}_0.distcp": [] for rank in range(ranks)}
        for rank, parts in enumerate(_for_ranks(new, ranks)):
            files[f"__{rank}_0.distcp"] = parts
        return Layout(leaves, source, kept, {name: parts for name, parts in files.items() if parts})
    made = Layout(leaves, source, kept, {})
    if not new:
        return made
    taken = [] if source is None else [source.metadata.files[number] for number in made.linked()]
    matches = [match for name in taken if (match := _DATA_FILE.fullmatch(name)) and match[1] == "0"]
    name = f"__0_{1 + max((int(match[2]) for match in matches), default=-1)}.distcp"
    return made._replace(files={name: [Part(key, _whole(leaf), leaf) for key, leaf in new.items()]})


def _whole(leaf: Any) -> Box | None:
    return ((0,) * len(leaf.shape), leaf.shape) if isinstance(leaf, LazyTensor) else None


def _kept(leaves: Leaves, source: Pieces) -> dict[str, int]:
    """The items that are those of the source, by name."""
    made: dict[str, int] = {}
    named = source.files_with_names()
    metadata = source.metadata
    for name, (_, leaf) in leaves.items():
        number = _number_of(leaf, source)
        if number is None:
            continue
        bound = any(metadata.file[row] in named for row in metadata.rows(number)) if named else False
        if not bound or metadata.order[number] == name:
            made[name] = number
    return made


def _number_of(leaf: Any, source: Pieces) -> int | None:
    """The item of the source that a leaf is, all of it and unchanged."""
    if not isinstance(leaf, LazyTensor):
        return source.number_of(leaf)
    storage = leaf.storage
    if type(storage) is not PieceStorage or storage.table is not source or leaf.offset:
        return None
    form = source.metadata.forms[storage.number]
    assert form is not None
    if leaf.dtype != form.dtype or leaf.shape != form.shape or leaf.stride != contiguous_strides(form.shape):
        return None
    return storage.number


def _for_ranks(leaves: Mapping[str, Any], ranks: int) -> list[list[Part]]:
    """Tensors cut along their first dimension as `torch.chunk` does; what cannot be cut where there is least."""
    made: list[list[Part]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for name, leaf in leaves.items():
        rows = leaf.shape[0] if isinstance(leaf, LazyTensor) and leaf.shape and leaf.nbytes else 0
        if rows < 2:
            part = Part(name, _whole(leaf), leaf)
            rank = min(range(ranks), key=filled.__getitem__)
            made[rank].append(part)
            filled[rank] += part.nbytes
            continue
        each = -(-rows // ranks)
        for rank, start in enumerate(range(0, rows, each)):
            piece = leaf.narrow(0, start, min(each, rows - start))
            box = ((start, *(0 for _ in leaf.shape[1:])), piece.shape)
            part = Part(name, box, piece)
            made[rank].append(part)
            filled[rank] += part.nbytes
    return made


def write_items(
    folder: Location, leaves: Leaves, source: Pieces | None, options: WriteOptions
) -> tuple[Metadata, list[str]]:
    """Fill a folder with data files.

    Returns:
        The metadata, without the paths of names, and notes for people.

    Raises:
        CheckpointError: A source cannot be read.
        OSError: A file cannot be written.
    """
    made = layout(leaves, source, options.ranks)
    notes = link_files(folder, made, options)
    items: dict[tuple[str, Box | None], Item] = {}
    for name, parts in made.files.items():
        items.update(write_file(folder / name, parts, options))
    return metadata_of(made, items), notes


def link_files(folder: Location, made: Layout, options: WriteOptions) -> list[str]:
    """Give the folder the files that are kept; notes for people."""
    if made.source is None:
        return []
    metadata, links = made.source.metadata, 0
    files = made.linked()
    for number in files:
        source, target = made.source.sources[number], folder / metadata.files[number]
        if not options.copy and linked(source, target):
            links += 1
            continue
        with options.new_file(target, expected_size=source.size) as out:
            out.copy([Extent(source, 0, source.size)], options.progress)
    notes = []
    if links:
        notes.append(
            f"{links} data files are links to those of {made.source.folder}: no bytes were moved (--copy moves them)"
        )
    used = {row for number in made.kept.values() for row in metadata.rows(number)}
    held = set(files)
    dead = 0
    for row, box in enumerate(metadata.boxes):
        if box is not None and row not in used and metadata.file[row] in held:
            dead += metadata.length[row]
    if dead:
        notes.append(f"{dead:,} bytes of the kept data files belong to tensors that are not in this folder")
    return notes


def write_file(path: Location, parts: Sequence[Part], options: WriteOptions) -> dict[tuple[str, Box | None], Item]:
    """Write one data file: what is no tensor first, then the tensors, as torch orders them."""
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
            length = torch_zip.write_archive(out, value, options)
            item = items[part.name, part.box] = Item(path.name, position, length)
            position += length
            if plain is not None:
                scalars[plain] = item
    return items


def _alone(tensor: LazyTensor) -> LazyTensor:
    """A plain tensor of the same elements in row-major order, with nothing around it."""
    kind = DTYPES[tensor.dtype].storage or "UntypedStorage"
    whole = tensor.is_contiguous() and tensor.nbytes == tensor.storage.nbytes
    storage = Storage(tensor.extents(), tensor.nbytes, kind, crc=tensor.storage.crc if whole else None)
    return LazyTensor(storage, tensor.dtype, tensor.shape)


def metadata_of(made: Layout, items: Mapping[tuple[str, Box | None], Item]) -> Metadata:
    """The metadata of a folder whose new items are there."""
    boxes: dict[str, list[Box]] = {}
    for parts in made.files.values():
        for part in parts:
            if part.box is not None:
                boxes.setdefault(part.name, []).append(part.box)
    metadata = Metadata()
    for name, (_, leaf) in made.leaves.items():
        number = made.kept.get(name)
        if isinstance(leaf, LazyTensor):
            form = Form(leaf.dtype, leaf.shape, leaf.requires_grad)
            if number is not None and made.source is not None:
                metadata.add_tensor(name, form, made.source.metadata.chunks(number))
            else:
                metadata.add_tensor(name, form, (Chunk(box, items[name, box]) for box in boxes[name]))
        elif number is not None and made.source is not None:
            metadata.add_object(name, made.source.metadata.item(made.source.metadata.first[number]))
        else:
            metadata.add_object(name, items[name, None])
    return metadata
