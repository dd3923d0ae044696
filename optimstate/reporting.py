"""The base of the reports that every verb returns, and their JSON documents."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from optimstate.describe import bounded, describe, escaped
from optimstate.record import Record
from optimstate.tree import path_key

__all__ = ["SCHEMA", "Report", "to_json"]

SCHEMA = 1
"""The version of the JSON documents of reports."""


class Report(Record):
    """A record whose `str` is a text for people, which notebooks show too."""

    def _repr_html_(self) -> str:
        from html import escape

        return f"<pre>{escape(escaped(str(self), lines=True))}</pre>"


def to_json(verb: str, fields: dict[str, Any]) -> str:
    """A report as a JSON document."""
    import json  # here, because a text does not need it

    document = {"schema": SCHEMA, "command": verb, **fields}
    try:
        text = json.dumps(document, indent=2, default=_as_json, ensure_ascii=False)
    except ValueError:  # an integer of more digits than Python prints
        text = json.dumps(_printable(document), indent=2, default=_as_json, ensure_ascii=False)
    return re.sub(_UNSAFE_IN_JSON, lambda found: f"\\u{ord(found[0]):04x}", text)


def _as_json(value: Any) -> Any:
    return value._asdict() if isinstance(value, Record) else describe(value)


# Characters that JSON does not escape, but that control a terminal or have no encoding.
_UNSAFE_IN_JSON = r"[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"


def _printable(node: Any) -> Any:
    if isinstance(node, Record):
        node = node._asdict()
    if isinstance(node, Mapping):
        return {str(path_key(key)): _printable(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_printable(item) for item in node]
    return bounded(node)
