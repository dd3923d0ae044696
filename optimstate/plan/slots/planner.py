"""What becomes of each slot when its parameter is moved, joined, cut or scaled, and how exactly.

An expression of the parameter is translated for the slot: scaled by the slot's degree, filled by its policy, carried
out on means where the slot holds means over rows or columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from optimstate.describe import describe
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf
from optimstate.plan.slots.outcomes import Outcome, Parameter, Refusal, Signature, SlotPath, slot_name
from optimstate.plan.slots.sources import JoinedSlot, Sources
from optimstate.plan.slots.strategies import ALIKE, INFERRED, PACKED, STRATEGIES, agreed
from optimstate.problems import Problem

__all__ = ["SlotPlanner"]


class SlotPlanner:
    """Decides for every slot of every target of one optimizer.

    Args:
        sources: What is known of the checkpoint's parameters, and the plan's policy.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources, self._parameters = sources, sources.parameters
        self._algorithm, self._policy = sources.algorithm, sources.policy
        # What only moves elements does the same to the slots of all targets that the same sources make.
        self._alike: dict[tuple[str, ...], Mapping[SlotPath, Outcome]] = {}
        self._by_signature: dict[Signature, Mapping[SlotPath, Outcome | None] | None] = {}
        self._moved: dict[tuple[SlotPath, ...], Mapping[SlotPath, Outcome]] = {}

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
            message = (
                f"{describe(filled[0])} has optimizer state and {describe(empty)} has none; they cannot become one"
            )
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
                    made[path] = outcome or agreed(self._sources, path, filled)
                except Refusal as refusal:
                    problems.append(_refused(target, path, refusal, filled))
        if layout and not may_differ and len(problems) == before:
            self._alike[key] = made
        return made

    def _decided_by(self, signature: Signature) -> Mapping[SlotPath, Outcome | None] | None:
        """What becomes of each slot where elements are only moved between parameters of the same signature.

        Returns:
            For each slot its outcome, None for numbers that must agree; None altogether where the signature does
            not decide.
        """
        if signature not in self._by_signature:
            self._by_signature[signature] = self._outcomes_by(signature)
        return self._by_signature[signature]

    def _outcomes_by(self, signature: Signature) -> Mapping[SlotPath, Outcome | None] | None:
        made: dict[SlotPath, Outcome | None] = {}
        whole, slots = signature
        for path, shape, dtype in slots:
            slot, inferred = self._sources.meaning_of_shape(path, shape, whole)
            if slot.kind == "scalar":
                made[path] = None
            elif slot.is_elementwise and shape == whole is not None and dtype not in (None, *PACKED):
                made[path] = INFERRED if inferred else ALIKE
            else:
                return None
        return None if self._sources.factors() else made

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
            slot, inferred = self._sources.meaning(path, value, parameter.shape)
            made[path] = Outcome("exact", "", slot.kind, inferred)
        return made

    def _joined(
        self, target: str, expression: Expr, names: Sequence[str], problems: list[Problem], *, layout: bool
    ) -> tuple[dict[SlotPath, Outcome], bool]:
        """What becomes of each slot, and whether another target made from the same sources may differ."""
        made: dict[SlotPath, Outcome] = {}
        may_differ = self._sources.factors()
        for path in dict.fromkeys(path for name in names for path in self._parameters[name].slots):
            slot, inferred = self._sources.common(path, names)
            may_differ = may_differ or slot.kind in ("row", "col")
            try:
                self._refuse_missing(path, names)
                joined = JoinedSlot(path, slot, inferred, expression, names, layout)
                empty = all(self._parameters[name].slots[path] is None for name in names)
                made.update(STRATEGIES["scalar" if empty else slot.kind](self._sources, joined))
            except Refusal as refusal:
                problems.append(_refused(target, path, refusal, names))
        for path, outcome in made.items():
            if outcome.level == "approximate" and self._policy.approximate == "refuse" and outcome.kind != "scalar":
                message = f"{slot_name(path)} can only be approximated ({outcome.reason}), which the policy refuses"
                remedy = 'say approximate = "allow", or make it fresh'
                problems.append(Problem("approximate", message, target, tuple(names), remedy))
        return made, may_differ

    def _refuse_missing(self, path: SlotPath, names: Sequence[str]) -> None:
        missing = [name for name in names if path not in self._parameters[name].slots]
        if missing:
            owner = next(name for name in names if name not in missing)
            raise Refusal(f"{describe(owner)} has this slot and {describe(missing[0])} does not")


def _refused(target: str, path: SlotPath, refusal: Refusal, names: Sequence[str]) -> Problem:
    sources = ", ".join(map(describe, names[:3])) + (", ..." if len(names) > 3 else "")
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
