"""The same plan for weights, their averages, and schedulers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any

from optimstate.errors import MigrationError
from optimstate.hooks.engine.hook import LOGGER
from optimstate.hooks.engine.report import Report
from optimstate.installed_torch import torch
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.apply.scheduled import BOUNDS, Groups, LiveScheduler
from optimstate.plan.apply.schedulers import followed, unreached_schedulers
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.groups import same_value
from optimstate.plan.solve.inventory import model_inventory
from optimstate.plan.solve.migration import Inventory, SectionMoves, Target
from optimstate.plan.solve.planner import plan_migration
from optimstate.plan.solve.resolve import Resolver
from optimstate.state.names import unwrapped
from optimstate.state.schedules import schedule_of
from optimstate.tensors.lazy import LazyTensor

__all__ = ["ModelHook", "ModelLoad", "migrate_model", "migrate_scheduler"]

_COUNT = "n_averaged"


class ModelLoad:
    """The entries of a state dict that a module is about to load, as the planner sees them: without wrapper prefixes.

    Args:
        module: Of which it is; an `AveragedModel` counts its averages besides.
        state_dict: Not changed.
        prefix: What stands before every name of the module.
    """

    def __init__(self, module: torch.nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        live = module.state_dict()
        ours = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
        self._prefix = prefix
        self._rest = {name: value for name, value in ours.items() if not _is_tensor(value) or name == _COUNT}
        tensors = {name: value for name, value in ours.items() if name not in self._rest}
        own = {name: value for name, value in live.items() if torch.is_tensor(value) and name != _COUNT}
        self._filled_by: dict[str, str] = {}
        plain, plain_live = unwrapped(tensors), unwrapped(own)
        self._tensors = {plain(name): value for name, value in tensors.items()}
        self._live = {plain_live(name): (name, value) for name, value in own.items()}
        for before, after in ((tensors, self._tensors), (own, self._live)):
            if len(before) != len(after):
                raise MigrationError.of("name", "two parameters have the same name when wrapper prefixes are taken off")

    @property
    def is_settled(self) -> bool:
        """Whether it already has the module's names, so that rules that match nothing were applied before."""
        return self._tensors.keys() == self._live.keys() - self._saved_once(self._tensors).keys()

    @property
    def has_the_same_shapes(self) -> bool:
        """Whether every entry has the name and the shape of one of the module's."""
        return all(
            name in self._live and value.shape == self._live[name][1].shape for name, value in self._tensors.items()
        )

    def inventory(self, plan: Plan) -> Inventory:
        """What the planner needs to know of each section.

        Args:
            plan: The one that is applied: which of several names of a tied parameter it fills is enough.
        """
        found = Resolver(plan.passes, "model", [0] * len(list(plan.all_rules())), []).resolve(
            dict.fromkeys(self._tensors)
        )
        self._filled_by = self._saved_once(found.made)
        shapes = {name: tuple(value.shape) for name, (_, value) in self._live.items() if name not in self._filled_by}
        return model_inventory(self._tensors, target=Target.of_names(shapes, self._own()))

    def refuse_unless_it_leads_back(self, plan: Plan, key: str) -> None:
        """Refuse stages that lead to a stored layout from another than the module's, whose names and shapes they need.

        Args:
            plan: The stages alone.
            key: What reports call the module.

        Raises:
            MigrationError: They do not fit.
        """
        if not any(rule.is_for(key) for rule in plan.all_rules()):
            return
        try:
            plan_migration(plan, {key: model_inventory(self._own())})
        except MigrationError as error:
            hint = f"`back` of the plan's [view] has to lead from the live {key} to the layout that is stored."
            raise MigrationError(error.problems, hint=hint) from None

    def _own(self) -> dict[str, Any]:
        """The values that the module has."""
        return {plain: value for plain, (_, value) in self._live.items()}

    def _saved_once(self, there: Iterable[str]) -> dict[str, str]:
        """Missing names of tied parameters, each with one that is there: safetensors stores every tensor once."""
        known = set(there)
        absent = [name for name in self._live if name not in known]
        if not absent:
            return {}
        memory = {_memory(value): name for name, (_, value) in self._live.items() if name in known}
        pairs = ((name, memory.get(_memory(self._live[name][1]))) for name in absent)
        return {name: other for name, other in pairs if other is not None}

    def made(self, moves: SectionMoves) -> dict[str, Any]:
        """The entries to load instead; a new parameter's is its own value, so that it stays as it is."""
        values = execute_model(moves, self._tensors, live=self._own())
        values.update({name: values[other] for name, other in self._filled_by.items() if other in values})
        made = {name: values.get(plain, own) for plain, (name, own) in self._live.items()}
        return {self._prefix + name: value for name, value in {**made, **self._rest}.items()}


def _is_tensor(value: Any) -> bool:
    return torch.is_tensor(value) or isinstance(value, LazyTensor)


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    """A key that is equal for identical views of the same memory; a tensor without memory equals only itself."""
    try:
        place = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        place = 0
    return (place, tensor.storage_offset(), tuple(tensor.shape)) if place else (id(tensor),)


class ModelHook:
    """A hook for `torch.nn.Module.register_load_state_dict_pre_hook`.

    Attributes:
        report: What the last load did; None before.
    """

    report: Report | None = None

    def __init__(self, plan: Plan) -> None:
        self._plan, self._back = plan.forward(), plan.backward()

    def __call__(
        self,
        module: torch.nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],  # noqa: ARG002
        strict: bool,  # noqa: ARG002 - torch says True whatever it was told
        missing_keys: list[str],  # noqa: ARG002
        unexpected_keys: list[str],  # noqa: ARG002
        error_msgs: list[str],  # noqa: ARG002
    ) -> None:
        """Rename the module's entries in `state_dict`, which is torch's own copy of the dict.

        Raises:
            MigrationError: The plan does not fit; nothing was loaded.
        """
        load = ModelLoad(module, state_dict, prefix)
        load.refuse_unless_it_leads_back(self._back, "model")
        plan = self._plan.with_policy(unused="ignore") if load.is_settled else self._plan
        moves = plan_migration(plan, {"model": load.inventory(plan)}).sections["model"]
        made = load.made(moves)
        for name in [name for name in state_dict if name.startswith(prefix)]:
            del state_dict[name]
        state_dict.update(made)
        self.report = Report.of(("migrate_model",), moves)
        if LOGGER.isEnabledFor(logging.INFO):
            LOGGER.info(self.report.summary())

    def __repr__(self) -> str:
        return "migrate_model"


def migrate_model(plan: Plan | str | PathLike[str]) -> ModelHook:
    """Move weights and buffers by a plan when a module loads: for any `nn.Module`, and for an `AveragedModel`.

    Tensors that are only moved are not copied. Wrapper prefixes (`module.`, `_orig_mod.`, ...) may differ between the
    checkpoint and the module. A parameter that the plan calls new keeps its value. Torch does not tell its hooks of
    `strict=False`: what may be missing or left behind, the plan's policies say.

    Args:
        plan: A plan, or the path of a plan file: the same one that the optimizer's `migrate` has.

    Raises:
        PlanError: The plan cannot be read.

    Example:
        `model.register_load_state_dict_pre_hook(hooks.migrate_model("plan.toml"))`
    """
    return ModelHook(Plan.of(plan))


def migrate_scheduler(
    state_dict: Mapping[str, Any],
    moves: SectionMoves | None,
    *,
    live: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    plan: Plan | str | PathLike[str] | None = None,
) -> dict[str, Any]:
    """The state of a scheduler for the param groups that an optimizer has after a load hook.

    A scheduler's next rates depend on the `lr` and `initial_lr` of the groups too: these are set in the optimizer.

    Args:
        state_dict: The scheduler's, not changed.
        moves: What became of the optimizer's groups: a load hook's `moves`. None where nothing did.
        live: The scheduler that keeps its own arguments and takes the position of the state. None to take the arguments
            of the state.
        optimizer: The one that was loaded, whose groups get the rates; that of `live` by default.
        plan: A plan, or the path of a plan file, whose `[scheduler]` tables change arguments.

    Raises:
        MigrationError: The state does not fit the old groups, holds lists of unknown meaning, or gives groups another
            rate and no optimizer is given that could get it.
        PlanError: The plan cannot be read.
    """
    asked = Plan(schedulers=Plan.of(plan).schedulers)
    problems = list(unreached_schedulers(asked, [("", state_dict)]))
    if problems:
        raise MigrationError(problems)
    if moves is None and live is None and not asked.schedulers:
        return dict(state_dict)
    scheduler = None if live is None else LiveScheduler.of(live)
    optimizer = getattr(live, "optimizer", None) if optimizer is None else optimizer
    own = [] if optimizer is None else optimizer.param_groups
    groups = _groups(state_dict, moves, own)
    if groups.unchanged and live is None and not asked.schedulers:
        return dict(state_dict)
    found = followed(
        state_dict, groups, plan=asked.with_policy(schedule="checkpoint" if live is None else "live"), live=scheduler
    )
    there = groups.options if optimizer is None else own
    rated = ("lr", "initial_lr", *BOUNDS)
    changed = [
        {key: new[key] for key in rated if key in new and not same_value(new[key], old.get(key))}
        for new, old in zip(found.options, there, strict=True)
    ]
    if optimizer is None and any(changed):
        number, rates = next((number, rates) for number, rates in enumerate(changed) if rates)
        listed = ", ".join(f"{key} = {value}" for key, value in rates.items())
        message = f"its schedule gives param group {number} {listed}, which the group is not given by the load hook"
        remedy = "give the optimizer too, which gets it: migrate_scheduler(..., optimizer=optimizer)"
        raise MigrationError.of("scheduler", message, names=(), remedy=remedy)
    for group, rates in zip(own, changed, strict=True) if optimizer is not None else ():
        for key, value in rates.items():
            if torch.is_tensor(group.get(key)):
                group[key].fill_(value)
            else:
                group[key] = value
    return found.state


def _groups(state: Mapping[str, Any], moves: SectionMoves | None, own: Sequence[Mapping[str, Any]]) -> Groups:
    """The param groups of a load; the old ones as the scheduler's state remembers them."""
    schedule = schedule_of(dict(state))
    last = state.get("_last_lr")
    count = (len(own) or len(last or ())) if moves is None else moves.old_groups
    before: list[dict[str, Any]] = []
    for number in range(count):
        initial = schedule.initial(number, {})
        known = {"lr": last[number]} if isinstance(last, list) and number < len(last) else {}
        before.append(known if initial is None else {**known, "initial_lr": initial})
    options = [{key: value for key, value in group.items() if key not in ("params", "param_names")} for group in own]
    if moves is None:
        made = Groups([dict(old) for old in before], list(range(count)), before, [frozenset()] * count)
    else:
        made = Groups.of(moves, before)
    if options and len(options) == len(made.options):  # as they are now: what other hooks decided is among them
        made = made._replace(options=options)
    for number, base in enumerate(made.bases):
        if base is not None:  # what a hook decides is not among the options, and the bounds are the optimizer's
            made.options[number] = {**before[base], **made.options[number]}
            mine = {key: value for key, value in made.options[number].items() if key not in before[base]}
            before[base].update({key: value for key, value in mine.items() if key not in ("lr", "initial_lr")})
    return made._replace(before=before)
