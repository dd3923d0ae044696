"""What planners and checkers collect: a problem that code tells by its kind and people read as a sentence."""

from __future__ import annotations

from typing import Literal, Self

from optimstate.describe import escaped
from optimstate.record import Record

__all__ = ["Kind", "Problem"]

Kind = Literal[
    # a plan, its language and the names it meets
    "guard",  # the checkpoint is another one than the plan is for
    "unmatched",  # a rule or an option that matches nothing
    "syntax",  # a template that cannot be filled in
    "conflict",  # two producers of one name
    "incomplete",  # a joining rule lacks some of its members
    "operation",  # an operation does not fit the shapes it meets
    "unfilled",  # a name of the target that nothing makes
    "unexpected",  # a name that the target does not have
    "shape",  # a shape that is not the target's
    "unknown-shape",  # a shape that has to be known and is not
    "tied",  # names that share memory would be treated differently
    "irreversible",  # what no plan undoes
    "unreached",  # what a plan asks and cannot do
    # optimizer state
    "slot",  # a slot cannot follow its parameter
    "no-state",  # parameters with and without state would become one
    "disagreement",  # values differ that have to be one
    "approximate",  # only possible approximately, which the policy refuses
    "conversion",  # state that has no meaning in another algorithm
    "algorithm",  # state of one algorithm for an optimizer of another
    "group",  # which param group, or which of several groups' options
    "options",  # a group without options
    "order",  # parameters in another order than the one by which they will be loaded
    "scheduler",  # a scheduler cannot follow its optimizer
    # sections, names and values of a checkpoint
    "section",  # no section, or several, of a name
    "name",  # a name that is missing, doubled or not determined
    "setting",  # a value that does not fit the option it is for
    "cast",  # what cannot be cast
    "content",  # tensors that are not what they should be
    "against",  # not what the plan makes of its source
    "checksum",  # bytes that are not those a checksum was taken of
    "container",  # something odd about the file itself
    "more",  # how many more problems of the kind before it there are
    "certificate",  # what is not as it was certified
    # what a resumed run would trip over
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
        kind: What kind of thing is wrong.
        message: What is wrong, naming both sides where two disagree.
        place: Where: a section, a rule, a parameter; may be empty.
        names: The parameters it is about, or that a name which matches nothing could have meant.
        remedy: What to do next; may be empty.
    """

    kind: Kind
    message: str
    place: str = ""
    names: tuple[str, ...] = ()
    remedy: str = ""

    def at(self, place: str) -> Self:
        """The same problem, with what contains its place put before it."""
        return self._replace(place=f"{place}: {self.place}" if self.place else place)

    def __str__(self) -> str:
        return escaped(": ".join(filter(None, (self.place, self.message, self.remedy))))
