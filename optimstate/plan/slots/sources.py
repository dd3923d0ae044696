"""The sources of an optimizer's result: what their slots are, and expressions translated for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optimstate.plan.expressions.evaluate import dtype_of, shape_of
from optimstate.plan.expressions.tree import Expr, Node, Shape
from optimstate.plan.language.rules import Policy
from optimstate.plan.slots.elementwise import Translation, Translator
from optimstate.plan.slots.outcomes import Parameter, SlotPath
from optimstate.record import Record
from optimstate.state.algorithms.registry import conventional, inferred_kind
from optimstate.state.algorithms.slots import Algorithm, Slot

__all__ = ["JoinedSlot", "Sources"]


class Sources:
    """What the strategies of slots know.

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
        self.parameters, self.algorithm, self.policy = parameters, algorithm, policy
        self._declared = declared
        self._translators: dict[SlotPath, Translator] = {}
        self._known: dict[SlotPath, tuple[Slot, bool]] = {}

    def meaning(self, path: SlotPath, value: Any, shape: Shape | None) -> tuple[Slot, bool]:
        """What a slot is, and whether that was inferred."""
        return self._known.get(path) or self.meaning_of_shape(path, shape_of(value), shape)

    def meaning_of_shape(self, path: SlotPath, found: Shape | None, shape: Shape | None) -> tuple[Slot, bool]:
        """What a slot of shape `found` is where its parameter has `shape`, and whether that was inferred."""
        name = str(path[-1])
        slot = self._declared.get(name) or (self.algorithm.slot(name) if self.algorithm is not None else None)
        if slot is not None:
            return self._known.setdefault(path, (slot, False))
        if self.algorithm is None and (slot := conventional(name, found, shape)) is not None:
            return slot, True
        kind = inferred_kind(found, shape)
        return Slot(kind, 0 if kind == "scalar" else None), True

    def common(self, path: SlotPath, names: Sequence[str]) -> tuple[Slot, bool]:
        """What a slot that several sources have is, and whether that was inferred."""
        owner = next(name for name in names if path in self.parameters[name].slots)
        parameter = self.parameters[owner]
        return self.meaning(path, parameter.slots[path], parameter.shape)

    def factors(self) -> bool:
        """Whether the algorithm keeps means over rows and columns."""
        return self.algorithm is not None and any(slot.kind == "row" for slot in self.algorithm.slots.values())

    def translate(self, path: SlotPath, slot: Slot, expression: Expr) -> Translation:
        """The expression for an elementwise slot.

        Raises:
            Refusal: It has no meaning for it.
        """
        if path not in self._translators:
            dtypes = {
                name: dtype_of(parameter.slots[path])
                for name, parameter in self.parameters.items()
                if path in parameter.slots
            }
            self._translators[path] = Translator(str(path[-1]), path, slot, dtypes)
        return self._translators[path].translate(expression)

    def single(self, path: SlotPath, slot: Slot, step: Node) -> Translation:
        """One step of an expression translated for a slot, on an input called ``."""
        dtypes = (dtype_of(found.slots[path]) for found in self.parameters.values() if path in found.slots)
        return Translator(str(path[-1]), path, slot, {"": next(dtypes, None)}).translate(step)

    def vector_moment(self) -> str | None:
        """The full second moment that a factoring algorithm keeps for vectors alone; None where it also has others."""
        if self.algorithm is None or not self.algorithm.factors_every_matrix:
            return None
        return next(name for name, slot in self.algorithm.slots.items() if slot == Slot("like_param", 2))

    def mean_slots(self) -> tuple[tuple[str, str], bool]:
        """The slots of its means over rows and over columns, and whether they leave the averaged dimension out."""
        assert self.algorithm is not None
        row, col = (
            next(name for name, slot in self.algorithm.slots.items() if slot == Slot(kind, 2))
            for kind in ("row", "col")
        )
        return (row, col), row.startswith("exp_avg_sq")


class JoinedSlot(Record):
    """A slot of a parameter that is made of others.

    Attributes:
        path: The keys that lead to it.
        slot: What it is.
        inferred: Whether that was concluded from its shape.
        expression: How its parameter is made.
        names: The sources, each with this slot.
        layout: Whether elements are only moved.
    """

    path: SlotPath
    slot: Slot
    inferred: bool
    expression: Expr
    names: Sequence[str]
    layout: bool
