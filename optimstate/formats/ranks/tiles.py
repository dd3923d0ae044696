"""Tensors that are stored in pieces, which are boxes in the index space of the tensor, joined without arithmetic.

Pieces that divide only the first dimension are a concatenation of extents. Others are gathered a block of rows at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from math import prod
from typing import NamedTuple

from optimstate.errors import CorruptCheckpointError, UnsupportedCheckpointError
from optimstate.io.extents import Extent
from optimstate.tensors.dtypes import DTYPES
from optimstate.tensors.lazy import LazyTensor, Storage

__all__ = ["Box", "DeferredStorage", "Tile", "check_tiling", "region", "tensor_of_pieces", "tiled"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""The offsets of a piece in each dimension, and its sizes."""

_MAX_IRREGULAR = 2000  # pieces that do not form a grid, which are compared pair by pair


class Tile(NamedTuple):
    """A piece: its offset in each dimension, its sizes, and its elements in row-major order."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    storage: Storage


class DeferredStorage(Storage):
    """A storage whose bytes are located when they are first asked for.

    Args:
        nbytes: The number of bytes.
        locate: Returns the extents of the bytes; called once.
        kind: As for `Storage`.
        location: As for `Storage`.
    """

    __slots__ = ("_locate", "_pieces")

    def __init__(
        self, nbytes: int, locate: Callable[[], tuple[Extent, ...]], kind: str = "UntypedStorage", location: str = "cpu"
    ) -> None:
        self._locate = locate
        self._pieces: tuple[Extent, ...] | None = None
        self.nbytes = nbytes
        self.kind = kind
        self.location = location
        self.key = ""
        self.crc = None

    def locate(self) -> tuple[Extent, ...]:
        """The extents of the bytes."""
        return self._locate()

    @property
    def pieces(self) -> tuple[Extent, ...]:  # type: ignore[override]
        """The extents of the bytes, located at the first call."""
        if self._pieces is None:
            self._pieces = self.locate() if self.nbytes else ()
            found = sum(piece.length for piece in self._pieces)
            if found != self.nbytes:
                raise CorruptCheckpointError(f"expected {self.nbytes} bytes, found {found}")
        return self._pieces


def tensor_of_pieces(dtype: str, shape: tuple[int, ...], pieces: Callable[[], Sequence[Tile]]) -> LazyTensor:
    """A tensor of pieces that fill it (see `check_tiling`) and are located when its elements are first needed."""
    about = DTYPES[dtype]
    nbytes = prod(shape) * about.itemsize
    storage = DeferredStorage(nbytes, lambda: tiled(shape, about.itemsize, pieces()), about.storage_class)
    return LazyTensor(storage, dtype, shape)


def check_tiling(shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """Check that boxes fill an index space exactly.

    Raises:
        CorruptCheckpointError: The boxes overlap, leave a hole, or reach outside.
        UnsupportedCheckpointError: There are more than 2,000 boxes that do not form a grid.
    """
    shape = tuple(shape)
    for offsets, sizes in boxes:
        if not len(offsets) == len(sizes) == len(shape) or any(
            o < 0 or n < 0 or o + n > limit for o, n, limit in zip(offsets, sizes, shape, strict=True)
        ):
            raise CorruptCheckpointError(f"a piece of {sizes} at {offsets} is outside of the shape {shape}")
    full = [(offsets, sizes) for offsets, sizes in boxes if 0 not in sizes]
    held = sum(prod(sizes) for _, sizes in full)
    if held != prod(shape) or (not _is_grid(len(shape), full) and not _are_disjoint(full)):
        hole = _hole(shape, full)
        missing = f": {region(*hole)} is missing" if hole else ""
        raise CorruptCheckpointError(f"{len(full)} pieces of {held} elements do not fill the shape {shape}{missing}")


def region(offsets: Sequence[int], sizes: Sequence[int]) -> str:
    """A box as a slice in Python: `[0:4, 2:8]`."""
    return "[" + ", ".join(f"{start}:{start + size}" for start, size in zip(offsets, sizes, strict=True)) + "]"


def _hole(shape: tuple[int, ...], boxes: Sequence[Box]) -> Box | None:
    """The first cell outside all boxes, in the grid formed by all their edges; None if there is none or too many."""
    cuts = [
        sorted({0, size, *(o[d] for o, _ in boxes), *(o[d] + n[d] for o, n in boxes)}) for d, size in enumerate(shape)
    ]
    if prod(map(len, cuts)) * max(len(boxes), 1) > _MAX_IRREGULAR**2:
        return None
    for cell in product(*(pairwise(edges) for edges in cuts)):
        low, high = [start for start, _ in cell], [stop for _, stop in cell]
        if not any(all(o <= a and b <= o + n for a, b, o, n in zip(low, high, *box, strict=True)) for box in boxes):
            return tuple(low), tuple(b - a for a, b in cell)
    return None


def _is_grid(dimensions: int, boxes: Sequence[Box]) -> bool:
    """Whether the boxes are distinct cells of one grid, and thus do not overlap."""
    if len({offsets for offsets, _ in boxes}) != len(boxes):
        return False
    for d in range(dimensions):
        intervals = sorted({(offsets[d], offsets[d] + sizes[d]) for offsets, sizes in boxes})
        if any(stop > start for (_, stop), (start, _) in pairwise(intervals)):
            return False
    return True


def _are_disjoint(boxes: Sequence[Box]) -> bool:
    if len(boxes) > _MAX_IRREGULAR:
        raise UnsupportedCheckpointError(f"{len(boxes)} pieces of one tensor that do not form a grid")
    for index, (a, n) in enumerate(boxes):
        for b, m in boxes[:index]:
            if all(x < y + k and y < x + j for x, j, y, k in zip(a, n, b, m, strict=True)):
                return False
    return True


def tiled(shape: Sequence[int], itemsize: int, tiles: Sequence[Tile]) -> tuple[Extent, ...]:
    """The extents of a tensor in row-major order, from pieces that fill it (see `check_tiling`)."""
    tiles = sorted((tile for tile in tiles if 0 not in tile.sizes), key=lambda tile: tile.offsets)
    cut = [d for d, size in enumerate(shape) if any(tile.sizes[d] != size for tile in tiles)]
    if not cut or cut == [0]:
        return tuple(piece for tile in tiles for piece in tile.storage.pieces)
    nbytes = prod(shape) * itemsize
    return (Extent(_InterleavedSource(tuple(shape), itemsize, tiles, cut[-1]), 0, nbytes),)


class _InterleavedSource:
    """Row-major bytes of a tensor cut along dimension `axis` (and perhaps others before it), gathered on demand.

    An outer row has the elements at one index of the dimensions before `axis`; each piece has one run of its bytes.
    """

    def __init__(self, shape: tuple[int, ...], itemsize: int, tiles: Sequence[Tile], axis: int) -> None:
        self._outer = shape[:axis]
        self._row_bytes = prod(shape[axis:]) * itemsize
        self._rows = prod(self._outer)
        inner = prod(shape[axis + 1 :]) * itemsize
        boxes: dict[Box, list[tuple[int, int, Storage]]] = {}
        for tile in tiles:
            outer_box = (tile.offsets[:axis], tile.sizes[:axis])
            boxes.setdefault(outer_box, []).append((tile.offsets[axis], tile.sizes[axis] * inner, tile.storage))
        self._bands = [_Band(*box, members, self._outer) for box, members in boxes.items()]

    def read(self, offset: int, length: int) -> bytes:
        """Bytes [offset, offset + length) of the row-major order."""
        row, last = offset // self._row_bytes, -(-(offset + length) // self._row_bytes)
        skip = offset - row * self._row_bytes
        parts: list[bytes] = []
        while row < last:
            index = self._unravel(row)
            bands = [band for band in self._bands if band.holds(index)]
            run = min(last - row, min(band.rows_from(index) for band in bands))
            parts.append(_side_by_side([piece for band in bands for piece in band.pieces(index, run)], run))
            row += run
        return b"".join(parts)[skip : skip + length]

    def _unravel(self, row: int) -> tuple[int, ...]:
        index = []
        for size in reversed(self._outer):
            row, at = divmod(row, size)
            index.append(at)
        return tuple(reversed(index))


class _Band:
    """The pieces that cover the same outer rows."""

    def __init__(
        self,
        offsets: tuple[int, ...],
        sizes: tuple[int, ...],
        members: list[tuple[int, int, Storage]],
        outer: tuple[int, ...],
    ) -> None:
        self.offsets = offsets
        self.sizes = sizes
        self.members = members
        # After this dimension the band is as wide as the tensor, so its consecutive rows are consecutive in the pieces.
        narrower = [d for d in range(len(outer)) if sizes[d] != outer[d]]
        self.free = min(narrower[-1] if narrower else 0, max(len(outer) - 1, 0))

    def holds(self, index: tuple[int, ...]) -> bool:
        return all(o <= i < o + n for o, n, i in zip(self.offsets, self.sizes, index, strict=True))

    def local_row(self, index: tuple[int, ...]) -> int:
        row = 0
        for o, n, i in zip(self.offsets, self.sizes, index, strict=True):
            row = row * n + i - o
        return row

    def rows_from(self, index: tuple[int, ...]) -> int:
        """The number of outer rows, from this one on, that are consecutive rows of the pieces."""
        below = prod(self.sizes[self.free + 1 :])
        left = self.offsets[self.free] + self.sizes[self.free] - index[self.free]
        done = 0
        for o, n, i in list(zip(self.offsets, self.sizes, index, strict=True))[self.free + 1 :]:
            done = done * n + i - o
        return left * below - done

    def pieces(self, index: tuple[int, ...], rows: int) -> list[tuple[int, int, bytes]]:
        """(offset along the axis, bytes per row, the bytes of `rows` rows) of each member."""
        first = self.local_row(index)
        return [
            (at, width, b"".join(extent.read() for extent in storage.cut(first * width, (first + rows) * width)))
            for at, width, storage in self.members
        ]


def _side_by_side(pieces: list[tuple[int, int, bytes]], rows: int) -> bytes:
    pieces.sort(key=lambda piece: piece[0])
    return b"".join(data[row * width : (row + 1) * width] for row in range(rows) for _, width, data in pieces)
