"""Everything that is shown to people: as text where it is piped or colour is not wanted, drawn on terminals."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import typer

from optimstate.describe import escaped
from optimstate.io.location import Location
from optimstate.surgery.text import plural, size

__all__ = ["is_drawn", "progress", "show"]

PROGRESS_FROM = 1 << 28  # bytes below which nobody waits long enough to need a bar


class Report(Protocol):
    """What every verb returns."""

    def to_json(self) -> str:
        """A JSON document of a stable form."""


def show(report: Report, text: str | None = None, *, as_json: bool, quiet: bool) -> None:
    """Print a report as JSON, or as people read it (`text`, else what `str` makes of it), or not at all."""
    if as_json:
        typer.echo(report.to_json())
    elif not quiet:
        text = escaped(str(report) if text is None else text, lines=True)
        if is_drawn():
            from optimstate.cli.render.drawn import draw

            draw(text)
        else:
            typer.echo(_folded(text + "\n"), nl=False)


def is_drawn() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def _folded(text: str) -> str:
    """Long lines go on below, further in, on a terminal; what is piped keeps its lines."""
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    return "".join(line if len(line) <= width else _folded_line(line, width) for line in text.splitlines(True))


def _folded_line(line: str, width: int) -> str:
    import textwrap

    indent = " " * (len(line) - len(line.lstrip()))
    lines = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=indent + "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
    return "\n".join(lines) + "\n"


def _size(sources: Iterable[Location]) -> int:
    """The bytes of all files; 0 where they cannot be looked at, which who reads them says."""
    try:
        files = [file for source in sources for file in (source.rglob("*") if source.is_dir() else (source,))]
        return sum(file.stat().st_size for file in files if file.is_file())
    except (OSError, ValueError):
        return 0


@contextmanager
def progress(verb: str, *sources: Location, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr with rate and time left, for long work on a terminal; None otherwise."""
    if quiet or not sys.stderr.isatty() or (total := _size(sources)) < PROGRESS_FROM:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        ProgressColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn(), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[asked]}")]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total, asked="")
        yield lambda done: bar.update(task, advance=done, asked=_asked_of_stores())


def _asked_of_stores() -> str:
    """How many requests stores have answered, and the bytes that went both ways; nothing where none is used."""
    module = sys.modules.get("optimstate.io.remote.store")  # which is imported by who uses a store
    traffic = None if module is None else module.traffic
    if traffic is None or not traffic.requests:
        return ""
    ways = [f"{size(count)} {way}" for count, way in ((traffic.read, "down"), (traffic.written, "up")) if count]
    return ", ".join([plural(traffic.requests, "request"), *ways])
