"""A plan in words, and what it would do to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from os import PathLike

from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.apply.explain import Row, explained
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.surgery.opening import opening
from optimstate.surgery.plans.inverting import irreversible_reason, merged, names_of
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import collapsed, joined, plural, readable, table

__all__ = ["ShowReport", "show_plan"]


class ShowReport(VerbReport):
    """A plan in words, and with a checkpoint what becomes of each of its parameters and slots.

    Attributes:
        passes: The rules of each pass.
        groups: The `[[group]]` tables.
        guard: What the checkpoint must and must not have.
        policy: What is not the default.
        irreversible: Why the plan cannot be undone; empty where it can.
        digest: A SHA-256 of what it says.
        rows: For each section what becomes of every parameter and slot.
        notes: What deserves attention though nothing is wrong.
    """

    checkpoint: str
    passes: tuple[tuple[str, ...], ...]
    groups: tuple[str, ...]
    guard: tuple[str, ...]
    policy: tuple[str, ...]
    irreversible: str
    digest: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    VERB = "plan show"

    def __str__(self) -> str:
        return self.text()

    def text(self, name: str = "plan", *, params: bool = False) -> str:
        """What it says, in words.

        Args:
            name: What the plan is called.
            params: List every parameter and slot instead of layers together.
        """
        return joined(readable(self)._rows(name, params))

    def _rows(self, name: str, params: bool) -> Iterator[str]:
        yield f"{name}: {plural(sum(map(len, self.passes)), 'rule')}, digest {self.digest[:12]}"
        number = 0
        for place, rules in enumerate(self.passes):
            if place:
                yield f"  pass {place + 1}"
            for rule in rules:
                number += 1
                yield f"  {number}. {rule}"
        for heading, lines in (("group", self.groups), ("guard", self.guard), ("policy", self.policy)):
            for line in lines:
                yield f"  {heading}: {line}"
        yield f"it cannot be undone: {self.irreversible}" if self.irreversible else "it can be undone"
        for section, rows in groupby(self.rows, lambda row: row.section):
            yield f"\n{section}"
            yield from (_listed if params else _collapsed)(list(rows))
        for note in self.notes:
            yield f"note: {note}"


def show_plan(plan: Plan | str | PathLike[str], checkpoint: Place | None = None) -> ShowReport:
    """What a plan says, and what it would do to a checkpoint.

    Raises:
        MigrationError: It does not fit the checkpoint.
        CheckpointError: The checkpoint cannot be read.
    """
    plan = Plan.of(plan)
    names: dict[str, Shape | None] | None = None
    rows: tuple[Row, ...] = ()
    notes: list[str] = []
    if checkpoint is not None:
        checkpoint = located(checkpoint)
        with opening(checkpoint):
            tree = open_checkpoint(checkpoint).tree
            _, migration, notes = apply_plan(plan, tree)
            rows = tuple(explained(migration))
            sections = names_of(tree)
            names = merged(sections)
    return ShowReport(
        str(checkpoint or ""),
        tuple(tuple(map(str, rules)) for rules in plan.passes),
        tuple(_groups_in_words(plan)),
        tuple(_guard_in_words(plan)),
        tuple(_policy_in_words(plan)),
        irreversible_reason(plan, names),
        plan.digest,
        rows,
        tuple(notes),
    )


def _groups_in_words(plan: Plan) -> Iterator[str]:
    for group in plan.groups:
        options = ", ".join(f"{key} = {value}" for key, value in group.set.items())
        like = "" if group.like is None else f"like group {group.like}"
        listed = "; ".join(filter(None, (like, options)))
        yield ", ".join(template.text for template in group.match) + (f": {listed}" if listed else "")


def _guard_in_words(plan: Plan) -> Iterator[str]:
    for word, templates in (("has", plan.guard.has), ("lacks", plan.guard.lacks)):
        yield from (f"{word} {template.text}" for template in templates)
    if plan.guard.once:
        yield "once"


def _policy_in_words(plan: Plan) -> Iterator[str]:
    default = type(plan.policy)()._asdict()
    for key, value in plan.policy._asdict().items():
        if value != default[key]:
            yield f"{key} = {value}"
    if plan.optimizer:
        yield f"optimizer = {plan.optimizer}"


def _listed(rows: list[Row]) -> Iterator[str]:
    made = [
        (row.target or ", ".join(row.sources), row.slot or "(value)", row.outcome, _origin(row), row.reason)
        for row in rows
    ]
    yield table(("name", "slot", "outcome", "from", "why"), made)


def _collapsed(rows: list[Row]) -> Iterator[str]:
    """Layers together: for each kind of move how many there are, and the outcomes of the slots."""
    moves: dict[tuple[str, str], set[str]] = {}
    outcomes: dict[tuple[str, str], dict[tuple[str, str], dict[str, None]]] = {}
    kept: set[str] = set()
    for row in rows:
        name = row.target or ", ".join(row.sources)
        if row.outcome == "exact" and not row.reason and (row.target,) == row.sources and not row.how:
            kept.add(name)
            continue
        key = collapsed(name), collapsed(_origin(row))
        moves.setdefault(key, set()).add(name)
        slots = outcomes.setdefault(key, {}).setdefault((row.outcome, row.reason), {})
        slots[row.slot] = None
    for (target, origin), names in moves.items():
        arrow = " <- ".join(filter(None, (target, origin)))
        yield f"  {arrow}" + (f"  x {len(names)}" if len(names) > 1 else "")
        for (outcome, reason), slots in outcomes[target, origin].items():
            listed = ", ".join(slot for slot in slots if slot)
            yield f"    {outcome}" + (f": {listed}" if listed else "") + (f" ({reason})" if reason else "")
    if kept:
        yield f"  kept: {plural(len(kept), 'parameter')}"


def _origin(row: Row) -> str:
    return row.how or (", ".join(row.sources) if row.target else "")
