"""The state of one optimizer: param groups, and per parameter its slots."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optimstate.errors import CorruptCheckpointError
from optimstate.tree import Opaque, rebuilt_mapping

__all__ = ["Group", "OptimizerState", "as_mapping"]

ParameterKey = Hashable
"""What torch keys state by: an int (index form), a str (name form), or the parameter itself (a pickled optimizer)."""

Slots = Mapping[str, Any]


def as_mapping(node: Any) -> Mapping[Any, Any] | None:
    """A dict, or the entries of a pickled `defaultdict`, else None."""
    if type(node) is dict or isinstance(node, Mapping):
        return node
    if isinstance(node, Opaque) and node.type.path == "collections.defaultdict":
        return dict(node.entries)
    return None


@dataclass(frozen=True)
class Group:
    """One param group.

    Attributes:
        options: Everything but the parameters: `lr`, `betas`, ..., in the order of the file.
        params: The keys of its parameters, in order.
        names: Their names, or None where the file has none.
        keys: The order of all keys in the file, `params` and `param_names` included.
    """

    options: Mapping[str, Any]
    params: tuple[ParameterKey, ...]
    names: tuple[str, ...] | None
    keys: tuple[str, ...] = ("params",)

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Group:
        """Read a dict of `param_groups`."""
        params, names = node["params"], node.get("param_names")
        if names is not None and (not isinstance(names, list | tuple) or len(names) != len(params)):
            raise CorruptCheckpointError(f"a param group has {len(params)} params, but param_names {names!r}"[:300])
        if names is None and params and all(isinstance(key, str) for key in params):
            names = params
        options = {key: value for key, value in node.items() if key not in ("params", "param_names")}
        return cls(options, tuple(params), None if names is None else tuple(map(str, names)), tuple(node))

    def to_node(self) -> dict[str, Any]:
        """The dict of `param_groups` again."""
        made: dict[str, Any] = {}
        for key in self.keys:
            if key == "params":
                made[key] = list(self.params)
            elif key == "param_names":
                made[key] = list(self.names or ())
            elif key in self.options:
                made[key] = self.options[key]
        made.update({key: value for key, value in self.options.items() if key not in made})
        return made


@dataclass(frozen=True)
class OptimizerState:
    """An optimizer's `state_dict`, in index form, name form, or taken from a pickled optimizer.

    Attributes:
        groups: In order.
        state: Per parameter key its slots. A parameter without an entry is fresh.
        node: The mapping it was read from; its type, key order and further entries are kept.
    """

    groups: tuple[Group, ...]
    state: Mapping[ParameterKey, Slots]
    node: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> OptimizerState:
        """Read a mapping with `state` and `param_groups`.

        Raises:
            CorruptCheckpointError: Names and parameters differ in number, or a key is in two groups.
        """
        groups = tuple(Group.from_node(group) for group in node["param_groups"])
        state = as_mapping(node["state"]) or {}
        keys = [key for group in groups for key in group.params]
        try:
            distinct = len(set(keys))
        except TypeError:  # a key that cannot be one: a list, a dict
            raise CorruptCheckpointError("param_groups has a parameter that cannot be a key of state") from None
        if distinct != len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CorruptCheckpointError(f"parameter {twice!r} is twice in param_groups")
        return cls(groups, {key: as_mapping(slots) or {} for key, slots in state.items()}, node)

    def to_node(self) -> dict[str, Any]:
        """The mapping again, of the same type and key order."""
        made = dict(self.node) or {"state": None, "param_groups": None}
        made["state"] = rebuilt_mapping(self.node.get("state", {}), self.state)
        made["param_groups"] = [group.to_node() for group in self.groups]
        return rebuilt_mapping(self.node, made)

    @property
    def is_named(self) -> bool:
        """Whether every group with parameters has their names."""
        return all(group.names is not None for group in self.groups if group.params) and any(
            g.params for g in self.groups
        )

    def parameters(self) -> Iterator[tuple[ParameterKey, str | None, Slots | None]]:
        """Key, name and slots of every parameter, in group order; slots are None for a fresh one."""
        for group in self.groups:
            for index, key in enumerate(group.params):
                yield key, group.names[index] if group.names is not None else None, self.state.get(key)

    def orphans(self) -> list[ParameterKey]:
        """Keys that have state but are in no group."""
        known = {key for group in self.groups for key in group.params}
        return [key for key in self.state if key not in known]

    def rearranged(self, groups: Sequence[Sequence[tuple[str, ParameterKey, Slots | None]]]) -> OptimizerState:
        """The same optimizer with other parameters.

        Args:
            groups: For each group the parameters' new names, the keys they had, and their slots.

        Returns:
            A state whose keys are unchanged where every parameter is still there once and in its place; otherwise, in
            index form, they are numbered anew in order, as torch numbers them.
        """
        old = tuple(tuple(group.params) for group in self.groups)
        kept = tuple(tuple(key for _, key, _ in members) for members in groups) == old
        by_name = all(isinstance(key, str) for keys in old for key in keys) and any(old)
        state: dict[ParameterKey, Slots] = {}
        made: list[Group] = []
        renamed: dict[ParameterKey, ParameterKey] = {}
        count = 0
        for group, members in zip(self.groups, groups, strict=True):
            params: list[ParameterKey] = []
            for name, key, slots in members:
                new = name if by_name else key if kept else count
                count += 1
                params.append(new)
                renamed.setdefault(key, new)
                if slots is not None:
                    state[new] = slots
            names = tuple(name for name, _, _ in members)
            made.append(replace(group, params=tuple(params), names=names))
        if kept:  # the order of entries in `state` is not the order of the groups
            state = {renamed[key]: state[renamed[key]] for key in self.state if key in renamed}
        orphans = {key: self.state[key] for key in self.orphans()}
        clash = orphans.keys() & state.keys()
        if clash:
            raise CorruptCheckpointError(f"state of {min(map(str, clash))!r} belongs to no parameter of any group")
        return replace(self, groups=tuple(made), state={**state, **orphans})
