"""Everything that is shown to people.

Plain text goes out as it is; Rich is imported for progress bars alone, because importing it takes as long as
inspecting a checkpoint.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import typer

if TYPE_CHECKING:
    from optimstate.surgery.comparing import DiffReport
    from optimstate.surgery.converting import ConvertReport
    from optimstate.surgery.naming import NameReport
    from optimstate.surgery.outcomes import Group, Outcome
    from optimstate.surgery.remapping import RemapReport
    from optimstate.surgery.scanning import ScanReport
    from optimstate.surgery.verifying import VerifyReport

__all__ = [
    "compared",
    "converted",
    "named",
    "plural",
    "progress",
    "remapped",
    "scanned",
    "show",
    "shown",
    "size",
    "table",
    "verified",
]

PROGRESS_FROM = 1 << 28  # bytes below which nobody waits long enough to need a bar


def size(nbytes: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def plural(count: int, noun: str) -> str:
    """`1 group`, `2 groups`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


class Report(Protocol):
    """What every verb returns."""

    def to_json(self) -> str:
        """A JSON document of a stable form."""


R = TypeVar("R", bound=Report)


def show(report: R, render: Callable[[R], None], *, as_json: bool, quiet: bool) -> None:
    """Print a report as JSON, or as people read it, or not at all."""
    if as_json:
        typer.echo(report.to_json())
    elif not quiet:
        with redirect_stdout(io.StringIO()) as text:
            render(report)
        typer.echo(_folded(text.getvalue()), nl=False)


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


@contextmanager
def progress(verb: str, *sources: Path, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr with rate and time left, for long work on a terminal; None otherwise."""
    files = [file for source in sources for file in (source.rglob("*") if source.is_dir() else (source,))]
    total = sum(file.stat().st_size for file in files if file.is_file())
    if total < PROGRESS_FROM or quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, advance=done)


_RIGHT = {"parameters", "size", "group", "elements", "x", "norm", "rms", "min", "max", "zeros", "NaN", "inf"}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Aligned columns; those that hold numbers and sizes to the right."""
    lines = [tuple(headings), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [heading in _RIGHT for heading in headings]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return ("  " + "  ".join(padded)).rstrip()

    return "\n".join(map(line, lines))


def shown(value: Any) -> str:
    """A value in few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    return str(value)


def remapped(report: RemapReport) -> None:
    """Print what a plan did, and the plan."""
    for rule, count in report.rules:
        typer.echo(f"{rule}: {plural(count, 'match')}".replace("matchs", "matches"))
    for section, moves in report.moves.items():
        dropped = report.dropped[section]
        counts = [f"{len(moves)} moved", f"{len(dropped)} dropped", f"{report.kept[section]} kept"]
        typer.echo(f"{section}: {', '.join(counts)}")
        if any(outcome.outcome != "exact" or outcome.reason for outcome in report.outcomes[section]):
            _outcomes(report.outcomes[section], "all" if section.startswith("optimizer") else "value")
        for group in report.groups.get(section, ()):
            typer.echo(f"  {_regrouped(group)}")
        if not report.written:
            for source, target in moves:
                typer.echo(f"  {source} -> {target}")
            for source in dropped:
                typer.echo(f"  {source} dropped")
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo("plan:")
    for line in report.plan.splitlines():
        typer.echo(f"  {line}".rstrip())
    typer.echo(f"wrote {report.destination}" if report.written else "dry run: nothing was written")


OUTCOMES_SHOWN = 20


def _outcomes(found: Sequence[Outcome], whole: str) -> None:
    """What became of each slot; of the parameters as a whole where no slot is named."""
    rows = [(o.slot or f"({whole})", f"{o.parameters:,}", o.outcome, o.reason) for o in found[:OUTCOMES_SHOWN]]
    typer.echo(table(("slot", "parameters", "outcome", "why"), rows))
    if len(found) > OUTCOMES_SHOWN:
        typer.echo(f"  ... and {len(found) - OUTCOMES_SHOWN} more (--json lists all)")


def _regrouped(group: Group) -> str:
    origin = " and ".join(map(str, group.sources))
    changes = [f"{key} {shown(old)} -> {shown(new)}" for key, (old, new) in group.changed.items()]
    counted = plural(group.parameters, "parameter") + (f" of group {origin}" if origin else ", all new")
    return f"group {group.group}: " + ", ".join([counted, *changes])


def scanned(report: ScanReport) -> None:
    """Print what pickles name beyond plain data, the worst first."""
    order = {"dangerous": 0, "unknown": 1, "data": 2}
    found = sorted(report.findings, key=lambda finding: order[finding.verdict])
    rows = [(f.verdict, f.name, str(f.times), f.file, f.record, str(f.offset)) for f in found if f.verdict != "data"]
    if rows:
        typer.echo(table(("verdict", "name", "times", "file", "pickle", "at byte"), rows))
    for line in report.unreadable:
        typer.echo(f"  unreadable: {line}")
    names = {verdict: len({f.name for f in found if f.verdict == verdict}) for verdict in order}
    counts = ", ".join(f"{count} {verdict}" for verdict, count in names.items())
    typer.echo(f"{report.path}: {plural(report.pickles, 'pickle')} scanned, nothing run; names: {counts}")


def compared(report: DiffReport) -> None:
    """Print the differences, part by part."""
    section = ""
    for change in report.changes:
        if change.section != section:
            section = change.section
            typer.echo(section)
        relative = "" if change.relative is None else f", relative difference {change.relative:.3g}"
        sides = {
            "added": f"+ {change.name}  {change.right}",
            "removed": f"- {change.name}  {change.left}",
            "renamed": f"> {change.left} -> {change.right}  (equal content)",
        }
        other = f"~ {change.name}  {change.kind}: {shown(change.left)} -> {shown(change.right)}{relative}"
        typer.echo(f"  {sides.get(change.kind, other)}")
    kinds = Counter(change.kind for change in report.changes)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no differences"
    typer.echo(f"{plural(report.equal, 'tensor')} {'equal' if report.compared_contents else 'alike'}, {counts}")


def verified(report: VerifyReport) -> None:
    """Print faults first, then what is worth knowing, then what was looked at."""
    for level in ("fault", "note"):
        for finding in report.findings:
            if finding.level == level:
                typer.echo(f"{level}: {finding.where}: {finding.message} [{finding.check}]")
    for line in report.blind:
        typer.echo(f"not visible: {line}")
    faults = sum(finding.level == "fault" for finding in report.findings)
    typer.echo(
        f"{report.path}: {plural(faults, 'fault') if faults else 'healthy'}; checked {', '.join(report.checked)}"
    )


def named(report: NameReport) -> None:
    """Print every name with how it is known."""
    for path, found in report.optimizers.items():
        typer.echo(f"optimizer at {path}")
        rows = [(str(index), given, evidence) for index, (given, evidence) in enumerate(found)]
        typer.echo(table(("", "parameter", "evidence"), rows))
    typer.echo(f"wrote {report.destination}" if report.written else "dry run: nothing was written")


def converted(report: ConvertReport) -> None:
    """Print what was converted, cast and lost."""
    for where in report.without:
        typer.echo(f"left out: {where}")
    for where, change in report.optimizers.items():
        typer.echo(f"{where}: {change.source} -> {change.target}")
        typer.echo(table(("slot", "outcome", "why"), ((line.slot, line.outcome, line.reason) for line in change.slots)))
    for cast in report.casts:
        counts = "" if cast.elements is None else f", {cast.rounded:,} of {cast.elements:,} elements rounded"
        lost = ((cast.overflowed, "no longer finite"), (cast.flushed, "became zero"))
        counts += "".join(f", {count:,} {what}" for count, what in lost if count)
        typer.echo(f"{cast.what}: {cast.source} -> {cast.target}, {plural(cast.tensors, 'tensor')}{counts}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    what = f"{plural(report.tensors, 'tensor')}, {size(report.nbytes)}"
    what = f"{report.section}, {what}" if report.section else what
    if report.written:
        typer.echo(f"{report.source_format} -> {report.format}: {what}, wrote {report.destination}")
    else:
        typer.echo(f"{report.source_format} -> {report.format}: {what}; dry run: nothing was written")
