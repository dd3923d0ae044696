"""Operations on the values of each tensor."""

# ruff: noqa: ARG002, ARG003, D102 - all operations are called alike, and `Operation` says how

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.plan.language.base import (
    Irreversible,
    Operation,
    is_number,
    is_table,
    known_shape,
)
from optimstate.plan.language.dimensions import fill_of, written_fill
from optimstate.record import field
from optimstate.tensors.dtypes import DTYPES

__all__ = ["CastTo", "FillWith", "ScaleBy", "ShiftBy"]


class ScaleBy(Operation):
    """The parameter times `param`, every slot of degree d times grad**d."""

    KEY = "scale"
    EXAMPLE = "scale = { param = 0.5, grad = 2.0 }, or scale = 0.5"
    param: float = 1.0
    grad: float = 1.0

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if is_number(value):
            return cls(float(value), 1 / value) if value else FillWith(ex.Fill(0.0))
        if is_table(value, {"param"}) and is_number(value["param"]) and not value["param"]:
            return FillWith(ex.Fill(0.0))
        if not is_table(value, set(), {"param", "grad"}) or not all(
            is_number(item) and item for item in value.values()
        ):
            return None
        return cls(float(value.get("param", 1)), float(value.get("grad", 1))) if value else None

    def _each(self, tensor: Expr) -> Expr:
        return Node(ex.Scale(self.param, self.grad), (tensor,), known_shape(tensor))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [ScaleBy(1 / self.param, 1 / self.grad)]

    def value(self) -> Any:
        return {"param": self.param, "grad": self.grad}


class ShiftBy(Operation):
    """A number added to every element of the parameter, and of slots that hold weights; gradients do not change."""

    KEY = "shift"
    EXAMPLE = "shift = 1.0, or shift = { param = 1.0 }"
    param: float = 0.0

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        if isinstance(value, dict):
            value = value["param"] if is_table(value, {"param"}) else None
        return cls(float(value)) if is_number(value) else None

    def _each(self, tensor: Expr) -> Expr:
        return Node(ex.Shift(self.param), (tensor,), known_shape(tensor))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        return [ShiftBy(-self.param)]

    def value(self) -> Any:
        return {"param": self.param}


class FillWith(Operation):
    """A value in every element of a parameter; of a slot too where the table says one, otherwise no state is left."""

    KEY = "fill"
    EXAMPLE = 'fill = 0.0, or fill = { param = "mean", exp_avg = "zeros", exp_avg_sq = "mean" }'
    fill: ex.Fill = field(default_factory=ex.Fill)

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        fill = fill_of(value, ("zeros", "mean", "live"))
        return None if fill is None else cls(fill)

    def _each(self, tensor: Expr) -> Expr:
        made = Node(ex.Full(self.fill), (tensor,), known_shape(tensor))
        by_name = self.fill.by_name
        keeps_slots = by_name is not None and (self.fill.default is not None or by_name.keys() != {"param"})
        return made if keeps_slots else Node(ex.Fresh(), (made,), made.shape)

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("fill does not keep what was there")

    def value(self) -> Any:
        return written_fill(self.fill)


class CastTo(Operation):
    """Other dtypes, by slot; `param` is the parameter, `slots` every floating slot."""

    KEY = "cast"
    EXAMPLE = 'cast = "bfloat16", or cast = { param = "bfloat16", exp_avg = "float32" }'
    dtypes: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, folder: Path) -> Operation | list[Operation] | None:
        dtypes = {"param": value} if isinstance(value, str) else value
        if not isinstance(dtypes, dict) or not dtypes:
            return None
        return cls(dtypes) if all(dtype in DTYPES for dtype in dtypes.values()) else None

    def _each(self, tensor: Expr) -> Expr:
        return Node(ex.Cast(self.dtypes), (tensor,), known_shape(tensor))

    def inverse(self, before: Sequence[Shape | None]) -> list[Operation]:
        raise Irreversible("cast does not keep what it rounds off")

    def value(self) -> Any:
        return self.dtypes["param"] if set(self.dtypes) == {"param"} else dict(self.dtypes)
