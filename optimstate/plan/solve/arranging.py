"""How the elements of one tensor stand in another, seen by their contents."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import Resize, Transpose
from optimstate.plan.language.rows import Select

__all__ = ["Rows", "arranged", "no_rows", "placed"]

Rows = Callable[[int, str, int], Sequence[bytes] | None]
"""For a side (0 for the old one), a name and a dimension something equal for equal rows along it; None if not known."""


def no_rows(_side: int, _name: str, _dim: int) -> None:
    """Rows that are not known."""


def placed(rows: Rows, sources: Sequence[str], targets: Sequence[str], dim: int) -> tuple[int, ...] | None:
    """Where in the old tensors, one behind the other, each row of the new ones is; None where it is not certain."""
    sides = [[rows(side, name, dim) for name in names] for side, names in enumerate((sources, targets))]
    if any(found is None for side in sides for found in side):
        return None
    had, wanted = ([row for found in side for row in found or ()] for side in sides)
    return tuple(range(len(had))) if had == wanted else _places(had, wanted)


def _places(had: Sequence[bytes], wanted: Sequence[bytes]) -> tuple[int, ...] | None:
    place = {row: number for number, row in enumerate(had)}
    if len(place) != len(had) or any(row not in place for row in wanted):
        return None
    return tuple(place[row] for row in wanted)


def arranged(
    rows: Rows, source: str, target: str, had: Shape, wanted: Shape
) -> tuple[tuple[Operation, ...], str] | None:
    """The operations that make one tensor of another, and the reason.

    Args:
        rows: The contents.
        source: The old name.
        target: The new one.
        had: The old shape.
        wanted: The new one.

    Returns:
        No operations for the same contents; None where the contents do not tell.
    """
    if len(had) == len(wanted) == 2 and had[::-1] == wanted:
        columns = rows(0, source, 1)
        if columns is not None and columns == rows(1, target, 0):
            return (Transpose(),), "rows and columns are exchanged, with the same contents"
    if len(had) != len(wanted):
        return None
    differing = [dim for dim, sizes in enumerate(zip(had, wanted, strict=True)) if sizes[0] != sizes[1]]
    for dim in differing or range(len(had)):
        found = _along(rows(0, source, dim), rows(1, target, dim), dim) if len(differing) <= 1 else None
        if found is not None:
            return found
    return None


def _along(
    had: Sequence[bytes] | None, wanted: Sequence[bytes] | None, dim: int
) -> tuple[tuple[Operation, ...], str] | None:
    if had is None or wanted is None:
        return None
    if had == wanted:
        return (), "the contents are the same"
    of_dim = f" of dimension {dim}" if dim else ""
    index = _places(had, wanted)
    if index is not None:
        return (Select(dim, index),), f"{len(wanted)} of the {len(had)} rows{of_dim} are there, with the same contents"
    at = _places(wanted, had) if len(wanted) > len(had) else None
    if at is None:
        return None
    grown = Resize(dim, len(wanted))
    if at == tuple(range(len(had))):
        return (grown,), f"the {len(had)} old rows{of_dim} are the first, with the same contents"
    new = iter(range(len(had), len(wanted)))
    back = {place: number for number, place in enumerate(at)}
    order = tuple(back[place] if place in back else next(new) for place in range(len(wanted)))
    reason = f"the {len(had)} old rows{of_dim} are there, with the same contents, among new ones"
    return (grown, Select(dim, order)), reason
