"""The result of a plan for the old run, and the parameters that it announces as approximate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from optimstate.plan.apply.division import optimizers_of
from optimstate.plan.apply.execute import execute_model, execute_optimizer
from optimstate.plan.expressions import tree as ex
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Guard
from optimstate.plan.language.template import Template
from optimstate.plan.solve.division import divided
from optimstate.plan.solve.inventory import optimizer_inventory
from optimstate.plan.solve.planner import plan_migration, plan_model, plan_optimizer
from optimstate.rehearsal.runs import Run
from optimstate.state.names import mentions_wrapper, unwrapped
from optimstate.state.optimizer import OptimizerState

if TYPE_CHECKING:
    from optimstate.plan.solve.migration import SectionMoves

__all__ = ["Expected"]


class Expected:
    """The result of a plan for the old run as it is now.

    Attributes:
        weights: The moves of the model's weights.
        notes: The plan's notes.
    """

    def __init__(self, plan: Plan, old: Run) -> None:
        # Each section is planned by itself, so a rule may match nothing in one of them.
        self._plan, self._old = plan._replace(guard=Guard()).with_policy(unused="ignore"), old
        texts = [template.text for rule in plan.all_rules() for template in rule.sources or rule.targets]
        self._rename: Callable[[str], str] = str if any(map(mentions_wrapper, texts)) else old.plain_name
        self._shapes = {self._rename(name): tuple(value.shape) for name, value in old.model.named_parameters()}
        self.weights = plan_model(self._plan, self._tensors()).sections["model"]
        self._sections = [section for _, section in self._planned()]
        self.notes = list(dict.fromkeys(note for each in (self.weights, *self._sections) for note in each.notes))

    def tensors(self) -> dict[str, Any]:
        """Parameters and buffers of the new model, without those that contain values of the live model."""
        made = execute_model(self.weights, self._tensors())
        live = {
            move.target
            for move in self.weights.moves
            if move.value is not None and move.value.made is not None and ex.takes_live(move.value.made)
        }
        return {name: value for name, value in made.items() if name not in live}

    def slots(self) -> dict[str, Mapping[str, Any]]:
        """The slots of every parameter that has state."""
        return {
            str(name): slots
            for state in self._carried()
            for _, name, slots in state.parameters()
            if name is not None and slots
        }

    def gradients(self) -> dict[str, Any]:
        """The old gradients, moved as a first moment would be."""
        named = self._old.model.named_parameters()
        grads = {self._rename(name): p.grad for name, p in named if p.grad is not None}
        names = [str(name) for state in self._states() for _, name, _ in state.parameters()]
        node = {
            "state": {key: {"momentum_buffer": grads[name]} for key, name in enumerate(names) if name in grads},
            "param_groups": [{"lr": 0.0, "params": list(range(len(names))), "param_names": names}],
        }
        found = OptimizerState.from_node(node)
        plan = Plan(self._plan.rules, self._plan.stages, policy=self._plan.policy)
        moved = execute_optimizer(plan_optimizer(plan, found, shapes=self._shapes).sections["optimizer"], found)
        return {str(name): slots["momentum_buffer"] for _, name, slots in moved.parameters() if slots and name}

    def approximate(self) -> tuple[set[str], set[str]]:
        """Parameters that train differently by the plan, and those of them that only the plan's scale changes.

        The former are new ones, copies, parameters with filled rows, with dropped or converted slots, or with other
        group options. The gradients and slots of a scaled parameter are known by their degrees, but its steps are those
        of another learning rate.
        """
        found: set[str] = set()
        scaled: set[str] = set()
        sources: dict[str, int] = {}
        for move in self.weights.moves:
            for name in move.sources:
                sources[name] = sources.get(name, 0) + 1
        before = {self._rename(name): options for name, options in self._old.options().items()}
        for section in (self.weights, *self._sections):
            options = {name: group.options for group in section.groups for name in group.members}
            for move in section.moves:
                outcomes = [*move.slots.values(), *([move.value] if move.value is not None else [])]
                copied = any(sources.get(name, 0) > 1 for name in move.sources) and move.is_moved_whole
                exact = move.expression is not None and not copied and all(o.level == "exact" for o in outcomes)
                had = [before.get(name, {}) for name in move.sources]
                kept = all(_same(options.get(move.target, own), own) for own in had)
                if not exact or not kept or section.conversion is not None:
                    found.add(move.target)
                elif move.expression is not None and any(isinstance(s, ex.Scale) for s in ex.steps(move.expression)):
                    scaled.add(move.target)
        return found | scaled, scaled - found

    def new_among(self, names: Iterable[str]) -> tuple[set[str], set[str]]:
        """Parameters that are not made from old ones: those that the plan declares new, and the others."""
        made = {move.target for section in (self.weights, *self._sections) for move in section.moves}
        rename = unwrapped(made)
        known = set(map(rename, made))
        new = [name for name in names if name not in known]
        declared = [t for rule in self._plan.all_rules() if rule.fresh for t in rule.targets or rule.sources]
        matched = {name for name in new if any(_matches(template, name) for template in declared)}
        return matched, set(new) - matched

    def _tensors(self) -> dict[str, Any]:
        return {self._rename(name): value for name, value in self._old.model.state_dict().items()}

    def _states(self) -> list[OptimizerState]:
        found = [OptimizerState.from_node(state) for state in self._old.optimizer_states()]
        return [state.named([self._rename(str(name)) for _, name, _ in state.parameters()]) for state in found]

    def _planned(self) -> Iterator[tuple[OptimizerState, SectionMoves]]:
        states = self._states()
        if not self._plan.optimizers:
            for state in states:
                yield state, plan_optimizer(self._plan, state, shapes=self._shapes).sections["optimizer"]
            return
        keyed, parts = self._divided(states)
        for part in parts:
            yield keyed[part.key], part.moves

    def _divided(self, states: list[OptimizerState]) -> tuple[dict[str, OptimizerState], Any]:
        keyed = {f"optimizer {number}": state for number, state in enumerate(states)}
        inventories = {key: optimizer_inventory(state, shapes=self._shapes) for key, state in keyed.items()}
        return keyed, divided(self._plan, plan_migration(self._plan, inventories), keyed)

    def _carried(self) -> list[OptimizerState]:
        if not self._plan.optimizers:
            return [execute_optimizer(section, state) for state, section in self._planned()]
        keyed, parts = self._divided(self._states())
        return list(optimizers_of(parts, keyed).values())


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two groups agree in the options that both have."""
    return all(bool(value == other[key]) for key, value in one.items() if key in other)


def _matches(template: Template, name: str) -> bool:
    """Whether a template matches a parameter, or is the name of a module that contains it."""
    return template.match(name) is not None or (template.is_literal and name.startswith(f"{template.text}."))
