"""Whether what a plan makes fits what the result must be: the target's names and shapes, live values, shared memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import identity
from optimstate.plan.expressions.tree import Expr, Leaf
from optimstate.plan.language.rules import Policy, Rule
from optimstate.plan.slots.outcomes import Parameter
from optimstate.plan.solve.migration import Inventory, Move, Target
from optimstate.plan.solve.problems import Suggestions, shape_problem
from optimstate.plan.solve.resolve import Made, Resolved
from optimstate.problems import Problem

__all__ = ["fitted", "unsized", "untied", "without_live_values"]


def fitted(
    target: Target, made: Mapping[str, Made | None], found: Resolved, policy: Policy, problems: list[Problem]
) -> tuple[dict[str, Made | None], list[tuple[str, Rule | None]]]:
    """The targets in the order of the live parameters, every one of them there and of its shape.

    Args:
        target: What the result must be.
        made: How each parameter of the result is made.
        found: What the rules decide.
        policy: The plan's.
        problems: What does not fit is added.

    Returns:
        How each parameter of the target is made, and the sources that are left out with it, as the policy allows.
    """
    names = list(target.names())
    known = set(names)
    extra = [name for name in made if name not in known and name not in target.elsewhere]
    missing = [name for name in names if name not in made]
    if policy.missing == "error":
        hints = Suggestions(extra, {name: item.expression.shape for name, item in found.made.items()})
        problems.extend(
            Problem(
                "unfilled",
                f"nothing fills {describe(name)}{hints.of(name, target.shapes.get(name))}",
                names=(name,),
                remedy=f'add a rule, declare it new (fresh = "{name}"), or say missing = "fresh" in [policy]',
            )
            for name in missing
        )
    if policy.unexpected == "error":
        hints = Suggestions(missing, target.shapes)
        for name in extra:
            item = made[name]
            shape = item.expression.shape if item is not None else None
            remedy = f'rename it, drop it (drop = "{name}"), or say unexpected = "drop" in [policy]'
            message = f"{describe(name)} is not in the target{hints.of(name, shape)}"
            problems.append(Problem("unexpected", message, names=(name,), remedy=remedy))
    for name in names:
        item = made.get(name)
        wanted = target.shapes.get(name)
        shape = item.expression.shape if item is not None else None
        if shape is not None and wanted is not None and shape != tuple(wanted):
            problems.append(shape_problem(name, shape, tuple(wanted)))
    used = {leaf.name for name in known for item in [made.get(name)] if item for leaf in ex.leaves(item.expression)}
    lost = dict.fromkeys(
        leaf.name
        for name in extra
        for item in [made[name]]
        if item is not None
        for leaf in ex.leaves(item.expression)
        if leaf.name not in used
    )
    return {name: made.get(name) for name in names}, [(name, None) for name in lost]


def without_live_values(target: Target | None, moves: Sequence[Move]) -> Iterator[Problem]:
    """Parameters that should keep the live model's values where there is no live model."""
    values = target.values if target is not None else {}
    for move in moves:
        outcomes = [*([move.value] if move.value is not None else []), *move.slots.values()]
        asked = any(outcome.made is not None and ex.takes_live(outcome.made) for outcome in outcomes)
        if asked and move.target not in values:
            message = f'{describe(move.target)} is to hold values of the live model (fill = "live"), and there is none'
            remedy = "use such a plan in optimstate.resume or hooks.migrate_model"
            yield Problem("unreached", message, names=(move.target,), remedy=remedy)


def untied(inventory: Inventory, moves: Sequence[Move]) -> Iterator[Problem]:
    """Names that share memory but would no longer hold the same values."""
    identities = [
        (name, identity(value))
        for name, value in inventory.tensors.items()
        if (shape := inventory.shapes.get(name)) and 0 not in shape
    ]
    if len({found for _, found in identities}) == len(identities):
        return
    by_identity: dict[Any, list[str]] = {}
    for name, found in identities:
        by_identity.setdefault(found, []).append(name)
    tied = {name: names for names in by_identity.values() if len(names) > 1 for name in names}
    changed: dict[str, str] = {}
    moved: set[str] = set()
    for move in moves:
        for source in move.sources if move.expression is not None else ():
            if source in tied:
                whole = move.value is not None and isinstance(move.value.made, Leaf)
                (moved.add(source) if whole else changed.setdefault(source, move.target))
    for source, target in changed.items():
        left = next((name for name in tied[source] if name in moved), None)
        if left is not None and source not in moved:
            message = (
                f"{describe(source)} becomes {describe(target)} by operations, but {describe(left)}, which shares its "
                "memory, stays as it is"
            )
            remedy = f"give both the same rule, or drop {describe(left)}"
            yield Problem("tied", message, names=(source, left), remedy=remedy)


def unsized(name: str, expression: Expr, parameters: Mapping[str, Parameter]) -> Iterator[Problem]:
    """A source of unknown shape with state, where the expression would cut or join it."""
    if isinstance(expression, Leaf):
        return
    if not any(isinstance(step, ex.Unsized) for step in ex.steps(expression)):
        return
    for leaf in ex.leaves(expression):
        found = parameters.get(leaf.name)
        if found is not None and found.slots and found.shape is None and leaf.shape is None:
            message = f"the shape of {describe(leaf.name)} is not known, so it cannot be cut or joined"
            yield Problem("unknown-shape", message, name, (leaf.name,), "give the model too")
            return
