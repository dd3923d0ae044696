"""Scheduler state for the param groups that a migration gives an optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.expressions.evaluate import copied
from optimstate.plan.solve.groups import GroupPlan, same_value
from optimstate.plan.solve.migration import SectionMoves
from optimstate.problems import Problem
from optimstate.state.optimizer import Group
from optimstate.state.scheduler import regroup_scheduler_state

__all__ = ["followed", "reschedules"]

# Half of a schedule is in the scheduler's lists, half in the groups: the group option that corresponds to each list.
_OPTION = {"base_lrs": "initial_lr", "_last_lr": "lr"}
_NESTED = "_schedulers"


def reschedules(moves: SectionMoves, old: Sequence[Group]) -> bool:
    """Whether schedulers of these old groups have anything to follow: other groups, or other learning rates."""
    return [group.base for group in moves.groups] != list(range(len(old))) or any(
        not same_value(group.options.get(option), before.options.get(option))
        for group, before in zip(moves.groups, old, strict=True)
        for option in _OPTION.values()
    )


def followed(state: Mapping[str, Any], moves: SectionMoves) -> dict[str, Any]:
    """A scheduler's state for the param groups of the result.

    Each group gets the values of the old one that its options are from, and the learning rates of its options where
    these are others.

    Args:
        state: The `state_dict()` of a scheduler, nested ones included; not changed.
        moves: What became of the optimizer.

    Raises:
        MigrationError: The state does not fit the old groups, holds lists of unknown meaning, lacks values for a group
            that is new, or nothing says which of several schedulers is to start from another learning rate.
    """
    if not moves.regrouped:
        return dict(state)
    fresh: dict[int, dict[str, Any]] = {}
    for number, group in enumerate(moves.groups):
        if group.base is None:
            lr = group.options.get("lr")
            fresh[number] = {"base_lrs": group.options.get("initial_lr", lr), "_last_lr": lr}
    # Where several old groups became one, the planner has chosen the one that stands for them.
    group_map = [[] if group.base is None else [group.base] for group in moves.groups]
    same = group_map == [[number] for number in range(moves.old_groups)]
    made = _own(state) if same else regroup_scheduler_state(state, group_map, fresh=fresh)
    problems: list[Problem] = []
    for number, group in enumerate(moves.groups):
        for key, option in _OPTION.items():
            if option in group.options:
                _set(made, number, key, group, problems)
    if problems:
        raise MigrationError(problems, hint="Leave `initial_lr` out of the plan, and set it in the schedulers.")
    return made


def _own(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state with lists of its own where options have their say."""
    made = {key: list(value) if key in _OPTION and isinstance(value, list) else value for key, value in state.items()}
    return {**made, _NESTED: [_own(nested) for nested in state[_NESTED]]} if state.get(_NESTED) else made


def _set(made: dict[str, Any], number: int, key: str, group: GroupPlan, problems: list[Problem]) -> None:
    """Put an option's value where the scheduler has another for this group."""
    wanted = group.options[_OPTION[key]]
    # `_last_lr` is the outermost scheduler's; the nested ones keep what they set last, each in its own time.
    places = list(_lists(made, key)) if key == "base_lrs" else [made] if isinstance(made.get(key), list) else []
    found = [place[key][number] for place in places]
    if any(same_value(value, wanted) for value in found):
        return
    if any(not same_value(value, found[0]) for value in found):
        message = f"should start at lr {wanted}, but its schedulers start at {' and '.join(map(str, found))}"
        problems.append(Problem("scheduler", f"param group {number} {message}"))
        return
    for place in places:
        place[key][number] = copied(wanted)


def _lists(state: dict[str, Any], key: str) -> Iterator[dict[str, Any]]:
    """The states, of nested schedulers too, that have such a list."""
    if isinstance(state.get(key), list):
        yield state
    for nested in state.get(_NESTED) or ():
        yield from _lists(nested, key)
