"""The parameters that a checkpoint names, as plans see them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from optimstate.plan.checkpoint import apply_plan
from optimstate.plan.expressions import Shape
from optimstate.plan.rules import Plan

__all__ = ["Names", "kind_of", "merged", "names_of"]

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
