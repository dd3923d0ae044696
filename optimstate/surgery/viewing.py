"""What of a checkpoint is looked at: names that match a template, and weights in the layout of their optimizer."""

from __future__ import annotations

from copy import copy
from os import PathLike
from typing import TYPE_CHECKING

from optimstate.formats.protocol import Document

if TYPE_CHECKING:
    from optimstate.plan.language.plan import Plan
    from optimstate.plan.language.template import Template

__all__ = ["template_of", "viewed"]


def template_of(name: str | None) -> Template | None:
    """The template that names have to match, if there is one.

    Raises:
        PlanSyntaxError: It cannot be parsed.
    """
    if name is None:
        return None
    from optimstate.plan.language.template import Template  # few ask for names

    return Template(name)


def viewed(document: Document, view: Plan | str | PathLike[str] | None) -> Document:
    """A checkpoint with its models as a view has them; nothing is computed before it is read.

    Args:
        document: As it was read; not changed.
        view: The plan from the layout that is stored to that of the optimizer, or its path; None for none.

    Raises:
        MigrationError: The view does not fit.
    """
    if view is None:
        return document
    from optimstate.plan.apply.checkpoint import apply_plan  # forty modules, and few ask for a view
    from optimstate.plan.language.plan import Plan

    tree, _, _ = apply_plan(Plan.of(view).only("model"), document.tree)
    seen = copy(document)
    seen.tree = tree
    return seen
