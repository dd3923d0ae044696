"""State of a model's parameters outside of the sections, which no plan moves.

This is optimizer state in an unknown form, and lists of tensors in the order of the parameters: averages, masters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import few
from optimstate.record import Record
from optimstate.state.arrays import is_array
from optimstate.state.judging import MOMENTS, called_optimizer, could_be_moments, slot_in
from optimstate.state.optimizer import as_mapping
from optimstate.state.records import is_tensor
from optimstate.state.sections import Judgement, Section
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, OpaqueFile, Path, children, format_path, nodes

__all__ = ["Unread", "outside", "positional_lists", "unread_state"]

Shape = tuple[int, ...]


class Unread(Record):
    """Optimizer state in an unknown form.

    Attributes:
        found: The path of each tensor or other entry with state, and the slot or key by which it was recognised.
        tensors: Whether all entries are tensors.
    """

    found: Mapping[Path, str]
    tensors: bool = True

    def __str__(self) -> str:
        words = ("tensor", "tensors") if self.tensors else ("entry", "entries")
        slots = few(sorted(set(self.found.values())), 4)
        what = f"{len(self.found)} {words[len(self.found) > 1]} of optimizer state ({slots})"
        return f"{what}, such as {format_path(next(iter(self.found)))}"


def unread_state(tree: Any, judgement: Judgement) -> Unread | None:
    """The optimizer state that is in no recognised optimizer; None if there is none.

    Args:
        tree: The checkpoint.
        judgement: The sections of the checkpoint.
    """
    optimizers = [section for section in judgement.sections if section.kind == "optimizer"]
    hosted = [section for section in optimizers if section.host is not None]
    known = {id(node) for one in hosted for _, _, slots in one.optimizer().parameters() for node in nodes(slots)}
    moments = [path for path, why in judgement.others.items() if why == MOMENTS]
    found: dict[Path, str] = {}
    groups: Path | None = None
    tensors = True
    for place, container in outside(tree, [section for section in optimizers if section.host is None]):
        for key, node in children(container):
            path = (*place, key)
            if is_tensor(node) or is_array(node):
                if id(node) not in known and (slot := _slot(path, node, optimizers, moments)):
                    found[path] = slot
            elif isinstance(node, bytes | bytearray):
                called = called_optimizer(path)
                if node and called is not None and not _contains(optimizers, called):
                    found[path], tensors = str(key), False
            elif isinstance(node, Mapping) and _has_groups_alone(node):
                groups = path
    for path, _ in positional_lists(tree, judgement.sections):
        if could_be_moments(path) and not any(inner[: len(path)] == path for inner in found):
            found[path], tensors = str(path[-1]), False
    if groups is not None and not found:  # otherwise these groups belong to that state
        found[groups], tensors = "param_groups", False
    return Unread(found, tensors) if found else None


def _slot(path: Path, node: Any, optimizers: Sequence[Section], moments: Iterable[Path]) -> str | None:
    """The slot of a tensor by its path; None if it is not state, or belongs to a known optimizer or its wrapper."""
    slot = slot_in(path)
    if slot is not None:
        return slot
    for place in moments:
        if path[: len(place)] == place:
            return str(place[-1])
    called = called_optimizer(path)
    if called is None:
        return None
    if _contains(optimizers, called):  # besides keyed state, wrappers of a known optimizer have masters and scalers
        is_number = isinstance(node, LazyTensor) and not node.shape
        is_of_parameter = isinstance(path[-2], int) or path[-2].startswith("(")
        if isinstance(path[-1], int) or (is_number and not is_of_parameter):
            return None
    return str(path[-1]).rpartition(".")[2]


def _contains(optimizers: Iterable[Section], place: Path) -> bool:
    """Whether a path is that of a known optimizer, or of a container of one."""
    return any(section.path[: len(place)] == place for section in optimizers)


def _has_groups_alone(fields: Mapping[Any, Any]) -> bool:
    """Whether a mapping has an optimizer's param groups without its `state`, or with one of another type."""
    groups = fields.get("param_groups")
    return (
        as_mapping(fields.get("state")) is None
        and isinstance(groups, list | tuple)
        and any(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def positional_lists(tree: Any, sections: Iterable[Section]) -> Iterator[tuple[Path, Section]]:
    """Lists of tensors with the shapes of a model's tensors in its order, each with the model.

    Each has at least half of the model's tensors, at least two, and at least one with two dimensions.

    Args:
        tree: The checkpoint.
        sections: The sections of the checkpoint, which are not searched.
    """
    sections = list(sections)
    models = [(found, _shapes(found.tensors().values())) for found in sections if found.kind == "model"]
    for path, node in outside(tree, sections) if models else ():
        if shapes := _listed_shapes(node):
            model = next((one for one, whole in models if _are_of(shapes, whole)), None)
            if model is not None:
                yield path, model


def outside(tree: Any, sections: Iterable[Section]) -> Iterator[tuple[Path, Any]]:
    """The containers of a checkpoint, without these sections and without records of tensors, arrays and files."""
    seen = {id(section.in_tree) for section in sections}
    stack: list[tuple[Path, Any]] = [((), tree)]
    while stack:
        path, node = stack.pop()
        if not isinstance(node, dict | list | tuple | Opaque) or id(node) in seen:
            continue
        if isinstance(node, OpaqueFile) or is_tensor(node) or is_array(node):
            continue
        seen.add(id(node))
        yield path, node
        stack += [((*path, key), child) for key, child in children(node) if type(child) is not LazyTensor]


def _listed_shapes(node: Any) -> list[Shape]:
    """The shapes of a list of tensors, or of a dict of tensors with the keys 0, 1, ...; empty for any other node."""
    if isinstance(node, Mapping) and list(node) == list(range(len(node))):
        node = list(node.values())
    if not isinstance(node, list | tuple) or not all(isinstance(item, LazyTensor) for item in node):
        return []
    return _shapes(node)


def _shapes(values: Iterable[Any]) -> list[Shape]:
    return [value.shape for value in values if isinstance(value, LazyTensor)]


def _are_of(shapes: Sequence[Shape], whole: Sequence[Shape]) -> bool:
    if len(shapes) < 2 or 2 * len(shapes) < len(whole) or max(map(len, shapes)) < 2:
        return False
    rest = iter(whole)
    return all(shape in rest for shape in shapes)  # a subsequence, because buffers are only in the model
