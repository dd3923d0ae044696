"""The search for rules that explain what is wanted by what there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod

from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import ReshapeDims, Resize, Transpose
from optimstate.plan.language.joining import Concat, Split
from optimstate.plan.language.rows import Select
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.arranging import Rows, arranged, placed
from optimstate.plan.solve.families import (
    INDEX,
    Family,
    adds_up,
    families_of,
    first_shapes,
    last_of,
    likeness,
    order_known,
    outside_of,
    shift_of,
)
from optimstate.plan.solve.resolve import Resolver
from optimstate.problems import Problem
from optimstate.record import Record

__all__ = ["Search", "Suggested", "merged_renames"]

_JOINED_UP_TO = 4


class Suggested(Record):
    """One rule with how sure it is, from 0 to 1, and why."""

    rule: Rule
    confidence: float
    reason: str


class Search:
    """What is not explained yet, and the rules found so far."""

    def __init__(
        self,
        old: Mapping[str, Shape],
        new: Mapping[str, Shape],
        had: Mapping[str, str],
        wanted: Mapping[str, str],
        rows: Rows,
    ) -> None:
        self.had, self.wanted, self.rows = had, wanted, rows
        self.shapes = old
        self.options: list[str] = []
        kept = {
            name
            for name, shape in new.items()
            if old.get(name) == shape and had.get(name, "") == wanted.get(name, had.get(name, ""))
        }
        self.kept = [name for name in old if name in kept]
        self.old = {name: shape for name, shape in old.items() if name not in kept}
        self.new = {name: shape for name, shape in new.items() if name not in kept}
        self.found: list[Suggested] = []

    def propose(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        confidence: float,
        reason: str,
        *operations: Operation,
    ) -> bool:
        """Add a rule if it makes wanted names of unexplained ones, with their shapes, and nothing else."""
        try:
            rule = Rule(tuple(map(Template, sources)), tuple(map(Template, targets)), operations)
        except PlanSyntaxError:
            return False
        if any(source.match(name) is not None for source in rule.sources for name in self.kept):
            return False
        taken = {name: s for name, s in self.old.items() if any(t.match(name) is not None for t in rule.sources)}
        problems: list[Problem] = []
        found = Resolver([[rule]], "", [0], problems).resolve(taken)
        made = found.made
        if problems or not made or any(self.new.get(name) != item.expression.shape for name, item in made.items()):
            return False
        self.found.append(Suggested(rule, round(confidence, 2), reason))
        for uses in found.applications:
            for use in uses:
                for name in use.sources:
                    self.old.pop(name, None)
        for name in made:
            del self.new[name]
        return True

    def by_content(self) -> None:
        """Names whose contents are the same on both sides."""
        places: dict[str, list[str]] = {}
        for name in self.old:
            if name in self.had:
                places.setdefault(self.had[name], []).append(name)
        pairs: dict[str, str] = {}
        for name in self.new:
            found = places.get(self.wanted.get(name, ""), [])
            if len(found) == 1:
                pairs[found[0]] = name
        olds, news = families_of(self.old), families_of(self.new)
        for family in olds.values():
            target = {INDEX.sub("#", pairs[name]) for name, _ in family.members.values() if name in pairs}
            other = news.get(target.pop()) if len(target) == 1 else None
            if other is not None and all(
                pairs.get(name) == other.members.get(i, ("",))[0] for i, (name, _) in family.members.items()
            ):
                self._same_content(family.template(), other.template(), *first_shapes(family, other))
        for source, target_name in pairs.items():
            if source in self.old and target_name in self.new:
                self._same_content(source, target_name, self.old[source], self.new[target_name])

    def _same_content(self, source: str, target: str, had: Shape, wanted: Shape) -> None:
        if had == wanted:
            self.propose([source], [target], 1.0, "the contents are the same")
        else:
            self.propose([source], [target], 1.0, "the same contents in another shape", ReshapeDims(wanted))

    def rearranged(self) -> None:
        """Tensors whose elements stand in another arrangement, seen by their contents, under the same name or another.

        A name with the same shape on both sides is among them: its contents say whether it is kept.
        """
        for family in families_of({name: self.shapes[name] for name in self.kept}).values():
            for source, target, operations, reason in self._arrangements(family, family):
                if operations:
                    for name in self._members(source, family):
                        self.kept.remove(name)
                        self.old[name] = self.new[name] = self.shapes[name]
                    self.propose([source], [target], 1.0, reason, *operations)
        self._arranged(whole=True)

    def rearranged_in_part(self) -> None:
        """Those under another name of which only a part is there."""
        self._arranged(whole=False)

    def _arranged(self, *, whole: bool) -> None:
        news = families_of(self.new)
        for pattern, family in families_of(self.old).items():
            for other in sorted(news.values(), key=lambda other: other.pattern != pattern):
                shape, wanted = first_shapes(family, other)
                if whole and other.pattern != pattern and prod(shape) != prod(wanted):
                    continue
                if other.members.keys() == family.members.keys():
                    for source, target, operations, reason in self._arrangements(family, other):
                        if operations or source != target:
                            self.propose([source], [target], 1.0, reason, *operations)

    def _members(self, source: str, family: Family) -> list[str]:
        return [name for name, _ in family.members.values()] if source == family.template() else [source]

    def _arrangements(self, family: Family, other: Family) -> Iterator[tuple[str, str, tuple[Operation, ...], str]]:
        """Rules' sides and operations: one for all members where all are arranged alike, else one each."""
        found = []
        for index, (name, had) in family.members.items():
            target, wanted = other.members[index]
            made = arranged(self.rows, name, target, had, wanted)
            if made is None:
                return
            found.append((name, target, *made))
        if len({operations for _, _, operations, _ in found}) == 1:
            found = [(family.template(), other.template(), *found[0][2:])]
        yield from found

    def renamed(self) -> None:
        """Families with the same shapes at the same indices, or at shifted ones."""
        ranked = []
        news = families_of(self.new)
        for family in families_of(self.old).values():
            near = [(other, shift) for other in news.values() if (shift := shift_of(family, other)) is not None]
            for other, shift in near:
                ranked.append((likeness(family.pattern, other.pattern), len(near), shift, family, other))
        for alike, rivals, shift, family, other in sorted(ranked, key=lambda entry: (-entry[0], entry[1])):
            shapes = sorted({str(list(shape)) for shape in family.shapes.values()})
            if rivals == 1:
                reason, sure = f"nothing else wanted has the shape {shapes[0]} at these places", 0.7 + 0.25 * alike
            else:
                reason, sure = f"the most alike of {rivals} names of the shape {shapes[0]}", 0.4 + 0.4 * alike
            if shift:
                reason += f"; the index moves by {shift}"
            target = other.template(shift=shift)
            self.propose([family.template(counting=bool(shift))], [target], sure, reason)

    def resized(self) -> None:
        """The same name with one dimension of another size, transposed, or in another shape."""
        news = families_of(self.new)
        for pattern, family in families_of(self.old).items():
            other = news.get(pattern)
            if other is not None and other.members.keys() == family.members.keys():
                shape, wanted = first_shapes(family, other)
                for operation, sure, reason in _changes(shape, wanted):
                    done = self.propose([family.template()], [other.template()], sure, reason, operation)
                    if done and prod(shape) > prod(wanted):
                        self.options.append(
                            f"{pattern.replace('#', '*')} may keep other rows than the first: shapes do not tell. The "
                            "old weights of the rows that are kept would, or whoever chose them does"
                        )

    def renamed_and_changed(self) -> None:
        """Another name, and transposed, resized or in another shape."""
        ranked = []
        news = families_of(self.new)
        for family in families_of(self.old).values():
            near = [
                (other, change)
                for other in news.values()
                if other.members.keys() == family.members.keys() and last_of(other.pattern) == last_of(family.pattern)
                for change in _changes(*first_shapes(family, other))
            ]
            for other, change in near:
                ranked.append((likeness(family.pattern, other.pattern), len(near), family, other, change))
        for alike, rivals, family, other, (operation, sure, reason) in sorted(ranked, key=lambda entry: -entry[0]):
            among = "" if rivals == 1 else f", the most alike of {rivals} names for which that holds"
            sure = (sure - 0.1 if rivals == 1 else 0.2) + 0.2 * alike
            self.propose([family.template()], [other.template()], sure, f"another name, and {reason}{among}", operation)

    def leave_squares_open(self) -> None:
        """Say of square matrices that shapes do not tell whether they are transposed, where others are."""
        turned = [item for item in self.found if any(isinstance(op, Transpose) for op in item.rule.operations)]
        if not turned:
            return
        sure = {item.rule.sources[0].text for item in self.found if item.confidence == 1}
        for family in families_of(self.shapes).values():
            first = next(iter(family.shapes.values()))
            if len(first) == 2 and first[0] == first[1] and family.template() not in sure and not self._told(family):
                self.options.append(
                    f"{family.pattern.replace('#', '*')} is square: shapes do not tell whether its rows and columns "
                    f"are exchanged as those of {turned[0].rule.source.text} are. The old weights in the layout of the "
                    "new model would decide, or the model's code does"
                )

    def _told(self, family: Family) -> bool:
        """Whether contents say of every member that it is kept as it is."""
        return all(
            name in self.kept and self.rows(0, name, 0) == self.rows(1, name, 0) is not None
            for name, _ in family.members.values()
        )

    def joined(self) -> None:
        """Several neighbours whose sizes add up to one that is wanted."""
        for target in list(families_of(self.new).values()):
            self._groups(target, families_of(self.old), lambda parts, one, dim: self._join(parts, one, dim))

    def cut(self) -> None:
        """One whose size is that of several wanted neighbours together."""
        for source in list(families_of(self.old).values()):
            self._groups(source, families_of(self.new), lambda parts, one, dim: self._cut(parts, one, dim))

    def _groups(
        self,
        one: Family,
        others: Mapping[str, Family],
        use: Callable[[Sequence[Family], Family, int], bool],
    ) -> None:
        whole = one.shapes
        near = [
            family
            for family in others.values()
            if family.members.keys() == one.members.keys() and last_of(family.pattern) == last_of(one.pattern)
        ]
        near = [family for family in near if outside_of(family.pattern) == outside_of(one.pattern)]
        for count in range(2, min(len(near), _JOINED_UP_TO) + 1):
            for parts in itertools.combinations(near[:8], count):
                for dim in (0, 1):
                    fits = all(adds_up([part.shapes[i] for part in parts], shape, dim) for i, shape in whole.items())
                    if fits and use(parts, one, dim):
                        return

    def _join(self, parts: Sequence[Family], one: Family, dim: int) -> bool:
        sure, reason, select = self._order_of(parts, one, dim, joining=True)
        sources = [part.template() for part in parts]
        done = self.propose(sources, [one.template()], sure, reason, Concat(dim), *select)
        return done and self._leave_open(parts, one, sure)

    def _cut(self, parts: Sequence[Family], one: Family, dim: int) -> bool:
        sizes = tuple(next(iter(part.shapes.values()))[dim] for part in parts)
        sure, reason, select = self._order_of(parts, one, dim, joining=False)
        split = Split(dim, () if len(set(sizes)) == 1 else sizes)
        targets = [part.template() for part in parts]
        done = self.propose([one.template()], targets, sure, reason, *select, split)
        return done and self._leave_open(parts, one, sure)

    def _order_of(
        self, parts: Sequence[Family], one: Family, dim: int, *, joining: bool
    ) -> tuple[float, str, tuple[Select, ...]]:
        """How sure the order of parts in a whole is, why, and what orders the rows where they are interleaved."""
        found = set()
        for index, (name, _) in one.members.items():
            names = [part.members[index][0] for part in parts]
            found.add(placed(self.rows, *((names, [name]) if joining else ([name], names)), dim))
        places = found.pop() if len(found) == 1 else None
        if places is not None and places == tuple(range(len(places))):
            return 1.0, "the rows are the same, one part below the other", ()
        if places is not None:
            return 1.0, "the rows are the same, and interleaved", (Select(dim, places),)
        side = "checkpoint" if joining else "target"
        return order_known(parts), f"the sizes of dimension {dim} add up; the order is that of the {side}", ()

    def _leave_open(self, parts: Sequence[Family], one: Family, sure: float) -> bool:
        """Say what names and shapes do not tell of a joined or cut tensor."""
        if sure < 1:
            listed = " and ".join(part.pattern.replace("#", "*") for part in parts)
            self.options.append(
                f"{one.pattern.replace('#', '*')} may hold {listed} in blocks, as is proposed, in another order, or "
                "interleaved (a row of each in turn, or head by head): names and shapes are the same for all. The old "
                "weights in the layout of the new model would decide, or the model's code does"
            )
        return True

    def copied(self) -> None:
        """Families that have one index more, and the shape of one that has not."""
        for family in list(families_of(self.old).values()):
            depth = family.pattern.count("#")
            rivals = []
            for other in families_of(self.new).values():
                if other.pattern.count("#") != depth + 1 or last_of(other.pattern) != last_of(family.pattern):
                    continue
                if all(family.shapes.get(index[:depth]) == shape for index, shape in other.shapes.items()):
                    rivals.append(other)
            for other in sorted(rivals, key=lambda other: -likeness(family.pattern, other.pattern))[:1]:
                count = len({index[depth] for index in other.members})
                sure = (0.6 if len(rivals) == 1 else 0.4) + 0.2 * likeness(family.pattern, other.pattern)
                reason = f"{count} of its shape are wanted, with an index of their own"
                self.propose([family.template()], [other.template(known=depth)], sure, reason)


def _changes(shape: Shape, wanted: Shape) -> Iterator[tuple[Operation, float, str]]:
    """The one operation that makes one shape of another, how sure it is, and why."""
    differing = [dim for dim, sizes in enumerate(zip(shape, wanted, strict=False)) if sizes[0] != sizes[1]]
    if shape == wanted:
        return
    if shape[::-1] == wanted and len(shape) == 2:
        yield Transpose(), 0.6, "rows and columns are exchanged"
    elif prod(shape) == prod(wanted):
        yield ReshapeDims(wanted), 0.6, f"the same {prod(shape)} elements in another shape"
    elif len(shape) == len(wanted) and len(differing) == 1:
        dim = differing[0]
        reason = f"dimension {dim} has the size {wanted[dim]} instead of {shape[dim]}"
        yield Resize(dim, wanted[dim]), 0.5, reason


def merged_renames(found: Sequence[Suggested], names: Mapping[str, Shape]) -> Iterator[Suggested]:
    """Renames that differ in their last component alone, as one rule where it takes nothing else."""
    groups: dict[tuple[str, str], list[Suggested]] = {}
    order: list[tuple[str, str] | Suggested] = []
    for item in found:
        source, target = item.rule.sources[0].text, item.rule.targets[0].text
        heads = source.rpartition("."), target.rpartition(".")
        plain = not item.rule.operations and len(item.rule.sources) == len(item.rule.targets) == 1
        if not plain or heads[0][2] != heads[1][2] or not heads[0][0] or not heads[1][0] or "{" in heads[0][2]:
            order.append(item)
            continue
        key = heads[0][0], heads[1][0]
        if key not in groups:
            order.append(key)
        groups.setdefault(key, []).append(item)
    for entry in order:
        if isinstance(entry, Suggested):
            yield entry
            continue
        items = groups[entry]
        rule = Rule((Template(entry[0] + ".{p}"),), (Template(entry[1] + ".{p}"),))
        taken = {name for name in names if rule.sources[0].match(name) is not None}
        meant = {name for name in names for item in items if item.rule.sources[0].match(name) is not None}
        if len(items) == 1 or taken != meant:
            yield from items
            continue
        least = min(items, key=lambda item: item.confidence)
        yield Suggested(rule, least.confidence, least.reason)
