"""Propose a plan from what a checkpoint has and what is wanted: names, shapes and, where given, contents.

Names are compared in families: all layers at once, their indices taken out. Every rule comes with a confidence and the
reason for it; nothing is proposed that the planner would refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve import by_contents, by_names, by_shapes, fusing
from optimstate.plan.solve.alternatives import Decision, Suggested
from optimstate.plan.solve.arranging import Rows, no_rows
from optimstate.plan.solve.by_layouts import of_known_layouts
from optimstate.plan.solve.known import Knowledge, knowledge
from optimstate.plan.solve.search import Search, merged_renames
from optimstate.record import Record

__all__ = ["Suggestion", "suggest"]


class Suggestion(Record):
    """A proposed plan.

    Attributes:
        rules: In order.
        missing: Wanted names that nothing explains.
        unused: Names of the checkpoint that nothing takes.
        options: What names and shapes leave open, and what would decide.
        decisions: Those of them whose possibilities can be listed.
    """

    rules: tuple[Suggested, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    options: tuple[str, ...] = ()
    decisions: tuple[Decision, ...] = ()

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
    head_dim: int | None = None,
    known: Knowledge | None = None,
) -> Suggestion:
    """Propose a plan.

    Args:
        old: Names and shapes of the checkpoint.
        new: Names and shapes that are wanted.
        old_contents: Something equal for equal contents, such as a digest, by name.
        new_contents: The same for what is wanted, where it has contents already.
        rows: Something equal for equal rows of a tensor along a dimension; None where it is not known.
        head_dim: The size of an attention head, where it is known.
        known: What is known of libraries; what this release knows by default.

    Returns:
        Rules with reasons. A name that is there on both sides with the same shape is kept, unless the contents say
        otherwise, and needs no rule.
    """
    known = known or knowledge()
    search = Search(old, new, old_contents or {}, new_contents or {}, rows or no_rows, head_dim)
    by_contents.equal(search)
    by_contents.rearranged(search)
    of_known_layouts(search, known)
    by_names.called_alike(search, known)
    by_names.the_only_ones(search)
    by_shapes.resized(search)
    fusing.joined(search)
    fusing.cut(search)
    by_contents.rearranged_in_part(search)
    by_names.left_open(search)
    by_shapes.copied(search)
    by_shapes.renamed_and_changed(search)
    by_shapes.squares(search)
    asked = {str(rule) for decision in search.decisions if decision.proposed for rule in decision.choices[0].rules}
    pinned = [item for item in search.found if str(item.rule) in asked]
    merged = merged_renames([item for item in search.found if item not in pinned], old)
    return Suggestion(
        (*pinned, *merged),
        search.missing,
        search.unused,
        (*search.options, *(decision.about for decision in search.decisions)),
        tuple(search.decisions),
    )
