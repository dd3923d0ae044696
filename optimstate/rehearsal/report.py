"""The result of a rehearsal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from optimstate.record import Record
from optimstate.reporting import Report, to_json

__all__ = ["Deviation", "Rehearsal", "Verdict", "What", "earliest"]

Verdict = Literal["exact", "approximate", "wrong state", "another function"]
What = Literal["output", "gradient", "slot", "parameter", "buffer"]


class Deviation(Record):
    """A difference between the new run and what the plan makes of the old one.

    Attributes:
        what: `output`, `gradient`, `slot`, `parameter` or `buffer`.
        name: The parameter of the new model; for an output a parameter of the module.
        slot: The slot; empty for anything else.
        step: The number of steps made; 0 is before the first.
        size: The largest difference divided by the largest value; infinite if one side has no value.
        announced: Whether the plan says that this parameter can only be approximated.
    """

    what: What
    name: str
    slot: str
    step: int
    size: float
    announced: bool

    def __str__(self) -> str:
        place = f"{self.name} {self.slot}".strip()
        when = "before the first step" if not self.step else f"after step {self.step}"
        size = "is missing" if self.size == float("inf") else f"differs by {self.size:.2g}"
        return f"{self.what} {place} {size} {when}"


def earliest(deviations: Sequence[Deviation]) -> list[Deviation]:
    """The deviations at the first step that has any."""
    first = min((deviation.step for deviation in deviations), default=0)
    return [deviation for deviation in deviations if deviation.step == first]


class Rehearsal(Report):
    """The result of a rehearsal.

    Attributes:
        verdict: `exact`: the run continues as it was, up to rounding. `approximate`: it differs only where the plan
            says that it must. `wrong state`: the function is kept, but not the state or the gradient's scale.
            `another function`: the new model computes something else.
        losses: The losses of the old and the new run, before the first step and after each.
        deviations: The deviations in the order in which they occurred; those of the first step decide the verdict.
        tolerance: Relative differences up to this are rounding.
        notes: The plan's notes, and remarks on what could not be compared.
    """

    verdict: Verdict
    losses: tuple[tuple[float, float], ...]
    deviations: tuple[Deviation, ...]
    tolerance: float
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing differs except where the plan announces it."""
        return self.verdict in ("exact", "approximate")

    @property
    def decisive(self) -> tuple[Deviation, ...]:
        """The deviations that decide the verdict, without those that follow from them."""
        early = earliest(self.deviations)
        if self.verdict == "another function":
            early = [deviation for deviation in early if deviation.what == "output"]
        elif self.verdict == "wrong state":
            early = [deviation for deviation in early if not deviation.announced]
        return tuple(early)

    def __str__(self) -> str:
        lines = [_VERDICTS[self.verdict].format(tolerance=self.tolerance)]
        shown = self.decisive
        lines += [f"  {deviation}" for deviation in shown[:10]]
        if len(shown) > 10:
            lines.append(f"  and {len(shown) - 10} more")
        lines += [f"loss after {step} steps: {a:.9g} and {b:.9g}" for step, (a, b) in enumerate(self.losses)]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        rows = [{**item._asdict(), "size": item.size if item.size < float("inf") else None} for item in self.deviations]
        fields = {**self._asdict(), "holds": self.holds, "deviations": rows}
        return to_json("rehearse", fields)


_VERDICTS = {
    "exact": "exact: the new run continues as the old one does (differences up to {tolerance:.0e} are rounding)",
    "approximate": "approximate: the new run differs from the old one only where the plan says that it must",
    "wrong state": "wrong state: the new model computes the same, but its optimizer continues in another way",
    "another function": "another function: the new model does not compute what the old one does",
}
