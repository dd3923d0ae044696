"""The optimizers in a live state dict: the names of their parameters, and options by name instead of by position.

Torch flattens `param_groups` by position, but the groups of a checkpoint may be others, or in another order. Their
options are therefore matched by the parameters in them, as `optimstate.resume` does.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, StateMismatchError
from optimstate.plan.language.plan import Plan
from optimstate.plan.solve.groups import Candidate, plan_groups, same_value
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.flattened import find_flat_state
from optimstate.state.optimizer import OptimizerState
from optimstate.tree import Path, format_path

__all__ = ["LISTS", "LiveOptimizer", "flat_name", "live_optimizers", "saved_optimizer"]

_FLAT = re.compile(r"(?:state|param_groups)\.(.+)\.([^.]+)", re.DOTALL)
LISTS = ("params", "param_names")
"""The options that name the parameters of a group, which live groups keep."""


def flat_name(key: Any) -> tuple[str, str] | None:
    """The parameter and the slot or option of a key of a flattened optimizer; None for any other key."""
    match = _FLAT.fullmatch(str(key))
    return None if match is None else (match[1], match[2])


class LiveOptimizer(Record):
    """An optimizer in a live state dict.

    Attributes:
        path: Its path in the state dict.
        names: For each param group the names of its parameters; their numbers if they have no names.
        options: For each param group its options.
        items: For each item of the state dict that is an option, the index of its group, the name of the option, and
            the rest of its path if the option has several items.
        numbers: The name of each parameter by its number, if the state is keyed by numbers.
        is_named: Whether the parameters have names.
    """

    path: Path
    names: tuple[tuple[str, ...], ...]
    options: tuple[Mapping[str, Any], ...]
    items: Mapping[str, tuple[int, str, Path]]
    numbers: Mapping[str, str]
    is_named: bool

    def saved_name(self, name: str, path: Path) -> str:
        """The name of a slot's item in a checkpoint, whose state is keyed by names."""
        at = len(self.path)
        if self.is_named and len(path) > at + 2 and path[:at] == self.path and path[at] == "state":
            return ".".join(
                map(str, (*self.path, "state", self.numbers.get(str(path[at + 1]), path[at + 1]), *path[at + 2 :]))
            )
        return name

    @cached_property
    def _known(self) -> frozenset[str]:
        return frozenset(name for names in self.names for name in names)

    def owner(self, path: Path) -> str | None:
        """The parameter to whose slot an item belongs; None for any other item."""
        at = len(self.path)
        if path[:at] != self.path or len(path) == at:
            return None
        if path[at] == "state" and len(path) > at + 2:
            return self.numbers.get(str(path[at + 1]), str(path[at + 1]))
        rest = str(path[at]).removeprefix("state.")
        parts = rest.split(".") if rest != path[at] else []
        found = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        return next((name for name in found if name in self._known), None)

    def refuse_other_names(self, state: OptimizerState) -> None:
        """Refuse to match names with numbers.

        Raises:
            StateMismatchError: Only one of the two has names.
        """
        if self.is_named == state.is_named or not any(group.params for group in state.groups):
            return
        where = format_path(self.path) or "the state dict"
        if self.is_named:
            raise StateMismatchError(
                f"{where}: the parameters of the checkpoint are numbered, and those of the live optimizer have names",
                hint="Give the checkpoint's parameters names with `optimstate name`, and load the result.",
            )
        raise StateMismatchError(
            f"{where}: the parameters of the live optimizer are numbered, and those of the checkpoint have names",
            hint="Build it from model.named_parameters(), or load the result of get_optimizer_state_dict.",
        )

    def options_by_name(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The value for each item that is an option, if the checkpoint has no optimizer but items of the same names.

        Args:
            values: The items of the checkpoint.

        Raises:
            MigrationError: The parameters of a live group have different values.
        """
        found: dict[str, Any] = {}
        first: dict[tuple[int, str, Path], str] = {}
        for name, key in self.items.items():
            if name not in values or key[1] in LISTS:
                continue
            known = first.setdefault(key, name)
            if not same_value(values[name], values[known]):
                message = (
                    f"{describe(known)} and {describe(name)} are of one live param group, and differ in the checkpoint"
                )
                remedy = 'say hyperparameters = "live" in [policy] to keep the options of the live optimizer'
                raise MigrationError([Problem("group", message, names=(known, name), remedy=remedy)])
            found[name] = values[name]
        return found

    def unknown_options(self, state: OptimizerState) -> list[str]:
        """The options of the checkpoint's groups that the live groups do not have."""
        known = {key for options in self.options for key in options}
        return list(dict.fromkeys(key for group in state.groups for key in group.options if key not in known))

    def new_options(self, state: OptimizerState, plan: Plan, new: Collection[str]) -> dict[str, Any]:
        """The value from the checkpoint for each item that is an option; those that it lacks are left out.

        Args:
            state: The checkpoint's optimizer, moved by the plan.
            plan: Its policies decide between the options of groups that are joined.
            new: Parameters that the checkpoint need not have.

        Raises:
            MigrationError: Groups with different options would be joined, or no parameter of a live group is in a group
                of the checkpoint.
        """
        candidates = [
            Candidate(str(name), (number,))
            for number, group in enumerate(state.groups)
            for name in (group.names if group.names is not None else group.params)
        ]
        known = {candidate.name for candidate in candidates}
        problems: list[Problem] = []
        target = list(zip(self.names, self.options, strict=True))
        made = plan_groups(Plan(policy=plan.policy), candidates, state.groups, target, problems)
        for number, names in enumerate(self.names):
            unknown = [name for name in names if name not in new]
            if unknown and known.isdisjoint(names):
                message = (
                    f"no param group of the checkpoint has a parameter of the live group {number} "
                    f"({', '.join(map(describe, unknown[:3]))}), so nothing gives its options"
                )
                remedy = 'say hyperparameters = "live" in [policy] to keep those of the live optimizer'
                problems.append(Problem("options", message, names=tuple(unknown), remedy=remedy))
        if problems:
            where = format_path(self.path) or "the optimizer"
            raise MigrationError([each._replace(message=f"{where}: {each.message}") for each in problems])
        found: dict[str, Any] = {}
        for name, (number, option, rest) in self.items.items():
            value = made[number].options.get(option, _ABSENT)
            for key in rest:
                value = (
                    value[key] if isinstance(value, list | tuple) and type(key) is int and key < len(value) else _ABSENT
                )
            if value is not _ABSENT:
                found[name] = value
        return found


_ABSENT = object()


def saved_optimizer(tree: Any, path: Path) -> OptimizerState | None:
    """The optimizer at a path of a checkpoint, nested or flattened; None if there is none that is recognised."""
    node = tree
    for key in path:
        inner = isinstance(node, list) and type(key) is int and key < len(node)
        node = node[key] if inner else node.get(key) if isinstance(node, Mapping) else None
    if not isinstance(node, Mapping):
        return None
    if {"param_groups", "state"} <= node.keys():
        return OptimizerState.from_node(node)
    flat = find_flat_state(node)
    return None if flat is None else OptimizerState.from_node(flat.optimizer)


def live_optimizers(items: Mapping[str, Any], paths: Mapping[str, Sequence[Any]]) -> list[LiveOptimizer]:
    """The optimizers in a state dict.

    Args:
        items: Its items by the names that torch gives them.
        paths: The path of each item.
    """
    nested: dict[Path, dict[int, dict[str, Any]]] = {}
    flat: dict[Path, dict[str, dict[str, Any]]] = {}
    options: dict[Path, dict[str, tuple[Any, str, Path]]] = {}
    for name, value in items.items():
        path = tuple(paths.get(name, (name,)))
        for at, key in enumerate(path[:-2]):
            if key == "param_groups" and type(path[at + 1]) is int:
                group = nested.setdefault(path[:at], {}).setdefault(path[at + 1], {})
                if len(path) == at + 3:
                    group[str(path[at + 2])] = value
                options.setdefault(path[:at], {})[name] = path[at + 1], str(path[at + 2]), path[at + 3 :]
                break
        else:
            found = flat_name(path[-1]) if str(path[-1]).startswith("param_groups.") else None
            if found is not None:
                flat.setdefault(path[:-1], {}).setdefault(found[0], {})[found[1]] = value
                options.setdefault(path[:-1], {})[name] = found[0], found[1], ()
    return [
        *(made for path, groups in nested.items() for made in _nested(path, groups, options[path])),
        *(_flattened(path, found, options[path]) for path, found in flat.items() if path not in nested),
    ]


def _nested(
    path: Path, groups: Mapping[int, Mapping[str, Any]], options: Mapping[str, tuple[int, str, Path]]
) -> Iterator[LiveOptimizer]:
    order = [groups[number] for number in sorted(groups)]
    keys: list[Sequence[Any]] = [group["params"] for group in order if isinstance(group.get("params"), list | tuple)]
    if sorted(groups) != list(range(len(groups))) or len(keys) != len(groups):
        return
    names = [
        own if all(type(key) is str for key in own) else group.get("param_names", own)
        for group, own in zip(order, keys, strict=True)
    ]
    if not all(len(own) == len(known) for own, known in zip(keys, names, strict=True)):
        return
    flat = [key for own in keys for key in own]
    yield LiveOptimizer(
        path,
        tuple(tuple(map(str, own)) for own in names),
        tuple({key: value for key, value in group.items() if key not in LISTS} for group in order),
        options,
        {
            str(key): str(name)
            for key, name in zip(flat, [n for own in names for n in own], strict=True)
            if type(key) is int
        },
        all(type(name) is str for own in names for name in own),
    )


def _flattened(
    path: Path, found: Mapping[str, Mapping[str, Any]], options: Mapping[str, tuple[str, str, Path]]
) -> LiveOptimizer:
    """One with an item for each option of each parameter; parameters with equal options are taken for a group."""
    groups: list[tuple[Mapping[str, Any], list[str]]] = []
    for name, own in found.items():
        for known, names in groups:
            if known.keys() == own.keys() and all(same_value(known[key], own[key]) for key in own):
                names.append(name)
                break
        else:
            groups.append((own, [name]))
    number = {name: index for index, (_, names) in enumerate(groups) for name in names}
    return LiveOptimizer(
        path,
        tuple(tuple(names) for _, names in groups),
        tuple({key: value for key, value in own.items() if key not in LISTS} for own, _ in groups),
        {item: (number[name], option, rest) for item, (name, option, rest) in options.items()},
        {},
        True,
    )
