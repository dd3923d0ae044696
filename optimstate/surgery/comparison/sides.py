"""The two checkpoints that `diff` compares, and which section of one belongs to which of the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optimstate.formats.protocol import Document
from optimstate.state.records import is_tensor
from optimstate.state.sections import Section, find_sections
from optimstate.tree import path_key

__all__ = ["Side", "pairs"]


class Side:
    """One of the two checkpoints."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.sections = find_sections(document.tree)
        self._names: dict[str, tuple[str, ...] | str] | None = None

    def names_of(self, section: Section) -> tuple[str, ...] | str:
        """The names that the weights in the file give an optimizer without names, or why they do not."""
        if self._names is None:
            from optimstate.surgery.writing.naming import concluded_names  # few optimizers need them

            self._names = concluded_names(self.document, self.sections)
        return self._names[section.label]

    def section_at(self, other: Section) -> Section | None:
        """What stands where the other side has a section, if it can be read as one."""
        node: Any = self.document.tree
        for key in other.path:
            node = _child(node, key)
        for section in self.sections:
            if section.in_tree is node and section.kind == other.kind:
                return section
        if other.kind not in ("model", "ema") or not isinstance(node, Mapping) or other.host is not None:
            return None
        if not any(map(is_tensor, node.values())) or any(section.in_tree is node for section in self.sections):
            return None
        made = Section(other.kind, other.path, node)
        self.sections.append(made)
        return made


def _child(node: Any, key: str | int) -> Any:
    if isinstance(node, Mapping):
        return next((value for inner, value in node.items() if path_key(inner) == key), None)
    if isinstance(node, list | tuple) and isinstance(key, int) and key < len(node):
        return node[key]
    return None


def pairs(left: Side, right: Side) -> Iterator[tuple[Section | None, Section | None]]:
    """The sections that are compared: at the same place, else of the same kind; None for one without a counterpart."""
    rest = list(right.sections)
    unpaired: list[Section] = []
    for section in list(left.sections):
        same_place = next((other for other in rest if (other.kind, other.path) == (section.kind, section.path)), None)
        if same_place is None:
            unpaired.append(section)
        else:
            rest.remove(same_place)
            yield section, same_place
    for section in unpaired:
        alike = right.section_at(section) or next((other for other in rest if other.kind == section.kind), None)
        rest = [other for other in rest if other is not alike]
        yield section, alike
    for other in rest:
        yield left.section_at(other), other
