"""A parameter's expressions translated for a slot of the same layout: scaled by its degree, filled by its policy."""

from __future__ import annotations

from collections.abc import Mapping
from math import frexp

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Node, Shape
from optimstate.plan.slots.outcomes import Outcome, Refusal, SlotPath
from optimstate.record import Record
from optimstate.state.algorithms.slots import MASTERS, WEIGHT, Slot, SlotKind

__all__ = ["Translation", "Translator", "translated", "translation_outcome"]


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
        if isinstance(step, ex.Scale):
            factor = self._factor(step)
            if factor == 1.0:
                return made[0], dtype, approximate, remarks
            if not _power_of_two(factor):
                approximate.append(f"times {factor:g}, rounded")
            return Node(ex.Multiply(factor), made, expression.shape), dtype, approximate, remarks
        if isinstance(step, ex.Shift):
            if not self.slot.power:
                return made[0], dtype, approximate, remarks
            approximate.append(f"plus {step.param:g}, rounded")
            return Node(ex.Add(step.param), made, expression.shape), dtype, approximate, remarks
        if isinstance(step, ex.Cast):
            return self._cast(step, made, dtype, approximate, remarks, expression.shape)
        if isinstance(step, ex.Fresh):
            return made[0], dtype, approximate, remarks
        if isinstance(step, ex.Pad):
            step = self._filled(step)
            reason = {"zeros": "zeros", "mean": "the mean of the old ones", "wrap": "the old ones again"}
            reason["live"] = "the values of the live model"
            filled = reason.get(str(step.fill.default), str(step.fill.default))
            approximate.append(f"{step.count} new rows of dimension {step.dim} are filled with {filled}")
        if isinstance(step, ex.Full):
            fill = self._fill(step.fill)
            if fill is None:
                return made[0], dtype, approximate, remarks
            step = ex.Full(ex.Fill(fill))
            approximate.append(f"{fill} in every element")
        if isinstance(step, ex.Mean):
            if dtype is not None and not dtype.startswith(("float", "bfloat", "complex")):
                raise Refusal(f"{dtype} has no mean", "cast it first, or leave it out of the rule")
            if step.weights:
                state = "weights, rounded" if not self.path else "states: no run has had it"
                approximate.append(f"the average of {len(step.weights)} {state}")
            else:
                size = next((made[0].shape or ())[dim] for dim in step.dims)
                approximate.append(f"the mean of {size} rows")
        if isinstance(step, ex.Narrow):
            whole = inputs[0][0].shape
            if whole is not None and step.length * step.step == whole[step.dim] == step.length:
                return made[0], dtype, approximate, remarks
        return Node(step, made, expression.shape), dtype, approximate, remarks

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
