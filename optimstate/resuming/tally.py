"""What a plan matches in all parts of a resumption together: each rule must match somewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Inventory
from optimstate.problems import Problem

if TYPE_CHECKING:
    from optimstate.plan.solve.reach import Reached

__all__ = ["Tally"]


@dataclass
class Tally:
    """Of one plan.

    Attributes:
        plan: The plan.
        inventories: What the planner was told of each part, by its key.
        counts: For each rule, how many parameters of all parts it matched.
        settled: Of each part, whether it is already what the plan would make of it.
        reached: What the plan may speak of in each optimizer.
    """

    plan: Plan
    inventories: dict[str, Inventory] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    settled: list[bool] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)

    def count(self, counts: list[int]) -> None:
        """Add what the rules matched in one part; an empty list where they were not applied."""
        counts = counts or [0] * len(list(self.plan.all_rules()))
        self.counts = [a + b for a, b in zip(self.counts or [0] * len(counts), counts, strict=True)]

    def unreached(self) -> Iterator[Problem]:
        """What the guard does not allow, and what the plan asks for that is not there."""
        from optimstate.plan.solve.problems import guarded
        from optimstate.plan.solve.reach import unreached

        yield from guarded(self.plan.guard, self.inventories)
        yield from unreached(self.plan, self.reached)

    def unmatched(self) -> Iterator[Problem]:
        """Rules that match nothing in any part."""
        from optimstate.plan.solve.problems import unmatched

        if self.plan.policy.unused != "error" or all(self.settled):
            return
        for number, (rule, count) in enumerate(zip(self.plan.all_rules(), self.counts, strict=True), 1):
            if not count:
                yield unmatched(number, rule, self.inventories)

    def idle(self) -> Iterator[str]:
        """Notes on rules that match nothing, where that is allowed."""
        from optimstate.plan.solve.problems import idle_rules

        yield from idle_rules(self.plan, self.counts)
