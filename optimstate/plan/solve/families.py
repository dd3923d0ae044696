"""Families of names: those of all layers together, which differ only in their indices."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from optimstate.plan.expressions.tree import Shape
from optimstate.record import Record

__all__ = [
    "INDEX",
    "Family",
    "adds_up",
    "families_of",
    "first_shapes",
    "last_of",
    "likeness",
    "order_known",
    "outside_of",
    "shift_of",
]


Indices = tuple[int, ...]


_LETTERS = "ijklmn"


class Family(Record):
    """Names that differ only in their indices: the text between the indices, and the members by index."""

    pattern: str
    members: Mapping[Indices, tuple[str, Shape]]

    @property
    def shapes(self) -> dict[Indices, Shape]:
        """Of the members, by index."""
        return {index: shape for index, (_, shape) in self.members.items()}

    def template(self, *, counting: bool = False, shift: int = 0, known: int = 9) -> str:
        """The pattern with captures; those from `known` on are ranges of what there is."""
        parts = self.pattern.split("#")
        made = parts[0]
        for place, part in enumerate(parts[1:]):
            letter = _LETTERS[place]
            if place >= known:
                values = sorted({index[place] for index in self.members})
                letter = f"{letter}={values[0]}..{values[-1]}"
            elif shift:
                letter = f"{letter}{shift:+d}"
            elif counting:
                letter += ":int"
            made += "{" + letter + "}" + part
        return made


INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def families_of(names: Mapping[str, Shape]) -> dict[str, Family]:
    """The families of some names, by pattern."""
    found: dict[str, dict[Indices, tuple[str, Shape]]] = {}
    for name, shape in names.items():
        indices = tuple(map(int, INDEX.findall(name)))
        found.setdefault(INDEX.sub("#", name), {})[indices] = name, shape
    return {pattern: Family(pattern, members) for pattern, members in found.items() if pattern.count("#") <= 6}


def first_shapes(family: Family, other: Family) -> tuple[Shape, Shape]:
    """The shapes of one member of each."""
    return next(iter(family.shapes.values())), next(iter(other.shapes.values()))


def shift_of(family: Family, other: Family) -> int | None:
    """By how much the indices shift; None where the families do not correspond."""
    if family.pattern.count("#") != other.pattern.count("#") or len(family.members) != len(other.members):
        return None
    if family.shapes == other.shapes:
        return 0
    if family.pattern.count("#") != 1:
        return None
    by = min(other.members)[0] - min(family.members)[0]
    return by if {(i + by,): shape for (i,), shape in family.shapes.items()} == other.shapes else None


def likeness(one: str, other: str) -> float:
    """How similar two patterns are; the last component counts most."""
    ratio = difflib.SequenceMatcher(None, one, other).ratio()
    return 0.5 * ratio + 0.5 * (last_of(one) == last_of(other))


def last_of(pattern: str) -> str:
    """The last component: `weight`."""
    return pattern.rpartition(".")[2]


def outside_of(pattern: str) -> str:
    """The pattern without its module's own name and its leaf."""
    return ".".join(pattern.split(".")[:-2])


def adds_up(parts: Sequence[Shape], whole: Shape, dim: int) -> bool:
    """Whether parts of these shapes, joined along a dimension, have the shape of the whole."""
    if len(whole) <= dim or any(len(part) != len(whole) for part in parts):
        return False
    rest = {(*part[:dim], *part[dim + 1 :]) for part in parts}
    return rest == {(*whole[:dim], *whole[dim + 1 :])} and sum(part[dim] for part in parts) == whole[dim]


_USUAL = ("qkv", "wqwkwv", "querykeyvalue", "gateup", "w1w3", "q_projk_projv_proj", "gate_projup_proj")


def order_known(parts: Sequence[Family]) -> bool:
    """Whether the order of neighbours is a common one."""
    return "".join(part.pattern.split(".")[-2] for part in parts if "." in part.pattern) in _USUAL
