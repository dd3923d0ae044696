"""The state of a search: what is wanted and not yet explained, and the rules found so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from optimstate.errors import PlanSyntaxError
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.base import Operation
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.alternatives import Choice, Decision, Suggested, ranked
from optimstate.plan.solve.arranging import Rows
from optimstate.plan.solve.families import Family
from optimstate.plan.solve.resolve import Resolver
from optimstate.problems import Problem

__all__ = ["Search", "merged_renames", "rule_of"]

_CHOICES = 24
"""So many possibilities are listed at most."""


class Search:
    """What is not explained yet, and the rules found so far.

    Attributes:
        old: What there is and no rule takes, with shapes.
        new: What is wanted and no rule makes.
        kept: Names that stay as they are.
        shapes: All that there is.
        had: Something equal for equal contents, by name of what there is.
        wanted: The same of what is wanted.
        rows: The rows of tensors.
        found: The rules.
        options: What is open, where the possibilities cannot be listed.
        decisions: What is open, with the possibilities.
        head_dim: The size of an attention head; None where it is not known.
    """

    def __init__(
        self,
        old: Mapping[str, Shape],
        new: Mapping[str, Shape],
        had: Mapping[str, str],
        wanted: Mapping[str, str],
        rows: Rows,
        head_dim: int | None = None,
    ) -> None:
        self.had, self.wanted, self.rows, self.head_dim = dict(had), dict(wanted), rows, head_dim
        self.shapes, self.all_wanted = old, new
        kept = {
            name
            for name, shape in new.items()
            if old.get(name) == shape and had.get(name, "") == wanted.get(name, had.get(name, ""))
        }
        self.kept = [name for name in old if name in kept]
        self.old = {name: shape for name, shape in old.items() if name not in kept}
        self.new = {name: shape for name, shape in new.items() if name not in kept}
        self.found: list[Suggested] = []
        self.options: list[str] = []
        self.decisions: list[Decision] = []
        self._modules: dict[str, int] = {}
        self._open_old: list[str] = []
        self._open_new: list[str] = []

    @property
    def missing(self) -> tuple[str, ...]:
        """Wanted names that no rule makes."""
        left = {*self.new, *self._open_new}
        return tuple(name for name in self.all_wanted if name in left)

    @property
    def unused(self) -> tuple[str, ...]:
        """Names that no rule takes."""
        left = {*self.old, *self._open_old}
        return tuple(name for name in self.shapes if name in left)

    def unkeep(self, names: Sequence[str]) -> None:
        """Withdraw the assumption that some names stay as they are."""
        for name in names:
            self.kept.remove(name)
            self.old[name] = self.new[name] = self.shapes[name]

    def uses(self, rule: Rule) -> tuple[list[str], list[str]] | None:
        """The names that a rule takes and makes, if it makes unexplained ones with their shapes and nothing else."""
        if any(source.match(name) is not None for source in rule.sources for name in self.kept):
            return None
        taken = {name: s for name, s in self.old.items() if any(t.match(name) is not None for t in rule.sources)}
        problems: list[Problem] = []
        found = Resolver([[rule]], "", [0], problems).resolve(taken)
        made = found.made
        if problems or not made or any(self.new.get(name) != item.expression.shape for name, item in made.items()):
            return None
        return [name for uses in found.applications for use in uses for name in use.sources], list(made)

    def propose(
        self,
        sources: Sequence[str],
        targets: Sequence[str],
        confidence: float,
        reason: str,
        *operations: Operation,
    ) -> bool:
        """Add a rule if it makes wanted names of unexplained ones, with their shapes, and nothing else."""
        rule = rule_of(sources, targets, *operations)
        return rule is not None and self.add(rule, confidence, reason)

    def add(self, rule: Rule, confidence: float, reason: str) -> bool:
        """Add a rule if it fits."""
        used = self.uses(rule)
        if used is None:
            return False
        self.found.append(Suggested(rule, round(confidence, 2), reason))
        for name in used[0]:
            self.old.pop(name, None)
        for name in used[1]:
            del self.new[name]
        return True

    def leave_open(self, about: str, choices: Sequence[Choice], *, proposed: bool = False, module: str = "") -> bool:
        """Note what cannot be decided; other steps do not touch what the possibilities take and make.

        Args:
            about: What is open.
            choices: The possibilities; those that do not fit are left out.
            proposed: Whether the first of them is a rule that was found already.
            module: What weights and biases have in common, for which the same is right.
        """
        if proposed:
            made = Decision(about, ranked(choices)[:_CHOICES], proposed)
            place = self._modules.get(module)
            joined = _together(self.decisions[place], made) if place is not None else None
            if place is not None and joined is not None:
                self.decisions[place] = joined
            else:
                self._modules.update({module: len(self.decisions)} if module else {})
                self.decisions.append(made)
            return True
        fits = [(choice, [self.uses(rule) for rule in choice.rules]) for choice in choices]
        fits = [(choice, used) for choice, used in fits if all(each is not None for each in used)]
        if not fits:
            return False
        self.decisions.append(Decision(about, ranked([choice for choice, _ in fits])[:_CHOICES], proposed))
        for used in (each for _, uses in fits for each in uses if each is not None):
            self.set_aside(used)
        return True

    def note(self, option: str) -> None:
        """State once what is open."""
        if option not in self.options:
            self.options.append(option)

    def set_aside(self, names: tuple[Sequence[str], Sequence[str]]) -> None:
        """Reserve names, old and wanted, so that other steps do not use them."""
        self._open_old += [name for name in names[0] if self.old.pop(name, None) is not None]
        self._open_new += [name for name in names[1] if self.new.pop(name, None) is not None]

    def says_to_keep(self, family: Family) -> bool:
        """Whether the contents show that every member stays as it is."""
        return all(
            name in self.kept and self.rows(0, name, 0) == self.rows(1, name, 0) is not None
            for name, _ in family.members.values()
        )


def _together(one: Decision, other: Decision) -> Decision | None:
    """Merge two questions that have the same answers into one."""
    if [choice.reason for choice in one.choices] != [choice.reason for choice in other.choices]:
        return None
    pairs = zip(one.choices, other.choices, strict=True)
    return one._replace(choices=tuple(a._replace(rules=(*a.rules, *b.rules)) for a, b in pairs))


def rule_of(sources: Sequence[str], targets: Sequence[str], *operations: Operation) -> Rule | None:
    """A rule; None where the names do not allow one."""
    try:
        return Rule(tuple(map(Template, sources)), tuple(map(Template, targets)), operations)
    except PlanSyntaxError:
        return None


def merged_renames(found: Sequence[Suggested], names: Mapping[str, Shape]) -> Iterator[Suggested]:
    """Renames that differ only in their last component, as one rule if it takes nothing else."""
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
