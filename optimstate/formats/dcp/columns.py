"""The items of a distributed checkpoint in columns, because folders of the largest runs have a million of them.

There is a row for each piece of a tensor and for each other item, with the number of its file, its offset and its
length. Names, forms and boxes that are equal are one object.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError
from optimstate.tree import Path

__all__ = ["Box", "Chunk", "Form", "Item", "Metadata"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a piece begins in each dimension, and its sizes."""
_NOWHERE = -1


class Item(NamedTuple):
    """Where one item is: a file of the folder, an offset and a length."""

    file: str
    offset: int
    length: int


class Form(NamedTuple):
    """What the elements of a tensor are."""

    dtype: str
    shape: tuple[int, ...]
    requires_grad: bool


class Chunk(NamedTuple):
    """A piece of a tensor: its box, and the item that holds it."""

    box: Box
    item: Item


class Metadata:
    """What `.metadata` says.

    Attributes:
        order: The names of all items, as in the file.
        forms: Of each item what its elements are; None for one that is not a tensor.
        numbers: The place of each name in `order`.
        first: The first row of each item, and behind them the number of all rows.
        boxes: Of each row the box that it fills; None for what is not a tensor. Equal boxes are one object.
        files: The names of the files that rows are in.
        file: Of each row the number of its file.
        offset: Of each row where in the file it begins.
        length: Of each row its number of bytes.
        paths: For each name the keys that lead to it in the saved state dict; empty where the file has none.
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
            name: A new one.
            form: None for what is not a tensor.
            boxes: Those of its pieces; of equal ones, which ranks list where each has a copy, one is kept.
        """
        self.numbers[name] = len(self.order)
        self.order.append(name)
        self.forms.append(form)
        self.boxes.extend(boxes if len(boxes) == 1 else dict.fromkeys(boxes))
        self.first.append(len(self.boxes))

    def place(self, name: str, start: tuple[int, ...] | None, item: tuple[Any, Any, Any]) -> None:
        """Say where the pieces of an item are that begin at `start`; of unknown items nothing is noted."""
        number = self.numbers.get(name)
        if number is None:
            return
        for row in range(self.first[number], self.first[number + 1]):
            box = self.boxes[row]
            if (box and box[0]) == start:
                self.put(row, name, item)

    def put(self, row: int, name: str, item: tuple[Any, Any, Any]) -> None:
        """Say where a row is.

        Raises:
            CorruptCheckpointError: That is outside of the folder, or nowhere.
        """
        file, offset, length = item
        known = self._files.get(file) if type(file) is str else None
        if known is None:
            if type(file) is not str or "/" in file or "\\" in file or file in ("", ".", ".."):
                raise CorruptCheckpointError(
                    f"item {describe(name)} is said to be in {describe(file)}, outside the folder"
                )
            known = self._files[file] = len(self.files)
            self.files.append(file)
        if type(offset) is not int or type(length) is not int or offset < 0 or length < 0 or offset + length >> 63:
            raise CorruptCheckpointError(
                f"item {describe(name)} is said to be at {describe(offset)}, {describe(length)} bytes long"
            )
        if row >= len(self.file):
            self._allocate()
        self.file[row], self.offset[row], self.length[row] = known, offset, length

    def _allocate(self) -> None:
        """Rows for all boxes, which are nowhere yet."""
        missing = len(self.boxes) - len(self.file)
        self.file.extend(array("i", [_NOWHERE]) * missing)
        self.offset.frombytes(bytes(8 * missing))
        self.length.frombytes(bytes(8 * missing))

    def add_tensor(self, name: str, form: Form, chunks: Iterable[Chunk]) -> None:
        """Add a tensor and where its pieces are."""
        found = list(chunks)
        self.add(name, form, [chunk.box for chunk in found])
        for row, chunk in enumerate(found, self.first[-2]):
            self.put(row, name, chunk.item)

    def add_object(self, name: str, item: Item) -> None:
        """Add what is not a tensor, and where it is."""
        self.add(name, None)
        self.put(self.first[-2], name, item)

    def check(self) -> None:
        """Every row is somewhere.

        Raises:
            CorruptCheckpointError: One is not.
        """
        self._allocate()
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
        """Where a row is."""
        return Item(self.files[self.file[row]], self.offset[row], self.length[row])

    def chunks(self, number: int) -> list[Chunk]:
        """The pieces of a tensor."""
        return [Chunk(box, self.item(row)) for row in self.rows(number) if (box := self.boxes[row]) is not None]

    def tensors(self) -> Iterator[tuple[int, str, Form]]:
        """Number, name and form of every tensor."""
        for number, form in enumerate(self.forms):
            if form is not None:
                yield number, self.order[number], form

    def objects(self) -> Iterator[tuple[str, Item]]:
        """Everything that is not a tensor, and where it is."""
        for number, form in enumerate(self.forms):
            if form is None:
                yield self.order[number], self.item(self.first[number])
