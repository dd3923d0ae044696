"""Rules of layouts that are known: those of libraries, in `known_layouts.toml`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optimstate.plan.language.rules import Rule
from optimstate.plan.solve.alternatives import Choice
from optimstate.plan.solve.families import families_of
from optimstate.plan.solve.known import Knowledge, KnownLayout, RuleForm, prefixes, rules_between
from optimstate.plan.solve.resolve import Resolver
from optimstate.plan.solve.search import Search
from optimstate.problems import Problem

__all__ = ["of_known_layouts"]

_HEADS_TRIED = 12


def of_known_layouts(search: Search, known: Knowledge) -> None:
    """The rules of every known layout that is found, in either direction."""
    for layout in known.layouts:
        for back in (False, True):
            if search.new and _use(search, layout, back):
                break


class _Found:
    """A rule of a layout, made concrete for each size that a head can have.

    Attributes:
        ways: The rules by the size of a head; 0 where it does not matter.
    """

    def __init__(self, form: RuleForm, ways: dict[int, tuple[Rule, ...]]) -> None:
        self.form, self.ways = form, ways


def _use(search: Search, layout: KnownLayout, back: bool) -> bool:
    """Propose the rules of a layout if the names fit it."""
    olds = [next(iter(family.members.values()))[0] for family in families_of(search.shapes).values()]
    news = [next(iter(family.members.values()))[0] for family in families_of(search.all_wanted).values()]
    found = []
    for form in layout.rules:
        sides = (form.targets, form.sources) if back else (form.sources, form.targets)
        before = [prefixes(texts, names) for texts, names in zip(sides, (olds, news), strict=True)]
        pairs = [(one, other) for one in before[0] for other in before[1]]
        ways = next((made for pair in pairs if (made := _ways(search, form, pair, back))), {})
        if ways:
            found.append(_Found(form, ways))
        elif pairs and form.operations:
            return False
    told = [item for item in found if _changes(search, item)]
    if not told or len(found) < min(2, len(layout.rules)):
        return False
    reason = f"a known layout: {layout.name}"
    for item in found:
        if 0 in item.ways:
            for rule in item.ways[0]:
                _take(search, rule, 0.9, reason)
    _with_heads(search, [item for item in found if 0 not in item.ways], reason)
    return True


def _ways(search: Search, form: RuleForm, pair: tuple[str, str], back: bool) -> dict[int, tuple[Rule, ...]]:
    """The rules between a pair of prefixes (of the old and of the new side) that fit, by the size of a head."""
    mine = (pair[1], pair[0]) if back else pair
    names = search.all_wanted if back else search.shapes
    sizes: Sequence[int] = (0,)
    if form.needs_heads:
        sizes = [search.head_dim] if search.head_dim else form.head_sizes(mine[0], names)[:_HEADS_TRIED]
    found = {}
    for size in sizes:
        rules = rules_between(form, mine, search.shapes, search.all_wanted, size or None, back=back)
        if rules and all(_fits(search, rule) for rule in rules):
            found[0 if search.head_dim and form.needs_heads else size] = rules
    return found


def _names(search: Search, rule: Rule) -> tuple[list[str], list[str]] | None:
    """Which of the old names a rule takes and which of the wanted names it makes, if the shapes fit."""
    taken = {n: s for n, s in search.shapes.items() if any(t.match(n) is not None for t in rule.sources)}
    problems: list[Problem] = []
    found = Resolver([[rule]], "", [0], problems).resolve(taken)
    wanted = search.all_wanted
    if problems or not found.made or any(wanted.get(n) != m.expression.shape for n, m in found.made.items()):
        return None
    return list(taken), list(found.made)


def _fits(search: Search, rule: Rule) -> bool:
    return _names(search, rule) is not None


def _changes(search: Search, found: _Found) -> bool:
    """Whether a rule explains a name that changes, which distinguishes the layout from others."""
    rules = next(iter(found.ways.values()))
    made = {name for rule in rules for name in (_names(search, rule) or ((), ()))[1]}
    return any(name in search.new for name in made)


def _take(search: Search, rule: Rule, sure: float, reason: str) -> None:
    """Propose a rule; names that were only assumed to stay, because of their shapes, are released for it."""
    for family in families_of({n: search.shapes[n] for n in (_names(search, rule) or ((), ()))[0]}).values():
        kept = [name for name, _ in family.members.values() if name in search.kept]
        if kept and rule.operations and not search.says_to_keep(family):
            search.unkeep(kept)
    search.add(rule, sure, reason)


def _with_heads(search: Search, found: Sequence[_Found], reason: str) -> None:
    """Leave the head size open where rules depend on it, as one question for all of them."""
    fits = [item for item in found if all(search.uses(rule) is not None for rule in _any(item))]
    if not fits:
        return
    common = [size for size in fits[0].ways if all(size in item.ways for item in fits)]
    choices = [
        Choice(
            tuple(rule for item in fits for rule in item.ways[size]),
            round(0.6 / (2 + place), 2),
            f"heads of {size} ({reason})",
        )
        for place, size in enumerate(common)
    ]
    listed = ", ".join(dict.fromkeys(str(rule.source.text) for rule in choices[0].rules)) if choices else ""
    about = (
        f"how large the attention heads of {listed} are: the order of the rows depends on it, and shapes do not tell. "
        "A config.json or params.json beside a checkpoint would, or a rehearsal (--rehearse)"
    )
    search.leave_open(about, choices)


def _any(item: _Found) -> Iterator[Rule]:
    yield from next(iter(item.ways.values()))
