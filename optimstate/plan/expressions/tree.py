"""How one tensor of the result is made from tensors of the checkpoint: a small tree of layout steps.

The same expression says what becomes of a parameter and of each of its slots; `slots` translates it where a slot is not
laid out like its parameter. Nothing here touches elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

from optimstate.record import Record

__all__ = [
    "LAYOUT",
    "Add",
    "Cast",
    "Cat",
    "Expr",
    "Fill",
    "Fresh",
    "Full",
    "Leaf",
    "Mean",
    "Multiply",
    "Narrow",
    "Node",
    "Pad",
    "Permute",
    "Product",
    "Reshape",
    "Scale",
    "Shape",
    "Shift",
    "Step",
    "Take",
    "Tile",
    "Unsized",
    "kept_places",
    "leaves",
    "reshaped",
    "simplified",
    "steps",
    "takes_live",
]

Shape = tuple[int, ...]


class Cat(Record):
    """Inputs one after the other along `dim`; with weights (see `Mean`) nothing else."""

    dim: int


class Narrow(Record):
    """`length` rows of `dim` from `start`, `step` apart."""

    dim: int
    start: int
    length: int
    step: int = 1


class Take(Record):
    """Rows of `dim` by their indices, in this order."""

    dim: int
    index: tuple[int, ...]


class Permute(Record):
    """Dimension `i` of the result is dimension `dims[i]` of the input."""

    dims: tuple[int, ...]


class Reshape(Record):
    """The same elements in row-major order in another shape."""

    shape: Shape


class Fill(Record):
    """What rows of a tensor hold: `zeros`, `mean` (of the old ones), `wrap` (the old ones again), `live`, a number.

    `live` is the value that the live model has there; a slot is then filled as if nothing were said.

    Attributes:
        default: For every tensor without an entry of its own; None means 0 for parameters and slots of odd degree, the
            mean for slots of even degree.
        by_name: By slot name; `param` is the parameter.
    """

    default: str | float | None = None
    by_name: Mapping[str, str | float] | None = None

    def of(self, name: str) -> str | float | None:
        """The policy for a slot, or for `param`."""
        found = (self.by_name or {}).get(name, self.default)
        return None if found == "live" and name != "param" else found


class Pad(Record):
    """`count` new rows at the end of `dim`."""

    dim: int
    count: int
    fill: Fill


class Full(Record):
    """The same shape with a value in every element: that of `fill` for the tensor, which stays as it is without one."""

    fill: Fill


class Tile(Record):
    """`dim` repeated: the whole `times` times, or with `each` every row `times` times."""

    dim: int
    times: int
    each: bool = False


class Scale(Record):
    """The parameter times `param` and its gradient times `grad`: a slot of degree d is multiplied by grad**d."""

    param: float
    grad: float


class Shift(Record):
    """The parameter plus `param`; its gradient stays as it is."""

    param: float


class Cast(Record):
    """Other dtypes, by slot name; `param` is the parameter, `slots` every floating slot without an entry."""

    dtypes: Mapping[str, str]

    def of(self, name: str) -> str | None:
        """The dtype asked for, or None."""
        return self.dtypes.get(name) or (None if name == "param" else self.dtypes.get("slots"))


class Fresh(Record):
    """The parameter as it is; its optimizer state is left behind."""


class Unsized(Record):
    """A step on a tensor whose shape nobody knows; it can be carried along only where there is nothing to move."""

    what: str


# The steps below appear only in expressions of slots, but for `Mean`.


class Multiply(Record):
    """Every element times a factor."""

    factor: float


class Add(Record):
    """Every element plus a number."""

    number: float


class Mean(Record):
    """The mean over dimensions, kept as size 1; several inputs are averaged by `weights`."""

    dims: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


class Product(Record):
    """The outer product of a mean over columns and one over rows, over their common mean."""


Layout = Cat | Narrow | Take | Permute | Reshape | Tile
Step = Layout | Pad | Full | Scale | Shift | Cast | Fresh | Unsized | Multiply | Add | Mean | Product


LAYOUT = Layout
"""The steps that only move elements, the same in a parameter and in every slot of its shape."""


class Leaf(NamedTuple):
    """A parameter of the checkpoint; with `slot`, that slot of it.

    Attributes:
        name: The parameter.
        shape: None where the checkpoint does not tell.
        slot: Keys from the parameter's state to the value; empty for the parameter itself.
    """

    name: str
    shape: Shape | None
    slot: tuple[str | int, ...] = ()


class Node:
    """A step applied to inputs. Shared inputs are the same object, so that they are computed once."""

    __slots__ = ("inputs", "shape", "step")

    def __init__(self, step: Step, inputs: tuple[Expr, ...], shape: Shape | None) -> None:
        self.step, self.inputs, self.shape = step, inputs, shape

    def __repr__(self) -> str:
        return f"Node({self.step}, {self.inputs}, {self.shape})"


Expr = Leaf | Node


def leaves(expression: Expr) -> list[Leaf]:
    """The sources in order; one that is used twice comes twice."""
    found: list[Leaf] = []
    stack: list[Expr] = [expression]
    while stack:
        item = stack.pop()
        if isinstance(item, Leaf):
            found.append(item)
        else:
            stack.extend(item.inputs[::-1])
    return found


def steps(expression: Expr) -> Iterator[Step]:
    """Every step, from the last to the first."""
    stack: list[Expr] = [expression]
    while stack:
        found = stack.pop()
        if isinstance(found, Node):
            yield found.step
            stack.extend(reversed(found.inputs))


def takes_live(expression: Expr) -> bool:
    """Whether a translated expression has elements that hold the live model's values."""
    return any(isinstance(step, Pad | Full) and step.fill.default == "live" for step in steps(expression))


def kept_places(expression: Expr) -> Expr:
    """An expression that is 1 where a translated one has a value of its own, and 0 where the live model's is to be.

    Its leaves hold ones.
    """
    if isinstance(expression, Leaf):
        return expression
    inputs = tuple(map(kept_places, expression.inputs))
    match expression.step:
        case Multiply() | Add() | Cast():
            return inputs[0]
        case Pad(dim, count, fill):
            return Node(Pad(dim, count, Fill(float(fill.default != "live"))), inputs, expression.shape)
        case Full(fill):
            return Node(Full(Fill(float(fill.default != "live"))), inputs, expression.shape)
        case step:
            return Node(step, inputs, expression.shape)


def reshaped(expression: Expr, shape: Shape) -> Expr:
    """The expression in another shape of as many elements."""
    if expression.shape == shape:
        return expression
    assert expression.shape is None or prod(expression.shape) == prod(shape)
    return Node(Reshape(shape), (expression,), shape)


def simplified(expression: Expr) -> Expr:
    """The expression without steps that undo one another: a part of what was joined that is one of the inputs, ..."""
    if isinstance(expression, Leaf):
        return expression
    inputs = tuple(map(simplified, expression.inputs))
    first, shape = inputs[0], expression.shape
    inner, below = (first.step, first.inputs) if isinstance(first, Node) else (None, ())
    match expression.step, inner:
        case Narrow() as cut, _:
            return _narrowed(cut, first) or Node(cut, inputs, shape)
        case Cat() as joined, _:
            return _rejoined(joined, inputs, shape)
        case Reshape() as step, _:
            while isinstance(first, Node) and isinstance(first.step, Reshape):
                first = first.inputs[0]
            return first if first.shape == shape else Node(step, (first,), shape)
        case Permute(dims), Permute(before):
            return _permuted(tuple(before[dim] for dim in dims), below[0], shape)
        case Permute(dims), _:
            return _permuted(dims, first, shape)
        case Take(dim, index), Take(same, before) if dim == same:
            return _taken(dim, tuple(before[row] for row in index), below[0], shape)
        case Take(dim, index), _:
            return _taken(dim, index, first, shape)
        case Shift(param), Shift(before):
            return Node(Shift(before + param), below, shape) if before + param else below[0]
        case Scale(param, grad), Scale(before, grad_before):
            both = Scale(before * param, grad_before * grad)
            return below[0] if both == Scale(1.0, 1.0) else Node(both, below, shape)
        case step, _:
            return Node(step, inputs, shape)


def _permuted(dims: tuple[int, ...], tensor: Expr, shape: Shape | None) -> Expr:
    return tensor if dims == tuple(range(len(dims))) else Node(Permute(dims), (tensor,), shape)


def _taken(dim: int, index: tuple[int, ...], tensor: Expr, shape: Shape | None) -> Expr:
    everything = tensor.shape is not None and index == tuple(range(tensor.shape[dim]))
    return tensor if everything else Node(Take(dim, index), (tensor,), shape)


def _narrowed(cut: Narrow, tensor: Expr) -> Expr | None:
    """What is cut out, where that is the whole tensor or one of those it is joined from; else None."""
    if cut.step != 1:
        return None
    if tensor.shape is not None and cut.length == tensor.shape[cut.dim]:
        return tensor
    if isinstance(tensor, Node) and tensor.step == Cat(cut.dim):
        start = 0
        for part in tensor.inputs:
            size = part.shape[cut.dim] if part.shape else 0
            if (start, size) == (cut.start, cut.length):
                return part
            start += size
    return None


def _rejoined(step: Cat, inputs: tuple[Expr, ...], shape: Shape | None) -> Expr:
    """What was cut into exactly these inputs, or the inputs joined."""
    start = 0
    whole: Expr | None = None
    for item in inputs:
        cut = item.step if isinstance(item, Node) else None
        if not isinstance(item, Node) or not isinstance(cut, Narrow):
            return Node(step, inputs, shape)
        if (cut.dim, cut.start, cut.step) != (step.dim, start, 1) or not _same(item.inputs[0], whole):
            return Node(step, inputs, shape)
        whole, start = item.inputs[0], start + cut.length
    return whole if whole is not None and whole.shape == shape else Node(step, inputs, shape)


def _same(one: Expr, other: Expr | None) -> bool:
    """Whether two expressions are the same step by step; anything is the same as None."""
    if other is None or one is other:
        return True
    if isinstance(one, Leaf) or isinstance(other, Leaf):
        return one == other
    return (
        one.step == other.step
        and one.shape == other.shape
        and all(map(_same, one.inputs, other.inputs))
        and len(one.inputs) == len(other.inputs)
    )
