"""What the verbs share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optimstate.errors import LimitExceededError
from optimstate.tree import no_garbage_collection

__all__ = ["SCHEMA", "opening", "to_json"]

SCHEMA = 1
"""Version of the JSON documents that the reports give."""


def to_json(verb: str, fields: dict[str, Any]) -> str:
    """A report as a JSON document."""
    return json.dumps({"schema": SCHEMA, "command": verb, **fields}, indent=2, default=str, ensure_ascii=False)


@contextmanager
def opening(path: str | Path) -> Iterator[None]:
    """Work on an opened checkpoint: without garbage collection, and too deep a nesting is an error, not a crash."""
    try:
        with no_garbage_collection():
            yield
    except RecursionError:
        raise LimitExceededError("nested too deeply", path=path) from None
