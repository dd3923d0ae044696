"""The matches of a plan in all parts of a resumption together: each rule must match in one of them."""

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
    """The matches of one plan.

    Attributes:
        plan: The plan.
        inventories: The planner's input for each part, by its key.
        counts: For each rule, how many parameters of all parts it matched.
        settled: For each part, whether it already is what the plan would make of it.
        reached: The names, options and slots of each optimizer, to which the plan may refer.
    """

    plan: Plan
    inventories: dict[str, Inventory] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    settled: list[bool] = field(default_factory=list)
    reached: list[Reached] = field(default_factory=list)

    def count(self, counts: list[int]) -> None:
        """Add the matches of each rule in one part; an empty list if the rules were not applied."""
        counts = counts or [0] * len(list(self.plan.all_rules()))
        self.counts = [a + b for a, b in zip(self.counts or [0] * len(counts), counts, strict=True)]

    def unreached(self) -> Iterator[Problem]:
        """Problems with the guard, and with requests of the plan for things that do not exist."""
        from optimstate.plan.solve.problems import guarded
        from optimstate.plan.solve.reach import unreached

        yield from guarded(self.plan.guard, self.inventories)
        yield from unreached(self.plan, self.reached)

    def unmatched(self) -> Iterator[Problem]:
        """Problems with rules that match nothing in any part."""
        from optimstate.plan.solve.problems import unmatched

        if self.plan.policy.unused != "error" or all(self.settled):
            return
        for number, (rule, count) in enumerate(zip(self.plan.all_rules(), self.counts, strict=True), 1):
            if not count:
                yield unmatched(number, rule, self.inventories)

    def idle(self) -> Iterator[str]:
        """Notes on rules that match nothing, if that is allowed."""
        from optimstate.plan.solve.problems import idle_rules

        yield from idle_rules(self.plan, self.counts, self.inventories)
