"""Reports as text: what `str(report)` is made of. Plain, and the same for people, notebooks and pipes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, TypeVar, cast

from optimstate.describe import describe, escaped

R = TypeVar("R")

__all__ = [
    "Table",
    "collapsed",
    "columns",
    "families",
    "joined",
    "parts_of",
    "percent",
    "plural",
    "readable",
    "shown",
    "size",
    "table",
]


def size(nbytes: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def plural(count: int, noun: str) -> str:
    """`1 group`, `2 groups`, `2 matches`."""
    ending = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending}"


def readable(report: R, *, without: Container[str] = ()) -> R:
    """The report with what it has from files spelled out harmlessly: its own lines end where it ends them.

    Args:
        report: A record or dataclass of texts, numbers, and containers and records of them.
        without: Fields that are left as they are, because only tables show them, which do the same for their cells.
    """
    return cast("R", _readable(report, without, lines=False))


def _readable(value: Any, without: Container[str], *, lines: bool) -> Any:
    if isinstance(value, str):
        return escaped(value, lines=lines)
    if isinstance(value, Mapping):
        return {_readable(k, without, lines=lines): _readable(v, without, lines=lines) for k, v in value.items()}
    if isinstance(value, list | tuple):
        made = [_readable(item, without, lines=lines) for item in value]
        return made if isinstance(value, list) else tuple(made) if type(value) is tuple else type(value)(*made)
    names = getattr(type(value), "_fields", None) or getattr(type(value), "__dataclass_fields__", None)
    if not names:
        return value
    made = copy(value)
    for name in names:
        if name not in without:
            field = _readable(getattr(value, name), without, lines=name in _OF_SEVERAL_LINES)
            object.__setattr__(made, name, field)
    return made


_OF_SEVERAL_LINES = frozenset({"plan", "toml"})  # plans as text, which escape what is in them themselves


def columns(text: str) -> int:
    """How many terminal columns a text takes: two for a wide character, none for a combining one."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(sign) else 2 if east_asian_width(sign) in "WF" else 1 for sign in text)


_NUMBER = re.compile(r"(?:[\d,.<%e+-]+(?: [kMGT]?B)?|inf|nan)?")


class Table(str):
    """Aligned columns; those that hold numbers and sizes to the right.

    Attributes:
        headings: Of the columns.
        rows: The cells, spelled out harmlessly.
        widths: Of the columns, as a terminal counts them.
        right: Of each column whether it stands to the right.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    right: tuple[bool, ...]

    @classmethod
    def of(cls, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
        """The table with these headings and rows."""
        cells = tuple(tuple(map(escaped, row)) for row in rows)
        lines = [tuple(headings), *cells]
        widths = tuple(max(map(columns, column)) for column in zip(*lines, strict=True))
        columned = list(zip(*cells, strict=True)) or [()] * len(widths)
        right = tuple(any(column) and all(map(_NUMBER.fullmatch, column)) for column in columned)

        def line(row: Sequence[str]) -> str:
            padded = []
            for cell, width, to_the_right in zip(row, widths, right, strict=True):
                space = " " * (width - columns(cell))
                padded.append(space + cell if to_the_right else cell + space)
            return ("  " + "  ".join(padded)).rstrip()

        made = cls("\n".join(map(line, lines)))
        made.headings, made.rows, made.widths, made.right = tuple(headings), cells, widths, right
        return made


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns, which `joined` keeps apart from the lines around them."""
    return Table.of(headings, rows)


class _Joined(str):
    parts: tuple[str, ...] = ()


def joined(parts: Iterable[str]) -> str:
    """A report's text of its lines and tables, which `parts_of` gives back to whoever lays it out for a terminal."""
    listed = tuple(parts)
    made = _Joined("\n".join(listed))
    made.parts = listed
    return made


def parts_of(text: str) -> tuple[str, ...]:
    """The lines and tables that a report's text was joined from; of any other text, itself."""
    return text.parts if isinstance(text, _Joined) else (text,)


def shown(value: Any) -> str:
    """A value in a few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return escaped(value) if isinstance(value, str) else describe(value)


def percent(part: int, whole: int) -> str:
    """A share: `0%` and `100%` only where it is exactly that."""
    share = 100 * part / whole if whole else 0.0
    if 0 < share < 0.1:
        return "<0.1%"
    return "<100%" if part < whole and share > 99.9 else f"{share:.3g}%"


_NAME = re.compile(r"(?<![\w.])(?:\d+\.)*[^\W\d][\w.]*")
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def collapsed(text: str) -> str:
    """A name, or names within an expression, with `*` for the indices: `blocks.*.mlp.weight`."""
    return _NAME.sub(lambda name: _INDEX.sub("*", name[0]), text)


def families(names: Iterable[str]) -> Iterator[str]:
    """Names that differ only in their indices, merged into one."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(collapsed(name), []).append(name)
    for pattern, members in found.items():
        yield members[0] if len(members) == 1 else f"{pattern}  x {len(members)}"
