"""The parameters that a plan declares new: those that only a live state dict has, and those whose state starts anew."""

from __future__ import annotations

from typing import Any

from optimstate.plan.apply.checkpoint import apply_plan
from optimstate.plan.language.modules import Modules
from optimstate.plan.language.plan import Plan
from optimstate.plan.language.rules import Rule
from optimstate.plan.solve.migration import Migration
from optimstate.state.loose import gathered
from optimstate.state.sections import find_sections

__all__ = ["started_fresh", "without_new"]


def without_new(plan: Plan, tree: Any) -> tuple[Plan, list[Rule]]:
    """The plan without its rules that declare parameters new and match nothing in the checkpoint, and those rules."""
    declared = [rule for rule in plan.all_rules() if rule.fresh and not (rule.sources and rule.targets)]
    if not declared:
        return plan, []
    _, migration, _ = apply_plan(plan.with_policy(unused="ignore"), tree)
    idle = {id(rule) for rule, count in migration.counts if not count}
    names: dict[str, None] = {}
    for section in find_sections(gathered(tree) or tree):
        if section.kind == "optimizer":
            names.update(dict.fromkeys(str(name) for _, name, _ in section.optimizer().parameters()))
        elif section.kind != "scheduler":
            names.update(dict.fromkeys(section.tensors()))
    modules = Modules(names)
    known = {
        id(rule)
        for rule in declared
        for each in map(modules.reading, rule.sources or rule.targets)
        if any(each.match(name) is not None for name in names)
    }
    # Names without placeholders count as parameters of the result, whether they name parameters or modules.
    new = [rule for rule in declared if id(rule) in idle or id(rule) not in known]
    kept = [tuple(rule for rule in rules if not any(rule is each for each in new)) for rules in plan.passes]
    return plan._replace(rules=kept[0], stages=tuple(kept[1:])), new


def started_fresh(migration: Migration) -> set[str]:
    """The parameters of a result of which the plan starts state anew."""
    return {
        move.target
        for key, section in migration.sections.items()
        if key.startswith("optimizer ")
        for move in section.moves
        if any(rule.fresh for rule in move.rules) or any(slot.level == "fresh" for slot in move.slots.values())
    }
