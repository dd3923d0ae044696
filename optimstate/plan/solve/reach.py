"""What a plan asks for besides its rules, and whether any of it applies to the checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from optimstate.describe import describe
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import GroupRule, OptimizerRule
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.algorithms.options import unusable
from optimstate.state.algorithms.slots import is_note

__all__ = ["Reached", "asked_of_optimizers", "option_problems", "takers", "unreached"]

T = TypeVar("T", GroupRule, OptimizerRule)


class Reached(Record):
    """What a plan can refer to in an optimizer.

    Attributes:
        label: Its path; None where that is not known.
        names: The parameters of the result.
        options: Of each param group, before and after.
        slots: The names of its slots.
    """

    label: str | None
    names: Sequence[str]
    options: Sequence[Mapping[str, Any]]
    slots: Iterable[str]


def asked_of_optimizers(plan: Plan) -> list[str]:
    """What a plan asks of optimizers apart from its rules, as messages name it."""
    asked = (
        ("[[group]] tables", bool(plan.groups)),
        ("[[optimizer]] tables", bool(plan.optimizers)),
        (f'optimizer = "{plan.optimizer}"', bool(plan.optimizer)),
        ("[slots]", bool(plan.slots)),
        ("`group` of a rule", any(rule.group is not None for rule in plan.all_rules())),
        ('hyperparameters = "live"', plan.policy.hyperparameters == "live"),
    )
    return [text for text, given in asked if given]


def unreached(plan: Plan, optimizers: Sequence[Reached]) -> Iterator[Problem]:
    """What a plan asks of optimizers that applies to none of those it is used on.

    Args:
        plan: With its own policies.
        optimizers: All of them.
    """
    if plan.policy.unused != "error":
        return
    asked = asked_of_optimizers(plan)
    if asked and not optimizers:
        message = f"there is no optimizer that {' and '.join(asked)} could change"
        yield Problem("unreached", message, remedy='leave that out of the plan, or say unused = "ignore" in [policy]')
    if not optimizers:
        return
    labels = [found.label for found in optimizers]
    for number, rule in enumerate(plan.groups, 1):
        place = f"group {number}"
        if rule.optimizer and None in labels:
            message = f"a hook does not know whether its optimizer is the one at {describe(rule.optimizer)}"
            yield Problem("unreached", message, place, remedy="leave `optimizer` out, or resume with optimstate.resume")
            continue
        mine = [found for found in optimizers if found.label is None or rule.is_for(found.label)]
        if not mine:
            message = f"there is no optimizer at {describe(rule.optimizer)}"
            yield Problem("unreached", message, place, remedy=f"there are {', '.join(map(describe, labels))}")
        elif rule.match and all(rule not in _taking(plan.groups, found) for found in mine):
            texts = ", ".join(describe(template.text) for template in rule.match)
            yield Problem("unmatched", f"{texts} matches no parameter that an earlier group leaves", place)
        else:
            yield from option_problems(rule.set, [options for found in mine for options in found.options], place)
    yield from _set_twice(plan.groups)
    slots = dict.fromkeys(slot for found in optimizers for slot in found.slots)
    for name in plan.slots if slots else ():
        if name not in slots:
            remedy = f"there are {', '.join(slots)}"
            yield Problem("unmatched", f"no parameter has a slot {describe(name)}", "[slots]", remedy=remedy)


def _set_twice(tables: Sequence[GroupRule]) -> Iterator[Problem]:
    """Options that a table without `match` sets although a later one for the same groups overrides them."""
    for number, later in enumerate(tables, 1):
        for earlier in tables[: number - 1]:
            same = earlier.optimizer == later.optimizer or "" in (earlier.optimizer, later.optimizer)
            if earlier.match or later.match or not same or later.number not in (None, earlier.number):
                continue
            for key in later.set.keys() & earlier.set.keys():
                message = f"{key} is set twice for the same param groups"
                yield Problem("setting", message, f"group {number}", remedy="say it once, or first for all groups")


def _taking(rules: Sequence[GroupRule], found: Reached) -> list[GroupRule]:
    """The tables that match a parameter of an optimizer."""
    mine = [rule for rule in rules if rule.match and (found.label is None or rule.is_for(found.label))]
    taken = takers(mine, found.names).values()
    return [rule for rule in mine if any(taker is rule for taker in taken)]


def takers(rules: Sequence[T], names: Sequence[str]) -> dict[str, T | None]:
    """For each parameter the first table that matches it, or None."""
    modules = Modules(names)
    matches = [(rule, [modules.reading(template) for template in rule.match]) for rule in rules]
    return {
        name: next((rule for rule, found in matches if any(t.match(name) is not None for t in found)), None)
        for name in names
    }


def option_problems(
    given: Mapping[str, Any], options: Sequence[Mapping[str, Any]], place: str, *, known: Iterable[str] = ()
) -> Iterator[Problem]:
    """Options that no param group has, or that have a value of another type there.

    Args:
        given: What is to be set.
        options: Of each group that it may be for.
        place: What messages call the setting.
        known: Options that they get besides, by a conversion.
    """
    names: dict[Any, None] = dict.fromkeys([*(key for found in options for key in found), *known])
    for key, value in given.items():
        if names and key not in names and not is_note(key):
            from difflib import get_close_matches

            close = get_close_matches(key, [name for name in names if isinstance(name, str)], n=1)
            remedy = f"is it {describe(close[0])}?" if close else f"there are {', '.join(map(describe, names))}"
            yield Problem("setting", f"no param group has an option {describe(key)}", place, remedy=remedy)
            continue
        if why := unusable(key, value):
            yield Problem("setting", why, place)
            continue
        olds = (found.get(key) for found in options)
        old = next((value for value in olds if isinstance(value, bool | int | float | list | tuple)), None)
        if old is not None and _kind(old) != _kind(value):
            yield Problem("setting", f"{key} is {describe(old)} now, and {describe(value)} is of another type", place)


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"list of {len(value)}"
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__
