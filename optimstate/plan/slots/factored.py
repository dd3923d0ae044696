"""Second moments stored as means over rows and over columns (Adafactor and similar), under every layout change.

Such a slot is carried through an expression as a tensor with the parameter's dimensions, those it is a mean over having
size 1. Joining along a dimension that is kept is exact; joining along one that was averaged is the weighted mean, exact
too; cutting one that was averaged can only keep the mean of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from optimstate.describe import describe
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import shape_of
from optimstate.plan.expressions.tree import Expr, Leaf, Node, Shape
from optimstate.plan.slots.outcomes import Level, Outcome, Parameter, Refusal, SlotPath
from optimstate.plan.slots.sources import JoinedSlot, Sources
from optimstate.state.algorithms.slots import Slot, SlotKind

__all__ = ["mean_outcome", "raised_vector"]


class _Lost(Exception):
    """The means do not determine the result; the message says why."""


class _Carried:
    """A mean over `over` on its way through an expression: its tensor has size 1 there.

    Attributes:
        made: The tensor.
        whole: The parameter's shape.
        over: The dimensions it is a mean over.
        approximate: What it costs.
    """

    def __init__(self, made: Expr, whole: Shape, over: frozenset[int], approximate: list[str] | None = None) -> None:
        self.made, self.whole, self.over = made, whole, over
        self.approximate = [] if approximate is None else approximate

    def shape(self) -> Shape:
        return tuple(1 if dim in self.over else size for dim, size in enumerate(self.whole))


def mean_outcome(sources: Sources, joined: JoinedSlot) -> Outcome:
    """What becomes of a row or column mean: it is made from whichever of the two old means averages what is needed.

    Raises:
        Refusal: The means do not determine the result.
    """
    shape = _known_shape(joined)
    if len(shape) < 2:
        raise Refusal(f"it is a mean over rows or columns, and the result has the shape {list(shape)}")
    dim = len(shape) - (1 if joined.slot.kind == "row" else 2)
    row, col = _pair(sources, joined)
    reasons = []
    for source, axis in ((row, -1), (col, -2)) if joined.slot.kind == "row" else ((col, -2), (row, -1)):
        try:
            carried = _Carrier(sources, source, axis).carry(joined.expression)
            if outcome := _mean_over(sources, joined, dim, carried, axis if source == joined.path else -3 - axis):
                return outcome
            reasons.append("the dimension it is a mean over is another in the result")
        except _Lost as lost:
            reasons.append(str(lost))
    raise Refusal(reasons[0])


def _known_shape(joined: JoinedSlot) -> Shape:
    if joined.expression.shape is None:
        message = "the shape of the result is not known, so row and column means cannot follow"
        raise Refusal(message, "give the model too", "unknown-shape")
    return joined.expression.shape


def _pair(sources: Sources, joined: JoinedSlot) -> tuple[SlotPath, SlotPath]:
    """The row and column means that belong together, one of which is wanted."""
    parameter = sources.parameters[joined.names[0]]
    kinds = {path: sources.meaning(path, value, parameter.shape)[0].kind for path, value in parameter.slots.items()}
    rows, cols = ([path for path, found in kinds.items() if found == kind] for kind in ("row", "col"))
    pair = next((pair for pair in zip(rows, cols, strict=False) if joined.path in pair), None)
    if pair is None:
        raise Refusal("there are no means over the other dimension beside it")
    return pair


def _mean_over(sources: Sources, joined: JoinedSlot, dim: int, carried: _Carried, axis: int) -> Outcome | None:
    """The outcome where what was carried is a mean over the dimension, and no other."""
    over = {place for place in carried.over if carried.whole[place] != 1}
    if not (over <= {dim} and (dim in carried.over or carried.whole[dim] == 1)):
        return None
    result = carried.shape()
    if _squeezed(sources.parameters[joined.names[0]], joined.path, axis):
        result = (*result[:dim], *result[dim + 1 :])
    level: Level = "approximate" if carried.approximate else "exact"
    reason = "; ".join(dict.fromkeys(carried.approximate))
    return Outcome(level, reason, joined.slot.kind, False, ex.reshaped(carried.made, result))


def _squeezed(parameter: Parameter, path: SlotPath, axis: int) -> bool:
    """Whether a library leaves the averaged dimension out instead of keeping it as size 1."""
    shape, whole = shape_of(parameter.slots[path]), parameter.shape
    assert whole is not None
    kept = [1 if dim == len(whole) + axis else size for dim, size in enumerate(whole)]
    if shape == tuple(kept):
        return False
    if shape == tuple(size for dim, size in enumerate(whole) if dim != len(whole) + axis):
        return True
    raise _Lost(f"it has the shape {list(shape or ())} for a parameter of {list(whole)}")


class _Carrier:
    """Carries one slot through an expression."""

    def __init__(self, sources: Sources, path: SlotPath, axis: int) -> None:
        self._sources, self._path, self._axis = sources, path, axis

    def carry(self, expression: Expr) -> _Carried:
        if isinstance(expression, Leaf):
            return self._leaf(expression)
        inputs = [self.carry(item) for item in expression.inputs]
        step, first = expression.step, inputs[0]
        match step:
            case ex.Cat():
                return self._cat(step, inputs)
            case ex.Narrow() | ex.Take():
                return self._narrow(step, first)
            case ex.Permute():
                whole = tuple(first.whole[dim] for dim in step.dims)
                over = frozenset(place for place, dim in enumerate(step.dims) if dim in first.over)
                return self._next(first, step, whole, over)
            case ex.Reshape():
                return self._reshape(step.shape, first)
            case ex.Pad():
                whole = self._sized(first, step.dim, first.whole[step.dim] + step.count)
                if step.dim in first.over:
                    first.approximate.append(f"the mean over the old rows of dimension {step.dim} stands for all")
                    return _Carried(first.made, whole, first.over, first.approximate)
                fill = step.fill.of(str(self._path[-1]))
                first.approximate.append(
                    f"{step.count} new rows are filled with {'their mean' if fill is None else fill}"
                )
                return self._next(first, ex.Pad(step.dim, step.count, ex.Fill("mean" if fill is None else fill)), whole)
            case ex.Tile():
                whole = self._sized(first, step.dim, first.whole[step.dim] * step.times)
                if step.dim in first.over:  # the mean of repeated rows is the mean of the rows
                    return _Carried(first.made, whole, first.over, first.approximate)
                return self._next(first, step, whole)
            case ex.Scale() | ex.Cast():
                return self._elementwise(expression, first)
            case ex.Shift():
                return first
            case ex.Mean(weights=weights) if weights:
                return self._average(step, inputs)
        raise _Lost(f"it cannot follow {type(step).__name__.lower()}")

    def _leaf(self, leaf: Leaf) -> _Carried:
        parameter = self._sources.parameters[leaf.name]
        if self._path not in parameter.slots:
            raise _Lost(f"{describe(leaf.name)} has none")
        whole = parameter.shape
        if whole is None or len(whole) < 2:
            raise _Lost(f"{describe(leaf.name)} is not a matrix of a known shape")
        _squeezed(parameter, self._path, self._axis)  # refuses other forms
        carried = _Carried(leaf, whole, frozenset({len(whole) + self._axis}))
        carried.made = ex.reshaped(Leaf(leaf.name, shape_of(parameter.slots[self._path]), self._path), carried.shape())
        return carried

    def _next(self, first: _Carried, step: ex.Step, whole: Shape, over: frozenset[int] | None = None) -> _Carried:
        made = _Carried(first.made, whole, first.over if over is None else over, first.approximate)
        made.made = Node(step, (first.made,), made.shape())
        return made

    def _sized(self, carried: _Carried, dim: int, size: int) -> Shape:
        return (*carried.whole[:dim], size, *carried.whole[dim + 1 :])

    def _cat(self, step: ex.Cat, inputs: Sequence[_Carried]) -> _Carried:
        first = inputs[0]
        if any(item.over != first.over for item in inputs):
            raise _Lost("its parts are means over different dimensions")
        sizes = [item.whole[step.dim] for item in inputs]
        result = _Carried(first.made, self._sized(first, step.dim, sum(sizes)), first.over)
        result.approximate = [reason for item in inputs for reason in item.approximate]
        parts = tuple(item.made for item in inputs)
        if step.dim in first.over:
            weights = tuple(size / sum(sizes) for size in sizes)
            result.made = Node(ex.Mean((), weights), parts, result.shape())
        else:
            result.made = Node(step, parts, result.shape())
        return result

    def _average(self, step: ex.Mean, inputs: Sequence[_Carried]) -> _Carried:
        first = inputs[0]
        if any(item.over != first.over for item in inputs):
            raise _Lost("its parts are means over different dimensions")
        reasons = [reason for item in inputs for reason in item.approximate]
        reasons.append(f"the average of {len(inputs)} states: no run has had it")
        made = _Carried(first.made, first.whole, first.over, reasons)
        made.made = Node(step, tuple(item.made for item in inputs), made.shape())
        return made

    def _narrow(self, step: ex.Narrow | ex.Take, first: _Carried) -> _Carried:
        rows = step.length if isinstance(step, ex.Narrow) else len(step.index)
        every = isinstance(step, ex.Take) and sorted(step.index) == list(range(first.whole[step.dim]))
        whole = self._sized(first, step.dim, rows)
        if step.dim in first.over:
            if rows != first.whole[step.dim] or (isinstance(step, ex.Take) and not every):
                first.approximate.append(
                    f"the mean over all {first.whole[step.dim]} rows of dimension {step.dim} stands for {rows}"
                )
            return _Carried(first.made, whole, first.over, first.approximate)
        return self._next(first, step, whole)

    def _reshape(self, shape: Shape, first: _Carried) -> _Carried:
        over: set[int] = set()
        for old, new in _blocks(first.whole, shape):
            averaged = {dim in first.over for dim in old if first.whole[dim] != 1}
            if len(averaged) > 1:
                raise _Lost("a dimension it is a mean over is merged with one it is not")
            if averaged == {True}:
                over.update(dim for dim in new if shape[dim] != 1)
        over.update(dim for dim, size in enumerate(shape) if size == 1 and not over and first.over)
        made = _Carried(first.made, shape, frozenset(over), first.approximate)
        made.made = ex.reshaped(first.made, made.shape())
        return made

    def _elementwise(self, node: Node, first: _Carried) -> _Carried:
        slot = self._sources.meaning(self._path, None, None)[0]
        alone = Node(node.step, (Leaf("", first.shape()),), first.shape())
        found = self._sources.single(self._path, slot, alone)
        first.approximate.extend(found.approximate)
        if isinstance(found.made, Node):
            return self._next(first, found.made.step, first.whole)
        return first


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Which neighbouring dimensions of one shape become which of another."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        if i < len(old):
            left.append(i)
            i += 1
        if j < len(new):
            right.append(j)
            j += 1
        while prod(old[dim] for dim in left) != prod(new[dim] for dim in right):
            if prod(old[dim] for dim in left) < prod(new[dim] for dim in right) and i < len(old):
                left.append(i)
                i += 1
            elif j < len(new):
                right.append(j)
                j += 1
            else:
                break
        blocks.append((left, right))
    return blocks


def raised_vector(sources: Sources, joined: JoinedSlot, outcome: Outcome) -> dict[SlotPath, Outcome]:
    """The means that replace the full second moment of vectors when they become a matrix; none for other slots.

    Args:
        sources: What is known of the checkpoint's parameters.
        joined: An elementwise slot.
        outcome: What becomes of it as such.

    Raises:
        Refusal: It is such a moment, and the shape of the result is not known.
    """
    path = joined.path
    if not sources.factors() or path[-1] != sources.vector_moment():
        return {}
    shape = _known_shape(joined)
    if len(shape) < 2:
        return {}
    value = outcome.made or sources.translate(path, Slot("like_param", 2), joined.expression).made
    names, squeezed = sources.mean_slots()
    made = {}
    for name, dim in zip(names, (len(shape) - 1, len(shape) - 2), strict=True):
        kept = tuple(1 if place == dim else size for place, size in enumerate(shape))
        mean: Expr = Node(ex.Mean((dim,)), (value,), kept)
        if squeezed:
            mean = ex.reshaped(mean, (*shape[:dim], *shape[dim + 1 :]))
        kind: SlotKind = "row" if name == names[0] else "col"
        made[(*path[:-1], name)] = Outcome(outcome.level, outcome.reason, kind, False, mean)
    return made
