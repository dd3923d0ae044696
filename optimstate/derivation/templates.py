"""From many moves with spelled-out names to few rules with templates.

A template is kept only if it was checked against every name that it could meet: one that matches a name it is not meant
for is replaced by an enumeration, or the names are spelled out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence

from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.base import Operation
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.record import Record

__all__ = ["Moves", "drops", "generalised"]

_CAPTURES = ("i", "j", "k", "l", "m", "n")
_TOKENS = re.compile(r"\d+|[^\d.]+|\.")


class Moves(Record):
    """One application of a rule, by name: what it takes, in order, what it makes, in order, and how."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    operations: tuple[Operation, ...] = ()


class _Enumeration(Record):
    """A place in a name that takes each of these values in turn, together with the others of its kind as a product."""

    values: tuple[str, ...]


_Cell = str | _Enumeration
_Pattern = tuple[_Cell, ...]


class _Shape(Record):
    """The names of a move with their integers taken out: moves of one shape may be one rule."""

    sources: tuple[_Pattern, ...]
    targets: tuple[_Pattern, ...]


def generalised(moves: Sequence[Moves], names: Iterable[str]) -> list[Rule]:
    """Rules that make exactly these moves among these names, as few as are found.

    Args:
        moves: No source is taken twice. What keeps its name is not among them.
        names: Every name of the pass; those of no move must match no rule.
    """
    everything = list(names)
    arranged = [move for move in moves if not _is_rename(move)]
    renames = {move.sources[0]: move.targets[0] for move in moves if _is_rename(move)}
    rules = _families(arranged, everything)
    taken = {name for move in arranged for name in move.sources}
    left = [name for name in everything if name not in taken]
    return [*_merged_words(rules, everything), *_renamings(renames, left)]


def _is_rename(move: Moves) -> bool:
    return not move.operations and len(move.sources) == len(move.targets) == 1


def drops(dropped: Sequence[str], names: Iterable[str]) -> list[Rule]:
    """Rules that leave names out: whole modules where nothing of them stays."""
    kept = set(names) - set(dropped)
    prefixes = {".".join(name.split(".")[:count]) for name in kept for count in range(1, name.count(".") + 1)}
    made: dict[str, None] = {}
    for name in dropped:
        parts = name.split(".")
        heads = (".".join(parts[:count]) for count in range(1, len(parts)))
        head = next((head for head in heads if head not in prefixes), None)
        made[f"{head}.**" if head is not None else name] = None
    groups: dict[_Pattern, list[str]] = defaultdict(list)
    for text in made:
        groups[tuple("#" if token.isdigit() else token for token in _TOKENS.findall(text))].append(text)
    return [rule for texts in groups.values() for rule in _dropping(texts)]


def _dropping(texts: Sequence[str]) -> list[Rule]:
    """One rule where the texts differ in one integer, else one for each."""
    rows = [_TOKENS.findall(text) for text in texts]
    varying = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
    if len(varying) == 1:
        (at,) = varying
        values = sorted(int(row[at]) for row in rows)
        return [Rule((Template("".join((*rows[0][:at], f"{{i={_listed(values)}}}", *rows[0][at + 1 :]))),))]
    return [Rule((Template.literal(text) if not text.endswith("**") else Template(text),)) for text in texts]


# --- patterns -------------------------------------------------------------------------------------------------------


def _compressed(names: Sequence[str]) -> tuple[_Pattern, ...]:
    """Names in order as patterns whose enumerations, as a product, give exactly them."""
    made: list[_Pattern] = []
    start = 0
    while start < len(names):
        for stop in range(len(names), start, -1):
            pattern = _pattern(names[start:stop])
            if pattern is not None:
                made.append(pattern)
                start = stop
                break
    return tuple(made)


def _pattern(names: Sequence[str]) -> _Pattern | None:
    if len(names) == 1:
        return tuple(_TOKENS.findall(names[0]))
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
        cells += _TOKENS.findall(values[0]) if len(values) == 1 else [_Enumeration(values)]
    return tuple(cells)


def _skeleton(pattern: _Pattern) -> _Pattern:
    return tuple("#" if isinstance(cell, str) and cell.isdigit() else cell for cell in pattern)


def _integers(patterns: Iterable[_Pattern]) -> list[int]:
    return [int(cell) for pattern in patterns for cell in pattern if isinstance(cell, str) and cell.isdigit()]


# --- families of moves that differ in integers ----------------------------------------------------------------------


def _families(moves: Sequence[Moves], names: Sequence[str]) -> list[Rule]:
    """One rule for each family of moves that differ in integers only."""
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
    """One rule, or one for each move where no template says them all."""
    if len(family) > 1:
        olds = list(zip(*(_integers(shape.sources) for shape, _ in family), strict=True))
        news = list(zip(*(_integers(shape.targets) for shape, _ in family), strict=True))
        wanted = {name for _, move in family for name in move.sources}
        for ranged, by_target in ((False, False), (False, True), (True, False)):
            rule = _ruled(family[0], olds, news, ranged=ranged, by_target=by_target)
            if rule is not None and _matched(rule, names) == wanted and _makes(rule, [move for _, move in family]):
                return [rule]
        # The largest part of the family that is one rule, and the rest by itself: layers of which some are different.
    return [_spelled(shape, move) for shape, move in family]


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
            if len(variables) == len(_CAPTURES):
                return None
            variables[column] = _CAPTURES[len(variables)]
    before = [_cell(column, variables, ranged=ranged, source=True) for column in olds]
    after = [_cell(column, variables, ranged=ranged, source=False) for column in news]
    if None in before or None in after:
        return None
    return _rule(shape, move, [str(cell) for cell in before], [str(cell) for cell in after])


def _cell(
    column: tuple[int, ...], variables: Mapping[tuple[int, ...], str], *, ranged: bool, source: bool
) -> str | None:
    """How an integer of a name is written over all moves of a family."""
    if len(set(column)) == 1:
        return str(column[0])
    if column in variables:
        name = variables[column]
        if not source:
            return f"{{{name}}}"
        return f"{{{name}={_listed(sorted(set(column)))}}}" if ranged else f"{{{name}:int}}"
    for values, name in variables.items():
        found = _affine(values, column)
        if found:
            factor, offset = found
            head = name if factor == 1 else f"{factor}*{name}"
            return f"{{{head}{offset:+d}}}" if offset else f"{{{head}}}"
    return None


def _affine(values: Sequence[int], column: Sequence[int]) -> tuple[int, int] | None:
    """The factor (from 1) and offset that make one column of another."""
    low = min(range(len(values)), key=values.__getitem__)
    high = max(range(len(values)), key=values.__getitem__)
    if values[low] == values[high]:
        return None
    factor, rest = divmod(column[high] - column[low], values[high] - values[low])
    offset = column[low] - factor * values[low]
    good = not rest and factor > 0 and all(factor * v + offset == c for v, c in zip(values, column, strict=True))
    return (factor, offset) if good else None


def _listed(values: Sequence[int]) -> str:
    if len(values) > 2 and list(values) == list(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return "|".join(map(str, values))


def _spelled(shape: _Shape, move: Moves) -> Rule:
    """The move with its names spelled out but for enumerations."""
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


def _text(pattern: _Pattern, numbers: Iterator[str], prefix: str) -> str:
    made, count = [], 0
    for cell in pattern:
        if isinstance(cell, _Enumeration):
            integers = all(value.isdigit() and str(int(value)) == value for value in cell.values)
            values = _listed([int(value) for value in cell.values]) if integers else "|".join(cell.values)
            made.append(f"{{{prefix}{count}={values}}}")
            count += 1
        elif cell.isdigit():
            made.append(next(numbers))
        else:
            made.append(cell)
    return "".join(made)


def _matched(rule: Rule, names: Iterable[str]) -> set[str]:
    return {name for name in names if any(template.match(name) is not None for template in rule.sources)}


def _makes(rule: Rule, moves: Sequence[Moves]) -> bool:
    """Whether the rule gives every source of the moves their targets."""
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


# --- rules that differ in one word ----------------------------------------------------------------------------------


def _merged_words(rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
    """Rules with equal operations that differ in one word of a single source and target are made one."""
    left = list(rules)
    merged = True
    while merged:
        merged = False
        groups: dict[object, list[tuple[Rule, str, str, int, int]]] = defaultdict(list)
        for rule in left:
            if len(rule.sources) != 1 or len(rule.targets) != 1:
                continue
            old, new = _words(rule.sources[0].text), _words(rule.targets[0].text)
            for at, word in enumerate(old):
                for to, other in enumerate(new):
                    if "{" in word or "{" in other:
                        continue
                    key = (
                        tuple(map(str, rule.operations)),
                        tuple(old[:at]), tuple(old[at + 1 :]),
                        tuple(new[:to]), tuple(new[to + 1 :]),
                    )  # fmt: skip
                    groups[key].append((rule, word, other, at, to))
        for group in sorted(groups.values(), key=len, reverse=True):
            if len(group) < 2 or len({word for _, word, _, _, _ in group}) < len(group):
                continue
            made = _with_words(group)
            members = [member for member, _, _, _, _ in group]
            if made is not None and _matched(made, names) == {n for member in members for n in _matched(member, names)}:
                place = left.index(members[0])
                left = [item for item in left if item not in members]
                left.insert(min(place, len(left)), made)
                merged = True
                break
    return left


def _words(text: str) -> list[str]:
    return re.split(r"(?<=\.)|(?=\.)", text)


def _with_words(group: Sequence[tuple[Rule, str, str, int, int]]) -> Rule | None:
    rule, _, _, at, to = group[0]
    old, new = _words(rule.sources[0].text), _words(rule.targets[0].text)
    old[at] = f"{{x={'|'.join(word for _, word, _, _, _ in group)}}}"
    same = all(word == other for _, word, other, _, _ in group)
    new[to] = "{x}" if same else f"{{x={'|'.join(other for _, _, other, _, _ in group)}}}"
    if len({other for _, _, other, _, _ in group}) < len(group):
        return None
    try:
        return Rule((Template("".join(old)),), (Template("".join(new)),), rule.operations)
    except PlanSyntaxError:
        return None


# --- renames --------------------------------------------------------------------------------------------------------


def _renamings(renames: Mapping[str, str], names: Sequence[str]) -> list[Rule]:
    """Rules for pure renames: the candidate that says most of what is left, until all is said."""
    moves = [Moves((old,), (new,)) for old, new in renames.items()]
    kept = [Moves((name,), (name,)) for name in names if name not in renames]
    candidates: dict[str, Rule] = {}
    for members in (moves, [*moves, *kept]):
        families = _families(members, names)
        for rule in (*families, *_merged_words(families, names)):
            candidates[str(rule)] = rule
    for old, new in renames.items():
        for rule in _around(old, new):
            candidates.setdefault(str(rule), rule)
    said: list[tuple[Rule, dict[str, str]]] = []
    for rule in candidates.values():
        results = _results(rule, names)
        if any(name in renames for name in results) and all(renames.get(n, n) == new for n, new in results.items()):
            said.append((rule, results))
    made: list[Rule] = []
    open_ = dict(renames)
    while open_:
        rule, results = max(said, key=lambda item: (sum(name in open_ for name in item[1]), -len(str(item[0]))))
        made.append(rule)
        for name in results:
            open_.pop(name, None)
    return made


def _results(rule: Rule, names: Sequence[str]) -> dict[str, str]:
    found = {}
    (template,) = rule.sources
    for name in names:
        captures = template.match(name)
        if captures is not None:
            made = rule.names_for(template, captures)
            found[name] = made[0] if len(made) == 1 else ""
    return found


def _around(old: str, new: str) -> Iterator[Rule]:
    """Common beginning, what changed, common end: with the integers of the middle as they are, and as captures."""
    before, after = old.split("."), new.split(".")
    shortest = min(len(before), len(after))
    head = 0
    while head < shortest and before[head] == after[head]:
        head += 1
    tail = 0
    while tail < shortest - head and before[-1 - tail] == after[-1 - tail]:
        tail += 1
    for first in {0, head, max(head - 1, 0), max(head - 2, 0)}:
        for last in {0, tail, max(tail - 1, 0)}:
            if first > head:
                continue
            middle, other = before[first : len(before) - last], after[first : len(after) - last]
            if not middle and not other:
                continue
            ends = (["{h**}"] if first else []), (["{p**}"] if last else [])
            old_text = ".".join([*ends[0], *middle, *ends[1]])
            new_text = ".".join([*ends[0], *other, *ends[1]])
            yield from _both(old_text, new_text)


def _both(old: str, new: str) -> Iterator[Rule]:
    numbered = list(dict.fromkeys(re.findall(r"(?<![\w}])\d+(?![\w{])", old)))
    texts = [(old, new)]
    if numbered and len(numbered) <= len(_CAPTURES):
        one, other = old, new
        for value, name in zip(numbered, _CAPTURES, strict=False):
            one = re.sub(rf"(?<![\w}}]){value}(?![\w{{])", f"{{{name}:int}}", one, count=1)
            other = re.sub(rf"(?<![\w}}]){value}(?![\w{{])", f"{{{name}}}", other)
        texts.insert(0, (one, other))
    for left, right in texts:
        try:
            yield Rule((Template(left),), (Template(right),))
        except PlanSyntaxError:
            continue
