"""Sections of a checkpoint chosen by kind or path: written alone, or left out of the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import describe
from optimstate.errors import MigrationError, UsageError
from optimstate.problems import Problem
from optimstate.record import Record
from optimstate.state.sections import KINDS, Section, find_sections, with_hosts
from optimstate.tree import OpaqueFile, Path, format_path, path_key, rebuilt_mapping, replaced

__all__ = ["only", "without"]


def _called(name: str, sections: Sequence[Section]) -> list[Section]:
    found = [section for section in sections if section.label == name] or [s for s in sections if s.kind == name]
    if not found and name not in KINDS:
        paths = (section.label for section in sections)
        raise UsageError.unknown(f"no section is called {describe(name)}", name, (*KINDS, *paths))
    if not found:
        known = (
            f"There are: {_listed(sections)}."
            if sections
            else "No section was recognised; `optimstate inspect` shows what is."
        )
        raise MigrationError.of("section", f"no section is called {describe(name)}", hint=known)
    return found


def _listed(sections: Sequence[Section]) -> str:
    return ", ".join(f"{section.kind} at {section.label}" for section in sections)


def only(tree: Any, nodes: Collection[int]) -> Any:
    """The tree reduced to these nodes, each at its place; gaps in lists are closed.

    Args:
        tree: Not changed.
        nodes: The `id`s of what stays; `tree` itself is not one of them.
    """
    kept = _restricted(tree, nodes)
    return {} if kept is None else kept


def _restricted(node: Any, nodes: Collection[int]) -> Any:
    if id(node) in nodes:
        return node
    if isinstance(node, dict):
        made = {key: kept for key, value in node.items() if (kept := _restricted(value, nodes)) is not None}
        return rebuilt_mapping(node, made) if made else None
    if isinstance(node, list | tuple) and not isinstance(node, OpaqueFile):
        items = [kept for value in node if (kept := _restricted(value, nodes)) is not None]
        return (items if isinstance(node, list) else tuple(items)) if items else None
    return None


class _Place(Record):
    """A place of the tree where a section stands; a section that is there twice has two of them."""

    section: Section
    path: Path
    parent: int
    key: Any

    def __str__(self) -> str:
        return f"{self.section.kind} at {format_path(self.path)}"


def without(tree: Any, names: Sequence[str], sections: Sequence[Section]) -> tuple[Any, list[str], list[str]]:
    """The tree without some sections; everything else stays in place, and gaps in lists are closed.

    Args:
        tree: Not changed; whatever holds none of the sections is shared with the result.
        names: Paths, each of one section, and kinds, each of all sections of a kind.
        sections: Those of the tree.

    Returns:
        The tree, what was left out, and a note for each entry of a list that others moved up for.

    Raises:
        MigrationError: There is no such section, one is the whole checkpoint, or part of a pickled object.
    """
    tree, names, parts = _without_parts(tree, names, sections)
    sections = find_sections(tree) if parts else sections
    places = list(_places(tree, (), {id(section.in_tree): section for section in sections}, set()))
    gone: dict[tuple[int, Any], _Place] = {}
    for name in names:
        found = [place for place in places if format_path(place.path) == name]
        found = found or [place for place in places if place.section.kind == name]
        if not found:
            _refuse_unremovable(tree, _called(name, sections))
        gone.update(((place.parent, place.key), place) for place in found)
    made = _Remover(gone.keys()).visit(tree)
    notes = [
        f"{place} is left out of a list: the entries behind it move up by one"
        for place in gone.values()
        if isinstance(place.key, int) and place.path[-1] == place.key and _is_in_list(tree, place)
    ]
    return made, [*parts, *(str(place) for place in gone.values())], notes


def _without_parts(tree: Any, names: Sequence[str], sections: Sequence[Section]) -> tuple[Any, list[str], list[str]]:
    """The tree less the optimizers, or models, that are one mapping with the other; the names left, and what went."""
    shared = [section for section in sections if section.host is not None]
    gone = [section for section in shared if section.kind in names]
    hosts = {id(section.host) for section in gone}
    stay = [section for section in shared if id(section.host) in hosts and section.kind not in names]
    gone = [section for section in gone if any(section.host is other.host for other in stay)]
    if not gone:
        return tree, list(names), []
    kinds = {section.kind for section in sections if not any(section is one for one in gone)}
    left = [name for name in names if not any(name == one.kind for one in gone) or name in kinds]
    went = [f"{section.kind} at {section.label}" for section in gone]
    return replaced(tree, with_hosts(stay, {}, alone=True)), left, went


def _places(node: Any, path: Path, sections: Mapping[int, Section], seen: set[int]) -> Iterator[_Place]:
    """Every place of a section in dicts and lists."""
    if id(node) in seen or not isinstance(node, dict | list | tuple) or isinstance(node, OpaqueFile):
        return
    seen.add(id(node))
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in pairs:
        inner = (*path, path_key(key))
        if id(value) in sections:
            yield _Place(sections[id(value)], inner, id(node), key)
        else:
            yield from _places(value, inner, sections, seen)


def _refuse_unremovable(tree: Any, sections: Sequence[Section]) -> None:
    if any(section.in_tree is tree for section in sections):
        raise MigrationError.of(
            "section",
            f"the {sections[0].kind} is the whole checkpoint: nothing would be left",
            hint="Name a part of the checkpoint.",
        )
    raise MigrationError(
        [
            Problem("section", f"{section.kind} at {section.label} is inside a pickled object, which is kept whole")
            for section in sections
        ],
        hint="Write what you need with --section.",
    )


def _is_in_list(tree: Any, place: _Place) -> bool:
    node = tree
    for key in place.path[:-1]:
        node = node[key] if not isinstance(node, dict) else next(v for k, v in node.items() if path_key(k) == key)
    return isinstance(node, list | tuple) and place.key < len(node) - 1


class _Remover:
    """Leaves entries out of containers: pairs of a container's `id` and a key or place."""

    def __init__(self, gone: Collection[tuple[int, Any]]) -> None:
        self._gone = gone
        self._done: dict[int, Any] = {}

    def visit(self, node: Any) -> Any:
        if not isinstance(node, dict | list | tuple) or isinstance(node, OpaqueFile):
            return node
        key = id(node)
        if key not in self._done:
            self._done[key] = node  # what contains itself is met again on the way
            self._done[key] = self._less(node)
        return self._done[key]

    def _less(self, node: Any) -> Any:
        pairs = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
        kept = [(key, self.visit(value)) for key, value in pairs if (id(node), key) not in self._gone]
        if len(kept) == len(pairs) and all(new is old for (_, new), (_, old) in zip(kept, pairs, strict=True)):
            return node
        if isinstance(node, dict):
            return rebuilt_mapping(node, dict(kept))
        made = [value for _, value in kept]
        return made if isinstance(node, list) else tuple(made)
