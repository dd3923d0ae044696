"""Operations on the dimensions of each tensor."""

# ruff: noqa: ARG002, ARG003, D102 - all operations are called alike, and `Operation` says how

from __future__ import annotations

from collections.abc import Sequence
from math import prod
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
)
from optimstate.record import field

__all__ = ["PermuteDims", "Repeat", "ReshapeDims", "Resize", "Transpose"]


def fill_of(value: Any, words: Sequence[str] = ("zeros", "mean", "wrap", "live")) -> ex.Fill | None:
    """What `fill` says, of policies in these words or numbers; None where it says nothing."""
    policies = list(value.values()) if isinstance(value, dict) else [value]
    if not policies or not all(is_number(policy) or policy in words for policy in policies):
        return None
    if not isinstance(value, dict):
        return ex.Fill(value)
    if any(policy == "live" and name not in ("param", "default") for name, policy in value.items()):
        return None  # the live model has values of parameters, none of slots
    return ex.Fill(value.get("default"), {key: item for key, item in value.items() if key != "default"})


def written_fill(fill: ex.Fill) -> Any:
    """A fill as a plan file has it."""
    if not fill.by_name:
        return fill.default
    return {**({} if fill.default is None else {"default": fill.default}), **fill.by_name}


class PermuteDims(Operation):
    """Dimensions in another order; those beyond the ones listed stay where they are."""

    KEY = "permute"
    EXAMPLE = "permute = [1, 0, 2]"
    dims: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        return cls(tuple(value)) if are_integers(value) and sorted(value) == list(range(len(value))) else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
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
    EXAMPLE = "transpose = true, or transpose = [0, 2]"
    dims: tuple[int, int] = (-2, -1)

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if value is True:
            return cls()
        return cls((value[0], value[1])) if are_integers(value) and len(value) == 2 else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
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
    EXAMPLE = "reshape = { dim = 0, to = [8, 3, 64] }, or reshape = [64, -1]"
    to: Shape = ()
    dim: int | None = None
    old: Shape = ()

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if isinstance(value, list) and all(map(is_integer, value)):
            return cls(tuple(value)) if value.count(-1) < 2 and min(value, default=0) >= -1 else None
        if not is_table(value, {"dim", "to"}, {"from"}) or not is_integer(value["dim"]):
            return None
        old, new = value.get("from", []), value["to"]
        if not (
            isinstance(old, list) and isinstance(new, list) and all(map(is_integer, old + new)) and new.count(-1) < 2
        ):
            return None
        return cls(tuple(new), value["dim"], tuple(old)) if min(old + new, default=0) >= -1 else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        first, old = self._exchanged(shape)
        return ex.reshaped(tensor, (*shape[:first], *self._sizes(prod(old), shape), *shape[first + len(old) :]))

    def _exchanged(self, shape: Shape) -> tuple[int, Shape]:
        if self.dim is None:
            return 0, shape
        first = counted(self.KEY, self.dim, shape)
        old = self.old or (shape[first],)
        if shape[first : first + len(old)] != old:
            found = list(shape[first : first + len(old)])
            raise Misfit(f"reshape: dimensions {self.dim}.. of shape {list(shape)} are {found}, not {list(old)}")
        return first, old

    def _sizes(self, count: int, shape: Shape) -> Shape:
        known = prod(size for size in self.to if size != -1)
        sizes = tuple(size if size != -1 else count // max(known, 1) for size in self.to)
        if prod(sizes) != count:
            raise Misfit(f"reshape: {list(self.to)} does not have the {count} elements of shape {list(shape)}")
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


class Resize(Operation):
    """A dimension cut, or grown at its end by rows that `fill` describes."""

    KEY = "resize"
    EXAMPLE = 'resize = { dim = 0, size = 50304, fill = "mean" }, or resize = [50304, 768]'
    dim: int = 0
    size: int = 0
    fill: ex.Fill = field(default_factory=ex.Fill)

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if are_integers(value) and min(value) >= 0:
            return [cls(dim, size) for dim, size in enumerate(value)]
        if (
            not is_table(value, {"dim", "size"}, {"fill"})
            or not is_integer(value["dim"])
            or not is_integer(value["size"])
        ):
            return None
        fill = fill_of(value["fill"]) if "fill" in value else ex.Fill()
        return [cls(value["dim"], value["size"], fill)] if fill is not None and value["size"] >= 0 else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
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
        return table if self.fill == ex.Fill() else {**table, "fill": written_fill(self.fill)}


class Repeat(Operation):
    """A dimension repeated as a whole, or every row of it."""

    KEY = "repeat"
    EXAMPLE = "repeat = { dim = 0, times = 2, each = true }"
    dim: int = 0
    times: int = 1
    each: bool = False

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if (
            not is_table(value, {"dim", "times"}, {"each"})
            or not is_integer(value["dim"])
            or not is_integer(value["times"])
        ):
            return None
        each = value.get("each", False)
        return cls(value["dim"], value["times"], each) if value["times"] >= 1 and isinstance(each, bool) else None

    def _sized(self, tensor: Expr, shape: Shape) -> Expr:
        dim = counted(self.KEY, self.dim, shape)
        new = (*shape[:dim], shape[dim] * self.times, *shape[dim + 1 :])
        return Node(ex.Tile(dim, self.times, self.each), (tensor,), new)

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("repeat cannot be inverted: its copies would have to become one again")

    def value(self) -> Any:
        table: dict[str, Any] = {"dim": self.dim, "times": self.times}
        return {**table, "each": True} if self.each else table
