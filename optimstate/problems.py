"""The problems that planners and checkers collect: each has a kind for code and a sentence for people."""

from __future__ import annotations

from typing import Literal, Self

from optimstate.describe import escaped
from optimstate.record import Record

__all__ = ["Kind", "Problem"]

Kind = Literal[
    # a plan, its language and the names in the checkpoint
    "guard",  # the plan is for another checkpoint
    "unmatched",  # a rule or an option that matches nothing
    "syntax",  # a template that cannot be filled in
    "conflict",  # two producers of one name
    "incomplete",  # a joining rule lacks some of its members
    "operation",  # an operation does not fit the shapes of its tensors
    "unfilled",  # a name of the target that no rule makes
    "unexpected",  # a name that the target does not have
    "shape",  # a shape that is not the target's
    "unknown-shape",  # a shape that is needed and not known
    "tied",  # names that share memory would be treated differently
    "irreversible",  # a change that no plan undoes
    "unreached",  # a request of a plan that has no effect
    # optimizer state
    "slot",  # a slot cannot follow its parameter
    "no-state",  # parameters with and without state would be joined
    "disagreement",  # values that have to be equal differ
    "approximate",  # only possible approximately, which the policy refuses
    "conversion",  # state that has no meaning in another algorithm
    "algorithm",  # state of one algorithm for an optimizer of another
    "group",  # the param group, or the source of its options, is not determined
    "options",  # a group without options
    "order",  # parameters in another order than the one in which they will be loaded
    "scheduler",  # a scheduler cannot follow its optimizer
    # sections, names and values of a checkpoint
    "section",  # no section, or several, with a name
    "name",  # a name that is missing, duplicated or not determined
    "setting",  # a value that does not fit its option
    "cast",  # a tensor that cannot be cast
    "content",  # tensors that are not what they should be
    "against",  # not what the plan makes of its source
    "checksum",  # bytes that do not match a checksum
    "container",  # a fault of the file itself
    "more",  # the number of further problems of the preceding kind
    "certificate",  # a difference from a certificate
    # faults that would spoil a resumed run
    "coverage",
    "moments",
    "numbers",
    "zeros",
    "steps",
    "lr",
    "dtypes",
    "aliases",
    "shapes",
]
"""Every kind of problem."""


class Problem(Record):
    """Something that is wrong.

    Attributes:
        kind: The kind of problem.
        message: What is wrong; if two things disagree, it names both.
        place: The section, rule or parameter; may be empty.
        names: The affected parameters, or those that a name without a match may have meant.
        remedy: What to do next; may be empty.
    """

    kind: Kind
    message: str
    place: str = ""
    names: tuple[str, ...] = ()
    remedy: str = ""

    def at(self, place: str) -> Self:
        """The same problem, with a place that contains its own."""
        return self._replace(place=f"{place}: {self.place}" if self.place else place)

    def __str__(self) -> str:
        return escaped(": ".join(filter(None, (self.place, self.message, self.remedy))))
