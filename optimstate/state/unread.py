"""What belongs to a model's parameters and stands outside of the sections: no plan moves it.

Optimizer state in a form that is not known, and lists of tensors in the order of the parameters: averages, masters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from optimstate.describe import few
from optimstate.record import Record
from optimstate.state.arrays import is_array
from optimstate.state.judging import MOMENTS, called_optimizer, could_be_moments, slot_in
from optimstate.state.records import is_tensor
from optimstate.state.sections import Judgement, Section
from optimstate.tensors.lazy import LazyTensor
from optimstate.tree import Opaque, OpaqueFile, Path, children, format_path, nodes

__all__ = ["Unread", "outside", "positional_lists", "unread_state"]

Shape = tuple[int, ...]


class Unread(Record):
    """Optimizer state of a form that is not known.

    Attributes:
        found: Each tensor, and whatever else holds state, with the slot or key that tells.
        tensors: Whether all are tensors.
    """

    found: Mapping[Path, str]
    tensors: bool = True

    def __str__(self) -> str:
        words = ("tensor", "tensors") if self.tensors else ("entry", "entries")
        slots = few(sorted(set(self.found.values())), 4)
        what = f"{len(self.found)} {words[len(self.found) > 1]} of optimizer state ({slots})"
        return f"{what}, such as {format_path(next(iter(self.found)))}"


def unread_state(tree: Any, judgement: Judgement) -> Unread | None:
    """The optimizer state that is in no recognised optimizer; None where there is none.

    Args:
        tree: The checkpoint.
        judgement: What it was found to consist of.
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
    if groups is not None and not found:  # else they are the groups of that state
        found[groups], tensors = "param_groups", False
    return Unread(found, tensors) if found else None


def _slot(path: Path, node: Any, optimizers: Sequence[Section], moments: Iterable[Path]) -> str | None:
    """The slot that a tensor is, by its path; None for what is no state, or beside an optimizer in a known way."""
    slot = slot_in(path)
    if slot is not None:
        return slot
    for place in moments:
        if path[: len(place)] == place:
            return str(place[-1])
    called = called_optimizer(path)
    if called is None:
        return None
    if _contains(optimizers, called):  # a wrapper's state beside it is keyed; masters are lists, a scaler has numbers
        is_number = isinstance(node, LazyTensor) and not node.shape
        is_of_parameter = isinstance(path[-2], int) or path[-2].startswith("(")
        if isinstance(path[-1], int) or (is_number and not is_of_parameter):
            return None
    return str(path[-1]).rpartition(".")[2]


def _contains(optimizers: Iterable[Section], place: Path) -> bool:
    """Whether this is, or contains, an optimizer of a known form."""
    return any(section.path[: len(place)] == place for section in optimizers)


def _has_groups_alone(fields: Mapping[Any, Any]) -> bool:
    """Whether it is the param groups of an optimizer without its `state`, which torch does not load."""
    groups = fields.get("param_groups")
    return (
        "state" not in fields
        and isinstance(groups, list | tuple)
        and any(isinstance(group, Mapping) and "params" in group for group in groups)
    )


def positional_lists(tree: Any, sections: Iterable[Section]) -> Iterator[tuple[Path, Section]]:
    """Lists of tensors with the shapes of a model's tensors in its order, and that model.

    They hold at least half of its tensors, two or more, one of them with two dimensions.

    Args:
        tree: The checkpoint.
        sections: Those of the tree; what is in one of them is left out.
    """
    sections = list(sections)
    models = [(found, _shapes(found.tensors().values())) for found in sections if found.kind == "model"]
    for path, node in outside(tree, sections) if models else ():
        if shapes := _listed_shapes(node):
            model = next((one for one, whole in models if _are_of(shapes, whole)), None)
            if model is not None:
                yield path, model


def outside(tree: Any, sections: Iterable[Section]) -> Iterator[tuple[Path, Any]]:
    """The containers of a checkpoint but for those in these sections, tensors, arrays and files of other kinds."""
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
        stack += [((*path, key), child) for key, child in children(node)]


def _listed_shapes(node: Any) -> list[Shape]:
    """The shapes of a list of tensors, also of one that is keyed by numbers; empty for everything else."""
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
    return all(shape in rest for shape in shapes)  # buffers are in the model alone
