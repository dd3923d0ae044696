"""Rules that differ in one word, as one rule."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from optimstate.derivation.families import matched
from optimstate.errors import PlanSyntaxError
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template

__all__ = ["merged_words"]


def merged_words(rules: Sequence[Rule], names: Sequence[str]) -> list[Rule]:
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
            if made is not None and matched(made, names) == {n for member in members for n in matched(member, names)}:
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
