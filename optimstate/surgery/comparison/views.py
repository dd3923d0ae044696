"""The parts of a checkpoint as `diff` compares them: tensors and other leaves by name, nothing left out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any

from optimstate.state.names import wrapper_prefix
from optimstate.state.optimizer import OptimizerState, as_mapping
from optimstate.state.sections import Section
from optimstate.surgery.leaves import Shape, is_leaf, key_in_path, leaves, spelled
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, Path, path_key

__all__ = ["OTHER", "Key", "View"]

Key = tuple[str, str]
"""A parameter, or the path of another entry, and its slot; the slot is empty for values of their own."""

OTHER = "other entries"
"""What is in no section."""

MEMBERS = "parameters"
"""The slot of a group that lists its parameters."""


class View:
    """A part as named tensors and other leaves, which together are everything in it.

    Attributes:
        tensors: Those that can be recognised by their content under another name.
        values: Numbers, texts, step counts, options; `Shape`s of containers.
        prefix: The wrapper prefix that was taken off all names.
        notes: What was concluded or could not be told apart.
    """

    def __init__(self) -> None:
        self.tensors: dict[Key, Any] = {}
        self.values: dict[Key, Any] = {}
        self.prefix = ""

    @classmethod
    def of(cls, section: Section | None, names: Sequence[str] | None = None) -> View:
        """The view of a section; an empty one of none.

        Args:
            section: A section of the tree.
            names: For an optimizer without names: what its parameters are called.
        """
        view = cls()
        if section is None:
            return view
        if section.kind == "optimizer":
            view._read_optimizer(section, names)
        elif section.kind == "scheduler":
            view._add_leaves(leaves(section.node))
        else:
            view._read_model(section)
        return view

    @classmethod
    def of_rest(cls, tree: Any, sections: Iterable[Section]) -> View:
        """The view of everything that is in no section."""
        view = cls()
        view._add_leaves(leaves(tree, skip={id(section.in_tree) for section in sections}))
        return view

    @classmethod
    def add_attributes(cls, *sides: tuple[View, Section]) -> None:
        """Add what torch sets on state dicts (versions of modules), where both are such: containers may not hold it."""
        nodes = [section.node for _, section in sides]
        if all(isinstance(node, OrderedDict) and vars(node) for node in nodes):
            found = [dict(leaves(vars(node), (".attributes",))) for node in nodes]
            for (view, _), mine in zip(sides, found, strict=True):  # modules may be called otherwise
                view._add_leaves((path, value) for path, value in mine.items() if all(path in side for side in found))

    def _add_leaves(self, found: Iterable[tuple[Path, Any]], owner: str = "") -> None:
        for path, value in found:
            text = spelled(path)
            key = (owner, text) if owner else (text, "")
            if isinstance(value, LazyTensor) and value.numel != 1:
                self.tensors[key] = value
            else:
                self.values[key] = value

    def _read_model(self, section: Section) -> None:
        found = section.tensors()
        self.prefix = wrapper_prefix([name for name in found if name != "n_averaged"])
        names = [name.removeprefix(self.prefix) for name in found] if self.prefix else found
        self.tensors.update(zip(zip(names, repeat("")), found.values(), strict=True))
        if isinstance(section.node, Opaque) or section.positional:
            seen = {id(value) for value in found.values()}
            self._add_leaves(leaves(section.node, skip=seen))
        else:
            for key, value in section.node.items():
                if key not in found:
                    place = key.removeprefix(self.prefix) if isinstance(key, str) else path_key(key)
                    self._add_leaves(leaves(value, (place,)))

    def _read_optimizer(self, section: Section, names: Sequence[str] | None) -> None:
        state = section.optimizer()
        labels = _labels(state, names)
        self.prefix = wrapper_prefix([label for label in labels if not label.startswith("#")])
        plain = [label.removeprefix(self.prefix) for label in labels]
        for label, (key, _, slots) in zip(plain, state.parameters(), strict=True):
            if isinstance(key, LazyTensor):
                self.tensors[label, "(weight)"] = key
            if slots is not None and not slots:
                self.values[label, "state"] = Shape(slots)
            for slot, value in (slots or {}).items():
                self._add_slot(label, key_in_path(slot), value)
        for key, value in {**{key: state.state[key] for key in state.orphans()}, **state.shared}.items():
            self._add_leaves(leaves(value, ("state", key_in_path(key))))
        rest = iter(plain)
        for index, group in enumerate(state.groups):
            members = tuple(next(rest) for _ in group.params)
            self.values[f"group {index}", MEMBERS] = members
            for option, value in group.options.items():
                self._add_slot(f"group {index}", key_in_path(option), value)
        self.values["state", "keys"] = _keys(state)
        for place, listed in _lists(state):
            if not isinstance(listed, list):  # as torch saves them, and as all containers hold them
                self.values[place, "type"] = type(listed).__name__
        for path, value in _beside(section):
            self._add_leaves(leaves(value, path))

    def _add_slot(self, owner: str, slot: str | int, value: Any) -> None:
        for path, leaf in [((slot,), value)] if is_leaf(value) else leaves(value, (slot,)):
            target = self.tensors if isinstance(leaf, LazyTensor) and leaf.numel != 1 else self.values
            target[owner, spelled(path)] = leaf


def _lists(state: OptimizerState) -> Iterator[tuple[str, Any]]:
    """The lists of groups, and of the parameters of each, as they are in the file."""
    groups = state.node.get("param_groups", [])
    yield "groups", groups
    for index, group in enumerate(groups):
        yield f"group {index} params", group.get("params", []) if isinstance(group, Mapping) else []


def _keys(state: OptimizerState) -> Any:
    """The keys of state: the numbers themselves, which torch loads only by their order, or a description."""
    keys = [key for group in state.groups for key in group.params]
    if all(isinstance(key, str) for key in keys):
        return "by name" if keys else None
    return [*keys] if all(type(key) is int for key in keys) else "by object"


def _labels(state: OptimizerState, names: Sequence[str] | None) -> list[str]:
    own = [name for _, name, _ in state.parameters()]
    given: Sequence[str | None] = own if names is None else names
    return [f"#{index}" if name is None else name for index, name in enumerate(given)]


def _beside(section: Section) -> Iterator[tuple[Path, Any]]:
    """What an optimizer has beside the state of its parameters and its groups."""
    node = section.node
    fields = node.state if isinstance(node, Opaque) and isinstance(node.state, Mapping) else as_mapping(node) or {}
    for key, value in fields.items():
        if key not in ("state", "param_groups"):
            yield (key_in_path(key),), value
    if isinstance(node, Opaque):
        yield ("class",), node.type
