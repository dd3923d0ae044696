"""Propose a plan from what a checkpoint has and what is wanted: names, shapes and, where given, contents.

Names are compared in families: all layers at once, their indices taken out. Every rule comes with a confidence and the
reason for it; nothing is proposed that the planner would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.search import Rows, Search, Suggested, merged_renames, no_rows
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
        rows: Something equal for equal rows of a tensor, by the side (0 for old) and name; None where it is not known.

    Returns:
        Rules with reasons. A name that is there on both sides with the same shape is kept, unless the contents say
        otherwise, and needs no rule.
    """
    search = Search(old, new, old_contents or {}, new_contents or {}, rows or no_rows)
    for step in (
        search.by_content,
        search.renamed,
        search.chosen,
        search.resized,
        search.joined,
        search.cut,
        search.copied,
    ):
        step()
    merged = merged_renames(search.found, old)
    return Suggestion(tuple(merged), tuple(search.new), tuple(search.old), tuple(search.options))
