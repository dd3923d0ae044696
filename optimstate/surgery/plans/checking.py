"""Whether a plan can be read, fits a checkpoint, and makes what a target has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

from optimstate.errors import MigrationError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.migration import Inventory, Target
from optimstate.plan.solve.planner import plan_migration
from optimstate.problems import Problem
from optimstate.surgery.opening import opening
from optimstate.surgery.plans.inverting import Names, irreversible_reason, kind_of, merged, names_of
from optimstate.surgery.reports import VerbReport
from optimstate.surgery.text import plural

__all__ = ["CheckReport", "check_plan"]


class CheckReport(VerbReport):
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

    VERB = "plan check"

    def _json(self) -> dict[str, Any]:
        rules = [{"rule": rule, "matches": count} for rule, count in self.rules]
        return {**self._asdict(), "rules": rules, "fits": self.fits}

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
    checkpoint: Place | None = None,
    *,
    target: Place | None = None,
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
        checkpoint = located(checkpoint)
        target = None if target is None else located(target)
        with opening(*filter(None, (checkpoint, target))):
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
        "" if problems else irreversible_reason(plan, names),
    )


def _target_problems(plan: Plan, old: Names, new: Names) -> Sequence[Problem]:
    """Why the names and shapes of the old sections do not become those of the new ones."""
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
