"""Apply a plan to a whole checkpoint: its models, averages, optimizers and schedulers together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from optimstate.describe import few
from optimstate.errors import MigrationError
from optimstate.plan.apply.beside import followed_nowhere, refuse_other_parameters
from optimstate.plan.apply.division import optimizers_of, placed, reported, schedulers_of
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.apply.masters import masters_beside
from optimstate.plan.apply.models import plain_tensors, rebuilt_model
from optimstate.plan.apply.options import followers_of, scheduled, with_group_options, with_options
from optimstate.plan.apply.stamps import APPLIED, METADATA, refuse_second, stamped
from optimstate.plan.apply.switched import with_switched_slots
from optimstate.plan.expressions.tree import Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.division import divided
from optimstate.plan.solve.groups import GroupPlan
from optimstate.plan.solve.inventory import model_inventory, optimizer_inventory
from optimstate.plan.solve.migration import Inventory, Like, Migration, SectionMoves
from optimstate.plan.solve.planner import plan_migration
from optimstate.problems import Problem
from optimstate.state.loose import gathered, spread
from optimstate.state.names import WRAPPERS, wrapper_prefix
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, judged, with_hosts
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, Path, format_path, rebuilt_mapping, replaced

__all__ = ["apply_plan"]


def apply_plan(
    plan: Plan, tree: Any, *, names: Mapping[str, Sequence[str]] | None = None, like: Like | None = None
) -> tuple[Any, Migration, list[str]]:
    """Move every model, optimizer, averaged model and scheduler of a checkpoint by one plan.

    Wrapper prefixes that all names of a section share (`module.`, `_orig_mod.`) are transparent, unless a rule itself
    begins with one.

    Args:
        plan: What to do.
        tree: The checkpoint; not changed.
        names: For optimizers without names, by the section's label: their parameters' names in order.
        like: The new model, in whose order and groups the optimizers are written.

    Returns:
        The new tree, the migration, and notes: sections that have no names and were left as they are, and whatever else
        deserves attention.

    Raises:
        MigrationError: The plan does not fit; nothing is changed.
    """
    refuse_second(plan, tree)
    apart = gathered(tree)
    if apart is not None:
        made, migration, notes = apply_plan(plan, apart, names=names, like=like)
        return spread(made), migration, notes
    checkpoint = _Checkpoint(plan, tree, names or {})
    _refuse_unreached(plan, checkpoint, like)
    if like is not None:
        _refuse_unordered(checkpoint)
    migration = plan_migration(plan, checkpoint.inventories(like))
    for section in checkpoint.anonymous:
        if _lists_parameters(section):
            refuse_other_parameters(key_of(section), migration)
    migration = with_options(plan, migration, checkpoint.optimizers, checkpoint.states.keys())
    migration, schedules, notes = scheduled(plan, migration, checkpoint.schedulers, checkpoint.optimizers)
    notes = [*checkpoint.left_alone(migration), *checkpoint.outside(migration), *notes]
    if plan.optimizers:
        made, migration = checkpoint.divided(tree, migration, schedules)
    else:
        made = replaced(tree, {**checkpoint.rebuilt(migration), **schedules})
    notes += checkpoint.notes
    return stamped(plan, made), migration, notes + migration.notes


def key_of(section: Section) -> str:
    """The name of a section in reports."""
    return f"{section.kind} {section.label}"


class _Checkpoint:
    """The sections of a tree as the planner sees them: without wrapper prefixes."""

    def __init__(self, plan: Plan, tree: Any, names: Mapping[str, Sequence[str]]) -> None:
        self.see_wrappers = any(rule.source.text.startswith(WRAPPERS) for rule in plan.all_rules())
        self.plan, self.names, self.tree = plan, names, tree
        self.anonymous: list[Section] = []
        self.schedulers: list[Section] = []
        self.named: dict[str, tuple[Section, str]] = {}
        self.states: dict[str, OptimizerState] = {}
        self.optimizers: dict[str, OptimizerState] = {}
        self.notes: list[str] = []
        self.judgement = judged(tree)
        for section in self.judgement.sections:
            self._sort(section)

    def _sort(self, section: Section) -> None:
        if section.kind == "scheduler":
            self.schedulers.append(section)
            return
        if section.kind == "optimizer" and not isinstance(section.node, Opaque):
            self.optimizers[key_of(section)] = section.optimizer()
        found = self._names_of(section)
        if found is None:
            self.anonymous.append(section)
            return
        prefix = "module." if section.kind == "ema" and "n_averaged" in section.node else ""
        if not self.see_wrappers:
            prefix += wrapper_prefix([name.removeprefix(prefix) for name in found])
        self.named[key_of(section)] = section, prefix

    def _names_of(self, section: Section) -> list[str] | None:
        """The parameters' names in order; None where there are none, or where a pickled object holds them."""
        if isinstance(section.node, Opaque) or section.positional:
            return None
        if section.kind != "optimizer":
            return [name for name in section.tensors() if section.kind != "ema" or name != "n_averaged"]
        state = section.optimizer()
        if not state.is_named and section.label in self.names:
            state = state.named(self.names[section.label])
        if not state.is_named:
            return None
        self.states[key_of(section)] = state
        return [str(name) for _, name, _ in state.parameters()]

    def _without_orphans(self, key: str, moves: SectionMoves) -> OptimizerState:
        """The state to be moved: what belongs to no parameter stays in it unless the policy drops it."""
        state = self.states[key]
        if not (moves.changes and state.of_no_parameter()):
            return state
        made = state.without_numbered_orphans() if self.plan.policy.unexpected == "drop" else state
        self._note_orphans(key, state.state.keys() - made.state.keys(), "left out")
        self._note_orphans(key, made.of_no_parameter(), "left as it is")
        return made

    def _note_orphans(self, key: str, orphans: Collection[Any], outcome: str) -> None:
        if orphans:
            where = few(sorted(map(str, orphans)), 4)
            self.notes.append(f"{key}: state under {where} belongs to no parameter: {outcome}")

    def left_alone(self, migration: Migration) -> Iterator[str]:
        """Notes on sections without names, which no rule can move."""
        rules = any(True for _ in self.plan.all_rules())
        if not rules and (self.plan.groups or self.plan.schedulers):
            return  # options and schedules need no names
        for section in self.anonymous:
            if rules or key_of(section) not in migration.sections:
                yield f"{key_of(section)}: no parameter names, left as it is"

    def outside(self, migration: Migration) -> Iterator[str]:
        """Notes on what belongs to parameters and is in no section."""
        prefixes = {key: prefix for key, (_, prefix) in self.named.items()}
        followed = {
            masters.path
            for key, state in self.states.items()
            if migration.sections[key].changes
            for masters in masters_beside(self.tree, self.named[key][0].path, state, self._shapes)
        }
        return followed_nowhere(self.tree, self.judgement, migration, prefixes, followed)

    def inventories(self, like: Like | None) -> dict[str, Inventory]:
        """What the planner needs to know of each section."""
        made = {}
        for key, (section, prefix) in self.named.items():
            if section.kind == "optimizer":
                self.states[key] = _without_prefix(self.states[key], prefix)
                target = None if like is None else like.target(section.label, len(self.optimizers))
                found = optimizer_inventory(self.states[key], shapes=self._shapes, target=target)
                made[key] = found if like is None or target is not None else found._replace(order=like.names)
            else:
                made[key] = model_inventory(plain_tensors(section, prefix))
        return made

    @cached_property
    def _shapes(self) -> dict[str, Shape | None]:
        """The shapes of parameters as models have them; None where two models disagree."""
        found: dict[str, Shape | None] = {}
        for section, prefix in self.named.values():
            if section.kind == "optimizer":
                continue
            for name, value in plain_tensors(section, prefix).items():
                shape = value.shape if isinstance(value, LazyTensor) else None
                found[name] = shape if found.get(name, shape) == shape else None
        return found

    def divided(self, tree: Any, migration: Migration, schedules: Mapping[int, Any]) -> tuple[Any, Migration]:
        """The tree with the optimizers that the plan's tables make, and the migration as it is reported."""
        parts = divided(self.plan, migration, self.states)
        for key, state in self.states.items():
            self._note_orphans(key, state.of_no_parameter(), "left out")
        states = {}
        for path, state in optimizers_of(parts, self.states).items():
            groups = [group for part in parts if part.rule.path == path for group in part.moves.groups]
            states[path], found = with_switched_slots(state, groups)
            self.notes += [f"optimizer {path}: {note}" for note in found]
        prefix = {part.rule.path: self.named[part.key][1] for part in parts}
        nodes = {path: _with_prefix(state, prefix[path]).to_node() for path, state in states.items()}
        followers: dict[Path, Mapping[str, Mapping[str, Any]]] = {}
        for section, key, _ in followers_of(
            self.plan, migration.sections, self.schedulers, self.optimizers, all_of=True
        ):
            own = [part for part in parts if part.key == key]
            followers[section.path] = schedulers_of(schedules.get(id(section.node), section.node), own)
        models = {key: moves for key, moves in migration.sections.items() if key not in self.states}
        made = replaced(tree, {**self.rebuilt(migration._replace(sections=models)), **schedules})
        old = [self.named[key][0] for key in self.states]
        for section in old:
            for masters in masters_beside(tree, section.path, self.states[key_of(section)], self._shapes):
                message = "weights in the order of the optimizer's parameters stand beside it, and cannot be divided"
                raise MigrationError.of("unreached", message, format_path(masters.path))
        if any(section.host is not None for section in old):
            message = "flattened optimizer state cannot become other optimizers: convert the checkpoint first"
            raise MigrationError.of("unreached", message)
        return placed(made, nodes, [section.path for section in old], followers), reported(migration, parts)

    def rebuilt(self, migration: Migration) -> dict[int, Any]:
        """The nodes that change, by the id of the old one."""
        made: dict[int, Any] = {}
        for key, (section, prefix) in self.named.items():
            if key not in migration.sections:
                continue
            moves = migration.sections[key]
            if section.kind == "optimizer":
                state = execute_optimizer(moves, self._without_orphans(key, moves))
                state = self._switched(key, state, moves.groups)
                if state is not self.states[key] or (prefix and moves.changes):
                    made[id(section.node)] = _with_prefix(state, prefix).to_node()
                made.update(self._masters(key, section, migration))
            elif moves.changes:
                made[id(section.node)] = rebuilt_model(section, moves, prefix)
        for section in self.anonymous:
            options = migration.sections.get(key_of(section))
            if options is not None and options.regrouped:
                key = key_of(section)
                state = with_group_options(self.optimizers[key], options)
                made[id(section.node)] = self._switched(key, state, options.groups).to_node()
        made.update(self._noted(made))
        return with_hosts([section for section, _ in self.named.values()], made)

    def _switched(self, key: str, state: OptimizerState, groups: Sequence[GroupPlan]) -> OptimizerState:
        """An optimizer of the result, with the slots of the options that the plan turns on."""
        if not groups:
            return state
        state, notes = with_switched_slots(state, groups, self.optimizers[key].groups)
        self.notes += [f"{key}: {note}" for note in notes]
        return state

    def _noted(self, made: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
        """Optimizers whose certificate describes the checkpoint before this plan; the plan is noted beside it."""
        for section in [*(found for found, _ in self.named.values()), *self.anonymous]:
            node = made.get(id(section.node), section.node)
            beside = node.get(METADATA) if isinstance(node, Mapping) and section.kind == "optimizer" else None
            if isinstance(beside, Mapping) and "certificate" in beside and self.plan != Plan():
                noted = {**beside, APPLIED: [*beside.get(APPLIED, ()), self.plan.digest]}
                yield id(section.node), rebuilt_mapping(node, {**node, METADATA: noted})

    def _masters(self, key: str, section: Section, migration: Migration) -> dict[int, Any]:
        """What lists of weights beside an optimizer become, by the id of the old one."""
        moves, state = migration.sections[key], self.states[key]
        if section.host is not None or not moves.changes:
            return {}
        made = {}
        for masters in masters_beside(self.tree, section.path, state, self._shapes):
            names = [[str(name) for name in group.names or ()] for group in state.groups]
            found = masters.followed(moves, names, lambda: self._weights(migration))
            if found is not None:
                made[id(masters.node)] = found
        return made

    def _weights(self, migration: Migration) -> dict[str, Any]:
        """The tensors of all models of the result."""
        made: dict[str, Any] = {}
        for key, (section, prefix) in self.named.items():
            if section.kind == "model":
                made.update(execute_model(migration.sections[key], plain_tensors(section, prefix)))
        return made


def _without_prefix(state: OptimizerState, prefix: str) -> OptimizerState:
    return _renamed(state, lambda name: name.removeprefix(prefix)) if prefix else state


def _with_prefix(state: OptimizerState, prefix: str) -> OptimizerState:
    return _renamed(state, lambda name: prefix + name) if prefix else state


def _renamed(state: OptimizerState, rename: Callable[[Any], str]) -> OptimizerState:
    by_name = all(isinstance(key, str) for group in state.groups for key in group.params)
    groups = tuple(
        group._replace(
            names=tuple(map(rename, group.names or ())),
            params=tuple(map(rename, group.params)) if by_name else group.params,
        )
        for group in state.groups
    )
    known = {key for group in state.groups for key in group.params} if by_name else set()
    moved = {rename(key) if key in known else key: slots for key, slots in state.state.items()}
    return state._replace(groups=groups, state=moved)


def _refuse_unordered(checkpoint: _Checkpoint) -> None:
    """Refuse an order by names that cannot be applied to every optimizer."""
    problems = [
        Problem(
            "unreached",
            "has no parameter names, so it cannot be written in the order of the new model",
            key_of(section),
            remedy="give it names first (optimstate name)",
        )
        for section in checkpoint.anonymous
        if section.kind == "optimizer"
    ]
    if not problems and not checkpoint.states:
        message = "the checkpoint has no optimizer that could be written in the order of the new model"
        problems = [Problem("unreached", message, remedy="leave out the order")]
    if problems:
        raise MigrationError(problems)


def _nameless(checkpoint: _Checkpoint) -> Iterator[Problem]:
    """Why rules find no names in a checkpoint: what it has instead."""
    for section in checkpoint.anonymous:
        if isinstance(section.node, Opaque):
            message = f"is a pickled {section.node.type.path}, into which rules do not reach"
            alone = "write its weights alone (optimstate convert --section model)"
            remedy = alone if section.kind == "model" else "save its state_dict() instead"
        else:
            message, remedy = "has no parameter names", "give it names (optimstate name)"
        yield Problem("unreached", message, key_of(section), remedy=remedy)
    for path, reason in checkpoint.judgement.others.items():
        yield Problem("unreached", f"is not a section: {reason}", format_path(path))


def _refuse_unreached(plan: Plan, checkpoint: _Checkpoint, like: Like | None) -> None:
    """Refuse a plan that addresses parameters by name where an optimizer has no names."""
    if plan.policy.hyperparameters == "live" and (like is None or not like.targets):
        message = 'hyperparameters = "live" in [policy] speaks of an optimizer in memory, and a file has none'
        remedy = "use it in optimstate.resume or hooks, or give the new run's checkpoint with --like"
        raise MigrationError.of("unreached", message, remedy=remedy)
    if plan.policy.unused != "error":
        return
    rest = (
        ("[[optimizer]] tables", bool(plan.optimizers)),
        (f'optimizer = "{plan.optimizer}"', bool(plan.optimizer)),
        ("[slots]", bool(plan.slots)),
        ("`group` of a rule", any(rule.group is not None for rule in plan.all_rules())),
    )
    problems = [] if checkpoint.named or not any(True for _ in plan.all_rules()) else list(_nameless(checkpoint))
    anonymous = [section for section in checkpoint.anonymous if section.kind == "optimizer"]
    for section in anonymous:
        tables = any(rule.match and rule.is_for(section.label) for rule in plan.groups)
        if asked := [text for text, given in (("[[group]] tables with `match`", tables), *rest) if given]:
            message = f"has no parameter names, so {' and '.join(asked)} cannot reach it"
            remedy = "give it names (optimstate name), or leave that out of the plan"
            problems.append(Problem("unreached", message, key_of(section), remedy=remedy))
    if problems:
        raise MigrationError(problems)


def _lists_parameters(section: Section) -> bool:
    """Whether a section without names stands for parameters, by their order."""
    if section.kind == "optimizer":
        return any(group.params for group in section.optimizer().groups)
    return section.positional
