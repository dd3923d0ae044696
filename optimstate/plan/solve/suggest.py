"""Propose a plan from what a checkpoint has and what is wanted: names, shapes and, where given, contents.

Names are compared in families: all layers at once, their indices taken out. Every rule comes with a confidence and the
reason for it; nothing is proposed that the planner would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.arranging import Rows, no_rows
from optimstate.plan.solve.search import Search, Suggested, merged_renames
from optimstate.record import Record

__all__ = ["Suggestion", "suggest"]


class Suggestion(Record):
    """A proposed plan.

    Attributes:
        rules: In order.
        missing: Wanted names that nothing explains.
        unused: Names of the checkpoint that nothing takes.
        options: What names and shapes leave open, and what would decide.
    """

    rules: tuple[Suggested, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The rules as a plan, which leaves out what is not explained."""
        return Plan(tuple(suggested.rule for suggested in self.rules))


def suggest(
    old: Mapping[str, Shape],
    new: Mapping[str, Shape],
    *,
    old_contents: Mapping[str, str] | None = None,
    new_contents: Mapping[str, str] | None = None,
    rows: Rows | None = None,
) -> Suggestion:
    """Propose a plan.

    Args:
        old: Names and shapes of the checkpoint.
        new: Names and shapes that are wanted.
        old_contents: Something equal for equal contents, such as a digest, by name.
        new_contents: The same for what is wanted, where it has contents already.
        rows: Something equal for equal rows of a tensor along a dimension; None where it is not known.

    Returns:
        Rules with reasons. A name that is there on both sides with the same shape is kept, unless the contents say
        otherwise, and needs no rule.
    """
    search = Search(old, new, old_contents or {}, new_contents or {}, rows or no_rows)
    for step in (
        search.by_content,
        search.rearranged,
        search.renamed,
        search.resized,
        search.joined,
        search.cut,
        search.copied,
        search.rearranged_in_part,
        search.renamed_and_changed,
        search.leave_squares_open,
    ):
        step()
    merged = merged_renames(search.found, old)
    return Suggestion(tuple(merged), tuple(search.new), tuple(search.old), tuple(search.options))
