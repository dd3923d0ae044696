"""Plans undone and written, and the names they speak of. None of it imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from optimstate.errors import PlanError
from optimstate.formats.registry import open_checkpoint
from optimstate.io.location import Place
from optimstate.io.places import located
from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.inverse import inverse
from optimstate.surgery.opening import opening
from optimstate.surgery.reports import VerbReport

__all__ = ["InvertReport", "Names", "invert_plan", "kind_of", "merged", "names_of"]

Names = Mapping[str, Mapping[str, Shape | None]]
"""The parameters of each section, with their shapes where known; wrapper prefixes are left out."""


def names_of(tree: Any) -> Names:
    """The names in every section: what a plan that does nothing would leave."""
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
    """The kind of a section with this name in reports: `model`, `ema`, `optimizer`."""
    return key.split(" ", 1)[0]


def irreversible_reason(plan: Plan, names: Mapping[str, Shape | None] | None) -> str:
    """Why a plan cannot be undone; empty where it can."""
    try:
        inverse(plan, names)
    except PlanError as error:
        return "; ".join(map(str, error.problems))
    return ""


# --- invert ---------------------------------------------------------------------------------------------------------


class InvertReport(VerbReport):
    """The plan that undoes a plan.

    Attributes:
        rules: As text.
        plan: The plan as a file.
    """

    checkpoint: str
    rules: tuple[str, ...]
    plan: str

    VERB = "plan invert"

    def __str__(self) -> str:
        return self.plan.rstrip("\n")


def invert_plan(plan: Plan | str | PathLike[str], checkpoint: Place | None = None) -> InvertReport:
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
        checkpoint = located(checkpoint)
        with opening(checkpoint):
            sections = names_of(open_checkpoint(checkpoint).tree)
        names = merged(sections)
    made = inverse(plan, names)
    return InvertReport(str(checkpoint or ""), tuple(map(str, made.all_rules())), made.to_toml())


# --- files ----------------------------------------------------------------------------------------------------------


# --- as text --------------------------------------------------------------------------------------------------------
