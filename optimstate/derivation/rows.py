"""Selecting rows of one dimension, or blocks of rows, in an order without strides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod

from optimstate.derivation.programs import Program, Wanted, divisors, reshapes
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.operations import OPERATIONS

__all__ = ["selections"]

Reshape, Select, Flip, Gather = (OPERATIONS[key] for key in ("reshape", "select", "flip", "gather"))
_INLINE = 64  # rows up to which a plan lists them; longer lists become a separate index


def selections(shape: Shape, wanted: Wanted) -> Iterator[Program]:
    """Selections of rows in one dimension by a list: a permutation, a flip."""
    for dim, (old, size) in enumerate(zip(shape, wanted.shape, strict=True)):
        if not size or any(a != b for at, (a, b) in enumerate(zip(shape, wanted.shape, strict=True)) if at != dim):
            continue
        first = wanted.ids.reshape(wanted.shape).movedim(dim, 0).reshape(size, -1)[:, 0]
        index = tuple((first // prod(shape[dim + 1 :]) % old).tolist())
        for rows in divisors(gcd(old, size)):
            chosen = _blocks(index, rows)
            if chosen is not None:
                yield from _chosen(shape, dim, rows, chosen, wanted.shape)
                break


def _blocks(index: Sequence[int], rows: int) -> tuple[int, ...] | None:
    """The blocks of `rows` rows of which a list of rows consists; None if it does not."""
    starts = index[::rows]
    if any(start % rows for start in starts):
        return None
    whole = tuple(start + row for start in starts for row in range(rows))
    return tuple(start // rows for start in starts) if whole == tuple(index) else None


def _chosen(shape: Shape, dim: int, rows: int, blocks: tuple[int, ...], new: Shape) -> Iterator[Program]:
    """Programs that put blocks of a dimension into another order, such as the halves of gate and up exchanged."""
    count = shape[dim] // rows
    if blocks == tuple(range(count)):
        return  # the order is the same
    if blocks == tuple(range(count - 1, -1, -1)):
        choice: Operation = Flip((dim,))
    else:
        choice = Select(dim, blocks) if len(blocks) <= _INLINE else Gather(dim, blocks)
    if rows == 1:
        yield (choice,)
        return
    cut_up = (*shape[:dim], len(blocks), rows, *shape[dim + 1 :])
    for closing in reshapes(cut_up, new):
        yield (Reshape((count, -1), dim), choice, *closing)
