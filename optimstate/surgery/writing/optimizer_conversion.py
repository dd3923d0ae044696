"""Converting whole sections to another optimizer as `plan.conversion` decides, with every loss reported."""

from __future__ import annotations

from collections.abc import Iterator

from optimstate.describe import describe
from optimstate.plan.slots.conversion import Conversion, Lost, plan_conversion
from optimstate.plan.slots.outcomes import flat_slots, slot_name
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.algorithms.registry import parameter_shape
from optimstate.state.algorithms.slots import MASTERS, Algorithm
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section
from optimstate.surgery.slot_counts import algorithm_of
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque

__all__ = ["OptimizerChange", "convert_optimizer"]


class OptimizerChange(Record):
    """State that was converted from one algorithm to another.

    Attributes:
        source: The algorithm it was of.
        target: The one it is of.
        slots: What became of each slot: `exact`, `approximate`, `fresh` or `dropped`, and why.
    """

    source: str
    target: str
    slots: tuple[Lost, ...]


def convert_optimizer(
    section: Section, target: str, problems: list[Problem], notes: list[str]
) -> tuple[OptimizerState, OptimizerChange | None]:
    """An optimizer's state as that of another algorithm.

    Args:
        section: An optimizer.
        target: The name of the algorithm.
        problems: Added to where it has no meaning; the state is then not to be used.
        notes: Added to: options that change, state that is already the target's.

    Returns:
        The state, and what was done; None where nothing was.
    """
    where = f"optimizer at {section.label}"
    state = section.optimizer()
    if section.positional or isinstance(section.node, Opaque):
        message = f"not in the form of a state dict, so it cannot become that of {target}"
        problems.append(Problem("conversion", message, where))
        return state, None
    algorithm = algorithm_of({slot for found in state.state.values() for slot in found}, state)
    found: list[Problem] = []
    conversion = plan_conversion(algorithm, target, state, _shapes(state, algorithm), found)
    if conversion is not None and not found:
        found += _unusable(state)
    problems += [problem.at(where) for problem in found]
    if conversion is None or found:
        if not found:
            notes.append(f"{where}: its state is that of {target} already")
        return state, None
    new = _with_masters(conversion.apply(state), state)
    notes += [f"{where}: {note}" for note in _changed_options(state, new)]
    return new, OptimizerChange(conversion.source, conversion.target, _every_slot(conversion, state, new))


def _shapes(state: OptimizerState, algorithm: Algorithm | None) -> dict[str, tuple[int, ...] | None]:
    made = {}
    for key, name, found in state.parameters():
        shapes = {str(s): v.shape if isinstance(v, LazyTensor) else None for s, v in (found or {}).items()}
        made[str(key if name is None else name)] = parameter_shape(shapes, algorithm)
    return made


def _unusable(state: OptimizerState) -> Iterator[Problem]:
    """Parameters whose slots cannot be computed with, or that lack what the others have."""
    labelled = [
        (f"parameter {key}" if name is None else name, found) for key, name, found in state.parameters() if found
    ]
    everywhere = {"exp_avg", "exp_avg_sq", "exp_inf", "step"} & {slot for _, found in labelled for slot in found}
    for label, found in labelled:
        for slot in sorted(everywhere - set(found)):
            yield Problem("slot", f"{label} has no {slot}, which others have", names=(label,))
        for path, value in flat_slots(found):
            if not isinstance(value, LazyTensor | int | float | None):
                yield Problem(
                    "slot", f"{describe(value)} cannot be computed with", f"{label}, {slot_name(path)}", (label,)
                )


def _with_masters(new: OptimizerState, old: OptimizerState) -> OptimizerState:
    """The converted state with the fp32 masters: they are the parameter, whatever the algorithm."""
    masters = {key: {s: v for s, v in slots.items() if s in MASTERS} for key, slots in old.state.items()}
    made = {key: {**new.state.get(key, {}), **found} for key, found in masters.items() if found or key in new.state}
    return new._replace(state=made)


def _every_slot(conversion: Conversion, old: OptimizerState, new: OptimizerState) -> tuple[Lost, ...]:
    """The conversion's report, as far as it concerns slots that are there, and what it does not mention."""
    if conversion.source == "bitsandbytes":  # whose slots have other names than the moments that the report tells of
        return conversion.report
    before, after = (list(dict.fromkeys(s for slots in state.state.values() for s in slots)) for state in (old, new))
    report = [line for line in conversion.report if {*line.slot.split(", ")} & {*before, *after}]
    reported = {slot for line in report for slot in line.slot.split(", ")}
    report += [Lost(slot, "exact", "the parameter itself") for slot in before if slot in MASTERS]
    report += [
        Lost(slot, "dropped", f"{conversion.target} has none")
        for slot in before
        if slot not in after and slot not in reported
    ]
    return tuple(report)


def _changed_options(old: OptimizerState, new: OptimizerState) -> Iterator[str]:
    """What became of the options, as the first group shows it."""
    for before, after in zip(old.groups[:1], new.groups, strict=False):
        absent = object()
        made = [key for key, value in after.options.items() if before.options.get(key, absent) is not value]
        lost = [key for key in before.options if key not in after.options]
        if made:
            yield f"options at the defaults of the new algorithm: {', '.join(made)}"
        if lost:
            yield f"options that it does not have, dropped: {', '.join(lost)}"
