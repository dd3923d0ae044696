"""What becomes of each slot when its parameter is moved, joined, cut or scaled, and how exactly.

An expression of the parameter is translated for the slot: scaled by the slot's degree, filled by its policy, carried
out on means where the slot holds means over rows or columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import dtype_of, number_of, shape_of
from optimstate.plan.expressions.tree import Expr, Leaf, Node, Shape
from optimstate.plan.language.rules import Policy
from optimstate.plan.slots.elementwise import Translation, Translator, translation_outcome
from optimstate.plan.slots.factored import factored_outcomes
from optimstate.plan.slots.outcomes import Outcome, Parameter, Refusal, Signature, SlotPath, slot_name
from optimstate.problems import Problem
from optimstate.state.algorithms.registry import conventional, inferred_kind
from optimstate.state.algorithms.slots import RECOMPUTED, Algorithm, Slot

__all__ = ["SlotPlanner"]


class SlotPlanner:
    """Decides for every slot of every target of one optimizer.

    Args:
        parameters: Of the checkpoint, by name.
        algorithm: Whose state it is, where known.
        declared: Slots the plan declares.
        policy: The plan's.
    """

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        algorithm: Algorithm | None,
        declared: Mapping[str, Slot],
        policy: Policy,
    ) -> None:
        self._parameters, self._algorithm, self._declared, self._policy = parameters, algorithm, declared, policy
        self._translators: dict[SlotPath, Translator] = {}
        # What only moves elements does the same to the slots of all targets that the same sources make.
        self._alike: dict[tuple[str, ...], Mapping[SlotPath, Outcome]] = {}
        self._by_signature: dict[Signature, Mapping[SlotPath, Outcome | None] | None] = {}
        self._known: dict[SlotPath, tuple[Slot, bool]] = {}
        self._moved: dict[tuple[SlotPath, ...], Mapping[SlotPath, Outcome]] = {}

    def meaning(self, path: SlotPath, value: Any, shape: Shape | None) -> tuple[Slot, bool]:
        """What a slot is, and whether that was inferred."""
        return self._known.get(path) or self._meaning(path, shape_of(value), shape)

    def _meaning(self, path: SlotPath, found: Shape | None, shape: Shape | None) -> tuple[Slot, bool]:
        name = str(path[-1])
        slot = self._declared.get(name) or (self._algorithm.slot(name) if self._algorithm is not None else None)
        if slot is not None:
            return self._known.setdefault(path, (slot, False))
        if self._algorithm is None and (slot := conventional(name, found, shape)) is not None:
            return slot, True
        kind = inferred_kind(found, shape)
        return Slot(kind, 0 if kind == "scalar" else None), True

    def outcomes(self, target: str, expression: Expr, problems: list[Problem]) -> Mapping[SlotPath, Outcome]:
        """What becomes of every slot; where one cannot follow, a problem is noted."""
        if isinstance(expression, Leaf):
            return self._moved_whole(expression.name)
        live, fresh, layout = _states(expression)
        names = live if len(live) == 1 else list(dict.fromkeys(live))
        filled = [name for name in names if name in self._parameters and self._parameters[name].slots]
        if not filled:
            old = dict.fromkeys(fresh)
            paths = dict.fromkeys(
                path for name in old if name in self._parameters for path in self._parameters[name].slots
            )
            return {path: Outcome("fresh", "made fresh by a rule") for path in paths}
        if len(filled) < len(names) or fresh:
            empty = next(iter([name for name in names if name not in filled] + fresh))
            message = f"{filled[0]!r} has optimizer state and {empty!r} has none; they cannot become one"
            remedy = "add fresh = true to the rule, or leave one of them apart"
            problems.append(Problem("no-state", message, target, (filled[0], empty), remedy))
            return {}
        key = tuple(filled) if layout else ()
        if key in self._alike:
            return self._alike[key]
        before = len(problems)
        signatures = {self._parameters[name].signature for name in filled} if layout else set()
        known = self._decided_by(signatures.pop()) if len(signatures) == 1 else None
        if known is None:
            made, may_differ = self._joined(target, expression, filled, problems, layout=layout)
        else:
            made, may_differ = {}, False
            for path, outcome in known.items():
                try:
                    made[path] = outcome or self._agreed(path, filled)
                except Refusal as refusal:
                    problems.append(_refused(target, path, refusal, filled))
        if layout and not may_differ and len(problems) == before:
            self._alike[key] = made
        return made

    def _decided_by(self, signature: Signature) -> Mapping[SlotPath, Outcome | None] | None:
        """What becomes of each slot where elements are only moved between parameters of one signature.

        Returns:
            For each slot its outcome, None for numbers that must agree; None where it does not decide.
        """
        if signature not in self._by_signature:
            self._by_signature[signature] = self._outcomes_by(signature)
        return self._by_signature[signature]

    def _outcomes_by(self, signature: Signature) -> Mapping[SlotPath, Outcome | None] | None:
        made: dict[SlotPath, Outcome | None] = {}
        whole, slots = signature
        for path, shape, dtype in slots:
            slot, inferred = self._meaning(path, shape, whole)
            if slot.kind == "scalar":
                made[path] = None
            elif slot.is_elementwise and shape == whole is not None and dtype not in (None, *_PACKED):
                made[path] = _INFERRED if inferred else _ALIKE
            else:
                return None
        return None if self._factors() else made

    def _moved_whole(self, name: str) -> Mapping[SlotPath, Outcome]:
        parameter = self._parameters.get(name)
        if parameter is None or not parameter.slots:
            return {}
        key = tuple(parameter.slots)
        if self._algorithm is None:  # what a slot is depends on its shape
            return self._exact(parameter)
        if key not in self._moved:
            self._moved[key] = self._exact(parameter)
        return self._moved[key]

    def _exact(self, parameter: Parameter) -> Mapping[SlotPath, Outcome]:
        made = {}
        for path, value in parameter.slots.items():
            slot, inferred = self.meaning(path, value, parameter.shape)
            made[path] = Outcome("exact", "", slot.kind, inferred)
        return made

    def _joined(
        self, target: str, expression: Expr, names: Sequence[str], problems: list[Problem], *, layout: bool
    ) -> tuple[dict[SlotPath, Outcome], bool]:
        """What becomes of each slot, and whether another target made of the same sources may differ."""
        made: dict[SlotPath, Outcome] = {}
        sources = [self._parameters[name].slots for name in names]
        paths = dict.fromkeys(path for slots in sources for path in slots)
        factored: list[SlotPath] = []
        for path in paths:
            slot, inferred = self._common(path, names)
            if slot.kind in ("row", "col"):
                factored.append(path)
                continue
            try:
                self._refuse_missing(path, names)
                made[path] = self._outcome_of(path, slot, inferred, expression, names, layout=layout)
            except Refusal as refusal:
                problems.append(_refused(target, path, refusal, names))
        if factored or self._factors():
            factored_outcomes(self, target, expression, names, factored, made, problems)
        for path, outcome in made.items():
            if outcome.level == "approximate" and self._policy.approximate == "refuse" and outcome.kind != "scalar":
                message = f"{slot_name(path)} can only be approximated ({outcome.reason}), which the policy refuses"
                remedy = 'say approximate = "allow", or make it fresh'
                problems.append(Problem("approximate", message, target, tuple(names), remedy))
        return made, bool(factored) or self._factors()

    def _common(self, path: SlotPath, names: Sequence[str]) -> tuple[Slot, bool]:
        owner = next(name for name in names if path in self._parameters[name].slots)
        parameter = self._parameters[owner]
        return self.meaning(path, parameter.slots[path], parameter.shape)

    def _factors(self) -> bool:
        return self._algorithm is not None and any(slot.kind == "row" for slot in self._algorithm.slots.values())

    def _refuse_missing(self, path: SlotPath, names: Sequence[str]) -> None:
        missing = [name for name in names if path not in self._parameters[name].slots]
        if missing:
            owner = next(name for name in names if name not in missing)
            raise Refusal(f"{owner!r} has this slot and {missing[0]!r} does not")

    def _outcome_of(
        self, path: SlotPath, slot: Slot, inferred: bool, expression: Expr, names: Sequence[str], *, layout: bool
    ) -> Outcome:
        empty = all(self._parameters[name].slots[path] is None for name in names)
        if slot.kind == "scalar" or empty:
            return self._agreed(path, names)
        if not slot.is_elementwise:
            raise Refusal(_OPAQUE[slot.kind])
        for name in names:
            parameter = self._parameters[name]
            self._refuse_other_layout(path, parameter, name)
        if layout and len({dtype_of(self._parameters[name].slots[path]) for name in names}) == 1:
            return _INFERRED if inferred else _ALIKE
        return translation_outcome(self.translate(path, slot, expression), slot.kind, inferred=inferred)

    def translate(self, path: SlotPath, slot: Slot, expression: Expr) -> Translation:
        """The expression for an elementwise slot.

        Raises:
            Refusal: It has no meaning for it.
        """
        if path not in self._translators:
            dtypes = {
                name: dtype_of(parameter.slots[path])
                for name, parameter in self._parameters.items()
                if path in parameter.slots
            }
            self._translators[path] = Translator(str(path[-1]), path, slot, dtypes)
        return self._translators[path].translate(expression)

    def parameter(self, name: str) -> Parameter:
        """What is known of a source."""
        return self._parameters[name]

    def single(self, path: SlotPath, slot: Slot, step: Node) -> Translation:
        """One step of an expression translated for a slot, on an input called ``."""
        dtypes = (dtype_of(found.slots[path]) for found in self._parameters.values() if path in found.slots)
        return Translator(str(path[-1]), path, slot, {"": next(dtypes, None)}).translate(step)

    def vector_moment(self) -> str | None:
        """The full second moment that a factoring algorithm keeps for vectors alone; None where it also has others."""
        if self._algorithm is None or not self._algorithm.factors_every_matrix:
            return None
        return next(name for name, slot in self._algorithm.slots.items() if slot == Slot("like_param", 2))

    def mean_slots(self) -> tuple[tuple[str, str], bool]:
        """The slots of its means over rows and over columns, and whether they leave the averaged dimension out."""
        assert self._algorithm is not None
        row, col = (
            next(name for name, slot in self._algorithm.slots.items() if slot == Slot(kind, 2))
            for kind in ("row", "col")
        )
        return (row, col), row.startswith("exp_avg_sq")

    def _refuse_other_layout(self, path: SlotPath, parameter: Parameter, name: str) -> None:
        value = parameter.slots[path]
        shape = shape_of(value)
        if shape is None:
            raise Refusal(f"for {name!r} it is not a plain tensor (quantized, sharded or of a subclass)")
        if parameter.shape is None:
            message = f"the shape of {name!r} is not known, so it cannot be cut or joined"
            raise Refusal(message, "give the model too", "unknown-shape")
        if shape != parameter.shape:
            raise Refusal(f"it has shape {list(shape)} where {name!r} has {list(parameter.shape)}")
        if dtype_of(value) in _PACKED:
            raise Refusal(
                f"for {name!r} it is packed in {dtype_of(value)} blocks, which cutting or joining would break",
                'bitsandbytes state can be re-quantized: quantized = "requantize" in [policy]',
            )

    def _agreed(self, path: SlotPath, names: Sequence[str]) -> Outcome:
        """One number for all: they must agree, unless the policy chooses."""
        first = Leaf(names[0], None, path)
        if len(names) == 1:
            return Outcome("exact", "", "scalar", made=first)
        slots = [self._parameters[name].slots[path] for name in names]
        if all(value is slots[0] for value in slots):
            return Outcome("exact", "", "scalar", made=first)
        values = [number_of(value) for value in slots]
        if all(value == values[0] for value in values):
            return Outcome("exact", "", "scalar", made=first)
        if str(path[-1]) in RECOMPUTED:
            return Outcome("approximate", "computed anew at the next step", "scalar", made=first)
        if self._policy.step == "error":
            shown = ", ".join(f"{value} for {name!r}" for name, value in zip(names[:4], values, strict=False))
            remedy = 'make them agree, say step = "min", "max" or "keep" in [policy]'
            raise Refusal(f"it differs ({shown})", remedy, "disagreement")
        if self._policy.step == "keep":
            chosen = 0
        else:
            chosen = values.index((min if self._policy.step == "min" else max)(values))
        reason = f"{values[chosen]} of {', '.join(map(str, dict.fromkeys(values)))}, by the policy {self._policy.step}"
        return Outcome("approximate", reason, "scalar", made=Leaf(names[chosen], None, path))


_ALIKE, _INFERRED = Outcome("exact"), Outcome("exact", inferred=True)
_OPAQUE: dict[str, str] = {
    "opaque": "it has a layout of its own, which can be renamed, duplicated or dropped, but not cut, joined or scaled",
    "flat": "it is one vector over all parameters",
}
_PACKED = {"uint8", "int8", "quint8", "qint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"}


def _refused(target: str, path: SlotPath, refusal: Refusal, names: Sequence[str]) -> Problem:
    sources = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
    message = f"{slot_name(path)} of {sources} cannot follow: {refusal.message}"
    remedy = ", or ".join(filter(None, (refusal.remedy, "give the parameter no state (fresh = true)")))
    return Problem(refusal.kind, message, target, tuple(names), remedy)


def _states(expression: Expr) -> tuple[list[str], list[str], bool]:
    """The sources whose state is used, those whose state is left behind, and whether elements are only moved."""
    live: list[str] = []
    fresh: list[str] = []
    layout = True
    stack: list[tuple[Expr, bool]] = [(expression, False)]
    while stack:
        found, left = stack.pop()
        if isinstance(found, Leaf):
            (fresh if left else live).append(found.name)
        else:
            left = left or isinstance(found.step, ex.Fresh)
            layout = layout and isinstance(found.step, ex.LAYOUT)
            stack.extend([(item, left) for item in found.inputs[::-1]])
    return live, fresh, layout
