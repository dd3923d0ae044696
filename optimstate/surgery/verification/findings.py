"""What verify found, and its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from optimstate.problems import Kind, Problem
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural

__all__ = ["Finding", "VerifyReport", "fault", "note"]

Level = Literal["fault", "note"]
FINDINGS_SHOWN = 20  # of one kind
Verdict = Literal["healthy", "faulty", "unknown"]


class Finding(Problem):
    """A problem that is wrong (`fault`) or worth knowing (`note`).

    Attributes:
        level: Which of the two.
    """

    level: Level = "fault"


def fault(kind: Kind, place: str, message: str, names: Iterable[str] = ()) -> Finding:
    """What is certainly damaged, or what torch would refuse."""
    return Finding(kind, message, place, tuple(names))


def note(kind: Kind, place: str, message: str, names: Iterable[str] = (), remedy: str = "") -> Finding:
    """What may be intended."""
    return Finding(kind, message, place, tuple(names), remedy, level="note")


class VerifyReport(VerbReport):
    """The findings, and what was checked.

    Attributes:
        checked: What was compared, in words.
        blind: What no check can see from the file alone, and what was not looked at.
        recognised: Whether there is anything whose meaning is known; where there is not, nothing can be healthy.
        unread: Optimizer state in a form that is not known; where there is some, what remains cannot be healthy either.
    """

    path: str
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    blind: tuple[str, ...]
    recognised: bool = True
    unread: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether something was checked and has no fault."""
        return self.verdict == "healthy"

    @property
    def verdict(self) -> Verdict:
        """`faulty`, `healthy`, or `unknown` where what a run resumes from was not recognised."""
        if any(finding.level == "fault" for finding in self.findings):
            return "faulty"
        return "healthy" if self.recognised and not self.unread else "unknown"

    VERB = "verify"

    def _json(self) -> dict[str, Any]:
        return {**self._asdict(), "healthy": self.healthy, "verdict": self.verdict}

    def _lines(self) -> Iterator[str]:
        for level in ("fault", "note"):
            counts: Counter[str] = Counter()
            for finding in self.findings:
                if finding.level == level:
                    counts[finding.kind] += 1
                    if counts[finding.kind] <= FINDINGS_SHOWN:
                        yield f"{level}: {finding} [{finding.kind}]"
            for kind, count in counts.items():
                if count > FINDINGS_SHOWN:
                    yield f"{level}: and {count - FINDINGS_SHOWN} more [{kind}] (--json lists all)"
        for line in self.unread:
            yield f"not recognised: {line}"
        for line in self.blind:
            yield f"not visible: {line}"
        faults = sum(finding.level == "fault" for finding in self.findings)
        words = {
            "faulty": plural(faults, "fault"),
            "healthy": "healthy",
            "unknown": "whether a run can resume from it is unknown, as "
            + ("its optimizer state was not recognised" if self.unread else "nothing was recognised"),
        }
        yield f"{self.path}: {words[self.verdict]}; checked {', '.join(self.checked)}"
