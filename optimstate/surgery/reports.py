"""What the reports of all verbs have: a text for people, and a JSON document."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from optimstate.reporting import Report, to_json
from optimstate.surgery.text import joined, readable

__all__ = ["VerbReport"]


class VerbReport(Report):
    """A report of a verb: subclasses name the command, and give the lines of the text."""

    VERB: ClassVar[str] = ""

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json(self.VERB, self._json())

    def _json(self) -> dict[str, Any]:
        """What the document has besides the command."""
        return self._asdict()

    def __str__(self) -> str:
        return joined(readable(self)._lines())

    def _lines(self) -> Iterator[str]:
        """The text; lines may be several in one."""
        raise NotImplementedError
