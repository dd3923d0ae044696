"""The node of a model rebuilt: its tensors, the entries beside them, and what torch notes of each module."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError
from optimstate.plan.apply.execute import execute_model
from optimstate.plan.expressions import tree as ex
from optimstate.plan.solve.migration import SectionMoves
from optimstate.state.names import renamed_modules
from optimstate.state.sections import Section
from optimstate.tree import rebuilt_mapping

__all__ = ["plain_tensors", "rebuilt_model"]


def plain_tensors(section: Section, prefix: str) -> dict[str, Any]:
    """The tensors of a model or an average by the names that rules speak of.

    Args:
        section: Not an optimizer.
        prefix: What wrappers put before all its names.
    """
    found = section.tensors()
    if not prefix and section.kind != "ema":
        return found
    return {
        name.removeprefix(prefix): value
        for name, value in found.items()
        if section.kind != "ema" or name != "n_averaged"
    }


def rebuilt_model(section: Section, moves: SectionMoves, prefix: str) -> dict[str, Any]:
    """The node of a model that a plan changed; entries that are not tensors keep their position.

    Args:
        section: As it was found.
        moves: What becomes of its tensors.
        prefix: As for `plain_tensors`; the result has it too.
    """
    node = section.node
    values = execute_model(moves, plain_tensors(section, prefix))
    places: dict[str, int] = {prefix + source: 0 for source, _ in moves.dropped}  # how many stand where a source stood
    for move in moves.moves:
        for number, source in enumerate(move.sources):
            key = prefix + source
            places[key] = places.get(key, 0) + (number == 0 and move.value is not None)
    wanted = iter(values.items())
    ordered: dict[str, Any] = {}
    for key, value in node.items():
        count = places.get(key)
        if count == 1:
            name, made = next(wanted)
            ordered[prefix + name] = made
        elif count is not None:
            ordered.update((prefix + name, made) for name, made in islice(wanted, count))
        elif isinstance(key, str) and key.startswith(prefix) and key.removeprefix(prefix) in values:
            message = f"{describe(key)} would become a tensor, but the model has {describe(value)} of that name"
            raise MigrationError.of("conflict", message[:300], section.label, hint="Give the tensor another name.")
        else:
            ordered[key] = value
    rebuilt: dict[str, Any] = rebuilt_mapping(node, ordered)
    if isinstance(rebuilt, OrderedDict) and isinstance(vars(rebuilt).get("_metadata"), Mapping):
        vars(rebuilt)["_metadata"] = _moved_metadata(vars(rebuilt)["_metadata"], moves, prefix)
    return rebuilt


def _moved_metadata(metadata: Mapping[Any, Any], moves: SectionMoves, prefix: str) -> Mapping[Any, Any]:
    """The version numbers torch keeps per module, under the modules' new names; what is not by name stays."""
    pairs = [
        (prefix + leaf.name, prefix + move.target)
        for move in moves.moves
        if move.expression is not None
        for leaf in ex.leaves(move.expression)
    ]
    modules = renamed_modules(pairs)
    lost = renamed_modules((prefix + name, prefix + name) for name, _ in moves.dropped).keys() - modules.keys() - {""}
    if "" in modules.get("", ()):  # what is beside modules that stayed, stays
        modules[""] = [""]
    made: dict[Any, Any] = {"": metadata[""]} if "" in metadata else {}  # there is always a root
    for name, value in metadata.items():
        if not isinstance(name, str):
            made[name] = value
            continue
        if name in lost:
            continue
        owner = name
        while owner and owner not in modules:  # a module without parameters moves with the one around it
            owner = owner.rpartition(".")[0]
        inner = name[len(owner) :].lstrip(".")
        for target in modules.get(owner, [owner]):
            made[".".join(filter(None, (target, inner)))] = value
    return rebuilt_mapping(metadata, made)
