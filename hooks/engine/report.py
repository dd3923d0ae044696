"""What a hook did, parameter by parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Self

from optimstate import reporting
from optimstate.plan.apply.explain import Row, rows_of
from optimstate.plan.solve.migration import SectionMoves
from optimstate.record import field

__all__ = ["Report"]


class Report(reporting.Report):
    """What became of every parameter's state.

    Attributes:
        hooks: Which hooks did it, in order.
        exact: Parameters whose state arrived as it was, or that had none.
        approximate: Parameters whose state changed in value or lost a part, and why.
        fresh: Parameters that start without state, and why.
        dropped: Parameters of the checkpoint whose state went nowhere, and why.
        sources: For each parameter that is not simply kept, the parameters of the checkpoint it comes from.
        notes: What deserves attention though nothing is wrong.
    """

    hooks: tuple[str, ...]
    exact: tuple[str, ...] = ()
    approximate: Mapping[str, str] = field(default_factory=dict)
    fresh: Mapping[str, str] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, hooks: tuple[str, ...], section: SectionMoves, filled: Mapping[str, str] | None = None) -> Self:
        """From a migration; `filled` says how parameters without state got some."""
        exact = []
        approximate: dict[str, str] = dict(filled or {})
        fresh: dict[str, str] = {}
        for move in section.moves:
            rows = list(rows_of("", move, section))
            levels = {row.outcome for row in rows}
            if move.target in approximate:
                continue
            if move.expression is None:
                fresh[move.target] = "not in the checkpoint"
            elif (not move.slots and move.value is None) or levels <= {"exact"}:
                exact.append(move.target)
            elif levels <= {"fresh", "dropped"}:
                fresh[move.target] = _reasons(rows)
            else:
                approximate[move.target] = _reasons(rows)
        return cls(
            hooks,
            tuple(exact),
            approximate,
            fresh,
            {name: str(rule) if rule is not None else "not in the live optimizer" for name, rule in section.dropped},
            {move.target: move.sources for move in section.moves if move.changes and move.sources},
            section.notes,
        )

    @property
    def changes(self) -> bool:
        """Whether anything happened beyond passing on the exact state of parameters of the same name."""
        return bool(self.approximate or self.fresh or self.dropped or self.sources)

    def summary(self) -> str:
        """One line."""
        counts = {
            "exact": len(self.exact),
            "approximate": len(self.approximate),
            "fresh": len(self.fresh),
            "dropped": len(self.dropped),
        }
        listed = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "no parameters"
        return f"{' + '.join(self.hooks)}: {listed}"

    def lines(self) -> Iterator[str]:
        """One line for each parameter that is not simply kept, then the notes."""
        exact = set(self.exact)
        for name, sources in self.sources.items():
            if name in exact:
                yield f"{name}: exact, from {', '.join(sources)}"
        for outcome, found in (
            ("approximate", self.approximate),
            ("fresh", self.fresh),
            ("dropped", self.dropped),
        ):
            for name, reason in found.items():
                yield f"{name}: {outcome}" + (f" ({reason})" if reason else "")
        yield from self.notes

    def __str__(self) -> str:
        return "\n".join([self.summary(), *self.lines()])


def _reasons(rows: Sequence[Row]) -> str:
    """Why slots are not exact: each reason with one example."""
    found: dict[str, str] = {}
    for row in rows:
        if row.outcome != "exact" and row.reason:
            found.setdefault(row.reason, row.slot + (" is dropped" if row.outcome == "dropped" else ""))
    return "; ".join(f"{slot}: {reason}" if slot else reason for reason, slot in found.items())
