"""The items of a distributed checkpoint in columns, because folders of the largest runs have a million of them.

There is a row for each piece of a tensor and for each object, with the number of its file, its offset and its length.
Equal names, forms and boxes are one object.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError
from optimstate.formats.ranks.tiles import Box
from optimstate.tree import Path

__all__ = ["Box", "Chunk", "Form", "Item", "Metadata"]

_NOWHERE = -1


class Item(NamedTuple):
    """The place of an item: a file in the folder, an offset and a length."""

    file: str
    offset: int
    length: int


class Form(NamedTuple):
    """The dtype, the shape and `requires_grad` of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool


class Chunk(NamedTuple):
    """A piece of a tensor: its box and its place."""

    box: Box
    item: Item


class Metadata:
    """The contents of `.metadata`.

    Attributes:
        order: The names of all items in the order of the file.
        forms: The form of each item; None for an object.
        numbers: The index of each name in `order`.
        first: The first row of each item, followed by the number of rows.
        boxes: The box of each row; None for an object. Equal boxes are one object.
        files: The names of the data files.
        file: The index in `files` of each row.
        offset: The offset of each row in its file.
        length: The number of bytes of each row.
        paths: The path of each name in the saved state dict; empty if the file has none.
    """

    __slots__ = ("_files", "boxes", "file", "files", "first", "forms", "length", "numbers", "offset", "order", "paths")

    def __init__(self) -> None:
        self.order: list[str] = []
        self.forms: list[Form | None] = []
        self.numbers: dict[str, int] = {}
        self.first = array("q", [0])
        self.boxes: list[Box | None] = []
        self.files: list[str] = []
        self.file = array("i")
        self.offset = array("q")
        self.length = array("q")
        self.paths: dict[str, Path] = {}
        self._files: dict[str, int] = {}

    # --- filling --------------------------------------------------------------------------------------------------

    def add(self, name: str, form: Form | None, boxes: Sequence[Box | None] = (None,)) -> None:
        """Add an item whose rows have no places yet.

        Args:
            name: A new name.
            form: The form; None for an object.
            boxes: The boxes of its pieces; duplicates, which ranks with copies list, are removed.
        """
        self.numbers[name] = len(self.order)
        self.order.append(name)
        self.forms.append(form)
        self.boxes.extend(boxes if len(boxes) == 1 else dict.fromkeys(boxes))
        self.first.append(len(self.boxes))

    def extend(self, names: Sequence[str], entries: Sequence[tuple[Form | None, Sequence[Box | None]]]) -> None:
        """Add items without places, each with its form and its boxes, which must all differ."""
        begin = len(self.order)
        self.order.extend(names)
        self.numbers.update(zip(names, range(begin, len(self.order)), strict=True))
        self.forms.extend(form for form, _ in entries)
        self.boxes.extend(box for _, boxes in entries for box in boxes)
        counts = accumulate((len(boxes) for _, boxes in entries), initial=self.first[-1])
        self.first.extend(islice(counts, 1, None))

    def place(self, name: str, start: tuple[int, ...] | None, item: tuple[Any, Any, Any]) -> None:
        """Set the place of an item's pieces that begin at `start`; unknown names are ignored."""
        number = self.numbers.get(name)
        if number is None:
            return
        for row in range(self.first[number], self.first[number + 1]):
            box = self.boxes[row]
            if (box and box[0]) == start:
                self.put(row, name, item)

    def put(self, row: int, name: str, item: tuple[Any, Any, Any]) -> None:
        """Set the place of a row.

        Raises:
            CorruptCheckpointError: The place is outside the folder, or not a valid range.
        """
        file, offset, length = item
        known = self._files.get(file) if type(file) is str else None
        if known is None:
            known = self.number_of_file(file, name)
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length >> 63:
            raise CorruptCheckpointError(
                f"item {describe(name)} has the invalid offset {describe(offset)} or length {describe(length)}"
            )
        if row >= len(self.file):
            self.allocate()
        self.file[row], self.offset[row], self.length[row] = known, offset, length

    def number_of_file(self, file: Any, name: str = "") -> int:
        """The number of a file, which gets one if it has none.

        Args:
            file: The name of the file.
            name: The item that is in it, for the message.

        Raises:
            CorruptCheckpointError: It is outside the folder.
        """
        if type(file) is not str or "/" in file or "\\" in file or file in ("", ".", ".."):
            raise CorruptCheckpointError(f"item {describe(name)} is in {describe(file)}, outside the folder")
        known = self._files.setdefault(file, len(self.files))
        if known == len(self.files):
            self.files.append(file)
        return known

    def allocate(self) -> None:
        """Make rows without places for all boxes."""
        missing = len(self.boxes) - len(self.file)
        self.file.extend(array("i", [_NOWHERE]) * missing)
        self.offset.frombytes(bytes(8 * missing))
        self.length.frombytes(bytes(8 * missing))

    def add_tensor(self, name: str, form: Form, chunks: Iterable[Chunk]) -> None:
        """Add a tensor with the places of its pieces."""
        found = list(chunks)
        self.add(name, form, [chunk.box for chunk in found])
        for row, chunk in enumerate(found, self.first[-2]):
            self.put(row, name, chunk.item)

    def add_object(self, name: str, item: Item) -> None:
        """Add an object with its place."""
        self.add(name, None)
        self.put(self.first[-2], name, item)

    def check(self) -> None:
        """Check that every row has a place.

        Raises:
            CorruptCheckpointError: A row has none.
        """
        self.allocate()
        if _NOWHERE not in self.file:
            return
        row = self.file.index(_NOWHERE)
        number = next(number for number, stop in enumerate(self.first[1:]) if stop > row)
        name, box = describe(self.order[number]), self.boxes[row]
        what = f"item {name}" if box is None else f"the piece of tensor {name} at {box[0]}"
        raise CorruptCheckpointError(f"{what} has no place in any file")

    # --- reading --------------------------------------------------------------------------------------------------

    def rows(self, number: int) -> range:
        """The rows of an item."""
        return range(self.first[number], self.first[number + 1])

    def item(self, row: int) -> Item:
        """The place of a row."""
        return Item(self.files[self.file[row]], self.offset[row], self.length[row])

    def chunks(self, number: int) -> list[Chunk]:
        """The pieces of a tensor."""
        return [Chunk(box, self.item(row)) for row in self.rows(number) if (box := self.boxes[row]) is not None]

    def tensors(self) -> Iterator[tuple[int, str, Form]]:
        """Number, name and form of every tensor."""
        for number, form in enumerate(self.forms):
            if form is not None:
                yield number, self.order[number], form
