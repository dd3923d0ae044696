"""The state of one optimizer: param groups, and per parameter its slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from optimstate.describe import describe
from optimstate.errors import CorruptCheckpointError, MigrationError, StateMismatchError
from optimstate.record import Record, field
from optimstate.tree import Opaque, rebuilt_mapping

__all__ = ["Group", "Member", "OptimizerState", "as_mapping"]

ParameterKey = Hashable
"""The key of a parameter's state: an int (index form), a str (name form), or the parameter (a pickled optimizer)."""

Slots = Mapping[str, Any]


def as_mapping(node: Any) -> Mapping[Any, Any] | None:
    """A mapping, or the entries of a pickled `defaultdict`; None for any other node."""
    if type(node) is dict or isinstance(node, Mapping):
        return node
    if isinstance(node, Opaque) and node.type.path == "collections.defaultdict":
        return dict(node.entries)
    return None


class Group(Record):
    """One param group.

    Attributes:
        options: Everything except the parameters: `lr`, `betas`, ..., in the order of the file.
        params: The keys of its parameters, in order.
        names: Their names, or None if the file has none.
        keys: All keys in the order of the file, including `params` and `param_names`.
    """

    options: Mapping[str, Any]
    params: tuple[ParameterKey, ...]
    names: tuple[str, ...] | None
    keys: tuple[str, ...] = ("params",)

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> Group:
        """Read a dict of `param_groups`; in one without `params`, names are the keys (`torch_checkpointing`)."""
        names = node.get("param_names")
        params = node.get("params", names or ())
        if names is not None and (not isinstance(names, list | tuple) or len(names) != len(params)):
            raise CorruptCheckpointError(
                f"a param group has {len(params)} params, but param_names {describe(names)}"[:300]
            )
        if names is None and params and all(isinstance(key, str) for key in params):
            names = params
        options = {key: value for key, value in node.items() if key not in ("params", "param_names")}
        return cls(options, tuple(params), None if names is None else tuple(map(str, names)), tuple(node))

    def to_node(self) -> dict[str, Any]:
        """The group as a dict of `param_groups`."""
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


class Member(NamedTuple):
    """A parameter of a state that is being built: its name, its old key (None for a new parameter), and its slots."""

    name: str
    key: ParameterKey | None
    slots: Slots | None


class OptimizerState(Record):
    """An optimizer's `state_dict`, in index form, name form, or taken from a pickled optimizer.

    Attributes:
        groups: The param groups, in order.
        state: The slots of each parameter, by its key. A parameter without an entry is fresh.
        node: The mapping that it was read from, whose type, key order and further entries are kept.
        shared: What else stands in `state`, under keys that are in no group: values for all parameters together.
    """

    groups: tuple[Group, ...]
    state: Mapping[ParameterKey, Slots]
    node: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[ParameterKey, Any] = field(default_factory=dict)

    @classmethod
    def from_node(cls, node: Mapping[str, Any]) -> OptimizerState:
        """Read a mapping with `state` and `param_groups`.

        Raises:
            CorruptCheckpointError: The numbers of names and parameters differ, a key is in two groups or not hashable,
                or what is stored for a parameter is not a mapping of slots. Within one group torch allows tied
                parameters to be listed twice, with a warning.
        """
        groups = tuple(Group.from_node(group) for group in node["param_groups"])
        state = as_mapping(node["state"]) or {}
        try:
            keys = [key for group in groups for key in set(group.params)]
            twice = next((key for key, times in Counter(keys).items() if times > 1), None)
        except TypeError:  # a list or a dict
            raise CorruptCheckpointError("param_groups has a parameter that cannot be a key of state") from None
        if twice is not None:
            raise CorruptCheckpointError(f"parameter {describe(twice)} is in two param groups")
        found = {key: as_mapping(slots) for key, slots in state.items()}
        shared = {key: state[key] for key, slots in found.items() if slots is None}
        for key in keys if shared else ():
            if key in shared:
                message = f"the state of parameter {describe(key)} is {describe(shared[key])}, not a mapping of slots"
                raise CorruptCheckpointError(message[:300])
        return cls(groups, {key: slots for key, slots in found.items() if slots is not None}, node, shared)

    def to_node(self) -> dict[str, Any]:
        """The state as a mapping of the type and key order that it was read from."""
        made = dict(self.node) or {"state": None, "param_groups": None}
        made["state"] = rebuilt_mapping(self.node.get("state", {}), {**self.state, **self.shared})
        made["param_groups"] = [group.to_node() for group in self.groups]
        return rebuilt_mapping(self.node, made)

    @property
    def is_named(self) -> bool:
        """Whether every group with parameters has their names."""
        return all(group.names is not None for group in self.groups if group.params) and any(
            g.params for g in self.groups
        )

    def parameters(self) -> Iterator[tuple[ParameterKey, str | None, Slots | None]]:
        """Key, name and slots of every parameter, in group order; slots are None for a fresh parameter."""
        for group in self.groups:
            for index, key in enumerate(group.params):
                yield key, group.names[index] if group.names is not None else None, self.state.get(key)

    def orphans(self) -> list[ParameterKey]:
        """Keys that have state and are in no group."""
        known = {key for group in self.groups for key in group.params}
        return [key for key in self.state if key not in known]

    def of_no_parameter(self) -> list[ParameterKey]:
        """All keys of `state` that are in no group: orphans, and what is shared."""
        return [*self.orphans(), *self.shared]

    def named(self, names: Sequence[str] | Sequence[Sequence[str]]) -> OptimizerState:
        """The same state with names for its parameters.

        Args:
            names: The names in the order of the groups, as one sequence or as one for each group.

        Raises:
            StateMismatchError: There are more or fewer names than parameters, or a name occurs twice.
        """
        flat = [name for item in names for name in ([item] if isinstance(item, str) else item)]
        count = sum(len(group.params) for group in self.groups)
        if len(flat) != count:
            raise StateMismatchError(f"{len(flat)} names for an optimizer of {count} parameters")
        if len(set(flat)) != len(flat):
            twice = next(name for name, times in Counter(flat).items() if times > 1)
            raise StateMismatchError(f"two parameters would be called {describe(twice)}")
        rest = iter(flat)
        made = tuple(
            group._replace(
                names=tuple(next(rest) for _ in group.params),
                keys=group.keys if "param_names" in group.keys else (*group.keys, "param_names"),
            )
            for group in self.groups
        )
        return self._replace(groups=made)

    def rebuilt(self, groups: Sequence[tuple[Group, Sequence[Member]]]) -> OptimizerState:
        """An optimizer with other parameters or groups.

        Args:
            groups: The members of each new group, with the group from which it takes its options and order of keys.

        Returns:
            A state with the same keys if every parameter is still there, once and in the same position. Otherwise keys
            in index form are numbered in order, as torch numbers them.

        Raises:
            MigrationError: State that belongs to no parameter has one of the new keys.
        """
        old = tuple(tuple(group.params) for group in self.groups)
        kept = tuple(tuple(member.key for member in members) for _, members in groups) == old
        by_name = all(isinstance(key, str) for keys in old for key in keys) and any(old)
        state: dict[ParameterKey, Slots] = {}
        made: list[Group] = []
        renamed: dict[ParameterKey, ParameterKey] = {}
        count = 0
        for group, members in groups:
            params: list[ParameterKey] = []
            for member in members:
                new: ParameterKey = member.name if by_name else member.key if kept else count
                count += 1
                params.append(new)
                renamed.setdefault(member.key, new)
                if member.slots is not None:
                    state[new] = member.slots
            names = tuple(member.name for member in members)
            made.append(group._replace(params=tuple(params), names=names))
        if kept:  # keep the order of entries in `state`, which may differ from the order of the groups
            state = {renamed[key]: state[renamed[key]] for key in self.state if renamed.get(key) in state}
        orphans = {key: self.state[key] for key in self.orphans()}
        if clash := set(self.of_no_parameter()) & {key for group in made for key in group.params}:
            message = (
                f"state under {describe(min(map(str, clash)))} belongs to no parameter of the checkpoint, and would be "
                "that of a parameter of the result"
            )
            raise MigrationError.of("name", message, hint='Leave it out: unexpected = "drop" in [policy] of the plan.')
        return self._replace(groups=tuple(made), state={**state, **orphans})

    def without_numbered_orphans(self) -> OptimizerState:
        """The same state less what stands under a number, as a parameter's does, and belongs to none."""
        gone = {key for key in self.orphans() if isinstance(key, int)}
        return self._replace(state={key: slots for key, slots in self.state.items() if key not in gone})

    def by_name(self) -> OptimizerState:
        """The same state keyed by names, as FSDP and DCP have it.

        Raises:
            StateMismatchError: A parameter has no name, or state that belongs to no parameter has the key of a name.
        """
        self._refuse_unnamed()
        rename: dict[ParameterKey, ParameterKey] = {}
        made = []
        for group in self.groups:
            names = tuple(str(name) for name in group.names or ())
            rename.update(zip(group.params, names, strict=True))
            order = tuple(key for key in group.keys if key != "param_names")
            order = order if "params" in order else (*order, "params")
            made.append(group._replace(params=names, keys=order))
        # The entries of parameters are in the order of the groups, as torch writes them.
        known = {rename[key]: self.state[key] for group in self.groups for key in group.params if key in self.state}
        orphans = {key: self.state[key] for key in self.orphans()}
        clash = set(self.of_no_parameter()) & known.keys()
        if clash:
            raise StateMismatchError(f"state of {describe(min(map(str, clash)))} belongs to no parameter of any group")
        return self._replace(groups=tuple(made), state={**known, **orphans})

    def _refuse_unnamed(self) -> None:
        if not all(group.names is not None for group in self.groups if group.params):
            raise StateMismatchError(
                "the parameters of this optimizer have no names", hint="Give names with state.named([...])."
            )

    def to_flat(self) -> dict[str, Any]:
        """The flattened form: `state.<name>.<slot>` and `param_groups.<name>.<option>`, options for each parameter.

        Raises:
            StateMismatchError: A parameter has no name, or state belongs to no parameter.
        """
        self._refuse_unnamed()
        if loose := self.of_no_parameter():
            raise StateMismatchError(f"state of {describe(loose[0])} belongs to no parameter of any group")
        made: dict[str, Any] = {}
        for _, name, slots in self.parameters():
            made.update({f"state.{name}.{slot}": value for slot, value in (slots or {}).items()})
        for group in self.groups:
            for name in group.names or ():
                made.update({f"param_groups.{name}.{option}": value for option, value in group.options.items()})
        return made

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any]) -> OptimizerState:
        """Read the flattened form. Parameters with the same options, or without any, are one group, in order.

        Raises:
            CorruptCheckpointError: A key is neither state nor an option of a parameter.
        """
        options: dict[str, dict[str, Any]] = {}
        state: dict[ParameterKey, dict[str, Any]] = {}
        for key, value in flat.items():
            head, _, rest = key.partition(".")
            name, _, last = rest.rpartition(".")
            if head not in ("state", "param_groups") or not name:
                raise CorruptCheckpointError(f"{describe(key)} is not an entry of a flattened optimizer state")
            own = options.setdefault(name, {})
            found = state.setdefault(name, {}) if head == "state" else own
            found[last] = value
        groups: list[tuple[dict[str, Any], list[str]]] = []
        for name, found in options.items():
            for known, names in groups:
                if _same_options(known, found):
                    names.append(name)
                    break
            else:
                groups.append((found, [name]))
        return cls(
            tuple(Group(found, tuple(names), tuple(names), (*found, "params")) for found, names in groups),
            state,
        )


def _same_options(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one.keys() != other.keys():
        return False
    plain = (bool, int, float, complex, str, type(None), tuple, list)
    return all(
        one[key] is other[key]
        or (isinstance(one[key], plain) and type(one[key]) is type(other[key]) and one[key] == other[key])
        for key in one
    )
