"""A report's text laid out for a terminal: tables and lines that fit its width, colours that mean something, a pager.

What is drawn is the text that is also piped, so that both always say the same. Rich is imported for colours alone,
because importing it takes as long as inspecting a checkpoint; it does not lay out the tables, because tens of thousands
of rows take it a minute.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from optimstate.describe import escaped
from optimstate.surgery.text import Table, columns, parts_of

__all__ = ["draw", "drawn"]

# The words by which reports judge, wherever they stand alone: in a cell, or in front of a line.
MEANING = {
    **dict.fromkeys(("exact", "healthy", "data", "clean", "confirmed", "given", "wrote"), "green"),
    **dict.fromkeys(("approximate", "unknown", "note", "resume", "inferred", "changed", "retyped"), "yellow"),
    **dict.fromkeys(("fresh", "renamed", "reshaped"), "cyan"),
    **dict.fromkeys(("dropped", "dangerous", "fault", "problem", "warning", "unreadable", "removed"), "bold red"),
    "added": "green",
    "not visible": "dim",
    "not scanned": "bold red",
}
SIGNS = {"+": "green", "-": "red", "~": "yellow", ">": "cyan"}  # in front of a difference
GAP = "  "  # between columns, and how far tables stand in
NARROWEST = 8
"""Columns below which no column of a table is squeezed, unless the terminal has no room for all."""
ROOM = 30
"""Columns that the last column of a table needs to be wrapped inside itself; with fewer, rows are stacked."""
_NAMES = ("parameter", "tensor", "name", "checkpoint")
"""Headings of the column that says what a row is about, which stands on a line of its own where rows are stacked."""

_LEAD = re.compile(r"^(\s*)([a-z]+(?: [a-z]+)?)(?=: )")
_SIGN = re.compile(r"^(\s+)([-+~>]) (\S+)")
_HEADING = re.compile(r"^(?:averaged )?(?:model|optimizer|scheduler|ema)\b[^:]*")
_JUDGED = re.compile(r"\b(healthy|\d+ faults?|[1-9]\d* dangerous|[1-9]\d* unknown|no differences)\b")
_WORD = re.compile(r"\s*(?:\d+ (?:faults?|dangerous|unknown)\S*|x \d\S*|[^\s\[]*\[[\d., e-]*\]\S*|\S+)")
"""What a line is broken between: words, where a shape or a list of numbers is one, and a count with what it counts."""
_PIECE = re.compile(r"[^./_]*[./_]*")
"""What a word is broken between that is longer than a line."""

Paint = Callable[[str, str], str]
"""A text in a style."""


def draw(text: str, *, colour: bool) -> None:
    """Print a report on the terminal that standard output is, through a pager where it is longer than the screen."""
    size = shutil.get_terminal_size()
    shown = drawn(text, width=size.columns, colour=colour)
    pager = _pager() if colour and shown.count("\n") >= size.lines and sys.stdin.isatty() else None
    if pager is None:
        sys.stdout.write(shown)
        sys.stdout.flush()
        return
    environment = {"LESS": "FRX", "LESSCHARSET": "utf-8", **os.environ}
    try:
        subprocess.run(pager, input=shown.encode("utf-8", "replace"), env=environment, check=False)
    except OSError:  # it is not there after all
        sys.stdout.write(shown)


def _pager() -> list[str] | None:
    """What pages: `PAGER`, else less; `PAGER=cat`, or empty, prints at once."""
    words = shlex.split(os.environ.get("PAGER", "less"))
    return words if words and words[0] != "cat" and shutil.which(words[0]) else None


def drawn(text: str, *, width: int, colour: bool = True) -> str:
    """The text as a terminal of that many columns shows it; what is a table in a report is known by its parts."""
    paint = _painter() if colour else lambda text, _style: text
    lines: list[str] = []
    for part in parts_of(text):
        if isinstance(part, Table):
            lines += _table(part, width, paint)
        else:
            for line in escaped(part, lines=True).split("\n"):
                lines += _line(line, width, paint)
    return "\n".join(lines) + "\n"


def _painter() -> Paint:
    from rich.color import ColorSystem
    from rich.style import Style

    styles: dict[str, Style] = {}

    def paint(text: str, style: str) -> str:
        if style not in styles:
            styles[style] = Style.parse(style)
        return styles[style].render(text, color_system=ColorSystem.STANDARD)

    return paint


# --- lines ----------------------------------------------------------------------------------------------------------


def _line(line: str, width: int, paint: Paint) -> Iterator[str]:
    """A line; where it is too long, further ones that stand four columns to the right of it."""
    line = line.rstrip()
    indent = len(line) - len(line.lstrip())
    lines = [line] if columns(line) <= width else _hanging(line.strip(), indent, width)
    for number, shown in enumerate(lines):
        yield _painted(shown, paint, first=not number, at_margin=not indent)


def _hanging(text: str, indent: int, width: int) -> list[str]:
    first, *rest = _broken(text, max(width - indent, 10), max(width - indent - 4, 10))
    return [" " * indent + first, *(" " * (indent + 4) + line for line in rest)]


def _painted(line: str, paint: Paint, *, first: bool, at_margin: bool) -> str:
    """A line with its colours: of the word or sign that it begins with, and of judgements at the margin."""
    at = 0
    made = ""
    if first:
        if (lead := _LEAD.match(line)) and lead[2] in MEANING:
            made, at = lead[1] + paint(lead[2], MEANING[lead[2]]), lead.end()
        elif sign := _SIGN.match(line):
            made, at = sign[1] + paint(line[len(sign[1]) : sign.end()], SIGNS[sign[2]]), sign.end()
        elif at_margin and (heading := _HEADING.match(line)):
            made, at = paint(heading[0], "bold"), heading.end()
        elif line.startswith("wrote "):
            return paint(line, "green")
    rest = line[at:]
    return made + (_JUDGED.sub(lambda found: paint(found[0], _verdict(found[0])), rest) if at_margin else rest)


def _verdict(words: str) -> str:
    if words in ("healthy", "no differences"):
        return "bold green"
    return "bold yellow" if "unknown" in words else "bold red"


def _broken(text: str, first: int, rest: int | None = None) -> list[str]:
    """The text in lines of at most so many columns: broken between words, within those that are longer than a line."""
    rest = first if rest is None else rest
    lines = [""]
    room = first

    def begin() -> None:
        nonlocal room
        lines.append("")
        room = rest

    for word in _words(text, rest):
        space, bare = word[: len(word) - len(word.lstrip())], word.lstrip()
        if columns(lines[-1]) + columns(word) <= room:
            lines[-1] += word
            continue
        fits = columns(bare) <= rest
        if lines[-1] and (fits or columns(lines[-1]) > room // 2):
            begin()
        elif lines[-1]:
            lines[-1] += space
        if columns(bare) <= room:
            lines[-1] += bare
            continue
        for piece in filter(None, _PIECE.findall(bare)):
            if lines[-1] and columns(lines[-1]) + columns(piece) > room:
                begin()
            if columns(piece) <= room:
                lines[-1] += piece
                continue
            for sign in piece:
                if lines[-1] and columns(lines[-1]) + columns(sign) > room:
                    begin()
                lines[-1] += sign
    return [line.rstrip() for line in lines]


def _words(text: str, room: int) -> Iterator[str]:
    """The words of a text, each with the space before it; a list that is longer than a line is several."""
    for word in _WORD.findall(text):
        yield from [word] if columns(word.lstrip()) <= room else re.findall(r"\s*\S+", word)


# --- tables ---------------------------------------------------------------------------------------------------------


def _table(table: Table, width: int, paint: Paint) -> Iterator[str]:
    """A table: as it is where it fits, else with its last column wrapped, its rows stacked, or its columns squeezed."""
    room = width - len(GAP)
    widths = list(table.widths)
    names = [place for place, heading in enumerate(table.headings) if heading in _NAMES]
    others = _total(widths[:-1]) + len(GAP)
    if _total(widths) <= room:
        yield from _grid(table, widths, len(GAP), paint)
    elif not table.right[-1] and room - others >= min(ROOM, widths[-1]):
        yield from _grid(table, [*widths[:-1], room - others], len(GAP), paint)
    elif names and len(widths) > 1:
        yield from _stacked(table, names[0], width, paint)
    else:
        yield from _grid(table, _squeezed(table, room), len(GAP), paint)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _squeezed(table: Table, room: int) -> list[int]:
    """Widths that fit: the widest column of words gives way, then the widest of all."""
    widths = list(table.widths)
    while _total(widths) > room:
        words = [place for place, right in enumerate(table.right) if not right and widths[place] > NARROWEST]
        widest = max(words or range(len(widths)), key=widths.__getitem__)
        if widths[widest] == 1:
            break
        widths[widest] -= 1
    return widths


def _stacked(table: Table, name: int, width: int, paint: Paint) -> Iterator[str]:
    """Each row below its name, which is said once where several rows have it."""
    indent = 2 * len(GAP)
    room = width - indent
    leads = [name]
    while True:
        places = [place for place in range(len(table.headings)) if place not in leads]
        rest = Table.of(_chosen(table.headings, places), [_chosen(row, places) for row in table.rows])
        widths = list(rest.widths)
        others = _total(widths[:-1]) + len(GAP) * (len(widths) > 1)
        words = [place for place, right in zip(places[:-1], rest.right, strict=False) if not right]
        if _total(widths) <= room:
            break
        if not rest.right[-1] and room - others >= min(ROOM // 2, widths[-1]):
            widths[-1] = room - others
            break
        if not words:
            widths = _squeezed(rest, room)
            break
        leads.append(words[0])
    leads.sort()
    yield GAP + paint(GAP.join(_chosen(table.headings, leads)), "bold")
    yield from _row(rest.headings, rest, widths, indent, lambda cell: paint(cell, "bold"))
    before = None
    for row, cells in zip(table.rows, rest.rows, strict=True):
        lead = _chosen(row, leads)
        if lead != before:
            before = lead
            lines = _hanging(GAP.join(lead), len(GAP), width)
            yield from lines if len(lines) > 1 else [GAP + GAP.join(_judged(cell, paint) for cell in lead)]
        yield from _row(cells, rest, widths, indent, lambda cell: _judged(cell, paint))


def _chosen(cells: Sequence[str], places: Sequence[int]) -> tuple[str, ...]:
    return tuple(cells[place] for place in places)


def _grid(table: Table, widths: Sequence[int], indent: int, paint: Paint) -> Iterator[str]:
    yield from _row(table.headings, table, widths, indent, lambda cell: paint(cell, "bold"))
    for row in table.rows:
        yield from _row(row, table, widths, indent, lambda cell: _judged(cell, paint))


def _judged(cell: str, paint: Paint) -> str:
    return paint(cell, MEANING[cell]) if cell in MEANING else cell


def _row(
    cells: Sequence[str], table: Table, widths: Sequence[int], indent: int, painted: Callable[[str], str]
) -> Iterator[str]:
    """A row, in as many lines as its longest cell needs."""
    wrapped = [
        [cell] if columns(cell) <= width else _broken(cell, width) for cell, width in zip(cells, widths, strict=True)
    ]
    for number in range(max(map(len, wrapped))):
        line = " " * indent
        for lines, width, right in zip(wrapped, widths, table.right, strict=True):
            cell = lines[number] if number < len(lines) else ""
            space = " " * (width - columns(cell))
            shown = painted(cell) if cell else ""
            line += (space + shown if right else shown + space) + GAP
        yield line.rstrip()
