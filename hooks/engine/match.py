"""From a request to the dict that the live optimizer can load by position."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.hooks.engine.live import Consecutive
from optimstate.hooks.engine.report import Report
from optimstate.hooks.engine.request import LoadRequest, StateDict, is_settled
from optimstate.plan.apply.execute import execute_optimizer
from optimstate.plan.apply.stamps import METADATA
from optimstate.plan.apply.switched import Asked, started
from optimstate.plan.expressions.evaluate import shape_of
from optimstate.plan.slots.converted_options import option_names
from optimstate.plan.slots.outcomes import flat_slots
from optimstate.plan.solve.migration import SectionMoves, Target
from optimstate.plan.solve.planner import plan_optimizer
from optimstate.plan.solve.problems import idle_rules
from optimstate.plan.solve.reach import Reached, option_problems, takers, unreached
from optimstate.problems import Kind, Problem
from optimstate.record import Record
from optimstate.state.algorithms.registry import named, parameter_shape, recognise_state
from optimstate.state.algorithms.slots import MASTERS, Algorithm
from optimstate.state.optimizer import Group, OptimizerState, Slots

__all__ = ["LoadOutcome", "foreign_slots", "matched", "own_containers", "reached", "refuse_other_algorithm"]


class LoadOutcome(Record):
    """What a report is made from, once somebody asks for it.

    Attributes:
        hooks: Which hooks did it.
        kept: Parameters that were kept as they were, without a plan.
        moves: The migration, where there was one.
        filled: Parameters that got state from elsewhere, and how.
        orphans: Keys of state that belonged to no parameter.
        notes: What else deserves attention.
    """

    hooks: tuple[str, ...]
    kept: tuple[str, ...]
    moves: SectionMoves | None
    filled: Mapping[str, str]
    orphans: tuple[Any, ...]
    notes: tuple[str, ...] = ()

    @cached_property
    def report(self) -> Report:
        """The report."""
        made = Report(self.hooks, self.kept) if self.moves is None else Report.of(self.hooks, self.moves, self.filled)
        lost = {str(key): "belongs to no parameter" for key in self.orphans}
        return made._replace(dropped={**made.dropped, **lost}, notes=(*made.notes, *self.notes))


def matched(
    request: LoadRequest, hooks: tuple[str, ...], names: Sequence[Sequence[str]]
) -> tuple[StateDict, LoadOutcome]:
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
    _refuse_unreached(request)
    if request.plan.optimizers:
        _choose_table(request)
    asked, settled = request.plan, is_settled(request)
    if settled:
        request.plan = request.plan.with_policy(unused="ignore")
    state, orphans = _without_orphans(request)
    old = [group.options for group in state.groups]
    state = state._replace(groups=tuple(_undecided(group, request) for group in state.groups))
    moves, filled = None, dict[str, str]()
    algorithm = _algorithm(state)
    refuse_other_algorithm(request.plan.optimizer, algorithm, state, request.live.algorithm)
    kept = _kept(state, request, algorithm)
    if kept is not None:
        slots: Mapping[str, Slots | None] = kept
        options = [dict(group.options) for group in state.groups]
        bases: list[int | None] = list(range(len(options)))
    else:
        moves = _planned(request, state, algorithm)
        result = execute_optimizer(moves, state, live=dict(request.live.pairs()))
        options = [dict(group.options) for group in moves.groups]
        if moves.conversion is not None:
            options = [
                _converted(old, new.options, live)
                for old, new, live in zip(options, result.groups, request.live.options, strict=True)
            ]
            old = [dict[str, Any]() for _ in old]
        bases = [group.base for group in moves.groups]
        slots, filled = _filled(request, {str(name): found for _, name, found in result.parameters()}, moves)
    chosen = [
        _options(request, made, old[base] if base is not None else {}, live)
        for made, base, live in zip(options, bases, request.live.options, strict=True)
    ]
    live = request.live
    groups = [Asked(own, made, {}) for own, made in zip(live.names, chosen, strict=True)]
    slots, notes = started(named(live.algorithm), slots, groups, dict(live.pairs()))
    notes = (*notes, *(idle_rules(asked, request.counts) if settled else ()))
    outcome = LoadOutcome(hooks, tuple(kept or ()), moves, filled, tuple(orphans), notes)
    return _as_dict(request, slots, chosen, names), outcome


def reached(request: LoadRequest) -> Reached:
    """What a plan can refer to in this optimizer."""
    slots = dict.fromkeys(str(path[-1]) for _, _, found in request.state.parameters() for path, _ in flat_slots(found))
    options = [*(group.options for group in request.state.groups), *request.live.options]
    names = [name for group in request.live.names for name in group]
    return Reached(request.label, names, options, list(slots))


def _refuse_unreached(request: LoadRequest) -> None:
    """Refuse what a plan asks for besides its rules that does not apply to this optimizer."""
    problems = list(unreached(request.plan, [reached(request)]))
    if request.label is None and (request.plan.schedulers or request.plan.policy.schedule == "live"):
        asked = "[scheduler] tables are" if request.plan.schedulers else 'schedule = "live" in [policy] is'
        message = f"{asked} for a scheduler, which an optimizer's hook does not see"
        remedy = "resume with optimstate.resume, which moves the two together, or give them to hooks.migrate_scheduler"
        problems.append(Problem("unreached", message, remedy=remedy))
    if problems:
        raise MigrationError(problems)


def _choose_table(request: LoadRequest) -> None:
    """Reduce a plan's `[[optimizer]]` tables to the one for the live optimizer.

    Raises:
        MigrationError: The live optimizer has parameters of several tables, or of none.
    """
    live = [name for names in request.live.names for name in names]
    taken = takers(request.plan.optimizers, list(dict.fromkeys((*request.names(), *live))))
    own = {id(rule): rule for rule in (taken[name] for name in live)}
    if len(own) != 1 or None in own.values():
        which = " and ".join(str(rule) if rule is not None else "no table" for rule in own.values())
        message = f"the live optimizer has parameters of {which}; the tables and the live optimizers must agree"
        raise MigrationError.of("group", message, names=tuple(live[:3]))
    (rule,) = own.values()
    assert rule is not None
    problems = list(option_problems(rule.set, request.live.options, str(rule), known=option_names(rule.algorithm)))
    if problems:
        raise MigrationError(problems)
    request.elsewhere |= {name for name, taker in taken.items() if taker is not rule}
    request.values.update({key: value for key, value in rule.set.items() if key not in request.values})
    saved = _algorithm(request.state)
    same = saved is not None and saved.name == rule.algorithm
    request.plan = request.plan._replace(optimizers=(), optimizer="" if same else rule.algorithm)


def refuse_other_algorithm(wanted: str, saved: Algorithm | None, state: OptimizerState, live: str) -> None:
    """Refuse state of another algorithm than the live optimizer's: the only place that judges `optimizer = ...`.

    Args:
        wanted: What the plan makes of the state; empty for what it is.
        saved: What the state is, where that is known.
        state: The checkpoint's.
        live: What the live optimizer is; empty where that is not known.

    Raises:
        StateMismatchError: The live optimizer could not step with the result.
    """
    if wanted:
        if live != wanted:
            raise StateMismatchError(
                f"the plan makes {wanted} state, and the live optimizer is {live or 'of a class that is not known'}",
                hint=f"Build a {wanted} optimizer, or take `optimizer` out of the plan.",
            )
        return
    known = named(live)
    present = {str(slot) for slots in state.state.values() for slot in slots}
    if saved is None or known is None or saved.name == live or not present:
        return
    difference = foreign_slots(known, present)
    if difference:
        raise StateMismatchError(
            f"the checkpoint has the state of {saved.name}, and the live optimizer is {live}: its state {difference}",
            hint=f'Convert it: optimizer = "{live}" in the plan; or start without state: fresh = "**".',
        )


def foreign_slots(known: Algorithm, present: Iterable[str]) -> str:
    """Why slots are not those of an algorithm; empty where they are.

    Args:
        known: The algorithm.
        present: The names of the slots that there are; without any, nothing is amiss.
    """
    there = set(present)
    strange = sorted(slot for slot in there if known.slot(slot) is None and slot not in MASTERS)
    absent = sorted((_NEEDED & known.slots.keys()) - there) if there else []
    if strange:
        return f"has {describe(strange[0])}, which {known.name} does not keep"
    return f"lacks {describe(absent[0])}" if absent else ""


_NEEDED = frozenset({"step", "exp_avg", "exp_avg_sq", "exp_inf", "mu_product", "square_avg", "acc_delta"})
"""Slots without which no optimizer that keeps them can step."""


def _converted(old: Mapping[str, Any], new: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a converted group: those both algorithms have are kept, the rest are the live group's."""
    carried = {key: value for key, value in new.items() if key in old and value is old[key]}
    return {**live, **carried}


def _without_orphans(request: LoadRequest) -> tuple[OptimizerState, list[Any]]:
    """The state without entries under keys that stand for parameters but are in no group; and these keys."""
    state = request.state
    lost = [key for key in state.orphans() if isinstance(key, int)]
    if not lost:
        return state, []
    if request.plan.policy.unexpected == "error":
        raise MigrationError(
            [
                Problem("name", f"the checkpoint has state under the key {describe(key)}, which is in no param group")
                for key in lost[:4]
            ],
            hint="Drop it with hooks.drop_unexpected().",
        )
    return state.without_numbered_orphans(), lost


def _undecided(group: Group, request: LoadRequest) -> Group:
    """A group without the options that a hook decides, so that the planner does not compare them."""
    decided = request.values.keys() | {key for key, source in request.options.items() if source == "live"}
    if not decided:
        return group
    return group._replace(options={key: value for key, value in group.options.items() if key not in decided})


def _kept(state: OptimizerState, request: LoadRequest, algorithm: Algorithm | None) -> dict[str, Slots | None] | None:
    """The state by name where the live optimizer has the same parameters in the same groups, and no rule changes any.

    Most resumptions are of this kind, and need no plan; one that does not fit gets a plan that says why.
    """
    plan = request.plan
    if plan.optimizer or plan.groups or plan.guard.has or plan.guard.lacks:
        return None
    live, saved = request.live.names, [group.names or () for group in state.groups]
    if len(live) != len(saved) or any(set(a) != set(b) for a, b in zip(live, saved, strict=True)):
        return None
    found = {str(name): slots for _, name, slots in state.parameters()}
    templates = [template for rule in plan.all_rules() for template in rule.sources]
    if any(template.match(name) is not None for name in found for template in templates):
        return None
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


def _algorithm(state: OptimizerState) -> Algorithm | None:
    slots = (found for _, _, found in state.parameters())
    return recognise_state(slots, state.groups[0].options) if state.groups else None


def _saved_shapes(request: LoadRequest) -> dict[str, tuple[int, ...] | None]:
    """The shapes of the checkpoint's parameters where its slots cannot tell: vectors over all parameters.

    What `add_metadata` noted counts, else the shape of the live parameter of the same name; the vectors' length
    contradicts it if that has changed.
    """
    noted = request.state.node.get(METADATA, {}).get("shapes", {})
    return {**request.live.shapes(), **{str(name): tuple(shape) for name, shape in noted.items()}}


def _planned(request: LoadRequest, state: OptimizerState, algorithm: Algorithm | None) -> SectionMoves:
    live = request.live
    decided = request.values.keys() | {key for key, source in request.options.items() if source == "live"}
    options = tuple({key: group[key] for key in group if key not in decided} for group in live.options)
    shapes = _saved_shapes(request) if algorithm is not None and algorithm.is_flat else None
    try:
        target = Target(live.names, options, live.shapes(), dict(live.pairs()), request.elsewhere)
        migration = plan_optimizer(request.plan, state, target=target, shapes=shapes)
    except MigrationError as error:
        raise MigrationError(error.problems, hint=_remedies(error.problems)) from error
    request.counts = [count for _, count in migration.counts]
    return migration.sections["optimizer"]


# What hooks do about each kind of problem.
_HOOKS: Mapping[Kind, str] = {
    "unfilled": "rename({old: new}), duplicate({old: [new, ...]}), or fill_missing()",
    "unexpected": "rename({old: new}) or drop_unexpected()",
    "group": 'hyperparameters("live"), hyperparameters(<option>=<value>), or regroup(...)',
    "shape": 'resize("name"), split({...}), fuse({...}), or reset("name")',
    "options": 'hyperparameters("live") or regroup(...)',
    "unknown-shape": 'save with add_metadata(), which notes the shapes; or reset("all")',
    "disagreement": 'regroup(step="min"), or another plan policy with migrate(...)',
}


def _remedies(problems: Sequence[Problem]) -> str:
    kinds = {problem.kind for problem in problems}
    found = [remedy for kind, remedy in _HOOKS.items() if kind in kinds]
    return f"As hooks of optimstate.hooks: {'; '.join(found)}." if found else ""


def _filled(
    request: LoadRequest, slots: Mapping[str, Slots | None], moves: SectionMoves
) -> tuple[Mapping[str, Slots | None], dict[str, str]]:
    new = {move.target for move in moves.moves if move.expression is None}
    if not new or not request.fills:
        return slots, {}
    made = dict(slots)
    reasons: dict[str, str] = {}
    for name, parameter in request.live.pairs():
        for fill in request.fills if name in new else ():
            found = fill(name, parameter, slots)
            if found is not None:
                made[name], reasons[name] = found
                break
    return made, reasons


def _options(
    request: LoadRequest, planned: dict[str, Any], saved: Mapping[str, Any], live: Mapping[str, Any]
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
    request: LoadRequest,
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


def own_containers(node: Any) -> Any:
    """A copy of the dicts, lists and tuples around the same values; tensors are not copied."""
    if isinstance(node, Consecutive):
        return node
    if isinstance(node, dict):
        return {key: own_containers(value) for key, value in node.items()}
    if type(node) in (list, tuple):
        return type(node)(map(own_containers, node))
    return node
