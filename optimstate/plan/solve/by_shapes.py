"""Rules concluded from shapes: another size, rows and columns exchanged, copies."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.dimensions import ReshapeDims, Resize, Transpose
from optimstate.plan.solve.alternatives import Choice
from optimstate.plan.solve.families import Family, families_of, first_shapes, last_of, likeness
from optimstate.plan.solve.search import Search, rule_of

__all__ = ["changes", "copied", "note_cut", "renamed_and_changed", "resized", "squares"]


def changes(shape: Shape, wanted: Shape) -> Iterator[tuple[Operation, float, str]]:
    """The operations that turn one shape into another, how certain each is and what it does; the likeliest first."""
    differing = [dim for dim, sizes in enumerate(zip(shape, wanted, strict=False)) if sizes[0] != sizes[1]]
    if shape == wanted:
        return
    if shape[::-1] == wanted and len(shape) == 2:
        yield Transpose(), 0.6, "rows and columns are exchanged"
    if prod(shape) == prod(wanted):
        yield ReshapeDims(wanted), 0.6, f"the same {prod(shape)} elements in another shape"
    elif len(shape) == len(wanted) and len(differing) == 1:
        dim = differing[0]
        reason = f"dimension {dim} has the size {wanted[dim]} instead of {shape[dim]}"
        yield Resize(dim, wanted[dim]), 0.5, reason


def note_cut(search: Search, pattern: str, shape: Shape, wanted: Shape) -> None:
    """Note that a tensor which becomes smaller might keep other rows."""
    if prod(shape) > prod(wanted):
        search.note(
            f"{pattern.replace('#', '*')} may keep other rows than the first: shapes do not tell. The "
            "old weights of the rows that are kept would, or whoever chose them does"
        )


def note_reshape(search: Search, family: Family, other: Family) -> None:
    """Note that a matrix may be transposed, or reshaped with its elements in the same order."""
    shape, wanted = first_shapes(family, other)
    ways = list(changes(shape, wanted))
    if len(ways) > 1:
        about = (
            f"whether {family.pattern.replace('#', '*')} is transposed or its elements follow each other as before: "
            "the shapes are the same for both"
        )
        rules = [rule_of([family.template()], [other.template()], operation) for operation, _, _ in ways]
        choices = [
            Choice((rule,), round(0.6 if not number else 0.2, 2), reason)
            for number, (rule, (_, _, reason)) in enumerate(zip(rules, ways, strict=True))
            if rule is not None
        ]
        search.leave_open(about, choices, proposed=True)


def resized(search: Search) -> None:
    """The same name with one dimension of another size, transposed, or in another shape."""
    news = families_of(search.new)
    for pattern, family in families_of(search.old).items():
        other = news.get(pattern)
        if other is not None and other.members.keys() == family.members.keys():
            shape, wanted = first_shapes(family, other)
            for operation, sure, reason in changes(shape, wanted):
                if search.propose([family.template()], [other.template()], sure, reason, operation):
                    note_cut(search, pattern, shape, wanted)
                    note_reshape(search, family, other)
                    break


def renamed_and_changed(search: Search) -> None:
    """Another name, and transposed, resized or in another shape."""
    olds, news = families_of(search.old), families_of(search.new)
    edges = [
        (family, other)
        for family in olds.values()
        for other in news.values()
        if other.members.keys() == family.members.keys()
        and last_of(other.pattern) == last_of(family.pattern)
        and next(changes(*first_shapes(family, other)), None) is not None
    ]
    for family, other in edges:
        operation, sure, reason = next(changes(*first_shapes(family, other)))
        rivals = [pair for pair in edges if (pair[0] is family) != (pair[1] is other)]
        alike = likeness(family.pattern, other.pattern)
        if not rivals:
            sure += 0.2 * alike - 0.1
            fits = search.propose(
                [family.template()], [other.template()], sure, f"another name, and {reason}", operation
            )
            if fits:
                note_cut(search, family.pattern, *first_shapes(family, other))
                note_reshape(search, family, other)
    for other in {id(pair[1]): pair[1] for pair in edges}.values():
        mine = [family for family, each in edges if each is other]
        choices = [_changed(family, other) for family in mine]
        about = f"what {other.pattern.replace('#', '*')} is made of: names do not tell, and shapes fit after a change"
        search.leave_open(about, [choice for choice in choices if choice is not None])


def _changed(family: Family, other: Family) -> Choice | None:
    operation, _, reason = next(changes(*first_shapes(family, other)))
    rule = rule_of([family.template()], [other.template()], operation)
    alike = likeness(family.pattern, other.pattern)
    return Choice((rule,), round(0.3 * alike, 2), f"another name, and {reason}") if rule is not None else None


def copied(search: Search) -> None:
    """Families with one more index whose members have the shape of one without it."""
    pairs = [
        (family, other)
        for family in families_of(search.old).values()
        for other in families_of(search.new).values()
        if other.pattern.count("#") == family.pattern.count("#") + 1
        and last_of(other.pattern) == last_of(family.pattern)
        and all(family.shapes.get(index[:-1]) == shape for index, shape in other.shapes.items())
    ]
    for family, other in pairs:
        rivals = [pair for pair in pairs if (pair[0] is family) != (pair[1] is other)]
        tail = _common_end(family, other)
        if any(_common_end(*pair) >= tail for pair in rivals):
            continue
        depth = family.pattern.count("#")
        count = len({index[depth] for index in other.members})
        sure = (0.4 if rivals else 0.6) + 0.2 * likeness(family.pattern, other.pattern)
        reason = f"{count} of its shape are wanted, with an index of their own"
        search.propose([family.template()], [other.template(known=depth)], sure, reason)
    left = [(family, other) for family, other in pairs if other.pattern in families_of(search.new)]
    for other in {id(pair[1]): pair[1] for pair in left}.values():
        mine = [family for family, each in left if each is other and family.pattern in families_of(search.old)]
        rules = [rule_of([f.template()], [other.template(known=f.pattern.count("#"))]) for f in mine]
        choices = [
            Choice((rule,), round(0.3 * likeness(family.pattern, other.pattern), 2), "copies of it fit the shapes")
            for family, rule in zip(mine, rules, strict=True)
            if rule is not None
        ]
        about = f"of what {other.pattern.replace('#', '*')} are copies: several have the shape, and names do not tell"
        search.leave_open(about, choices)


def _common_end(family: Family, other: Family) -> int:
    """How many components at the end are the same."""
    pairs = zip(reversed(family.pattern.split(".")), reversed(other.pattern.split(".")), strict=False)
    return next((count for count, (one, two) in enumerate(pairs) if one != two), 99)


def squares(search: Search) -> None:
    """Square matrices beside transposed ones: their shapes do not show whether they are transposed too."""
    turned = [item for item in search.found if any(isinstance(op, Transpose) for op in item.rule.operations)]
    if not turned:
        return
    others = turned[0].rule.source.text
    for family in families_of({name: search.shapes[name] for name in search.kept}).values():
        if _is_square(family) and not search.says_to_keep(family):
            _note_square(search, family.template(), family.template(), others)
    for item in search.found:
        if item.rule.operations or item.confidence == 1 or len(item.rule.sources) > 1 or len(item.rule.targets) > 1:
            continue
        taken = {name: shape for name, shape in search.shapes.items() if item.rule.source.match(name) is not None}
        if taken and all(_is_square(family) for family in families_of(taken).values()):
            _note_square(search, item.rule.source.text, item.rule.targets[0].text, others)


def _is_square(family: Family) -> bool:
    first = next(iter(family.shapes.values()))
    return len(first) == 2 and first[0] == first[1] > 1


def _note_square(search: Search, source: str, target: str, others: str) -> None:
    about = (
        f"{source} is square: shapes do not tell whether its rows and columns are exchanged as those of {others} are. "
        "A rehearsal would (--rehearse), or the old weights in the layout of the new model, or the model's code"
    )
    plain = rule_of([source], [target]) if source != target else None
    turned = rule_of([source], [target], Transpose())
    choices = [Choice((plain,) if plain is not None else (), 0.5, "as it is")]
    if turned is not None:
        choices.append(Choice((turned,), 0.4, "rows and columns are exchanged, as others are"))
    search.leave_open(about, choices, proposed=True)
