"""What the hooks of one load want, before anything is decided."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from optimstate.errors import PlanError, StateMismatchError
from optimstate.hooks.engine.live import Live
from optimstate.installed_torch import torch
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.resolve import Resolver
from optimstate.problems import Problem
from optimstate.state.names import unwrapped
from optimstate.state.optimizer import OptimizerState, Slots

__all__ = ["Fill", "LoadRequest", "Source", "StateDict", "in_sequence", "is_settled", "named"]

Source = Literal["file", "live", "merge"]
StateDict = dict[str, Any]
Fill = Callable[[str, torch.Tensor, Mapping[str, Slots | None]], tuple[Slots, str] | None]
"""State for a parameter that has none, and how it was made; None where it is to start without."""


@dataclass
class LoadRequest:
    """What the hooks of one load want, taken together.

    Attributes:
        state: What is loaded, every parameter named.
        live: What it is loaded into.
        plan: The rules and policies of all hooks, one after the other.
        options: Where the value of an option comes from; `*` is for all that are not named.
        values: Options whose value is given.
        fills: How parameters that nothing fills get state.
        counts: How many parameters each rule matched, once that is known.
        elsewhere: Parameters that other live optimizers have.
        label: The path of the optimizer in the checkpoint; None for a hook, which does not know it.
    """

    state: OptimizerState
    live: Live
    plan: Plan = field(default_factory=Plan)
    options: dict[str, Source] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    elsewhere: frozenset[str] = frozenset()
    label: str | None = None

    def add(self, plan: Plan) -> None:
        """Add a plan after those of earlier hooks.

        Raises:
            PlanError: Both decide on the param groups.
        """
        self.plan = in_sequence(self.plan, plan)

    def names(self) -> list[str]:
        """The names that the rules so far produce from those of the checkpoint."""
        old: dict[str, Any] = {str(name): None for _, name, _ in self.state.parameters()}
        rules = list(self.plan.all_rules())
        if not rules:
            return list(old)
        problems: list[Problem] = []
        found = Resolver(self.plan.passes, "optimizer", [0] * len(rules), problems).resolve(old)
        return list(found.made)

    def strip_prefixes(self) -> None:
        """Remove wrapper prefixes on both sides.

        Raises:
            PlanError: Rules have been applied to the names that have them.
        """
        if any(self.plan.all_rules()):
            raise PlanError(
                "strip_prefix() is registered after hooks with rules, which would see names with prefixes",
                hint="Register it before them.",
            )
        names = [[str(name) for name in group.names or ()] for group in self.state.groups]
        rename = unwrapped(name for group in names for name in group)
        self.state = self.state.named([[rename(name) for name in group] for group in names])
        self.live = self.live.renamed(unwrapped(name for group in self.live.names for name in group))


def in_sequence(first: Plan, second: Plan) -> Plan:
    """One plan after the other.

    Raises:
        PlanError: Both decide on the param groups.
    """
    if first.groups and second.groups:
        raise PlanError(
            "two hooks say which param groups the parameters are in", hint="Leave it to one of regroup() and migrate()."
        )
    passes = [rules for rules in (*first.passes, *second.passes) if rules]
    joined = first._replace(rules=(), stages=()) + second._replace(rules=(), stages=())
    return joined._replace(rules=passes[0] if passes else (), stages=tuple(passes[1:]))


def is_settled(request: LoadRequest) -> bool:
    """Whether the checkpoint already has the live names: a rule that matches nothing was then applied before.

    So a script that was resumed with a rule can be resumed with it again, and trainers that load an optimizer's own
    state (Accelerate does) can.
    """
    saved = {name for group in request.state.groups for name in group.names or ()}
    return saved == {name for group in request.live.names for name in group}


def named(state: OptimizerState, live: Live, saved: Sequence[str] | None = None) -> OptimizerState:
    """A checkpoint's state with names: its own, or the given ones.

    Where there is no state yet, only options by group, groups of the live sizes are the live ones: trainers load what
    a new optimizer has into itself (Accelerate does when it prepares one).

    Raises:
        StateMismatchError: It has none and none are given, or their number is another.
    """
    if state.is_named and saved is None:
        return state
    sizes = [len(group.params) for group in state.groups]
    if saved is not None and (state.state or len(saved) == sum(sizes)):
        return state.named(saved)
    if not state.state and sizes == list(map(len, live.names)):
        return state.named(live.names)
    if any(sizes):
        raise StateMismatchError(
            f"the {sum(sizes)} parameters of the checkpoint's optimizer have no names, so they cannot be matched",
            hint="Give them in the order they had, hooks.match_names(saved=[...]), write them into the file with "
            "`optimstate name`, or save from an optimizer built on model.named_parameters().",
        )
    return state
