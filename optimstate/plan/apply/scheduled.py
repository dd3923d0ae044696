"""The param groups that a scheduler drives, a scheduler in memory, and what both become."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.plan.expressions.evaluate import number_of
from optimstate.plan.solve.groups import same_value
from optimstate.plan.solve.migration import SectionMoves
from optimstate.record import Record

if TYPE_CHECKING:
    from optimstate.state.schedules import Schedule

__all__ = ["BOUNDS", "Followed", "Groups", "LiveScheduler", "named", "near", "rate_of", "unshared"]

BOUNDS = ("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
"""The options of a param group that bound its schedule."""


class Groups(Record):
    """The param groups that a scheduler drives.

    Attributes:
        options: Of each group of the result.
        bases: For each of them the old group whose options it has; None for a new one.
        before: The options of the old groups.
        given: Which options of each group the plan sets, be they others than before or not.
    """

    options: list[dict[str, Any]]
    bases: list[int | None]
    before: list[dict[str, Any]]
    given: list[frozenset[str]]

    @classmethod
    def of(cls, moves: SectionMoves, before: Sequence[Mapping[str, Any]]) -> Groups:
        """Those of an optimizer that was migrated."""
        return cls(
            [dict(group.options) for group in moves.groups],
            [group.base for group in moves.groups],
            [dict(options) for options in before],
            [frozenset(group.rule.set if group.rule else ()) for group in moves.groups],
        )

    @property
    def unchanged(self) -> bool:
        """Whether they are the old ones, with the same learning rates and bounds."""
        return self.bases == list(range(len(self.before))) and all(
            same_value(made.get(key), had.get(key))
            for made, had in zip(self.options, self.before, strict=True)
            for key in ("lr", "initial_lr", *BOUNDS)
        )


class LiveScheduler(Record):
    """A scheduler in memory.

    Attributes:
        name: Its class.
        state: Its `state_dict()`.
        groups: The options of its optimizer's param groups.
        functions: Its `lr_lambdas`, where it has them.
    """

    name: str
    state: Mapping[str, Any]
    groups: Sequence[Mapping[str, Any]] = ()
    functions: Sequence[Any] = ()

    @classmethod
    def of(cls, scheduler: Any) -> LiveScheduler:
        """One of torch's, or of optimstate's."""
        groups = [{k: v for k, v in group.items() if k != "params"} for group in scheduler.optimizer.param_groups]
        functions = getattr(scheduler, "lr_lambdas", ())
        return cls(type(scheduler).__name__, scheduler.state_dict(), groups, functions)


class Followed(Record):
    """What a scheduler and its param groups become.

    Attributes:
        state: The scheduler's.
        options: Of each param group.
        notes: What was computed, and what deserves attention.
    """

    state: dict[str, Any]
    options: list[dict[str, Any]]
    notes: list[str]


def named(schedule: Schedule) -> str:
    """The name of a schedule in messages."""
    return schedule.NAME or "a scheduler that is not torch's"


def unshared(node: Any) -> Any:
    """A copy of the state with new containers and shared leaves."""
    if type(node) is dict:
        return {key: unshared(value) for key, value in node.items()}
    return [unshared(value) for value in node] if type(node) is list else node


def near(one: float, other: float, scale: float = 0.0) -> bool:
    """Whether two rates are equal up to rounding; near zero, relative to `scale`."""
    return math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9 * abs(scale))


def rate_of(value: Any) -> float | None:
    """A learning rate as a float; None where it is not a real number."""
    found = number_of(value)
    return None if found is None or isinstance(found, complex) else float(found)
