"""The closed set of operations a rule can name: how each is written, what it does to shapes, and what undoes it.

An operation takes the tensors a rule has in hand (all that it gathered, then what the operation before gave) and gives
tensors: `concat` and `stack` make one of many, `split` and `unstack` many of one, the others change each by itself.
"""

# ruff: noqa: ARG002 - all operations are called alike

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.plan.language.operation import Irreversible, Misfit, Operation, counted, known_shape, listed, unsized
from optimstate.record import field

__all__ = ["OPERATIONS", "Operation"]


class _Joining(Operation):
    """Many tensors made one along a dimension."""

    JOINS = True
    dim: int = 0

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        shapes = [known_shape(tensor) for tensor in tensors]
        known = [shape for shape in shapes if shape is not None]
        return [self._joined(tensors, known) if len(known) == len(shapes) else unsized(self.KEY, *tensors)]

    def _joined(self, tensors: Sequence[Expr], shapes: Sequence[Shape]) -> Expr:
        """The tensors, whose shapes these are, as one."""
        raise NotImplementedError

    def value(self) -> Any:
        return self.dim


class Concat(_Joining):
    """Many tensors one after the other along a dimension."""

    KEY = "concat"

    def _joined(self, tensors: Sequence[Expr], shapes: Sequence[Shape]) -> Expr:
        dim = counted(self.KEY, self.dim, shapes[0])
        rest = {(*shape[:dim], *shape[dim + 1 :]) if len(shape) > dim else None for shape in shapes}
        if len(rest) > 1:
            raise Misfit(f"concat along dimension {self.dim}: the shapes {listed(shapes)} differ elsewhere too")
        size = sum(shape[dim] for shape in shapes)
        return Node(ex.Cat(dim), tuple(tensors), (*shapes[0][:dim], size, *shapes[0][dim + 1 :]))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        shapes = [shape for shape in before if shape is not None]
        if len(shapes) < len(before) or not shapes:
            return [Split(self.dim)]
        sizes = tuple(shape[self.dim] for shape in shapes)
        return [Split(self.dim, () if len(set(sizes)) == 1 else sizes)]


class Stack(_Joining):
    """Many tensors of one shape along a new dimension."""

    KEY = "stack"

    def _joined(self, tensors: Sequence[Expr], shapes: Sequence[Shape]) -> Expr:
        if len(set(shapes)) > 1:
            raise Misfit(f"stack: the shapes {listed(shapes)} differ")
        dim = counted(self.KEY, self.dim, shapes[0], room=1)
        single = (*shapes[0][:dim], 1, *shapes[0][dim:])
        raised = tuple(ex.reshaped(tensor, single) for tensor in tensors)
        return Node(ex.Cat(dim), raised, (*single[:dim], len(raised), *single[dim + 1 :]))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [Unstack(self.dim)]


class Split(Operation):
    """One tensor cut along a dimension into parts, equal ones unless `sizes` are given."""

    KEY = "split"
    CUTS = True
    dim: int = 0
    sizes: tuple[int, ...] = ()

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        count = len(self.sizes) or targets // len(tensors)
        return [part for tensor in tensors for part in self._parts(tensor, count)]

    def _parts(self, tensor: Expr, count: int) -> list[Expr]:
        shape = known_shape(tensor)
        if shape is None:
            return [unsized(self.KEY, tensor) for _ in range(count)]
        dim = counted(self.KEY, self.dim, shape)
        sizes = self.sizes
        if not sizes:
            if count < 1 or shape[dim] % count:
                raise Misfit(
                    f"split: dimension {self.dim} of shape {list(shape)} is no multiple of {count}; "
                    f"say the parts: split = {{ dim = {self.dim}, sizes = [...] }}"
                )
            sizes = (shape[dim] // count,) * count
        if sum(sizes) != shape[dim]:
            raise Misfit(
                f"split: the sizes {list(sizes)} sum to {sum(sizes)}, "
                f"but dimension {self.dim} of shape {list(shape)} has {shape[dim]}"
            )
        parts: list[Expr] = []
        start = 0
        for size in sizes:
            parts.append(Node(ex.Narrow(dim, start, size), (tensor,), (*shape[:dim], size, *shape[dim + 1 :])))
            start += size
        return parts

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [Concat(self.dim)]

    def value(self) -> Any:
        return {"dim": self.dim, "sizes": list(self.sizes)} if self.sizes else self.dim


class Unstack(Operation):
    """One tensor cut into the places of a dimension, which disappears."""

    KEY = "unstack"
    CUTS = True
    dim: int = 0

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        return [part for tensor in tensors for part in self._parts(tensor, targets // len(tensors))]

    def _parts(self, tensor: Expr, count: int) -> list[Expr]:
        shape = known_shape(tensor)
        if shape is None:
            return [unsized(self.KEY, tensor) for _ in range(count)]
        dim = counted(self.KEY, self.dim, shape)
        if shape[dim] != count:
            raise Misfit(
                f"unstack: dimension {self.dim} of shape {list(shape)} has {shape[dim]} places for {count} names"
            )
        one, without = (*shape[:dim], 1, *shape[dim + 1 :]), (*shape[:dim], *shape[dim + 1 :])
        return [ex.reshaped(Node(ex.Narrow(dim, index, 1), (tensor,), one), without) for index in range(shape[dim])]

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [Stack(self.dim)]

    def value(self) -> Any:
        return self.dim


class PermuteDims(Operation):
    """Dimensions in another order; those beyond the ones listed stay where they are."""

    KEY = "permute"
    dims: tuple[int, ...] = ()

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        if len(self.dims) > len(shape):
            raise Misfit(f"permute: {list(self.dims)} has more dimensions than shape {list(shape)}")
        dims = (*self.dims, *range(len(self.dims), len(shape)))
        return Node(ex.Permute(dims), (tensor,), tuple(shape[dim] for dim in dims))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [PermuteDims(tuple(self.dims.index(place) for place in range(len(self.dims))))]

    def value(self) -> Any:
        return list(self.dims)


class Transpose(Operation):
    """Two dimensions exchanged: the last two unless others are named."""

    KEY = "transpose"
    dims: tuple[int, int] = (-2, -1)

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        one, other = (counted(self.KEY, dim, shape) for dim in self.dims)
        dims = list(range(len(shape)))
        dims[one], dims[other] = other, one
        return Node(ex.Permute(tuple(dims)), (tensor,), tuple(shape[dim] for dim in dims))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [self]

    def value(self) -> Any:
        return True if self.dims == (-2, -1) else list(self.dims)


class ReshapeDims(Operation):
    """Neighbouring dimensions exchanged for others of as many elements; the whole shape without `dim`.

    Attributes:
        to: The new sizes; one may be -1.
        dim: The first of the dimensions that are exchanged; None for all.
        old: Their sizes; empty for the one at `dim`, whatever its size.
    """

    KEY = "reshape"
    to: Shape = ()
    dim: int | None = None
    old: Shape = ()

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        first, old = self._exchanged(shape)
        return ex.reshaped(tensor, (*shape[:first], *self._sizes(prod(old), shape), *shape[first + len(old) :]))

    def _exchanged(self, shape: Shape) -> tuple[int, Shape]:
        if self.dim is None:
            return 0, shape
        first = counted(self.KEY, self.dim, shape)
        old = self.old or (shape[first],)
        if shape[first : first + len(old)] != old:
            raise Misfit(f"reshape: shape {list(shape)} has not {list(old)} at dimension {self.dim}")
        return first, old

    def _sizes(self, count: int, shape: Shape) -> Shape:
        known = prod(size for size in self.to if size != -1)
        sizes = tuple(size if size != -1 else count // max(known, 1) for size in self.to)
        if prod(sizes) != count:
            raise Misfit(f"reshape: {list(self.to)} does not have the {count} places of shape {list(shape)}")
        return sizes

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        shapes = set(before)
        if self.dim is not None and self.old and -1 not in self.to:
            return [ReshapeDims(self.old, self.dim, self.to)]
        if self.dim is not None and -1 not in self.to:
            return [ReshapeDims((prod(self.to),), self.dim, self.to)]
        if len(shapes) == 1 and None not in shapes:
            (shape,) = shapes
            assert shape is not None
            first, old = self._exchanged(shape)
            new = self._sizes(prod(old), shape)
            return [ReshapeDims(old, first, new) if self.dim is not None else ReshapeDims(shape)]
        raise Irreversible("reshape does not say what the shape was; give names with shapes", needs_names=True)

    def value(self) -> Any:
        if self.dim is None:
            return list(self.to)
        table: dict[str, Any] = {"dim": self.dim, "to": list(self.to)}
        return {"dim": self.dim, "from": list(self.old), "to": list(self.to)} if self.old else table


class Slice(Operation):
    """The places [start, stop) of a dimension, `step` apart; the others are lost."""

    KEY = "slice"
    dim: int = 0
    start: int = 0
    stop: int | None = None
    step: int = 1

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        dim = counted(self.KEY, self.dim, shape)
        places = range(shape[dim])[self.start : self.stop : self.step]
        if not places or (self.stop is not None and self.stop > shape[dim]):
            raise Misfit(f"slice: [{self.start}, {self.stop}) is not inside dimension {dim} of shape {list(shape)}")
        step = ex.Narrow(dim, places.start, len(places), self.step)
        return Node(step, (tensor,), (*shape[:dim], len(places), *shape[dim + 1 :]))

    def value(self) -> Any:
        table = {"dim": self.dim, "start": self.start, "stop": self.stop, "step": self.step}
        defaults = {"start": 0, "stop": None, "step": 1}
        return {key: value for key, value in table.items() if key == "dim" or value != defaults[key]}


class Resize(Operation):
    """A dimension cut, or grown at its end by places that `fill` describes."""

    KEY = "resize"
    dim: int = 0
    size: int = 0
    fill: ex.Fill = field(default_factory=ex.Fill)

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        dim = counted(self.KEY, self.dim, shape)
        new = (*shape[:dim], self.size, *shape[dim + 1 :])
        if self.size == shape[dim]:
            return tensor
        if self.size < shape[dim]:
            return Node(ex.Narrow(dim, 0, self.size), (tensor,), new)
        return Node(ex.Pad(dim, self.size - shape[dim], self.fill), (tensor,), new)

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        sizes = {None if shape is None else shape[self.dim] for shape in before}
        size = sizes.pop() if len(sizes) == 1 else None
        if size is None:
            raise Irreversible("resize does not say what the size was; give names with shapes", needs_names=True)
        if size > self.size:
            raise Irreversible(f"resize cuts {size - self.size} rows off")
        return [Resize(self.dim, size)]

    def value(self) -> Any:
        table: dict[str, Any] = {"dim": self.dim, "size": self.size}
        if self.fill.by_name:
            default = {} if self.fill.default is None else {"default": self.fill.default}
            table["fill"] = {**default, **self.fill.by_name}
        elif self.fill.default is not None:
            table["fill"] = self.fill.default
        return table


class Repeat(Operation):
    """A dimension repeated as a whole, or every place of it."""

    KEY = "repeat"
    dim: int = 0
    times: int = 1
    each: bool = False

    def _each(self, tensor: Expr) -> Expr:
        shape = known_shape(tensor)
        if shape is None:
            return unsized(self.KEY, tensor)
        dim = counted(self.KEY, self.dim, shape)
        new = (*shape[:dim], shape[dim] * self.times, *shape[dim + 1 :])
        return Node(ex.Tile(dim, self.times, self.each), (tensor,), new)

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("repeat cannot be inverted: its copies would have to become one again")

    def value(self) -> Any:
        table: dict[str, Any] = {"dim": self.dim, "times": self.times}
        return {**table, "each": True} if self.each else table


class ScaleBy(Operation):
    """The parameter times `param`, every slot of degree d times grad**d."""

    KEY = "scale"
    param: float = 1.0
    grad: float = 1.0

    def _each(self, tensor: Expr) -> Expr:
        return Node(ex.Scale(self.param, self.grad), (tensor,), known_shape(tensor))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [ScaleBy(1 / self.param, 1 / self.grad)]

    def value(self) -> Any:
        return {"param": self.param, "grad": self.grad}


class CastTo(Operation):
    """Other dtypes, by slot; `param` is the parameter, `slots` every floating slot."""

    KEY = "cast"
    dtypes: Mapping[str, str] = field(default_factory=dict)

    def _each(self, tensor: Expr) -> Expr:
        return Node(ex.Cast(self.dtypes), (tensor,), known_shape(tensor))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("cast does not keep what it rounds off")

    def value(self) -> Any:
        return self.dtypes["param"] if set(self.dtypes) == {"param"} else dict(self.dtypes)


OPERATIONS: dict[str, type[Operation]] = {
    kind.KEY: kind
    for kind in (
        Concat,
        Stack,
        Split,
        Unstack,
        Transpose,
        PermuteDims,
        ReshapeDims,
        Slice,
        Resize,
        Repeat,
        ScaleBy,
        CastTo,
    )
}
