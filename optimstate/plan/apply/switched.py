"""Slots that exist only while an option is on, and are therefore missing when the option is turned on.

torch makes them with a parameter's first state alone, and fails at the next step where they are not there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.expressions.evaluate import backend_of, copied, shape_of
from optimstate.plan.solve.groups import GroupPlan
from optimstate.record import Record
from optimstate.state.algorithms.registry import recognise_state
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.optimizer import Group, OptimizerState, Slots

__all__ = ["Asked", "started", "with_switched_slots"]

_LARGEST = {"max_exp_avg_sq": "exp_avg_sq"}
"""Slots that are the largest so far of another: they start there."""


class Asked(Record):
    """A param group whose options require slots.

    Attributes:
        parameters: The keys of their slots.
        options: As they will be.
        before: As they were; a slot that was missing then already is not started. Empty for what is new.
    """

    parameters: Sequence[Any]
    options: Mapping[str, Any]
    before: Mapping[str, Any]


def with_switched_slots(
    state: OptimizerState, groups: Sequence[GroupPlan], old: Sequence[Group] = ()
) -> tuple[OptimizerState, tuple[str, ...]]:
    """The optimizer with the slots of options that were turned on, and a note for each new slot.

    Args:
        state: After a plan.
        groups: Its param groups, as they were planned.
        old: The groups before, which `groups` speak of; none where all that is asked for is to be there.

    Raises:
        MigrationError: A slot has to start and nothing tells a parameter's shape.
    """
    if not state.groups or not state.state:
        return state, ()
    asked = [
        Asked(group.params, group.options, old[plan.base].options if old and plan.base is not None else {})
        for group, plan in zip(state.groups, groups, strict=True)
    ]
    algorithm = recognise_state(state.state.values(), state.groups[0].options)
    slots, notes = started(algorithm, state.state, asked)
    return (state._replace(state=slots) if notes else state), notes


def started(
    algorithm: Algorithm | None,
    slots: Mapping[Any, Slots | None],
    groups: Iterable[Asked],
    parameters: Mapping[Any, Any] | None = None,
) -> tuple[Mapping[Any, Any], tuple[str, ...]]:
    """The slots of every parameter, with those that the options require.

    Args:
        algorithm: Whose state it is; None where that is not known, and nothing can be said.
        slots: By parameter; not changed.
        groups: The param groups.
        parameters: The live ones, whose shapes the slots get; without them that of another slot.

    Returns:
        The slots, and a note for each that starts now.

    Raises:
        MigrationError: A slot has to start and nothing tells a parameter's shape.
    """
    counts: Counter[tuple[str, str]] = Counter()
    made = dict(slots)
    for group in groups if algorithm is not None else ():
        for key in group.parameters:
            own = made.get(key)
            for slot, option in algorithm.missing(own, group.options) if algorithm is not None and own else ():
                if own and option and not group.before.get(option):
                    parameter = parameters[key] if parameters is not None else None
                    made[key] = own = {**own, slot: _first(algorithm, slot, key, own, parameter)}
                    counts[slot, option] += 1
    notes = tuple(
        f"{slot} of {count} parameter{'s' if count > 1 else ''} starts at {_LARGEST.get(slot, 'zero')}: "
        f"{option} is on, and the checkpoint has none that fits"
        for (slot, option), count in counts.items()
    )
    return (made if counts else slots), notes


def _first(algorithm: Algorithm | None, slot: str, key: Any, own: Slots, parameter: Any) -> Any:
    """The initial value of a slot."""
    if _LARGEST.get(slot) in own:
        return copied(own[_LARGEST[slot]])
    if parameter is not None:
        from optimstate.installed_torch import torch

        return torch.zeros_like(parameter)
    assert algorithm is not None
    for name, value in own.items():
        found, shape = algorithm.slot(str(name)), shape_of(value)
        if found is not None and found.is_elementwise and shape is not None:
            return backend_of(value).full(value, shape, 0.0)
    message = f"{algorithm.name} would need {slot} now, and no slot here has the parameter's shape to start it with"
    remedy = "set the option in the live optimizer instead: optimstate.resume and the load hooks start the slot"
    raise MigrationError.of("slot", message, describe(key), remedy=remedy)
