"""A report's text drawn for a terminal: columns that wrap inside themselves, colours that mean something, a pager.

What is drawn is `str(report)`, which is also what is piped, so that both always say the same. Rich is imported here and
for progress bars alone, because importing it takes as long as inspecting a checkpoint.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from optimstate.describe import escaped

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
_LEAD = re.compile(r"^(\s*)([a-z]+(?: [a-z]+)?)(?=: )")
_SIGN = re.compile(r"^(\s+)([-+~>]) (\S+)")
_HEADING = re.compile(r"^(?:averaged )?(?:model|optimizer|scheduler|ema)\b[^:]*")
_JUDGED = re.compile(r"\b(healthy|\d+ faults?|[1-9]\d* dangerous|[1-9]\d* unknown|no differences)\b")


def draw(text: str) -> None:
    """Print a report on the terminal that standard output is, through a pager where it is longer than the screen."""
    size = shutil.get_terminal_size()
    shown = drawn(text, width=size.columns)
    pager = _pager() if shown.count("\n") >= size.lines and sys.stdin.isatty() else None
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
    """The text as a terminal of that many columns shows it."""
    console = Console(
        width=width,
        force_terminal=True,
        color_system="standard" if colour else None,
        highlight=False,
        emoji=False,
        markup=False,
        legacy_windows=False,
    )
    with console.capture() as capture:
        console.print(Group(*_blocks(escaped(text, lines=True).split("\n"))))
    return "\n".join(line.rstrip() for line in capture.get().split("\n"))


def _blocks(lines: list[str]) -> Iterator[RenderableType]:
    """Runs of aligned lines as tables, the others one by one."""
    at = 0
    while at < len(lines):
        end = at
        while end < len(lines) and re.match(r"  \S", lines[end]) and not _SIGN.match(lines[end]):
            end += 1
        columns = _columns(lines[at:end]) if end - at > 1 else []
        if len(columns) > 1 and _is_head(lines[at]):
            yield Padding(_table(lines[at:end], columns), (0, 0, 0, 2))
            at = end
        else:
            yield _line(lines[at])
            at += 1


def _columns(lines: list[str]) -> list[tuple[int, int]]:
    """Where the columns of aligned lines begin and end: between them every line has two spaces."""
    width = max(map(len, lines))
    used = [any(len(line) > at and line[at] != " " for line in lines) for at in range(width)]
    columns: list[tuple[int, int]] = []
    for at, is_used in enumerate(used):
        if not is_used:
            continue
        if columns and at - columns[-1][1] < 2:
            columns[-1] = columns[-1][0], at + 1
        else:
            columns.append((at, at + 1))
    return columns


def _is_head(line: str) -> bool:
    return re.fullmatch(r"[A-Za-z ()]+", line) is not None


def _table(lines: list[str], columns: list[tuple[int, int]]) -> Table:
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
    ends = [*(start for start, _ in columns[1:]), max(map(len, lines))]
    rows = [[line[start:end] for (start, _), end in zip(columns, ends, strict=True)] for line in lines]
    for number, head in enumerate(rows[0]):
        right = head.startswith(" ") or all(row[number].rstrip()[:1] in ("", " ") for row in rows[1:])
        numeric = all(re.fullmatch(r"[\d,.<%e+-]* ?[kMGT]?B?", row[number].strip()) for row in rows[1:])
        made.add_column(
            Text(head.strip()),
            justify="right" if right or numeric else "left",
            no_wrap=numeric,
            overflow="fold",
            min_width=min(4, columns[number][1] - columns[number][0]),
        )
    for row in rows[1:]:
        cells = [cell.strip() for cell in row]
        made.add_row(*(Text(cell, style=MEANING.get(cell, "")) for cell in cells))
    return made


def _line(line: str) -> RenderableType:
    indent = len(line) - len(line.lstrip())
    made = Text(line.strip())
    lead = _LEAD.match(line)
    if lead and lead[2] in MEANING:
        made.stylize(MEANING[lead[2]], 0, len(lead[2]))
    elif sign := _SIGN.match(line):
        made.stylize(SIGNS[sign[2]], 0, 1 + 1 + len(sign[3]))
    elif not indent and (heading := _HEADING.match(line)):
        made.stylize("bold", 0, heading.end())
    elif line.startswith("wrote "):
        made.stylize("green")
    for judged in _JUDGED.finditer(made.plain) if not indent else ():
        good = judged[1] in ("healthy", "no differences")
        made.stylize(
            "bold green" if good else "bold red" if "unknown" not in judged[1] else "bold yellow", *judged.span()
        )
    return _Hanging(made, indent)


class _Hanging:
    """Text whose further lines stand four columns to the right of its first."""

    def __init__(self, text: Text, indent: int) -> None:
        self.text, self.indent = text, indent

    def __rich_console__(self, console: Console, _options: ConsoleOptions) -> Iterator[RenderableType]:
        """The lines."""
        room = max(console.width - self.indent, 10)
        lines = self.text.wrap(console, room if len(self.text) <= room else max(room - 4, 10))
        for number, line in enumerate(lines):
            line.rstrip()
            yield Text(" " * (self.indent + (4 if number else 0))) + line
