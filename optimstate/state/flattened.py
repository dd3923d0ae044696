"""Optimizer state flattened into a mapping of names to tensors, often together with the model's weights.

Torch's flattened optimizer state dicts have the keys `state.<name>.<slot>` and `param_groups.<name>.<option>`; writers
of safetensors put them into one mapping with the weights. This module splits such a mapping into weights and nested
optimizer state, and joins them again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from typing import Any

from optimstate.record import Record
from optimstate.state.algorithms.registry import ALGORITHMS
from optimstate.state.optimizer import OptimizerState
from optimstate.tree import rebuilt_mapping

__all__ = ["FlatState", "find_flat_state"]

_KEY = r"(?s)((?:optim\w*\.)?)(state|param_groups)\.(.+)\.([^.]+)"


class FlatState(Record):
    """A mapping with flattened optimizer state, and its two parts.

    Attributes:
        host: The mapping as it is in the file.
        prefix: The prefix of `state.` in its keys: empty, `optim.` or `optimizer.`.
        rest: Its other entries, in order, without the prefix `within`; of the mapping's type.
        within: The prefix of the model's names: empty, or `model.`.
        by_group: Whether options have keys `param_groups.<number>.<option>`, once for each group.
        optimizer: The state in nested form, keyed by names.
    """

    host: Mapping[str, Any]
    prefix: str
    rest: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    within: str = ""
    by_group: bool = False

    def joined(self, rest: Mapping[str, Any], optimizer: Mapping[str, Any]) -> Mapping[str, Any]:
        """The mapping with other entries, which take the positions of the old entries of the same part.

        Args:
            rest: Replaces `rest`; may be empty.
            optimizer: Replaces `optimizer`; may be empty.
        """
        state: Mapping[str, Any] = {}
        if optimizer:
            state = _of_groups(optimizer) if self.by_group else OptimizerState.from_node(optimizer).to_flat()
        flat = iter([(self.prefix + key, value) for key, value in state.items()])
        outside = {key for key in self.host if not key.startswith(self.within)}
        others = iter([(key if key in outside else self.within + key, value) for key, value in rest.items()])
        made: dict[str, Any] = {}
        for key in self.host:
            entries = others if key.removeprefix(self.within) in self.rest else flat
            made.update([entry] if (entry := next(entries, None)) is not None else [])
        made.update(others)
        made.update(flat)
        return rebuilt_mapping(self.host, made)


def find_flat_state(fields: Mapping[str, Any]) -> FlatState | None:
    """The optimizer state in a mapping of names to tensors, or None.

    A module may be called `state` too. So keys count as optimizer state only if the other tensors have the same names,
    if the mapping has options too, or if every slot is one that some known optimizer has.
    """
    first = next(_keys(fields), None)
    if first is None:
        return None
    prefix = first[1]
    matches = {key: match for key, match in ((m[0], m) for m in _keys(fields)) if match[1] == prefix}
    names = {match[3] for match in matches.values() if match[2] == "state"}
    slots = {match[4] for match in matches.values() if match[2] == "state"}
    rest = {key: value for key, value in fields.items() if key not in matches}
    known = names <= rest.keys() or any(match[2] == "param_groups" for match in matches.values())
    if not names or not (known or slots <= _SLOTS):
        return None
    groups = _groups(fields, matches)
    if groups is not None:
        optimizer = _by_group(fields, matches, groups)
    else:
        optimizer = OptimizerState.from_flat({key.removeprefix(prefix): fields[key] for key in matches}).to_node()
    listed = {str(name) for group in groups or () for name in group["params"]}
    within = _within(rest, listed or names) if prefix else ""
    rest = {key.removeprefix(within): value for key, value in rest.items()}
    return FlatState(fields, prefix, rebuilt_mapping(fields, rest), optimizer, within, groups is not None)


def _within(rest: Mapping[str, Any], names: Set[str]) -> str:
    """The prefix that the model's names have and the optimizer's names lack; empty if there is none."""
    first = next((key.partition(".")[0] + "." for key in rest if "." in key), "")
    inner = [key.removeprefix(first) for key in rest]
    numbers = all(name.isdecimal() for name in names)  # of parameters without names
    fits = numbers or set(names) <= {key.removeprefix(first) for key in rest if key.startswith(first)}
    return first if first and fits and not names <= rest.keys() and len(set(inner)) == len(inner) else ""


def _keys(fields: Mapping[str, Any]) -> Iterator[re.Match[str]]:
    return (match for key in fields if ("state." in key or "groups." in key) and (match := re.fullmatch(_KEY, key)))


_SLOTS = frozenset(slot for algorithm in ALGORITHMS for slot in algorithm.slots)


def _groups(fields: Mapping[str, Any], matches: Mapping[str, re.Match[str]]) -> list[dict[str, Any]] | None:
    """The param groups, if options are keyed by group number and groups list their parameters; else None."""
    found: dict[str, dict[str, Any]] = {}
    for key, match in matches.items():
        if match[2] == "param_groups":
            found.setdefault(match[3], {})[match[4]] = fields[key]
    groups = [found[number] for number in map(str, range(len(found))) if number in found]
    listed = all(isinstance(group.get("params"), list) for group in groups)
    return groups if groups and len(groups) == len(found) and listed else None


def _by_group(
    fields: Mapping[str, Any], matches: Mapping[str, re.Match[str]], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    numbered = any(type(key) is int for group in groups for key in group["params"])
    state: dict[Any, dict[str, Any]] = {}
    for key, match in matches.items():
        if match[2] == "state":
            name = int(match[3]) if numbered and match[3].isdecimal() else match[3]
            state.setdefault(name, {})[match[4]] = fields[key]
    return {"state": state, "param_groups": groups}


def _of_groups(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    made = {f"state.{name}.{slot}": v for name, slots in optimizer["state"].items() for slot, v in slots.items()}
    for number, group in enumerate(optimizer["param_groups"]):
        made.update({f"param_groups.{number}.{option}": value for option, value in group.items()})
    return made
