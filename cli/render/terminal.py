"""Everything that is shown to people: plain text where it is piped, laid out on terminals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import typer

from optimstate.describe import escaped
from optimstate.io.location import Location
from optimstate.surgery.text import plural, size

__all__ = ["is_coloured", "progress", "show"]

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
        text = str(report) if text is None else text
        if sys.stdout.isatty():
            from optimstate.cli.render.drawn import draw

            draw(text, colour=is_coloured())
        else:
            typer.echo(escaped(text, lines=True))


def is_coloured() -> bool:
    """Whether standard output is a terminal that shows colours, and they are wanted."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


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
