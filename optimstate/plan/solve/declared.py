"""Parameters that rules declare new, and the param groups that rules put them into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimstate.describe import describe
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.rules import Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.migration import Inventory
from optimstate.plan.solve.resolve import Made, Resolved
from optimstate.problems import Problem

__all__ = ["declared", "misplaced"]


def declared(
    rules: Sequence[Rule],
    counts: list[int],
    key: str,
    inventory: Inventory,
    weights: Sequence[str],
    made: Mapping[str, Made | None],
    found: Resolved,
) -> dict[str, int | None]:
    """The new parameters, each with the param group that its rule names.

    With a target they are those of the target that a rule matches. Without, they are those it spells out, and if it
    matches no parameter of this optimizer, the weights of the checkpoint that it matches.

    Args:
        rules: All of the plan.
        counts: How many parameters each matched; those that are declared are added.
        key: The section.
        inventory: What is in it.
        weights: The names of the weights that the checkpoint has in other sections.
        made: What the other rules make.
        found: What the rules decide.
    """
    target = inventory.target
    open_names = [name for name in (target.names() if target is not None else weights) if name not in made]
    modules = Modules(open_names)
    new: dict[str, int | None] = {}
    for index, rule in enumerate(rules):
        if not rule.fresh or (rule.sources and rule.targets) or not rule.is_for(key):
            continue
        templates = [modules.reading(template) for template in rule.sources or rule.targets]
        names: list[str] = []
        if target is not None:
            names = _matching(templates, open_names)
        elif inventory.state is not None:
            own = {name for uses in found.applications for use in uses if use.rule is rule for name in use.sources}
            taken = {*made, *new, *own}
            names = [name for template in templates for name in _spelled(template) if name not in taken]
            if not counts[index]:
                names += _matching(templates, open_names)
        if names or _matching(templates, new):
            counts[index] += max(len(names), 1)
        new.update((name, rule.group) for name in names if name not in new)
    return new


def _matching(templates: Sequence[Template], names: Sequence[str] | Mapping[str, object]) -> list[str]:
    return [name for name in names if any(template.match(name) is not None for template in templates)]


def _spelled(template: Template) -> list[str]:
    """The names a template produces by itself; none where it captures."""
    if template.is_regex or template.has_wildcard or any(choices is None for choices in template.captures.values()):
        return []
    return list(template.produce({}))


def misplaced(
    rules: Sequence[Rule], inventory: Inventory, found: Resolved, new: Mapping[str, int | None], *, tables: bool
) -> list[Problem]:
    """A rule's `group` is for new parameters: one whose group is decided elsewhere keeps it.

    Args:
        rules: All of the plan.
        inventory: What is in the section.
        found: What the rules decide.
        new: The new parameters with the groups that are asked for.
        tables: Whether `[[group]]` tables of the plan say where every parameter is.
    """
    if inventory.state is None or not any(rule.group is not None for rule in rules):
        return []
    problems = []
    group_of = {name: n for n, group in enumerate(inventory.state.groups) for name in group.names or ()}
    target = inventory.target
    live = {name: n for n, names in enumerate(target.groups) for name in names} if target is not None else {}
    asked = [
        (name, use.rule.group, group_of.get(name), "in the checkpoint")
        for uses in found.applications
        for use in uses
        for name in use.sources
    ]
    asked += [(name, group, live.get(name), "in the live optimizer") for name, group in new.items()]
    for name, group, has, where in asked:
        if group is not None and has is not None and group != has:
            message = f"group = {group}, but {describe(name)} is in param group {has} {where}"
            remedy = "leave `group` out, or write [[group]] tables"
            problems.append(Problem("unreached", message, names=(name,), remedy=remedy))
    if tables and any(group is not None for group in new.values()):
        message = "`group` of a rule has no effect beside [[group]] tables, which say where every parameter is"
        problems.append(Problem("unreached", message, names=tuple(new), remedy="leave `group` out"))
    return problems
