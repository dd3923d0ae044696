"""Rules for pure renames, as few as possible."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from optimstate.derivation.families import CAPTURES, Moves, family_rules
from optimstate.derivation.words import merged_words
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template

__all__ = ["renamings"]


def renamings(renames: Mapping[str, str], names: Sequence[str]) -> list[Rule]:
    """Rules for pure renames: repeatedly the candidate that covers most of the remaining ones."""
    return list(_renamings(tuple(renames.items()), tuple(names)))


@lru_cache(maxsize=2)  # a scaled derivation asks twice
def _renamings(given: tuple[tuple[str, str], ...], names: tuple[str, ...]) -> tuple[Rule, ...]:
    renames = dict(given)
    moves = [Moves((old,), (new,)) for old, new in renames.items()]
    kept = [Moves((name,), (name,)) for name in names if name not in renames]
    candidates: dict[str, Rule] = {}
    for members in (moves, [*moves, *kept]):
        families = family_rules(members, names)
        for rule in (*families, *merged_words(families, names)):
            candidates[str(rule)] = rule
    for old, new in renames.items():
        for rule in _around(old, new):
            candidates.setdefault(str(rule), rule)
    usable: list[tuple[Rule, dict[str, str]]] = []
    for rule in candidates.values():
        results = _results(rule, names)
        if any(name in renames for name in results) and all(renames.get(n, n) == new for n, new in results.items()):
            usable.append((rule, results))
    made: list[Rule] = []
    open_ = dict(renames)
    while open_:
        rule, results = max(usable, key=lambda item: (sum(name in open_ for name in item[1]), -len(str(item[0]))))
        made.append(rule)
        for name in results:
            open_.pop(name, None)
    return tuple(made)


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
    """Rules with the common beginning and end of two names as captures, and the changed middle literally."""
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
    """The rule with integers as captures if possible, and the rule with literal integers."""
    numbered = list(dict.fromkeys(re.findall(r"(?<![\w}])\d+(?![\w{])", old)))
    texts = [(old, new)]
    if numbered and len(numbered) <= len(CAPTURES):
        one, other = old, new
        for value, name in zip(numbered, CAPTURES, strict=False):
            one = re.sub(rf"(?<![\w}}]){value}(?![\w{{])", f"{{{name}:int}}", one, count=1)
            other = re.sub(rf"(?<![\w}}]){value}(?![\w{{])", f"{{{name}}}", other)
        texts.insert(0, (one, other))
    for left, right in texts:
        try:
            yield Rule((Template(left),), (Template(right),))
        except PlanSyntaxError:
            continue
