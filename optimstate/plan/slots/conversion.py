"""From the state of one optimizer to that of another: what has a meaning in both, and what is lost.

The exponential averages of the gradient and of its square mean the same in the whole Adam family; Adafactor keeps
means of the latter; a momentum buffer of SGD is the average that Muon keeps, but for a factor, and the first average of
Adam is that of Muon. bitsandbytes' optimizers are those of the same name with slots of their own, which `quantized`
codes and decodes. What has no meaning is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.slots import quantized
from optimstate.plan.slots.converted_options import DEFAULTS, converted_options, other_average
from optimstate.plan.slots.counterparts import ADAMS, Convert, counterpart
from optimstate.plan.slots.packing import CODED, packed_again, unchanged, unpacked
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.algorithms.registry import named
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.optimizer import Group, OptimizerState, Slots

__all__ = ["Conversion", "Lost", "plan_conversion"]


class Lost(Record):
    """One line of the report: a slot of the old or new state, what becomes of it, and why.

    Attributes:
        slot: Its name.
        outcome: `exact`, `approximate`, `fresh` or `dropped`.
        reason: Why.
        heir: The slot that has its content, where it has another name; else empty.
    """

    slot: str
    outcome: str
    reason: str
    heir: str = ""


class Conversion(Record):
    """How the state of one algorithm becomes that of another.

    Attributes:
        source: The algorithm it is.
        target: The one it becomes.
        keeps_betas: Whether decay rates mean the same in both.
        report: What becomes of each slot.
        convert: Makes the new slots of a parameter from the old ones and its group's new options.
        given: Options that the plan sets, which stay as they are.
    """

    source: str
    target: str
    report: tuple[Lost, ...]
    convert: Convert
    keeps_betas: bool = True
    given: frozenset[str] = frozenset()

    def line(self, slot: str, shape: Shape | None) -> Lost:
        """The line for a slot that a parameter of this shape had; it is dropped where no line mentions it."""
        meant = CODED.get(slot.rpartition(".")[2], slot)
        said = (line for line in self.report if meant in line.slot.split(", "))  # a line may speak of several
        found = next(said, Lost(slot, "dropped", f"{self.target} has no such slot"))
        kept = self._holds(meant, shape) or found.outcome != "exact" or bool(found.heir)
        return found if kept else found._replace(outcome="dropped")

    def new_slots(self, shape: Shape | None) -> Iterator[Lost]:
        """The lines of the slots that a parameter of this shape has afterwards, one per slot."""
        for line in self.report:
            for slot in line.slot.split(", ") if line.outcome != "dropped" else ():
                if self._holds(slot, shape):
                    yield line._replace(slot=slot)

    def _holds(self, slot: str, shape: Shape | None) -> bool:
        """Whether a parameter of this shape has a slot afterwards, as far as that is known."""
        goal = named(self.target)
        return goal is None or shape is None or goal.holds(slot, len(shape))

    def apply(self, state: OptimizerState) -> OptimizerState:
        """The converted state; parameters without state have none afterwards either."""
        made: dict[Any, Slots] = {}
        groups = []
        for group in state.groups:
            options = converted_options(self.target, group.options, keeps_betas=self.keeps_betas, given=self.given)
            for key in group.params:
                slots = state.state.get(key)
                if slots and (found := self.convert(slots, options)):
                    made[key] = found
            order = tuple(options) + tuple(key for key in group.keys if key in ("params", "param_names"))
            groups.append(Group(options, group.params, group.names, order))
        ordered = {key: made[key] for key in state.state if key in made}
        kept = {key: state.state[key] for key in state.orphans()}
        return state._replace(groups=tuple(groups), state={**ordered, **kept})


def plan_conversion(
    source: Algorithm | None,
    target: str,
    state: OptimizerState,
    shapes: Mapping[str, Shape | None],
    problems: list[Problem],
    *,
    options: Sequence[Mapping[str, Any]] | None = None,
    given: frozenset[str] = frozenset(),
) -> Conversion | None:
    """How to convert. None where nothing changes, and, with a problem noted, where the conversion has no meaning.

    Args:
        source: The algorithm whose state it is; None where it was not recognised.
        target: The name of the other.
        state: What is converted, of which nothing is read but the names of slots and options.
        shapes: Of the result's parameters, where known.
        problems: Added to.
        options: Of the groups that are converted; those of `state` by default.
        given: Options that the plan sets, which stay as they are.
    """
    options = [group.options for group in state.groups] if options is None else options
    if target not in DEFAULTS:
        message = f"optimizer = {describe(target)}: there is no conversion to it"
        problems.append(Problem("conversion", message, remedy=f"choose one of {', '.join(DEFAULTS)}"))
        return None
    if source is None:
        message = f"the optimizer was not recognised, so its state cannot become that of {target}"
        problems.append(Problem("conversion", message))
        return None
    name = "Adam" if source.name == "Adam or AdamW" else source.name
    if name == target:
        return None
    goal = target.removesuffix("8bit").removesuffix("32bit")
    if name == "bitsandbytes":
        found = unpacked(state, goal, packed=goal != target)
    else:
        found = counterpart(name, goal) if name != goal else unchanged(goal)
    if found is not None and goal != target:
        slots = {slot for found in state.state.values() for slot in quantized.unnested(found)}
        found = packed_again(*found, bits=8 if target.endswith("8bit") else 32, old=slots)
    if found is None:
        message = f"the state of {source.name} has no meaning in {target}"
        remedy = 'rename and load the weights, and start the optimizer anew (fresh = "**")'
        problems.append(Problem("conversion", message, remedy=remedy))
        return None
    if target == "Muon" and (other := [key for key, shape in shapes.items() if shape is not None and len(shape) != 2]):
        message = f"Muon takes matrices alone, and {describe(other[0])} has the shape {list(shapes[other[0]] or ())}"
        problems.append(Problem("conversion", message, names=tuple(other)))
    report, convert = found
    keeps_betas = goal != "Lion" or name in ("Lion", "bitsandbytes")
    if name in ADAMS and goal == "Muon" and any(other_average(group, given) for group in options):
        reason = "an average over the decay rate betas[0], which Muon continues with its momentum"
        report = [("momentum_buffer", "approximate", reason), *report[1:]]
    return Conversion(source.name, target, tuple(Lost(*line) for line in report), convert, keeps_betas, given)
