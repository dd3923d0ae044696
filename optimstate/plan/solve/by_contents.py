"""Rules that the contents of tensors tell: what is equal, and how elements are arranged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import ReshapeDims
from optimstate.plan.solve.arranging import arranged
from optimstate.plan.solve.families import INDEX, Family, families_of, first_shapes
from optimstate.plan.solve.search import Search

__all__ = ["equal", "rearranged", "rearranged_in_part"]


def equal(search: Search) -> None:
    """Names with equal contents on both sides that no other name has."""
    places, wanted = _owners(search.old, search.had), _owners(search.new, search.wanted)
    pairs = {
        names[0]: wanted[content][0]
        for content, names in places.items()
        if len(names) == 1 and len(wanted.get(content, ())) == 1
    }
    olds, news = families_of(search.old), families_of(search.new)
    for family in olds.values():
        target = {INDEX.sub("#", pairs[name]) for name, _ in family.members.values() if name in pairs}
        other = news.get(target.pop()) if len(target) == 1 else None
        if other is not None and all(
            pairs.get(name) == other.members.get(i, ("",))[0] for i, (name, _) in family.members.items()
        ):
            _same_content(search, family.template(), other.template(), *first_shapes(family, other))
    for source, target_name in pairs.items():
        if source in search.old and target_name in search.new:
            _same_content(search, source, target_name, search.old[source], search.new[target_name])


def _owners(names: dict[str, Shape], contents: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if name in contents:
            found.setdefault(contents[name], []).append(name)
    return found


def _same_content(search: Search, source: str, target: str, had: Shape, wanted: Shape) -> None:
    if had == wanted:
        search.propose([source], [target], 1.0, "the contents are the same")
    else:
        search.propose([source], [target], 1.0, "the same contents in another shape", ReshapeDims(wanted))


def rearranged(search: Search) -> None:
    """Tensors whose elements are arranged differently, under the same or another name.

    A name with the same shape on both sides is among them: its contents say whether it is kept.
    """
    for family in families_of({name: search.shapes[name] for name in search.kept}).values():
        for source, target, operations, reason in _arrangements(search, family, family):
            if operations:
                search.unkeep(_members(source, family))
                search.propose([source], [target], 1.0, reason, *operations)
    _arranged(search, whole=True)


def rearranged_in_part(search: Search) -> None:
    """Tensors of another name that contain only part of the elements."""
    _arranged(search, whole=False)


def _arranged(search: Search, *, whole: bool) -> None:
    found = list(_candidates(search, whole=whole))
    # The same contents under another name decide nothing where several have them: zeros, ones, copies.
    equal = [(source, target) for source, target, operations, _ in found if not operations and source != target]
    sources, targets = Counter(source for source, _ in equal), Counter(target for _, target in equal)
    for source, target, operations, reason in found:
        if operations or (source != target and sources[source] == targets[target] == 1):
            search.propose([source], [target], 1.0, reason, *operations)


def _candidates(search: Search, *, whole: bool) -> Iterator[tuple[str, str, tuple[Operation, ...], str]]:
    news = families_of(search.new)
    for pattern, family in families_of(search.old).items():
        for other in sorted(news.values(), key=lambda other: other.pattern != pattern):
            shape, wanted = first_shapes(family, other)
            if whole and other.pattern != pattern and prod(shape) != prod(wanted):
                continue
            if other.members.keys() == family.members.keys():
                yield from _arrangements(search, family, other)


def _members(source: str, family: Family) -> list[str]:
    return [name for name, _ in family.members.values()] if source == family.template() else [source]


def _arrangements(
    search: Search, family: Family, other: Family
) -> Iterator[tuple[str, str, tuple[Operation, ...], str]]:
    """The sides and operations of rules: one for all members if all are arranged alike, else one each."""
    found = []
    for index, (name, had) in family.members.items():
        target, wanted = other.members[index]
        made = arranged(search.rows, name, target, had, wanted)
        if made is None:
            return
        found.append((name, target, *made))
    if len({operations for _, _, operations, _ in found}) == 1:
        found = [(family.template(), other.template(), *found[0][2:])]
    yield from found
