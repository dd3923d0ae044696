"""Rules that join several parameters or cut one into several, and the ways in which their rows can follow."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import gcd

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import ReshapeDims
from optimstate.plan.language.joining import Concat, Split
from optimstate.plan.language.rows import Select
from optimstate.plan.solve.alternatives import Choice
from optimstate.plan.solve.arranging import placed
from optimstate.plan.solve.families import Family, adds_up, families_of, last_of, order_known, outside_of
from optimstate.plan.solve.search import Search, rule_of

__all__ = ["cut", "joined"]

_JOINED_UP_TO = 4
_USUAL_ROWS = (128, 64, 256, 96, 80, 32)
"""Sizes of a head that are met often."""
Use = Callable[[Search, Sequence[Family], Family, int], bool]


def joined(search: Search) -> None:
    """Several neighbouring parameters whose sizes add up to one that is wanted."""
    for target in list(families_of(search.new).values()):
        _groups(search, target, families_of(search.old), joining=True)


def cut(search: Search) -> None:
    """One parameter whose size is that of several wanted neighbours together."""
    for source in list(families_of(search.old).values()):
        _groups(search, source, families_of(search.new), joining=False)


def _groups(search: Search, one: Family, others: Mapping[str, Family], *, joining: bool) -> None:
    near = [
        family
        for family in others.values()
        if family.members.keys() == one.members.keys() and last_of(family.pattern) == last_of(one.pattern)
    ]
    near = [family for family in near if outside_of(family.pattern) == outside_of(one.pattern)]
    for count in range(2, min(len(near), _JOINED_UP_TO) + 1):
        fitting = [
            (parts, dim)
            for parts in itertools.combinations(near[:8], count)
            for dim in (0, 1)
            if all(adds_up([part.shapes[i] for part in parts], shape, dim) for i, shape in one.shapes.items())
        ]
        told = [entry for entry in fitting if order_known(entry[0]) or _order_of(search, *entry, one, joining)[0] == 1]
        if len(fitting) == 1 or len(told) == 1:
            _propose(search, *(told or fitting)[0], one, joining)
            return
        if fitting:
            choices = [choice for parts, dim in fitting for choice in _ways(parts, one, dim, joining)]
            search.leave_open(_about(fitting[0][0], one, "; other parameters have the same shapes"), choices)
            return


def _propose(search: Search, parts: Sequence[Family], dim: int, one: Family, joining: bool) -> None:
    sure, reason, select = _order_of(search, parts, dim, one, joining)
    names = [part.template() for part in parts]
    operations: list[Operation] = [*_in_blocks(parts, dim, joining)]
    operations = [*operations, *select] if joining else [*select, *operations]
    sources, targets = (names, [one.template()]) if joining else ([one.template()], names)
    if search.propose(sources, targets, sure, reason, *operations) and sure < 1:
        ways = list(_ways(parts, one, dim, joining))
        search.leave_open(_about(parts, one), ways, proposed=True, module=one.pattern.rpartition(".")[0])


def _about(parts: Sequence[Family], one: Family, more: str = "") -> str:
    listed = " and ".join(part.pattern.replace("#", "*") for part in parts)
    return (
        f"{one.pattern.replace('#', '*')} may hold {listed} in blocks, in another order, or interleaved (a row of each "
        f"in turn, or head by head): names and shapes are the same for all{more}. A rehearsal would decide "
        "(--rehearse), or the old weights in the layout of the new model, or the model's code"
    )


def _in_blocks(parts: Sequence[Family], dim: int, joining: bool) -> list[Operation]:
    sizes = tuple(next(iter(part.shapes.values()))[dim] for part in parts)
    return [Concat(dim)] if joining else [Split(dim, () if len(set(sizes)) == 1 else sizes)]


def _order_of(
    search: Search, parts: Sequence[Family], dim: int, one: Family, joining: bool
) -> tuple[float, str, tuple[Select, ...]]:
    """How certain the order of the parts is, why, and how the rows are ordered where parts are interleaved."""
    found = set()
    for index, (name, _) in one.members.items():
        names = [part.members[index][0] for part in parts]
        found.add(placed(search.rows, *((names, [name]) if joining else ([name], names)), dim))
    places = found.pop() if len(found) == 1 else None
    if places is not None and places == tuple(range(len(places))):
        return 1.0, "the rows are the same, one part below the other", ()
    if places is not None:
        return 1.0, "the rows are the same, and interleaved", (Select(dim, places),)
    side = "checkpoint" if joining else "target"
    sure = 0.7 if order_known(parts) else 0.5
    return sure, f"the sizes of dimension {dim} add up; the order is that of the {side}", ()


def _ways(parts: Sequence[Family], one: Family, dim: int, joining: bool) -> Iterator[Choice]:
    """The plans that fit the shapes: in blocks, in another order, and interleaved in each possible number of groups."""
    known = order_known(parts)
    for number, order in enumerate(itertools.permutations(parts)):
        listed = ", ".join(part.pattern.split(".")[-2] for part in order)
        sure = (0.7 if known else 0.5) if not number else 0.25
        yield from _choice(order, one, _in_blocks(order, dim, joining), joining, sure, f"in blocks: {listed}")
        if number > 5:
            break
    sizes = [next(iter(part.shapes.values()))[dim] for part in parts]
    whole = gcd(*sizes)
    for groups in (count for count in range(2, whole + 1) if whole % count == 0):
        rows = min(sizes) // groups
        usual = 0.4 if rows in _USUAL_ROWS else 0.2 if rows > 1 else 0.3
        reason = f"interleaved: {rows} rows of each in turn" if len(set(sizes)) == 1 else f"in {groups} groups"
        yield from _choice(parts, one, _interleaved(parts, dim, groups, joining), joining, usual, reason)


def _choice(
    parts: Sequence[Family], one: Family, operations: Sequence[Operation], joining: bool, sure: float, reason: str
) -> Iterator[Choice]:
    names = [part.template() for part in parts]
    rule = rule_of(*((names, [one.template()]) if joining else ([one.template()], names)), *operations)
    if rule is not None:
        yield Choice((rule,), sure, reason)


def _interleaved(parts: Sequence[Family], dim: int, groups: int, joining: bool) -> list[Operation]:
    shapes: list[Shape] = [next(iter(part.shapes.values())) for part in parts]
    sizes = [shape[dim] for shape in shapes]
    whole, each = sum(sizes), tuple(size // groups for size in sizes)
    if joining:
        return [
            ReshapeDims((groups, -1), dim),
            Concat(dim + 1),
            ReshapeDims((whole,), dim, (groups, whole // groups)),
        ]
    flat = (*shapes[0][:dim], -1, *shapes[0][dim + 1 :])
    return [ReshapeDims((groups, -1), dim), Split(dim + 1, each if len(set(each)) > 1 else ()), ReshapeDims(flat)]
