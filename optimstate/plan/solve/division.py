"""Which optimizer of the result has each parameter, where a plan has `[[optimizer]]` tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from optimstate.describe import describe, few
from optimstate.errors import MigrationError
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import OptimizerRule
from optimstate.plan.solve.groups import GroupPlan, with_values
from optimstate.plan.solve.migration import Migration, SectionMoves
from optimstate.plan.solve.reach import option_problems, takers
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    from optimstate.plan.slots.conversion import Conversion

__all__ = ["Part", "divided"]


class Part(Record):
    """What one optimizer of the result takes from one of the checkpoint.

    Attributes:
        rule: The table it is.
        key: The optimizer of the checkpoint, as reports call it.
        moves: What becomes of the parameters that go from there to here.
        numbers: The param groups of the migrated optimizer that its groups are parts of.
    """

    rule: OptimizerRule
    key: str
    moves: SectionMoves
    numbers: tuple[int, ...]


def divided(plan: Plan, migration: Migration, states: Mapping[str, OptimizerState]) -> list[Part]:
    """The parameters of all optimizers, assigned to those of the result in the order of the tables.

    Args:
        plan: Its `[[optimizer]]` tables.
        migration: What becomes of each optimizer of the checkpoint.
        states: These, by the key of their section.

    Raises:
        MigrationError: A parameter is in no table or a table has none, state has no meaning where it is to go, or a
            table would have state of several algorithms.
    """
    problems: list[Problem] = []
    keys = [key for key in migration.sections if key in states]
    taken = {key: takers(plan.optimizers, [move.target for move in migration.sections[key].moves]) for key in keys}
    for key in keys:
        outside = [name for name, rule in taken[key].items() if rule is None]
        if outside:
            message = f"no [[optimizer]] matches {few(list(map(describe, outside)))}"
            remedy = 'end with one for the rest, match = "**"'
            problems.append(Problem("group", message, key, tuple(outside), remedy))
        algorithm = migration.sections[key].algorithm
        if algorithm is not None and algorithm.is_flat:
            message = f"{algorithm.name} keeps one state for all parameters, which cannot be divided"
            problems.append(Problem("conversion", message, key))
        if plan.optimizer:
            message = f'optimizer = "{plan.optimizer}" beside [[optimizer]] tables'
            problems.append(Problem("unreached", message, key, remedy="say `algorithm` in the tables"))
    parts = []
    for rule in plan.optimizers:
        own = []
        for key in keys:
            names = {name for name, taker in taken[key].items() if taker is rule}
            if names:
                own.append(_part(rule, key, names, migration.sections[key], states[key], problems))
        if not own and plan.policy.unused == "error":
            problems.append(Problem("unmatched", "matches no parameter that an earlier table leaves", str(rule)))
        problems += _mixed(rule, own)
        parts += own
    if problems:
        raise MigrationError(list(dict.fromkeys(problems)))
    return parts


def _part(
    rule: OptimizerRule,
    key: str,
    names: set[str],
    section: SectionMoves,
    state: OptimizerState,
    problems: list[Problem],
) -> Part:
    moves = tuple(move for move in section.moves if move.target in names)
    numbers = [n for n, group in enumerate(section.groups) if not names.isdisjoint(group.members)]
    groups = [_cut(section.groups[number], names, rule) for number in numbers]
    conversion: Conversion | None = None
    if rule.algorithm:
        shapes = {move.target: move.expression.shape for move in moves if move.expression is not None}
        found: list[Problem] = []
        options = [group.options for group in groups]
        from optimstate.plan.slots.conversion import plan_conversion

        conversion = plan_conversion(
            section.algorithm, rule.algorithm, state, shapes, found, options=options, given=frozenset(rule.set)
        )
        problems += [problem.at(str(rule)) for problem in found]
    problems += _unknown_options(rule, section.groups)
    made = section._replace(
        moves=moves, dropped=(), groups=tuple(groups), regrouped=True, reordered=True, conversion=conversion
    )
    return Part(rule, key, made, tuple(numbers))


def _cut(group: GroupPlan, names: set[str], rule: OptimizerRule) -> GroupPlan:
    members = tuple(name for name in group.members if name in names)
    return group._replace(members=members, options=with_values(group.options, rule.set))


def _unknown_options(rule: OptimizerRule, groups: Sequence[GroupPlan]) -> Iterator[Problem]:
    from optimstate.plan.slots.converted_options import option_names

    known = option_names(rule.algorithm) if rule.algorithm else ()
    return option_problems(rule.set, [] if known else [group.options for group in groups], str(rule), known=known)


def _mixed(rule: OptimizerRule, parts: Sequence[Part]) -> Iterator[Problem]:
    """Refuse to join state of different algorithms."""
    found = {part.moves.algorithm.name: part.key for part in parts if part.moves.algorithm is not None}
    if not rule.algorithm and len(found) > 1:
        both = " and ".join(f"{name} (from {key})" for name, key in found.items())
        yield Problem("conversion", f"it would have state of {both}", str(rule), remedy="say `algorithm`")
