"""Apply a plan to the sections of a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from optimstate.errors import MigrationError
from optimstate.plan.planner import Migration, SectionMoves, plan_migration
from optimstate.plan.rules import Plan
from optimstate.state.model import ParameterKey, Slots
from optimstate.state.names import WRAPPERS, renamed_modules, wrapper_prefix
from optimstate.state.sections import Section, find_sections
from optimstate.tree import Opaque, cloned, rebuilt_mapping, replaced

__all__ = ["apply_plan"]


def apply_plan(plan: Plan, tree: Any) -> tuple[Any, Migration, list[str]]:
    """Move every model, optimizer and averaged model of a checkpoint by one plan.

    Wrapper prefixes that all names of a section share (`module.`, `_orig_mod.`) are transparent, unless a rule itself
    begins with one.

    Returns:
        The new tree, the migration, and notes on sections that have no names and were left as they are.

    Raises:
        MigrationError: The plan does not fit; nothing is changed.
    """
    see_wrappers = any(rule.source.text.startswith(WRAPPERS) for rule in plan.rules)
    named: dict[str, tuple[Section, str]] = {}
    names: dict[str, list[str]] = {}
    anonymous: list[Section] = []
    for section in find_sections(tree):
        if section.kind == "scheduler":
            continue
        found = _names_of(section)
        if found is None:
            anonymous.append(section)
            continue
        prefix = "module." if section.kind == "ema" else ""
        if not see_wrappers:
            prefix += wrapper_prefix([name.removeprefix(prefix) for name in found])
        names[_key(section)] = [name.removeprefix(prefix) for name in found]
        named[_key(section)] = section, prefix
    migration = plan_migration(plan, names)
    for section in anonymous:
        _refuse_other_parameters(section, migration)
    rebuilt = {
        id(section.node): _rebuilt(section, migration.sections[key], prefix)
        for key, (section, prefix) in named.items()
        if migration.sections[key].changes
    }
    notes = [f"{_key(section)}: no parameter names, left as it is" for section in anonymous]
    return replaced(tree, rebuilt), migration, notes


def _key(section: Section) -> str:
    return f"{section.kind} {section.label}"


def _names_of(section: Section) -> list[str] | None:
    """The parameters' names in order; None where there are none, or where a pickled object holds them."""
    if isinstance(section.node, Opaque):
        return None
    if section.kind == "optimizer":
        state = section.optimizer()
        return [str(name) for _, name, _ in state.parameters()] if state.is_named else None
    return [name for name in section.tensors() if section.kind != "ema" or name != "n_averaged"]


def _refuse_other_parameters(section: Section, migration: Migration) -> None:
    """Names may change beside an optimizer that has none; which parameters there are may not."""
    if section.kind != "optimizer" or not any(group.params for group in section.optimizer().groups):
        return
    for key, moves in migration.sections.items():
        if moves.dropped or any(move.clone for move in moves.moves):
            raise MigrationError(
                [f"{_key(section)} has no parameter names: it cannot follow what is dropped or duplicated in {key}"],
                hint="Save it with names (build the optimizer from model.named_parameters()), "
                "or convert only the weights.",
            )


def _rebuilt(section: Section, moves: SectionMoves, prefix: str) -> dict[Any, Any]:
    if section.kind == "optimizer":
        return _rebuilt_optimizer(section, moves, prefix)
    return _rebuilt_model(section.node, moves, prefix)


def _rebuilt_optimizer(section: Section, moves: SectionMoves, prefix: str) -> dict[Any, Any]:
    state = section.optimizer()
    place = {
        name.removeprefix(prefix): (index, group.params[position])
        for index, group in enumerate(state.groups)
        for position, name in enumerate(group.names or ())
    }
    groups: list[list[tuple[str, ParameterKey, Slots | None]]] = [[] for _ in state.groups]
    for move in moves.moves:
        index, key = place[move.source]
        slots = state.state.get(key)
        groups[index].append((prefix + move.target, key, cloned(slots) if move.clone else slots))
    return state.rearranged(groups).to_node()


def _rebuilt_model(node: Mapping[str, Any], moves: SectionMoves, prefix: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    results = iter(moves.moves)
    fan_out: dict[str, int] = {prefix + source: 0 for source, _ in moves.dropped}
    for move in moves.moves:
        fan_out[prefix + move.source] = fan_out.get(prefix + move.source, 0) + 1
    for key, value in node.items():
        if key not in fan_out:
            made[key] = value
            continue
        for _ in range(fan_out[key]):
            move = next(results)
            tensor = node[prefix + move.source]
            made[prefix + move.target] = cloned(tensor) if move.clone else tensor
    rebuilt: dict[str, Any] = rebuilt_mapping(node, made)
    if isinstance(rebuilt, OrderedDict) and isinstance(vars(rebuilt).get("_metadata"), Mapping):
        vars(rebuilt)["_metadata"] = _moved_metadata(vars(rebuilt)["_metadata"], moves, prefix)
    return rebuilt


def _moved_metadata(metadata: Mapping[str, Any], moves: SectionMoves, prefix: str) -> dict[str, Any]:
    """The version numbers torch keeps per module, under the modules' new names."""
    modules = renamed_modules((prefix + move.source, prefix + move.target) for move in moves.moves)
    lost = renamed_modules((prefix + name, prefix + name) for name, _ in moves.dropped).keys() - modules.keys()
    made: dict[str, Any] = {}
    for name, value in metadata.items():
        if name in lost:
            continue
        owner = name
        while owner and owner not in modules:  # a module without parameters moves with the one around it
            owner = owner.rpartition(".")[0]
        for target in modules.get(owner, [owner]):
            made[target + name[len(owner) :]] = value
    return rebuilt_mapping(metadata, made)
