"""Everything that is shown to people, and the only place where Rich is used."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from optimstate.surgery import ConvertReport, Inspection, ModelInfo, OptimizerInfo, RemapReport

__all__ = ["console", "converted", "inspection", "progress", "remapped", "size"]

PROGRESS_FROM = 1 << 28  # bytes below which nobody waits long enough to need a bar


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr that leaves names alone: no markup, no highlighting."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, highlight=False, soft_wrap=not sys.stdout.isatty())


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


@contextmanager
def progress(source: Path, verb: str) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on stderr, for long work on a terminal; None otherwise."""
    total = source.stat().st_size if source.is_file() else 0
    if source.is_dir():
        total = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    if total < PROGRESS_FROM or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=total)
        yield lambda done: bar.update(task, advance=done)


def _table(*headings: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", justify="right" if heading in _NUMBERS else "left")
    return table


_NUMBERS = {"parameters", "size", "group"}


def inspection(found: Inspection, *, params: bool, groups: bool) -> None:
    """Print an inspection."""
    out = console()
    out.print(f"{found.path}: {found.format}, {size(found.nbytes)}, {plural(found.tensors, 'tensor')}")
    for section in found.sections:
        out.print()
        if section.kind == "optimizer":
            _optimizer(out, section, params=params, groups=groups)  # type: ignore[arg-type]
        elif section.kind == "scheduler":
            out.print(f"scheduler {section.path}: {section.algorithm}")  # type: ignore[union-attr]
            out.print(f"  last_epoch {section.last_epoch}, last lr {_value(section.last_lr)}")  # type: ignore[union-attr]
        else:
            _model(out, section, params=params)  # type: ignore[arg-type]
    if not found.sections:
        out.print("\nno model, optimizer or scheduler was recognised")
    if found.opaque:
        out.print("\nobjects kept as records, not loaded:")
        for name, count in found.opaque.items():
            out.print(f"  {name} x {count}")
    for name in found.dangerous:
        out.print(f"\nwarning: the file names {name}, which would run code if it were unpickled; nothing was run")
    for note in found.notes:
        out.print(f"\nnote: {note}")


def _optimizer(out: Console, info: OptimizerInfo, *, params: bool, groups: bool) -> None:
    names = "named parameters" if info.named else "no parameter names (by position)"
    algorithm = info.algorithm or "unrecognised algorithm"
    out.print(f"optimizer {info.path}: {algorithm}, {plural(len(info.groups), 'group')}, {names}")
    count = sum(group.parameters for group in info.groups)
    steps = ", ".join(f"{step} (x{n})" if len(info.steps) > 1 else step for step, n in info.steps.items()) or "none"
    out.print(f"  {plural(count, 'parameter')}, {size(info.nbytes)} of state, step {steps}")
    if info.fresh:
        out.print(f"  {plural(info.fresh, 'parameter')} without state (fresh)")
    if info.orphans:
        out.print(f"  {plural(info.orphans, 'entry')} of state for no parameter of any group")
    table = _table("slot", "parameters", "dtype", "size")
    for slot in info.slots:
        table.add_row(slot.name, str(slot.parameters), ", ".join(slot.dtypes), size(slot.nbytes))
    if info.slots:
        out.print(table)
    _groups(out, info, everything=groups)
    if params:
        listing = _table("group", "parameter", "slots")
        for parameter in info.parameters:
            slots = ", ".join(f"{slot} {_value(value)}" for slot, value in parameter.slots.items()) or "fresh"
            listing.add_row(str(parameter.group), parameter.name or f"({parameter.key})", slots)
        out.print(listing)


_TELLING = ("lr", "weight_decay", "betas", "momentum", "eps")


def _groups(out: Console, info: OptimizerInfo, *, everything: bool) -> None:
    for index, group in enumerate(info.groups):
        shown: Mapping[str, Any] = group.options
        if not everything:
            shown = {key: group.options[key] for key in _TELLING if key in group.options}
        options = ", ".join(f"{key} {_value(value)}" for key, value in shown.items())
        out.print(f"  group {index}: {plural(group.parameters, 'parameter')}, {options}")


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)


_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


def _model(out: Console, info: ModelInfo, *, params: bool) -> None:
    dtypes = ", ".join(f"{dtype} x {count}" for dtype, count in info.dtypes.items())
    what = "averaged model" if info.kind == "ema" else "model"
    out.print(
        f"{what} {info.path}: {plural(info.parameters, 'tensor')}, {info.elements:,} elements, {size(info.nbytes)}"
    )
    out.print(f"  {dtypes}")
    for names in info.tied:
        out.print(f"  share memory: {', '.join(names)}")
    if params:
        listing = _table("tensor", "type")
        for name, kind in info.tensors.items():
            listing.add_row(name, kind)
        out.print(listing)
        return
    collapsed: dict[str, list[str]] = {}
    for name in info.tensors:
        collapsed.setdefault(_INDEX.sub("*", name), []).append(name)
    shown = list(collapsed.items())
    for pattern, members in shown[:12]:
        out.print(f"  {pattern}  " + (f"x {len(members)}" if len(members) > 1 else info.tensors[members[0]]))
    if len(shown) > 12:
        out.print(f"  ... and {len(shown) - 12} more kinds of names (--params lists all)")


def remapped(report: RemapReport) -> None:
    """Print what a plan did."""
    out = console()
    for rule, count in report.rules:
        out.print(f"{rule}: {plural(count, 'match')}".replace("matchs", "matches"))
    for section, moves in report.moves.items():
        dropped = report.dropped[section]
        counts = [f"{len(moves)} moved", f"{len(dropped)} dropped", f"{report.kept[section]} kept"]
        out.print(f"{section}: {', '.join(counts)}")
        if not report.written:
            for source, target in moves:
                out.print(f"  {source} -> {target}")
            for source in dropped:
                out.print(f"  {source} dropped")
    for note in report.notes:
        out.print(f"note: {note}")
    out.print(f"wrote {report.destination}" if report.written else "dry run: nothing was written")


def converted(report: ConvertReport) -> None:
    """Print what was converted."""
    out = console()
    for note in report.notes:
        out.print(f"note: {note}")
    what = f"{plural(report.tensors, 'tensor')}, {size(report.nbytes)}"
    if report.written:
        out.print(f"{report.source_format} -> {report.format}: {what}, wrote {report.destination}")
    else:
        out.print(f"{report.source_format} -> {report.format}: {what}; dry run: nothing was written")
