"""One strategy for each kind of slot: what becomes of it when parameters are joined or cut.

Vectors over all parameters are rebuilt as a whole, in `flat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from optimstate.describe import describe
from optimstate.plan.expressions.evaluate import dtype_of, number_of, shape_of
from optimstate.plan.expressions.tree import Leaf
from optimstate.plan.slots.elementwise import translation_outcome
from optimstate.plan.slots.factored import mean_outcome, raised_vector
from optimstate.plan.slots.outcomes import Outcome, Parameter, Refusal, SlotPath
from optimstate.plan.slots.sources import JoinedSlot, Sources
from optimstate.state.algorithms.slots import RECOMPUTED, SlotKind

__all__ = ["ALIKE", "INFERRED", "PACKED", "STRATEGIES", "agreed"]


Outcomes = Mapping[SlotPath, Outcome]
ALIKE, INFERRED = Outcome("exact"), Outcome("exact", inferred=True)
_WHOLE: dict[str, str] = {
    "opaque": "it has a layout of its own, which can be renamed, duplicated or dropped, but not cut, joined or scaled",
    "flat": "it is one vector over all parameters",
}
PACKED = {"uint8", "int8", "quint8", "qint8", "quint4x2", "quint2x4", "float4_e2m1fn_x2"}


def agreed(sources: Sources, path: SlotPath, names: Sequence[str]) -> Outcome:
    """One number for all: they must agree, unless the policy chooses.

    Raises:
        Refusal: They differ, and the policy does not choose.
    """
    first = Leaf(names[0], None, path)
    if len(names) == 1:
        return Outcome("exact", "", "scalar", made=first)
    slots = [sources.parameters[name].slots[path] for name in names]
    if all(value is slots[0] for value in slots):
        return Outcome("exact", "", "scalar", made=first)
    values = [number_of(value) for value in slots]
    if all(value == values[0] for value in values):
        return Outcome("exact", "", "scalar", made=first)
    if str(path[-1]) in RECOMPUTED:
        return Outcome("approximate", "computed anew at the next step", "scalar", made=first)
    if sources.policy.step == "error":
        shown = ", ".join(f"{value} for {describe(name)}" for name, value in zip(names[:4], values, strict=False))
        remedy = 'make them agree, say step = "min", "max" or "keep" in [policy]'
        raise Refusal(f"it differs ({shown})", remedy, "disagreement")
    if sources.policy.step == "keep":
        chosen = 0
    else:
        chosen = values.index((min if sources.policy.step == "min" else max)(values))
    reason = f"{values[chosen]} of {', '.join(map(str, dict.fromkeys(values)))}, by the policy {sources.policy.step}"
    return Outcome("approximate", reason, "scalar", made=Leaf(names[chosen], None, path))


def _number(sources: Sources, joined: JoinedSlot) -> Outcomes:
    return {joined.path: agreed(sources, joined.path, joined.names)}


def _elementwise(sources: Sources, joined: JoinedSlot) -> Outcomes:
    outcome = _elementwise_outcome(sources, joined)
    return raised_vector(sources, joined, outcome) or {joined.path: outcome}


def _elementwise_outcome(sources: Sources, joined: JoinedSlot) -> Outcome:
    path, slot, names = joined.path, joined.slot, joined.names
    for name in names:
        _refuse_other_layout(path, sources.parameters[name], name)
    if joined.layout and len({dtype_of(sources.parameters[name].slots[path]) for name in names}) == 1:
        return INFERRED if joined.inferred else ALIKE
    return translation_outcome(sources.translate(path, slot, joined.expression), slot.kind, inferred=joined.inferred)


def _mean(sources: Sources, joined: JoinedSlot) -> Outcomes:
    return {joined.path: mean_outcome(sources, joined)}


def _whole(_: Sources, joined: JoinedSlot) -> Outcomes:
    raise Refusal(_WHOLE[joined.slot.kind])


def _refuse_other_layout(path: SlotPath, parameter: Parameter, name: str) -> None:
    value = parameter.slots[path]
    shape = shape_of(value)
    if shape is None:
        raise Refusal(f"for {describe(name)} it is not a plain tensor (quantized, sharded or of a subclass)")
    if parameter.shape is None:
        message = f"the shape of {describe(name)} is not known, so it cannot be cut or joined"
        raise Refusal(message, "give the model too", "unknown-shape")
    if shape != parameter.shape:
        raise Refusal(f"it has shape {list(shape)} where {describe(name)} has {list(parameter.shape)}")
    if dtype_of(value) in PACKED:
        raise Refusal(
            f"for {describe(name)} it is packed in {dtype_of(value)} blocks, which cutting or joining would break",
            'bitsandbytes state can be re-quantized: quantized = "requantize" in [policy]',
        )


Strategy = Callable[[Sources, JoinedSlot], Outcomes]
STRATEGIES: Mapping[SlotKind, Strategy] = {
    "scalar": _number,
    "like_param": _elementwise,
    "weight": _elementwise,
    "row": _mean,
    "col": _mean,
    "flat": _whole,
    "opaque": _whole,
}
"""What decides for a slot of each kind: what becomes of it. Each raises `Refusal` where the slot cannot follow."""
