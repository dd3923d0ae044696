"""What names and shapes leave open: the plans that fit alike, ranked."""

from __future__ import annotations

from collections.abc import Sequence

from optimstate.plan.language.rules import Rule
from optimstate.record import Record

__all__ = ["Choice", "Decision", "Suggested", "ranked"]


class Suggested(Record):
    """One rule with how sure it is, from 0 to 1, and why."""

    rule: Rule
    confidence: float
    reason: str


class Choice(Record):
    """One of several possibilities.

    Attributes:
        rules: What a plan would say; none where names are left as they are.
        confidence: From 0 to 1.
        reason: What speaks for it.
    """

    rules: tuple[Rule, ...]
    confidence: float
    reason: str


class Decision(Record):
    """A question that names and shapes do not answer.

    Attributes:
        about: What is open, and what would decide.
        choices: The possibilities, the likeliest first.
        proposed: Whether the first is in the proposed plan; otherwise none is.
    """

    about: str
    choices: tuple[Choice, ...]
    proposed: bool


def ranked(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """The likeliest first, those of equal confidence as they came."""
    return tuple(sorted(choices, key=lambda choice: -choice.confidence))
