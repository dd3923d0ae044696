"""What of a folder that is written is kept from the folder it came from, and which file has what is new.

The bytes of an item say nothing of its name, so an item that only changed its name stays where it is, in the pieces in
which ranks wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from optimstate.formats.dcp.columns import Box, Chunk, Form, Item, Metadata
from optimstate.formats.dcp.pieces import Pieces, PieceStorage
from optimstate.formats.dcp.tree import Leaves
from optimstate.io.extents import StoredSource
from optimstate.record import Record
from optimstate.tensors.lazy import LazyTensor, contiguous_strides

__all__ = ["Layout", "Part", "layout", "metadata_of"]

_DATA_FILE = re.compile(r"__(\d+)_(\d+)\.distcp")
_ARCHIVE_BYTES = 2048  # of an archive beside the elements, about
_PIECES = 8  # a tensor larger than this part of a share is cut, so that shares are equal


class Part(NamedTuple):
    """An item, or a piece of a tensor, that is written anew.

    Attributes:
        name: Of the item.
        box: Where the piece is in its tensor; None for what is not a tensor.
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


def layout(leaves: Leaves, source: Pieces | None, *, ranks: int | None = None, team: int = 1) -> Layout:
    """Decide what is kept and what is written into which file.

    Args:
        leaves: All items.
        source: The pieces of the folder that the items came from, where they did.
        ranks: Write every tensor anew, cut along its first dimension for so many ranks; None keeps what can be kept.
        team: How many processes write; each has a file of its own.
    """
    kept = {} if source is None or ranks else _kept(leaves, source)
    new = {name: leaf for name, (_, leaf) in leaves.items() if name not in kept}
    made = Layout(leaves, source, kept, {})
    if ranks:
        shares = _for_ranks(new, ranks)
    else:
        parts = [Part(name, _whole(leaf), leaf) for name, leaf in new.items()]
        shares = [parts] if team == 1 else cut(parts, team)
    taken = [] if source is None else [source.metadata.files[number] for number in made.linked()]
    last = [-1] * len(shares)
    for match in filter(None, map(_DATA_FILE.fullmatch, taken)):
        if int(match[1]) < len(last):
            last[int(match[1])] = max(last[int(match[1])], int(match[2]))
    files = {f"__{rank}_{last[rank] + 1}.distcp": parts for rank, parts in enumerate(shares) if parts}
    return made._replace(files=files)


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


def cut(parts: Sequence[Part], size: int) -> list[list[Part]]:
    """Parts in the order in which their bytes are in files, cut into shares of about equal bytes."""
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
    box, value = part.box, part.value
    assert box is not None
    if part.nbytes <= 2 * most or not value.shape or value.shape[0] < 2:
        return [part]
    rows = value.shape[0]
    each = max(-(-rows * most // part.nbytes), 1)
    made = []
    for start in range(0, rows, each):
        piece = value.narrow(0, start, min(each, rows - start))
        made.append(Part(part.name, ((box[0][0] + start, *box[0][1:]), piece.shape), piece))
    return made


def _place(part: Part) -> tuple[str, int]:
    """Where the first byte of a tensor is."""
    for extent in part.value.extents():
        return (str(extent.source.path), extent.offset) if isinstance(extent.source, StoredSource) else ("", 0)
    return "", 0


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
