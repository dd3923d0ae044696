"""The state of several optimizers, divided and joined by `[[optimizer]]` tables for live optimizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optimstate.errors import MigrationError
from optimstate.plan.apply.division import joined_scheduler, optimizers_of, schedulers_of
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import OptimizerRule, Rule
from optimstate.plan.language.template import Template
from optimstate.plan.solve.division import Part, divided
from optimstate.plan.solve.inventory import optimizer_inventory
from optimstate.plan.solve.migration import Inventory, Migration
from optimstate.plan.solve.planner import plan_migration
from optimstate.plan.solve.reach import Reached, takers
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    from optimstate.hooks import Report

__all__ = ["Division"]


class Division(Record):
    """The optimizers that `[[optimizer]]` tables make from those of a checkpoint.

    Attributes:
        plan: The plan.
        migration: The migration of each optimizer of the checkpoint, by its key.
        inventories: The planner's input for each of them, by the same keys.
        parts: The parts of each optimizer of the checkpoint that each optimizer of the result gets.
        states: The states of the optimizers of the result, by the path of their table.
    """

    plan: Plan
    migration: Migration
    inventories: Mapping[str, Inventory]
    parts: Sequence[Part]
    states: Mapping[str, OptimizerState]

    @classmethod
    def of(cls, plan: Plan, lenient: Plan, states: Mapping[str, OptimizerState]) -> Division:
        """Plan the division.

        Args:
            plan: A plan with tables.
            lenient: The same plan, without an error for rules that match nothing, which are checked elsewhere.
            states: The states of the checkpoint's optimizers, with names, by the path of their part.

        Raises:
            MigrationError: The plan does not fit.
        """
        by_key = {f"optimizer {label}": state for label, state in states.items()}
        inventories = {key: optimizer_inventory(state) for key, state in by_key.items()}
        migration = plan_migration(lenient, inventories)
        parts = divided(plan, migration, by_key)
        made = optimizers_of(parts, by_key)
        converted = {part.rule.path for part in parts if part.moves.conversion is not None}
        for path in converted:
            own = [part for part in parts if part.rule.path == path]
            made[path] = _with_carried_options(made[path], own)
        return cls(plan, migration, inventories, parts, made)

    def reached(self) -> list[Reached]:
        """The names, options and slots of each optimizer of the checkpoint, to which the plan may refer."""
        made = []
        for key, inventory in self.inventories.items():
            assert inventory.state is not None
            names = [move.target for move in self.migration.sections[key].moves]
            options = [group.options for group in inventory.state.groups]
            slots = dict.fromkeys(str(path[-1]) for found in inventory.parameters.values() for path in found.slots)
            made.append(Reached(key.removeprefix("optimizer "), names, options, list(slots)))
        return made

    def tables(self, live: Sequence[Sequence[str]]) -> list[OptimizerRule]:
        """The table of each live optimizer, found by its parameters' names.

        Raises:
            MigrationError: A live optimizer has parameters of several tables or of none, two belong to one table, or a
                table with parameters has no live optimizer.
        """
        found: list[OptimizerRule] = []
        problems: list[Problem] = []
        for names in live:
            taken = takers(self.plan.optimizers, names)
            own = {id(rule): rule for rule in taken.values()}
            rule = next(iter(own.values()), None)
            if len(own) != 1 or rule is None:
                which = " and ".join(str(each) if each is not None else "no table" for each in own.values())
                message = f"a live optimizer has parameters of {which}; the tables and the live optimizers must agree"
                problems.append(Problem("group", message, names=tuple(names[:3])))
                continue
            if any(rule is other for other in found):
                message = "two live optimizers have its parameters; the tables and the live optimizers must agree"
                problems.append(Problem("group", message, str(rule), tuple(names[:3])))
            found.append(rule)
        if not problems and self.plan.policy.unexpected == "error":
            for rule in {id(part.rule): part.rule for part in self.parts}.values():
                if not any(rule is other for other in found):
                    message = "no live optimizer has its parameters"
                    remedy = 'give its optimizer too, or say unexpected = "drop" in [policy]'
                    problems.append(Problem("unexpected", message, str(rule), remedy=remedy))
        if problems:
            raise MigrationError(problems)
        return found

    def state_of(self, rule: OptimizerRule) -> OptimizerState:
        """The state of an optimizer of the result; one of which nothing is in the checkpoint has none."""
        return self.states.get(rule.path) or OptimizerState((), {}, {})

    def declared_new(self, rule: OptimizerRule, names: Iterable[str]) -> tuple[Rule, ...]:
        """Rules for those parameters of a live optimizer that the plan declares new."""
        present = {move.target for part in self.parts if part.rule is rule for move in part.moves.moves}
        absent = [name for name in names if name not in present]
        modules = Modules(absent)
        fresh = [
            modules.reading(template)
            for each in self.plan.all_rules()
            if each.fresh and not (each.sources and each.targets)
            for template in each.sources or each.targets
        ]
        new = [name for name in absent if any(template.match(name) is not None for template in fresh)]
        return tuple(Rule((), (Template.literal(name),), fresh=True) for name in new)

    def report(self, rule: OptimizerRule, loaded: Report) -> Report:
        """The outcome for the parameters of a live optimizer: of the division and of loading, together."""
        from optimstate.hooks import Report

        own = [part for part in self.parts if part.rule is rule]
        first = [Report.of((), part.moves) for part in own]
        approximate = {name: why for each in first for name, why in each.approximate.items()}
        fresh = {name: why for each in first for name, why in each.fresh.items()}
        sources = {name: found for each in first for name, found in each.sources.items()}
        exact = tuple(name for name in loaded.exact if name not in approximate and name not in fresh)
        dropped = {
            name: str(by) if by is not None else "not in the live optimizers"
            for part in own
            if part is next(other for other in self.parts if other.key == part.key)
            for name, by in self.migration.sections[part.key].dropped
        }
        return loaded._replace(
            exact=exact,
            approximate={**approximate, **loaded.approximate},
            fresh={**fresh, **loaded.fresh},
            dropped={**dropped, **loaded.dropped},
            sources={**sources, **loaded.sources},
            notes=tuple(dict.fromkeys([note for each in first for note in each.notes] + list(loaded.notes))),
        )

    def schedule_of(self, rule: OptimizerRule, schedules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The state of the scheduler of an optimizer of the result.

        Args:
            rule: The optimizer's table.
            schedules: The checkpoint's schedulers: one for each of its optimizers, or one for all of them.

        Raises:
            MigrationError: It is not known which scheduler belongs to which optimizer, or they cannot be joined.
        """
        keys = list(self.inventories)
        if len(schedules) not in (1, len(keys)):
            message = f"{len(schedules)} schedulers and {len(keys)} optimizers: nothing says which belong together"
            raise MigrationError.of("scheduler", message, str(rule), hint="Build a new scheduler.")
        of = dict(zip(keys, list(schedules) * (len(keys) if len(schedules) == 1 else 1), strict=True))
        own = [part for part in self.parts if part.rule is rule]
        if not own:
            raise MigrationError.of("scheduler", "its optimizer has no parameter of the checkpoint", str(rule))
        return joined_scheduler([schedulers_of(of[part.key], [part])[rule.path] for part in own], rule.path)


def _with_carried_options(state: OptimizerState, parts: Sequence[Part]) -> OptimizerState:
    """The state, with only those options of converted groups that carry over; a live optimizer has the others."""
    origins = [(part, group) for part in parts for group in part.moves.groups]
    groups = []
    for group, (part, origin) in zip(state.groups, origins, strict=True):
        if part.moves.conversion is None:
            groups.append(group)
            continue
        kept = {
            key: value
            for key, value in group.options.items()
            if key in part.rule.set or (key in origin.options and value is origin.options[key])
        }
        groups.append(group._replace(options=kept))
    return state._replace(groups=tuple(groups))
