"""Operations that make one tensor of many, or many of one."""

# ruff: noqa: ARG002, ARG003, D102 - all operations are called alike, and `Operation` says how

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.plan.language.base import (
    Irreversible,
    Misfit,
    Operation,
    are_integers,
    counted,
    is_integer,
    is_number,
    is_table,
    known_shape,
    listed,
    unsized,
)

__all__ = ["Average", "Concat", "Mean", "Split", "Stack", "Unstack"]


class _Joining(Operation):
    """Many tensors made one along a dimension."""

    JOINS = True
    dim: int = 0

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        return cls(value) if is_integer(value) else None

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
    EXAMPLE = "concat = 0"

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
    EXAMPLE = "stack = 0"

    def _joined(self, tensors: Sequence[Expr], shapes: Sequence[Shape]) -> Expr:
        if len(set(shapes)) > 1:
            raise Misfit(f"stack: the shapes {listed(shapes)} differ")
        dim = counted(self.KEY, self.dim, shapes[0], room=1)
        single = (*shapes[0][:dim], 1, *shapes[0][dim:])
        raised = tuple(ex.reshaped(tensor, single) for tensor in tensors)
        return Node(ex.Cat(dim), raised, (*single[:dim], len(raised), *single[dim + 1 :]))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [Unstack(self.dim)]


class Mean(_Joining):
    """The mean over a dimension, which disappears; of several tensors, their mean place by place."""

    KEY = "mean"
    EXAMPLE = "mean = 1"

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        (whole,) = Stack(self.dim).apply(tensors, targets) if len(tensors) > 1 else tensors
        shape = known_shape(whole)
        if shape is None:
            return [unsized(self.KEY, whole)]
        dim = counted(self.KEY, self.dim, shape)
        if not shape[dim]:
            raise Misfit(f"mean: dimension {self.dim} of shape {list(shape)} is empty")
        mean = Node(ex.Mean((dim,)), (whole,), (*shape[:dim], 1, *shape[dim + 1 :]))
        return [ex.reshaped(mean, (*shape[:dim], *shape[dim + 1 :]))]

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("a mean does not keep what it is made of")


class Average(Operation):
    """The sum of several tensors, each times its weight.

    Where the weights are parts of a whole, elementwise slots are averaged alike: no first update is then larger than
    the largest that a source would have made. With other weights nothing bounds it, so that no state is left.
    """

    KEY = "average"
    EXAMPLE = "average = [0.25, 0.25, 0.5]"
    JOINS = True
    weights: tuple[float, ...] = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if not isinstance(value, list) or not value or not all(map(is_number, value)):
            return None
        return cls(tuple(map(float, value)))

    @property
    def is_convex(self) -> bool:
        """Whether the weights are parts of a whole."""
        return min(self.weights) >= 0 and abs(sum(self.weights) - 1) < 1e-6

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        if len(tensors) != len(self.weights):
            raise Misfit(f"average has {len(self.weights)} weights for {len(tensors)} tensors")
        shapes = [known_shape(tensor) for tensor in tensors]
        if None in shapes:
            return [unsized(self.KEY, *tensors)]
        if len(set(shapes)) > 1:
            raise Misfit(f"average: the shapes {listed([shape for shape in shapes if shape is not None])} differ")
        made = Node(ex.Mean((), self.weights), tuple(tensors), shapes[0])
        return [made if self.is_convex else Node(ex.Fresh(), (made,), made.shape)]

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("an average does not keep what it is made of")

    def value(self) -> Any:
        return list(self.weights)


class Split(Operation):
    """One tensor cut along a dimension into parts, equal ones unless `sizes` are given."""

    KEY = "split"
    EXAMPLE = "split = 0, or split = { dim = 0, sizes = [512, 128, 128] }"
    CUTS = True
    dim: int = 0
    sizes: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if is_integer(value):
            return cls(value)
        if (
            is_table(value, {"dim", "sizes"})
            and is_integer(value["dim"])
            and are_integers(value["sizes"])
            and min(value["sizes"]) >= 0
        ):
            return cls(value["dim"], tuple(value["sizes"]))
        return None

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
                    f"split: dimension {self.dim} of shape {list(shape)} is not a multiple of {count}; "
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
    """One tensor cut into the rows of a dimension, which disappears."""

    KEY = "unstack"
    EXAMPLE = "unstack = 0"
    CUTS = True
    dim: int = 0

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        return cls(value) if is_integer(value) else None

    def apply(self, tensors: Sequence[Expr], targets: int) -> list[Expr]:
        return [part for tensor in tensors for part in self._parts(tensor, targets // len(tensors))]

    def _parts(self, tensor: Expr, count: int) -> list[Expr]:
        shape = known_shape(tensor)
        if shape is None:
            return [unsized(self.KEY, tensor) for _ in range(count)]
        dim = counted(self.KEY, self.dim, shape)
        if shape[dim] != count:
            raise Misfit(
                f"unstack: dimension {self.dim} of shape {list(shape)} has {shape[dim]} rows for {count} names"
            )
        one, without = (*shape[:dim], 1, *shape[dim + 1 :]), (*shape[:dim], *shape[dim + 1 :])
        return [ex.reshaped(Node(ex.Narrow(dim, index, 1), (tensor,), one), without) for index in range(shape[dim])]

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [Stack(self.dim)]

    def value(self) -> Any:
        return self.dim
