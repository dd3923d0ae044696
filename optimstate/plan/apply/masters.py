"""Lists of weights that stand beside an optimizer by position, one for each param group: they follow their parameters.

Mixed-precision wrappers (apex's `FP16_Optimizer` and what was made of it) keep the weights in full precision so:
`fp32_from_fp16`, `fp32_groups`, ... Their programs copy by position, so that a list left as it was would give every
later parameter its neighbour's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.expressions.evaluate import backend_of, dtype_of
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.slots.elementwise import Translator, translation_outcome
from optimstate.plan.slots.outcomes import Refusal
from optimstate.plan.solve.migration import Move, SectionMoves
from optimstate.record import Record
from optimstate.state.algorithms.slots import WEIGHT
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Path, children, format_path

__all__ = ["Masters", "masters_beside"]

_WORDS = ("fp32", "float32", "master")


class Masters(Record):
    """Weights that stand beside an optimizer, in the order of its parameters.

    Attributes:
        path: Where.
        node: The list, or the list of a list for each group.
    """

    path: Path
    node: Sequence[Any]

    def followed(
        self, moves: SectionMoves, names: Sequence[Sequence[str]], weights: Callable[[], Mapping[str, Any]]
    ) -> Sequence[Any] | None:
        """The lists for the parameters of the result; None where they stay as they are.

        Args:
            moves: What becomes of the optimizer.
            names: Of its parameters in the checkpoint, group by group.
            weights: Gives the tensors of the result's models, from which a new parameter gets its own.

        Raises:
            MigrationError: A weight cannot follow, or there is none for a new parameter.
        """
        by_target = {move.target: move for move in moves.moves}
        order = [[by_target[name].sources for name in group.members] for group in moves.groups]
        if order == [[(name,) for name in group] for group in names] and all(m.is_moved_whole for m in moves.moves):
            return None
        lists = self.node if _is_nested(self.node) else [self.node]
        flat = [tensor for part in lists for tensor in part]
        tensors = dict(zip((name for group in names for name in group), flat, strict=True))
        dtypes = {name: dtype_of(tensor) for name, tensor in tensors.items()}
        place = format_path(self.path)
        made: list[Move] = []
        for move in moves.moves:
            if move.expression is None:
                continue
            try:  # as a slot that is a weight: its fill and scale, and full precision whatever the parameter's is
                found = Translator("fp32_param", (), WEIGHT, dtypes).translate(move.expression)
            except Refusal as refusal:
                raise MigrationError([refusal.problem(f"{place}: {move.target}", move.sources)]) from None
            value = translation_outcome(found, "weight", inferred=False)
            made.append(Move(move.target, move.expression, move.rules, value, {}, move.clone))
        values = execute_model(SectionMoves(tuple(made), ()), tensors)
        missing = [move.target for move in moves.moves if move.target not in values]
        there = weights() if missing else {}
        for name in missing:
            values[name] = self._new(name, there, next(iter(dtypes.values())) or "float32")
        groups = [_like(lists[0], [values[name] for name in group.members]) for group in moves.groups]
        if _is_nested(self.node):
            return _like(self.node, groups)
        return _like(self.node, [value for group in groups for value in group])

    def _new(self, name: str, weights: Mapping[str, Any], dtype: str) -> Any:
        weight = weights.get(name)
        if weight is None:
            message = (
                f"{describe(name)} is new, and no model in the checkpoint has the weight for its place in these lists"
            )
            raise MigrationError.of("unfilled", message, format_path(self.path), (name,))
        return backend_of(weight).cast(weight, dtype)


def _like(node: Sequence[Any], items: list[Any]) -> Sequence[Any]:
    return tuple(items) if isinstance(node, tuple) else items


def _is_nested(node: Sequence[Any]) -> bool:
    return all(isinstance(part, list | tuple) for part in node)


def masters_beside(
    tree: Any, path: Path, state: OptimizerState, shapes: Mapping[str, Shape | None]
) -> Iterator[Masters]:
    """The lists that stand beside an optimizer and have a tensor of the right shape for each of its parameters.

    Args:
        tree: The checkpoint.
        path: Of the optimizer in it.
        state: The optimizer's.
        shapes: Of its parameters, where known.

    Raises:
        MigrationError: A list is called like one of masters, and does not fit the optimizer.
    """
    beside = tree
    for key in path[:-1]:
        beside = next((child for inner, child in children(beside) if inner == key), None)
    if not path or not isinstance(beside, Mapping):
        return
    sizes = [len(group.params) for group in state.groups]
    names = [str(name) for _, name, _ in state.parameters()]
    for key, node in beside.items():
        if not isinstance(node, list | tuple) or not node:
            continue
        nested = _is_nested(node)
        parts = list(node) if nested else [node]
        flat = [tensor for part in parts for tensor in part]
        if not flat or not all(isinstance(tensor, LazyTensor) for tensor in flat):
            continue
        counts = [len(part) for part in parts]
        alike = counts == sizes if nested else len(flat) == len(names)
        if alike and all(shapes.get(name) in (None, t.shape) for name, t in zip(names, flat, strict=True)):
            yield Masters((*path[:-1], key), node)
        elif any(word in str(key).lower() for word in _WORDS):
            message = (
                f"has {counts} tensors, or others than the param groups' {sizes}, and cannot follow the parameters"
            )
            raise MigrationError.of("shape", message, format_path((*path[:-1], key)))
