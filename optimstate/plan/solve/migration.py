"""The input and the result of planning: immutable, without tensors of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.tree import Expr, Leaf, Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.slots.outcomes import Outcome, Parameter, SlotPath
from optimstate.plan.solve.groups import GroupPlan
from optimstate.plan.solve.resolve import Application
from optimstate.record import Record, field
from optimstate.state.algorithms.slots import Algorithm
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    from optimstate.plan.slots.conversion import Conversion
    from optimstate.plan.slots.flat import FlatPlan

__all__ = ["Inventory", "Like", "Migration", "Move", "SectionMoves", "Target"]


class Target(Record):
    """What the result must be: the parameters of a live optimizer or model.

    Attributes:
        groups: For each param group its parameters' names, in order; a model has one.
        options: For each param group its options; empty where they are not known.
        shapes: Of the parameters, where known.
        values: Of the parameters, where `fill = "live"` may take them.
        elsewhere: Parameters that other optimizers of the result have.
    """

    groups: tuple[tuple[str, ...], ...]
    options: tuple[Mapping[str, Any], ...] = ()
    shapes: Mapping[str, Shape | None] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: frozenset[str] = frozenset()

    @classmethod
    def of_names(cls, shapes: Mapping[str, Shape | None], values: Mapping[str, Any] | None = None) -> Target:
        """Parameters by name, with their shapes where known, in one group."""
        return cls((tuple(shapes),), (), shapes, values or {})

    def names(self) -> Iterator[str]:
        """All of them, in order."""
        for group in self.groups:
            yield from group


class Like(Record):
    """A new model, in whose order an optimizer's state is written, because torch loads it by position.

    Attributes:
        names: Of its parameters (and buffers), in order.
        targets: By the path of each optimizer whose param groups are known too, its parameters.
    """

    names: tuple[str, ...]
    targets: Mapping[str, Target] = field(default_factory=dict)

    def target(self, label: str, count: int) -> Target | None:
        """The param groups of the optimizer at a path; a single one is taken for a single one, whatever its path.

        Args:
            label: The path.
            count: How many optimizers the checkpoint has.
        """
        if label in self.targets or count > 1 or len(self.targets) != 1:
            return self.targets.get(label)
        return next(iter(self.targets.values()))


class Inventory(Record):
    """What the planner is told of a section.

    Attributes:
        shapes: Its parameters, in order, with their shapes where known.
        tensors: Their values, for a model; only dtypes and identities are looked at.
        state: The optimizer's state, every parameter named as in `shapes`.
        target: What the result must be.
        parameters: The optimizer's, with their slots.
        algorithm: Whose state it is, where known.
        order: Of an optimizer's parameters in the result, by more names than it has; empty to keep that of the file.
    """

    shapes: Mapping[str, Shape | None]
    tensors: Mapping[str, Any] = field(default_factory=dict)
    state: OptimizerState | None = None
    target: Target | None = None
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    algorithm: Algorithm | None = None
    order: tuple[str, ...] = ()


class Move:
    """One parameter of the result.

    Attributes:
        target: Its name.
        expression: How it is made of the checkpoint's; None for a new one.
        rules: The rules that say so, in order; empty where the name is kept because none matches it.
        value: What becomes of the parameter itself; None in an optimizer.
        slots: What becomes of each slot.
        clone: Whether an earlier parameter takes the same source.
    """

    __slots__ = ("clone", "expression", "rules", "slots", "target", "value")

    def __init__(
        self,
        target: str,
        expression: Expr | None,
        rules: tuple[Rule, ...] = (),
        value: Outcome | None = None,
        slots: Mapping[SlotPath, Outcome] | None = None,
        clone: bool = False,
    ) -> None:
        self.target, self.expression, self.rules, self.value, self.clone = target, expression, rules, value, clone
        self.slots: Mapping[SlotPath, Outcome] = slots or {}

    @property
    def sources(self) -> tuple[str, ...]:
        """The parameters it comes from."""
        if isinstance(self.expression, Leaf):
            return (self.expression.name,)
        found = () if self.expression is None else ex.leaves(self.expression)
        return tuple(dict.fromkeys([leaf.name for leaf in found]))

    @property
    def is_moved_whole(self) -> bool:
        """Whether it is one parameter of the checkpoint, unchanged."""
        return isinstance(self.expression, Leaf)

    @property
    def changes(self) -> bool:
        """Whether its name, value or state changes."""
        return not isinstance(self.expression, Leaf) or self.expression.name != self.target


class SectionMoves(Record):
    """What becomes of the parameters of one section.

    Attributes:
        moves: In the order of the result.
        dropped: Sources that go nowhere, with the rule that drops them (None: the policy).
        groups: The param groups of the result; empty for a model.
        old_groups: How many there were.
        algorithm: Whose state it is, where known.
        flat: How vectors over all parameters are rebuilt.
        notes: What deserves attention though nothing is wrong.
        applications: Every use of a rule, pass by pass.
        reordered: Whether the order is another than the checkpoint's.
        regrouped: Whether the param groups or their options are others.
        conversion: How the state becomes that of another algorithm.
        requantized: Whether 8-bit slots are decoded and coded again where a parameter is not moved whole.
    """

    moves: tuple[Move, ...]
    dropped: tuple[tuple[str, Rule | None], ...]
    groups: tuple[GroupPlan, ...] = ()
    old_groups: int = 0
    algorithm: Algorithm | None = None
    flat: FlatPlan | None = None
    notes: tuple[str, ...] = ()
    applications: tuple[tuple[Application, ...], ...] = ()
    reordered: bool = False
    regrouped: bool = False
    conversion: Conversion | None = None
    requantized: bool = False

    @property
    def changes(self) -> bool:
        """Whether anything changes."""
        different = self.reordered or self.regrouped or self.conversion is not None
        return bool(self.dropped) or different or any(move.changes for move in self.moves)

    @property
    def group_map(self) -> list[list[int]]:
        """For each new param group the old ones its parameters come from."""
        return [list(group.sources) for group in self.groups]


class Migration(Record):
    """A plan resolved for one checkpoint.

    Attributes:
        plan: The plan.
        sections: By the caller's key for each section.
        counts: For each rule, how many parameters of all sections it matched.
    """

    plan: Plan
    sections: Mapping[str, SectionMoves]
    counts: tuple[tuple[Rule, int], ...]

    @property
    def notes(self) -> list[str]:
        """Notes of all sections."""
        return [f"{key}: {note}" for key, section in self.sections.items() for note in section.notes]
