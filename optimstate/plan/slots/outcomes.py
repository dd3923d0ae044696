"""What becomes of slots, and how slots are found where libraries nest them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from optimstate.plan.expressions.evaluate import dtype_of, shape_of
from optimstate.plan.expressions.tree import Expr, Shape
from optimstate.problems import Kind, Problem
from optimstate.state.algorithms.slots import SlotKind

__all__ = [
    "OUTCOMES",
    "Level",
    "Outcome",
    "Parameter",
    "Refusal",
    "Signature",
    "SlotPath",
    "flat_slots",
    "flattened",
    "nested",
    "slot_name",
]

SlotPath = tuple[str | int, ...]
Level = Literal["exact", "approximate", "fresh", "dropped"]

OUTCOMES: tuple[Level, ...] = ("exact", "approximate", "fresh", "dropped")
"""From what loses nothing to what loses all."""


class Outcome(NamedTuple):
    """What becomes of a slot, or of a parameter itself.

    Attributes:
        level: How much of it arrives.
        reason: Why, or an empty string where there is nothing to say.
        kind: What the slot is.
        inferred: Whether that was concluded from its shape.
        made: How it is computed, a leaf alone being moved as it is; None where it is made as its parameter is.
    """

    level: Level
    reason: str = ""
    kind: SlotKind = "like_param"
    inferred: bool = False
    made: Expr | None = None


Signature = tuple[Shape | None, tuple[tuple[SlotPath, Shape | None, str | None], ...]]


class Parameter:
    """What is known of a parameter: its shape, and its slots by path."""

    __slots__ = ("_signature", "shape", "slots")

    def __init__(self, shape: Shape | None, slots: Mapping[SlotPath, Any]) -> None:
        self.shape, self.slots = shape, slots
        self._signature: Signature | None = None

    @property
    def signature(self) -> Signature:
        """Its shape, and the path, shape and dtype of each slot: all that most decisions depend on."""
        if self._signature is None:
            slots = tuple([(path, shape_of(value), dtype_of(value)) for path, value in self.slots.items()])
            self._signature = self.shape, slots
        return self._signature


class Refusal(Exception):
    """A slot cannot follow its parameter.

    Args:
        message: Why.
        remedy: What to do next, if something special.
        kind: What kind of problem that is.
    """

    def __init__(self, message: str, remedy: str = "", kind: Kind = "slot") -> None:
        super().__init__(message)
        self.message, self.remedy, self.kind = message, remedy, kind

    def problem(self, place: str, names: Sequence[str]) -> Problem:
        """This refusal as a problem of a parameter of the result."""
        return Problem(self.kind, self.message, place, tuple(names), self.remedy)


def flattened(slots: Mapping[Any, Any], prefix: SlotPath = ()) -> dict[SlotPath, Any]:
    """Every slot by the keys that lead to it, because some libraries nest them."""
    made: dict[SlotPath, Any] = {}
    for key, value in slots.items():
        if isinstance(value, dict):
            made.update(flattened(value, (*prefix, key)))
        else:
            made[(*prefix, key)] = value
    return made


def nested(slots: Mapping[SlotPath, Any]) -> dict[Any, Any]:
    """The slots as they were before `flattened`."""
    made: dict[Any, Any] = {}
    for path, value in slots.items():
        node = made
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = value
    return made


def flat_slots(slots: Mapping[Any, Any] | None) -> Iterator[tuple[SlotPath, Any]]:
    """Every slot with the keys that lead to it."""
    yield from flattened(slots or {}).items()


def slot_name(path: SlotPath) -> str:
    """The name of a slot in messages."""
    return ".".join(map(str, path))
