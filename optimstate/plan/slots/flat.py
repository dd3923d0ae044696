"""Vectors over all parameters (LBFGS), cut into the segments of the parameters and rejoined in the new order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import LIVE, backend_of, evaluated, shape_of
from optimstate.plan.expressions.tree import Expr, Shape
from optimstate.problems import Kind, Problem
from optimstate.record import Record
from optimstate.state.optimizer import OptimizerState, Slots

if TYPE_CHECKING:
    from optimstate.plan.solve.groups import GroupPlan
    from optimstate.plan.solve.migration import Move

__all__ = ["FlatPlan", "plan_flat"]

_LAYOUT = ex.Cat | ex.Narrow | ex.Take | ex.Permute | ex.Reshape


class FlatPlan(Record):
    """How the vectors are rebuilt.

    Attributes:
        holder: The old parameter whose entry has the whole state.
        segments: For each old parameter its start, its number of elements and its shape.
        order: The new parameters' expressions, in order.
    """

    holder: str
    segments: Mapping[str, tuple[int, int, Shape]]
    order: tuple[Expr, ...]

    def rebuilt(self, slots: Slots) -> dict[str, Any]:
        """The whole state with every vector rebuilt."""
        total = sum(count for _, count, _ in self.segments.values())
        return {str(slot): self._value(value, total) for slot, value in slots.items()}

    def moves_each_element_once(self, total: int) -> bool:
        """Whether a rebuilt vector has every element exactly once, found by rebuilding the vector of indices."""
        from optimstate.installed_torch import torch

        return torch.equal(self._vector(torch.arange(total)).sort().values, torch.arange(total))

    def _value(self, value: Any, total: int) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(self._value(item, total) for item in value)
        if shape_of(value) != (total,) or value is None:
            return value
        return self._vector(value)

    def _vector(self, vector: Any) -> Any:
        backend = backend_of(vector)
        leaves: dict[int, Any] = {}
        for expression in self.order:
            for leaf in ex.leaves(expression):
                start, count, shape = self.segments[leaf.name]
                leaves[id(leaf)] = backend.reshape(backend.narrow(vector, 0, start, count, 1), shape)
        memo: dict[int, Any] = {}
        parts = [
            backend.reshape(evaluated(expression, leaves, memo), (prod(expression.shape or ()),))
            for expression in self.order
        ]
        joined = backend.concatenate(parts, 0)
        return joined if backend is LIVE else backend.own(joined, set())


def plan_flat(
    state: OptimizerState,
    shapes: Mapping[str, Shape | None],
    moves: Sequence[Move],
    groups: Sequence[GroupPlan],
    problems: list[Problem],
) -> FlatPlan | None:
    """How the vectors follow; None where there are none.

    Only what moves every element exactly once keeps their products, on which the algorithm depends.

    Args:
        state: Of the optimizer.
        shapes: Of all its parameters.
        moves: What becomes of them.
        groups: Their new order.
        problems: Added to.
    """
    holder = next((str(name) for _, name, slots in state.parameters() if slots), None)
    by_name = {move.target: move for move in moves}
    order = [by_name[name] for group in groups for name in group.members]
    if holder is None or all(_left_behind(move) for move in order):
        return None
    old = [str(name) for _, name, _ in state.parameters()]
    if [move.sources for move in order] == [(name,) for name in old] and all(move.is_moved_whole for move in order):
        return FlatPlan(holder, dict.fromkeys(old, (0, 0, ())), ())
    refuse = _refusing(problems)
    unknown = [name for name in old if shapes.get(name) is None]
    if unknown:
        refuse(f"the shape of {describe(unknown[0])} is not known", "give the model too", "unknown-shape")
        return None
    segments: dict[str, tuple[int, int, Shape]] = {}
    start = 0
    for name in old:
        shape = shapes[name] or ()
        segments[name] = (start, prod(shape), shape)
        start += prod(shape)
    fitting = [value for slots in state.state.values() for value in slots.values() if shape_of(value) == (start,)]
    if not fitting:
        refuse(f"no vector has the {start} elements that the parameters have together")
        return None
    expressions: list[Expr] = []
    for move in order:
        if move.expression is None or not all(isinstance(step, _LAYOUT) for step in ex.steps(move.expression)):
            refuse(f"{describe(move.target)} is new, or made by more than moving elements")
            return None
        expressions.append(move.expression)
    made = FlatPlan(holder, segments, tuple(expressions))
    if not made.moves_each_element_once(start):
        refuse("something is dropped or duplicated")
        return None
    return made


def _left_behind(move: Move) -> bool:
    return move.expression is None or isinstance(getattr(move.expression, "step", None), ex.Fresh)


def _refusing(problems: list[Problem]) -> Callable[..., None]:
    def refuse(reason: str, remedy: str = "", kind: Kind = "slot") -> None:
        message = f"LBFGS keeps vectors over all parameters, which cannot follow: {reason}"
        anew = ", or ".join(filter(None, (remedy, 'start it anew: a rule fresh = "**"')))
        problems.append(Problem(kind, message, remedy=anew))

    return refuse
