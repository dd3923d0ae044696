"""The part of a migration that needs no parameter names: options of param groups, and their schedulers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.apply.scheduled import Groups
from optimstate.plan.language.plan import Plan
from optimstate.plan.slots.outcomes import flat_slots
from optimstate.plan.solve.groups import GroupPlan, with_tables
from optimstate.plan.solve.migration import Migration, SectionMoves
from optimstate.plan.solve.reach import Reached, unreached
from optimstate.problems import Problem
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section
from optimstate.tree import rebuilt_mapping

__all__ = ["followers_of", "scheduled", "with_group_options", "with_options"]


def with_options(
    plan: Plan, migration: Migration, optimizers: Mapping[str, OptimizerState], named: Collection[str]
) -> Migration:
    """The migration with the options that `[[group]]` tables set in optimizers without parameter names.

    Args:
        plan: Its `[[group]]` tables.
        migration: What was planned for the sections with names.
        optimizers: All of them, by section.
        named: Those whose parameters have names.

    Raises:
        MigrationError: A table needs names, or is for an optimizer that is not there.
    """
    problems = list(unreached(plan, [_reached(key, state, migration) for key, state in optimizers.items()]))
    sections = dict(migration.sections)
    for key, state in optimizers.items():
        tables = [rule for rule in plan.groups if rule.is_for(key.removeprefix("optimizer "))]
        if key in named or not (tables or plan.schedulers):
            continue
        tables = [rule for rule in tables if not rule.match]
        old = [
            GroupPlan(tuple(map(str, group.params)), group.options, (number,), number)
            for number, group in enumerate(state.groups)
        ]
        found: list[Problem] = []
        new = with_tables(old, tables, found)
        problems += [problem.at(key) for problem in found]
        changed = [group.options for group in new] != [group.options for group in old]
        sections[key] = SectionMoves((), (), tuple(new), len(old), regrouped=changed)
    if problems:
        raise MigrationError(problems)
    return migration._replace(sections=sections)


def _reached(key: str, state: OptimizerState, migration: Migration) -> Reached:
    """What the plan can refer to in an optimizer of the checkpoint."""
    section = migration.sections.get(key)
    names = [move.target for move in section.moves] if section is not None else []
    options = [group.options for group in state.groups]
    slots = dict.fromkeys(str(path[-1]) for slots in state.state.values() for path, _ in flat_slots(slots))
    return Reached(key.removeprefix("optimizer "), names, options, slots)


def with_group_options(state: OptimizerState, moves: SectionMoves) -> OptimizerState:
    """The state with the group options of a migration; the parameters of each group stay."""
    made = (group._replace(options=new.options) for group, new in zip(state.groups, moves.groups, strict=True))
    return state._replace(groups=tuple(made))


def scheduled(
    plan: Plan, migration: Migration, schedulers: Sequence[Section], optimizers: Mapping[str, OptimizerState]
) -> tuple[Migration, dict[int, Any], list[str]]:
    """The migration with the learning rates that the checkpoint's schedulers give to its param groups.

    Args:
        plan: Its `[scheduler]` tables and policies.
        migration: What was planned for the optimizers.
        schedulers: Those of the checkpoint, in its order.
        optimizers: By section, in the order of the checkpoint.

    Returns:
        The migration, what the schedulers become by the id of their node, and notes.

    Raises:
        MigrationError: A scheduler cannot follow, nothing says which optimizer it follows, or the plan is for one that
            is not there.
    """
    found = [section for section in schedulers if isinstance(section.node, Mapping)]
    if not (found or plan.schedulers or plan.policy.schedule == "live"):
        return migration, {}, []
    from optimstate.plan.apply.schedulers import followed, reaches  # with the rules of every schedule

    if problems := list(_unreached(plan, found)):
        raise MigrationError(problems)
    sections, made, notes = dict(migration.sections), dict[int, Any](), list[str]()
    for section, key, certain in followers_of(plan, sections, found, optimizers):
        groups = Groups.of(sections[key], [group.options for group in optimizers[key].groups])
        asked = any(reaches(rule, section.node, section.label) for rule in plan.schedulers)
        if groups.unchanged and not asked:
            continue
        try:
            result = followed(section.node, groups, plan=plan, label=section.label)
        except MigrationError as error:
            raise MigrationError([problem.at(key) for problem in error.problems], hint=error.hint) from None
        # Where only the order of the sections says who follows whom, what no later step reads stays as it was.
        if certain or asked or {**result.state, "_last_lr": None} != {**section.node, "_last_lr": None}:
            made[id(section.node)] = rebuilt_mapping(section.node, result.state)
        sections[key] = _with_rates(sections[key], result.options)
        notes += [f"{key}: {note}" for note in result.notes]
    return migration._replace(sections=sections), made, notes


def _with_rates(moves: SectionMoves, options: Sequence[Mapping[str, Any]]) -> SectionMoves:
    made = tuple(group._replace(options=new) for group, new in zip(moves.groups, options, strict=True))
    differs = any(new.options != old.options for new, old in zip(made, moves.groups, strict=True))
    return moves._replace(groups=made, regrouped=moves.regrouped or differs)


def _unreached(plan: Plan, schedulers: Sequence[Section]) -> Iterator[Problem]:
    """What the plan asks for that no scheduler of the checkpoint can provide."""
    if plan.policy.schedule == "live":
        message = 'schedule = "live" in [policy] speaks of a scheduler in memory, and a file has none'
        yield Problem("unreached", message, remedy="use it in optimstate.resume")
    from optimstate.plan.apply.schedulers import unreached_schedulers

    yield from unreached_schedulers(plan, [(section.label, section.node) for section in schedulers])


def followers_of(
    plan: Plan,
    sections: Mapping[str, SectionMoves],
    schedulers: Sequence[Section],
    optimizers: Mapping[str, OptimizerState],
    *,
    all_of: bool = False,
) -> list[tuple[Section, str, bool]]:
    """Each scheduler with the optimizer whose param groups it follows, and whether that is certain.

    Raises:
        MigrationError: Nothing says which follows which, and it matters.
    """
    changed = [
        key
        for key, state in optimizers.items()
        if key in sections and not Groups.of(sections[key], [group.options for group in state.groups]).unchanged
    ]
    if not schedulers or not (all_of or changed or plan.schedulers):
        return []
    if len(optimizers) == 1:
        pairs = [(section, next(iter(optimizers)), True) for section in schedulers]
    elif len(schedulers) == len(optimizers):
        pairs = [(section, key, False) for section, key in zip(schedulers, optimizers, strict=True)]
    else:
        message = (
            f"{len(schedulers)} schedulers and {len(optimizers)} optimizers: nothing says which "
            "scheduler follows which optimizer's param groups"
        )
        raise MigrationError.of(
            "scheduler", message, hint="Migrate the optimizers one at a time, or write the schedulers anew."
        )
    return [pair for pair in pairs if pair[1] in sections]
