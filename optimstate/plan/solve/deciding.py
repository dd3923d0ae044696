"""Deciding what names and shapes leave open, by trying every possibility."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from math import prod

from optimstate.errors import PlanError
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.solve.alternatives import Choice, Decision, Suggested
from optimstate.plan.solve.resolve import Resolver
from optimstate.plan.solve.suggest import Suggestion
from optimstate.problems import Problem

__all__ = ["decided"]

_TRIED = 256
"""So many combinations are tried at most."""


def decided(found: Suggestion, old: Mapping[str, Shape], keeps: Callable[[Plan], bool]) -> Suggestion:
    """The suggestion, with everything decided that trying can decide.

    Args:
        found: What names, shapes and contents tell.
        old: Names and shapes of the checkpoint.
        keeps: Whether the new model computes with a plan what the old one does.

    Raises:
        PlanError: There are too many combinations to try.
    """
    if not found.decisions:
        return found
    count = prod(len(decision.choices) for decision in found.decisions)
    if count > _TRIED:
        raise PlanError(
            f"{count} combinations are possible, and a rehearsal tries {_TRIED} at most",
            hint="Write the rules that you know into a plan, remap with it, and suggest from there.",
        )
    base = _without_proposed(found)
    combinations = list(itertools.product(*(decision.choices for decision in found.decisions)))
    holding = [each for each in combinations if keeps(_plan(base, each))]
    if not holding:
        nothing = f"none of the {count} combinations of what is open keeps the function: a rehearsal decides nothing"
        return found._replace(options=(nothing, *found.options))
    rules, decisions = list(base), []
    for place, decision in enumerate(found.decisions):
        left = [choice for choice in decision.choices if any(each[place] is choice for each in holding)]
        if len(left) == 1:
            reason = f"a rehearsal keeps the function, and with none of the {len(decision.choices) - 1} others"
            rules += [Suggested(rule, 1.0, reason) for rule in left[0].rules]
        else:
            about = f"{decision.about}. A rehearsal does not tell these apart"
            proposed = decision.proposed and left[0] is decision.choices[0]
            decisions.append(Decision(about, tuple(left), proposed))
            if proposed:
                rules += [item for item in found.rules if item.rule in left[0].rules]
    taken, made = _names([item.rule for item in rules], old)
    was = {decision.about for decision in found.decisions}
    return Suggestion(
        tuple(rules),
        tuple(name for name in found.missing if name not in made),
        tuple(name for name in found.unused if name not in taken),
        (*(option for option in found.options if option not in was), *(each.about for each in decisions)),
        tuple(decisions),
    )


def _without_proposed(found: Suggestion) -> list[Suggested]:
    """The rules that are not the first possibility of something open."""
    open_rules = [rule for each in found.decisions if each.proposed for rule in each.choices[0].rules]
    return [item for item in found.rules if item.rule not in open_rules]


def _plan(base: list[Suggested], choices: tuple[Choice, ...]) -> Plan:
    return Plan((*(rule for choice in choices for rule in choice.rules), *(item.rule for item in base)))


def _names(rules: list[Rule], old: Mapping[str, Shape]) -> tuple[set[str], set[str]]:
    """The names that rules take and make."""
    problems: list[Problem] = []
    found = Resolver([rules], "", [0] * len(rules), problems).resolve(old)
    uses = [use for each in found.applications for use in each]
    return {name for use in uses for name in use.sources}, set(found.made)
