"""Recognising the algorithm of a state: one table of all known optimizers, and conventions for unknown ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from optimstate.describe import describe
from optimstate.entry_points import entry_points_of
from optimstate.errors import StateMismatchError
from optimstate.state.algorithms import bitsandbytes, libraries, torch
from optimstate.state.algorithms.slots import GRADIENT, MASTERS, SCALAR, SQUARE, Algorithm, Slot, SlotKind

__all__ = [
    "ALGORITHMS",
    "ENTRY_POINTS",
    "conventional",
    "inferred_kind",
    "named",
    "nearest",
    "parameter_shape",
    "recognise",
    "recognise_state",
]

Shape = tuple[int, ...]


ALGORITHMS: tuple[Algorithm, ...] = (*torch.ALGORITHMS, *bitsandbytes.ALGORITHMS, *libraries.ALGORITHMS)
"""The algorithms that are known here, in the order in which they are tried."""

ENTRY_POINTS = "optimstate.algorithms"
"""The group of entry points by which other packages add algorithms. Each is an `Algorithm`, or a list of them."""


def recognise(slots: Iterable[Any], options: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm whose state has these slots and whose groups have these options, or None.

    Args:
        slots: The names of the slots. Master weights are ignored, because they do not depend on the algorithm.
        options: The options of one param group.
    """
    names = dict.fromkeys(map(str, slots))
    own = [name for name in names if name not in MASTERS] or list(names)
    return _first(ALGORITHMS, own, options) or _first(_outside(), own, options)


def nearest(slots: Iterable[Any], options: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm of torch that has these slots, and all options of a group but one that is absent; else None.

    Args:
        slots: The names of the slots; without any, nothing tells.
        options: The options of a param group.
    """
    names = sorted(set(map(str, slots)) - MASTERS)
    return next(
        (
            found
            for found in torch.ALGORITHMS
            if names and found.could_be(names, options) and len(found.options - options.keys()) == 1
        ),
        None,
    )


def named(name: str) -> Algorithm | None:
    """The algorithm with a name, or None."""
    return next((algorithm for algorithm in (*ALGORITHMS, *_outside()) if algorithm.name == name), None)


def recognise_state(state: Iterable[Mapping[Any, Any] | None], options: Mapping[str, Any]) -> Algorithm | None:
    """The algorithm that has the slots of all parameters together, or None.

    Args:
        state: The slots of each parameter.
        options: The options of one param group.
    """
    return recognise(dict.fromkeys(slot for slots in state for slot in slots or ()), options)


def _first(among: Iterable[Algorithm], slots: Sequence[str], options: Mapping[str, Any]) -> Algorithm | None:
    return next((algorithm for algorithm in among if algorithm.matches(slots, options)), None)


@cache
def _outside() -> tuple[Algorithm, ...]:
    """The algorithms of other packages.

    Raises:
        StateMismatchError: An entry point is not an algorithm.
    """
    found: list[Algorithm] = []
    for point in entry_points_of(ENTRY_POINTS):
        made = point.load()
        several = [made] if isinstance(made, Algorithm) else list(made)
        if not all(isinstance(item, Algorithm) for item in several):
            raise StateMismatchError(
                f"the entry point {describe(point.name)} of {point.value} is not an algorithm",
                hint="`optimstate.state.algorithms.slots` describes what an algorithm has to define.",
            )
        found.extend(several)
    return tuple(found)


_CONVENTIONAL: dict[str, Slot] = {
    "exp_avg": GRADIENT,
    "exp_avg_sq": SQUARE,
    "max_exp_avg_sq": SQUARE,
    "momentum_buffer": GRADIENT,
    "square_avg": SQUARE,
    "step": SCALAR,
}


def conventional(name: str, shape: Shape | None, parameter: Shape | None) -> Slot | None:
    """The meaning of an unknown optimizer's slot by the usual meaning of its name, if its shape agrees; else None."""
    slot = _CONVENTIONAL.get(name)
    if slot is None or (slot.kind == "like_param" and (shape is None or shape != parameter)):
        return None
    return slot


def inferred_kind(shape: Shape | None, parameter: Shape | None) -> SlotKind:
    """The kind of an unknown optimizer's slot, judged by its shape alone.

    Args:
        shape: The slot's shape; () for a number, None for anything that is not a tensor of a plain dtype.
        parameter: The shape of its parameter; None if it is not known.
    """
    if shape is None:
        return "opaque"
    if shape == () and parameter != ():
        return "scalar"
    if parameter is None:
        return "opaque"
    if shape == parameter:
        return "like_param"
    if len(parameter) >= 2:
        if shape == (*parameter[:-1], 1):
            return "row"
        if shape == (*parameter[:-2], 1, parameter[-1]):
            return "col"
    return "opaque"


def parameter_shape(slots: Mapping[str, Shape | None], algorithm: Algorithm | None) -> Shape | None:
    """A parameter's shape, inferred from its slots; None if they do not determine it."""
    row = col = None
    for name, shape in slots.items():
        slot = algorithm.slot(name) if algorithm is not None else _CONVENTIONAL.get(name)
        if shape is None or slot is None:
            continue
        if slot.is_elementwise:
            return shape
        row = shape if slot.kind == "row" else row
        col = shape if slot.kind == "col" else col
    if row is not None and col is not None:
        return _factored_shape(row, col)
    if algorithm is None:
        counts = Counter(shape for shape in slots.values() if shape is not None and shape != ())
        if len(counts) == 1:
            return next(iter(counts))
    return None


def _factored_shape(row: Shape, col: Shape) -> Shape | None:
    """The shape whose means over the last two dimensions have these shapes; averaged dimensions may be kept as 1."""
    if len(row) == len(col) >= 2 and row[-1] == 1 and col[-2] == 1:
        return (*row[:-1], col[-1])
    if len(row) == len(col) >= 1 and row[:-1] == col[:-1]:
        return (*row, col[-1])
    return None
