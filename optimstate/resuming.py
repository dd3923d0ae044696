"""Resume everything from a checkpoint by one plan: weights, their average, optimizer, scheduler, gradient scaler."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optimstate.errors import MigrationError, StateMismatchError
from optimstate.formats.registry import open_checkpoint
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Guard
from optimstate.plan.solve.migration import Inventory, SectionMoves
from optimstate.problems import Problem
from optimstate.state.flattened import find_flat_state
from optimstate.state.names import mentions_wrapper
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section, find_sections
from optimstate.tensors.compute import to_torch
from optimstate.tensors.lazy import LazyTensor, Storage
from optimstate.tree import format_path

if TYPE_CHECKING:
    import torch

    from optimstate.hooks import Report

__all__ = ["Resumed", "resume"]

_LOGGER = logging.getLogger("optimstate")
_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval"}
_SMALL = 1 << 20  # bytes; smaller tensors are read, so that the number of maps stays within what systems allow


@dataclass(frozen=True)
class Resumed:
    """What a resumption did.

    Attributes:
        reports: What became of the parameters: of `model`, `ema` and `optimizer`, as far as they were given.
        notes: What deserves attention though nothing is wrong.
        problems: What `optimstate.hooks.resume_problems` finds in the result.
    """

    reports: Mapping[str, Report]
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def __str__(self) -> str:
        lines = [f"{key}: {report}" for key, report in self.reports.items()]
        return "\n".join([*lines, *self.notes, *map(str, self.problems)])


def resume(
    checkpoint: str | PathLike[str] | Mapping[str, Any],
    *,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    ema: torch.nn.Module | None = None,
    scaler: Any = None,
    plan: Plan | str | PathLike[str] | None = None,
    schedule: Literal["checkpoint", "live"] | None = None,
) -> Resumed:
    """Load a checkpoint into a run whose model, groups or wrappers may have changed: all of it, or nothing.

    The parts are found by their structure. Parameters are matched by name, wrapper prefixes on either side aside.
    Everything is planned before anything is changed, and what was changed is put back if a part cannot be loaded.

    Args:
        checkpoint: A file or folder in any format that optimstate reads (nothing in it is executed), or what was read
            from one: a mapping with the parts anywhere inside.
        model: Gets the weights; also names the parameters of an optimizer that was built without names.
        optimizer: Gets the state by name.
        scheduler: Gets its state, rebuilt for the optimizer's param groups.
        ema: An `AveragedModel`.
        scaler: A `GradScaler`; the state of one that was disabled, which is empty, leaves it as it is.
        plan: What has changed, as a plan or the path of a plan file; without, only wrappers, order and groups may have.
        schedule: Whether the scheduler has its arguments from the checkpoint or keeps its own, `live`, and takes the
            position alone; None for what the plan's policy says. Where the two differ, a note says so.

    Returns:
        What became of everything.

    Raises:
        CheckpointError: The checkpoint cannot be read.
        MigrationError: The plan does not fit.
        StateMismatchError: The checkpoint lacks a part, or has several that could be meant.
    """
    given = Plan() if plan is None else plan if isinstance(plan, Plan) else Plan.from_file(Path(plan))
    if schedule is not None:
        given = given.with_policy(schedule=schedule)
    run = _Run(_Parts(checkpoint), given)
    if model is not None:
        run.plan_module("model", model)
    if ema is not None:
        run.plan_module("ema", ema)
    if optimizer is not None:
        run.plan_optimizer(optimizer, model)
    if scheduler is not None:
        run.plan_scheduler(scheduler)
    if scaler is not None:
        run.plan_scaler(scaler)
    run.refuse_unused()
    run.carry_out()
    problems: tuple[Problem, ...] = ()
    if optimizer is not None:
        from optimstate.hooks import resume_problems

        # Which parameters start without state is planned and reported.
        problems = tuple(resume_problems(optimizer, scheduler=scheduler, skip=["coverage"]))
    made = Resumed(run.reports, tuple(run.notes), problems)
    _LOGGER.info("resume: %s", "; ".join(report.summary() for report in run.reports.values()) or "done")
    for problem in problems:
        _LOGGER.warning("resume: %s", problem)
    return made


class _Parts:
    """The sections of a checkpoint, with live tensors."""

    def __init__(self, checkpoint: str | PathLike[str] | Mapping[str, Any]) -> None:
        self._document = None if isinstance(checkpoint, Mapping) else open_checkpoint(Path(checkpoint))
        tree = checkpoint if self._document is None else self._document.tree
        self._original: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._live: dict[int, Any] = {}
        self._nothing = Storage((), 0)
        self._tree = self._shadow(tree)
        self._sections = find_sections(self._tree)

    def take(self, kind: str) -> Any:
        """The part of a kind, with live tensors.

        Raises:
            StateMismatchError: There is none, or there are several.
        """
        found = [section for section in self._sections if section.kind == kind]
        if len(found) > 1:
            named = [section for section in found if section.path and str(section.path[-1]).startswith(kind)]
            found = named if len(named) == 1 else found
        if len(found) == 1:
            return self._alive(self._in_file(found[0]))
        labels = ", ".join(_label(section) for section in found or self._sections) or "nothing that is known"
        if found:
            raise StateMismatchError(
                f"the checkpoint has several parts that could be the {kind}: {labels}",
                hint='Give a dict with one of each: {"model": ..., "optimizer": ...}.',
            )
        raise StateMismatchError(f"the checkpoint has no {kind}; it has {labels}")

    def _in_file(self, section: Section) -> Any:
        """The node that a section was found as, or what it stands for where it is a part of one."""
        if section.host is None:
            return self._original[id(section.node)]
        flat = find_flat_state(self._original[id(section.host.host)])
        assert flat is not None
        return flat.optimizer if section.kind == "optimizer" else flat.rest

    def scaler(self) -> dict[str, Any]:
        """The state of a gradient scaler; empty for a disabled one.

        Raises:
            StateMismatchError: There is none.
        """
        for key, node in _mappings(self._tree):
            if node.keys() >= _SCALER or (not node and "scaler" in str(key)):
                return dict(self._alive(self._original[id(node)]))
        raise StateMismatchError("the checkpoint has no state of a gradient scaler")

    def _shadow(self, node: Any) -> Any:
        """The tree as `find_sections` reads it: of a live tensor it needs the dtype and the shape."""
        from optimstate.installed_torch import torch

        if isinstance(node, torch.Tensor):
            return LazyTensor(self._nothing, str(node.dtype).removeprefix("torch."), tuple(node.shape))
        made: Any = node
        if isinstance(node, Mapping):
            made = {key: self._shadow(value) for key, value in node.items()}
        elif type(node) in (list, tuple):
            made = [self._shadow(value) for value in node]
        self._original[id(made)] = node
        self._keep.append(made)
        return made

    def _alive(self, node: Any) -> Any:
        if isinstance(node, LazyTensor):
            if id(node) not in self._live:
                tensor = to_torch(node)
                self._live[id(node)] = tensor.clone() if node.nbytes < _SMALL else tensor
            return self._live[id(node)]
        if isinstance(node, Mapping):
            return {key: self._alive(value) for key, value in node.items()}
        if type(node) in (list, tuple):
            return type(node)(self._alive(value) for value in node)
        return node


def _mappings(node: Any, key: Any = "") -> Iterator[tuple[Any, Mapping[Any, Any]]]:
    if isinstance(node, Mapping):
        yield key, node
        for inner, value in node.items():
            yield from _mappings(value, inner)
    elif isinstance(node, list):
        for value in node:
            yield from _mappings(value, key)


def _label(section: Section) -> str:
    return f"{section.kind} {format_path(section.path) or '(the whole)'}"


@dataclass
class _Step:
    """A part that is ready to be loaded, and how that is undone."""

    load: Callable[[], object]
    undo: Callable[[], object]


@dataclass
class _Run:
    """Plans all parts, then loads them."""

    parts: _Parts
    plan: Plan
    reports: dict[str, Report] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _steps: list[_Step] = field(default_factory=list)
    _inventories: dict[str, Inventory] = field(default_factory=dict)
    _counts: list[int] = field(default_factory=list)
    _settled: list[bool] = field(default_factory=list)
    _moves: SectionMoves | None = None
    _made: dict[str, Any] | None = None
    _before: list[dict[str, Any]] = field(default_factory=list)

    @property
    def _lenient(self) -> Plan:
        """The plan for one part: whether every rule matches, and the guard, is asked of all parts together."""
        return replace(self.plan.with_policy(unused="ignore"), guard=Guard())

    def _count(self, counts: list[int]) -> None:
        counts = counts or [0] * len(list(self.plan.all_rules()))
        self._counts = [a + b for a, b in zip(self._counts or [0] * len(counts), counts, strict=True)]

    def plan_module(self, kind: str, module: torch.nn.Module) -> None:
        """Plan the weights of a module or of an average."""
        from optimstate.hooks import Report
        from optimstate.hooks.modules import ModelLoad
        from optimstate.plan.solve.planner import plan_migration

        load = ModelLoad(module, self.parts.take(kind))
        self._inventories[kind] = load.inventory()
        self._settled.append(load.is_settled)
        migration = plan_migration(self._lenient, {kind: load.inventory()})
        made = load.made(migration.sections[kind])
        absent = [name for name in module.state_dict() if name not in made and not name.endswith("_extra_state")]
        if absent:
            raise StateMismatchError(f"the checkpoint's {kind} has no {absent[0]!r}")
        self._count([count for _, count in migration.counts])
        self.reports[kind] = Report.of((kind,), migration.sections[kind])
        self.notes += migration.notes
        before: dict[str, Any] = {}

        def apply() -> None:
            for name, value in module.state_dict().items():
                before[name] = value.to("cpu", copy=True) if hasattr(value, "to") else copy.deepcopy(value)
            module.load_state_dict(made)

        self._steps.append(_Step(apply, lambda: module.load_state_dict(before) if before else None))

    def plan_optimizer(self, optimizer: torch.optim.Optimizer, model: torch.nn.Module | None) -> None:
        """Plan the state of an optimizer."""
        from optimstate.hooks.engine.live import Live
        from optimstate.hooks.engine.match import matched
        from optimstate.hooks.engine.request import LoadRequest, is_settled, named
        from optimstate.plan.solve.planner import optimizer_inventory

        keeps_names = all("param_names" in group for group in optimizer.param_groups)
        live = Live.of(optimizer, None if keeps_names else model)
        request = LoadRequest(named(OptimizerState.from_node(self.parts.take("optimizer")), live), live)
        if not any(mentions_wrapper(t.text) for rule in self.plan.all_rules() for t in rule.sources or rule.targets):
            request.strip_prefixes()
        self._inventories["optimizer"] = optimizer_inventory(request.state)
        request.add(self._lenient)
        self._settled.append(is_settled(request))
        made, outcome = matched(request, ("optimizer",), live.names)
        self._moves, report = outcome.moves, outcome.report
        self._count(request.counts)
        self.reports["optimizer"] = report
        self.notes += report.notes
        before = optimizer.state, optimizer.param_groups

        def undo() -> None:
            optimizer.state, optimizer.param_groups = before

        self._made, self._before = made, [dict(group.options) for group in request.state.groups]
        self._steps.append(_Step(lambda: optimizer.load_state_dict(made), undo))

    def plan_scheduler(self, scheduler: Any) -> None:
        """Plan the state of a scheduler for the optimizer's groups, which get the rates that it gives them."""
        from optimstate.hooks import migrate_scheduler
        from optimstate.plan.apply.schedulers import Groups, LiveScheduler, followed

        state = self.parts.take("scheduler")
        if self._made is None:
            made = migrate_scheduler(state, None)
        else:
            options = [{k: v for k, v in group.items() if k != "params"} for group in self._made["param_groups"]]
            bases: list[int | None] = list(range(len(options)))
            groups = Groups(options, bases, self._before, [frozenset()] * len(options))
            if self._moves is not None:
                groups = Groups.of(self._moves, self._before)._replace(options=options)
            found = followed(state, groups, plan=self.plan, live=LiveScheduler.of(scheduler))
            made = found.state
            self._made["param_groups"] = [
                {**group, **new} for group, new in zip(self._made["param_groups"], found.options, strict=True)
            ]
            self.notes += [f"scheduler: {note}" for note in found.notes]
        before = copy.copy(vars(scheduler))

        def undo() -> None:
            vars(scheduler).clear()
            vars(scheduler).update(before)

        self._steps.append(_Step(lambda: scheduler.load_state_dict(made), undo))

    def plan_scaler(self, scaler: Any) -> None:
        """Plan the state of a gradient scaler."""
        made = self.parts.scaler()
        if not made or not scaler.is_enabled():
            self.notes.append("the gradient scaler keeps its own state, because one of the two is disabled")
            return
        before = scaler.state_dict()
        self._steps.append(_Step(lambda: scaler.load_state_dict(made), lambda: scaler.load_state_dict(before)))

    def refuse_unused(self) -> None:
        """Raise MigrationError where the guard, or a rule that matches nothing in any part, says that this is wrong."""
        from optimstate.plan.solve.problems import guarded, unmatched

        problems = list(guarded(self.plan.guard, self._inventories))
        if self.plan.policy.unused == "error" and not all(self._settled):
            rules = zip(self.plan.all_rules(), self._counts, strict=True)
            problems += [
                unmatched(number, rule, self._inventories) for number, (rule, count) in enumerate(rules, 1) if not count
            ]
        if problems:
            raise MigrationError(problems)

    def carry_out(self) -> None:
        """Load every part; if one fails, put all of them back."""
        with ExitStack() as undone:
            # Weights last: they alone are changed in place, and checked to fit.
            for step in [*self._steps[self._modules :], *self._steps[: self._modules]]:
                undone.callback(step.undo)
                step.load()
            undone.pop_all()

    @property
    def _modules(self) -> int:
        return sum(kind in ("model", "ema") for kind in self.reports)
