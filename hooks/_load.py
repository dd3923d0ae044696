"""The base of the hooks that run before an optimizer loads: those registered side by side act as one.

Each says what it wants in a `Request`; the last of them plans once, for the live optimizer, and hands over a new dict.
So a rule and the policies it needs may be registered in any order, and nothing is copied on the way.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch

from optimstate.errors import MigrationError, PlanError, StateMismatchError
from optimstate.hooks._live import Consecutive, Live, stripped
from optimstate.hooks._report import Report
from optimstate.plan.execute import execute_optimizer
from optimstate.plan.migration import SectionMoves, Target
from optimstate.plan.planner import plan_optimizer
from optimstate.plan.resolve import Resolver
from optimstate.plan.rules import Plan
from optimstate.plan.slots import flat_slots
from optimstate.plan.values import shape_of
from optimstate.state.model import Group, OptimizerState, Slots
from optimstate.state.schema import parameter_shape, recognise
from optimstate.tree import no_garbage_collection

__all__ = [
    "LOGGER",
    "METADATA",
    "Fill",
    "LoadHook",
    "Request",
    "Source",
    "adapt",
    "in_sequence",
    "is_settled",
    "matched",
    "named",
]

LOGGER = logging.getLogger("optimstate")
METADATA = "optimstate"
"""The key of a state dict under which `add_metadata` writes."""


Source = Literal["file", "live", "merge"]
StateDict = dict[str, Any]
Fill = Callable[[str, torch.Tensor, Mapping[str, Slots | None]], tuple[Slots, str] | None]
"""State for a parameter that has none, and how it was made; None where it is to start without."""


@dataclass
class Request:
    """What the hooks of one load want, taken together.

    Attributes:
        state: What is loaded, every parameter named.
        live: What it is loaded into.
        plan: The rules and policies of all hooks, one after the other.
        options: Where the value of an option comes from; `*` is for all that are not named.
        values: Options whose value is given.
        fills: How parameters that nothing fills get state.
        moves: What became of every parameter; None before it is decided, or where all are as they were.
    """

    state: OptimizerState
    live: Live
    plan: Plan = field(default_factory=Plan)
    options: dict[str, Source] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    fills: list[Fill] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, plan: Plan) -> None:
        """Let a plan follow those of the hooks before.

        Raises:
            PlanError: Both decide on the param groups.
        """
        self.plan = in_sequence(self.plan, plan)

    def names(self) -> list[str]:
        """The names that the rules so far produce from the checkpoint's."""
        old: dict[str, Any] = {str(name): None for _, name, _ in self.state.parameters()}
        rules = list(self.plan.all_rules())
        if not rules:
            return list(old)
        problems: list[str] = []
        found = Resolver(self.plan.passes, "optimizer", [0] * len(rules), problems).resolve(old)
        return list(found.made)

    def strip_prefixes(self) -> None:
        """Take wrapper prefixes off both sides.

        Raises:
            PlanError: Rules have been applied to the names that have them.
        """
        if any(self.plan.all_rules()):
            raise PlanError(
                "strip_prefix() is registered after hooks with rules, which would see names with prefixes",
                hint="Register it before them.",
            )
        names = [[str(name) for name in group.names or ()] for group in self.state.groups]
        rename = stripped(name for group in names for name in group)
        self.state = self.state.named([[rename(name) for name in group] for group in names])
        self.live = self.live.renamed(stripped(name for group in self.live.names for name in group))


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
    joined = replace(first, rules=(), stages=()) + replace(second, rules=(), stages=())
    return replace(joined, rules=passes[0] if passes else (), stages=tuple(passes[1:]))


@dataclass(frozen=True)
class Told:
    """What a report is made of, when somebody asks for it.

    Attributes:
        hooks: Which hooks did it.
        kept: Parameters that were kept as they were, without a plan.
        moves: The migration, where there was one.
        filled: Parameters that got state from elsewhere, and how.
        orphans: Keys of state that belonged to no parameter.
    """

    hooks: tuple[str, ...]
    kept: tuple[str, ...]
    moves: SectionMoves | None
    filled: Mapping[str, str]
    orphans: tuple[Any, ...]

    @cached_property
    def report(self) -> Report:
        """The report."""
        made = Report(self.hooks, self.kept) if self.moves is None else Report.of(self.hooks, self.moves, self.filled)
        lost = {str(key): "belongs to no parameter" for key in self.orphans}
        return replace(made, dropped={**made.dropped, **lost})


class LoadHook:
    """A hook for `torch.optim.Optimizer.register_load_state_dict_pre_hook`.

    Hooks registered one after the other on one optimizer act together: rules in the order of registration, then a
    match by name with the live parameters, whatever groups these are in. So each of them is `match_names` and more.
    The dict that is loaded is not changed, and tensors that are only moved are not copied. If anything does not fit,
    the optimizer is left as it is.

    Attributes:
        moves: The migration behind the last load; None before, and where every parameter was kept as it was.
    """

    moves: SectionMoves | None = None
    _told: Told | None = None

    @property
    def report(self) -> Report | None:
        """What the last load did; None before."""
        return self._told.report if self._told is not None else None

    def prepare(self, request: Request) -> None:
        """Say what is wanted."""

    def identify(self) -> tuple[torch.nn.Module | None, Sequence[str] | None]:
        """A model that names the live parameters, and names for those of the checkpoint, where they are given."""
        return None, None

    def finish(self, optimizer: torch.optim.Optimizer, made: StateDict) -> None:
        """Called when the new dict is complete."""

    def __call__(self, optimizer: torch.optim.Optimizer, state_dict: StateDict) -> StateDict | None:
        """The dict to load instead; None where a later hook gives it.

        Raises:
            OptimStateError: The state does not fit.
        """
        hooks = self._beside(optimizer)
        if hooks[-1] is not self:
            return None
        return _load(optimizer, state_dict, hooks)

    def _beside(self, optimizer: torch.optim.Optimizer) -> list[LoadHook]:
        """This hook and those registered directly before and after it; alone if it is not registered."""
        registered = list(getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", {}).values())
        if registered.count(self) > 1:
            raise PlanError(f"{self} is registered twice on one optimizer", hint="Remove one of them.")
        if self not in registered:
            return [self]
        first = last = registered.index(self)
        while first > 0 and isinstance(registered[first - 1], LoadHook):
            first -= 1
        while last + 1 < len(registered) and isinstance(registered[last + 1], LoadHook):
            last += 1
        return registered[first : last + 1]

    def __str__(self) -> str:
        return "match_names"

    def __repr__(self) -> str:
        return str(self)


def adapt(optimizer: torch.optim.Optimizer, state_dict: StateDict, *hooks: LoadHook) -> StateDict:
    """The dict that load hooks would hand to an optimizer, for one whose own loading does not let them.

    `optimizer.load_state_dict(hooks.adapt(optimizer, state_dict, hooks.match_names()))` also works where
    `load_state_dict` runs no hooks (bitsandbytes), or goes back to the dict from before they ran (pytorch_optimizer).

    Args:
        optimizer: Not changed.
        state_dict: Not changed.
        *hooks: In order; without any, parameters are matched by name.

    Raises:
        OptimStateError: The state does not fit.
    """
    return _load(optimizer, state_dict, hooks or (LoadHook(),))


def _load(optimizer: torch.optim.Optimizer, state_dict: StateDict, hooks: Sequence[LoadHook]) -> StateDict:
    if not {"state", "param_groups"} <= state_dict.keys():
        raise StateMismatchError(
            f"this is no optimizer's state dict: it has {', '.join(map(repr, list(state_dict)[:5]))}",
            hint="Give the part of the checkpoint that is the optimizer's, or the whole to optimstate.resume().",
        )
    model, saved = _identities(hooks)
    live = Live.of(optimizer, model)
    request = Request(named(OptimizerState.from_node(state_dict), saved), live)
    for hook in hooks:
        hook.prepare(request)
    with no_garbage_collection():
        made, told = matched(request, tuple(map(str, hooks)), live.names)
    for hook in hooks:
        hook.finish(optimizer, made)
        hook._told, hook.moves = told, told.moves
    if LOGGER.isEnabledFor(logging.INFO):
        LOGGER.info(told.report.summary())
    return made


def _identities(hooks: Sequence[LoadHook]) -> tuple[torch.nn.Module | None, Sequence[str] | None]:
    models, names = zip(*(hook.identify() for hook in hooks), strict=True)
    given = [model for model in models if model is not None]
    saved = [found for found in names if found is not None]
    if any(model is not given[0] for model in given):
        raise PlanError("two hooks name the live parameters by different models", hint="Give it to one of them.")
    if any(list(found) != list(saved[0]) for found in saved):
        raise PlanError("two hooks give the checkpoint's parameters different names", hint="Leave it to one of them.")
    return (given[0] if given else None), (saved[0] if saved else None)


def named(state: OptimizerState, saved: Sequence[str] | None = None) -> OptimizerState:
    """A checkpoint's state with names.

    Raises:
        StateMismatchError: It has none and none are given, or their number is another.
    """
    if saved is not None:
        return state.named(saved)
    if not state.is_named and any(group.params for group in state.groups):
        count = sum(len(group.params) for group in state.groups)
        raise StateMismatchError(
            f"the {count} parameters of the checkpoint's optimizer have no names, so they cannot be matched",
            hint="Give them in the order they had, hooks.match_names(saved=[...]), write them into the file with "
            "`optimstate name`, or save from an optimizer built on model.named_parameters().",
        )
    return state


def matched(request: Request, hooks: tuple[str, ...], names: Sequence[Sequence[str]]) -> tuple[StateDict, Told]:
    """The dict that the live optimizer can load by position.

    Args:
        request: What is to be done.
        hooks: Who asked for it.
        names: Of the live parameters, as the optimizer is to keep them.

    Raises:
        MigrationError: It cannot be done.
    """
    if request.plan.policy.hyperparameters == "live":
        request.options.setdefault("*", "live")
    if is_settled(request):
        request.plan = request.plan.with_policy(unused="ignore")
    state, orphans = _without_orphans(request)
    old = [group.options for group in state.groups]
    state = replace(state, groups=tuple(_undecided(group, request) for group in state.groups))
    moves, filled = None, dict[str, str]()
    kept = _kept(state, request)
    if kept is not None:
        slots: Mapping[str, Slots | None] = kept
        options = [dict(group.options) for group in state.groups]
        bases: list[int | None] = list(range(len(options)))
    else:
        moves = _planned(request, state)
        result = execute_optimizer(moves, state)
        options = [dict(group.options) for group in moves.groups]
        bases = [group.base for group in moves.groups]
        slots, filled = _filled(request, {str(name): found for _, name, found in result.parameters()}, moves)
    chosen = [
        _options(request, made, old[base] if base is not None else {}, live)
        for made, base, live in zip(options, bases, request.live.options, strict=True)
    ]
    return _as_dict(request, slots, chosen, names), Told(hooks, tuple(kept or ()), moves, filled, tuple(orphans))


def is_settled(request: Request) -> bool:
    """Whether the checkpoint has the live names already: then a rule that matches nothing has done its work before.

    So a script that was resumed with a rule can be resumed with it again, and trainers that load an optimizer's own
    state (Accelerate does) can.
    """
    saved = {name for group in request.state.groups for name in group.names or ()}
    return saved == {name for group in request.live.names for name in group}


def _without_orphans(request: Request) -> tuple[OptimizerState, list[Any]]:
    """The state without entries under keys that stand for parameters but are in no group; and these keys."""
    state = request.state
    lost = [key for key in state.orphans() if isinstance(key, int)]
    if not lost:
        return state, []
    if request.plan.policy.unexpected == "error":
        raise MigrationError(
            [f"the checkpoint has state under the key {key!r}, which is in no param group" for key in lost[:4]],
            hint="Drop it with hooks.drop_unexpected().",
        )
    return replace(state, state={key: value for key, value in state.state.items() if key not in set(lost)}), lost


def _undecided(group: Group, request: Request) -> Group:
    """A group without the options of which a hook decides, so that the planner does not stumble over them."""
    decided = request.values.keys() | {key for key, source in request.options.items() if source == "live"}
    if not decided:
        return group
    return replace(group, options={key: value for key, value in group.options.items() if key not in decided})


def _kept(state: OptimizerState, request: Request) -> dict[str, Slots | None] | None:
    """The state by name where the live optimizer has the same parameters in the same groups, and no rule changes any.

    Most resumptions are of this kind, and need no plan; one that does not fit gets a plan that says why.
    """
    plan = request.plan
    if plan.groups or plan.guard.has or plan.guard.lacks:
        return None
    live, saved = request.live.names, [group.names or () for group in state.groups]
    if len(live) != len(saved) or any(set(a) != set(b) for a, b in zip(live, saved, strict=True)):
        return None
    found = {str(name): slots for _, name, slots in state.parameters()}
    templates = [template for rule in plan.all_rules() for template in rule.sources]
    if any(template.match(name) is not None for name in found for template in templates):
        return None
    algorithm = recognise(
        dict.fromkeys(slot for slots in found.values() for slot in slots or ()), state.groups[0].options
    )
    if algorithm is not None and algorithm.is_flat and any(a != b for a, b in zip(live, saved, strict=True)):
        return None
    for name, parameter in request.live.pairs():
        slots = found[name]
        if slots:
            shapes = {str(path[-1]): shape_of(value) for path, value in flat_slots(slots)}
            shape = parameter_shape(shapes, algorithm)
            if shape is not None and shape != tuple(parameter.shape):
                return None
    return found


def _planned(request: Request, state: OptimizerState) -> SectionMoves:
    live = request.live
    decided = request.values.keys() | {key for key, source in request.options.items() if source == "live"}
    options = tuple({key: group[key] for key in group if key not in decided} for group in live.options)
    try:
        migration = plan_optimizer(request.plan, state, target=Target(live.names, options, live.shapes()))
    except MigrationError as error:
        raise MigrationError(error.problems, hint=_remedies(error.problems)) from error
    request.counts = [count for _, count in migration.counts]
    return migration.sections["optimizer"]


_REMEDIES = {
    "nothing fills": "rename({old: new}), duplicate({old: [new, ...]}), or fill_missing()",
    "is not in the target": "rename({old: new}) or drop_unexpected()",
    "param groups": 'hyperparameters("live"), hyperparameters(<option>=<value>), or regroup(...)',
    "gives the shape": 'resize("name"), split({...}), fuse({...}), or reset("name")',
    "has no options": 'hyperparameters("live") or regroup(...)',
    "it differs": 'regroup(step="min"), or another plan policy with migrate(...)',
}


def _remedies(problems: Sequence[str]) -> str:
    found = [remedy for mark, remedy in _REMEDIES.items() if any(mark in problem for problem in problems)]
    return f"As hooks of optimstate.hooks: {'; '.join(found)}." if found else ""


def _filled(
    request: Request, slots: Mapping[str, Slots | None], moves: SectionMoves
) -> tuple[Mapping[str, Slots | None], dict[str, str]]:
    new = {move.target for move in moves.moves if move.expression is None}
    if not new or not request.fills:
        return slots, {}
    made = dict(slots)
    said: dict[str, str] = {}
    for name, parameter in request.live.pairs():
        for fill in request.fills if name in new else ():
            found = fill(name, parameter, slots)
            if found is not None:
                made[name], said[name] = found
                break
    return made, said


def _options(
    request: Request, planned: dict[str, Any], saved: Mapping[str, Any], live: Mapping[str, Any]
) -> dict[str, Any]:
    """A group's options: planned ones (the file's), unless a hook says otherwise."""
    rest = request.options.get("*", "file")
    made: dict[str, Any] = {}
    for key in dict.fromkeys((*saved, *planned, *live)):
        source = request.options.get(key, rest)
        if key in request.values:
            made[key] = request.values[key]
        elif source == "live":
            if key in live:
                made[key] = live[key]
        elif key in planned:
            made[key] = planned[key]
        elif key in live and source == "merge":
            made[key] = live[key]
    made.update({key: value for key, value in request.values.items() if key not in made})
    return made


def _as_dict(
    request: Request,
    slots: Mapping[str, Slots | None],
    options: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> StateDict:
    state: dict[Any, Any] = {}
    groups: list[dict[str, Any]] = []
    start = 0
    live = request.live
    for own, plain, order, chosen in zip(names, live.names, live.keys, options, strict=True):
        keys = Consecutive(range(start, start + len(own)))
        start += len(own)
        state.update((key, slots[name]) for key, name in zip(keys, plain, strict=True) if slots[name] is not None)
        group = {**chosen, "param_names": list(own)} if live.keeps_names else dict(chosen)
        groups.append({**{key: group[key] for key in (*order, *group) if key in group}, "params": keys})
    known = {key for group in request.state.groups for key in group.params}
    others = {key: value for key, value in request.state.state.items() if key not in known and isinstance(key, str)}
    kept = {key: value for key, value in request.state.node.items() if key not in ("state", "param_groups")}
    return {**kept, "state": {**state, **others}, "param_groups": groups}
