"""A parameter's expressions translated for a slot of the same layout: scaled by its degree, filled by its policy."""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Node, Shape
from optimstate.plan.slots.outcomes import Outcome, Refusal, SlotPath
from optimstate.record import Record
from optimstate.state.algorithms.slots import MASTERS, WEIGHT, Slot, SlotKind
from optimstate.tensors.dtypes import INEXACT

__all__ = ["Translation", "Translator", "translated", "translation_outcome"]


_FILLS = {
    "zeros": "zeros",
    "mean": "the mean of the old ones",
    "wrap": "the old ones again",
    "live": "the values of the live model",
}
"""What new rows hold, in words."""


def _power_of_two(factor: float) -> bool:
    return abs(frexp(factor)[0]) == 0.5


_MANTISSA = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


def _rounds(old: str | None, new: str) -> bool:
    if old not in _MANTISSA or new not in _MANTISSA:
        return old != new
    narrower = _MANTISSA[new] < _MANTISSA[old]
    return narrower or (old, new) == ("bfloat16", "float16")


class Translation(Record):
    """An expression translated for one slot, and what is lost by it."""

    made: Expr
    approximate: list[str]
    remarks: list[str]


class Translator:
    """Translates expressions for one elementwise slot; shared subexpressions are translated once.

    Args:
        name: Of the slot; `param` is the parameter itself.
        path: Of the slot; empty for the parameter itself.
        slot: Its meaning.
        dtypes: By parameter, the dtype of the slot.
    """

    def __init__(self, name: str, path: SlotPath, slot: Slot, dtypes: Mapping[str, str | None]) -> None:
        self.name, self.path, self.slot, self.dtypes = name, path, slot, dtypes
        self._done: dict[int, tuple[Expr, Expr, str | None, list[str], list[str]]] = {}

    def translate(self, expression: Expr) -> Translation:
        """The expression for the slot.

        Raises:
            Refusal: It has no meaning for it.
        """
        made, _, approximate, remarks = self._visit(expression)
        return Translation(made, list(dict.fromkeys(approximate)), list(dict.fromkeys(remarks)))

    def _visit(self, expression: Expr) -> tuple[Expr, str | None, list[str], list[str]]:
        found = self._done.get(id(expression))
        if found is None:
            found = self._done[id(expression)] = (expression, *self._fresh_visit(expression))
        return found[1:]

    def _fresh_visit(self, expression: Expr) -> tuple[Expr, str | None, list[str], list[str]]:
        if isinstance(expression, Leaf):
            return Leaf(expression.name, expression.shape, self.path), self.dtypes.get(expression.name), [], []
        inputs = [self._visit(item) for item in expression.inputs]
        dtypes = {dtype for _, dtype, _, _ in inputs}
        approximate = [reason for _, _, reasons, _ in inputs for reason in reasons]
        remarks = [remark for _, _, _, found in inputs for remark in found]
        if len(dtypes) > 1:
            raise Refusal(f"its parts have the dtypes {', '.join(sorted(map(str, dtypes)))}: cast them to one first")
        step, dtype = expression.step, inputs[0][1]
        made = tuple(item for item, _, _, _ in inputs)
        if isinstance(step, ex.Cast):
            return self._cast(step, made, dtype, approximate, remarks, expression.shape)
        own, lost = self._own(step, made[0], dtype)
        approximate += [lost] if lost else []
        return (made[0] if own is None else Node(own, made, expression.shape)), dtype, approximate, remarks

    def _own(self, step: ex.Step, tensor: Expr, dtype: str | None) -> tuple[ex.Step | None, str]:
        """What a step is for the slot (None where it does nothing to it), and what is not exact about it."""
        match step:
            case ex.Scale():
                factor = self._factor(step)
                rounded = "" if _power_of_two(factor) else f"times {factor:g}, rounded"
                return (None, "") if factor == 1.0 else (ex.Multiply(factor), rounded)
            case ex.Shift(number):
                return (ex.Add(number), f"plus {number:g}, rounded") if self.slot.power else (None, "")
            case ex.Fresh():
                return None, ""
            case ex.Pad(dim, count):
                filled = self._filled(step)
                fill = str(filled.fill.default)
                return filled, f"{count} new rows of dimension {dim} are filled with {_FILLS.get(fill, fill)}"
            case ex.Full():
                value = self._fill(step.fill)
                return (None, "") if value is None else (ex.Full(ex.Fill(value)), f"{value} in every element")
            case ex.Mean(dims, weights):
                if dtype is not None and not dtype.startswith(INEXACT):
                    raise Refusal(f"{dtype} has no mean", "cast it first, or leave it out of the rule")
                if weights:
                    state = "weights, rounded" if not self.path else "states: no run has had it"
                    return step, f"the average of {len(weights)} {state}"
                size = next((tensor.shape or ())[dim] for dim in dims)
                return step, f"the mean of {size} rows"
            case ex.Narrow(dim, _, length, apart):
                whole = tensor.shape
                everything = whole is not None and length * apart == whole[dim] == length
                return (None if everything else step), ""
            case _:
                return step, ""

    def _factor(self, step: ex.Scale) -> float:
        if self.slot.degree is None:
            raise Refusal(
                "how it grows with the gradient is not known",
                f"say so in the plan, [slots] {self.name} = "
                '{ kind = "like_param", degree = 1 } (2 for a second moment), or { kind = "weight" } for a copy of the '
                "parameter",
            )
        return step.grad**self.slot.degree * step.param**self.slot.power

    def _cast(
        self,
        step: ex.Cast,
        made: tuple[Expr, ...],
        dtype: str | None,
        approximate: list[str],
        remarks: list[str],
        shape: Shape | None,
    ) -> tuple[Expr, str | None, list[str], list[str]]:
        wanted = step.of(self.name)
        if wanted is None and self.slot.kind == "weight" and self.name not in MASTERS:  # masters keep their precision
            wanted = step.of("param")
        floating = dtype is None or dtype.startswith(("float", "bfloat"))
        if wanted is None or wanted == dtype or (not floating and self.name not in step.dtypes):
            return made[0], dtype, approximate, remarks
        if _rounds(dtype, wanted):
            approximate.append(f"{dtype} rounded to {wanted}")
        else:
            remarks.append(f"{dtype} to {wanted}")
        return Node(ex.Cast({"": wanted}), made, shape), wanted, approximate, remarks

    def _fill(self, fill: ex.Fill) -> str | float | None:
        """What new rows hold; a weight is filled as its parameter is, unless it has an entry of its own."""
        weight = self.slot.kind == "weight" and self.name not in (fill.by_name or {})
        return fill.of("param" if weight else self.name)

    def _filled(self, step: ex.Pad) -> ex.Pad:
        fill = self._fill(step.fill)
        if fill is None:
            # A zero second moment beside a large step count makes the first updates of the new rows several times
            # too large, so that the old rows' mean stands for it.
            degree = self.slot.degree
            fill = "mean" if self.path and (degree is None or (degree > 0 and degree % 2 == 0)) else "zeros"
        return ex.Pad(step.dim, step.count, ex.Fill(fill))


def translated(expression: Expr, dtypes: Mapping[str, str | None]) -> Outcome:
    """What becomes of a parameter itself.

    Raises:
        Refusal: Its parts do not fit.
    """
    if isinstance(expression, Leaf):
        return Outcome("exact", made=expression)
    found = Translator("param", (), WEIGHT, dtypes).translate(expression)
    return translation_outcome(found, "like_param", inferred=False)


def translation_outcome(found: Translation, kind: SlotKind, *, inferred: bool) -> Outcome:
    """What becomes of a slot that is translated."""
    reason = "; ".join(found.approximate + found.remarks)
    return Outcome("approximate" if found.approximate else "exact", reason, kind, inferred, found.made)
