"""Plans looked at: checked, undone, shown. None of it imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import Any

from optimstate.errors import MigrationError, PlanError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.destination import check_destination
from optimstate.io.output import AtomicFile
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.apply.explain import Row, explained
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.inverse import inverse
from optimstate.plan.solve.migration import Inventory, Target
from optimstate.plan.solve.planner import plan_migration
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.surgery.reports import opening, to_json
from optimstate.surgery.text import collapsed, plural, readable, table

__all__ = [
    "CheckReport",
    "InvertReport",
    "Names",
    "ShowReport",
    "check_plan",
    "check_plan_destination",
    "invert_plan",
    "kind_of",
    "merged",
    "names_of",
    "save_plan",
    "show_plan",
]

Names = Mapping[str, Mapping[str, Shape | None]]
"""The parameters of each section, with their shapes where known; wrapper prefixes are left out."""


def names_of(tree: Any) -> Names:
    """What every section names: what is left by a plan that does nothing."""
    _, migration, _ = apply_plan(Plan(), tree)
    return {
        key: {move.target: move.expression.shape if move.expression else None for move in section.moves}
        for key, section in migration.sections.items()
    }


def merged(names: Names) -> dict[str, Shape | None]:
    """The parameters of all sections, with a shape where any of them knows it."""
    found: dict[str, Shape | None] = {}
    for shapes in names.values():
        for name, shape in shapes.items():
            found[name] = found.get(name) or shape
    return found


def kind_of(key: str) -> str:
    """The kind of the section that a report calls so: `model`, `ema`, `optimizer`."""
    return key.split(" ", 1)[0]


# --- check ----------------------------------------------------------------------------------------------------------


class CheckReport(Record):
    """Whether a plan can be read, fits a checkpoint, and makes what a target has.

    Attributes:
        rules: Each rule with the number of parameters it matches, over all sections; None without a checkpoint.
        problems: Everything that is wrong, each naming the parameter, both sides and the remedy.
        notes: What deserves attention though nothing is wrong.
        irreversible: Why the plan cannot be undone; empty where it can.
    """

    checkpoint: str
    target: str
    rules: tuple[tuple[str, int | None], ...]
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    irreversible: str

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        rules = [{"rule": rule, "matches": count} for rule, count in self.rules]
        return to_json("plan check", {**self._asdict(), "rules": rules, "fits": self.fits})

    def __str__(self) -> str:
        return "\n".join(readable(self)._lines())

    def _lines(self) -> Iterator[str]:
        for rule, count in self.rules:
            yield rule if count is None else f"{rule}: {plural(count, 'match')}"
        for problem in self.problems:
            yield f"problem: {problem}"
        for note in self.notes:
            yield f"note: {note}"
        if self.problems:
            yield f"{plural(len(self.problems), 'problem')}: the plan does not fit"
            return
        sides = " ".join(filter(None, (self.checkpoint, self.target and f"and makes the names of {self.target}")))
        yield f"the plan fits {sides}" if sides else "the plan can be read"
        yield f"it cannot be undone: {self.irreversible}" if self.irreversible else "it can be undone"


def check_plan(
    plan: Plan | str | PathLike[str],
    checkpoint: str | Path | None = None,
    *,
    target: str | Path | None = None,
) -> CheckReport:
    """Find everything that is wrong with a plan for a checkpoint, without moving anything.

    Args:
        plan: A plan, or the path of a plan file.
        checkpoint: What it is for; without it only the plan itself is looked at.
        target: A checkpoint of the new model, whose names and shapes the result must have.

    Raises:
        CheckpointError: A checkpoint cannot be read.
        ValueError: There is a target and no checkpoint.
    """
    plan = Plan.of(plan)
    counts: list[int | None] = [None for _ in plan.all_rules()]
    problems: list[Problem] = []
    notes: list[str] = []
    names: dict[str, Shape | None] | None = None
    if checkpoint is not None:
        with opening(checkpoint):
            tree = open_checkpoint(checkpoint).tree
            sections = names_of(tree)
            names = merged(sections)
            # With a target, it decides which rules are of use: those that only declare its new parameters are, too.
            tried = plan if target is None else plan.with_policy(unused="ignore")
            try:
                _, migration, notes = apply_plan(tried, tree)
                counts = [count for _, count in migration.counts]
            except MigrationError as error:
                problems += error.problems
            if target is not None:
                problems += _target_problems(plan, sections, names_of(open_checkpoint(target).tree))
    elif target is not None:
        raise ValueError("a target needs a checkpoint")
    return CheckReport(
        str(checkpoint or ""),
        str(target or ""),
        tuple(zip(map(str, plan.all_rules()), counts, strict=True)),
        tuple(dict.fromkeys(problems)),
        tuple(notes),
        "" if problems else _irreversible(plan, names),
    )


def _target_problems(plan: Plan, old: Names, new: Names) -> Sequence[Problem]:
    """What keeps the names and shapes of the old sections from becoming those of the new ones."""
    inventories = {}
    for key, shapes in old.items():
        wanted = _counterpart(key, old, new)
        inventories[key] = Inventory(shapes, target=None if wanted is None else Target.of_names(wanted))
    if all(inventory.target is None for inventory in inventories.values()):
        message = "the target has no section of the checkpoint's kinds"
        return [Problem("section", message, remedy="give one with a model or a named optimizer")]
    try:
        plan_migration(plan, inventories)
    except MigrationError as error:
        return error.problems
    return ()


def _counterpart(key: str, old: Names, new: Names) -> Mapping[str, Shape | None] | None:
    """The section of the target that stands for one of the checkpoint: of the same kind and path, else of its order.

    An averaged model may be compared with the model. An optimizer without a counterpart is not: which of a model's
    tensors are trained is not known.
    """
    if key in new:
        return new[key]
    for kind in (kind_of(key), *(("model",) if kind_of(key) == "ema" else ())):
        alike = [other for other in new if kind_of(other) == kind]
        place = [other for other in old if kind_of(other) == kind_of(key)].index(key)
        if place < len(alike):
            return new[alike[place]]
    return None


def _irreversible(plan: Plan, names: Mapping[str, Shape | None] | None) -> str:
    try:
        inverse(plan, names)
    except PlanError as error:
        return "; ".join(map(str, error.problems))
    return ""


# --- invert ---------------------------------------------------------------------------------------------------------


class InvertReport(Record):
    """The plan that undoes a plan.

    Attributes:
        rules: As text.
        plan: The plan as a file.
    """

    checkpoint: str
    rules: tuple[str, ...]
    plan: str

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("plan invert", self._asdict())

    def __str__(self) -> str:
        return self.plan.rstrip("\n")


def invert_plan(plan: Plan | str | PathLike[str], checkpoint: str | Path | None = None) -> InvertReport:
    """The plan that undoes a plan which loses nothing.

    Args:
        plan: A plan, or the path of a plan file.
        checkpoint: The one that the plan is for (not its result). Its names and shapes say how unequal pieces are cut
            again, and the inverse is tried on them.

    Raises:
        PlanError: It loses something, or only a checkpoint can tell; every rule is named with the reason.
        CheckpointError: The checkpoint cannot be read.
    """
    plan = Plan.of(plan)
    names = None
    if checkpoint is not None:
        with opening(checkpoint):
            sections = names_of(open_checkpoint(checkpoint).tree)
        names = merged(sections)
    made = inverse(plan, names)
    return InvertReport(str(checkpoint or ""), tuple(map(str, made.all_rules())), made.to_toml())


# --- show -----------------------------------------------------------------------------------------------------------


class ShowReport(Record):
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

    def to_json(self) -> str:
        """A JSON document of a stable form."""
        return to_json("plan show", self._asdict())

    def __str__(self) -> str:
        return self.text()

    def text(self, name: str = "plan", *, params: bool = False) -> str:
        """What it says, in words.

        Args:
            name: What the plan is called.
            params: List every parameter and slot instead of layers together.
        """
        return "\n".join(readable(self)._lines(name, params))

    def _lines(self, name: str, params: bool) -> Iterator[str]:
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


def show_plan(plan: Plan | str | PathLike[str], checkpoint: str | Path | None = None) -> ShowReport:
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
        _irreversible(plan, names),
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


# --- files ----------------------------------------------------------------------------------------------------------


def check_plan_destination(path: str | Path, *sources: str | Path, force: bool = False) -> None:
    """Refuse to write a plan where something else is; `-` is standard output, which is always free.

    Raises:
        DestinationError: It exists and `force` is false, is a source, or its folder does not exist.
    """
    if str(path) != "-":
        check_destination(Path(path), [Path(source) for source in sources if str(source) != "-"], force=force)


def save_plan(text: str, path: str | Path) -> None:
    """Write a plan file, all of it or nothing.

    Raises:
        DestinationError: It cannot be written.
    """
    with AtomicFile(path) as file:
        file.write(text.encode())


# --- as text --------------------------------------------------------------------------------------------------------


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
