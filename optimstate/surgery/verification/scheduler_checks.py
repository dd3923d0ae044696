"""Whether a run could resume from the schedulers of a file: verify's checks of them, beside their optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isclose
from typing import Any

from optimstate.describe import describe
from optimstate.state.optimizer import OptimizerState
from optimstate.state.schedules import Schedule, schedule_of
from optimstate.state.sections import Section
from optimstate.surgery.shown import as_numbers, plain
from optimstate.surgery.verification.findings import Finding, fault, note

__all__ = ["check_schedulers", "fields_of"]


def check_schedulers(optimizers: Sequence[Section], schedulers: Sequence[Section]) -> Iterator[Finding]:
    """The values from which each scheduler takes its next step, and the param groups that it does that for.

    Args:
        optimizers: The optimizers of a checkpoint.
        schedulers: Its schedulers.
    """
    states = [section.optimizer() for section in optimizers]
    for section in schedulers:
        fields = fields_of(section.node)
        where = f"scheduler at {section.label}"
        schedule = schedule_of(as_numbers(fields))
        wrong = [*schedule.unusable()]
        yield from (fault("scheduler", where, why) for why in wrong)
        if states and not wrong:
            yield from _misfits(where, schedule, states)
        if states:
            yield from _rates(where, fields, states)


def fields_of(node: Any) -> Mapping[Any, Any]:
    """The state of a scheduler; of a pickled one its attributes but for the optimizer."""
    if isinstance(node, Mapping):
        return node
    return {key: value for key, value in node.state.items() if key != "optimizer"}


def _misfits(where: str, schedule: Schedule, optimizers: Sequence[OptimizerState]) -> Iterator[Finding]:
    """Why the scheduler is of none of the optimizers."""
    found = [[*schedule.misfits([as_numbers(group.options) for group in optimizer.groups])] for optimizer in optimizers]
    yield from (fault("group", where, why) for why in (min(found, key=len) if all(found) else ()))


def _rates(where: str, fields: Mapping[Any, Any], optimizers: Sequence[OptimizerState]) -> Iterator[Finding]:
    """The learning rates that a scheduler says it set last, compared with those of the groups."""
    last = plain(fields.get("_last_lr"))
    rates = [[plain(group.options.get("lr")) for group in optimizer.groups] for optimizer in optimizers]
    if not isinstance(last, list) or not any(len(last) == len(found) for found in rates):
        return
    if not any(_equal_rates(last, found) for found in rates):
        shown = ", ".join(map(describe, rates))
        usable = all(isinstance(rate, int | float) for found in rates for rate in found)  # NaN is shown as text
        message = f"set {describe(last)} last, but the optimizers have {shown}"
        yield note("lr", where, f"{message}: right if it was set by hand") if usable else fault("lr", where, message)


def _equal_rates(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(x == y or _close(x, y) for x, y in zip(a, b, strict=True))


def _close(x: Any, y: Any) -> bool:
    if not isinstance(x, int | float) or not isinstance(y, int | float):
        return False
    try:
        return isclose(x, y, rel_tol=1e-6)
    except OverflowError:  # a whole number that no float holds
        return False
