"""A resumption: every part is planned, then all parts are loaded, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Guard
from optimstate.plan.solve.migration import SectionMoves
from optimstate.problems import Problem
from optimstate.resuming import certified, shards
from optimstate.resuming.naming import unreached_names, with_given_names, with_names
from optimstate.resuming.owners import becomes, common_names, common_tensors, live_names, live_of
from optimstate.resuming.parts import Named, Parts
from optimstate.resuming.records import refuse_records
from optimstate.resuming.replaced import replaced_options
from optimstate.resuming.restoring import Step, carry_out, load_state, restoring
from optimstate.resuming.tally import Tally
from optimstate.state.names import mentions_wrapper, unwrapped
from optimstate.state.optimizer import OptimizerState
from optimstate.state.sections import Section

if TYPE_CHECKING:
    import torch

    from optimstate.certificates.certificate import Certificate
    from optimstate.hooks import Report
    from optimstate.hooks.engine.live import Live
    from optimstate.hooks.engine.request import LoadRequest
    from optimstate.plan.language.rules import OptimizerRule
    from optimstate.resuming.division import Division

__all__ = ["Run"]


@dataclass
class _Load:
    """The state that an optimizer is about to load.

    Attributes:
        made: Its state dict; schedulers may still change the options of its groups.
        before: The options of the checkpoint's groups.
        moves: The moves of parameters and groups; None if nothing changed.
    """

    made: dict[str, Any]
    before: list[dict[str, Any]]
    moves: SectionMoves | None


@dataclass
class Run:
    """A resumption.

    Args:
        parts: The parts of the checkpoint.
        plan: What has changed.
        saved: Names for optimizers of the checkpoint that have none.
    """

    parts: Parts
    plan: Plan
    saved: Sequence[str] | Mapping[str, Sequence[str]] | None = None
    reports: dict[str, Report] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    nbytes: int = 0
    loaded_modules: list[certified.Part] = field(default_factory=list)
    loaded_optimizers: list[certified.Part] = field(default_factory=list)
    _modules: list[Step] = field(default_factory=list)
    _steps: list[Step] = field(default_factory=list)
    _loads: dict[int, _Load] = field(default_factory=dict)
    _optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    _schedulers: list[Any] = field(default_factory=list)
    _casts: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    _asked: set[str] = field(default_factory=set)
    _back: Plan = field(default_factory=Plan)
    _certificates: list[Certificate] | None = None
    _division: Division | None = None
    _divided: list[certified.Part] = field(default_factory=list)
    _rules: dict[int, OptimizerRule] = field(default_factory=dict)
    _schedules: list[tuple[str, Mapping[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._back, self.plan = self.plan.backward(), self.plan.forward()
        self._tally = Tally(self.plan)

    @property
    def _lenient(self) -> Plan:
        """The plan for one part. The guard and unmatched rules are checked for all parts together."""
        return self.plan.with_policy(unused="ignore")._replace(guard=Guard())

    @property
    def _divides(self) -> bool:
        """Whether `[[optimizer]]` tables apply to several optimizers of the checkpoint."""
        return bool(self.plan.optimizers) and len(self.parts.of_kind("optimizer")) > 1

    # --- weights ------------------------------------------------------------------------------------------------------

    def choose(self, kind: str, wanted: Sequence[Named], models: Sequence[torch.nn.Module] = ()) -> list[Section]:
        """The part of the checkpoint for each live object of a kind."""
        if not wanted or (kind in ("optimizer", "scheduler") and self._divides):
            return []
        likeness = {
            "optimizer": lambda part, live: common_names(part, live, models),
            "scheduler": lambda _, __: 0,
        }.get(kind, common_tensors)
        return self.parts.choose(kind, wanted, likeness)

    def plan_modules(self, kind: str, modules: Sequence[Named], sections: Sequence[Section]) -> None:
        """Plan the weights of models or of averages."""
        for (_, module), section in zip(modules, sections, strict=True):
            self._plan_module(kind, _key(kind, section, len(modules)), module, section)

    def _plan_module(self, kind: str, key: str, module: torch.nn.Module, section: Section) -> None:
        from optimstate.hooks import Report
        from optimstate.hooks.modules import ModelLoad
        from optimstate.plan.solve.planner import plan_migration

        shards.refuse_fsdp1(key, module)
        node = self.parts.node(section)
        load = ModelLoad(module, node)
        load.refuse_unless_it_leads_back(self._back, key)
        self._tally.inventories[key] = inventory = load.inventory(self._lenient)
        self._tally.settled.append(load.is_settled)
        migration = plan_migration(self._lenient, {key: inventory})
        if kind == "model":
            self.loaded_modules.append(certified.Part(module, node, migration.sections[key]))
        made = load.made(migration.sections[key])
        live = module.state_dict()
        if kind == "ema" and "n_averaged" in live and "n_averaged" not in made:
            made["n_averaged"] = live["n_averaged"]
            self.notes.append(f"{key}: the checkpoint does not record how many models were averaged")
        absent = [name for name in live if name not in made and not name.endswith("_extra_state")]
        if absent:
            raise StateMismatchError(f"the checkpoint's {key} has no {describe(absent[0])}")
        reader = shards.Reader(self._casts, self.parts.read)
        made = {name: reader.part(name, live[name], value) if name in live else value for name, value in made.items()}
        self.nbytes += reader.nbytes
        self._tally.count([count for _, count in migration.counts])
        self.reports[key] = Report.of((key,), migration.sections[key])
        self.notes += migration.notes
        before: dict[str, Any] = {}

        def apply() -> None:
            before.update({name: shards.kept(value) for name, value in module.state_dict().items()})
            module.load_state_dict(made)

        self._modules.append(Step(apply, lambda: module.load_state_dict(before) if before else None))

    # --- optimizers ---------------------------------------------------------------------------------------------------

    def plan_optimizers(
        self, optimizers: Sequence[Named], sections: Sequence[Section], models: Sequence[torch.nn.Module]
    ) -> None:
        """Plan the state of optimizers; models give names to the parameters of those that have none."""
        names = [live_names(optimizer, models) for _, optimizer in optimizers]
        if optimizers and self._divides:
            self._plan_division(optimizers, names, models)
            return
        for number, ((_, optimizer), section) in enumerate(zip(optimizers, sections, strict=True)):
            sharing = [other for other, theirs in enumerate(sections) if theirs is section and other != number]
            key = _key("optimizer", section, len(optimizers)) + (f" ({number})" if sharing else "")
            elsewhere = frozenset(name for other in sharing for name in names[other])
            self._plan_optimizer(key, optimizer, section, models, elsewhere)

    def _plan_optimizer(
        self,
        key: str,
        optimizer: torch.optim.Optimizer,
        section: Section,
        models: Sequence[torch.nn.Module],
        elsewhere: frozenset[str],
    ) -> None:
        from optimstate.hooks.engine.match import reached
        from optimstate.hooks.engine.request import LoadRequest, is_settled
        from optimstate.plan.solve.inventory import optimizer_inventory

        state = self.parts.optimizer(section)
        live = live_of(optimizer, models, is_named=state.is_named)
        request = LoadRequest(self._named(key, state, section, live, models), live)
        if self._takes_prefixes:
            request.strip_prefixes()
        self._tally.inventories[key] = optimizer_inventory(request.state)
        request.label = section.label
        groups = tuple(rule._replace(optimizer="") for rule in self.plan.groups if rule.is_for(section.label))
        request.add(self._lenient._replace(groups=groups))
        request.elsewhere = elsewhere
        self._tally.reached.append(reached(request))
        if elsewhere and not (self.plan.optimizer or self.plan.optimizers):
            request.add(Plan(optimizer=becomes(request.state, live.algorithm)))
        self._tally.settled.append(is_settled(request))
        self._tally.count(self._load(key, optimizer, live, request, lambda report: report, self.parts.beside(section)))

    @property
    def _takes_prefixes(self) -> bool:
        """Whether the plan's rules refer to names without wrapper prefixes."""
        templates = (t for rule in self.plan.all_rules() for t in rule.sources or rule.targets)
        return not any(mentions_wrapper(template.text) for template in templates)

    def _load(
        self,
        key: str,
        optimizer: torch.optim.Optimizer,
        live: Live,
        request: LoadRequest,
        reported: Callable[[Report], Report],
        beside: Mapping[str, Any] | None,
    ) -> list[int]:
        """Plan the load of one optimizer, and return how many parameters each rule matched."""
        from optimstate.hooks.engine.match import matched

        source = request.state
        made, outcome = matched(request, (key,), live.names)
        self.loaded_optimizers.append(certified.Part(optimizer, source, outcome.moves, beside))
        reader = shards.Reader(self._casts, self.parts.read)
        made = reader.optimizer(optimizer, made, live.names)
        self.nbytes += reader.nbytes
        self._loads[id(optimizer)] = _Load(made, [dict(group.options) for group in request.state.groups], outcome.moves)
        self.reports[key] = reported(outcome.report)
        self.notes += self.reports[key].notes
        self.notes += replaced_options(key, optimizer.param_groups, made["param_groups"], outcome.moves)
        self._optimizers.append(optimizer)
        before = optimizer.state, optimizer.param_groups

        def undo() -> None:
            optimizer.state, optimizer.param_groups = before

        self._steps.append(Step(partial(load_state, optimizer, made), undo))
        return request.counts

    def _plan_division(
        self, optimizers: Sequence[Named], names: Sequence[Sequence[str]], models: Sequence[torch.nn.Module]
    ) -> None:
        """Plan the state of optimizers that `[[optimizer]]` tables make from several of the checkpoint."""
        from optimstate.hooks.engine.request import LoadRequest
        from optimstate.resuming.division import Division

        states = {}
        for section in self.parts.of_kind("optimizer"):
            state = self.parts.optimizer(section)
            state = self._named(f"optimizer {section.label}", state, section, None, models)
            if self._takes_prefixes:
                own = [str(name) for _, name, _ in state.parameters()]
                state = state.named(list(map(unwrapped(own), own)))
            states[section.label] = state
            self._divided.append(certified.Part(None, state, None, self.parts.beside(section)))
        self._division = division = Division.of(self.plan, self._lenient, states)
        self._tally.inventories.update(division.inventories)
        self._tally.reached += division.reached()
        self._tally.settled.append(False)
        counts = [count for _, count in division.migration.counts]
        for (path, optimizer), rule in zip(optimizers, division.tables(names), strict=True):
            if path not in (None, rule.path):
                raise MigrationError.of(
                    "group", f"the optimizer given as {describe(path)} has its parameters", str(rule)
                )
            live = live_of(optimizer, models, is_named=True)
            request = LoadRequest(division.state_of(rule), live)
            if self._takes_prefixes:
                request.strip_prefixes()
            own = [name for group in request.live.names for name in group]
            new = division.declared_new(rule, own)
            request.add(Plan(new, policy=self._lenient.policy))
            request.label = rule.path
            request.values.update(rule.set)
            request.options["*"] = "live" if self.plan.policy.hyperparameters == "live" else "merge"
            report = partial(division.report, rule)
            self._load(f"optimizer {rule.path}", optimizer, live, request, report, None)
            fresh = [each.fresh and not (each.sources and each.targets) for each in self.plan.all_rules()]
            counts = [count + (len(new) if is_fresh else 0) for count, is_fresh in zip(counts, fresh, strict=True)]
            self._rules[id(optimizer)] = rule
        self._tally.count(counts)

    def _named(
        self, key: str, state: OptimizerState, section: Section, live: Live | None, models: Sequence[torch.nn.Module]
    ) -> OptimizerState:
        """The state with its own, given or inferred names."""
        self._asked.add(section.label)
        given = self.saved.get(section.label) if isinstance(self.saved, Mapping) else self.saved
        if given is not None:
            made, notes = with_given_names(self.parts, section, state, key, live, given)
        else:
            made, notes = with_names(self.parts, section, state, key, live, models)
        self.notes += notes
        return made

    def plan_schedulers(self, schedulers: Sequence[Named], sections: Sequence[Section]) -> None:
        """Plan the state of schedulers, each for its own optimizer's groups."""
        if self._division is not None and schedulers:
            found = [self.parts.node(section) for section in self.parts.of_kind("scheduler")]
            for _, scheduler in schedulers:
                rule = self._rules.get(id(scheduler.optimizer))
                if rule is None:
                    message = "a scheduler is given without its optimizer"
                    raise MigrationError.of("scheduler", message, type(scheduler).__name__)
                self._plan_scheduler(scheduler, self._division.schedule_of(rule, found), rule.path)
        for (_, scheduler), section in zip(schedulers, sections, strict=False):
            self._plan_scheduler(scheduler, self.parts.node(section), section.label)

    def _plan_scheduler(self, scheduler: Any, state: Mapping[str, Any], label: str) -> None:
        """Plan a scheduler's state for the groups of its optimizer, and set the groups' learning rates."""
        from optimstate.hooks import migrate_scheduler
        from optimstate.plan.apply.scheduled import Groups, LiveScheduler
        from optimstate.plan.apply.schedulers import followed

        self._schedules.append((label, state))
        only = next(iter(self._loads.values())) if len(self._loads) == 1 else None
        load = self._loads.get(id(getattr(scheduler, "optimizer", None)), only)
        if load is None:
            made = migrate_scheduler(state, None)
        else:
            options = [{k: v for k, v in group.items() if k != "params"} for group in load.made["param_groups"]]
            groups = Groups(options, list(range(len(options))), load.before, [frozenset()] * len(options))
            if load.moves is not None:
                groups = Groups.of(load.moves, load.before)._replace(options=options)
            found = followed(state, groups, plan=self.plan, label=label, live=LiveScheduler.of(scheduler))
            made = found.state
            load.made["param_groups"] = [
                {**group, **new} for group, new in zip(load.made["param_groups"], found.options, strict=True)
            ]
            self.notes += [f"scheduler: {note}" for note in found.notes]
        refuse_records("the scheduler", made)
        self._schedulers.append(scheduler)
        self._steps.append(Step(lambda: scheduler.load_state_dict(made), restoring(scheduler)))

    def plan_scaler(self, scaler: Any) -> None:
        """Plan the state of a gradient scaler."""
        made = self.parts.scaler()
        if not made or not scaler.is_enabled():
            self.notes.append("the gradient scaler keeps its own state, because one of the two is disabled")
            return
        before = scaler.state_dict()
        self._steps.append(Step(lambda: scaler.load_state_dict(made), lambda: scaler.load_state_dict(before)))

    def refuse_unused(self) -> None:
        """Raise MigrationError if the guard refuses the checkpoint, or a rule or argument has no effect; add notes."""
        from optimstate.plan.apply.stamps import refuse_second

        refuse_second(self.plan, self.parts.tree)
        problems = [*self._tally.unreached(), *self._unreached_schedules()]
        problems += unreached_names(self.saved, self._asked)
        problems += self._tally.unmatched()
        if problems:
            raise MigrationError(problems)
        self.notes += self._tally.idle()
        if self.plan.guard.once:
            self.notes.append(
                "the plan says `once`: register hooks.add_metadata(plan=...) as a state_dict post-hook of every "
                "optimizer, so that this run's checkpoints record that it was applied"
            )
        self.notes += [*shards.notes_on_casts(self._casts), *self.parts.notes]
        if self._optimizers and not self._divides and (left := self.parts.left()):
            self.notes.append(f"not resumed, because nothing is given for it: {left}")

    def _unreached_schedules(self) -> Iterator[Problem]:
        """Problems with requests of the plan for schedulers that were not given."""
        from optimstate.plan.apply.schedulers import unreached_schedulers

        if self.plan.policy.schedule == "live" and not self._schedules:
            message = 'schedule = "live" needs a scheduler, and none is given'
            yield Problem("unreached", message, remedy="give it with scheduler=...")
        yield from unreached_schedulers(self.plan, self._schedules)

    def find_certificates(self, given: certified.Given | None) -> None:
        """Read the certificates with which the run is to be compared, if one is given."""
        if given is not None and given is not False:
            self._certificates = certified.certificates_of(given, self._divided or self.loaded_optimizers)

    def carry_out(self, check: Callable[[], object], together: Callable[[], AbstractContextManager[Any]]) -> None:
        """Load every part and check the result; if anything fails, in any process, undo all of it."""
        # Weights last, because only they are changed in place.
        carry_out([*self._steps, *self._modules], check, together)

    def check(self, scaler: Any) -> None:
        """Check that the run is the certified one, if a certificate is given, and record what it continues from."""
        if self._certificates is not None:
            if self._divided:
                self.notes.append(certified.checked_source(self._certificates, self.loaded_modules, self._divided))
            else:
                parts = self.loaded_modules, self.loaded_optimizers
                self.notes += certified.checked(self._certificates, self.plan, *parts, self._schedulers, scaler)
        certified.note_histories(self.loaded_optimizers, self.plan, self.notes.append)

    def problems(self) -> tuple[Problem, ...]:
        """The problems of the optimizers after loading."""
        from optimstate.hooks import resume_problems

        found: list[Problem] = []
        for optimizer in self._optimizers:
            mine = [each for each in self._schedulers if getattr(each, "optimizer", None) is optimizer]
            if not mine and len(self._optimizers) == len(self._schedulers) == 1:
                mine = self._schedulers
            scheduler = mine[0] if mine else None
            # Parameters without state were planned and reported already.
            found += resume_problems(optimizer, scheduler=scheduler, skip=["coverage"])
        return tuple(found)


def _key(kind: str, section: Section, count: int) -> str:
    return kind if count == 1 else f"{kind} {section.label}"
