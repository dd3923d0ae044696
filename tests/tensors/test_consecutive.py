"""Tensors that are read one after the other have the bytes that each has by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from optimstate.io.extents import Extent, InMemory
from optimstate.tensors.lazy import LazyTensor, Storage, consecutive

DATA = bytes(range(256)) * 16


@st.composite
def tensors(draw: st.DrawFn) -> LazyTensor:
    """A tensor, perhaps without elements, transposed, or in pieces."""
    rows, columns = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    start, cut = draw(st.integers(0, 1000)), draw(st.integers(0, 4 * rows * columns))
    nbytes = 4 * rows * columns
    pieces = (Extent(InMemory(DATA), start, cut), Extent(InMemory(DATA), 2000 + start, nbytes - cut))
    stride = (1, rows) if draw(st.booleans()) else None
    return LazyTensor(Storage(pieces, nbytes), "float32", (rows, columns), stride)


@given(st.lists(tensors(), max_size=8))
def test_blocks_are_those_of_each_tensor(found: list[LazyTensor]) -> None:
    assert [b"".join(blocks) for blocks in consecutive(found)] == [tensor.tobytes() for tensor in found]
