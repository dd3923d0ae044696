"""Combining moves whose names differ only in integers into one rule, which is checked against all names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.base import Operation
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.record import Record

__all__ = ["CAPTURES", "TOKENS", "Moves", "Pattern", "family_rules", "listed", "matched"]


CAPTURES = ("i", "j", "k", "l", "m", "n")
TOKENS = re.compile(r"\d+|[^\d.]+|\.")


class Moves(Record):
    """One application of a rule: the names of its sources and targets in order, and the operations."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()


class _Enumeration(Record):
    """A part of a name that has each of these values in turn; several enumerations form a product."""

    values: tuple[str, ...]


_Cell = str | _Enumeration
Pattern = tuple[_Cell, ...]


class _Shape(Record):
    """The names of a move as patterns; moves whose patterns differ only in integers may be one rule."""

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]


def _compressed(names: Sequence[str]) -> tuple[Pattern, ...]:
    """Names in order as patterns whose enumerations, as a product, give exactly these names."""
    made: list[Pattern] = []
    start = 0
    while start < len(names):
        for stop in range(len(names), start, -1):
            pattern = _pattern(names[start:stop])
            if pattern is not None:
                made.append(pattern)
                start = stop
                break
    return tuple(made)


def _pattern(names: Sequence[str]) -> Pattern | None:
    if len(names) == 1:
        return tuple(TOKENS.findall(names[0]))
    rows = [name.split(".") for name in names]
    if len({len(row) for row in rows}) > 1:
        return None
    columns = [tuple(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    expected: list[tuple[str, ...]] = [()]
    for values in columns:
        expected = [(*row, value) for row in expected for value in values]
        if len(expected) > len(rows):
            return None
    if [tuple(row) for row in rows] != expected:
        return None
    cells: list[_Cell] = []
    for values in columns:
        if cells:
            cells.append(".")
        cells += TOKENS.findall(values[0]) if len(values) == 1 else [_Enumeration(values)]
    return tuple(cells)


def _skeleton(pattern: Pattern) -> Pattern:
    return tuple("#" if isinstance(cell, str) and cell.isdigit() else cell for cell in pattern)


def _integers(patterns: Iterable[Pattern]) -> list[int]:
    return [int(cell) for pattern in patterns for cell in pattern if isinstance(cell, str) and cell.isdigit()]


def family_rules(moves: Sequence[Moves], names: Sequence[str]) -> list[Rule]:
    """One rule for each family of moves that differ only in integers."""
    families: dict[object, list[tuple[_Shape, Moves]]] = defaultdict(list)
    for move in moves:
        shape = _Shape(_compressed(move.sources), _compressed(move.targets))
        key = (
            tuple(map(_skeleton, shape.sources)),
            tuple(map(_skeleton, shape.targets)),
            tuple(map(str, move.operations)),
        )
        families[key].append((shape, move))
    return [rule for family in families.values() for rule in _family(family, names)]


def _family(family: Sequence[tuple[_Shape, Moves]], names: Sequence[str]) -> list[Rule]:
    """One rule, or one for each move if no template covers them all."""
    if len(family) > 1:
        olds = list(zip(*(_integers(shape.sources) for shape, _ in family), strict=True))
        news = list(zip(*(_integers(shape.targets) for shape, _ in family), strict=True))
        wanted = {name for _, move in family for name in move.sources}
        for ranged, by_target in ((False, False), (False, True), (True, False)):
            rule = _ruled(family[0], olds, news, ranged=ranged, by_target=by_target)
            if rule is not None and matched(rule, names) == wanted and _makes(rule, [move for _, move in family]):
                return [rule]
    return [_literal(shape, move) for shape, move in family]


def _ruled(
    first: tuple[_Shape, Moves],
    olds: Sequence[tuple[int, ...]],
    news: Sequence[tuple[int, ...]],
    *,
    ranged: bool,
    by_target: bool,
) -> Rule | None:
    shape, move = first
    variables: dict[tuple[int, ...], str] = {}
    for column in news if by_target else olds:
        if len(set(column)) > 1 and column not in variables and not any(_affine(v, column) for v in variables):
            if len(variables) == len(CAPTURES):
                return None
            variables[column] = CAPTURES[len(variables)]
    before = [_cell(column, variables, ranged=ranged, source=True) for column in olds]
    after = [_cell(column, variables, ranged=ranged, source=False) for column in news]
    if None in before or None in after:
        return None
    return _rule(shape, move, [str(cell) for cell in before], [str(cell) for cell in after])


def _cell(
    column: tuple[int, ...], variables: Mapping[tuple[int, ...], str], *, ranged: bool, source: bool
) -> str | None:
    """The template text for an integer in a name, from its values in all moves of a family; None without one."""
    if len(set(column)) == 1:
        return str(column[0])
    if column in variables:
        name = variables[column]
        if not source:
            return f"{{{name}}}"
        return f"{{{name}={listed(sorted(set(column)))}}}" if ranged else f"{{{name}:int}}"
    for values, name in variables.items():
        found = _affine(values, column)
        if found:
            factor, offset = found
            head = name if factor == 1 else f"{factor}*{name}"
            return f"{{{head}{offset:+d}}}" if offset else f"{{{head}}}"
    return None


def _affine(values: Sequence[int], column: Sequence[int]) -> tuple[int, int] | None:
    """The factor (from 1 on) and the offset with which one column is a linear function of another, or None."""
    low = min(range(len(values)), key=values.__getitem__)
    high = max(range(len(values)), key=values.__getitem__)
    if values[low] == values[high]:
        return None
    factor, rest = divmod(column[high] - column[low], values[high] - values[low])
    offset = column[low] - factor * values[low]
    good = not rest and factor > 0 and all(factor * v + offset == c for v, c in zip(values, column, strict=True))
    return (factor, offset) if good else None


def listed(values: Sequence[int]) -> str:
    """Integers as written in an enumeration, as a range if they are one."""
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return "|".join(map(str, values))


def _literal(shape: _Shape, move: Moves) -> Rule:
    """A rule for one move, with literal names except for enumerations."""
    before = [str(value) for value in _integers(shape.sources)]
    after = [str(value) for value in _integers(shape.targets)]
    rule = _rule(shape, move, before, after)
    if rule is None or not _makes(rule, [move]):
        literal = tuple(map(Template.literal, move.sources)), tuple(map(Template.literal, move.targets))
        return Rule(*literal, move.operations)
    return rule


def _rule(shape: _Shape, move: Moves, before: Sequence[str], after: Sequence[str]) -> Rule | None:
    numbers = iter(before)
    sources = tuple(_text(pattern, numbers, "a") for pattern in shape.sources)
    numbers = iter(after)
    targets = tuple(_text(pattern, numbers, "b") for pattern in shape.targets)
    try:
        return Rule(tuple(map(Template, sources)), tuple(map(Template, targets)), move.operations)
    except PlanSyntaxError:
        return None


def _text(pattern: Pattern, numbers: Iterator[str], prefix: str) -> str:
    made, count = [], 0
    for cell in pattern:
        if isinstance(cell, _Enumeration):
            integers = all(value.isdigit() and str(int(value)) == value for value in cell.values)
            values = listed([int(value) for value in cell.values]) if integers else "|".join(cell.values)
            made.append(f"{{{prefix}{count}={values}}}")
            count += 1
        elif cell.isdigit():
            made.append(next(numbers))
        else:
            made.append(cell)
    return "".join(made)


def matched(rule: Rule, names: Iterable[str]) -> set[str]:
    """The names that the sources of a rule match."""
    return {name for name in names if any(template.match(name) is not None for template in rule.sources)}


def _makes(rule: Rule, moves: Sequence[Moves]) -> bool:
    """Whether the rule makes exactly the targets of these moves from their sources."""
    for move in moves:
        made: dict[str, None] = {}
        for name in move.sources:
            found = next(
                ((template, captures) for template in rule.sources if (captures := template.match(name)) is not None),
                None,
            )
            if found is None:
                return False
            made.update(dict.fromkeys(rule.names_for(*found)))
        if tuple(made) != move.targets:
            return False
    return True
