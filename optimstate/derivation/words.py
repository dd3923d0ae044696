"""Merging rules that differ in one word."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

from optimstate.derivation.families import matched
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.record import Record

__all__ = ["merged_words"]


def merged_words(rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
    """The rules, after merging those with equal operations that differ in one word of their source and target."""
    merging = _Merging(names)
    left = list(rules)
    while (found := merging.found(left)) is not None:
        members, made = found
        gone = set(map(id, members))
        place = next(place for place, rule in enumerate(left) if rule is members[0])
        left = [rule for rule in left if id(rule) not in gone]
        left.insert(min(place, len(left)), made)
    return left


class _Place(Record):
    """One word of a rule's source and one of its target, at which it may differ from others."""

    rule: Rule
    word: str
    other: str
    at: int
    to: int


class _Merging:
    """The search for rules that can be merged; results for a rule are kept, because most are used many times."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._numbers: dict[object, int] = {}
        self._held: list[Rule] = []  # keeps rules, so that no other object gets their ids
        self._places: dict[int, list[tuple[int, _Place]]] = {}
        self._matched: dict[int, set[str]] = {}
        self._apart: set[tuple[int, ...]] = set()

    def found(self, rules: Sequence[Rule]) -> tuple[list[Rule], Rule] | None:
        """The largest group of rules that can be merged, with the merged rule."""
        groups: dict[int, list[_Place]] = defaultdict(list)
        for rule in rules:
            for number, place in self._of(rule):
                groups[number].append(place)
        for group in sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True):
            members = [place.rule for place in group]
            key = (group[0].at, group[0].to, *map(id, members))
            if len({place.word for place in group}) == len(group) and key not in self._apart:
                made = _with_words(group)
                if made is not None and matched(made, self.names) == set().union(*map(self._names, members)):
                    return members, made
                self._apart.add(key)
        return None

    def _of(self, rule: Rule) -> list[tuple[int, _Place]]:
        """The places of a rule, each with the number of its context."""
        if id(rule) not in self._places:
            self._held.append(rule)
            single = len(rule.sources) == len(rule.targets) == 1
            self._places[id(rule)] = (
                [(self._number(around), place) for around, place in _places(rule)] if single else []
            )
        return self._places[id(rule)]

    def _number(self, around: object) -> int:
        return self._numbers.setdefault(around, len(self._numbers))

    def _names(self, rule: Rule) -> set[str]:
        if id(rule) not in self._matched:
            self._matched[id(rule)] = matched(rule, self.names)
        return self._matched[id(rule)]


def _places(rule: Rule) -> Iterator[tuple[object, _Place]]:
    """The places of a rule, each with its context: the operations and the other words."""
    operations = tuple(map(str, rule.operations))
    old, new = _words(rule.sources[0].text), _words(rule.targets[0].text)
    before = [(at, word, (*old[:at], "", *old[at + 1 :])) for at, word in enumerate(old) if _plain(word)]
    after = [(to, other, (*new[:to], "", *new[to + 1 :])) for to, other in enumerate(new) if _plain(other)]
    for at, word, around in before:
        for to, other, beside in after:
            yield (operations, around, beside), _Place(rule, word, other, at, to)


def _plain(word: str) -> bool:
    return word != "." and "{" not in word


def _words(text: str) -> list[str]:
    return re.split(r"(?<=\.)|(?=\.)", text)


def _with_words(group: Sequence[_Place]) -> Rule | None:
    first = group[0]
    old, new = _words(first.rule.sources[0].text), _words(first.rule.targets[0].text)
    words, others = [place.word for place in group], [place.other for place in group]
    if len(set(others)) < len(group):
        return None
    old[first.at] = f"{{x={'|'.join(words)}}}"
    new[first.to] = "{x}" if words == others else f"{{x={'|'.join(others)}}}"
    try:
        return Rule((Template("".join(old)),), (Template("".join(new)),), first.rule.operations)
    except PlanSyntaxError:
        return None
