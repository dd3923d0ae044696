"""What every operation of a rule is, and how its value is written; `operations` has the operations themselves."""

# ruff: noqa: ARG002 - all operations are called alike

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.record import Record

__all__ = [
    "OPERATIONS",
    "Irreversible",
    "Misfit",
    "Operation",
    "are_integers",
    "counted",
    "is_integer",
    "is_number",
    "is_table",
    "known_shape",
    "listed",
    "toml_key",
    "toml_value",
    "unsized",
]


class Misfit(Exception):
    """An operation does not fit the shapes it meets; the planner says where."""


class Irreversible(Exception):
    """An operation loses something, so nothing undoes it.

    Args:
        message: What it loses.
        needs_names: Whether it loses nothing once the names and shapes of the checkpoint are known.
    """

    def __init__(self, message: str, *, needs_names: bool = False) -> None:
        super().__init__(message)
        self.needs_names = needs_names


OPERATIONS: dict[str, type[Operation]] = {}
"""Every operation by its key; a class with a key of its own adds itself."""


class Operation(Record):
    """One step of a rule.

    A subclass is a whole operation: its key and an example of how it is written, how a value is parsed and written,
    what it does to tensors, and what undoes it.
    """

    KEY: ClassVar[str] = ""
    EXAMPLE: ClassVar[str] = ""
    JOINS: ClassVar[bool] = False  # makes one tensor of many
    CUTS: ClassVar[bool] = False  # makes many of one

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.KEY:
            OPERATIONS[cls.KEY] = cls

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        """What `KEY = value` of a plan file means; None where it means nothing."""
        raise NotImplementedError

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        """The tensors that come out.

        Args:
            tensors: What the rule has in hand.
            targets: How many names the rule produces, for operations that make many of one.

        Raises:
            Misfit: The shapes do not allow it.
        """
        return [self._each(tensor) for tensor in tensors]

    def _each(self, tensor: Expr) -> Expr:
        """What comes of one tensor; operations that need its shape have `_sized` instead."""
        shape = known_shape(tensor)
        return unsized(self.KEY, tensor) if shape is None else self._sized(tensor, shape)

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        raise NotImplementedError

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        """The operations that undo it.

        Args:
            before: The shapes it was applied to; None where they are not known.

        Raises:
            Irreversible: Nothing does, or not without the shapes.
        """
        raise Irreversible(f"{self.KEY} loses what it leaves out")

    def value(self) -> Any:
        """What is written after the key in a plan file."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"{self.KEY} = {toml_value(self.value())}"


def toml_value(value: Any) -> str:
    """A value as TOML writes it in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{toml_key(key)} = {toml_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    raise PlanSyntaxError(f"{value!r} cannot be written in a plan file")


def toml_key(key: str) -> str:
    """A key as TOML writes it."""
    return key if key and all(c.isascii() and (c.isalnum() or c in "_-") for c in key) else toml_value(key)


def known_shape(tensor: Expr) -> Shape | None:
    """The shape of a tensor, None where it is not known."""
    if isinstance(tensor, Node) and isinstance(tensor.step, ex.Unsized):
        return None
    return tensor.shape


def unsized(key: str, *tensors: Expr) -> Expr:
    """What an operation makes of tensors of unknown shape."""
    return Node(ex.Unsized(key), tuple(tensors), None)


def counted(key: str, dim: int, shape: Shape, room: int = 0) -> int:
    """A dimension counted from either end, as one counted from the front."""
    rank = len(shape) + room
    if not -rank <= dim < rank:
        raise Misfit(f"{key}: there is no dimension {dim} in shape {list(shape)}")
    return dim % rank


def listed(shapes: Sequence[Shape]) -> str:
    """Shapes as messages show them."""
    return ", ".join(str(list(shape)) for shape in dict.fromkeys(shapes))


def is_integer(value: Any) -> bool:
    """Whether a value of a plan file is an integer."""
    return isinstance(value, int) and not isinstance(value, bool)


def are_integers(value: Any) -> bool:
    """Whether it is a list of integers, at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_integer, value))


def is_number(value: Any) -> bool:
    """Whether it is an integer or a float."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_table(value: Any, required: Collection[str], optional: Collection[str] = ()) -> bool:
    """Whether it is a table with these keys and no others."""
    return isinstance(value, dict) and set(required) <= value.keys() <= {*required, *optional}
