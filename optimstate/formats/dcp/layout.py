"""Deciding which items of a new folder are kept from the old one, and into which files the others are written.

The bytes of an item do not contain its name, so an item whose name alone has changed is kept, in the pieces in which
ranks wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

from optimstate.formats.dcp.columns import Box, Chunk, Form, Item, Metadata
from optimstate.formats.dcp.pieces import Pieces, PieceStorage
from optimstate.formats.dcp.tree import Leaves
from optimstate.io.extents import StoredSource
from optimstate.record import Record
from optimstate.tensors.lazy import LazyTensor, contiguous_strides

__all__ = ["Layout", "Part", "layout", "metadata_of"]

_DATA_FILE = re.compile(r"__(\d+)_(\d+)\.distcp")
_ARCHIVE_BYTES = 2048  # the approximate size of an archive without the elements
_FILE_BYTES = 1 << 30  # the approximate size of one of the files into which a share is divided
_PIECES = 8  # a tensor larger than this fraction of a share is divided, so that shares are equal


class Part(NamedTuple):
    """An item, or a piece of a tensor, to write.

    Attributes:
        name: The name of the item.
        box: The position of the piece in its tensor; None for an object.
        value: The piece or the object.
    """

    name: str
    box: Box | None
    value: Any

    @property
    def nbytes(self) -> int:
        """Its approximate number of bytes in a file."""
        return _ARCHIVE_BYTES + (self.value.nbytes if isinstance(self.value, LazyTensor) else 0)


class Layout(Record):
    """The files of all items in a new folder.

    Attributes:
        leaves: All items.
        source: The pieces of the folder from which they came.
        kept: The numbers, in the source, of items that are kept.
        files: The parts to write, by the name of the file.
        owned: The names of the files that each of several processes writes.
    """

    leaves: Leaves
    source: Pieces | None
    kept: Mapping[str, int]
    files: Mapping[str, Sequence[Part]]
    owned: Sequence[Sequence[str]] = ()

    def linked(self) -> list[int]:
        """The numbers of the source's files that have kept items."""
        if self.source is None:
            return []
        metadata = self.source.metadata
        return sorted({metadata.file[row] for number in self.kept.values() for row in metadata.rows(number)})


def layout(leaves: Leaves, source: Pieces | None, *, ranks: int | None = None, team: int = 1) -> Layout:
    """Decide which items are kept, and into which files the others are written.

    Args:
        leaves: All items.
        source: The pieces of the folder from which the items came, or None.
        ranks: Write every tensor, divided along its first dimension for this number of ranks; None keeps all it can.
        team: The number of processes that write; each has a file of its own.
    """
    kept = {} if source is None or ranks else _kept(leaves, source)
    new = {name: leaf for name, (_, leaf) in leaves.items() if name not in kept}
    made = Layout(leaves, source, kept, {})
    if ranks:
        shares = [[parts] if parts else [] for parts in _for_ranks(new, ranks)]
    else:
        parts = [Part(name, _whole(leaf), leaf) for name, leaf in new.items()]
        shares = [[parts]] if team == 1 else [_files(share) for share in cut(parts, team)]
    taken = [] if source is None else [source.metadata.files[number] for number in made.linked()]
    last = [-1] * len(shares)
    for match in filter(None, map(_DATA_FILE.fullmatch, taken)):
        if int(match[1]) < len(last):
            last[int(match[1])] = max(last[int(match[1])], int(match[2]))
    files: dict[str, Sequence[Part]] = {}
    names: list[list[str]] = []
    for rank, share in enumerate(shares):
        named = {f"__{rank}_{number}.distcp": parts for number, parts in enumerate(share, last[rank] + 1) if parts}
        files.update(named)
        names.append(list(named))
    if ranks or team == 1:
        every = list(files)
        names = [every[len(every) * rank // team : len(every) * (rank + 1) // team] for rank in range(team)]
    return made._replace(files=files, owned=names)


def _files(parts: Sequence[Part]) -> list[list[Part]]:
    """A share divided into files, of which another attempt need not write again those that are complete."""
    if not parts:
        return []
    numbers = (end // _FILE_BYTES for end in accumulate(part.nbytes for part in parts))
    numbered = groupby(zip(numbers, parts, strict=True), key=lambda each: each[0])
    return [[part for _, part in group] for _, group in numbered]


def _whole(leaf: Any) -> Box | None:
    return ((0,) * len(leaf.shape), leaf.shape) if isinstance(leaf, LazyTensor) else None


def _kept(leaves: Leaves, source: Pieces) -> dict[str, int]:
    """The items that can be kept, by name, with their numbers in the source."""
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
    """The number of the source's item that a leaf is, complete and unchanged; else None."""
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
    """Tensors divided along the first dimension like `torch.chunk`; others go to the rank with the fewest bytes."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    filled = [0] * ranks
    for name, leaf in leaves.items():
        whole = Part(name, _whole(leaf), leaf)
        rows = leaf.shape[0] if isinstance(leaf, LazyTensor) and leaf.shape and leaf.nbytes else 0
        first, parts = (
            (0, _slabs(whole, -(-rows // ranks))) if rows > 1 else (min(range(ranks), key=filled.__getitem__), [whole])
        )
        for rank, part in enumerate(parts, first):
            shares[rank].append(part)
            filled[rank] += part.nbytes
    return shares


def _slabs(part: Part, rows: int, dim: int = 0) -> list[Part]:
    """A part of a tensor divided along a dimension into pieces of this number of rows."""
    assert part.box is not None
    start, tensor = part.box[0], part.value
    pieces = []
    for at in range(0, tensor.shape[dim], rows):
        piece = tensor.narrow(dim, at, min(rows, tensor.shape[dim] - at))
        pieces.append(Part(part.name, ((*start[:dim], start[dim] + at, *start[dim + 1 :]), piece.shape), piece))
    return pieces


def cut(parts: Sequence[Part], size: int) -> list[list[Part]]:
    """Parts in the order of their bytes in files, divided into shares of about equal numbers of bytes."""
    most = max(sum(part.nbytes for part in parts) // (size * _PIECES), 1)
    objects = [part for part in parts if part.box is None]
    pieces = [piece for part in parts if part.box is not None for piece in _pieces(part, most)]
    pieces.sort(key=_place)
    shares: list[list[Part]] = [[] for _ in range(size)]
    shares[0] = objects
    total = sum(part.nbytes for part in pieces)
    ends = accumulate(part.nbytes for part in pieces)
    for piece, end in zip(pieces, ends, strict=True):
        shares[min((end - piece.nbytes // 2) * size // max(total, 1), size - 1)].append(piece)
    return shares


def _pieces(part: Part, most: int) -> list[Part]:
    """A part of a tensor divided into pieces of about `most` bytes, along the first dimension that is not 1."""
    shape = part.value.shape
    dim = next((dim for dim, size in enumerate(shape) if size > 1), None)
    if part.nbytes <= 2 * most or dim is None:
        return [part]
    return _slabs(part, max(-(-shape[dim] * most // part.nbytes), 1), dim)


def _place(part: Part) -> tuple[str, int]:
    """The file and the offset of a tensor's first byte."""
    for extent in part.value.extents():
        return (str(extent.source.path), extent.offset) if isinstance(extent.source, StoredSource) else ("", 0)
    return "", 0


def metadata_of(made: Layout, items: Mapping[tuple[str, Box | None], Item]) -> Metadata:
    """The metadata of a folder whose new items are written."""
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
