"""From what a checkpoint holds and a plan to a migration: what becomes of every parameter and slot, and why.

Nothing here touches elements; every problem is found before anything is moved, and all are reported at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from optimstate.errors import MigrationError
from optimstate.plan.expressions import tree as ex
from optimstate.plan.expressions.evaluate import dtype_of
from optimstate.plan.expressions.tree import Leaf, Shape
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import SECTIONS, Rule
from optimstate.plan.slots.elementwise import translated
from optimstate.plan.slots.outcomes import Outcome, Refusal, SlotPath
from optimstate.plan.slots.planner import SlotPlanner
from optimstate.plan.slots.sources import Sources
from optimstate.plan.solve.declared import declared, misplaced
from optimstate.plan.solve.fitting import fitted, unsized, untied, without_live_values
from optimstate.plan.solve.groups import Candidate, GroupPlan, in_order, plan_groups
from optimstate.plan.solve.inventory import decoded, model_inventory, optimizer_inventory
from optimstate.plan.solve.losses import with_losses
from optimstate.plan.solve.migration import Inventory, Migration, Move, SectionMoves, Target
from optimstate.plan.solve.problems import guarded, shortened, unmatched
from optimstate.plan.solve.resolve import Made, Resolved, Resolver
from optimstate.problems import Problem
from optimstate.state.optimizer import OptimizerState
from optimstate.tensors.dtypes import INEXACT
from optimstate.tree import no_garbage_collection

if TYPE_CHECKING:
    from optimstate.plan.slots.conversion import Conversion

__all__ = ["plan_migration", "plan_model", "plan_optimizer"]


def plan_optimizer(
    plan: Plan,
    state: OptimizerState,
    *,
    target: Target | None = None,
    shapes: Mapping[str, Shape | None] | None = None,
) -> Migration:
    """Resolve a plan for the state of one optimizer.

    Args:
        plan: What to do.
        state: With names (see `OptimizerState.named`).
        target: What the result must be: the live optimizer's parameters, groups and options.
        shapes: Of the checkpoint's parameters, where known; others are told from the slots.

    Returns:
        A migration of one section, `optimizer`.

    Raises:
        MigrationError: With every problem found.
    """
    return plan_migration(plan, {"optimizer": optimizer_inventory(state, target=target, shapes=shapes)})


def plan_model(plan: Plan, tensors: Mapping[str, Any], *, target: Target | None = None) -> Migration:
    """Resolve a plan for a model's parameters and buffers.

    Args:
        plan: What to do.
        tensors: By name.
        target: What the result must be.

    Returns:
        A migration of one section, `model`.

    Raises:
        MigrationError: With every problem found.
    """
    return plan_migration(plan, {"model": model_inventory(tensors, target=target)})


def plan_migration(plan: Plan, sections: Mapping[str, Inventory]) -> Migration:
    """Resolve a plan for the sections of a checkpoint.

    Raises:
        MigrationError: With every problem found: a rule that matches nothing, two producers of one target, shapes that
            do not fit, targets nobody fills, sources nobody takes, slots that cannot follow.
    """
    with no_garbage_collection():
        return _planned(plan, sections)


def _planned(plan: Plan, sections: Mapping[str, Inventory]) -> Migration:
    problems: list[Problem] = []
    rules = list(plan.all_rules())
    counts = [0] * len(rules)
    problems.extend(guarded(plan.guard, sections))
    if plan.policy.quantized == "requantize":
        sections = {key: decoded(inventory) for key, inventory in sections.items()}
    found: dict[str, SectionMoves] = {}
    weights: dict[str, Any] = {}
    optimizers = [key for key, inventory in sections.items() if inventory.state is not None]
    for key in sorted(sections, key=optimizers.__contains__):  # what joins an optimizer is known from the models
        taken = {name for other in optimizers if other != key for name in sections[other].shapes}
        section = _Section(plan, key, sections[key], problems, {n: w for n, w in weights.items() if n not in taken})
        found[key] = section.plan()
        if optimizers and sections[key].state is None:
            weights.update(section.trainable(found[key]))
        counts = [a + b for a, b in zip(counts, section.counts, strict=True)]
    made = {key: found[key] for key in sections}
    if plan.policy.unused == "error":
        for number, (rule, count) in enumerate(zip(rules, counts, strict=True), 1):
            if not count and len(sections) == 1 and rule.only in SECTIONS and not rule.is_for(next(iter(sections))):
                (key, moves), *_ = made.items()
                made[key] = moves._replace(notes=(*moves.notes, f"rule {number} is for another section: {rule}"))
            elif not count:
                problems.append(unmatched(number, rule, sections))
    if problems:
        raise MigrationError(list(dict.fromkeys(problems)))
    return Migration(plan, made, tuple(zip(rules, counts, strict=True)))


class _Section:
    """Plans one section."""

    def __init__(
        self, plan: Plan, key: str, inventory: Inventory, problems: list[Problem], weights: Mapping[str, Any]
    ) -> None:
        self.rules, self.plan_, self.key, self.inventory = list(plan.all_rules()), plan, key, inventory
        self.counts, self.problems, self.weights = [0] * len(self.rules), problems, weights
        self.notes: list[str] = []

    def plan(self) -> SectionMoves:
        found = Resolver(self.plan_.passes, self.key, self.counts, self.problems).resolve(self.inventory.shapes)
        made: dict[str, Made | None] = dict(found.made)
        new = declared(self.rules, self.counts, self.key, self.inventory, list(self.weights), made, found)
        made.update(dict.fromkeys(new))
        wrong = misplaced(self.rules, self.inventory, found, new, tables=bool(self.plan_.groups))
        self.problems.extend(problem.at(self.key) for problem in wrong)
        dropped: list[tuple[str, Rule | None]] = list(found.dropped)
        target = self.inventory.target
        if target is not None:
            unfit: list[Problem] = []
            made, lost = fitted(target, made, found, self.plan_.policy, unfit)
            self.problems.extend(problem.at(self.key) for problem in shortened(unfit))
            dropped.extend(lost)
        local: list[Problem] = []
        moves = self._optimizer(made, local) if self.inventory.state is not None else self._model(made, local)
        moves = with_losses(moves)
        local += without_live_values(target, moves)
        self._note_duplicates(found)
        section = self._finished(moves, dropped, found, new, local)
        self.problems.extend(problem.at(self.key) for problem in shortened(local))
        return section

    def trainable(self, moves: SectionMoves) -> dict[str, None]:
        """Names of the resulting model that can be parameters: floating-point tensors that are not known buffers."""
        dtypes = {name: dtype_of(value) or "" for name, value in self.inventory.tensors.items()}
        return {
            move.target: None
            for move in moves.moves
            if move.target.rpartition(".")[2] not in _BUFFERS
            and all(dtypes.get(name, "").startswith(INEXACT) for name in move.sources)
        }

    def _model(self, made: Mapping[str, Made | None], problems: list[Problem]) -> list[Move]:
        dtypes: dict[str, str | None] = {}
        moves = []
        used: set[str] = set()
        for name, item in made.items():
            if item is None:
                moves.append(Move(name, None, value=Outcome("fresh", "new")))
                continue
            if not dtypes and not isinstance(item.expression, Leaf):
                dtypes = {source: dtype_of(tensor) for source, tensor in self.inventory.tensors.items()}
            try:
                value = translated(item.expression, dtypes)
            except Refusal as refusal:
                problems.append(refusal.problem(name, (name,)))
                continue
            if self.plan_.policy.approximate == "refuse" and value.level == "approximate":
                message = f"{name} can only be approximated ({value.reason}), which the policy refuses"
                problems.append(Problem("approximate", message, names=(name,)))
            moves.append(self._move(name, item, used, value, {}))
        problems.extend(untied(self.inventory, moves))
        return moves

    def _optimizer(self, made: Mapping[str, Made | None], problems: list[Problem]) -> list[Move]:
        state = self.inventory.state
        assert state is not None
        parameters, algorithm = self.inventory.parameters, self.inventory.algorithm
        planner = SlotPlanner(Sources(parameters, algorithm, self.plan_.slots, self.plan_.policy))
        flat = algorithm is not None and algorithm.is_flat
        requantized = self._requantizes()
        used: set[str] = set()
        moves = []
        for name, item in made.items():
            if item is None:
                moves.append(Move(name, None))
                continue
            if item.expression.shape is None:
                problems.extend(unsized(name, item.expression, parameters))
            slots = {} if flat else planner.outcomes(name, item.expression, problems)
            if requantized and not isinstance(item.expression, Leaf):
                slots = {
                    path: outcome if outcome.kind == "scalar" else _coded_again(outcome)
                    for path, outcome in slots.items()
                }
            moves.append(self._move(name, item, used, None, slots))
        if algorithm is not None and algorithm.whole and any(_joins(move) for move in moves):
            self.notes.append(
                f"{algorithm.name} updates a tensor as a whole: joined or cut parameters will train "
                "differently, even though the state is moved exactly"
            )
        return moves

    def _requantizes(self) -> bool:
        algorithm = self.inventory.algorithm
        known = algorithm is not None and algorithm.name == "bitsandbytes"
        return known and self.plan_.policy.quantized == "requantize"

    def _move(
        self, name: str, item: Made, used: set[str], value: Outcome | None, slots: Mapping[SlotPath, Outcome]
    ) -> Move:
        rules = tuple(application.rule for application in item.applications)
        expression = item.expression
        clone = False
        if isinstance(expression, Leaf):
            clone = expression.name in used
            used.add(expression.name)
        return Move(name, expression, rules, value, slots, clone)

    def _note_duplicates(self, found: Resolved) -> None:
        if self.inventory.state is None:
            return
        several = {str(use.rule) for uses in found.applications for use in uses if len(use.targets) > 1}
        for rule in self.rules:
            if str(rule) not in several or rule.fresh or rule.operations:
                continue
            self.notes.append(
                f"{rule}: each copy gets the whole state, which is exact as long as each sees the gradients "
                "that the one saw; a router changes their scale (see scale and fresh)"
            )

    def _finished(
        self,
        moves: list[Move],
        dropped: list[tuple[str, Rule | None]],
        found: Resolved,
        new: Mapping[str, int | None],
        problems: list[Problem],
    ) -> SectionMoves:
        applications = tuple(tuple(items) for items in found.applications)
        order = (move.expression.name for move in moves if isinstance(move.expression, Leaf))
        names = iter(self.inventory.shapes)
        reordered = not all(name in names for name, _ in groupby(order))
        state = self.inventory.state
        if state is None:
            return SectionMoves(
                tuple(moves), tuple(dropped), notes=tuple(self.notes), applications=applications, reordered=reordered
            )
        groups = self._groups(state, moves, new, problems)
        algorithm = self.inventory.algorithm
        flat = None
        if algorithm is not None and algorithm.is_flat and not problems:
            from optimstate.plan.slots.flat import plan_flat  # few plans need it, and the others start sooner

            flat = plan_flat(state, self.inventory.shapes, moves, groups, problems)
        conversion = self._conversion(state, moves, problems)
        regrouped = [list(group.sources) for group in groups] != [[index] for index in range(len(state.groups))] or any(
            group.options != old.options for group, old in zip(groups, state.groups, strict=False)
        )
        reordered = reordered or [name for group in groups for name in group.members] != [move.target for move in moves]
        return SectionMoves(
            tuple(moves),
            tuple(dropped),
            groups,
            len(state.groups),
            algorithm,
            flat,
            tuple(self.notes),
            applications,
            reordered,
            regrouped,
            conversion,
            self._requantizes(),
        )

    def _conversion(self, state: OptimizerState, moves: Sequence[Move], problems: list[Problem]) -> Conversion | None:
        """How the state becomes that of the optimizer that the plan names."""
        if not self.plan_.optimizer:
            return None
        from optimstate.plan.slots.conversion import plan_conversion  # few plans need it, and the others start sooner

        shapes = {move.target: move.expression.shape for move in moves if move.expression is not None}
        made = plan_conversion(self.inventory.algorithm, self.plan_.optimizer, state, shapes, problems)
        if made is not None and self.plan_.policy.approximate == "refuse":
            for line in made.report:
                if line.outcome == "approximate":
                    what = f"{line.slot} can only be approximated in {made.target} ({line.reason})"
                    problems.append(Problem("approximate", f"{what}, which the policy refuses"))
        return made

    def _groups(
        self, state: OptimizerState, moves: Sequence[Move], new: Mapping[str, int | None], problems: list[Problem]
    ) -> tuple[GroupPlan, ...]:
        group_of = {name: index for index, group in enumerate(state.groups) for name in group.names or ()}
        candidates = [
            Candidate(
                move.target,
                (group_of[move.expression.name],)
                if isinstance(move.expression, Leaf)
                else tuple(dict.fromkeys([group_of[name] for name in move.sources])),
                new.get(move.target),
            )
            for move in moves
        ]
        target = self.inventory.target
        live = None
        if target is not None:
            options = target.options or ({},) * len(target.groups)
            live = list(zip(target.groups, options, strict=True))
        label = self.key.removeprefix("optimizer").strip()
        plan = self.plan_._replace(groups=tuple(rule for rule in self.plan_.groups if rule.is_for(label)))
        groups = plan_groups(plan, candidates, state.groups, live, problems)
        return in_order(groups, self.inventory.order, problems) if self.inventory.order else groups


_BUFFERS = frozenset({"num_batches_tracked", "running_mean", "running_var"})


def _coded_again(outcome: Outcome) -> Outcome:
    reason = "; ".join(filter(None, (outcome.reason, "decoded, and coded in 8 bits again")))
    return (
        outcome._replace(level="approximate", reason=reason) if outcome.level in ("exact", "approximate") else outcome
    )


def _joins(move: Move) -> bool:
    return move.expression is not None and any(
        isinstance(step, ex.Cat | ex.Narrow | ex.Take) for step in ex.steps(move.expression)
    )
