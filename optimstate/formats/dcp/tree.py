"""Converting between the flat names of a distributed checkpoint and the tree from which it was saved.

Torch flattens a state dict by joining its keys with dots, and records the path of each name. Three forms are read into
the same tree:

- nested: the paths determine the tree;
- flattened optimizers: keys `state.<parameter>.<slot>` and `param_groups.<parameter>.<option>` of one dict become
  `state` and `param_groups`; parameters with equal options make a group;
- Megatron's, which has no paths (see `megatron`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from optimstate.describe import describe, exact
from optimstate.errors import CorruptCheckpointError, RepresentationError
from optimstate.formats.dcp.megatron import tree_of_names
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, Path, format_path
from optimstate.tree.unfolding import check_unfolded

__all__ = ["Leaves", "is_flattened", "leaves", "nested"]

Leaves = dict[str, tuple[Path, Any]]
"""Name -> path and value."""


# --- names to tree --------------------------------------------------------------------------------------------------


def nested(
    values: Mapping[str, Any], paths: Mapping[str, Path], beside: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The tree of named values.

    Args:
        values: The values by name.
        paths: The path of each; empty if the checkpoint has none.
        beside: Further entries of the tree.

    Returns:
        The tree, and notes for people.
    """
    if not paths:
        tree, notes = tree_of_names(values, beside)
    else:
        tree, notes = {}, []
        parents: dict[tuple[Any, ...], Any] = {}
        for name, value in values.items():
            path = paths.get(name, (name,))
            parent = parents.get(path[:-1])
            if type(parent) is dict and path and type(path[-1]) is str and path[-1] not in parent:
                parent[path[-1]] = value
            else:
                _insert(tree, path, value, parents)
        unplaced = values.keys() - paths.keys()
        tree = _restored(tree, is_flattened({**paths, **{name: (name,) for name in unplaced}} if unplaced else paths))
    clash = tree.keys() & beside.keys()
    if clash:
        raise CorruptCheckpointError(f"{describe(min(clash))} is both an item of the checkpoint and a file beside it")
    return {**tree, **beside}, notes


def _insert(tree: dict[Any, Any], path: tuple[Any, ...], value: Any, parents: dict[tuple[Any, ...], Any]) -> None:
    """Put a value at a path, and note its containers in `parents`; as in torch, an int is an index of a list."""
    beyond = parents.get(path[:-2]) if len(path) > 1 else None
    if type(beyond) is dict and type(path[-1]) is type(path[-2]) is str and path[-2] not in beyond:
        beyond[path[-2]] = parents[path[:-1]] = {path[-1]: value}
        return
    if not path or not all(type(key) is str or (type(key) is int and key >= 0) for key in path):
        raise CorruptCheckpointError(f"a path is {describe(path)}"[:200])
    node: Any = tree
    for depth, (key, following) in enumerate(zip(path, (*path[1:], None), strict=True)):
        parents[path[:depth]] = node
        if isinstance(node, list) != (type(key) is int):
            raise CorruptCheckpointError(f"the path {describe(path)} contradicts another one"[:300])
        if isinstance(node, list):
            if key > len(node) + (1 << 16):
                raise CorruptCheckpointError(f"the path {describe(path)} leaves a hole in a list"[:300])
            node.extend([_ABSENT] * (key + 1 - len(node)))
        found = node[key] if isinstance(node, list) else node.get(key, _ABSENT)
        if following is None:
            if found is not _ABSENT:
                raise CorruptCheckpointError(f"the path {describe(path)} occurs twice"[:300])
            node[key] = value
        elif found is _ABSENT:
            node[key] = node = [] if type(following) is int else {}
        elif isinstance(found, dict | list):
            node = found
        else:
            raise CorruptCheckpointError(f"the path {describe(path)} leads through a value"[:300])


_ABSENT = object()


def _restored(node: Any, flattened: bool) -> Any:
    """The tree with its optimizers in torch's form, including values that have no flat names."""
    if type(node) is list:
        node = [None if item is _ABSENT else item for item in node]
        return [_restored(item, flattened) if type(item) in _CONTAINERS else item for item in node]
    if flattened and _is_flattened_optimizer(node):
        return _unflattened(node)
    made = {key: _restored(value, flattened) if type(value) in _CONTAINERS else value for key, value in node.items()}
    groups = made.get("param_groups")
    if (
        isinstance(groups, list)
        and groups
        and all(isinstance(g, dict) and isinstance(g.get("params"), list) for g in groups)
    ):
        if "state" not in made:  # an empty mapping has no items, and so no names
            made = {"state": {}, **made}
        state = made["state"]
        keys = [key for group in groups for key in group["params"]]
        if isinstance(state, dict) and keys and all(type(key) is int for key in keys):
            made["state"] = {int(key) if str(key).isdecimal() else key: slots for key, slots in state.items()}
    return made


_CONTAINERS = (dict, list)


def _is_flattened_optimizer(node: Mapping[Any, Any]) -> bool:
    return any(str(key).startswith("param_groups.") for key in node) and all(
        isinstance(key, str) and key.startswith(("state.", "param_groups.")) for key in node
    )


def _unflattened(node: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, dict[str, Any]] = {}
    of_state: list[tuple[str, Any]] = []
    for key, value in node.items():
        kind, _, text = key.partition(".")
        if kind == "state":
            of_state.append((text, value))
        else:
            name, _, option = text.rpartition(".")
            options.setdefault(name, {})[option] = value
    state: dict[str, dict[str, Any]] = {}
    for text, value in of_state:
        name, slot = _parameter_and_rest(text, options)
        slots = state.setdefault(name, {})
        for outer in slot[:-1]:
            slots = slots.setdefault(outer, {})
        slots[slot[-1]] = value
    return {"state": state, "param_groups": list(_groups(options))}


def _parameter_and_rest(text: str, names: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Split `<parameter>.<slot>`, both of which may contain dots, by the names of parameters."""
    name, _, rest = text.rpartition(".")
    slot = [rest]
    while name not in names and name:
        name, _, key = name.rpartition(".")
        slot.insert(0, key)
    if name:
        return name, slot
    name, _, rest = text.rpartition(".")
    return name, [rest]


def _groups(options: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Param groups of parameters with equal options, in the order of their first parameters."""
    found: dict[Any, tuple[list[str], Mapping[str, Any]]] = {}
    known: dict[int, str] = {}  # the text of each value, by its id; equal numbers are mostly one object
    for name, values in options.items():
        for value in values.values():
            if id(value) not in known:
                known[id(value)] = _comparable(value)
        key = tuple(sorted((option, known[id(value)]) for option, value in values.items()))
        found.setdefault(key, ([], values))[0].append(name)
    for names, values in found.values():
        own = {"param_names": _own_names(names, values["param_names"])} if "param_names" in values else {}
        yield {**values, **own, "params": names}


def _own_names(params: list[str], names: Any) -> Any:
    """The `param_names` of a group; ranks with parts of a model list names that the group does not have."""
    if not isinstance(names, list) or len(names) == len(params):
        return names
    known = set(params)
    made = [name for name in names if type(name) is str and name in known]
    return made if len(made) == len(params) else list(params)


def _comparable(value: Any) -> str:
    if isinstance(value, LazyTensor):
        return f"{describe(value)} {describe(value.tobytes())}" if value.numel == 1 else f"tensor {id(value)}"
    return exact(value) if isinstance(value, bool | int | float | str | tuple | list | None) else f"object {id(value)}"


# --- tree to names --------------------------------------------------------------------------------------------------


def is_flattened(paths: Mapping[str, Path]) -> bool:
    """Whether the optimizers of a checkpoint are flattened, and should be written so again."""
    return any(type(path[-1]) is str and path[-1].startswith("param_groups.") for path in paths.values() if path)


def leaves(tree: Mapping[Any, Any], *, flattened: bool = False) -> tuple[Leaves, list[str]]:
    """Every item of a tree under the name that torch gives it.

    Args:
        tree: Nested dicts and lists; a list is divided into items if it contains a tensor, a dict or such a list.
        flattened: Write optimizers in the form of `flatten_optimizer_state_dict`.

    Returns:
        The items, and notes on what cannot be stored.

    Raises:
        LimitExceededError: Objects that occur in several places would be written too often.
        RepresentationError: Two paths have the same name.
    """
    check_unfolded(tree)
    walker = _Leaves(flattened)
    for key, value in tree.items():
        walker.visit((str(key),), value)
    walker.note_keys((), tree)
    notes = [
        f"{what}: {first}" + (f" and {count - 1} more" if count > 1 else "")
        for what, (count, first) in walker.notes.items()
    ]
    return walker.found, notes


class _Leaves:
    def __init__(self, flattened: bool) -> None:
        self.flattened = flattened
        self.found: Leaves = {}
        self.notes: dict[str, tuple[int, str]] = {}
        self.storages: dict[int, Path] = {}
        self.open: set[int] = set()
        self.entered: dict[int, bool] = {}  # of lists

    def note(self, what: str, path: Path) -> None:
        count, first = self.notes.get(what, (0, format_path(path)))
        self.notes[what] = (count + 1, first)

    def note_keys(self, path: Path, node: Mapping[Any, Any]) -> None:
        if isinstance(node, OrderedDict):
            self.note("an OrderedDict becomes a dict", path)
        if path[-1:] != ("state",) and not all(type(key) is str for key in node):
            self.note("keys that are not text become text", path)

    def is_entered(self, node: Any) -> bool:
        """Whether a list is divided into items: torch's rule is that something in it must have its own name."""
        if not isinstance(node, list):
            return False
        if id(node) not in self.entered:
            self.entered[id(node)] = False  # for a list that contains itself
            found = any(isinstance(item, LazyTensor | Mapping) or self.is_entered(item) for item in node)
            self.entered[id(node)] = found
        return self.entered[id(node)]

    def visit(self, path: Path, node: Any) -> None:
        if not (isinstance(node, Mapping) and node) and not self.is_entered(node):
            self.add(path, node)  # also an empty mapping, which torch does not write, and ignores when reading
            return
        if id(node) in self.open:
            raise RepresentationError(f"{format_path(path)} contains itself")
        self.open.add(id(node))
        if isinstance(node, Mapping):
            self.note_keys(path, node)
            if self.flattened and _is_named_optimizer(node):
                node = dict(_flattened(node))
            for key, value in node.items():
                self.visit((*path, str(key)), value)
        else:
            for index, value in enumerate(node):
                self.visit((*path, index), value)
        self.open.discard(id(node))

    def add(self, path: Path, leaf: Any) -> None:
        name = ".".join(map(str, path))
        if name in self.found:
            raise RepresentationError(
                f"{format_path(self.found[name][0])} and {format_path(path)} would both be named {describe(name)}",
                hint="Rename one of them.",
            )
        self.found[name] = (path, leaf)
        if isinstance(leaf, LazyTensor):
            if self.storages.setdefault(id(leaf.storage), path) != path and leaf.nbytes:
                self.note("tensors that share memory are stored separately", path)
            if not leaf.is_contiguous():
                self.note("strides are not kept", path)
            if leaf.is_parameter:
                self.note("a Parameter becomes a tensor", path)
        elif isinstance(leaf, Opaque):
            self.note(f"an object of {leaf.type.path} is stored as it was pickled", path)


def _is_named_optimizer(node: Mapping[Any, Any]) -> bool:
    groups = node.get("param_groups")
    return (
        isinstance(node.get("state"), Mapping)
        and isinstance(groups, list)
        and all(isinstance(group, Mapping) and _all_text(group.get("params", [0])) for group in groups)
    )


def _all_text(keys: Iterable[Any]) -> bool:
    return all(type(key) is str for key in keys)


def _flattened(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, slots in node["state"].items():
        for slot, value in slots.items():
            yield from _flattened_slot(f"state.{name}.{slot}", value)
    for group in node["param_groups"]:
        for name in group["params"]:
            for option, value in group.items():
                if option != "params":
                    yield f"param_groups.{name}.{option}", value


def _flattened_slot(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened_slot(f"{name}.{key}", inner)
    else:
        yield name, value
