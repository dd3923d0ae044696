"""Which param group each parameter of the result is in, and where the group's options come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.describe import describe, few
from optimstate.plan.expressions.evaluate import number_of, shape_of
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.optimizer import Group

__all__ = ["Candidate", "GroupPlan", "in_order", "plan_groups", "with_tables", "with_values"]


class GroupPlan(Record):
    """One param group of the result.

    Attributes:
        members: Its parameters, in order.
        options: Everything but the parameters.
        sources: The old groups its parameters come from, in order.
        base: The old group that stands for them; None where there is none.
        rule: The `[[group]]` table it was made by, or that sets its options; None without one.
    """

    members: tuple[str, ...]
    options: Mapping[str, Any]
    sources: tuple[int, ...]
    base: int | None
    rule: GroupRule | None = None


class Candidate(Record):
    """A parameter of the result: its name, the groups it comes from, and the group that a rule gives a new one."""

    name: str
    groups: tuple[int, ...]
    group: int | None = None


def plan_groups(
    plan: Plan,
    candidates: Sequence[Candidate],
    old: Sequence[Group],
    target: Sequence[tuple[Sequence[str], Mapping[str, Any]]] | None,
    problems: list[Problem],
) -> tuple[GroupPlan, ...]:
    """The groups of the result.

    Args:
        plan: Its `[[group]]` tables, and policies on options.
        candidates: The parameters of the result.
        old: The groups of the checkpoint.
        target: For each group of the live optimizer its parameters and options; None without one.
        problems: Added to.
    """
    tables = tuple(rule for rule in plan.groups if not rule.match)
    plan = plan._replace(groups=tuple(rule for rule in plan.groups if rule.match))
    by_name = {candidate.name: candidate for candidate in candidates}
    if target is not None:
        split = [[name for name in names if name in by_name] for names, _ in target]
        rules = [_rule_of(plan.groups, names, Modules(by_name), problems) for names in split]
        live: list[Mapping[str, Any] | None] = [options for _, options in target]
    elif plan.groups:
        split, rules = _matched(plan, by_name, problems)
        live = [None] * len(split)
    else:
        split, rules, live = _kept(candidates, len(old), problems), [None] * len(old), [None] * len(old)
    made = []
    for number, names in enumerate(split):
        sources = tuple(sorted({group for name in names for group in by_name[name].groups}))
        if target is None and not plan.groups:
            sources = (number,)
        elif not sources and not plan.groups and number < len(old) and not old[number].params:
            sources = (number,)  # a group that was empty, and gets its first parameters
        made.append(_group(plan, number, names, sources, rules[number], old, live[number], problems))
    if target is not None and plan.policy.hyperparameters == "checkpoint":
        _refuse_lost_differences(made, live, rules, problems)
    return tuple(with_tables(made, tables, problems))


def with_values(options: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options with new values in the types that the old ones had: a number as a float, a list as a tuple."""
    made = dict(options)
    for key, value in given.items():
        old = options.get(key)
        if isinstance(old, tuple) and isinstance(value, list):
            made[key] = tuple(value)
        else:
            made[key] = float(value) if isinstance(old, float) and type(value) is int else value
    return made


def with_tables(groups: Sequence[GroupPlan], tables: Sequence[GroupRule], problems: list[Problem]) -> list[GroupPlan]:
    """Groups with the options of the `[[group]]` tables that name no parameters.

    Args:
        groups: Those of the result.
        tables: For this optimizer.
        problems: Added to.
    """
    made = list(groups)
    for table in tables:
        if table.number is not None and not 0 <= table.number < len(made):
            message = f"there is no param group {table.number} whose options could be set: there are {len(made)}"
            problems.append(Problem("group", message))
        for number, group in enumerate(made):
            if table.number in (None, number):
                given = {**(group.rule.set if group.rule else {}), **table.set}
                made[number] = group._replace(
                    options=with_values(group.options, table.set),
                    rule=GroupRule(table.match, given, None, table.optimizer),
                )
    return made


def _kept(candidates: Sequence[Candidate], count: int, problems: list[Problem]) -> list[list[str]]:
    split: list[list[str]] = [[] for _ in range(count)]
    for candidate in candidates:
        groups = candidate.groups
        if not groups:
            group = candidate.group if candidate.group is not None else 0 if count == 1 else None
            if group is None or not 0 <= group < count:
                message = (
                    f"{describe(candidate.name)} is new, and nothing says which of the {count} param groups it is in"
                )
                remedy = f"say group = 0 to {count - 1} in its rule, or write [[group]] tables"
                problems.append(Problem("group", message, names=(candidate.name,), remedy=remedy))
                continue
            groups = (group,)
        if len(set(groups)) > 1:
            message = f"{describe(candidate.name)} is made from parameters of the param groups {sorted(set(groups))}"
            remedy = "say with [[group]] tables which one it is in"
            problems.append(Problem("group", message, names=(candidate.name,), remedy=remedy))
            continue
        split[groups[0]].append(candidate.name)
    return split


def _matched(
    plan: Plan, by_name: Mapping[str, Candidate], problems: list[Problem]
) -> tuple[list[list[str]], list[GroupRule | None]]:
    split: list[list[str]] = [[] for _ in plan.groups]
    outside = []
    modules = Modules(by_name)
    matches = [tuple(map(modules.reading, rule.match)) for rule in plan.groups]
    for name in by_name:
        for number, match in enumerate(matches):
            if any(template.match(name) is not None for template in match):
                split[number].append(name)
                break
        else:
            outside.append(name)
    if outside:
        message = f"no [[group]] matches {few(list(map(describe, outside)))}"
        remedy = 'end with a group for the rest, match = "**"'
        problems.append(Problem("group", message, names=tuple(outside), remedy=remedy))
    for number, rule in enumerate(plan.groups):
        if all(template.is_literal for template in matches[number]):  # names that are spelled out are in that order
            place = {template.text: order for order, template in enumerate(rule.match)}
            split[number].sort(key=place.__getitem__)
    kept = [number for number, names in enumerate(split) if names or plan.policy.unused == "error"]
    for number in kept:
        if not split[number]:
            texts = ", ".join(describe(template.text) for template in plan.groups[number].match)
            message = "matches no parameter that an earlier group leaves"
            problems.append(Problem("unmatched", f"group {number + 1} ({texts}) {message}"))
    return [split[number] for number in kept], [plan.groups[number] for number in kept]


def _rule_of(
    rules: Sequence[GroupRule], names: Sequence[str], modules: Modules, problems: list[Problem]
) -> GroupRule | None:
    """The `[[group]]` table of a live param group, which must be the same for all its parameters."""
    found: dict[int, str] = {}
    matches = [tuple(map(modules.reading, rule.match)) for rule in rules]
    for name in names:
        for number, match in enumerate(matches):
            if any(template.match(name) is not None for template in match):
                found.setdefault(number, name)
                break
    if len(found) > 1:
        (one, first), (other, second), *_ = found.items()
        message = (
            f"the live optimizer has {describe(first)} and {describe(second)} in one param group, "
            f"the plan in two, group {one + 1} and group {other + 1}"
        )
        problems.append(Problem("unreached", message, names=(first, second)))
    return rules[next(iter(found))] if found else None


def _group(
    plan: Plan,
    number: int,
    names: Sequence[str],
    sources: tuple[int, ...],
    rule: GroupRule | None,
    old: Sequence[Group],
    live: Mapping[str, Any] | None,
    problems: list[Problem],
) -> GroupPlan:
    chosen = dict(rule.set) if rule is not None else {}
    base = rule.like if rule is not None and rule.like is not None else None
    if base is not None and not 0 <= base < len(old):
        message = f"like = {base}, but the checkpoint has {len(old)} param groups"
        problems.append(Problem("group", message, f"group {number + 1}"))
        base = None
    if base is None and sources:
        base = _representative(plan, number, sources, old, chosen, problems)
    if live is not None and (plan.policy.hyperparameters == "live" or base is None):
        options = dict(live)
    elif base is not None:
        options = dict(old[base].options)
    else:
        options = {}
        if not rule or not rule.set:
            shown = f" ({', '.join(map(describe, names[:3]))})" if names else ""
            message = f"group {number + 1}{shown} has no parameter from the checkpoint, so it has no options"
            remedy = "say like = 0 for those of an old group"
            problems.append(Problem("options", message, names=tuple(names), remedy=remedy))
    return GroupPlan(tuple(names), with_values(options, chosen), sources, base, rule)


def _representative(
    plan: Plan,
    number: int,
    sources: Sequence[int],
    old: Sequence[Group],
    chosen: Mapping[str, Any],
    problems: list[Problem],
) -> int:
    if len(sources) == 1 or plan.policy.merge == "first" or plan.policy.hyperparameters == "live":
        return sources[0]
    if plan.policy.merge in ("min", "max"):
        choose = min if plan.policy.merge == "min" else max
        return choose(sources, key=lambda index: _initial_lr(old[index].options))
    first = old[sources[0]].options
    for index in sources[1:]:
        other = old[index].options
        differing = [
            key for key in {**first, **other} if key not in chosen and not same_value(first.get(key), other.get(key))
        ]
        if differing:
            both = ", ".join(
                f"{key} ({describe(first.get(key))} and {describe(other.get(key))})" for key in differing[:4]
            )
            message = f"group {number + 1} joins the old param groups {sources[0]} and {index}, which differ in {both}"
            remedy = 'set these in the [[group]], or say merge = "first", "min" or "max" in [policy]'
            problems.append(Problem("group", message, remedy=remedy))
            break
    return sources[0]


def _initial_lr(options: Mapping[str, Any]) -> Any:
    return number_of(options.get("initial_lr", options.get("lr", 0.0)))


def same_value(one: Any, other: Any) -> bool:
    """Whether two options are the same; tensors of one element by their value."""
    if one is other:
        return True
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same_value, one, other))
    if shape_of(one) is not None and shape_of(other) is not None and one is not None and other is not None:
        return bool(number_of(one) == number_of(other))
    try:
        return bool(one == other)
    except (RuntimeError, ValueError):
        return False


def _refuse_lost_differences(
    made: Sequence[GroupPlan],
    live: Sequence[Mapping[str, Any] | None],
    rules: Sequence[GroupRule | None],
    problems: list[Problem],
) -> None:
    """Live groups that differ on purpose but would take their options from the same old group."""
    first: dict[int, int] = {}
    for number, group in enumerate(made):
        if group.base is None:
            continue
        other = first.setdefault(group.base, number)
        mine, theirs = live[number] or {}, live[other] or {}
        decided = {key for rule in (rules[number], rules[other]) if rule is not None for key in rule.set}
        differing = [
            key for key in mine if key in theirs and key not in decided and not same_value(mine[key], theirs[key])
        ]
        if differing:
            both = ", ".join(f"{key} ({describe(theirs[key])} and {describe(mine[key])})" for key in differing[:4])
            message = (
                f"the live optimizer's param groups {other} and {number} both come from group {group.base} of the "
                f"checkpoint, but differ in {both}"
            )
            remedy = 'set these in [[group]] tables, or say hyperparameters = "live" in [policy]'
            problems.append(Problem("group", message, remedy=remedy))


def in_order(groups: Sequence[GroupPlan], order: Sequence[str], problems: list[Problem]) -> tuple[GroupPlan, ...]:
    """The groups with their members in the wanted order."""
    place = {name: number for number, name in enumerate(order)}
    if unknown := tuple(name for group in groups for name in group.members if name not in place):
        message = f"the new model, whose order is asked for, does not have {few(list(map(describe, unknown)))}"
        problems.append(Problem("unexpected", message, names=unknown, remedy="rename or drop what it does not have"))
        return tuple(groups)
    return tuple(group._replace(members=tuple(sorted(group.members, key=place.__getitem__))) for group in groups)
