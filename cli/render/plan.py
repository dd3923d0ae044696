"""Plans and what they do, shown to people."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING

import typer

from optimstate.cli.render.terminal import plural, table

if TYPE_CHECKING:
    from optimstate.plan.apply.explain import Row
    from optimstate.surgery.plans import CheckReport, ShowReport
    from optimstate.surgery.suggesting import SuggestReport

__all__ = ["checked", "shown", "suggested"]


def suggested(report: SuggestReport) -> None:
    """Print each rule with its confidence and reason, and what is not explained."""
    for rule in report.rules:
        typer.echo(f"{rule.confidence:.2f}  {rule.rule}")
        typer.echo(f"      {rule.reason}")
    for names, said in (
        (report.missing, f"nothing explains these of {report.target}:"),
        (report.unused, f"nothing takes these of {report.source}; they stay, unless a rule drops them:"),
    ):
        if names:
            typer.echo(said)
            for line in _families(names):
                typer.echo(f"  {line}")
    for problem in report.problems:
        typer.echo(f"does not fit: {problem}")
    if not report.rules and not report.missing:
        typer.echo("the same names and shapes: nothing to do")
    else:
        typer.echo(f"{plural(len(report.rules), 'rule')}, {plural(len(report.missing), 'name')} not explained")


_NAME = re.compile(r"[^\W\d][\w.]*")
_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


def _collapse(text: str) -> str:
    """A name, or names within an expression, with `*` for the indices."""
    return _NAME.sub(lambda name: _INDEX.sub("*", name[0]), text)


def _families(names: tuple[str, ...]) -> Iterator[str]:
    """Names that differ in their indices alone, as one."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_collapse(name), []).append(name)
    for pattern, members in found.items():
        yield members[0] if len(members) == 1 else f"{pattern}  x {len(members)}"


def checked(report: CheckReport) -> None:
    """Print the rules with what they match, and everything that is wrong."""
    for rule, count in report.rules:
        typer.echo(rule if count is None else f"{rule}: {plural(count, 'match')}".replace("matchs", "matches"))
    for problem in report.problems:
        typer.echo(f"problem: {problem}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    if report.problems:
        typer.echo(f"{plural(len(report.problems), 'problem')}: the plan does not fit")
        return
    sides = " ".join(filter(None, (report.checkpoint, report.target and f"and makes the names of {report.target}")))
    typer.echo(f"the plan fits {sides}" if sides else "the plan can be read")
    typer.echo(f"it cannot be undone: {report.irreversible}" if report.irreversible else "it can be undone")


def shown(name: str, report: ShowReport, *, params: bool) -> None:
    """Print a plan, and what becomes of the parameters of a checkpoint."""
    typer.echo(f"{name}: {plural(sum(map(len, report.passes)), 'rule')}, digest {report.digest[:12]}")
    number = 0
    for place, rules in enumerate(report.passes):
        if place:
            typer.echo(f"  pass {place + 1}")
        for rule in rules:
            number += 1
            typer.echo(f"  {number}. {rule}")
    for heading, lines in (("group", report.groups), ("guard", report.guard), ("policy", report.policy)):
        for line in lines:
            typer.echo(f"  {heading}: {line}")
    typer.echo(f"it cannot be undone: {report.irreversible}" if report.irreversible else "it can be undone")
    for section, rows in groupby(report.rows, lambda row: row.section):
        typer.echo(f"\n{section}")
        (_listed if params else _collapsed)(list(rows))
    for note in report.notes:
        typer.echo(f"note: {note}")


def _listed(rows: list[Row]) -> None:
    made = [
        (row.target or ", ".join(row.sources), row.slot or "(value)", row.outcome, _origin(row), row.reason)
        for row in rows
    ]
    typer.echo(table(("name", "slot", "outcome", "from", "why"), made))


def _collapsed(rows: list[Row]) -> None:
    """Layers together: for each kind of move how many there are, and the outcomes of the slots."""
    moves: dict[tuple[str, str], set[str]] = {}
    outcomes: dict[tuple[str, str], dict[tuple[str, str], dict[str, None]]] = {}
    kept: set[str] = set()
    for row in rows:
        name = row.target or ", ".join(row.sources)
        if row.outcome == "exact" and not row.reason and (row.target,) == row.sources and not row.how:
            kept.add(name)
            continue
        key = _collapse(name), _collapse(_origin(row))
        moves.setdefault(key, set()).add(name)
        slots = outcomes.setdefault(key, {}).setdefault((row.outcome, row.reason), {})
        slots[row.slot] = None
    for (target, origin), names in moves.items():
        arrow = " <- ".join(filter(None, (target, origin)))
        typer.echo(f"  {arrow}" + (f"  x {len(names)}" if len(names) > 1 else ""))
        for (outcome, reason), slots in outcomes[target, origin].items():
            said = ", ".join(slot for slot in slots if slot)
            typer.echo(f"    {outcome}" + (f": {said}" if said else "") + (f" ({reason})" if reason else ""))
    if kept:
        typer.echo(f"  kept: {plural(len(kept), 'parameter')}")


def _origin(row: Row) -> str:
    return row.how or (", ".join(row.sources) if row.target else "")
