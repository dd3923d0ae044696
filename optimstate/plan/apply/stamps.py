"""Which plans have already been applied to a checkpoint, for guards with `once`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.language.plan import Plan
from optimstate.state.sections import find_sections
from optimstate.tree import rebuilt_mapping

__all__ = ["APPLIED", "METADATA", "STAMP", "refuse_second", "stamped"]

STAMP = "optimstate_plans"
"""The key under which a checkpoint keeps the digests of plans that may be applied once."""
METADATA = "optimstate"
"""The key of an optimizer's state under which hooks write what a later reader would have to guess."""
APPLIED = "applied"
"""The key there of the digests of plans that were applied to the file after it was certified."""


def refuse_second(plan: Plan, tree: Any) -> None:
    """Refuse a plan with `once` that was already applied to this checkpoint or optimizer state.

    Raises:
        MigrationError: It was.
    """
    if plan.guard.once and plan.digest in set(_applied(tree)):
        raise MigrationError.of(
            "guard",
            "this plan was applied to this checkpoint already",
            hint="Apply it to the original, or take `once` out of the plan's [guard].",
        )


def _applied(node: Any, depth: int = 4) -> Iterator[str]:
    if not isinstance(node, Mapping):
        return
    yield from (digest for digest in node.get(STAMP, ()) if isinstance(digest, str))
    noted = node.get(METADATA)
    if isinstance(noted, Mapping):
        yield from (digest for digest in noted.get("plans", ()) if isinstance(digest, str))
    for value in node.values() if depth and "param_groups" not in node else ():
        yield from _applied(value, depth - 1)


def stamped(plan: Plan, tree: Any) -> Any:
    """The tree with the plan's digest, where the plan asks for it and another entry changes no section's meaning.

    Raises:
        MigrationError: There is no place for it.
    """
    if not plan.guard.once:
        return tree
    roots = [section for section in find_sections(tree) if section.path == ()]
    if not isinstance(tree, dict) or roots or not all(isinstance(key, str) for key in tree):
        message = "[guard] once = true needs a checkpoint that is a dict of sections, to note the plan in"
        raise MigrationError.of("guard", message, hint="Use has and lacks, which need no note.")
    return rebuilt_mapping(tree, {**tree, STAMP: [*tree.get(STAMP, ()), plan.digest]})
