"""Renames: modules with similar names, of known layouts, or with shapes that no other has.

Shapes alone never decide between two names. Where several fit, what follows the last index has to be the same or to
mean the same, or at least two modules have to move alike; otherwise the possibilities are listed and none is proposed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import perm
from typing import Literal

from optimstate.plan.language.base import Operation
from optimstate.plan.language.rules import Rule
from optimstate.plan.solve.alternatives import Choice
from optimstate.plan.solve.by_shapes import changes, note_cut
from optimstate.plan.solve.families import Family, families_of, first_shapes, likeness, shift_of
from optimstate.plan.solve.known import Knowledge
from optimstate.plan.solve.search import Search, rule_of
from optimstate.record import Record

__all__ = ["called_alike", "left_open", "the_only_ones"]

Kind = Literal["same", "part", "changed"]
_LEAVES = {"gamma": "weight", "beta": "bias", "g": "weight", "b": "bias"}
_ORDERS = 24


class _Unit(Record):
    """A module with its own parameters, or one parameter by itself."""

    path: str
    leaves: Mapping[str, Family]


class _Edge(Record):
    """An old unit that can become a new one."""

    old: _Unit
    new: _Unit
    kind: Kind
    pairs: tuple[tuple[Family, Family], ...]
    shift: int

    @property
    def alike(self) -> float:
        """How similar the names are."""
        return max(likeness(one.pattern, other.pattern) for one, other in self.pairs)

    def rules(self) -> Iterator[tuple[Family, Family, Sequence[str], Sequence[str], tuple[Operation, ...], str]]:
        """For each parameter: the families, the templates of a rule, its operations and what they do."""
        for one, other in self.pairs:
            if self.kind == "part":
                names = _ranges(one, other)
                if names is not None:
                    yield one, other, [names[0]], [names[1]], (), ""
                continue
            source, target = one.template(counting=bool(self.shift)), other.template(shift=self.shift)
            shape, wanted = first_shapes(one, other)
            if shape == wanted or self.kind == "same":
                yield one, other, [source], [target], (), ""
            else:
                operation, _, reason = next(changes(shape, wanted))
                yield one, other, [source], [target], (operation,), reason


def called_alike(search: Search, known: Knowledge) -> None:
    """Modules whose names are equal apart from the prefix, or mean the same."""
    done = True
    while done:
        done = False
        for modules in (True, False):
            edges = list(_edges(search, ("same", "part", "changed"), modules=modules))
            moves = _moves(edges, known) if modules else {}
            ranks = {id(edge): _rank(edge, moves, known, modules=modules) for edge in edges}
            for edge in edges:
                if ranks[id(edge)][0] and _is_best(edge, edges, ranks):
                    done |= _propose_named(search, edge)


def the_only_ones(search: Search) -> None:
    """Modules with shapes that no other module on their side has."""
    first = True
    while True:
        done = False
        for modules in (True, False):
            edges = list(_edges(search, ("same",), modules=modules))
            for edge in edges:
                if sum(other.old is edge.old for other in edges) == sum(other.new is edge.new for other in edges) == 1:
                    done |= _propose_only(search, edge, first=first)
        if not done:
            return
        first = False


def left_open(search: Search) -> None:
    """Modules of the same shapes whose names do not decide: the possibilities are listed and none is taken."""
    for modules in (True, False):
        edges = list(_edges(search, ("same",), modules=modules))
        while edges:
            olds, news = _connected(edges)
            mine = [edge for edge in edges if any(edge.old is unit for unit in olds)]
            edges = [edge for edge in edges if not any(edge is each for each in mine)]
            if len(mine) > 1:
                _leave_open(search, mine, olds, news)


def _units(families: Mapping[str, Family], *, modules: bool) -> list[_Unit]:
    found: dict[str, dict[str, Family]] = {}
    for pattern, family in families.items():
        path, _, leaf = pattern.rpartition(".")
        if path and modules:
            found.setdefault(path, {})[_LEAVES.get(leaf, leaf)] = family
        else:
            found[pattern] = {"": family}
    return [_Unit(path, leaves) for path, leaves in found.items()]


def _edges(search: Search, kinds: Sequence[Kind], *, modules: bool = True) -> Iterator[_Edge]:
    olds, news = (_units(families_of(side), modules=modules) for side in (search.old, search.new))
    for old, new in itertools.product(olds, news):
        if old.path.count("#") != new.path.count("#"):
            continue
        common = [leaf for leaf in old.leaves if leaf in new.leaves]
        pairs = [(old.leaves[leaf], new.leaves[leaf]) for leaf in common]
        links = [_link(one, other) for one, other in pairs]
        if not links or None in links or (not modules and _are_weight_and_bias(old.path, new.path)):
            continue
        kind = max((link[0] for link in links if link), key=("same", "part", "changed").index)
        shifts = {link[1] for link in links if link}
        if kind in kinds and len(shifts) == 1:
            yield _Edge(old, new, kind, tuple(pairs), shifts.pop())


def _link(one: Family, other: Family) -> tuple[Kind, int] | None:
    """How a family can become another, and by how much its index moves."""
    shift = shift_of(one, other)
    if shift is not None:
        return "same", shift
    common = one.members.keys() & other.members.keys()
    if one.members.keys() == other.members.keys():
        return ("changed", 0) if next(changes(*first_shapes(one, other)), None) is not None else None
    if common and all(one.members[index][1] == other.members[index][1] for index in common):
        return "part", 0
    return None


def _are_weight_and_bias(one: str, other: str) -> bool:
    leaves = {_LEAVES.get(leaf, leaf) for leaf in (one.rpartition(".")[2], other.rpartition(".")[2])}
    return leaves == {"weight", "bias"}


# --- what names tell --------------------------------------------------------------------------------------------------


def _parts(unit: _Unit, known: Knowledge) -> list[str]:
    return known.meaning(unit.path).split(".")


def _tail(edge: _Edge, known: Knowledge) -> int:
    """How many components at the end are the same or mean the same."""
    one, other = _parts(edge.old, known), _parts(edge.new, known)
    pairs = zip(reversed(one), reversed(other), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _told(edge: _Edge, known: Knowledge, *, modules: bool) -> bool:
    """Whether everything after the last index is the same, or all of the shorter name where there is no index."""
    one, other, tail = _parts(edge.old, known), _parts(edge.new, known), _tail(edge, known)
    if one == other:
        return True
    if not modules and {*one[len(one) - tail :]} <= {"weight", "bias", "#"}:
        return False
    if "#" not in one or "#" not in other:
        return tail == min(len(one), len(other))
    return one[-1] != "#" and all(tail > parts[::-1].index("#") for parts in (one, other))


def _heads(edge: _Edge, known: Knowledge) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tail = _tail(edge, known)
    one, other = _parts(edge.old, known), _parts(edge.new, known)
    return tuple(one[: len(one) - tail]), tuple(other[: len(other) - tail])


def _moves(edges: Sequence[_Edge], known: Knowledge) -> dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]]:
    """For each pair of prefixes, the common endings that follow them."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], set[str]] = {}
    for edge in edges:
        tail = _tail(edge, known)
        if tail:
            found.setdefault(_heads(edge, known), set()).add(".".join(_parts(edge.old, known)[-tail:]))
    return found


def _rank(
    edge: _Edge, moves: Mapping[tuple[tuple[str, ...], tuple[str, ...]], set[str]], known: Knowledge, *, modules: bool
) -> tuple[int, int, int]:
    """How much the names say for an edge: nothing where the first number is 0."""
    tail = _tail(edge, known)
    supported = tail > 0 and len(moves.get(_heads(edge, known), ())) > 1
    told = _told(edge, known, modules=modules)
    return 2 if told else 1 if supported else 0, tail, -("same", "part", "changed").index(edge.kind)


def _is_best(edge: _Edge, edges: Sequence[_Edge], ranks: Mapping[int, tuple[int, int, int]]) -> bool:
    mine = ranks[id(edge)]
    rivals = (other for other in edges if (other.old is edge.old) != (other.new is edge.new))
    return all(ranks[id(other)] < mine for other in rivals)


def _propose_named(search: Search, edge: _Edge) -> bool:
    same = edge.old.path.split(".")[-1] == edge.new.path.split(".")[-1]
    reason = "the same name behind another prefix" if same else "names that mean the same"
    if edge.old.path == edge.new.path:
        reason = "the same name"
    base = {"same": 0.75, "part": 0.6, "changed": 0.6}[edge.kind]
    done = False
    for one, other, sources, targets, operations, change in edge.rules():
        sure = base + (0.2 if edge.kind == "same" else 0.15) * likeness(one.pattern, other.pattern)
        told = f"{reason}, and {change}" if change else reason
        if edge.shift:
            told += f"; the index moves by {edge.shift}"
        if sources == targets and not operations:
            continue
        fits = search.propose(sources, targets, sure, told, *operations)
        done |= fits
        if fits and edge.kind == "part":
            search.note(_which_layers(one, other))
        if fits and operations:
            note_cut(search, one.pattern, *first_shapes(one, other))
    return done


def _which_layers(one: Family, other: Family) -> str:
    counts = len(one.members), len(other.members)
    what = "removed" if counts[0] > counts[1] else "added"
    return (
        f"{one.pattern.partition('#')[0]}* is there {counts[0]} times and wanted {counts[1]} times: those with the "
        f"same index are proposed, and names and shapes do not tell which were {what}. The contents would, or whoever "
        f"{what} them does"
    )


def _ranges(one: Family, other: Family) -> tuple[str, str] | None:
    """Templates of the members that both sides have; None where a template would match more."""
    common = sorted(one.members.keys() & other.members.keys())
    if len(common) == len(one.members):
        return one.template(), other.template()
    if one.pattern.count("#") > 1 and len({index[1:] for index in common}) * len({i[0] for i in common}) != len(common):
        return None
    values = [sorted({index[place] for index in common}) for place in range(one.pattern.count("#"))]
    if any(list(range(row[0], row[-1] + 1)) != row for row in values):
        return None
    sides = [Family(each.pattern, {index: each.members[index] for index in common}) for each in (one, other)]
    return sides[0].template(known=0), sides[1].template(known=0)


# --- what shapes tell -------------------------------------------------------------------------------------------------


def _propose_only(search: Search, edge: _Edge, *, first: bool) -> bool:
    done = False
    for one, other, sources, targets, operations, _ in edge.rules():
        shapes = sorted({str(list(shape)) for shape in one.shapes.values()})
        alike = likeness(one.pattern, other.pattern)
        if first:
            reason, sure = f"nothing else has the shape {shapes[0]} at these places, on either side", 0.7 + 0.25 * alike
        else:
            reason, sure = f"of those with the shape {shapes[0]} only these are left", 0.5 + 0.2 * alike
        if edge.shift:
            reason += f"; the index moves by {edge.shift}"
        done |= search.propose(sources, targets, sure, reason, *operations)
    return done


def _connected(edges: Sequence[_Edge]) -> tuple[list[_Unit], list[_Unit]]:
    """The units that the first edge is connected with, on either side."""
    olds, news = [edges[0].old], [edges[0].new]
    while True:
        more_new = [e.new for e in edges if _has(olds, e.old) and not _has(news, e.new)]
        news += _distinct(more_new)
        more_old = [e.old for e in edges if _has(news, e.new) and not _has(olds, e.old)]
        olds += _distinct(more_old)
        if not more_new and not more_old:
            return olds, news


def _has(units: Sequence[_Unit], unit: _Unit) -> bool:
    return any(each is unit for each in units)


def _distinct(units: Sequence[_Unit]) -> list[_Unit]:
    return list({id(unit): unit for unit in units}.values())


def _leave_open(search: Search, edges: Sequence[_Edge], olds: Sequence[_Unit], news: Sequence[_Unit]) -> None:
    names = [" and ".join(unit.path.replace("#", "*") for unit in side) for side in (olds, news)]
    shape = next(iter(edges[0].pairs[0][0].shapes.values()))
    about = (
        f"which of {names[0]} become which of {names[1]}: all have the shape {list(shape)}, and their names do not "
        "tell. A rehearsal would (--rehearse), or the old weights in the new layout, or the model's code"
    )
    fewer = min(len(olds), len(news))
    edge_of: Callable[[_Unit, _Unit], _Edge | None] = partial(_between, edges)
    if perm(max(len(olds), len(news)), fewer) > _ORDERS:
        search.note(about)
        search.set_aside(_names(edges))
        return
    choices = []
    for order in itertools.permutations(olds if len(olds) >= len(news) else news, fewer):
        sides = (order, news) if len(olds) >= len(news) else (olds, order)
        chosen = [edge_of(old, new) for old, new in zip(*sides, strict=True)]
        rules = [rule for edge in chosen if edge for rule in _plain_rules(edge)]
        if None not in chosen:
            alike = sum(edge.alike for edge in chosen if edge) / fewer
            reason = "by how alike the names are" if alike else "it fits the shapes"
            choices.append(Choice(tuple(rules), round(0.1 + 0.4 * alike / len(edges) ** 0.5, 3), reason))
    search.leave_open(about, choices)


def _between(edges: Sequence[_Edge], old: _Unit, new: _Unit) -> _Edge | None:
    return next((edge for edge in edges if edge.old is old and edge.new is new), None)


def _plain_rules(edge: _Edge) -> Iterator[Rule]:
    for _, _, sources, targets, operations, _ in edge.rules():
        rule = rule_of(sources, targets, *operations)
        if rule is not None:
            yield rule


def _names(edges: Sequence[_Edge]) -> tuple[list[str], list[str]]:
    """The names that the edges could take, and those that they could make."""
    pairs = [pair for edge in edges for pair in edge.pairs]
    return (
        [name for one, _ in pairs for name, _ in one.members.values()],
        [name for _, other in pairs for name, _ in other.members.values()],
    )
